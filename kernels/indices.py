"""Checks of integer inputs that index other tensors: labels, token ids, positions, counts of rows.

On a CPU a number out of range raises ValueError before anything is computed. On a GPU checking would synchronise.
There the kernels never read out of bounds, and the result is not finite.
"""

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

_INTEGERS = (torch.int32, torch.int64)


def on_host(x: Tensor) -> bool:
    """Whether x's numbers can be read without synchronising. Fake tensors have none."""
    return x.is_cpu and not isinstance(x, FakeTensor)


def host_numbers(x: Tensor) -> Any:
    """Return a CPU tensor's numbers, as `tolist`. Reads that a training step may do on a CPU only go through here."""
    assert x.is_cpu, "a read would wait for the device"
    return x.tolist()


def rows_by_token(row_tokens_N: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Return the rows sorted by token `[N]`, and the bounds of each token's rows in that order `[T + 1]`; int64."""
    tokens, order_N = row_tokens_N.sort(stable=True)
    return order_N, torch.searchsorted(tokens, torch.arange(num_tokens + 1, device=tokens.device))


def check_range(op: str, name: str, x: Tensor, end: int, *, besides: int | None = None) -> None:
    """Raise ValueError unless x holds integers in [0, end), or `besides`. On a GPU only the dtype is checked.

    Args:
        op: the operation's public name, for the message.
        name: name of one of the integers, for the message.
        x: int32 or int64, any shape.
        end: the first number that is too large.
        besides: one further allowed number.
    """
    if x.dtype not in _INTEGERS:
        raise ValueError(f"{op}: a {name} must be an integer (int64 or int32), not {x.dtype}")
    if not x.numel() or not on_host(x):
        return
    with _disable_current_modes():
        least, most = (host_numbers(bound) for bound in torch.aminmax(x.detach()))
        if least >= 0 and most < end:
            return
        wrong = (x < 0) | (x >= end)
        if besides is not None:
            wrong &= x != besides
        if not wrong.any():
            return
        place = int(wrong.flatten().nonzero()[0])
        also = "" if besides is None else f" (or {besides})"
        raise ValueError(
            f"{op}: {name} {x.flatten()[place].item()} at place {place} of {x.numel()} is outside 0 to {end - 1}{also}"
        )


def check_counts(op: str, counts: Tensor, rows: int) -> None:
    """Raise ValueError unless counts are integers >= 0 with the sum `rows`. On a GPU only the dtype is checked."""
    if counts.dtype not in _INTEGERS:
        raise ValueError(f"{op}: counts of rows must be integers (int64 or int32), not {counts.dtype}")
    if not on_host(counts):
        return
    with _disable_current_modes():
        numbers = host_numbers(counts)
    if sum(numbers) != rows or min(numbers, default=0) < 0:
        raise ValueError(f"{op}: counts must not be negative and add up to the {rows} rows there are, not {numbers}")
