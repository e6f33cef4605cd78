"""Log-probabilities of given tokens after given contexts, for many sequences at once.

Sequences of any lengths are packed into rows, each as a document of its own. This is exact for every mixer: neither
attention nor a recurrent state crosses the bounds of documents. What several sequences begin with is computed once
where one is the beginning of another, as with choices of one token after the same context. Longer choices continue the
state of their context (`Scorer.compare`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from rich.progress import track
from torch import Tensor

from kernels.documents import Documents
from kernels.matmul import linear
from models.decoder import Decoder
from models.mixers.base import LayerCache
from trainer.logs import CONSOLE

# Rows of logits that exist at a time.
_ROWS = 512
# Bytes of a token in a key.
_WIDTH = 4


@dataclass(frozen=True)
class Query:
    """Tokens to score.

    Attributes:
        tokens: A whole sequence, the context first.
        start: Number of the first token to score, at least 1.
    """

    tokens: Sequence[int]
    start: int


@dataclass(frozen=True)
class Score:
    """The scored tokens of one sequence.

    Attributes:
        log_probs: Their log-probabilities in nats, over all rows of the head as in training, float32 [n].
        greedy: Whether each is the most likely token, bool [n]. Greedy decoding of the context gives exactly these
            tokens if and only if each of them is.
    """

    log_probs: np.ndarray
    greedy: np.ndarray

    @property
    def total(self) -> float:
        """Log-probability of all the tokens, nats."""
        return float(self.log_probs.sum(dtype=np.float64))

    @property
    def is_greedy(self) -> bool:
        """Whether greedy decoding gives all the tokens."""
        return bool(self.greedy.all())


@dataclass(frozen=True)
class Scorer:
    """Scores sequences with a model.

    Attributes:
        model: The whole model, in evaluation mode.
        vocab_size: Ids from this one on are padding of the vocabulary, and never the most likely token.
        eod_id: Documents end after this token, as in training; None for models trained without document masks.
        row_tokens: Tokens that are computed at a time. A longer sequence is computed by itself.
    """

    model: Decoder
    vocab_size: int
    eod_id: int | None
    row_tokens: int

    def score(self, queries: Sequence[Query], description: str) -> list[Score]:
        """Score the queries, with a progress bar that says `description`."""
        holders = _holders([_key(query.tokens[:-1]) for query in queries])
        found: dict[int, Score] = {}
        # Sequences of similar lengths lie in the same row, because attention takes those of equal lengths together.
        rows = list(_rows(sorted(holders, key=len, reverse=True), self.row_tokens * _WIDTH))
        for row in track(rows, description=description, console=CONSOLE, transient=True):
            found |= self._score_row(row, holders, queries)
        return [found[number] for number in range(len(queries))]

    @torch.no_grad()
    def compare(
        self, tokens: Sequence[int], places: Sequence[tuple[int, Sequence[Sequence[int]]]]
    ) -> list[list[float]]:
        """Score candidates for what comes at places of one document, each after the document's own tokens.

        Args:
            tokens: Token ids without an end of a document among them.
            places: For each place, in ascending order, its number, at least 1, and the candidates.

        Returns:
            The log-probability in nats of each candidate at each place.
        """
        caches, read, found = [LayerCache() for _ in self.model.layers], 0, []
        for start, candidates in places:
            # The last token of the context is read with the candidates, because it predicts their first tokens.
            if start - 1 > read:
                self._continue(torch.tensor([tokens[read : start - 1]]), read, caches)
                read = start - 1
            longest = max(map(len, candidates))
            # Tokens on the right do not change what is before them.
            inputs = torch.tensor([[tokens[read], *each, *[0] * (longest - len(each))] for each in candidates])
            hidden_TND = self._continue(inputs[:, :-1], read, [_repeated(cache, len(candidates)) for cache in caches])
            hidden_MD, labels = hidden_TND.transpose(0, 1).flatten(0, 1), inputs[:, 1:].flatten().numpy()
            log_probs, _ = self._look_up(hidden_MD, np.arange(len(labels)), labels)
            rows = log_probs.reshape(len(candidates), longest)
            found.append([float(row[: len(each)].sum(dtype=np.float64)) for row, each in zip(rows, candidates)])
        return found

    def _continue(self, tokens: Tensor, read: int, caches: list[LayerCache]) -> Tensor:
        """Run the model on tokens [N, T] after `read` others: [T, N, D]. The caches are updated."""
        positions = torch.arange(read, read + tokens.shape[1]).expand(tokens.shape)
        device = self.model.head_weight.device
        return self.model.hidden_states(tokens.to(device), positions.to(device), caches=caches)

    @torch.no_grad()
    def _score_row(
        self, row: list[bytes], holders: dict[bytes, list[int]], queries: Sequence[Query]
    ) -> dict[int, Score]:
        """The scores of the queries, by their numbers, that the sequences of one row hold."""
        tokens = np.frombuffer(b"".join(row), f">i{_WIDTH}").astype(np.int64)
        offsets = np.cumsum([0, *(len(key) // _WIDTH for key in row)])
        hidden_TD = self._hidden_states(tokens, offsets)
        numbers, places, targets = [], [], []
        for key, offset in zip(row, offsets):
            for number in holders[key]:
                query = queries[number]
                numbers.append(number)
                # The token before a label predicts it.
                places.append(offset + np.arange(query.start - 1, len(query.tokens) - 1))
                targets.append(np.asarray(query.tokens[query.start :], np.int64))
        log_probs, greedy = self._look_up(hidden_TD, np.concatenate(places), np.concatenate(targets))
        ends = np.cumsum([len(each) for each in targets])[:-1]
        scores = map(Score, np.split(log_probs, ends), np.split(greedy, ends))
        return dict(zip(numbers, scores, strict=True))

    def _hidden_states(self, tokens: np.ndarray, offsets: np.ndarray) -> Tensor:
        """Run the model on a row of sequences that begin at `offsets`: [T, D]."""
        starts = np.zeros(len(tokens) + 1, bool)
        starts[offsets] = True
        if self.eod_id is not None:
            starts[1:] |= tokens == self.eod_id
        bounds = np.flatnonzero(starts)
        positions = np.arange(len(tokens)) - np.repeat(bounds[:-1], np.diff(bounds))
        device = self.model.head_weight.device
        rows = [torch.from_numpy(each)[None].to(device) for each in (tokens, positions)]
        return self.model.hidden_states(rows[0], rows[1], Documents(tuple(bounds.tolist())))[:, 0]

    def _look_up(self, hidden_TD: Tensor, places: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The targets' log-probabilities [N] at some places of a row, and whether each is the most likely token [N]."""
        weight, device = self.model.head_weight, hidden_TD.device
        log_probs, greedy = [], []
        for place_C, target_C in zip(torch.from_numpy(places).split(_ROWS), torch.from_numpy(targets).split(_ROWS)):
            target_C = target_C.to(device)
            logits_CV = linear(hidden_TD[place_C.to(device)], weight).float()
            likely_C = logits_CV[:, : self.vocab_size].argmax(-1)
            log_probs.append(logits_CV.gather(1, target_C[:, None])[:, 0] - logits_CV.logsumexp(-1))
            greedy.append(likely_C == target_C)
        return torch.cat(log_probs).cpu().numpy(), torch.cat(greedy).cpu().numpy()


def _repeated(cache: LayerCache, rows: int) -> LayerCache:
    """A copy of the state of one sequence for each of several rows."""
    # Copies also for one row: what follows may advance a state in place.
    tensors = {
        name: x.expand(rows, *x.shape[1:]).clone(memory_format=torch.contiguous_format)
        for name, x in cache.tensors.items()
    }
    return LayerCache(tensors, {branch: _repeated(own, rows) for branch, own in cache.branches.items()})


def _key(tokens: Sequence[int]) -> bytes:
    """The tokens as bytes that sort and begin as they do."""
    return np.asarray(tokens, f">i{_WIDTH}").tobytes()


def _holders(keys: Sequence[bytes]) -> dict[bytes, list[int]]:
    """The keys that are no beginning of another, each with the numbers of the keys that are beginnings of it."""
    found: dict[bytes, list[int]] = {}
    holder = b""
    # What begins with a key directly follows it in sorted order.
    for number in sorted(range(len(keys)), key=keys.__getitem__, reverse=True):
        if not holder.startswith(keys[number]):
            holder = keys[number]
        found.setdefault(holder, []).append(number)
    return found


def _rows(keys: Sequence[bytes], limit: int) -> Iterator[list[bytes]]:
    """Group the keys, in their order, into rows of at most `limit` bytes, or of a single key."""
    row: list[bytes] = []
    size = 0
    for key in keys:
        if row and size + len(key) > limit:
            yield row
            row, size = [], 0
        row.append(key)
        size += len(key)
    if row:
        yield row
