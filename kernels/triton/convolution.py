"""The short causal depthwise convolution: W taps per channel, then SiLU, over concatenated sequences.

    z_t = sum_s taps[s] · x_{t−s},   taps[s] = weight[:, W−1−s]        y_t = SiLU(z_t) or z_t
    dx_j = sum_s taps[s] · dz_{j+s}        dtaps[s] = sum_t dz_t · x_{t−s}        dz_t = dy_t · SiLU'(z_t)

A table gives each row's sequence, and so the sequence's start and end. Rows before the start are in the sequence's
state. `_input` reads from both, and the state's rows, start − (W−1) … start − 1, get gradients by the formula of dx.
The backward recomputes z for the rows j … j + W − 1. These need only 2W − 1 inputs, but the compiler loads a tile per
use, W² + 2W in total, mostly from the L1 cache. Each program writes its part of dtaps, and the parts are summed in a
fixed order.
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
from kernels.documents import Documents, to_device
from kernels.triton.launch import KernelSpec, device_guard, dtype_bytes, next_power, target_name, warp_size

_BLOCK_ELEMENTS = 1024

# Elements of a tile per thread. With 8 the backward does not fit in 255 registers.
_FORWARD_PER_THREAD = 8
_BACKWARD_PER_THREAD = 4


@triton.jit
def _input(x_ptr, state_ptr, row, first, sequence, channel, mask, dim, PAST: tl.constexpr):
    """Load rows of x, or of the state for rows before the sequence's `first`; 0 where the mask is false."""
    value = tl.load(x_ptr + row * dim + channel, mask=mask & (row >= first), other=0.0).to(tl.float32)
    if state_ptr is not None:
        slot = row - first + PAST
        in_state = mask & (slot >= 0) & (slot < PAST)
        value += tl.load(state_ptr + (sequence * PAST + slot) * dim + channel, mask=in_state, other=0.0).to(tl.float32)
    return value


@triton.jit
def _sum(x_ptr, weight_ptr, state_ptr, row, first, sequence, channel, mask, dim, WIDTH: tl.constexpr):
    """Compute z of the rows."""
    z = tl.zeros(mask.shape, dtype=tl.float32)
    for shift in tl.static_range(WIDTH):
        tap = tl.load(weight_ptr + channel * WIDTH + (WIDTH - 1 - shift), mask=channel < dim, other=0.0).to(tl.float32)
        z += tap * _input(x_ptr, state_ptr, row - shift, first, sequence, channel, mask, dim, WIDTH - 1)
    return z


@triton.jit
def _gradient_of_sum(
    dy_ptr,
    x_ptr,
    weight_ptr,
    state_ptr,
    row,
    first,
    sequence,
    channel,
    mask,
    dim,
    SILU: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Compute dz of the rows; 0 where the mask is false."""
    dz = tl.load(dy_ptr + row * dim + channel, mask=mask, other=0.0).to(tl.float32)
    if SILU:
        z = _sum(x_ptr, weight_ptr, state_ptr, row, first, sequence, channel, mask, dim, WIDTH)
        sigmoid = tl.sigmoid(z)
        dz *= sigmoid * (1.0 + z * (1.0 - sigmoid))
    return dz


@triton.jit
def _gradient_of_input(
    dy_ptr,
    dfinal_ptr,
    x_ptr,
    weight_ptr,
    state_ptr,
    row,
    first,
    end,
    sequence,
    channel,
    mask,
    dim,
    SILU: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Compute dx of rows of x or of the state, including the gradient of the final state."""
    dx = tl.zeros(mask.shape, dtype=tl.float32)
    for shift in tl.static_range(WIDTH):
        reached = mask & (row + shift >= first) & (row + shift < end)
        tap = tl.load(weight_ptr + channel * WIDTH + (WIDTH - 1 - shift), mask=channel < dim, other=0.0).to(tl.float32)
        dx += tap * _gradient_of_sum(
            dy_ptr, x_ptr, weight_ptr, state_ptr, row + shift, first, sequence, channel, reached, dim, SILU, WIDTH
        )
    if dfinal_ptr is not None:
        slot = row - end + (WIDTH - 1)
        kept = mask & (slot >= 0)
        dx += tl.load(dfinal_ptr + (sequence * (WIDTH - 1) + slot) * dim + channel, mask=kept, other=0.0).to(tl.float32)
    return dx


@triton.jit
def _tile_of_rows(bounds_ptr, sequence_ptr, rows, dim, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return the program's rows, their sequences, the sequences' first rows and ends, the channels, and the mask."""
    row = (tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T))[:, None]
    channel = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
    sequence = tl.load(sequence_ptr + row, mask=row < rows, other=0).to(tl.int64)
    first = tl.load(bounds_ptr + sequence)
    end = tl.load(bounds_ptr + sequence + 1)
    return row, sequence, first, end, channel, (row < rows) & (channel < dim)


@triton.jit
def _tile_of_past(bounds_ptr, dim, before, PAST: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr):
    """Like `_tile_of_rows`, for the W − 1 rows before a sequence's start (`before` 0) or end (1); also the slots."""
    sequence = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, BLOCK_P)[:, None]
    channel = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
    first = tl.load(bounds_ptr + sequence)
    end = tl.load(bounds_ptr + sequence + 1)
    row = tl.load(bounds_ptr + sequence + before) - PAST + slot
    return row, sequence, first, end, channel, (slot < PAST) & (channel < dim), slot


@triton.jit
def _forward_kernel(
    x_ptr,
    weight_ptr,
    state_ptr,
    bounds_ptr,
    sequence_ptr,
    y_ptr,
    rows,
    dim,
    SILU: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row, sequence, first, _, channel, mask = _tile_of_rows(bounds_ptr, sequence_ptr, rows, dim, BLOCK_T, BLOCK_D)
    z = _sum(x_ptr, weight_ptr, state_ptr, row, first, sequence, channel, mask, dim, WIDTH)
    y = z * tl.sigmoid(z) if SILU else z
    tl.store(y_ptr + row * dim + channel, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _final_state_kernel(
    x_ptr,
    state_ptr,
    bounds_ptr,
    final_ptr,
    dim,
    WIDTH: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row, sequence, first, _, channel, mask, slot = _tile_of_past(bounds_ptr, dim, 1, WIDTH - 1, BLOCK_P, BLOCK_D)
    final = _input(x_ptr, state_ptr, row, first, sequence, channel, mask, dim, WIDTH - 1)
    offset = (sequence * (WIDTH - 1) + slot) * dim + channel
    tl.store(final_ptr + offset, final.to(final_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(
    dy_ptr,
    dfinal_ptr,
    x_ptr,
    weight_ptr,
    state_ptr,
    bounds_ptr,
    sequence_ptr,
    dx_ptr,
    dtaps_ptr,
    rows,
    dim,
    SILU: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row, sequence, first, end, channel, mask = _tile_of_rows(bounds_ptr, sequence_ptr, rows, dim, BLOCK_T, BLOCK_D)
    dx = _gradient_of_input(
        dy_ptr, dfinal_ptr, x_ptr, weight_ptr, state_ptr, row, first, end, sequence, channel, mask, dim, SILU, WIDTH
    )
    tl.store(dx_ptr + row * dim + channel, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    dz = _gradient_of_sum(dy_ptr, x_ptr, weight_ptr, state_ptr, row, first, sequence, channel, mask, dim, SILU, WIDTH)
    for shift in tl.static_range(WIDTH):
        x = _input(x_ptr, state_ptr, row - shift, first, sequence, channel, mask, dim, WIDTH - 1)
        part = dtaps_ptr + (tl.program_id(0).to(tl.int64) * WIDTH + (WIDTH - 1 - shift)) * dim + channel
        tl.store(part, tl.sum(dz * x, axis=0)[None, :], mask=channel < dim)


@triton.jit
def _state_gradient_kernel(
    dy_ptr,
    dfinal_ptr,
    x_ptr,
    weight_ptr,
    state_ptr,
    bounds_ptr,
    dstate_ptr,
    dim,
    SILU: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row, sequence, first, end, channel, mask, slot = _tile_of_past(bounds_ptr, dim, 0, WIDTH - 1, BLOCK_P, BLOCK_D)
    dstate = _gradient_of_input(
        dy_ptr, dfinal_ptr, x_ptr, weight_ptr, state_ptr, row, first, end, sequence, channel, mask, dim, SILU, WIDTH
    )
    offset = (sequence * (WIDTH - 1) + slot) * dim + channel
    tl.store(dstate_ptr + offset, dstate.to(dstate_ptr.dtype.element_ty), mask=mask)


def _tile(target: str, dim: int, per_thread: int) -> tuple[int, int, int]:
    """Return (BLOCK_T, BLOCK_D, warps)."""
    width = min(next_power(dim), 64)
    return _BLOCK_ELEMENTS // width, width, _BLOCK_ELEMENTS // (per_thread * warp_size(target))


def _past_tile(target: str, dim: int, width: int) -> tuple[int, int, int]:
    """Return (BLOCK_P, BLOCK_D, warps) of the kernels over states."""
    slots = next_power(width - 1)
    channels = min(next_power(dim), max(_BLOCK_ELEMENTS // slots, 16))
    return slots, channels, max(slots * channels // (_BACKWARD_PER_THREAD * warp_size(target)), 1)


def _sequences(bounds: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the bounds, int64 `[N+1]`, and the sequence of every row, int32."""
    bounds_N = torch.tensor(bounds)
    sequence_R = torch.repeat_interleave(torch.arange(len(bounds) - 1, dtype=torch.int32), bounds_N.diff())
    return to_device(bounds_N, device), to_device(sequence_R, device)


class _CausalConv(torch.autograd.Function):
    """(y `[R, D]`, final state `[N, W−1, D]` or None); saves its inputs."""

    @staticmethod
    def forward(
        ctx: Any,
        x_RD: Tensor,
        weight: Tensor,
        state_NWD: Tensor | None,
        silu: bool,
        sequences: Documents,
        wants_final: bool,
    ) -> tuple[Tensor, Tensor | None]:
        x_RD, weight = x_RD.contiguous(), weight.contiguous()
        state_NWD = None if state_NWD is None else state_NWD.contiguous()
        (rows, dim), width = x_RD.shape, weight.shape[1]
        bounds_N, sequence_R = sequences.made(_sequences, x_RD.device)
        target = target_name(x_RD.device)
        y_RD = torch.empty_like(x_RD)
        final_NWD = x_RD.new_empty(len(sequences), width - 1, dim) if wants_final else None
        block_t, block_d, warps = _tile(target, dim, _FORWARD_PER_THREAD)
        with device_guard(x_RD):
            grid = triton.cdiv(rows, block_t), triton.cdiv(dim, block_d)
            tensors = x_RD, weight, None if width == 1 else state_NWD
            blocks = {"WIDTH": width, "BLOCK_T": block_t, "BLOCK_D": block_d, "num_warps": warps}
            _forward_kernel[grid](*tensors, bounds_N, sequence_R, y_RD, rows, dim, SILU=silu, **blocks)
            if final_NWD is not None and width > 1:
                block_p, block_d, warps = _past_tile(target, dim, width)
                grid = len(sequences), triton.cdiv(dim, block_d)
                blocks = {"WIDTH": width, "BLOCK_P": block_p, "BLOCK_D": block_d, "num_warps": warps}
                _final_state_kernel[grid](x_RD, tensors[2], bounds_N, final_NWD, dim, **blocks)
        save(ctx, activations=(x_RD, state_NWD), weights=(weight,))
        ctx.silu, ctx.sequences = silu, sequences
        ctx.set_materialize_grads(False)
        return y_RD, final_NWD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
        x_RD, state_NWD, weight = ctx.saved_tensors
        (rows, dim), width = x_RD.shape, weight.shape[1]
        bounds_N, sequence_R = ctx.sequences.made(_sequences, x_RD.device)
        target = target_name(x_RD.device)
        dy_RD = torch.zeros_like(x_RD) if dy is None else dy.contiguous()
        dfinal_NWD = None if dfinal is None or width == 1 else dfinal.contiguous()
        state = None if width == 1 else state_NWD
        dx_RD = torch.empty_like(x_RD)
        block_t, block_d, warps = _tile(target, dim, _BACKWARD_PER_THREAD)
        programs = triton.cdiv(rows, block_t)
        parts = torch.empty(programs, width, dim, dtype=torch.float32, device=x_RD.device)
        dstate_NWD = None if state_NWD is None else torch.empty_like(state_NWD)
        with device_guard(x_RD):
            tensors = dy_RD, dfinal_NWD, x_RD, weight, state, bounds_N
            blocks = {"SILU": ctx.silu, "WIDTH": width, "BLOCK_T": block_t, "BLOCK_D": block_d, "num_warps": warps}
            grid = programs, triton.cdiv(dim, block_d)
            _backward_kernel[grid](*tensors, sequence_R, dx_RD, parts, rows, dim, **blocks)
            if state is not None:
                block_p, block_d, warps = _past_tile(target, dim, width)
                blocks = {"SILU": ctx.silu, "WIDTH": width, "BLOCK_P": block_p, "BLOCK_D": block_d, "num_warps": warps}
                grid = len(ctx.sequences), triton.cdiv(dim, block_d)
                _state_gradient_kernel[grid](*tensors, dstate_NWD, dim, **blocks)
        return dx_RD, parts.sum(0).t().to(weight.dtype), dstate_NWD, None, None, None


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    activation: str | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    sequences: Documents,
) -> tuple[Tensor, Tensor | None]:
    """`kernels.convolution.causal_conv1d` with checked arguments. `sequences` divide the B · T rows."""
    state_NWD = None if initial_state is None else initial_state.transpose(1, 2)
    rows = x.reshape(-1, x.shape[2])
    y, final = _CausalConv.apply(rows, weight, state_NWD, activation == "silu", sequences, output_final_state)
    return y.view(x.shape), None if final is None else final.transpose(1, 2)


def specs(target: str, head_dim: int, dtype: str) -> list[KernelSpec]:
    """Return the kernels for four taps with SiLU over 8192 tokens of 16 heads in 8 sequences, with states."""
    tokens, dim, width, sequences = 8192, 16 * head_dim, 4, 8
    pointer, size, elements = f"*{dtype}", dtype_bytes(dtype), tokens * dim
    state_bytes = sequences * (width - 1) * dim * size
    block_t, block_d, warps = _tile(target, dim, _FORWARD_PER_THREAD)
    backward_warps = _tile(target, dim, _BACKWARD_PER_THREAD)[2]
    tile: dict[str, object] = {"WIDTH": width, "BLOCK_T": block_t, "BLOCK_D": block_d}
    block_p, past_d, past_warps = _past_tile(target, dim, width)
    past_tile: dict[str, object] = {"WIDTH": width, "BLOCK_P": block_p, "BLOCK_D": past_d}
    silu: dict[str, object] = {"SILU": True}
    x, inputs = {"x_ptr": pointer}, {"x_ptr": pointer, "weight_ptr": "*fp32", "state_ptr": pointer}
    gradients = {"dy_ptr": pointer, "dfinal_ptr": pointer}
    bounds, rows = {"bounds_ptr": "*i64"}, {"sequence_ptr": "*i32"}
    extent = {"rows": "i32:16", "dim": "i32:16"}
    forward = inputs | bounds | rows | {"y_ptr": pointer} | extent
    final = x | {"state_ptr": pointer} | bounds | {"final_ptr": pointer, "dim": "i32:16"}
    backward = gradients | inputs | bounds | rows | {"dx_ptr": pointer, "dtaps_ptr": "*fp32"} | extent
    state = gradients | inputs | bounds | {"dstate_ptr": pointer, "dim": "i32:16"}
    parts = tokens // block_t * width * dim * 4
    # Multiply-adds of z, of the W values of z that the backward recomputes for dx, and of dtaps. A SiLU is about 5.
    forward_flops = elements * (2 * width + 5)
    backward_flops = elements * (width * (2 * width + 8) + 2 * width)
    past_flops = sequences * (width - 1) * dim * width * (2 * width + 8)
    return [
        KernelSpec(name, fn, signature, constexprs, num_warps, 3, False, moved, flops)
        for name, fn, signature, constexprs, num_warps, moved, flops in (
            ("conv_forward", _forward_kernel, forward, silu | tile, warps, 2 * elements * size, forward_flops),
            ("conv_final_state", _final_state_kernel, final, past_tile, past_warps, 2 * state_bytes, 0),
            (
                "conv_backward",
                _backward_kernel,
                backward,
                silu | tile,
                backward_warps,
                3 * elements * size + parts,
                backward_flops,
            ),
            (
                "conv_state_gradient",
                _state_gradient_kernel,
                state,
                silu | past_tile,
                past_warps,
                6 * state_bytes,
                past_flops,
            ),
        )
    ]
