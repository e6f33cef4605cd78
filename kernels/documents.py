"""Bounds of documents packed into one row of tokens, kept on the host, and tensors derived from them.

The bounds are known on the host when a batch is built. If a kernel got them as a GPU tensor, every layer would have to
read them back to lay out its work, and each read would stall the host until the GPU has caught up.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, wraps
from itertools import pairwise
from typing import Any, ParamSpec, TypeVar, TypeVarTuple, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

R = TypeVar("R")
P = ParamSpec("P")
Args = TypeVarTuple("Args")


@dataclass(frozen=True)
class Documents:
    """N consecutive documents in a row of T tokens; immutable.

    Attributes:
        bounds: N + 1 integers from 0 to T: the first token of each document, and the end of the last.

    Raises:
        ValueError: the bounds do not increase from 0, so a document is empty or there is none.
    """

    bounds: tuple[int, ...]
    # Tensors derived from the bounds, by the function that made them and its arguments.
    _made: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.bounds[:1] != (0,) or len(self.bounds) < 2:
            raise ValueError(f"cu_seqlens must run from 0 to T, over one document at least, got {self.bounds}")
        if any(start >= end for start, end in pairwise(self.bounds)):
            raise ValueError("cu_seqlens must increase: every document needs at least one token")

    @classmethod
    def of(cls, cu_seqlens: Tensor) -> "Documents":
        """Build from bounds int32 `[N+1]`. The only place that reads bounds back from a GPU.

        Raises:
            ValueError: the tensor is not a vector of integers, or the bounds are invalid (see the class).
        """
        if cu_seqlens.dim() != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"cu_seqlens must be int32 [N+1], got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}")
        return cls(tuple(cu_seqlens.tolist()))

    def __len__(self) -> int:
        return len(self.bounds) - 1

    @property
    def tokens(self) -> int:
        """T, the number of tokens."""
        return self.bounds[-1]

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Number of tokens of each document."""
        return tuple(end - start for start, end in pairwise(self.bounds))

    def cu_seqlens(self, device: torch.device) -> Tensor:
        """The bounds, int32 `[N+1]`, on a device."""
        return self.made(_cu_seqlens, device)

    def made(self, make: Callable[[tuple[int, ...], *Args], R], *args: *Args) -> R:
        """`make(bounds, *args)`, computed on first use and cached for the lifetime of these documents.

        The cached tensors are ordinary ones, whatever mode the first caller is in. Otherwise `torch.inference_mode`
        would give tensors that autograd cannot save later, and a run on shapes alone would give tensors without memory.
        """
        key = (make, args)
        if key not in self._made:
            with torch.inference_mode(False), torch.no_grad(), _disable_current_modes():
                self._made[key] = make(self.bounds, *args)
        return cast(R, self._made[key])


def _cu_seqlens(bounds: tuple[int, ...], device: torch.device) -> Tensor:
    return to_device(torch.tensor(bounds, dtype=torch.int32), device)


def takes_cu_seqlens(kernel: Callable[P, R]) -> Callable[P, R]:
    """Decorate a kernel to accept `cu_seqlens`, int32 `[N+1]` as in flash-attn and fla, in place of `documents`.

    On a GPU each such call copies the bounds to the host, which synchronises. To call several kernels on the same
    documents, build the `Documents` once.
    """

    @wraps(kernel)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        bounds: Any = kwargs.pop("cu_seqlens", None)
        if bounds is not None:
            if kwargs.get("documents") is not None:
                raise ValueError("documents and cu_seqlens are the same bounds: give one of them")
            kwargs["documents"] = Documents.of(bounds)
        return kernel(*args, **kwargs)

    return call


def sequences_in(batch: int, time: int, documents: Documents | None) -> Documents:
    """The sequences in `[B, T]` seen as one row of B * T tokens: `documents`, or its B rows if there are none.

    Raises:
        ValueError: the documents do not cover one row of T tokens.
    """
    if documents is None:
        return _rows(batch, time)
    if batch != 1:
        raise ValueError(f"cu_seqlens packs documents into one row: the batch size must be 1, got {batch}")
    if documents.tokens != time:
        raise ValueError(f"cu_seqlens must run from 0 to T = {time}, got 0 … {documents.tokens}")
    return documents


# Cached, so that all layers and steps share the tensors derived from the same bounds.
@lru_cache(maxsize=32)
def _rows(batch: int, time: int) -> Documents:
    return Documents(tuple(range(0, batch * time + 1, time)))


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Copy a host tensor to a device, without waiting for work already queued on a GPU."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)
