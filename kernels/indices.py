"""Integers that say where to read: labels, token ids, positions, counts of rows.

On a CPU a number that points nowhere is a ValueError before anything is computed. On a GPU, looking at the numbers
would make the host wait for the device: there the kernels read nothing out of bounds and the result is not finite.
"""

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

_INTEGERS = (torch.int32, torch.int64)


def on_host(x: Tensor) -> bool:
    """Whether the numbers of x can be looked at without waiting for a device; a run on shapes alone has none."""
    return x.is_cpu and not isinstance(x, FakeTensor)


def host_numbers(x: Tensor) -> Any:
    """The numbers of a CPU's tensor, as its `tolist` gives them; what a step reads on a CPU alone, it reads here."""
    assert x.is_cpu, "a read would wait for the device"
    return x.tolist()


def rows_by_token(row_tokens_N: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    """The rows in order of their tokens `[N]`, and where each token's begin and the last one's end `[T + 1]`; int64."""
    tokens, order_N = row_tokens_N.sort(stable=True)
    return order_N, torch.searchsorted(tokens, torch.arange(num_tokens + 1, device=tokens.device))


def check_range(op: str, name: str, x: Tensor, end: int, *, besides: int | None = None) -> None:
    """Raise ValueError unless x holds integers in [0, end), or `besides`; of a GPU's tensor only the dtype is checked.

    Args:
        op: the operation's public name, for the message.
        name: of the integers, for the message, in the singular.
        x: int32 or int64, any shape.
        end: the first number that is too large.
        besides: one further number that is allowed.
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
    """Raise ValueError unless counts are integers >= 0 with the sum `rows`; of a GPU's only the dtype is checked."""
    if counts.dtype not in _INTEGERS:
        raise ValueError(f"{op}: counts of rows must be integers (int64 or int32), not {counts.dtype}")
    if not on_host(counts):
        return
    with _disable_current_modes():
        numbers = host_numbers(counts)
    if sum(numbers) != rows or min(numbers, default=0) < 0:
        raise ValueError(f"{op}: counts must not be negative and add up to the {rows} rows there are, not {numbers}")
