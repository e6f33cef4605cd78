"""The experts' linear layers: rows sorted by expert, multiplied by one matrix per expert.

    y_n = W_e(n) · x_n        dx_n = W_e(n)ᵀ · dy_n        dW_e = sum over the rows n of e of dy_n ⊗ x_n

The number of operations is that of one product of all rows with one matrix, for any number of experts. Nothing is
padded.

Backends:
    reference  a loop over experts in plain operations
    torch      on a CPU, a loop over the experts with `kernels.matmul`, each product written in place; on a GPU,
               `F.grouped_mm` for the sizes it supports
    triton     one kernel for y and dx and one for dW; the counts of rows are never copied to the host
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.autograd import once_differentiable, save
from kernels.backend import resolve
from kernels.indices import check_counts, host_numbers
from kernels.matmul import matmul
from kernels.shapes import has_values
from kernels.triton import LARGEST_ROW, implementations


def grouped_linear_reference(x_ND: Tensor, weight_EOD: Tensor, tokens_per_expert_E: Tensor) -> Tensor:
    """`grouped_linear` as a loop over experts."""
    rows = x_ND.split(tokens_per_expert_E.tolist())
    return torch.cat([expert_rows @ weight.T for expert_rows, weight in zip(rows, weight_EOD)])


def grouped_linear(x_ND: Tensor, weight_EOD: Tensor, tokens_per_expert_E: Tensor, *, backend: str = "auto") -> Tensor:
    """Multiply the rows of each expert e by its matrix: x · W_eᵀ.

    Args:
        x_ND: rows sorted by expert, as returned by `permute`.
        weight_EOD: one matrix per expert, in x's dtype.
        tokens_per_expert_E: int64, the number of rows of each expert, with sum N.
        backend: auto, reference, torch or triton.

    Returns:
        `[N, O]` in x's dtype. An expert without rows gets a gradient of zeros.

    Raises:
        ValueError: shapes or dtypes do not fit, the counts do not sum to N, or the backend cannot serve these inputs.
            On a GPU counts are not checked, which would synchronise; wrong counts make the output NaN.
    """
    fits = x_ND.ndim == 2 and weight_EOD.ndim == 3 and x_ND.shape[1] == weight_EOD.shape[2]
    if not fits or tokens_per_expert_E.shape != weight_EOD.shape[:1] or x_ND.dtype != weight_EOD.dtype:
        raise ValueError(
            f"grouped_linear: x {tuple(x_ND.shape)} {x_ND.dtype}, weight {tuple(weight_EOD.shape)} {weight_EOD.dtype} "
            f"and tokens per expert {tuple(tokens_per_expert_E.shape)} must be [N, D], [E, O, D] of x's dtype and [E]"
        )
    if not x_ND.is_floating_point():
        raise ValueError(f"grouped_linear: x must be floating, not {x_ND.dtype}")
    check_counts("grouped_linear", tokens_per_expert_E, len(x_ND))
    others = ("torch", "reference") if x_ND.is_cpu or _grouped_mm_takes(x_ND, weight_EOD) else ("reference",)
    available = implementations(others, x_ND, weight_EOD, fits=len(weight_EOD) < LARGEST_ROW)
    choice = resolve("grouped_linear", backend, available)
    if choice == "reference":
        return grouped_linear_reference(x_ND, weight_EOD, tokens_per_expert_E)
    if choice == "triton":
        from kernels.triton import grouped  # lazily: not every machine has Triton

        return grouped.grouped_linear(x_ND, weight_EOD, tokens_per_expert_E)
    if x_ND.is_cpu:
        return _GroupedLinear.apply(x_ND, weight_EOD, tokens_per_expert_E)
    return _grouped_mm(x_ND, weight_EOD, tokens_per_expert_E)


def _grouped_mm(x_ND: Tensor, weight_EOD: Tensor, tokens_per_expert_E: Tensor) -> Tensor:
    """`grouped_linear` by F.grouped_mm, which does not check the counts."""
    # Sums of counts within these bounds cannot overflow int64. In int32 a wrapped sum could look right.
    ends_E = tokens_per_expert_E.cumsum(0, dtype=torch.int64)
    bounded = (tokens_per_expert_E >= 0) & (tokens_per_expert_E <= len(x_ND))
    fit = bounded.all() & (ends_E[-1] == len(x_ND))
    # With wrong counts one expert takes all rows, so that nothing is read out of bounds.
    y_NO = F.grouped_mm(x_ND, weight_EOD.mT, offs=torch.where(fit, ends_E, len(x_ND)).int())
    return torch.where(fit, y_NO, torch.nan)


def _grouped_mm_takes(x_ND: Tensor, weight_EOD: Tensor) -> bool:
    """Whether F.grouped_mm can run on a GPU, forward and backward: bfloat16, and rows of multiples of 16 bytes."""
    return x_ND.dtype == torch.bfloat16 and all(size % 8 == 0 for size in weight_EOD.shape[1:])


class _GroupedLinear(torch.autograd.Function):
    """`grouped_linear` on a CPU: saves its inputs."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_EOD: Tensor, tokens_per_expert_E: Tensor) -> Tensor:
        save(ctx, activations=(x_ND,), weights=(weight_EOD,), indices=(tokens_per_expert_E,))
        y_NO = x_ND.new_empty(len(x_ND), weight_EOD.shape[1])
        for expert, rows in _experts(tokens_per_expert_E):
            matmul(x_ND[rows], weight_EOD[expert].T, out=y_NO[rows])
        return y_NO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_ND, weight_EOD, tokens_per_expert_E = ctx.saved_tensors
        grad_x = torch.empty_like(x_ND) if ctx.needs_input_grad[0] else None
        grad_weight = torch.empty_like(weight_EOD) if ctx.needs_input_grad[1] else None
        for expert, rows in _experts(tokens_per_expert_E):
            if grad_x is not None:
                matmul(grad[rows], weight_EOD[expert], out=grad_x[rows])
            if grad_weight is not None:  # a product over no rows writes zeros
                matmul(grad[rows].T, x_ND[rows], out=grad_weight[expert])
        return grad_x, grad_weight, None


def _experts(tokens_per_expert_E: Tensor) -> Iterator[tuple[int, slice]]:
    """Yield each expert and its slice of rows, which may be empty."""
    begin = 0
    for expert, rows in enumerate(host_numbers(tokens_per_expert_E) if has_values() else ()):
        yield expert, slice(begin, begin + rows)
        begin += rows
