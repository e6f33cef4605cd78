"""Which rows a step takes: each once per epoch, by the step alone."""

import numpy as np
import pytest
import torch

from tests.trainer.conftest import in_process_config
from trainer.data.sources import find_sources
from trainer.engines.megatron import MegatronEngine
from trainer.engines.spec import EngineSpec
from trainer.errors import ConfigError
from trainer.objectives.language_model import LanguageModel
from trainer.posttraining.data.packing import SEQUENCE, Packing, pack
from trainer.posttraining.data.sampler import PromptSampler, SupervisedSampler
from trainer.posttraining.data.sequences import TokenSequence


def pool(*lengths):
    """Sequences of their own number, so that batches show which rows they have."""
    return [
        TokenSequence(np.full(length, number, np.int32), np.ones(length, np.float32))
        for number, length in enumerate(lengths, 1)
    ]


def make(**options):
    lengths = 2 + np.arange(10) % 5
    return SupervisedSampler([pool(*lengths)], seed=3, seq_len=8, global_batch_size=4, **options)


def same(a, b):
    fields = ("tokens", "labels", "loss_mask", "positions")
    assert a.documents == b.documents and a.origin == b.origin and a.extra.keys() == b.extra.keys()
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in fields)


def test_a_resumed_run_reads_the_same_batches():
    straight, resumed = make(), make()
    batches = {step: straight.micro_batches(step, 2) for step in range(6)}
    for step in (5, 3, 4):
        again = resumed.micro_batches(step, 2)
        assert len(again) == len(batches[step]) and all(map(same, again, batches[step]))


def test_every_row_comes_once_per_epoch_in_another_order():
    sampler = make()
    rows = [int(sequence.tokens[0]) for step in range(5) for sequence in sampler.sequences(step)]
    assert sorted(rows[:10]) == sorted(rows[10:]) == list(range(1, 11)) and rows[:10] != rows[10:]
    assert sampler.epochs(5) == [2.0]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_share_a_steps_rows(world):
    sampler = make(packing=Packing(8, multiple=2))
    ranks = [sampler.micro_batches(1, 1, rank=rank, world=world) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    numbers = [
        number
        for batches in ranks
        for batch in batches
        for number in set(batch.extra[SEQUENCE].flatten().tolist()) - {-1}
    ]
    assert sorted(numbers) == [0, 1, 2, 3]
    assert all(batch.tokens.shape[1] % 2 == 0 for batches in ranks for batch in batches)


def test_a_fixed_count_of_micro_batches():
    sampler = make(fixed_count=True)
    assert {len(sampler.micro_batches(step, 1, rank=1, world=2)) for step in range(8)} == {2}
    assert {len(sampler.micro_batches(step, 2, world=1)) for step in range(8)} == {2}


def test_sequences_longer_than_the_model_reads_are_refused():
    with pytest.raises(ConfigError, match=r"a sequence has 9 tokens, and train.seq_len is 8"):
        SupervisedSampler([pool(9)], seed=0, seq_len=8, global_batch_size=1)
    with pytest.raises(ConfigError, match="pool 1 has no rows"):
        SupervisedSampler([pool(3), []], (1, 1), seed=0, seq_len=8, global_batch_size=1)


def test_prompts_of_a_step():
    sampler = PromptSampler([["a", "b", "c", "d", "e"]], seed=1, prompts_per_step=4)
    stream = sampler.take(0, 20)
    assert all(sorted(stream[start : start + 5]) == list("abcde") for start in range(0, 20, 5))
    assert len({tuple(stream[start : start + 5]) for start in range(0, 20, 5)}) > 1
    assert sampler.prompts(2) == stream[8:12] == sampler.prompts(2, world=2) + sampler.prompts(2, rank=1, world=2)
    assert list(sampler.numbers(2, rank=1, world=2)) == [10, 11]
    assert sampler.epochs(5) == [4.0]
    assert PromptSampler([list("abcde")], seed=2, prompts_per_step=4).take(0, 20) != stream
    with pytest.raises(ConfigError, match="4 prompts per step are not a multiple of 3 ranks"):
        sampler.prompts(0, world=3)


def test_pools_are_blended_by_weight():
    sampler = PromptSampler([["a", "b"], ["x"]], (1, 3), seed=0, prompts_per_step=8)
    for step in range(4):
        taken = sampler.prompts(step)
        assert taken.count("x") == 6 and taken.count("a") == taken.count("b") == 1
    assert sampler.epochs(1) == [1.0, 6.0]


def test_a_step_does_not_depend_on_its_packing(tiny_data, tmp_path):
    """Also with more micro-batches than sequences, of which some are padding only."""
    config = in_process_config(tiny_data, tmp_path / "run")
    vocab_size = config.model.padded_vocab_size(find_sources(config).vocab_size)
    engine = MegatronEngine(EngineSpec.of(config, vocab_size), torch.device("cpu"))
    (sequences,) = [pool(5, 9, 3, 12)]
    results = []
    for packing in (Packing(32), Packing(12, multiple=4), Packing(16, fixed_length=True, count=6)):
        batches = pack(sequences, packing, seed=0, step=0)
        results.append((len(batches), engine.train_step(batches, LanguageModel(), lr=0.0)))
    engine.close()
    (one, first), (three, second), (six, third) = results
    assert (one, three, six) == (1, 3, 6) and first.tokens == second.tokens == third.tokens == 5 + 9 + 3 + 12 - 4
    assert first.loss > 1 and first.grad_norm > 0
    for other in (second, third):
        assert other.loss == pytest.approx(first.loss, rel=1e-5)
        assert other.grad_norm == pytest.approx(first.grad_norm, rel=1e-4)
