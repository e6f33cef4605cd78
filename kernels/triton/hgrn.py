"""HGRN's recurrence in Triton: h_t = exp(log_decay_t) h_{t-1} + x_t, independently for every channel.

Parallel over channels and over chunks of time, in three steps:
1. Each chunk's last h, starting from zero, and the product of its decays.
2. A scan of these over the chunks, which gives the h at each chunk's start.
3. Each chunk again, from that h.

The gradient g of h takes the same steps in reverse, g_t = dh_t + exp(log_decay_{t+1}) g_{t+1}, and

    dx_t = g_t        dlog_decay_t = g_t exp(log_decay_t) h_{t-1}

Decays are only multiplied, never divided, so nothing overflows.
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
from kernels.documents import Documents, sequences_in
from kernels.triton.launch import KernelSpec
from kernels.triton.sequences import ChunkTable, Launcher, chunk_table

_CHUNK = 64
_BLOCK = 128


@triton.jit
def _chunk_ends(x, log_decay, chunks, ends, products, DIM: tl.constexpr, BLOCK: tl.constexpr, REVERSE: tl.constexpr):
    """Compute each chunk's last value, starting from zero, and the product of its decays, `[N, D]` each."""
    chunk = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = channel < DIM
    first, stop = tl.load(chunks + 2 * chunk).to(tl.int64), tl.load(chunks + 2 * chunk + 1)
    carry = tl.zeros([BLOCK], dtype=tl.float32)
    product = tl.full([BLOCK], 1.0, dtype=tl.float32)
    for index in range(stop - first):
        address = (stop - 1 - index if REVERSE else first + index) * DIM + channel
        decay = tl.exp(tl.load(log_decay + address, mask=mask, other=0.0).to(tl.float32))
        here = tl.load(x + address, mask=mask, other=0.0).to(tl.float32)
        carry = decay * (here + carry) if REVERSE else decay * carry + here
        product *= decay
    address = chunk.to(tl.int64) * DIM + channel
    tl.store(ends + address, carry, mask=mask)
    tl.store(products + address, product, mask=mask)


@triton.jit
def _scan_chunks(
    ends,
    products,
    initial,
    first_chunk,
    starts,
    final,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    REVERSE: tl.constexpr,
    INITIAL: tl.constexpr,
):
    """Compute the value at each chunk's start `[N, D]`, and the final value of each sequence."""
    sequence = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = channel < DIM
    whole = sequence.to(tl.int64) * DIM + channel
    if INITIAL:
        state = tl.load(initial + whole, mask=mask, other=0.0).to(tl.float32)
    else:
        state = tl.zeros([BLOCK], dtype=tl.float32)
    first, end = tl.load(first_chunk + sequence).to(tl.int64), tl.load(first_chunk + sequence + 1)
    for index in range(end - first):
        address = (end - 1 - index if REVERSE else first + index) * DIM + channel
        tl.store(starts + address, state, mask=mask)
        product = tl.load(products + address, mask=mask, other=0.0)
        state = product * state + tl.load(ends + address, mask=mask, other=0.0)
    tl.store(final + whole, state, mask=mask)


@triton.jit
def _fill_chunks(x, log_decay, chunks, starts, h, wide, DIM: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """Compute h `[T, D]` in x's dtype, and with WIDE also in float32 for the backward."""
    chunk = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = channel < DIM
    first, stop = tl.load(chunks + 2 * chunk).to(tl.int64), tl.load(chunks + 2 * chunk + 1)
    state = tl.load(starts + chunk.to(tl.int64) * DIM + channel, mask=mask, other=0.0)
    for index in range(stop - first):
        address = (first + index) * DIM + channel
        decay = tl.exp(tl.load(log_decay + address, mask=mask, other=0.0).to(tl.float32))
        state = decay * state + tl.load(x + address, mask=mask, other=0.0).to(tl.float32)
        tl.store(h + address, state.to(h.dtype.element_ty), mask=mask)
        if WIDE:
            tl.store(wide + address, state, mask=mask)


@triton.jit
def _fill_backward(
    d_h, log_decay, h, chunks, starts, d_starts, d_x, d_log_decay, DIM: tl.constexpr, BLOCK: tl.constexpr
):
    """Compute the gradients `[T, D]` of x and log_decay. `h` is float32; `starts` are the forward's chunk starts."""
    chunk = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = channel < DIM
    first, stop = tl.load(chunks + 2 * chunk).to(tl.int64), tl.load(chunks + 2 * chunk + 1)
    row = chunk.to(tl.int64) * DIM + channel
    carry = tl.load(d_starts + row, mask=mask, other=0.0)
    start = tl.load(starts + row, mask=mask, other=0.0)
    for index in range(stop - first):
        token = stop - 1 - index
        address = token * DIM + channel
        decay = tl.exp(tl.load(log_decay + address, mask=mask, other=0.0).to(tl.float32))
        before = tl.load(h + tl.maximum(token - 1, first) * DIM + channel, mask=mask, other=0.0)
        before = tl.where(token > first, before, start)
        gradient = tl.load(d_h + address, mask=mask, other=0.0).to(tl.float32) + carry
        carry = decay * gradient
        tl.store(d_x + address, gradient.to(d_x.dtype.element_ty), mask=mask)
        tl.store(d_log_decay + address, (carry * before).to(d_log_decay.dtype.element_ty), mask=mask)


def _states(
    launch: Launcher, table: ChunkTable, x_TD: Tensor, log_decay_TD: Tensor, initial: Tensor | None, *, reverse: bool
) -> tuple[Tensor, Tensor]:
    """Return the values at the chunks' starts `[N, D]`, and the final ones `[sequences, D]`, in float32."""
    dim = x_TD.shape[1]
    constants = {"DIM": dim, "BLOCK": _BLOCK, "REVERSE": reverse}
    ends, products, starts = (x_TD.new_empty(table.num_chunks, dim, dtype=torch.float32) for _ in range(3))
    final = x_TD.new_empty(table.num_sequences, dim, dtype=torch.float32)
    blocks = triton.cdiv(dim, _BLOCK)
    launch(
        _chunk_ends,
        (table.num_chunks, blocks),
        flops=4.0 * x_TD.numel(),
        x=x_TD,
        log_decay=log_decay_TD,
        chunks=table.chunks,
        ends=ends,
        products=products,
        **constants,
    )
    launch(
        _scan_chunks,
        (table.num_sequences, blocks),
        flops=2.0 * ends.numel(),
        ends=ends,
        products=products,
        initial=initial,
        first_chunk=table.first,
        starts=starts,
        final=final,
        INITIAL=initial is not None,
        **constants,
    )
    return starts, final


def _forward(
    launch: Launcher, table: ChunkTable, x_TD: Tensor, log_decay_TD: Tensor, initial: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return h, h in float32, the values at the chunks' starts, and the final states."""
    starts, final = _states(launch, table, x_TD, log_decay_TD, initial, reverse=False)
    h = torch.empty_like(x_TD)
    wide = None if h.dtype == torch.float32 else torch.empty_like(h, dtype=torch.float32)
    launch(
        _fill_chunks,
        (table.num_chunks, triton.cdiv(x_TD.shape[1], _BLOCK)),
        flops=3.0 * x_TD.numel(),
        x=x_TD,
        log_decay=log_decay_TD,
        chunks=table.chunks,
        starts=starts,
        h=h,
        wide=wide,
        DIM=x_TD.shape[1],
        BLOCK=_BLOCK,
        WIDE=wide is not None,
    )
    return h, h if wide is None else wide, starts, final


def _backward(
    launch: Launcher,
    table: ChunkTable,
    d_h_TD: Tensor,
    d_final: Tensor,
    log_decay_TD: Tensor,
    wide_TD: Tensor,
    starts: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, log_decay and the initial states."""
    d_starts, d_initial = _states(launch, table, d_h_TD, log_decay_TD, d_final, reverse=True)
    d_x, d_log_decay = torch.empty_like(d_h_TD), torch.empty_like(log_decay_TD)
    launch(
        _fill_backward,
        (table.num_chunks, triton.cdiv(d_h_TD.shape[1], _BLOCK)),
        flops=5.0 * d_h_TD.numel(),
        d_h=d_h_TD,
        log_decay=log_decay_TD,
        h=wide_TD,
        chunks=table.chunks,
        starts=starts,
        d_starts=d_starts,
        d_x=d_x,
        d_log_decay=d_log_decay,
        DIM=d_h_TD.shape[1],
        BLOCK=_BLOCK,
    )
    return d_x, d_log_decay, d_initial


class _ScanHGRN(torch.autograd.Function):
    """`scan_hgrn`: saves log_decay, h in float32, and the values at the chunks' starts."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, log_decay: Tensor, initial_state: Tensor | None, table: ChunkTable
    ) -> tuple[Tensor, Tensor]:
        x_TD, log_decay_TD = (tensor.flatten(0, 1).contiguous() for tensor in (x, log_decay))
        initial = None if initial_state is None else initial_state.contiguous()
        h, wide, starts, final = _forward(Launcher(), table, x_TD, log_decay_TD, initial)
        save(ctx, activations=(wide,), statistics=(log_decay, initial_state, starts))
        ctx.table = table
        return h.view(x.shape), final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_h: Tensor, d_final: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        wide, log_decay, initial_state, starts = ctx.saved_tensors
        d_h_TD, log_decay_TD = (tensor.flatten(0, 1).contiguous() for tensor in (d_h, log_decay))
        d_x, d_log_decay, d_initial = _backward(
            Launcher(), ctx.table, d_h_TD, d_final.contiguous(), log_decay_TD, wide, starts
        )
        d_state = None if initial_state is None else d_initial.to(initial_state.dtype)
        return d_x.view(d_h.shape), d_log_decay.view(log_decay.shape), d_state, None


def scan_hgrn(
    x: Tensor, log_decay: Tensor, initial_state: Tensor | None, documents: Documents | None
) -> tuple[Tensor, Tensor]:
    """Run HGRN's recurrence, h_t = exp(log_decay_t) h_{t-1} + x_t.

    Args:
        x: `[B, T, D]`, float32, bfloat16 or float16.
        log_decay: `[B, T, D]`, natural logarithm, <= 0; preferably float32.
        initial_state: `[N, D]`; None for zeros.
        documents: the N documents packed into B = 1, or None.

    Returns:
        h `[B, T, D]` in x's dtype and the final states `[N, D]` in float32.

    Raises:
        ValueError: if `documents` do not cover one row.
    """
    table = sequences_in(x.shape[0], x.shape[1], documents).made(chunk_table, _CHUNK, x.device)
    return _ScanHGRN.apply(x, log_decay, initial_state, table)


def specs(target: str, head_dim: int, dtype: str) -> list[KernelSpec]:
    """Return the kernels for 8192 tokens of 16 * `head_dim` channels, the same for every target."""
    tokens, dim = 8192, 16 * head_dim
    operand = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    launch = Launcher()
    table = chunk_table((0, tokens), _CHUNK, torch.device("meta"))
    x, log_decay = (torch.empty(tokens, dim, dtype=kind, device="meta") for kind in (operand, torch.float32))
    initial = torch.empty(1, dim, device="meta")
    h, wide, starts, final = _forward(launch, table, x, log_decay, initial)
    _backward(launch, table, h, final, log_decay, wide, starts)
    return launch.specs
