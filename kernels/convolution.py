"""The short causal depthwise convolution before linear attention: each channel mixes its last W inputs.

    z_t = sum_w weight[:, w] * x_{t - (W-1) + w}        y_t = SiLU(z_t) or z_t

Inputs before a sequence's start come from its state: the last W - 1 preceding inputs (zeros by default).

On CPU, W shifted multiply-adds over slabs of rows that fit into the cache are several times faster than F.conv1d. All
sequences are shifted as one long sequence; the first W - 1 rows of each ("heads"), where that is wrong, are computed
separately.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from kernels.autograd import derive, once_differentiable, save
from kernels.backend import is_generating, resolve
from kernels.documents import Documents, sequences_in, takes_cu_seqlens, to_device
from kernels.indices import host_numbers
from kernels.linear_attention._sharded import all_gather, begins_here, cut_documents, run_from, state_of_last
from kernels.linear_attention.driver import implementations
from kernels.shapes import block_limit
from kernels.triton import implementations as with_triton

SLAB_ELEMENTS = 1 << 17  # buffers of 512 KiB: measured best of 2^15 .. 2^18 with 1 MiB of L2 cache


def _check_inputs(
    x: Tensor, weight: Tensor, activation: str | None, initial_state: Tensor | None, documents: Documents | None
) -> Documents:
    """Raise ValueError for inconsistent inputs; returns the sequences (rows or documents)."""
    if x.dim() != 3 or x.numel() == 0 or not x.is_floating_point():
        raise ValueError(f"x must be floating-point [B, T, D] and not empty, got {x.dtype} {tuple(x.shape)}")
    if weight.dim() != 2 or weight.shape[0] != x.shape[2] or weight.shape[1] == 0 or not weight.is_floating_point():
        raise ValueError(
            f"weight must be floating-point [D, W] with D = {x.shape[2]}, got {weight.dtype} {tuple(weight.shape)}"
        )
    if activation not in ("silu", None):
        raise ValueError(f"activation must be 'silu' or None, got {activation!r}")
    sequences = sequences_in(x.shape[0], x.shape[1], documents)
    state_shape = (len(sequences), x.shape[2], weight.shape[1] - 1)
    if initial_state is not None and initial_state.shape != state_shape:
        raise ValueError(f"initial_state must be [N, D, W-1] = {state_shape}, got shape {tuple(initial_state.shape)}")
    return sequences


def causal_conv1d_reference(
    x: Tensor,
    weight: Tensor,
    *,
    activation: str | None = "silu",
    initial_state: Tensor | None = None,
    documents: Documents | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition; arguments as in `causal_conv1d`; always returns the final state."""
    _check_inputs(x, weight, activation, initial_state, documents)
    if documents is not None:
        results = []
        for n, document in enumerate(x.split(documents.lengths, dim=1)):
            state = None if initial_state is None else initial_state[n : n + 1]
            results.append(causal_conv1d_reference(document, weight, activation=activation, initial_state=state))
        return torch.cat([y for y, _ in results], dim=1), torch.cat([state for _, state in results])
    batch, time, dim = x.shape
    width = weight.shape[1]
    state = x.new_zeros(batch, dim, width - 1) if initial_state is None else initial_state.to(x.dtype)
    x_BDT = torch.cat((state, x.transpose(1, 2)), dim=2)
    dtype = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    z_BTD = torch.einsum("bdtw,dw->btd", x_BDT.unfold(2, width, 1).to(dtype), weight.to(dtype))
    return (F.silu(z_BTD) if activation else z_BTD).to(x.dtype), x_BDT[..., time:]


@dataclass(frozen=True, eq=False)
class _Heads:
    """The first W - 1 rows of each sequence: row `rows[i]` of `[B * T, D]` is token `token[i]` of sequence
    `sequence[i]`.

    `final[n]` `[W-1]` locates the last W - 1 inputs of sequence n in the concatenation of all states and all of x.
    """

    rows: Tensor
    sorted_rows: tuple[int, ...]
    sequence: Tensor
    token: Tensor
    final: Tensor


def _find_heads(bounds: tuple[int, ...], width: int, device: torch.device) -> _Heads:
    starts, ends = torch.tensor(bounds[:-1]), torch.tensor(bounds[1:])
    taps = torch.arange(width - 1)
    rows = starts[:, None] + taps
    sequence, token = (rows < ends[:, None]).nonzero(as_tuple=True)
    rows = rows[sequence, token]
    # A sequence shorter than W - 1 tokens keeps part of its initial state as its final state.
    last = ends[:, None] - (width - 1) + taps
    states = len(starts) * (width - 1)
    # In the concatenation, inputs follow all states; positions before a sequence's start index into its own state.
    in_state = torch.arange(len(starts))[:, None] * (width - 1) + (last - starts[:, None] + width - 1)
    final = torch.where(last >= starts[:, None], last + states, in_state)
    on_device = (to_device(x, device) for x in (sequence, token, final))
    return _Heads(to_device(rows, device), tuple(host_numbers(rows)), *on_device)


def _head_windows(x: Tensor, state_NWD: Tensor, heads: _Heads) -> Tensor:
    """Each sequence's state and first W - 1 inputs: `[N, 2(W-1), D]`, zero-padded after shorter sequences."""
    sequences, past, dim = state_NWD.shape
    windows = state_NWD.new_zeros(sequences, 2 * past, dim)
    windows[:, :past] = state_NWD
    windows[heads.sequence, past + heads.token] = x[heads.rows].to(windows.dtype)
    return windows


def _slabs(rows: int, dim: int) -> Iterator[tuple[int, int]]:
    size = max(block_limit(SLAB_ELEMENTS) // dim, 32)
    for begin in range(0, rows, size):
        yield begin, min(begin + size, rows)


def _shifted_sum(x: Tensor, taps: Tensor, skip: int) -> Tensor:
    """sum_w taps[w] * x[t - (W-1) + w] for rows t >= skip of `x` `[R, D]`, ignoring rows before 0; taps `[W, D]`."""
    z = x[skip:] * taps[-1]
    for shift in range(1, min(len(taps), len(x))):
        first = max(skip, shift)
        z[first - skip :].addcmul_(x[first - shift : len(x) - shift], taps[-1 - shift])
    return z


def _head_sum(windows: Tensor, taps: Tensor) -> Tensor:
    """The sums z of the first W - 1 tokens of each sequence: `[N, W-1, D]`."""
    past = len(taps) - 1
    z = windows[:, past:] * taps[past]
    for w in range(past):
        z.addcmul_(windows[:, w : w + past], taps[w])
    return z


def _taps(weight: Tensor, x: Tensor) -> Tensor:
    """The weight as contiguous `[W, D]` in the dtype of the sums: float32, or float64 for float64 inputs."""
    dtype = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    return weight.t().to(dtype).contiguous()


def _without_heads(d_z: Tensor, begin: int, heads: _Heads) -> Tensor:
    """`d_z` (rows from `begin`) with the heads' rows zeroed: their inputs are not the rows before them."""
    first = bisect_left(heads.sorted_rows, begin)
    last = bisect_left(heads.sorted_rows, begin + len(d_z))
    return d_z.index_fill(0, heads.rows[first:last] - begin, 0) if last > first else d_z


def _head_backward(
    ctx: Any, x: Tensor, state_NWD: Tensor, taps: Tensor, d_y: Tensor, d_x: Tensor, d_taps: Tensor
) -> Tensor:
    """Backward of the heads: adds to `d_x` and `d_taps`, returns the gradient of the state `[N, W-1, D]`."""
    heads: _Heads = ctx.heads
    past = len(taps) - 1
    windows = _head_windows(x, state_NWD.to(taps.dtype), heads)
    d_z = torch.zeros_like(windows[:, past:])
    d_z[heads.sequence, heads.token] = d_y[heads.rows].to(taps.dtype)
    if ctx.activation:
        d_z = torch.ops.aten.silu_backward(d_z, _head_sum(windows, taps))
    d_windows = torch.zeros_like(windows)
    for w in range(past + 1):
        d_windows[:, w : w + past].addcmul_(d_z, taps[w])
        d_taps[w] += (d_z * windows[:, w : w + past]).sum((0, 1))
    d_x[heads.rows] += d_windows[heads.sequence, past + heads.token].to(d_x.dtype)
    return d_windows[:, :past].to(state_NWD.dtype)


def _convolve(x: Tensor, state_NWD: Tensor, weight: Tensor, activation: str | None, heads: _Heads) -> Tensor:
    """The convolution of rows x `[B * T, D]`, contiguous, in x's dtype."""
    taps = _taps(weight, x)
    past = len(taps) - 1
    y = torch.empty_like(x)
    for begin, end in _slabs(*x.shape):
        # Each slab also reads the W - 1 rows before it.
        before = min(begin, past)
        z = _shifted_sum(x[begin - before : end].to(taps.dtype), taps, before)
        y[begin:end] = F.silu(z, inplace=True) if activation else z
    # Overwrite the first W - 1 rows of each sequence, which the shifted sum computed from the preceding sequence.
    if past:
        z = _head_sum(_head_windows(x, state_NWD.to(taps.dtype), heads), taps)[heads.sequence, heads.token]
        y[heads.rows] = (F.silu(z) if activation else z).to(y.dtype)
    return y


class _CausalConv(torch.autograd.Function):
    """Saves its inputs; the backward recomputes z slab by slab."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, state_NWD: Tensor, activation: str | None, sequences: Documents
    ) -> Tensor:
        heads = sequences.made(_find_heads, weight.shape[1], x.device)
        y = _convolve(x, state_NWD, weight, activation, heads)
        save(ctx, activations=(x, state_NWD), weights=(weight,))
        # Cheaper than to store y in 8 bits: W multiply-adds an element.
        derive(y, partial(_convolve, activation=activation, heads=heads), (x, state_NWD), weight)
        ctx.activation, ctx.heads = activation, heads
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        x, state_NWD, weight = ctx.saved_tensors
        heads: _Heads = ctx.heads
        taps = _taps(weight, x)
        past = len(taps) - 1
        d_x, d_taps = torch.empty_like(x), torch.zeros_like(taps)
        for begin, end in _slabs(*x.shape):
            before, beyond = min(begin, past), min(end + past, len(x))
            x_slab = x[begin - before : beyond].to(taps.dtype)
            # d_z of the slab, and of the following rows that read the slab's inputs.
            d_z = d_y[begin:beyond].to(taps.dtype)
            if ctx.activation:
                d_z = torch.ops.aten.silu_backward(d_z, _shifted_sum(x_slab, taps, before))
            d_z = _without_heads(d_z, begin, heads)
            rows = end - begin
            d_slab = d_z[:rows] * taps[-1]
            for shift in range(min(past + 1, before + rows)):
                if shift:
                    reached = d_z[shift : shift + rows]
                    d_slab[: len(reached)].addcmul_(reached, taps[-1 - shift])
                first = max(shift - before, 0)
                inputs = x_slab[before + first - shift : before + rows - shift]
                d_taps[-1 - shift] += (d_z[first:rows] * inputs).sum(0)
            d_x[begin:end] = d_slab
        d_state = _head_backward(ctx, x, state_NWD, taps, d_y, d_x, d_taps) if past else None
        return d_x, d_taps.t().to(weight.dtype), d_state, None, None


def _one_token(
    x_B1D: Tensor, weight: Tensor, activation: str | None, state_BDW: Tensor, reuse_state: bool
) -> tuple[Tensor, Tensor]:
    """The output of one token, `[B, 1, D]`, and the state after it."""
    inputs_BDW = torch.cat((state_BDW.to(x_B1D.dtype), x_B1D.mT), dim=2)
    z_BD = (inputs_BDW * weight.to(torch.promote_types(weight.dtype, torch.float32))).sum(-1)
    state = inputs_BDW[..., 1:]
    if reuse_state:
        state = state_BDW.copy_(state)
    return (F.silu(z_BD) if activation else z_BD).to(x_B1D.dtype)[:, None], state


def _over_ranks(
    one_rank: Callable[..., tuple[Tensor, Tensor | None]],
    x: Tensor,
    weight: Tensor,
    initial_state: Tensor | None,
    output_final_state: bool,
    documents: Documents | None,
    group: dist.ProcessGroup,
) -> tuple[Tensor, Tensor | None]:
    """`causal_conv1d` over context-parallel ranks: a rank's first tokens see the last tokens of the previous rank."""
    batch, time, dim = x.shape
    past = weight.shape[1] - 1
    if time < past or past == 0:
        raise ValueError(
            f"over ranks a convolution of width {past + 1} needs a width >= 2 and as many tokens, got {time}"
        )
    shard = None if documents is None else cut_documents(documents, batch, time, group)
    # Only the last document piece of a rank can continue on the next one.
    tail = (x if shard is None else x[:, shard.pieces.bounds[-2] :]).transpose(1, 2)
    before = tail.new_zeros(batch, dim, past)
    if initial_state is not None and begins_here(shard, group):
        before = state_of_last(initial_state, shard).to(x.dtype)
    tails = all_gather(torch.cat((before, tail), dim=-1)[..., -past:], group)
    rank = dist.get_rank(group)
    # The first rank's zeros stay in the graph, because it must join the backward exchange.
    entering = tails[rank - 1] if rank else tails[:0].sum(0)
    return run_from(one_rank, [x], entering, shard, group, initial_state, output_final_state)


@takes_cu_seqlens
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    *,
    activation: str | None = "silu",
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    documents: Documents | None = None,
    group: dist.ProcessGroup | None = None,
    backend: str = "auto",
    reuse_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Causal depthwise convolution without bias, then SiLU (the short convolution of arXiv 2412.06464, section 3.4).

    Args:
        x: `[B, T, D]`, float32, bfloat16 or float64; sums are in float32 (float64 for float64).
        weight: `[D, W]`; `weight[:, -1]` multiplies the current input.
        activation: "silu" or None.
        initial_state: `[N, D, W-1]`, the inputs before each sequence, oldest first; zeros by default.
        output_final_state: whether to return the last W - 1 inputs of each sequence, else None.
        documents: the N documents packed into B = 1; without them N = B.
        group: ranks that hold consecutive, equal shards of the sequence, of at least W - 1 tokens. `documents` and
            states then describe the whole sequence and are the same on every rank; the gradients of weight and
            initial_state are this rank's share. Ranks exchange only their last W - 1 inputs.
        backend: auto, reference, torch, triton, or recurrent for a single token without gradients.
        reuse_state: whether `recurrent` may write the final state to initial_state's memory.

    Returns:
        y `[B, T, D]` and the final state `[N, D, W-1]` or None, both in x's dtype.

    Raises:
        ValueError: if shapes, `activation`, `documents` or `backend` are invalid.
    """
    if group is not None:
        one_rank = partial(causal_conv1d, weight=weight, activation=activation, backend=backend)
        return _over_ranks(one_rank, x, weight, initial_state, output_final_state, documents, group)
    sequences = _check_inputs(x, weight, activation, initial_state, documents)
    batch, time, dim = x.shape
    available = with_triton(implementations(time), x, weight, initial_state)
    if time == 1 and initial_state is not None and documents is None and not torch.is_grad_enabled():
        available = ("recurrent", *available) if is_generating() else (*available, "recurrent")
    choice = resolve("causal_conv1d", backend, available)
    if choice == "recurrent":
        assert initial_state is not None
        y, state = _one_token(x, weight, activation, initial_state, reuse_state)
        return y, state if output_final_state else None
    if choice == "reference":
        y, state = causal_conv1d_reference(
            x, weight, activation=activation, initial_state=initial_state, documents=documents
        )
        return y, state if output_final_state else None
    if choice == "triton":
        from kernels.triton import convolution  # lazily: not every machine has Triton

        return convolution.causal_conv1d(x, weight, activation, initial_state, output_final_state, sequences)
    rows = x.reshape(batch * time, dim)
    past = weight.shape[1] - 1
    state_NWD = x.new_zeros(len(sequences), past, dim) if initial_state is None else initial_state.transpose(1, 2)
    y = _CausalConv.apply(rows, weight, state_NWD, activation, sequences).view_as(x)
    if not output_final_state:
        return y, None
    final = sequences.made(_find_heads, past + 1, x.device).final
    return y, torch.cat((state_NWD.reshape(-1, dim).to(x.dtype), rows))[final].transpose(1, 2)
