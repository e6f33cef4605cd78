"""Packing: every token once, documents and labels that end with their sequence, and equal work on all ranks."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.errors import ConfigError
from trainer.objectives.language_model import LanguageModel
from trainer.posttraining.data.packing import SEQUENCE, Packing, pack, plan
from trainer.posttraining.data.sequences import TokenSequence, load_sequences, save_sequences


def sequences_of(lengths):
    """Sequences whose tokens are all different, with weights and another value that follow from them."""
    ends = np.cumsum([0, *lengths])
    tokens = [np.arange(start + 1, stop + 1, dtype=np.int32) for start, stop in pairwise(ends)]
    return [TokenSequence(t, (t % 3).astype(np.float32), {"value": -t.astype(np.float32)}) for t in tokens]


@st.composite
def cases(draw):
    multiple = draw(st.integers(1, 4))
    size = multiple * draw(st.integers(1, 8))
    lengths = draw(st.lists(st.integers(1, size), max_size=20))
    world, seed, step = draw(st.integers(1, 4)), draw(st.integers(0, 3)), draw(st.integers(0, 3))
    return lengths, Packing(size, multiple, draw(st.booleans()), pad_id=0), seed, step, world


@given(cases())
def test_every_token_is_in_one_place_with_its_label(case):
    lengths, packing, seed, step, world = case
    sequences = sequences_of(lengths)
    ranks = [pack(sequences, packing, seed=seed, step=step, rank=rank, world=world) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1 and ranks[0]
    found, places = [], set()
    for batch in (batch for batches in ranks for batch in batches):
        rows, size = batch.tokens.shape
        assert rows == 1 and size % packing.multiple == 0 and packing.multiple <= size <= packing.tokens
        assert size == packing.tokens or not packing.fixed_length
        assert batch.documents.tokens == size
        for tensor in (batch.labels, batch.loss_mask, batch.positions, *batch.extra.values()):
            assert tensor.shape == (1, size)
        own = set(range(batch.origin.first, batch.origin.first + size))
        assert batch.origin.step == step and not own & places
        places |= own
        for start, stop in pairwise(batch.documents.bounds):
            within = slice(start, stop)
            assert batch.positions[0, within].tolist() == list(range(stop - start))
            (number,) = set(batch.extra[SEQUENCE][0, within].tolist())
            if number < 0:
                assert stop == size and not batch.loss_mask[0, within].any()
                continue
            found.append(number)
            sequence = sequences[number]
            assert batch.tokens[0, within].tolist() == sequence.tokens.tolist()
            assert batch.labels[0, start : stop - 1].tolist() == sequence.tokens[1:].tolist()
            assert batch.loss_mask[0, within].tolist() == [*sequence.loss_mask[1:], 0]
            assert batch.extra["value"][0, within].tolist() == [*sequence.extra["value"][1:], 0]
            assert batch.extra["value"].dtype == torch.float32
    assert sorted(found) == list(range(len(lengths)))
    counted = sum(LanguageModel().count(batch) for batches in ranks for batch in batches)
    assert counted == sum(sequence.learned for sequence in sequences)


@given(cases())
def test_micro_batches_are_few_and_none_is_empty_while_another_could_share(case):
    lengths, packing, seed, step, world = case
    ranks = plan(lengths, packing, seed=seed, step=step, world=world)
    bins = [members for rank in ranks for members in rank]
    assert all(bins) or max(map(len, bins)) <= 1
    # First fit leaves at most one micro-batch half empty, and then comes the rounding to ranks.
    most = 2 * sum(lengths) // packing.tokens + 1
    assert len(ranks[0]) <= -(-most // world)


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(1, 5), st.data())
def test_a_fixed_count_is_always_enough(seq_len, micro, world, count, data):
    """Sequences of up to seq_len tokens fit into global_batch_size / (micro_batch_size · ranks) micro-batches."""
    lengths = data.draw(st.lists(st.integers(1, seq_len), max_size=micro * world * count))
    ranks = plan(lengths, Packing(seq_len * micro, count=count), seed=0, step=0, world=world)
    assert [len(rank) for rank in ranks] == [count] * world


def test_ranks_get_about_equal_tokens():
    lengths = np.random.default_rng(0).integers(1, 100, 200).tolist()
    ranks = plan(lengths, Packing(256), seed=0, step=0, world=4)
    totals = [sum(lengths[number] for members in rank for number in members) for rank in ranks]
    assert len({len(rank) for rank in ranks}) == 1 and max(totals) - min(totals) < 0.02 * sum(lengths)
    # As few micro-batches as the tokens allow, up to the rounding to ranks.
    assert len(ranks[0]) == -(-sum(lengths) // (256 * 4))


def test_ranks_are_balanced_from_the_fullest_micro_batch_on():
    # Spread over four micro-batches: 6, 5, 4 and 3 + 3 tokens.
    ranks = plan([6, 5, 4, 3, 3], Packing(8), seed=0, step=0, world=2)
    assert sorted(sorted(map(len, rank)) for rank in ranks) == [[1, 1], [1, 2]]
    totals = [sum([6, 5, 4, 3, 3][number] for members in rank for number in members) for rank in ranks]
    assert sorted(totals) == [10, 11]


@pytest.mark.parametrize("count", [None, 8])
def test_full_micro_batches_that_cannot_be_spread_are_kept_or_halved(count):
    # First fit: 4 of 3 + 3, 3 of 2 + 2 + 2. The emptiest first puts a 3 into each of eight, and the last 2 overflows.
    lengths = [3] * 8 + [2] * 9
    (rank,) = plan(lengths, Packing(6, count=count), seed=0, step=0)
    assert sorted(number for members in rank for number in members) == list(range(17))
    sizes = sorted(sum(lengths[number] for number in members) for members in rank)
    assert sizes == ([6] * 7 if count is None else [2, 4] + [6] * 6)


def test_seed_and_step_decide_between_equal_lengths():
    def placed(seed, step):
        return plan([5] * 12, Packing(15), seed=seed, step=step, world=2)

    assert placed(0, 0) == placed(0, 0)
    assert placed(0, 0) != placed(0, 1) and placed(0, 0) != placed(1, 0)


def test_a_rank_without_sequences_computes_a_padded_micro_batch_that_counts_nothing():
    batches = [pack(sequences_of([4]), Packing(8, 4, pad_id=9), seed=0, step=0, rank=rank, world=2) for rank in (0, 1)]
    empty = min((own[0] for own in batches), key=LanguageModel().count)
    assert LanguageModel().count(empty) == 0 and empty.tokens.tolist() == [[9] * 4]
    assert empty.documents.bounds == (0, 4) and empty.extra[SEQUENCE].tolist() == [[-1] * 4]
    assert empty.extra.keys() == {SEQUENCE, "value"}
    (nothing,) = pack([], Packing(8), seed=0, step=0)
    assert nothing.tokens.tolist() == [[0]]


@st.composite
def groups(draw):
    """Answers to a few prompts, some of them the same, and sequences without a prompt."""
    lengths = draw(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9)), min_size=1, max_size=12))
    sequences = []
    for prompt, answer in lengths:
        pieces = [(range(100, 100 + prompt), False), (draw(st.lists(st.integers(0, 99), min_size=answer)), True)]
        one = TokenSequence.of([piece for piece in pieces if piece[0]])
        sequences.append(replace(one, extra={"value": -one.tokens.astype(np.float32)}))
    longest = max(map(len, sequences))
    packing = Packing(draw(st.integers(longest, 4 * longest)), pad_id=0, share=draw(st.integers(0, 12)))
    return sequences, packing, draw(st.integers(1, 3))


@given(groups())
def test_a_shared_prompt_is_computed_once_and_every_answer_has_its_row(case):
    sequences, packing, world = case
    ranks = [pack(sequences, packing, seed=0, step=0, rank=rank, world=world) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    found = []
    for batch in (batch for batches in ranks for batch in batches):
        if batch.prefix is None:
            assert len(batch.tokens) == 1 and batch.documents is not None
            found += sorted(set(batch.extra[SEQUENCE][0].tolist()) - {-1})
            continue
        rows, time = batch.tokens.shape
        prefix = batch.prefix[0].tolist()
        assert batch.documents is None and rows > 1 and len(prefix) + rows * time <= packing.tokens
        apart = 0
        for row in range(rows):
            (number,) = set(batch.extra[SEQUENCE][row].tolist()) - {-1}
            sequence, size = sequences[number], len(sequences[number]) - len(prefix)
            found.append(number)
            apart += len(sequence)
            assert prefix + batch.tokens[row, :size].tolist() == sequence.tokens.tolist()
            assert batch.positions[row].tolist() == list(range(len(prefix), len(prefix) + time))
            assert batch.labels[row, : size - 1].tolist() == sequence.tokens[-size:].tolist()[1:]
            assert batch.loss_mask[row].tolist() == [1] * (size - 1) + [0] * (time - size + 1)
            assert batch.extra["value"][row, : size - 1].tolist() == (-sequence.tokens[-size:][1:]).tolist()
            assert batch.extra[SEQUENCE][row].tolist() == [number] * size + [-1] * (time - size)
        assert apart - len(prefix) - rows * time >= packing.share
    assert sorted(found) == list(range(len(sequences)))
    counted = sum(LanguageModel().count(batch) for batches in ranks for batch in batches)
    assert counted == sum(sequence.learned for sequence in sequences)


def test_what_is_shared_goes_to_all_ranks():
    """Three groups and an answer by itself, over two ranks: two micro-batches each."""
    sequences = [
        TokenSequence.of([([group] * 20, False), ([answer] * 4, True)]) for group in range(3) for answer in range(4)
    ]
    sequences.append(TokenSequence.of([([9] * 20, False), ([1] * 4, True)]))
    ranks = [pack(sequences, Packing(64, share=8), seed=0, step=0, rank=rank, world=2) for rank in range(2)]
    shared = [[batch.prefix is not None for batch in batches] for batches in ranks]
    assert [len(batches) for batches in ranks] == [2, 2] and sum(map(sum, shared)) == 3
    assert {batch.tokens.shape for batches in ranks for batch in batches if batch.prefix is not None} == {(4, 5)}


def test_parts_of_context_ranks_join_to_the_whole():
    (batch,) = pack(sequences_of([5, 3]), Packing(16, 4), seed=0, step=0)
    assert batch.tokens.shape == (1, 8)
    parts = [batch.part(rank, 4) for rank in range(4)]
    assert torch.equal(torch.cat([part.extra[SEQUENCE] for part in parts], 1), batch.extra[SEQUENCE])


def test_what_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match="a sequence of 9 tokens does not fit into a micro-batch of 8"):
        plan([3, 9], Packing(8), seed=0, step=0)
    with pytest.raises(ConfigError, match="take 3 micro-batches of 8 tokens, and there are 1 on each of 2 ranks"):
        plan([8, 8, 8], Packing(8, count=1), seed=0, step=0, world=2)
    with pytest.raises(ConfigError, match="6 tokens does not divide into 4 ranks' parts"):
        Packing(6, 4)
    without_extra = TokenSequence(np.ones(2, np.int32), np.ones(2, np.float32))
    with pytest.raises(ValueError, match="differ in their extra values"):
        pack([*sequences_of([2]), without_extra], Packing(8), seed=0, step=0)
    with pytest.raises(ValueError, match="as many of all else"):
        TokenSequence(np.ones(2, np.int32), np.ones(3, np.float32))


def test_sequences_survive_a_file(tmp_path):
    sequences = [replace(one, prompt=number) for number, one in enumerate(sequences_of([3, 1, 4]))]
    save_sequences(tmp_path / "a.safetensors", sequences)
    for read, written in zip(load_sequences(tmp_path / "a.safetensors"), sequences, strict=True):
        for name in ("tokens", "loss_mask"):
            assert np.array_equal(getattr(read, name), getattr(written, name))
        assert np.array_equal(read.extra["value"], written.extra["value"]) and read.prompt == written.prompt
    (tmp_path / "b.safetensors").write_bytes(b"nothing")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_sequences(tmp_path / "b.safetensors")
