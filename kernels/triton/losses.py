"""Softmax cross entropy of a block of tokens: the losses, and the gradients in the place of the logits.

    nll_t = logsumexp(z_t) − z_t[y_t],   d (w_t nll_t) / d z_t = w_t (softmax(z_t) − onehot(y_t))

A program goes through the vocabulary of one token twice: once for the running maximum and the sum below it (Milakov and
Gimelshein 2018, arXiv:1805.02867, algorithm 3), once, while the row is still in the cache, for the gradient. A token of
weight 0 is not read.

Where the vocabulary is cut over ranks, they must meet between the two: `statistics` and `part_to_gradient` are the two
halves, for a part of the vocabulary that may or may not have the target.
"""

# Triton reads a kernel's annotations: only those of constexprs mean anything to it.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def, import-untyped"

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from kernels.triton.launch import KernelSpec, device_guard, dtype_bytes, next_power, target_name, warp_size

_BLOCK_V = 4096


@triton.jit
def _log_sum_exp(logits_ptr, vocabulary, BLOCK_V: tl.constexpr):
    largest, total = tl.cast(float("-inf"), tl.float32), tl.cast(0.0, tl.float32)
    for start in range(0, vocabulary, BLOCK_V):
        column = start + tl.arange(0, BLOCK_V)
        z = tl.load(logits_ptr + column, mask=column < vocabulary, other=float("-inf")).to(tl.float32)
        new = tl.maximum(largest, tl.max(z, axis=0))
        # Logits of −inf only: any finite number in the place of their maximum leaves a sum of 0.
        finite = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp(largest - finite) + tl.sum(tl.exp(z - finite), axis=0)
        largest = new
    return largest + tl.log(total)


@triton.jit
def _write_gradient(logits_ptr, target, scale, log_total, vocabulary, BLOCK_V: tl.constexpr):
    for start in range(0, vocabulary, BLOCK_V):
        column = start + tl.arange(0, BLOCK_V)
        z = tl.load(logits_ptr + column, mask=column < vocabulary, other=float("-inf")).to(tl.float32)
        gradient = scale * (tl.exp(z - log_total) - tl.where(column == target, 1.0, 0.0))
        gradient = gradient.to(logits_ptr.dtype.element_ty)
        tl.store(logits_ptr + column, gradient, mask=column < vocabulary)


@triton.jit
def _write_zeros(logits_ptr, vocabulary, BLOCK_V: tl.constexpr):
    for start in range(0, vocabulary, BLOCK_V):
        column = start + tl.arange(0, BLOCK_V)
        zeros = tl.zeros((BLOCK_V,), dtype=logits_ptr.dtype.element_ty)
        tl.store(logits_ptr + column, zeros, mask=column < vocabulary)


@triton.jit
def _kernel(
    logits_ptr,
    target_ptr,
    scale_ptr,
    nll_ptr,
    stride,
    vocabulary,
    GRADIENT: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride
    scale = tl.load(scale_ptr + row)
    if scale == 0.0:
        if GRADIENT:
            _write_zeros(logits_ptr, vocabulary, BLOCK_V)
        tl.store(nll_ptr + row, 0.0)
    else:
        target = tl.load(target_ptr + row)
        inside = (target >= 0) & (target < vocabulary)
        at_target = tl.load(logits_ptr + target, mask=inside, other=float("-inf")).to(tl.float32)
        log_total = _log_sum_exp(logits_ptr, vocabulary, BLOCK_V)
        tl.store(nll_ptr + row, log_total - at_target)
        if GRADIENT:
            # Another thread overwrites the target's logit, which must have been read by all.
            tl.debug_barrier()
            _write_gradient(logits_ptr, target, scale, log_total, vocabulary, BLOCK_V)


@triton.jit
def _statistics_kernel(
    logits_ptr, target_ptr, scale_ptr, log_total_ptr, at_target_ptr, stride, vocabulary, BLOCK_V: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride
    log_total, at_target = tl.cast(0.0, tl.float32), tl.cast(0.0, tl.float32)
    if tl.load(scale_ptr + row) != 0.0:
        target = tl.load(target_ptr + row)
        inside = (target >= 0) & (target < vocabulary)
        at_target = tl.load(logits_ptr + target, mask=inside, other=float("-inf")).to(tl.float32)
        log_total = _log_sum_exp(logits_ptr, vocabulary, BLOCK_V)
    tl.store(log_total_ptr + row, log_total)
    tl.store(at_target_ptr + row, at_target)


@triton.jit
def _part_gradient_kernel(logits_ptr, target_ptr, scale_ptr, log_total_ptr, stride, vocabulary, BLOCK_V: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride
    scale = tl.load(scale_ptr + row)
    if scale == 0.0:
        _write_zeros(logits_ptr, vocabulary, BLOCK_V)
    else:
        target, log_total = tl.load(target_ptr + row), tl.load(log_total_ptr + row)
        _write_gradient(logits_ptr, target, scale, log_total, vocabulary, BLOCK_V)


def _tile(target: str, vocabulary: int) -> tuple[int, int]:
    """(BLOCK_V, warps), 16 elements a thread."""
    width = min(next_power(vocabulary), _BLOCK_V)
    return width, max(width // (16 * warp_size(target)), 1)


def to_gradient(logits_CV: Tensor, target_C: Tensor, scale_C: Tensor, nll_C: Tensor, wants_gradient: bool) -> None:
    """Write the tokens' losses to nll and, if asked, their gradients over the logits.

    Args:
        logits_CV: float32, bfloat16 or float16, its last dimension contiguous.
        target_C: int64, each in [0, V); the loss of another one is infinite.
        scale_C, nll_C: float32, contiguous; the loss of a token whose scale is 0 is 0.
        wants_gradient: otherwise the logits stay as they are.
    """
    tokens, vocabulary = logits_CV.shape
    block_v, warps = _tile(target_name(logits_CV.device), vocabulary)
    if tokens:
        with device_guard(logits_CV):
            tensors = logits_CV, target_C, scale_C, nll_C
            sizes = {"GRADIENT": wants_gradient, "BLOCK_V": block_v, "num_warps": warps}
            _kernel[(tokens,)](*tensors, logits_CV.stride(0), vocabulary, **sizes)


def statistics(logits_CV: Tensor, target_C: Tensor, scale_C: Tensor, statistics_2C: Tensor) -> None:
    """Write what a rank must tell the others of its part of the vocabulary.

    Args:
        logits_CV: float32, bfloat16 or float16, its last dimension contiguous.
        target_C: int64; below 0 or from V on where another part has it.
        scale_C: float32, contiguous.
        statistics_2C: float32, contiguous; gets the logsumexp of each token's logits and its target's logit, −inf where
            another part has it; zeros for a token whose scale is 0.
    """
    tokens, vocabulary = logits_CV.shape
    block_v, warps = _tile(target_name(logits_CV.device), vocabulary)
    if tokens:
        with device_guard(logits_CV):
            tensors = logits_CV, target_C, scale_C, *statistics_2C
            _statistics_kernel[(tokens,)](*tensors, logits_CV.stride(0), vocabulary, BLOCK_V=block_v, num_warps=warps)


def part_to_gradient(logits_CV: Tensor, target_C: Tensor, scale_C: Tensor, log_total_C: Tensor) -> None:
    """Write the gradients of the tokens' losses over this part of their logits.

    Args:
        logits_CV, target_C, scale_C: as in `statistics`.
        log_total_C: float32, contiguous; the logsumexp of each token's logits over all parts.
    """
    tokens, vocabulary = logits_CV.shape
    block_v, warps = _tile(target_name(logits_CV.device), vocabulary)
    if tokens:
        with device_guard(logits_CV):
            tensors = logits_CV, target_C, scale_C, log_total_C
            _part_gradient_kernel[(tokens,)](
                *tensors, logits_CV.stride(0), vocabulary, BLOCK_V=block_v, num_warps=warps
            )


def specs(target: str, head_dim: int, dtype: str) -> list[KernelSpec]:
    """A block of 1024 tokens over a vocabulary of 32768, whatever the head size."""
    del head_dim
    tokens, vocabulary = 1024, 32768
    block_v, warps = _tile(target, vocabulary)
    elements = tokens * vocabulary
    inputs = {"logits_ptr": f"*{dtype}", "target_ptr": "*i64", "scale_ptr": "*fp32"}
    sizes = {"stride": "i32:16", "vocabulary": "i32:16"}
    # Name, kernel, its outputs and other inputs, constexprs, passes over the logits in memory, operations on each.
    kernels: tuple[tuple[str, Any, tuple[str, ...], dict[str, object], int, int], ...] = (
        ("cross_entropy_losses", _kernel, ("nll_ptr",), {"GRADIENT": False}, 1, 4),
        ("cross_entropy_gradients", _kernel, ("nll_ptr",), {"GRADIENT": True}, 3, 7),
        ("cross_entropy_statistics", _statistics_kernel, ("log_total_ptr", "at_target_ptr"), {}, 1, 4),
        ("cross_entropy_part_gradients", _part_gradient_kernel, ("log_total_ptr",), {}, 2, 3),
    )
    return [
        KernelSpec(
            name=name,
            fn=fn,
            signature=inputs | dict.fromkeys(pointers, "*fp32") | sizes,
            constexprs={**constexprs, "BLOCK_V": block_v},
            num_warps=warps,
            num_stages=3,
            multiplies=False,
            bytes=passes * elements * dtype_bytes(dtype) + (12 + 4 * len(pointers)) * tokens,
            flops=operations * elements,
        )
        for name, fn, pointers, constexprs, passes, operations in kernels
    ]
