"""Reading: the sample stream against a naive concatenation, blending, and what a batch may depend on."""

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from trainer.data import indexed
from trainer.data.dataset import EvaluationStream, Sampler, TokenSource, blend, open_training_data, split_ratios
from trainer.data.indexed import (
    TokenArray,
    TokenFile,
    open_through_megatron,
    parts,
    read_index,
    token_dtype,
    write_index,
)
from trainer.errors import ConfigError

EOD = 0


def build(directory: Path, name: str, documents: list[list[list[int]]], dtype: type = np.uint16) -> Path:
    """Write documents of one or more sequences with Megatron's own builder."""
    prefix = directory / name
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for sequences in documents:
        builder.add_document(torch.tensor(sum(sequences, [])), [len(sequence) for sequence in sequences])
    builder.finalize(f"{prefix}.idx")
    return prefix


def random_documents(count: int, longest: int, seed: int = 0) -> list[list[list[int]]]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, longest, count)
    return [[[*rng.integers(1, 900, length - 1).tolist(), EOD]] for length in lengths]


@pytest.fixture
def data(tmp_path) -> Path:
    return build(tmp_path, "data", random_documents(40, 30))


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.uint16, np.int32, np.int64])
def test_megatron_files_of_any_dtype_read_the_same(tmp_path, dtype):
    documents = [[[1, 2, 3], [4]], [[5, EOD]], [[6], [7], [8, 9, 10]]]
    prefix = build(tmp_path, "data", documents, dtype)
    file, theirs = TokenFile(prefix), IndexedDataset(str(prefix))
    assert file.tokens.dtype == theirs.index.dtype
    assert file.tokens.tolist() == np.concatenate([theirs[place] for place in range(len(theirs))]).tolist()
    assert [file.tokens[a:b].tolist() for a, b in zip(file.borders, file.borders[1:])] == [
        sum(document, []) for document in documents
    ]


@pytest.mark.parametrize("vocab_size", [4096, 65499, 65500, 150_000])
def test_our_index_is_megatrons_byte_for_byte(tmp_path, vocab_size):
    dtype = token_dtype(vocab_size)
    assert dtype == DType.optimal_dtype(vocab_size)
    documents = [[document[0]] for document in random_documents(20, 30)]
    prefix = build(tmp_path, "theirs", documents, dtype.type)
    write_index(tmp_path / "ours.idx", np.array([len(document[0]) for document in documents]), dtype)
    assert (tmp_path / "ours.idx").read_bytes() == Path(f"{prefix}.idx").read_bytes()
    assert read_index(tmp_path / "ours").dtype == dtype


def naive_stream(file: TokenFile, source: TokenSource, epochs: int) -> np.ndarray:
    return np.concatenate(
        [file.tokens[file.borders[d] : file.borders[d + 1]] for epoch in range(epochs) for d in source.order(epoch)]
    )


@pytest.mark.parametrize("seq_len", [1, 7, 64, 5000])
def test_samples_are_a_concatenation_cut_across_documents(data, seq_len):
    file = TokenFile(data)
    source = TokenSource(file, seed=5)
    epochs = 3 + 2 * seq_len // len(source)
    stream = naive_stream(file, source, epochs)
    block = max(len(source) // seq_len, 1)
    blocks = (len(stream) - 1) // seq_len // block
    for start in range(0, blocks * block, block):
        samples = {tuple(source.sample(index, seq_len)) for index in range(start, start + block)}
        places = range(start, start + block)
        assert samples == {tuple(stream[place * seq_len : (place + 1) * seq_len + 1]) for place in places}


def test_samples_are_shuffled_within_a_block_and_differently_in_the_next(data):
    source = TokenSource(TokenFile(data), seed=5)
    block = len(source) // 7
    places = [source._places(number, block) for number in (0, 1)]
    for number, order in enumerate(places):
        assert sorted(order) == list(range(number * block, (number + 1) * block))
        assert list(order) != sorted(order)
    assert list(places[0]) != list(places[1] - block)
    assert TokenSource(TokenFile(data), seed=6)._places(0, block).tolist() != places[0].tolist()


def test_training_reads_through_megatron_and_sees_the_same(data):
    ours, theirs = TokenFile(data), open_through_megatron(data)
    assert isinstance(theirs.owner, IndexedDataset)
    np.testing.assert_array_equal(ours.tokens, theirs.tokens)
    np.testing.assert_array_equal(ours.borders, theirs.borders)
    sampler = open_training_data(data, seed=1, seq_len=8, global_batch_size=2, eod_id=EOD)
    assert isinstance(sampler.sources[0].file.owner, IndexedDataset)


def test_every_epoch_reads_every_document_once_in_its_own_order(data):
    file = TokenFile(data)
    orders = {
        (seed, number, epoch): TokenSource(file, seed, number).order(epoch)
        for seed, number, epoch in itertools.product((0, 1), (0, 1), (0, 1, 2))
    }
    for order in orders.values():
        assert sorted(order) == list(range(40))
    assert len({tuple(order) for order in orders.values()}) == len(orders)
    np.testing.assert_array_equal(TokenSource(file, 1, 1).order(2), orders[1, 1, 2])


def test_the_order_is_pinned(data):
    """A changed order would silently end the sameness of runs that are resumed with a newer version."""
    assert TokenSource(TokenFile(data), seed=1234, number=1).order(3)[:8].tolist() == [8, 14, 9, 36, 39, 0, 2, 18]


def test_empty_documents_and_several_sequences(tmp_path):
    documents = [[[1, 2], [3], [EOD]], [[EOD]], [[4, 5, 6, EOD]], [[7], [8, EOD]]]
    prefix = build(tmp_path, "several", documents, np.int32)
    builder = IndexedDatasetBuilder(str(tmp_path / "empty.bin"), dtype=np.int64)
    for document in ([1, 2, EOD], [], [3, EOD]):
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(str(tmp_path / "empty.idx"))
    assert TokenFile(prefix).borders.tolist() == [0, 4, 5, 9, 12]
    for name in ("several", "empty"):
        file = TokenFile(tmp_path / name)
        file.check_ends(EOD)
        source = TokenSource(file, 0)
        np.testing.assert_array_equal(source.read(0, 3 * len(source)), naive_stream(file, source, 3))


@pytest.mark.parametrize("weights", [[1.0], [0.5, 0.5], [0.3, 0.7], [3, 1, 2, 0.01], [1 / 3, 1 / 7, 0.2]])
def test_blends_match_their_weights_everywhere(weights):
    ratios = split_ratios(weights)
    shares = np.array(weights) / sum(weights)
    counts = np.zeros(len(weights), int)
    for sample in range(3000):
        source, index = blend(sample, ratios)
        assert index == counts[source], "each source's samples come in order, none left out"
        counts[source] += 1
        assert np.all(np.abs(counts - (sample + 1) * shares) < len(weights))


@pytest.mark.parametrize(
    ("weights", "sources"),
    [([1, 1], [0, 1] * 5), ([1, 2], [1, 0, 1] * 3), ([1, 1, 2], [2, 0, 1, 2] * 2), ([3, 2], [0, 1, 0, 1, 0] * 2)],
)
def test_the_order_of_a_blend_stays(weights, sources):
    """Shares are rounded half up: another rule would give the next step of a blended run other samples."""
    ratios = split_ratios(weights)
    assert [blend(sample, ratios)[0] for sample in range(len(sources))] == sources


def test_blends_are_exact_far_out():
    ratios = split_ratios([0.1, 0.2, 0.7])
    for start in (10**9, 10**15 + 3):
        picks = [blend(sample, ratios) for sample in range(start, start + 1000)]
        counts = [sum(source == number for source, _ in picks) for number in range(3)]
        assert counts == pytest.approx([100, 200, 700], abs=2)
        for number, share in enumerate((0.1, 0.2, 0.7)):
            indices = [index for source, index in picks if source == number]
            assert indices == list(range(indices[0], indices[0] + len(indices)))
            assert abs(indices[0] - share * start) < 3


def sampler(prefix: Path, global_batch_size: int = 8, seed: int = 1) -> Sampler:
    sources = [TokenSource(TokenFile(prefix), seed, number) for number in range(2)]
    return Sampler(sources, [0.25, 0.75], seq_len=16, global_batch_size=global_batch_size, eod_id=EOD)


def test_a_batch_does_not_depend_on_what_was_read_before(data):
    one = sampler(data)
    forwards = [one.samples(step) for step in range(40)]
    for step in (39, 3, 17):
        np.testing.assert_array_equal(sampler(data).samples(step), forwards[step])
    assert not np.array_equal(sampler(data, seed=2).samples(3), forwards[3])


@pytest.mark.parametrize(("world", "micro"), [(1, 8), (1, 2), (2, 2), (2, 4), (4, 1), (4, 2), (8, 1)])
def test_ranks_and_micro_batches_share_one_global_batch(data, world, micro):
    one = sampler(data)
    rows = one.samples(5)
    batches = [batch for rank in range(world) for batch in one.micro_batches(5, micro, rank=rank, world=world)]
    assert len(batches) == 8 // micro
    np.testing.assert_array_equal(torch.cat([batch.tokens for batch in batches], 1).reshape(8, 16), rows[:, :-1])
    np.testing.assert_array_equal(torch.cat([batch.labels for batch in batches], 1).reshape(8, 16), rows[:, 1:])
    # Tokens are numbered in the batch of the step, for noise that no layout changes.
    origins = [batch.origin for batch in batches]
    assert [(origin.step, origin.first) for origin in origins] == [(5, 16 * micro * i) for i in range(8 // micro)]
    assert [batches[0].part(rank, 2).origin.offset for rank in range(2)] == [0, 8 * micro]


def test_batch_sizes_regroup_the_same_samples(data):
    large, small = sampler(data, 8), sampler(data, 4)
    np.testing.assert_array_equal(large.samples(3), np.concatenate([small.samples(6), small.samples(7)]))


def test_indivisible_batches_are_refused(data):
    with pytest.raises(ValueError, match="not a multiple"):
        sampler(data).micro_batches(0, 3)


def test_epochs(data):
    one = sampler(data)
    counts = np.zeros(2)
    for step in range(30):
        assert one.epochs(step) == pytest.approx(counts * 16 / len(one.sources[0]))
        for source, _ in one.sample_indices(step):
            counts[source] += 1


def test_open_training_data_blends_prefixes(tmp_path, data):
    other = build(tmp_path, "other", random_documents(9, 50, seed=3), np.int32)
    one = open_training_data({str(data): 3, str(other): 1}, seed=1, seq_len=8, global_batch_size=4, eod_id=EOD)
    assert sum(source == 0 for step in range(10) for source, _ in one.sample_indices(step)) == 30
    assert len(one.sources[1]) == len(TokenFile(other).tokens)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("document_mask", [True, False])
@pytest.mark.parametrize(("seq_len", "stride"), [(16, None), (16, 16), (16, 5), (16, 1), (4096, None), (4096, 100)])
def test_evaluation_counts_every_token_once(data, seq_len, stride, document_mask, world):
    tokens = TokenFile(data).tokens
    counted: list[int] = []
    lengths = set()
    for rank in range(world):
        stream = EvaluationStream(
            data,
            seq_len,
            micro_batch_size=3,
            eod_id=EOD,
            stride=stride,
            document_mask=document_mask,
            rank=rank,
            world=world,
        )
        batches = list(stream)
        assert len(batches) == len(stream)
        lengths.add(len(stream))
        for batch in batches:
            assert batch.tokens.numel() == 3 * seq_len
            counted += batch.labels[batch.loss_mask > 0].tolist()
    assert len(lengths) == 1, "ranks that disagree on the number of micro-batches wait for each other forever"
    assert counted == tokens.tolist()


def test_evaluation_context(data):
    """A counted label has the tokens before it as its context: at least T - stride, after the first window."""
    tokens = np.concatenate([[EOD], TokenFile(data).tokens]).tolist()
    place = 1
    for batch in EvaluationStream(data, 16, eod_id=EOD, stride=4, document_mask=False):
        row, labels, mask = (tensor[0].tolist() for tensor in (batch.tokens, batch.labels, batch.loss_mask))
        for column in np.flatnonzero(mask):
            assert labels[column] == tokens[place]
            assert row[: column + 1] == tokens[place - column - 1 : place]
            assert place <= 16 or column >= 12
            place += 1


def test_evaluation_limit_spreads_over_the_split(data):
    everything = [batch.tokens.tolist() for batch in EvaluationStream(data, 16, eod_id=EOD)]
    some = [batch.tokens.tolist() for batch in EvaluationStream(data, 16, eod_id=EOD, limit=4)]
    assert some == [everything[len(everything) * part // 4] for part in range(4)]


def test_padding_adds_one_document(data):
    batch = list(EvaluationStream(data, 4096, eod_id=EOD))[-1]
    assert len(batch.documents) - 1 == 40 + 1, (
        "the documents, the leading end-of-document token, the padding, less one border"
    )


def test_damaged_data_is_refused(tmp_path, data):
    with pytest.raises(ConfigError, match="ends with token"):
        open_training_data(str(data), seed=0, seq_len=8, global_batch_size=1, eod_id=7)
    with pytest.raises(ConfigError, match=r"data\.tokenizer"):
        open_training_data(str(data), seed=0, seq_len=8, global_batch_size=1)
    with pytest.raises(ConfigError, match=r"none\.bin does not exist"):
        open_training_data(str(tmp_path / "none"), seed=0, seq_len=8, global_batch_size=1)
    with pytest.raises(ConfigError, match="weight"):
        open_training_data({str(data): 0}, seed=0, seq_len=8, global_batch_size=1)
    content = Path(f"{data}.bin").read_bytes()
    Path(f"{data}.bin").write_bytes(content[:-2])
    with pytest.raises(ConfigError, match="cut short"):
        TokenFile(data)
    Path(f"{data}.idx").write_bytes(b"nonsense" * 10)
    with pytest.raises(ConfigError, match="cannot be read"):
        TokenFile(data)


def rewrite_index(prefix: Path, change) -> None:
    """Change the arrays of an `.idx`: lengths, byte offsets and borders of documents."""
    path = Path(f"{prefix}.idx")
    header, index = path.read_bytes()[:34], read_index(prefix)
    arrays = {name: getattr(index, name).copy() for name in ("lengths", "offsets", "borders")}
    change(arrays)
    path.write_bytes(header + b"".join(array.tobytes() for array in arrays.values()))


def swap_offsets(arrays):
    arrays["offsets"][[3, 4]] = arrays["offsets"][[4, 3]]


def shift_offsets(arrays):
    arrays["offsets"] += 2


def negative_length(arrays):
    arrays["lengths"][5] -= 1000


def longer_last(arrays):
    arrays["lengths"][-1] += 5


def shorter_last(arrays):
    arrays["lengths"][-1] -= 1


def unordered_documents(arrays):
    arrays["borders"][[7, 8]] = arrays["borders"][[8, 7]]


def missing_documents(arrays):
    arrays["borders"][0] = 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (swap_offsets, "sequence 3 does not begin where it should"),
        (shift_offsets, "sequence 0 does not begin where it should"),
        (negative_length, r"sequence 5 has -\d+ tokens"),
        (longer_last, "cut short"),
        (shorter_last, "the two files do not belong together"),
        (unordered_documents, "not in order"),
        (missing_documents, "do not cover its 40 sequences"),
    ],
)
def test_an_index_that_does_not_fit_its_tokens_is_refused(data, change, message):
    """Tokens are read as one array: what Megatron would read through other offsets would be other text."""
    rewrite_index(data, change)
    with pytest.raises(ConfigError, match=message):
        TokenFile(data)


def test_cut_and_lengthened_indices_are_refused(data):
    content = Path(f"{data}.idx").read_bytes()
    for changed in (content[:-8], content[:-1], content[:20], content + bytes(3), b""):
        Path(f"{data}.idx").write_bytes(changed)
        with pytest.raises(ConfigError, match=r"data\.idx cannot be read as the index"):
            TokenFile(data)
    # A byte for every sequence, as Megatron writes for texts with images.
    Path(f"{data}.idx").write_bytes(content + bytes(40))
    assert len(TokenFile(data).borders) == 41


def test_large_files_are_checked_in_a_sample_of_all_places(monkeypatch):
    assert parts(10, 1, None) == parts(10, 1, 10) == [slice(0, 10)]
    sampled = parts(10**9, 1, 64_000)
    assert sampled == parts(10**9, 1, 64_000)
    assert sampled[0] == slice(0, 1001) and sampled[-1] == slice(10**9 - 1000, 10**9) and len(sampled) == 64
    quarters = [part.start * 4 // 10**9 for part in sampled]
    assert set(quarters) == {0, 1, 2, 3}


def ends_with(count: int, wrong: int | None) -> TokenArray:
    """`count` documents of three tokens, each after an empty one; document `wrong` does not end with EOD."""
    tokens = np.full(3 * count, 5)
    tokens[2::3] = EOD
    if wrong is not None:
        tokens[3 * wrong + 2] = 8
    return TokenArray(tokens, np.repeat(np.arange(count + 1) * 3, 2)[:-1], "data")


def test_ends_are_looked_at_throughout_and_named_by_their_document(monkeypatch):
    ends_with(2000, None).check_ends(EOD)
    for wrong in (0, 63, 64, 1000, 1999):
        # Each after an empty one, which counts as a document, too.
        with pytest.raises(ConfigError, match=f"data: document {2 * wrong + 1} ends with token 8, not with"):
            ends_with(2000, wrong).check_ends(EOD)
    monkeypatch.setattr(indexed, "CHECKED_BYTES", 1000)
    for wrong in (0, 1999):
        with pytest.raises(ConfigError, match="ends with token 8"):
            ends_with(2000, wrong).check_ends(EOD)
    # Data of another end token is found wherever the sample looks.
    noticed = [wrong for wrong in range(0, 2000, 10) if not passes(ends_with(2000, wrong))]
    assert 10 < len(noticed) < 120


def passes(array: TokenArray) -> bool:
    try:
        array.check_ends(EOD)
    except ConfigError:
        return False
    return True


def test_ids_without_a_row_of_the_embedding_are_refused_as_they_are_read(data):
    sampler = open_training_data(str(data), seed=0, seq_len=64, global_batch_size=8, eod_id=EOD, vocab_size=900)
    sampler.samples(0)
    sampler = open_training_data(str(data), seed=0, seq_len=64, global_batch_size=8, eod_id=EOD, vocab_size=800)
    with pytest.raises(ConfigError, match=r"data holds the token id 8\d\d, and the vocabulary goes from 0 to 799"):
        sampler.samples(0)
    with pytest.raises(ConfigError, match="from 0 to 799"):
        list(EvaluationStream(data, 64, eod_id=EOD, vocab_size=800))


def test_reading_imports_no_megatron():
    """One process needs no engine, and megatron costs five seconds."""
    code = "import sys, trainer.data.dataset; print('megatron.core' in sys.modules)"
    root = Path(__file__).resolve().parents[2]
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
