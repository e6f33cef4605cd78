"""Drawing tokens from logits: penalties, temperature, truncation, and random numbers that depend on no batch."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from models.generation.requests import Sampling

# Truncation sorts this many of the most likely tokens first, and all only where they do not suffice.
_CANDIDATES = 256
# Probabilities that are summed at once.
_AT_ONCE = 1 << 20

_MASK = (1 << 64) - 1


class Drawn(NamedTuple):
    """The tokens of one row each; the fields are as in models.generation.requests.Event."""

    token: int
    log_prob: float
    tempered_log_prob: float
    alternatives: tuple[tuple[int, float], ...]


def uniform(seed: int, sample: int, position: int) -> float:
    """A random number in [0, 1) with 53 bits, a function of the arguments: SplitMix64 (doi 10.1145/2660193.2660195)."""
    state = 0
    for number in (seed, sample, position):
        state = (state + (number & _MASK) + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return (state >> 11) * 2.0**-53


def draw(
    logits_NV: Tensor,
    samplings: Sequence[Sampling],
    uniforms: Sequence[float],
    seen: Sequence[Tensor | None],
    vocab_size: int,
) -> list[Drawn]:
    """Draw one token for each row. A row's token depends on that row's arguments only.

    Args:
        logits_NV: Logits [N, V], of any floating dtype.
        samplings: How to draw each row.
        uniforms: A number in [0, 1) for each row.
        seen: For each row the tokens that its repetition penalty punishes, bool [vocab_size]; None for no penalty.
        vocab_size: Ids from this one on are padding of the vocabulary and are never drawn.

    Raises:
        FloatingPointError: the largest logit of a row is not finite (argmax would accept it), or a temperature is too
            small for the logits.
    """
    logits = logits_NV.float()
    # amax propagates NaN.
    if not logits.amax(-1).isfinite().all():
        raise FloatingPointError("the model gives logits that are not numbers, or infinite")
    normalizers = logits.logsumexp(-1)
    drawable = logits[:, :vocab_size]
    punished = _punished(drawable, samplings, seen)
    most_likely = punished.argmax(-1).tolist()
    tempered = _tempered(punished, samplings)
    tokens = _choose(tempered, samplings, uniforms, most_likely)
    places = torch.tensor(tokens, device=logits.device)[:, None]
    log_probs = (logits.gather(1, places)[:, 0] - normalizers).tolist()
    tempered_log_probs = [0.0] * len(tokens) if tempered is punished else tempered.gather(1, places)[:, 0].tolist()
    return [
        Drawn(
            token,
            log_probs[row],
            0.0 if sampling.temperature == 0 else tempered_log_probs[row],
            _alternatives(drawable[row], normalizers[row], sampling.top_log_probs),
        )
        for row, (token, sampling) in enumerate(zip(tokens, samplings, strict=True))
    ]


def _punished(logits: Tensor, samplings: Sequence[Sampling], seen: Sequence[Tensor | None]) -> Tensor:
    """The logits [N, V] after the repetition penalty."""
    if all(tokens is None for tokens in seen):
        return logits
    logits = logits.clone()
    for row, (sampling, tokens) in enumerate(zip(samplings, seen, strict=True)):
        if tokens is not None:
            penalty, own = sampling.repetition_penalty, logits[row]
            logits[row] = torch.where(tokens, torch.where(own > 0, own / penalty, own * penalty), own)
    return logits


def _tempered(logits: Tensor, samplings: Sequence[Sampling]) -> Tensor:
    """The log-probabilities [N, V] after the temperature; the logits themselves if all rows are greedy."""
    temperatures = [sampling.temperature or 1.0 for sampling in samplings]
    if not any(sampling.temperature for sampling in samplings):
        return logits
    divisors = torch.tensor(temperatures, dtype=torch.float32, device=logits.device)
    tempered = (logits / divisors[:, None]).log_softmax(-1)
    wrong = tempered.isnan().any(-1).tolist()
    if any(wrong):
        temperature = temperatures[wrong.index(True)]
        raise FloatingPointError(f"temperature {temperature} is too small for the model's logits (0 is greedy)")
    return tempered


def _choose(
    log_probs_NV: Tensor, samplings: Sequence[Sampling], uniforms: Sequence[float], most_likely: Sequence[int]
) -> list[int]:
    """Draw from log-probabilities [N, V] after truncation, by inversion of the distribution function."""
    tokens = list(most_likely)
    free = [row for row, sampling in enumerate(samplings) if sampling.temperature and not sampling.truncates]
    # Several rows of a small vocabulary take as long as one.
    step = max(_AT_ONCE // log_probs_NV.shape[1], 1)
    for rows in (free[first : first + step] for first in range(0, len(free), step)):
        for row, token in zip(rows, _invert(log_probs_NV[rows].exp(), [uniforms[row] for row in rows]), strict=True):
            tokens[row] = token
    for row, sampling in enumerate(samplings):
        if sampling.temperature and sampling.truncates:
            tokens[row] = _choose_truncated(log_probs_NV[row], sampling, uniforms[row])
    return tokens


def _choose_truncated(log_probs: Tensor, sampling: Sampling, number: float) -> int:
    """Draw from the most likely of log-probabilities [V]."""
    limit = min(sampling.top_k or len(log_probs), len(log_probs))
    # The most likely ones usually suffice: a sort of the whole vocabulary is ten times as slow.
    for count in (limit if sampling.top_k else min(limit, _CANDIDATES), limit):
        ordered, ids = log_probs.topk(count)
        probabilities = ordered.exp()
        kept = _kept(probabilities, sampling)
        if kept < count or count == limit:
            return int(ids[_invert(probabilities[None, :kept], [number])[0]])
    raise AssertionError("the second round takes all tokens")


def _kept(ordered: Tensor, sampling: Sampling) -> int:
    """How many of the probabilities, in descending order, top_p and min_p keep: the first ones, and at least one."""
    keep = ordered >= sampling.min_p * ordered[0]
    if sampling.top_p < 1:
        sums = ordered.double().cumsum(0)
        total = float(sums[-1]) if sampling.top_k else 1.0
        # Keep a token if the tokens before it sum to less than top_p.
        keep &= sums - ordered < sampling.top_p * total
    return max(int(keep.sum()), 1)


def _invert(probabilities_NV: Tensor, numbers: Sequence[float]) -> list[int]:
    """In each row the first index at which the sums of probabilities exceed the row's number times their total."""
    # float64, whose sums over a vocabulary have more digits than the random number needs.
    sums = probabilities_NV.double().cumsum(-1)
    totals = sums[:, -1:]
    wanted = torch.tensor(numbers, dtype=torch.float64, device=sums.device)[:, None] * totals
    # Below the total even after rounding, so the index is one of a positive probability.
    thresholds = torch.minimum(wanted, torch.nextafter(totals, torch.zeros_like(totals)))
    found: list[int] = torch.searchsorted(sums, thresholds, right=True)[:, 0].tolist()
    return found


def _alternatives(logits: Tensor, normalizer: Tensor, count: int) -> tuple[tuple[int, float], ...]:
    """The `count` most likely tokens of logits [V], with their log-probabilities."""
    if not count:
        return ()
    values, ids = logits.topk(min(count, len(logits)))
    return tuple(zip(ids.tolist(), (values - normalizer).tolist(), strict=True))
