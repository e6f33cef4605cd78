"""Token sequences: what rows become, and what packing puts into micro-batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from trainer.errors import ConfigError

_FORMAT = {"format": "spiketrain_sequences"}


@dataclass(frozen=True, eq=False)
class TokenSequence:
    """One sequence of L tokens.

    All arrays are aligned with `tokens`. What belongs to token t (its mask, its log-probability under some policy) is
    at t; packing shifts it by one, to where the model predicts the token.

    Attributes:
        tokens: int32 `[L]`.
        loss_mask: float32 `[L]`, 0 for tokens that are not learned, otherwise their weight. The first token has no
            prediction, so its weight has no effect.
        extra: Further values of the tokens by name, each `[L, ...]`.
        prompt: Number of first tokens, none of them learned, that other sequences may have in common with this one.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray
    extra: Mapping[str, np.ndarray] = field(default_factory=dict)
    prompt: int = 0

    def __post_init__(self) -> None:
        shapes = {name: array.shape[:1] for name, array in {"loss_mask": self.loss_mask, **self.extra}.items()}
        wrong = [name for name, shape in shapes.items() if shape != self.tokens.shape]
        if self.tokens.ndim != 1 or not len(self.tokens) or wrong:
            raise ValueError(f"a sequence has one or more tokens, and as many of all else, not {shapes}")

    @classmethod
    def of(cls, pieces: Sequence[tuple[Sequence[int], bool]]) -> TokenSequence:
        """Join pieces of tokens, each with whether it is learned. A first piece that is not is the prompt."""
        tokens = np.concatenate([np.asarray(ids, np.int32) for ids, _ in pieces])
        mask = np.concatenate([np.full(len(ids), learned, np.float32) for ids, learned in pieces])
        first, learned = pieces[0]
        return cls(tokens, mask, prompt=0 if learned else len(first))

    def __len__(self) -> int:
        return len(self.tokens)

    def part(self, start: int, stop: int) -> TokenSequence:
        """Tokens `start` to `stop`."""
        own = slice(start, stop)
        return TokenSequence(
            self.tokens[own], self.loss_mask[own], {name: array[own] for name, array in self.extra.items()}
        )

    @property
    def learned(self) -> int:
        """Number of tokens that the loss counts."""
        return int(np.count_nonzero(self.loss_mask[1:]))


def save_sequences(path: Path, sequences: Sequence[TokenSequence]) -> None:
    """Write sequences, all with the same extra values, as one safetensors file.

    Its tensors are `bounds`, int64 `[S + 1]`, `prompts`, int64 `[S]`, and the sequences' arrays one after the other:
    `tokens`, `loss_mask`, and `extra.NAME` for each of the extra values.
    """
    from safetensors.numpy import save_file

    arrays = {
        "bounds": np.cumsum([0, *map(len, sequences)]).astype(np.int64),
        "prompts": np.array([sequence.prompt for sequence in sequences], np.int64),
        "tokens": np.concatenate([sequence.tokens for sequence in sequences]),
        "loss_mask": np.concatenate([sequence.loss_mask for sequence in sequences]),
    }
    for name in sequences[0].extra:
        arrays[f"extra.{name}"] = np.concatenate([sequence.extra[name] for sequence in sequences])
    save_file(arrays, path, _FORMAT)


def load_sequences(path: Path) -> list[TokenSequence]:
    """Read what `save_sequences` has written.

    Raises:
        ConfigError: the file is missing, damaged or of another kind.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            if file.metadata() != _FORMAT:
                raise ConfigError(f"{path} holds no token sequences; name a file of save_sequences or convert_buffer")
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); write it again") from error
    bounds = arrays.pop("bounds").tolist()
    # Files of earlier versions do not have them.
    prompts = arrays.pop("prompts", np.zeros(len(bounds) - 1, np.int64)).tolist()
    tokens, mask = arrays.pop("tokens"), arrays.pop("loss_mask")
    extra = {name.removeprefix("extra."): array for name, array in arrays.items()}
    whole = TokenSequence(tokens, mask, extra)
    parts = (whole.part(start, stop) for start, stop in pairwise(bounds))
    return [replace(part, prompt=prompt) for part, prompt in zip(parts, prompts, strict=True)]
