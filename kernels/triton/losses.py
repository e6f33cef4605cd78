"""Softmax cross entropy of a block of tokens: the losses, and the gradients in the place of the logits.

    nll_t = logsumexp(z_t) − z_t[y_t],   d (w_t nll_t) / d z_t = w_t (softmax(z_t) − onehot(y_t))

A program goes through the vocabulary of one token twice: once for the running maximum and the sum below it (Milakov and
Gimelshein 2018, arXiv:1805.02867, algorithm 3), once, while the row is still in the cache, for the gradient. A token of
weight 0 is not read.
"""

# Triton reads a kernel's annotations: only those of constexprs mean anything to it.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def, import-untyped"

import triton
import triton.language as tl
from torch import Tensor

from kernels.triton.launch import KernelSpec, device_guard, dtype_bytes, next_power, target_name, warp_size

_BLOCK_V = 4096


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
            for start in range(0, vocabulary, BLOCK_V):
                column = start + tl.arange(0, BLOCK_V)
                zeros = tl.zeros((BLOCK_V,), dtype=logits_ptr.dtype.element_ty)
                tl.store(logits_ptr + column, zeros, mask=column < vocabulary)
        tl.store(nll_ptr + row, 0.0)
    else:
        target = tl.load(target_ptr + row)
        at_target = tl.load(logits_ptr + target).to(tl.float32)
        largest, total = tl.cast(float("-inf"), tl.float32), tl.cast(0.0, tl.float32)
        for start in range(0, vocabulary, BLOCK_V):
            column = start + tl.arange(0, BLOCK_V)
            z = tl.load(logits_ptr + column, mask=column < vocabulary, other=float("-inf")).to(tl.float32)
            new = tl.maximum(largest, tl.max(z, axis=0))
            # Logits of −inf only: any finite number in the place of their maximum leaves a sum of 0.
            finite = tl.where(new == float("-inf"), 0.0, new)
            total = total * tl.exp(largest - finite) + tl.sum(tl.exp(z - finite), axis=0)
            largest = new
        log_total = largest + tl.log(total)
        tl.store(nll_ptr + row, log_total - at_target)
        if GRADIENT:
            # Another thread overwrites the target's logit, which must have been read by all.
            tl.debug_barrier()
            for start in range(0, vocabulary, BLOCK_V):
                column = start + tl.arange(0, BLOCK_V)
                z = tl.load(logits_ptr + column, mask=column < vocabulary, other=float("-inf")).to(tl.float32)
                gradient = scale * (tl.exp(z - log_total) - tl.where(column == target, 1.0, 0.0))
                gradient = gradient.to(logits_ptr.dtype.element_ty)
                tl.store(logits_ptr + column, gradient, mask=column < vocabulary)


def _tile(target: str, vocabulary: int) -> tuple[int, int]:
    """(BLOCK_V, warps), 16 elements a thread."""
    width = min(next_power(vocabulary), _BLOCK_V)
    return width, max(width // (16 * warp_size(target)), 1)


def to_gradient(logits_CV: Tensor, target_C: Tensor, scale_C: Tensor, nll_C: Tensor, wants_gradient: bool) -> None:
    """Write the tokens' losses to nll and, if asked, their gradients over the logits.

    Args:
        logits_CV: float32, bfloat16 or float16, its last dimension contiguous.
        target_C: int64, each in [0, V).
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


def specs(target: str, head_dim: int, dtype: str) -> list[KernelSpec]:
    """A block of 1024 tokens over a vocabulary of 32768, whatever the head size."""
    del head_dim
    tokens, vocabulary = 1024, 32768
    block_v, warps = _tile(target, vocabulary)
    elements = tokens * vocabulary
    pointers = {"logits_ptr": f"*{dtype}", "target_ptr": "*i64", "scale_ptr": "*fp32", "nll_ptr": "*fp32"}
    return [
        KernelSpec(
            name=name,
            fn=_kernel,
            signature=pointers | {"stride": "i32:16", "vocabulary": "i32:16"},
            constexprs={"GRADIENT": gradient, "BLOCK_V": block_v},
            num_warps=warps,
            num_stages=3,
            multiplies=False,
            bytes=(3 if gradient else 1) * elements * dtype_bytes(dtype) + 16 * tokens,
            flops=(7 if gradient else 4) * elements,
        )
        for name, gradient in (("cross_entropy_losses", False), ("cross_entropy_gradients", True))
    ]
