"""Token file readers: shuffled, blended training samples, and whole splits for evaluation.

A training batch is a pure function of (seed, step, global_batch_size, seq_len, data). No iterator has state that could
be lost. The chain is

    step, row j     ->  g = step * global_batch_size + j    sample of the run
    g               ->  (source, i)                         `blend`: exact shares, O(sources)
    i               ->  place p in the source's stream      shuffled among about an epoch's samples
    p               ->  tokens p*T ... p*T + T              T + 1 of them: the last is only a label
    token position  ->  (epoch, offset), document, file     documents shuffled by (seed, source, epoch)

The stream of a source is endless: the documents of epoch 1 follow those of epoch 0 in another order. No tail is
dropped, and a source may be shorter than a sample.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

import numpy as np

from trainer.data.batch import Batch, make_batch
from trainer.data.indexed import TokenArray, TokenFile, open_through_megatron
from trainer.data.layout import NO_END, find_corpora
from trainer.errors import ConfigError


def check_ids(ids: np.ndarray, vocab_size: int | None, name: str) -> None:
    """Refuse token ids that have no row in the embedding. Before a run, large files are only sampled.

    Args:
        ids: the token ids.
        vocab_size: rows of the embedding; None (unknown) accepts everything.
        name: name of the file, for messages.

    Raises:
        ConfigError: names the file and the most extreme id.
    """
    if vocab_size is not None and ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
        wrong = ids.max() if ids.max() >= vocab_size else ids.min()
        raise ConfigError(
            f"{name} holds the token id {wrong}, and the vocabulary goes from 0 to {vocab_size - 1}: use the tokenizer "
            "that made the data, or a larger model.vocab_size"
        )


class TokenSource:
    """One token file as an endless stream of samples; its documents are reshuffled in every epoch.

    Args:
        file: the tokens.
        seed: seed of the run.
        number: index of the source in the run, so that each source has its own order.
    """

    def __init__(self, file: TokenArray, seed: int, number: int = 0) -> None:
        self.file = file
        self._key = (seed, number)
        # A batch reads one epoch, or two at an epoch boundary. The cache is per source, because an order takes two
        # integers per document.
        self._order = lru_cache(maxsize=2)(self._compute_order)
        self._places = lru_cache(maxsize=2)(self._compute_places)

    def __len__(self) -> int:
        """Number of tokens in an epoch."""
        return len(self.file.tokens)

    def _shuffled(self, count: int, *key: int) -> np.ndarray:
        # Sort raw 64-bit draws: NumPy guarantees the streams of its bit generators, but not the result of
        # `permutation`.
        keys = np.random.Philox(np.random.SeedSequence([*self._key, *key])).random_raw(count)
        return np.argsort(keys, kind="stable")

    def _compute_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        order = self._shuffled(len(self.file.borders) - 1, epoch)
        return order, np.cumsum(np.diff(self.file.borders)[order])

    def _compute_places(self, block: int, count: int) -> np.ndarray:
        return block * count + self._shuffled(count, block, 1)

    def order(self, epoch: int) -> np.ndarray:
        """The documents of `epoch`, in reading order."""
        return self._order(epoch)[0]

    def read(self, start: int, count: int) -> np.ndarray:
        """Read tokens `start` to `start + count` of the endless stream, as int64."""
        pieces = []
        while count:
            epoch, offset = divmod(start, len(self))
            taken = min(count, len(self) - offset)
            pieces.append(self._read_within(epoch, offset, taken))
            start, count = start + taken, count - taken
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def _read_within(self, epoch: int, offset: int, count: int) -> np.ndarray:
        order, ends = self._order(epoch)
        first, last = np.searchsorted(ends, (offset, offset + count - 1), side="right")
        documents, ends = order[first : last + 1], ends[first : last + 1]
        # Within a document, the distance between a token's position in the stream and in the file is constant.
        shifts = self.file.borders[documents + 1] - ends
        lengths = np.diff(np.minimum(ends, offset + count), prepend=offset)
        return self.file.tokens[np.repeat(shifts, lengths) + np.arange(offset, offset + count)].astype(np.int64)

    def sample(self, index: int, seq_len: int) -> np.ndarray:
        """Read sample `index`: int64 `[seq_len + 1]`, regardless of document bounds.

        Samples are shuffled within blocks of one epoch's length. Neighbours in the stream often belong to one document,
        and a batch of neighbours would be one long sample.
        """
        count = max(len(self) // seq_len, 1)
        block, row = divmod(index, count)
        return self.read(int(self._places(block, count)[row]) * seq_len, seq_len + 1)


def split_ratios(weights: Sequence[float]) -> tuple[Fraction, ...]:
    """Share of each source among the samples that no earlier source took; the last share is 1."""
    # Fractions, because `_share` has to be exact however long the run.
    exact = [Fraction(weight).limit_denominator(10**6) or Fraction(weight) for weight in weights]
    return tuple(weight / sum(exact[place:]) for place, weight in enumerate(exact))


def _share(samples: int, ratio: Fraction) -> int:
    """round(samples * ratio), with halves rounded up, in exact arithmetic."""
    return (2 * samples * ratio.numerator + ratio.denominator) // (2 * ratio.denominator)


def blend(sample: int, ratios: Sequence[Fraction]) -> tuple[int, int]:
    """The source of sample number `sample` of the run, and the index of the sample within that source.

    Of the first g samples, source 0 gets round(g * share), evenly spaced; the remaining sources share the rest in the
    same way. Counts are therefore exact at any point (within one sample per preceding source), nothing is drawn at
    random, and no history is needed.

    Args:
        sample: number of the sample in the run, from 0.
        ratios: from `split_ratios`.

    Returns:
        (source, index within the source).
    """
    for source, ratio in enumerate(ratios):
        before = _share(sample, ratio)
        if _share(sample + 1, ratio) > before:
            return source, before
        sample -= before
    raise AssertionError("the last ratio is 1")


class Sampler:
    """The training batches of a run, as a function of the step.

    They do not depend on the number of steps, the number of ranks or the micro-batch size: ranks take contiguous slices
    of the same global batch.

    Args:
        sources: the token sources.
        weights: share of samples of each source.
        seq_len: tokens in a sample, T.
        global_batch_size: samples in a step.
        eod_id: the end-of-document token; required for document masks.
        document_mask: pack micro-batches and record document bounds.
        vocab_size: token ids at or above it are refused when read; None if unknown.
    """

    def __init__(
        self,
        sources: Sequence[TokenSource],
        weights: Sequence[float],
        *,
        seq_len: int,
        global_batch_size: int,
        eod_id: int | None = None,
        document_mask: bool = True,
        vocab_size: int | None = None,
    ) -> None:
        assert len(sources) == len(weights) > 0
        self.sources = tuple(sources)
        self.ratios = split_ratios(weights)
        self.seq_len, self.global_batch_size = seq_len, global_batch_size
        self.eod_id, self.document_mask, self.vocab_size = eod_id, document_mask, vocab_size
        if document_mask:
            if eod_id is None:
                raise ConfigError(NO_END)
            for source in sources:
                source.file.check_ends(eod_id)

    def sample_indices(self, step: int) -> list[tuple[int, int]]:
        """(source, index within the source) of every sample of `step`, which counts from 0."""
        first = step * self.global_batch_size
        return [blend(sample, self.ratios) for sample in range(first, first + self.global_batch_size)]

    def samples(self, step: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Read samples `start` to `stop` of the global batch of `step`: int64 `[stop - start, T + 1]`."""
        first = step * self.global_batch_size
        places = range(first, first + self.global_batch_size)[start:stop]
        picks = (blend(sample, self.ratios) for sample in places)
        rows = [(source, self.sources[source].sample(index, self.seq_len)) for source, index in picks]
        for source, row in rows:
            check_ids(row, self.vocab_size, self.sources[source].file.name)
        return np.stack([row for _, row in rows])

    def micro_batches(self, step: int, micro_batch_size: int, *, rank: int = 0, world: int = 1) -> list[Batch]:
        """The micro-batches of data-parallel rank `rank` of `world` in `step`, in order.

        Of R ranks, rank r gets samples `[r * G / R, (r + 1) * G / R)` of a global batch of G.

        Raises:
            ValueError: if `micro_batch_size * world` does not divide the global batch size.
        """
        share, rest = divmod(self.global_batch_size, world)
        if rest or share % micro_batch_size:
            raise ValueError(
                f"train.global_batch_size {self.global_batch_size} is not a multiple of micro_batch_size "
                f"{micro_batch_size} times {world} data-parallel ranks"
            )
        first = rank * share
        rows = self.samples(step, first, first + share)
        return [
            make_batch(
                rows[start : start + micro_batch_size],
                self.eod_id,
                self.document_mask,
                step=step,
                first_sample=first + start,
            )
            for start in range(0, share, micro_batch_size)
        ]

    def epochs(self, step: int) -> list[float]:
        """Number of epochs of each source that the steps before `step` have read."""
        counts, left = [], step * self.global_batch_size
        for ratio in self.ratios:
            counts.append(_share(left, ratio))
            left -= counts[-1]
        return [count * self.seq_len / len(source) for count, source in zip(counts, self.sources, strict=True)]


def open_training_data(
    paths: str | Path | Mapping[str, float],
    *,
    seed: int,
    seq_len: int,
    global_batch_size: int,
    eod_id: int | None = None,
    document_mask: bool = True,
    vocab_size: int | None = None,
) -> Sampler:
    """Open prepared directories or Megatron prefixes for training.

    Args:
        paths: a directory or prefix, or several with their shares of the samples.
        seed: seed of the run.
        seq_len: tokens in a sample.
        global_batch_size: samples in a step.
        eod_id: the end-of-document token if no `dataset.json` names it.
        document_mask: pack micro-batches and record document bounds.
        vocab_size: token ids at or above it are refused when read; None if unknown.

    Raises:
        ConfigError: if data is missing, damaged or inconsistent.
    """
    corpora = find_corpora(paths, "train", eod_id)
    sources = [
        TokenSource(open_through_megatron(prefix), seed, number) for number, prefix in enumerate(corpora.prefixes)
    ]
    return Sampler(
        sources,
        corpora.weights,
        seq_len=seq_len,
        global_batch_size=global_batch_size,
        eod_id=corpora.eod_id,
        document_mask=document_mask,
        vocab_size=vocab_size,
    )


class EvaluationStream:
    """A whole split, once, in file order: every token is the counted label of exactly one position.

    Window k reads T inputs starting at k * stride. An end-of-document token precedes the first token, so that it is
    predicted too. With `stride` < T windows overlap, and only the last `stride` labels of a window count (all labels of
    the first window); each counted token then has at least T - stride tokens of context. All ranks get the same number
    of micro-batches of the same shape, padded with `loss_mask` 0.

    The bits per byte of a split are thus sum(nll * loss_mask) / ln 2 / sum(token_bytes[labels] * loss_mask).

    Args:
        path: a prepared directory, the prefix of a pair, or tokens in memory.
        seq_len: inputs in a window, T.
        micro_batch_size: windows in a micro-batch.
        split: the split of a prepared directory.
        eod_id: the end-of-document token if no `dataset.json` names it.
        stride: counted labels in a window; `seq_len` by default.
        document_mask: pack micro-batches and record document bounds.
        limit: read only this many windows, evenly spaced over the split.
        rank: this data-parallel rank.
        world: number of data-parallel ranks.
        vocab_size: token ids at or above it are refused when read; None if unknown.
    """

    def __init__(
        self,
        path: str | Path | TokenArray,
        seq_len: int,
        *,
        micro_batch_size: int = 1,
        split: str = "validation",
        eod_id: int | None = None,
        stride: int | None = None,
        document_mask: bool = True,
        limit: int | None = None,
        rank: int = 0,
        world: int = 1,
        vocab_size: int | None = None,
    ) -> None:
        self.vocab_size = vocab_size
        if isinstance(path, TokenArray):
            self.file = path
        else:
            corpora = find_corpora(path, split, eod_id)
            self.file, eod_id = TokenFile(corpora.prefixes[0]), corpora.eod_id
        self.seq_len, self.stride = seq_len, stride or seq_len
        if not 0 < self.stride <= seq_len:
            raise ConfigError(f"the evaluation stride {stride} must be from 1 to seq_len {seq_len}")
        if eod_id is None:
            raise ConfigError(f"{path} does not say which token ends a document: set data.tokenizer or data.eod_id")
        self.eod_id, self.document_mask = eod_id, document_mask
        if document_mask:
            self.file.check_ends(self.eod_id)
        self.micro_batch_size = micro_batch_size
        # The first window counts seq_len labels, each later one `stride`.
        windows = 1 + max(0, -(-(len(self.file.tokens) - seq_len) // self.stride))
        chosen = windows if limit is None else min(limit, windows)
        self._windows = np.arange(chosen) * windows // chosen
        self._rank, self._world = rank, world

    def __len__(self) -> int:
        """Number of micro-batches on each rank."""
        return -(-len(self._windows) // (self.micro_batch_size * self._world))

    def __iter__(self) -> Iterator[Batch]:
        """Yield the micro-batches of this rank in order."""
        first = self._rank * len(self) * self.micro_batch_size
        for start in range(first, first + len(self) * self.micro_batch_size, self.micro_batch_size):
            yield self._read(self._windows[start : start + self.micro_batch_size])

    def _read(self, windows: np.ndarray) -> Batch:
        # The padding token must not end a document, so that padding adds a single document instead of one per token.
        rows = np.full((self.micro_batch_size, self.seq_len + 1), 1 if self.eod_id == 0 else 0, np.int64)
        mask = np.zeros((self.micro_batch_size, self.seq_len), np.float32)
        for row, window in enumerate(windows):
            # The stream is one end-of-document token followed by the file, so label t of a window is the file's token
            # start + t.
            start = int(window) * self.stride
            labels = self.file.tokens[start : start + self.seq_len]
            check_ids(labels, self.vocab_size, self.file.name)
            rows[row, 0] = self.file.tokens[start - 1] if start else self.eod_id
            rows[row, 1 : 1 + len(labels)] = labels
            mask[row, self.seq_len - self.stride if start else 0 : len(labels)] = 1
        return make_batch(rows, self.eod_id, self.document_mask, mask)
