"""The gates of a mixture of experts, with a forward and a backward kernel each. A program holds whole rows of logits.

The formulas are in `kernels.moe.routing`. The largest values are found one by one, and ties go to the lower index. The
backward reads the logits and the choice, and recomputes scores and gates.
"""

# Triton interprets a kernel's annotations, and only constexpr annotations are meaningful to it.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def, import-untyped"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.autograd import once_differentiable, save
from kernels.triton import TINY
from kernels.triton.launch import (
    KernelSpec,
    device_guard,
    dtype_bytes,
    next_power,
    target_name,
    unit_stride,
    warp_size,
)

_BLOCK_ELEMENTS = 1024

_TINY = tl.constexpr(TINY)


@triton.jit
def _block(tokens, experts, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr):
    """Return the program's rows and columns, and the masks of existing columns and of existing elements."""
    row = (tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T))[:, None]
    column = tl.broadcast_to(tl.arange(0, BLOCK_E)[None, :], (BLOCK_T, BLOCK_E))
    exists = column < experts
    return row, column, exists, exists & (row < tokens)


@triton.jit
def _first_largest(values, free, column):
    """Mark the largest free value of each row, if any. NaN is the largest, and ties go to the lower index."""
    nan = free & (values != values)
    largest = tl.max(tl.where(free & (nan == 0), values, float("-inf")), axis=1)[:, None]
    has_nan = tl.max(nan.to(tl.int32), axis=1)[:, None] > 0
    best = tl.where(has_nan, nan, free & (values == largest))
    first = tl.min(tl.where(best, column, values.shape[1]), axis=1)[:, None]
    return column == first


@triton.jit
def _largest(values, free, column, count):
    """Mark the `count` largest free values of each row."""
    chosen = column < 0
    for _ in range(count):
        chosen = chosen | _first_largest(values, free & (chosen == 0), column)
    return chosen


@triton.jit
def _in_best_groups(values, exists, column, experts, num_groups, group_top_k, per_group):
    """Mark the experts of the `group_top_k` groups with the largest sums of their best `per_group` values."""
    group = column // (experts // num_groups)
    worth = tl.zeros(values.shape, dtype=tl.float32)
    left = exists
    for _ in range(per_group):
        for g in range(num_groups):
            first = _first_largest(values, left & (group == g), column)
            best = tl.sum(tl.where(first, values, 0.0), axis=1)[:, None]
            worth = tl.where(group == g, worth + best, worth)
            left = left & (first == 0)
    chosen = column < 0
    for _ in range(group_top_k):
        first = _first_largest(worth, exists & (chosen == 0), column)
        chosen = chosen | (group == tl.sum(tl.where(first, group, 0), axis=1)[:, None])
    return exists & chosen


@triton.jit
def _softmax(x, mask):
    """Compute the softmax of the masked part of each row; zero elsewhere."""
    largest = tl.max(tl.where(mask, x, float("-inf")), axis=1)[:, None]
    e = tl.where(mask, tl.exp(x - largest), 0.0)
    # Mask again: a NaN in the row, or an empty mask, would make elements outside the mask NaN.
    return tl.where(mask, e / tl.sum(e, axis=1)[:, None], 0.0)


@triton.jit
def _scores(z, exists, SIGMOID: tl.constexpr):
    """Compute the scores and their sum over the experts."""
    if SIGMOID:
        s = tl.where(exists, tl.sigmoid(z), 0.0)
        total = tl.sum(s, axis=1)[:, None] + _TINY
    else:
        s = _softmax(z, exists)
        total = tl.full((z.shape[0], 1), 1.0, dtype=tl.float32)
    return s, total


@triton.jit
def _top_k_forward_kernel(
    logits_ptr,
    bias_ptr,
    probs_ptr,
    gates_ptr,
    chosen_ptr,
    stride,
    tokens,
    experts,
    top_k,
    num_groups,
    group_top_k,
    per_group,
    scale,
    SIGMOID: tl.constexpr,
    NORMALIZE: tl.constexpr,
    GROUPED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    row, column, exists, mask = _block(tokens, experts, BLOCK_T, BLOCK_E)
    z = tl.load(logits_ptr + row * stride + column, mask=mask, other=0.0).to(tl.float32)
    s, total = _scores(z, exists, SIGMOID)
    values, free = z, exists
    if bias_ptr is not None:
        values = s + tl.load(bias_ptr + column, mask=exists, other=0.0).to(tl.float32)
    elif GROUPED:
        values = s
    if GROUPED:
        free = _in_best_groups(values, exists, column, experts, num_groups, group_top_k, per_group)
    chosen = _largest(values, free, column, top_k)
    gates = s
    if NORMALIZE == "before":
        gates = s / total
    elif NORMALIZE == "after":
        kept = tl.sum(tl.where(chosen, s, 0.0), axis=1)[:, None]
        gates = s / (kept + _TINY) if SIGMOID else _softmax(z, chosen)
    # Mask after the division, because zero divided by NaN is NaN.
    gates = tl.where(chosen, gates, 0.0)
    place = row * experts + column
    tl.store(probs_ptr + place, s / total, mask=mask)
    tl.store(gates_ptr + place, gates * scale, mask=mask)
    tl.store(chosen_ptr + place, chosen.to(tl.uint8), mask=mask)


@triton.jit
def _top_k_backward_kernel(
    logits_ptr,
    chosen_ptr,
    dprobs_ptr,
    dgates_ptr,
    dlogits_ptr,
    stride,
    tokens,
    experts,
    scale,
    SIGMOID: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    row, column, exists, mask = _block(tokens, experts, BLOCK_T, BLOCK_E)
    place = row * experts + column
    z = tl.load(logits_ptr + row * stride + column, mask=mask, other=0.0).to(tl.float32)
    chosen = tl.load(chosen_ptr + place, mask=mask, other=0) != 0
    dprobs = tl.load(dprobs_ptr + place, mask=mask, other=0.0)
    dgates = tl.load(dgates_ptr + place, mask=mask, other=0.0) * scale
    dgates = tl.where(chosen, dgates, 0.0)
    s, total = _scores(z, exists, SIGMOID)
    if NORMALIZE == "before":
        dprobs += dgates
    ds = (dprobs - tl.sum(dprobs * s, axis=1)[:, None] / total) / total
    if NORMALIZE == "none":
        ds += dgates
    if SIGMOID:
        if NORMALIZE == "after":
            kept = tl.where(chosen, s, 0.0)
            kept_total = tl.sum(kept, axis=1)[:, None] + _TINY
            inner = tl.sum(dgates * kept, axis=1)[:, None] / kept_total
            ds += tl.where(chosen, (dgates - inner) / kept_total, 0.0)
        dz = ds * s * (1.0 - s)
    else:
        dz = s * (ds - tl.sum(ds * s, axis=1)[:, None])
        if NORMALIZE == "after":
            q = _softmax(z, chosen)
            dz += q * (dgates - tl.sum(dgates * q, axis=1)[:, None])
    tl.store(dlogits_ptr + place, dz.to(dlogits_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _activate(z, ACTIVATION: tl.constexpr):
    """Compute act(z) and act'(z)."""
    if ACTIVATION == "none":
        act, slope = z, tl.full(z.shape, 1.0, dtype=tl.float32)
    elif ACTIVATION == "relu":
        # tl.maximum would turn NaN into 0.
        act, slope = tl.where(z <= 0.0, 0.0, z), tl.where(z <= 0.0, 0.0, 1.0)
    elif ACTIVATION == "sigmoid":
        act = tl.sigmoid(z)
        slope = act * (1.0 - act)
    elif ACTIVATION == "tanh":
        # The absolute error is 1e-7, like that of the softmax after it.
        act = 2.0 * tl.sigmoid(2.0 * z) - 1.0
        slope = 1.0 - act * act
    elif ACTIVATION == "gelu":
        normal = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
        act, slope = z * normal, normal + z * tl.exp(-0.5 * z * z) * 0.3989422804014327
    else:
        sigmoid = tl.sigmoid(z)
        act, slope = z * sigmoid, sigmoid * (1.0 + z * (1.0 - sigmoid))
    return act, slope


@triton.jit
def _dense_to_sparse_forward_kernel(
    logits_ptr,
    temperature_ptr,
    noise_ptr,
    probs_ptr,
    gates_ptr,
    keep_ptr,
    stride,
    noise_stride,
    tokens,
    experts,
    threshold,
    max_experts,
    ACTIVATION: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    row, column, exists, mask = _block(tokens, experts, BLOCK_T, BLOCK_E)
    u, _ = _activate(tl.load(logits_ptr + row * stride + column, mask=mask, other=0.0).to(tl.float32), ACTIVATION)
    if noise_ptr is not None:
        u += tl.load(noise_ptr + row * noise_stride + column, mask=mask, other=0.0).to(tl.float32)
    p = _softmax(u / tl.load(temperature_ptr).to(tl.float32), exists)
    keep = exists & ((p >= threshold) | _first_largest(u, exists, column))
    if max_experts < experts:
        keep = keep & _largest(u, exists, column, max_experts)
    gates = p
    if RENORMALIZE:
        gates = p / tl.sum(tl.where(keep, p, 0.0), axis=1)[:, None]
    gates = tl.where(keep, gates, 0.0)
    place = row * experts + column
    tl.store(probs_ptr + place, p, mask=mask)
    tl.store(gates_ptr + place, gates, mask=mask)
    tl.store(keep_ptr + place, keep.to(tl.uint8), mask=mask)


@triton.jit
def _dense_to_sparse_backward_kernel(
    logits_ptr,
    temperature_ptr,
    noise_ptr,
    keep_ptr,
    dprobs_ptr,
    dgates_ptr,
    dlogits_ptr,
    dtemperature_ptr,
    stride,
    noise_stride,
    tokens,
    experts,
    ACTIVATION: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    row, column, exists, mask = _block(tokens, experts, BLOCK_T, BLOCK_E)
    place = row * experts + column
    z = tl.load(logits_ptr + row * stride + column, mask=mask, other=0.0).to(tl.float32)
    u, slope = _activate(z, ACTIVATION)
    if noise_ptr is not None:
        u += tl.load(noise_ptr + row * noise_stride + column, mask=mask, other=0.0).to(tl.float32)
    temperature = tl.load(temperature_ptr).to(tl.float32)
    p = _softmax(u / temperature, exists)
    keep = tl.load(keep_ptr + place, mask=mask, other=0) != 0
    dp = tl.load(dprobs_ptr + place, mask=mask, other=0.0)
    dgates = tl.load(dgates_ptr + place, mask=mask, other=0.0)
    if RENORMALIZE:
        kept = tl.where(keep, p, 0.0)
        # Rows beyond the last keep no expert, so their total is 0.
        total = tl.sum(kept, axis=1)[:, None]
        total = tl.where(total < _TINY, _TINY, total)
        dgates = (dgates - tl.sum(dgates * kept, axis=1)[:, None] / total) / total
    dp += tl.where(keep, dgates, 0.0)
    du = p * (dp - tl.sum(dp * p, axis=1)[:, None]) / temperature
    tl.store(dlogits_ptr + place, (du * slope).to(dlogits_ptr.dtype.element_ty), mask=mask)
    tl.store(dtemperature_ptr + tl.program_id(0), -tl.sum(tl.where(mask, du * u, 0.0)) / temperature)


def _tile(target: str, experts: int) -> tuple[int, int, int]:
    """Return (BLOCK_T, BLOCK_E, warps), for 8 elements per thread up to 16 warps."""
    width = next_power(experts)
    rows = max(1, _BLOCK_ELEMENTS // width)
    return rows, width, min(max(rows * width // (8 * warp_size(target)), 1), 16)


def _launch(x: Tensor, kernel: Any, tensors: tuple[Tensor | None, ...], numbers: tuple[Any, ...], **flags: Any) -> None:
    """Launch a kernel over the rows of x, with its pointers, numbers and constants."""
    block_t, block_e, warps = _tile(target_name(x.device), x.shape[1])
    with device_guard(x):
        grid = (triton.cdiv(len(x), block_t),)
        kernel[grid](*tensors, *numbers, **flags, BLOCK_T=block_t, BLOCK_E=block_e, num_warps=warps)


def _outputs(logits_TE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    probs_TE = torch.empty(logits_TE.shape, dtype=torch.float32, device=logits_TE.device)
    return probs_TE, torch.empty_like(probs_TE), torch.empty_like(probs_TE, dtype=torch.bool)


class _TopKGate(torch.autograd.Function):
    """`top_k_gate`: saves the logits and the choice."""

    @staticmethod
    def forward(
        ctx: Any,
        logits_TE: Tensor,
        bias_E: Tensor | None,
        top_k: int,
        score: str,
        normalize: str,
        num_groups: int,
        group_top_k: int,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        logits_TE = unit_stride(logits_TE)
        probs_TE, gates_TE, chosen_TE = _outputs(logits_TE)
        ctx.flags = {"SIGMOID": score == "sigmoid", "NORMALIZE": normalize}
        ctx.scale = float(scale)
        if probs_TE.numel():
            bias_E = None if bias_E is None else bias_E.contiguous()
            tensors = logits_TE, bias_E, probs_TE, gates_TE, chosen_TE.view(torch.uint8)
            groups = num_groups, group_top_k, top_k // group_top_k
            numbers = logits_TE.stride(0), *logits_TE.shape, top_k, *groups, ctx.scale
            _launch(logits_TE, _top_k_forward_kernel, tensors, numbers, **ctx.flags, GROUPED=num_groups > 1)
        ctx.mark_non_differentiable(chosen_TE)
        save(ctx, statistics=(logits_TE,), indices=(chosen_TE,))
        return probs_TE, gates_TE, chosen_TE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dprobs: Tensor, dgates: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        logits_TE, chosen_TE = ctx.saved_tensors
        dlogits_TE = torch.empty(logits_TE.shape, dtype=logits_TE.dtype, device=logits_TE.device)
        if dlogits_TE.numel():
            tensors = logits_TE, chosen_TE.view(torch.uint8), dprobs.contiguous(), dgates.contiguous(), dlogits_TE
            numbers = logits_TE.stride(0), *logits_TE.shape, ctx.scale
            _launch(logits_TE, _top_k_backward_kernel, tensors, numbers, **ctx.flags)
        return dlogits_TE, *[None] * 7


class _DenseToSparseGate(torch.autograd.Function):
    """`dense_to_sparse_gate`: saves its inputs and the kept experts."""

    @staticmethod
    def forward(
        ctx: Any,
        logits_TE: Tensor,
        temperature: Tensor,
        noise_TE: Tensor | None,
        threshold: float,
        activation: str,
        max_experts: int,
        renormalize: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        logits_TE, noise_TE = unit_stride(logits_TE), None if noise_TE is None else unit_stride(noise_TE)
        probs_TE, gates_TE, keep_TE = _outputs(logits_TE)
        ctx.flags = {"ACTIVATION": activation, "RENORMALIZE": renormalize}
        ctx.strides = logits_TE.stride(0), 0 if noise_TE is None else noise_TE.stride(0)
        if probs_TE.numel():
            tensors = logits_TE, temperature, noise_TE, probs_TE, gates_TE, keep_TE.view(torch.uint8)
            numbers = *ctx.strides, *logits_TE.shape, float(threshold), max_experts
            _launch(logits_TE, _dense_to_sparse_forward_kernel, tensors, numbers, **ctx.flags)
        ctx.mark_non_differentiable(keep_TE)
        save(ctx, statistics=(logits_TE, temperature, noise_TE), indices=(keep_TE,))
        return probs_TE, gates_TE, keep_TE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dprobs: Tensor, dgates: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        logits_TE, temperature, noise_TE, keep_TE = ctx.saved_tensors
        dlogits_TE = torch.empty(logits_TE.shape, dtype=logits_TE.dtype, device=logits_TE.device)
        block_t = _tile(target_name(logits_TE.device), logits_TE.shape[1])[0]
        parts_P = torch.zeros(triton.cdiv(len(logits_TE), block_t), dtype=torch.float32, device=logits_TE.device)
        if dlogits_TE.numel():
            saved = logits_TE, temperature, noise_TE, keep_TE.view(torch.uint8)
            tensors = *saved, dprobs.contiguous(), dgates.contiguous(), dlogits_TE, parts_P
            numbers = *ctx.strides, *logits_TE.shape
            _launch(logits_TE, _dense_to_sparse_backward_kernel, tensors, numbers, **ctx.flags)
        dtemperature = parts_P.sum().to(temperature.dtype).view(temperature.shape)
        return dlogits_TE, dtemperature, *[None] * 5


def top_k_gate(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`kernels.moe.routing.top_k_gate` with checked arguments, in the order of `_TopKGate`."""
    return _TopKGate.apply(*arguments)


def dense_to_sparse_gate(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`kernels.moe.routing.dense_to_sparse_gate` with checked arguments, in the order of `_DenseToSparseGate`."""
    return _DenseToSparseGate.apply(*arguments)


def specs(target: str, head_dim: int, dtype: str) -> list[KernelSpec]:
    """Return the kernels for 8192 tokens and `head_dim` experts, in the variants that compute the most."""
    tokens, experts = 8192, head_dim
    block_t, block_e, warps = _tile(target, experts)
    pointer, blocks = f"*{dtype}", {"BLOCK_T": block_t, "BLOCK_E": block_e}
    extent = {"tokens": "i32:16", "experts": "i32:16"}
    out = {"probs_ptr": "*fp32", "gates_ptr": "*fp32"}
    groups = dict.fromkeys(("top_k", "num_groups", "group_top_k", "per_group"), "i32")
    forward = {"logits_ptr": pointer, **out, "chosen_ptr": "*u8", "stride": "i32:16", **extent, **groups}
    forward["scale"] = "fp32"
    gradients = {"dprobs_ptr": "*fp32", "dgates_ptr": "*fp32", "dlogits_ptr": pointer}
    backward = {"logits_ptr": pointer, "chosen_ptr": "*u8", **gradients, "stride": "i32:16", **extent, "scale": "fp32"}
    inputs = {"logits_ptr": pointer, "temperature_ptr": "*fp32", "noise_ptr": "*fp32"}
    strides = {"stride": "i32:16", "noise_stride": "i32:16"}
    sparse = {**inputs, **out, "keep_ptr": "*u8", **strides, **extent, "threshold": "fp32", "max_experts": "i32"}
    sparse_backward = {**inputs, "keep_ptr": "*u8", **gradients, "dtemperature_ptr": "*fp32", **strides, **extent}
    grouped = {"bias_ptr": "*fp32", **forward}
    plain: dict[str, Any] = {"GROUPED": False, "bias_ptr": None}
    softmax, sigmoid = ({"SIGMOID": sigmoid, "NORMALIZE": "after"} for sigmoid in (False, True))
    gelu = {"ACTIVATION": "gelu", "RENORMALIZE": True}
    sparse_kernels = _dense_to_sparse_forward_kernel, _dense_to_sparse_backward_kernel
    kernels: list[tuple[str, Any, dict[str, str], dict[str, Any]]] = [
        ("top_k_forward_softmax", _top_k_forward_kernel, forward, softmax | plain),
        ("top_k_forward_sigmoid", _top_k_forward_kernel, forward, sigmoid | plain),
        ("top_k_forward_grouped", _top_k_forward_kernel, grouped, sigmoid | {"GROUPED": True}),
        ("top_k_backward_softmax", _top_k_backward_kernel, backward, softmax),
        ("top_k_backward_sigmoid", _top_k_backward_kernel, backward, sigmoid),
        ("dense_to_sparse_forward", sparse_kernels[0], sparse, gelu),
        ("dense_to_sparse_backward", sparse_kernels[1], sparse_backward, gelu),
    ]
    return [
        KernelSpec(
            name=name,
            fn=fn,
            signature=signature,
            constexprs=flags | blocks,
            num_warps=warps,
            num_stages=3,
            multiplies=False,
            bytes=tokens * experts * ((2 if "backward" in name else 1) * dtype_bytes(dtype) + 9),
            flops=20 * tokens * experts,
        )
        for name, fn, signature, flags in kernels
    ]
