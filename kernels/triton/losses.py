"""Softmax cross entropy of a block of tokens: computes the losses, and overwrites the logits with their gradients.

    nll_t = logsumexp(z_t) − z_t[y_t],   d (w_t nll_t) / d z_t = w_t (softmax(z_t) − onehot(y_t))

A program passes over one token's logits twice: first for the running maximum and the sum relative to it (Milakov and
Gimelshein 2018, arXiv:1805.02867, algorithm 3), then for the gradient, while the row is still in the cache. A token of
weight 0 is not read.

With a vocabulary sharded over ranks, the ranks communicate between the two passes. The passes are then separate
kernels, `statistics` and `part_to_gradient`, for a part of the vocabulary that may not contain the target. They also
compute log-probabilities and the entropy H = −sum p log p, from a sum U next to the softmax's S, with the maximum m:

    S = sum exp(z − m),   U = sum exp(z − m) (z − m),   H = log S − U / S

The divergence between a teacher's and a student's softmax is split in the same way, over the logits of both.
"""

# Triton interprets a kernel's annotations, and only constexpr annotations are meaningful to it.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def, import-untyped"

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from kernels.triton.launch import KernelSpec, device_guard, dtype_bytes, next_power, target_name, warp_size

_BLOCK_V = 4096


@triton.jit
def _log_sum_exp(logits_ptr, inverse_temperature, vocabulary, ENTROPY: tl.constexpr, BLOCK_V: tl.constexpr):
    """Return a row's (logsumexp, entropy); without ENTROPY the entropy is 0."""
    largest, total, moment = tl.cast(float("-inf"), tl.float32), tl.cast(0.0, tl.float32), tl.cast(0.0, tl.float32)
    for start in range(0, vocabulary, BLOCK_V):
        column = start + tl.arange(0, BLOCK_V)
        z = tl.load(logits_ptr + column, mask=column < vocabulary, other=float("-inf")).to(tl.float32)
        z *= inverse_temperature
        new = tl.maximum(largest, tl.max(z, axis=0))
        # If all logits are −inf, replacing their maximum by a finite number keeps the sum at 0.
        finite = tl.where(new == float("-inf"), 0.0, new)
        shrink, p = tl.exp(largest - finite), tl.exp(z - finite)
        if ENTROPY:
            # 0 log 0 = 0, both for the initial maximum and for logits of −inf.
            fall = tl.where(largest == float("-inf"), 0.0, largest - finite)
            moment = shrink * (moment + fall * total)
            moment += tl.sum(p * tl.where(z == float("-inf"), 0.0, z - finite), axis=0)
        total = total * shrink + tl.sum(p, axis=0)
        largest = new
    entropy = tl.cast(0.0, tl.float32)
    if ENTROPY:
        entropy = tl.where(total == 0.0, 0.0, tl.log(total) - moment / total)
    return largest + tl.log(total), entropy


@triton.jit
def _write_gradient(
    logits_ptr,
    target,
    scale,
    log_total,
    inverse_temperature,
    entropy_scale,
    entropy,
    vocabulary,
    ENTROPY: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    for start in range(0, vocabulary, BLOCK_V):
        column = start + tl.arange(0, BLOCK_V)
        z = tl.load(logits_ptr + column, mask=column < vocabulary, other=float("-inf")).to(tl.float32)
        log_p = z * inverse_temperature - log_total
        p = tl.exp(log_p)
        gradient = scale * (p - tl.where(column == target, 1.0, 0.0))
        if ENTROPY:
            gradient -= entropy_scale * p * tl.where(z == float("-inf"), 0.0, log_p + entropy)
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
        log_total, _ = _log_sum_exp(logits_ptr, 1.0, vocabulary, False, BLOCK_V)
        tl.store(nll_ptr + row, log_total - at_target)
        if GRADIENT:
            # All threads must have read the target's logit before one of them overwrites it.
            tl.debug_barrier()
            _write_gradient(logits_ptr, target, scale, log_total, 1.0, 0.0, 0.0, vocabulary, False, BLOCK_V)


@triton.jit
def _statistics_kernel(
    logits_ptr,
    target_ptr,
    scale_ptr,
    log_total_ptr,
    at_target_ptr,
    entropy_ptr,
    stride,
    vocabulary,
    inverse_temperature,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride
    log_total, at_target = tl.cast(0.0, tl.float32), tl.cast(0.0, tl.float32)
    entropy = tl.cast(0.0, tl.float32)
    if tl.load(scale_ptr + row) != 0.0:
        target = tl.load(target_ptr + row)
        inside = (target >= 0) & (target < vocabulary)
        at_target = tl.load(logits_ptr + target, mask=inside, other=float("-inf")).to(tl.float32)
        at_target *= inverse_temperature
        log_total, entropy = _log_sum_exp(logits_ptr, inverse_temperature, vocabulary, entropy_ptr is not None, BLOCK_V)
    tl.store(log_total_ptr + row, log_total)
    tl.store(at_target_ptr + row, at_target)
    if entropy_ptr is not None:
        tl.store(entropy_ptr + row, entropy)


@triton.jit
def _part_gradient_kernel(
    logits_ptr,
    target_ptr,
    scale_ptr,
    log_total_ptr,
    entropy_scale_ptr,
    entropy_ptr,
    stride,
    vocabulary,
    inverse_temperature,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride
    scale = tl.load(scale_ptr + row)
    entropy_scale, entropy = tl.cast(0.0, tl.float32), tl.cast(0.0, tl.float32)
    if entropy_ptr is not None:
        entropy_scale, entropy = tl.load(entropy_scale_ptr + row), tl.load(entropy_ptr + row)
    if (scale == 0.0) & (entropy_scale == 0.0):
        _write_zeros(logits_ptr, vocabulary, BLOCK_V)
    else:
        target, log_total = tl.load(target_ptr + row), tl.load(log_total_ptr + row)
        _write_gradient(
            logits_ptr,
            target,
            scale,
            log_total,
            inverse_temperature,
            entropy_scale,
            entropy,
            vocabulary,
            entropy_ptr is not None,
            BLOCK_V,
        )


@triton.jit
def _divergence_kernel(
    logits_ptr,
    teacher_ptr,
    scale_ptr,
    log_total_ptr,
    teacher_total_ptr,
    kl_ptr,
    stride,
    teacher_stride,
    vocabulary,
    inverse_temperature,
    REVERSE: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride
    teacher_ptr += row * teacher_stride
    log_total, teacher_total = tl.cast(0.0, tl.float32), tl.cast(0.0, tl.float32)
    kl = tl.cast(0.0, tl.float32)
    if tl.load(scale_ptr + row) != 0.0:
        log_total, _ = _log_sum_exp(logits_ptr, inverse_temperature, vocabulary, False, BLOCK_V)
        teacher_total, _ = _log_sum_exp(teacher_ptr, inverse_temperature, vocabulary, False, BLOCK_V)
        for start in range(0, vocabulary, BLOCK_V):
            column = start + tl.arange(0, BLOCK_V)
            exists = column < vocabulary
            log_q = tl.load(logits_ptr + column, mask=exists, other=0.0).to(tl.float32) * inverse_temperature
            log_p = tl.load(teacher_ptr + column, mask=exists, other=0.0).to(tl.float32) * inverse_temperature
            log_q -= log_total
            log_p -= teacher_total
            terms = tl.exp(log_q) * (log_q - log_p) if REVERSE else tl.exp(log_p) * (log_p - log_q)
            kl += tl.sum(tl.where(exists, terms, 0.0), axis=0)
    tl.store(log_total_ptr + row, log_total)
    tl.store(teacher_total_ptr + row, teacher_total)
    tl.store(kl_ptr + row, kl)


@triton.jit
def _divergence_gradient_kernel(
    logits_ptr,
    teacher_ptr,
    scale_ptr,
    log_total_ptr,
    teacher_total_ptr,
    kl_ptr,
    stride,
    teacher_stride,
    vocabulary,
    inverse_temperature,
    REVERSE: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride
    teacher_ptr += row * teacher_stride
    scale = tl.load(scale_ptr + row)
    if scale == 0.0:
        _write_zeros(logits_ptr, vocabulary, BLOCK_V)
    else:
        log_total, teacher_total = tl.load(log_total_ptr + row), tl.load(teacher_total_ptr + row)
        kl = tl.load(kl_ptr + row)
        for start in range(0, vocabulary, BLOCK_V):
            column = start + tl.arange(0, BLOCK_V)
            exists = column < vocabulary
            log_q = tl.load(logits_ptr + column, mask=exists, other=0.0).to(tl.float32) * inverse_temperature
            log_p = tl.load(teacher_ptr + column, mask=exists, other=0.0).to(tl.float32) * inverse_temperature
            log_q -= log_total
            log_p -= teacher_total
            if REVERSE:
                gradient = scale * tl.exp(log_q) * (log_q - log_p - kl)
            else:
                gradient = scale * (tl.exp(log_q) - tl.exp(log_p))
            tl.store(logits_ptr + column, gradient.to(logits_ptr.dtype.element_ty), mask=exists)


def _tile(target: str, vocabulary: int) -> tuple[int, int]:
    """Return (BLOCK_V, warps), for 16 elements per thread."""
    width = min(next_power(vocabulary), _BLOCK_V)
    return width, max(width // (16 * warp_size(target)), 1)


def to_gradient(logits_CV: Tensor, target_C: Tensor, scale_C: Tensor, nll_C: Tensor, wants_gradient: bool) -> None:
    """Write the tokens' losses to nll, and if `wants_gradient`, overwrite the logits with their gradients.

    Args:
        logits_CV: float32, bfloat16 or float16, its last dimension contiguous.
        target_C: int64 in [0, V); the loss of any other target is infinite.
        scale_C, nll_C: float32, contiguous; the loss of a token with scale 0 is 0.
        wants_gradient: if false, the logits are not modified.
    """
    tokens, vocabulary = logits_CV.shape
    block_v, warps = _tile(target_name(logits_CV.device), vocabulary)
    if tokens:
        with device_guard(logits_CV):
            tensors = logits_CV, target_C, scale_C, nll_C
            sizes = {"GRADIENT": wants_gradient, "BLOCK_V": block_v, "num_warps": warps}
            _kernel[(tokens,)](*tensors, logits_CV.stride(0), vocabulary, **sizes)


def statistics(
    logits_CV: Tensor, target_C: Tensor, scale_C: Tensor, statistics_SC: Tensor, inverse_temperature: float = 1.0
) -> None:
    """Write the statistics of this rank's part of the vocabulary, which the ranks then exchange.

    Args:
        logits_CV: float32, bfloat16 or float16, its last dimension contiguous; not modified.
        target_C: int64; outside [0, V) if another rank has the row.
        scale_C: float32, contiguous.
        statistics_SC: float32, S = 2 or 3, its last dimension contiguous; the output. Per token, of the logits times
            inverse_temperature: the logsumexp, the target's logit (−inf if another rank has it), and with S = 3 the
            softmax's entropy. Zeros for a token with scale 0.
        inverse_temperature: above 0.
    """
    tokens, vocabulary = logits_CV.shape
    block_v, warps = _tile(target_name(logits_CV.device), vocabulary)
    log_total, at_target, *entropy = statistics_SC
    if tokens:
        with device_guard(logits_CV):
            tensors = logits_CV, target_C, scale_C, log_total, at_target, entropy[0] if entropy else None
            numbers = logits_CV.stride(0), vocabulary, inverse_temperature
            _statistics_kernel[(tokens,)](*tensors, *numbers, BLOCK_V=block_v, num_warps=warps)


def part_to_gradient(
    logits_CV: Tensor,
    target_C: Tensor,
    scale_C: Tensor,
    log_total_C: Tensor,
    inverse_temperature: float = 1.0,
    entropy_scale_C: Tensor | None = None,
    entropy_C: Tensor | None = None,
) -> None:
    """Overwrite the logits z with scale (p − onehot) − entropy_scale p (log p + H), log p = inverse_temperature z − L.

    Args:
        logits_CV: as in `statistics`, but overwritten.
        target_C, scale_C, inverse_temperature: as in `statistics`.
        log_total_C: float32, contiguous; L, each token's logsumexp over all ranks' logits.
        entropy_scale_C, entropy_C: float32, contiguous; entropy is H, of the softmax over all ranks. Both or neither.
    """
    tokens, vocabulary = logits_CV.shape
    block_v, warps = _tile(target_name(logits_CV.device), vocabulary)
    if tokens:
        with device_guard(logits_CV):
            tensors = logits_CV, target_C, scale_C, log_total_C, entropy_scale_C, entropy_C
            numbers = logits_CV.stride(0), vocabulary, inverse_temperature
            _part_gradient_kernel[(tokens,)](*tensors, *numbers, BLOCK_V=block_v, num_warps=warps)


def divergence(
    logits_CV: Tensor,
    teacher_CV: Tensor,
    scale_C: Tensor,
    told_3C: Tensor,
    inverse_temperature: float,
    reverse: bool,
) -> None:
    """Write the statistics of this rank's part of the vocabulary, which the ranks then exchange.

    Args:
        logits_CV, teacher_CV: float32, bfloat16 or float16, their last dimensions contiguous; not modified.
        scale_C: float32, contiguous.
        told_3C: float32, its last dimension contiguous; the output. Per token, of the logits times inverse_temperature:
            the student's logsumexp, the teacher's, and the divergence between their softmaxes. Zeros for a token with
            scale 0.
        inverse_temperature: above 0.
        reverse: KL(student || teacher) if true, else KL(teacher || student).
    """
    _launch_divergence(_divergence_kernel, (logits_CV, teacher_CV, scale_C, *told_3C), inverse_temperature, reverse)


def divergence_to_gradient(
    logits_CV: Tensor,
    teacher_CV: Tensor,
    scale_C: Tensor,
    totals_2C: Tensor,
    kl_C: Tensor,
    inverse_temperature: float,
    reverse: bool,
) -> None:
    """Overwrite the student's logits with scale (q − p), or scale q (log q − log p − KL) if reverse.

    Args:
        logits_CV: the student's, as in `divergence`, but overwritten.
        teacher_CV, scale_C, inverse_temperature, reverse: as in `divergence`.
        totals_2C: float32, its last dimension contiguous; the logsumexps of student and teacher over all parts.
        kl_C: float32, contiguous; the divergence of each token, over all parts.
    """
    tensors = logits_CV, teacher_CV, scale_C, *totals_2C, kl_C
    _launch_divergence(_divergence_gradient_kernel, tensors, inverse_temperature, reverse)


def _launch_divergence(kernel: Any, tensors: Sequence[Tensor], inverse_temperature: float, reverse: bool) -> None:
    logits_CV, teacher_CV = tensors[:2]
    tokens, vocabulary = logits_CV.shape
    block_v, warps = _tile(target_name(logits_CV.device), vocabulary)
    if tokens:
        with device_guard(logits_CV):
            numbers = logits_CV.stride(0), teacher_CV.stride(0), vocabulary, inverse_temperature
            kernel[(tokens,)](*tensors, *numbers, REVERSE=reverse, BLOCK_V=block_v, num_warps=warps)


def specs(target: str, head_dim: int, dtype: str) -> list[KernelSpec]:
    """Return the kernels for a block of 1024 tokens and a vocabulary of 32768, for any head size."""
    del head_dim
    tokens, vocabulary = 1024, 32768
    block_v, warps = _tile(target, vocabulary)
    elements = tokens * vocabulary
    logits, scale = {"logits_ptr": f"*{dtype}"}, {"scale_ptr": "*fp32"}
    one, both = logits | {"target_ptr": "*i64"} | scale, logits | {"teacher_ptr": f"*{dtype}"} | scale
    sizes = {"stride": "i32:16", "vocabulary": "i32:16"}
    temperature = sizes | {"inverse_temperature": "fp32"}
    of_both = {"stride": "i32:16", "teacher_stride": "i32:16", "vocabulary": "i32:16", "inverse_temperature": "fp32"}
    told, given = ("log_total_ptr", "at_target_ptr"), ("log_total_ptr",)
    divergence = ("log_total_ptr", "teacher_total_ptr", "kl_ptr")
    no_entropy: dict[str, object] = {"entropy_ptr": None}
    no_entropies: dict[str, object] = {"entropy_scale_ptr": None, "entropy_ptr": None}
    forward: dict[str, object] = {"REVERSE": False}
    reverse: dict[str, object] = {"REVERSE": True}
    # Name, kernel, inputs, further per-token inputs and outputs, numbers, constexprs, passes over logits in memory,
    # operations per student logit.
    kernels: tuple[
        tuple[str, Any, dict[str, str], tuple[str, ...], dict[str, str], dict[str, object], int, int], ...
    ] = (
        ("cross_entropy_losses", _kernel, one, ("nll_ptr",), sizes, {"GRADIENT": False}, 1, 4),
        ("cross_entropy_gradients", _kernel, one, ("nll_ptr",), sizes, {"GRADIENT": True}, 3, 7),
        ("cross_entropy_statistics", _statistics_kernel, one, told, temperature, no_entropy, 1, 5),
        ("cross_entropy_part_gradients", _part_gradient_kernel, one, given, temperature, no_entropies, 2, 4),
        ("entropy_statistics", _statistics_kernel, one, (*told, "entropy_ptr"), temperature, {}, 1, 7),
        ("entropy_part_gradients", _part_gradient_kernel, one, (*given, *no_entropies), temperature, {}, 2, 8),
        ("divergence", _divergence_kernel, both, divergence, of_both, forward, 2, 17),
        ("divergence_gradients", _divergence_gradient_kernel, both, divergence, of_both, forward, 3, 8),
        ("reverse_divergence", _divergence_kernel, both, divergence, of_both, reverse, 2, 17),
        ("reverse_divergence_gradients", _divergence_gradient_kernel, both, divergence, of_both, reverse, 3, 8),
    )
    return [
        KernelSpec(
            name=name,
            fn=fn,
            signature=inputs | dict.fromkeys(pointers, "*fp32") | numbers,
            constexprs={**constexprs, "BLOCK_V": block_v},
            num_warps=warps,
            num_stages=3,
            multiplies=False,
            bytes=passes * elements * dtype_bytes(dtype) + ((12 if inputs is one else 4) + 4 * len(pointers)) * tokens,
            flops=operations * elements,
        )
        for name, fn, inputs, pointers, numbers, constexprs, passes, operations in kernels
    ]
