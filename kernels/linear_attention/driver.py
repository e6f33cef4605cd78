"""Common driver of the linear attentions: checks, dispatch, chunking and gradients.

A `Recurrence` defines the method of its paper: one step from token to token, and the forward and backward of a segment
of chunks. `run` does everything else. A new method is one file with such a class and a public function that calls
`run`.

Inputs are `[B, T, H', D]`, or `[B, T, H']` for one number per head. Each H' divides the largest one, H, and
neighbouring heads share an input head. In chunks they are `[G, C, D]` with G = N * H: N chunks of C tokens, for every
head.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, pairwise
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.autograd import compresses, once_differentiable, save
from kernels.backend import is_generating, resolve
from kernels.documents import Documents, sequences_in
from kernels.linear_attention._chunks import ChunkLayout, chunk_layout
from kernels.linear_attention._sharded import run_sharded
from kernels.matmul import fastest_products, multiplies_bfloat16, with_fastest_products
from kernels.triton import LARGEST_KEY
from kernels.triton import implementations as with_triton

# Tensors, or None for an optional input. Typed loosely, because each recurrence has its own inputs.
Inputs = Sequence[Any]
Run = Callable[..., tuple[Tensor, Tensor | None]]


@dataclass(frozen=True, eq=False)
class Segment:
    """Consecutive chunks of all sequences: packs inputs, multiplies, and scans states for a recurrence.

    Attributes:
        layout: positions of the tokens.
        heads: H.
        full: dtype of states and sums, float32 or float64.
        operands: dtype of pure matrix operands; bfloat16 where that is faster, else `full`.
    """

    layout: ChunkLayout
    heads: int
    full: torch.dtype
    operands: torch.dtype

    def pack(self, x: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """Pack an input to a new `[G, C, D]` (D = 1 for one number per head), or into `out`; padding is zero."""
        return self.layout.pack(_with_axis(x), self.heads, dtype, out)

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """Batched a @ b with operands rounded to `operands` and the result in `full`."""
        return torch.bmm(a.to(self.operands), b.to(self.operands)).to(self.full)

    def add_product(self, total: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Add a @ b to `total` in place, a and b rounded to `operands`; the sum keeps the precision of `total`."""
        a, b = a.to(self.operands), b.to(self.operands)
        return total.baddbmm_(a, b) if total.dtype == self.operands else total.add_(torch.bmm(a, b))

    def scan_states(self, state: Tensor, decay_GK: Tensor, increments: Tensor, reverse: bool = False) -> Tensor:
        """Run state = decay * state + increment over the chunk positions, in place.

        state `[sequences, H, K, V]`, decay `[G, K]` or `[G, 1]`, increments `[G, K, V]`. Returns the incoming state of
        each chunk, `[G, K, V]`.
        """
        decay = decay_GK.view(-1, self.heads, decay_GK.shape[1], 1)
        by_chunk = increments.view(-1, *state.shape[1:])
        met = torch.empty_like(by_chunk)
        # Sequences are sorted by length, so the first `count` are those that still have a chunk at this position.
        for first, count in reversed(self.layout.spans) if reverse else self.layout.spans:
            chunks, active = slice(first, first + count), state[:count]
            # Stored before the update, because a chunk reads the state at its start.
            met[chunks] = active
            torch.addcmul(by_chunk[chunks], active, decay[chunks], out=active)
        return met.view(increments.shape)


@dataclass(frozen=True)
class Recurrence(ABC):
    """A recurrence and its constants. The default methods assume q, k, v and a K x V state read as scale * S_t^T q_t.

    Attributes:
        scale: factor of the output.
        name: name of the public function, used to choose and log the implementation.
        value: index of the input that determines the output's dtype.
        unread: indices of inputs that the backward does not need and that are therefore not saved.
        segment_factor: multiplier of the usual number of tokens in a segment.
        few: up to this many tokens the recurrent form is faster than chunks, without gradients. Measured on a Sapphire
            Rapids core, with states of 4 x 64 x 64 and of 8 x 128 x 128.
        activations: number of leading inputs that may be stored in fewer bits for backward. The other inputs (decays
            and write strengths) and the states keep full precision.
    """

    scale: float = 1.0
    name: ClassVar[str]
    value: ClassVar[int] = 2
    unread: ClassVar[tuple[int, ...]] = ()
    segment_factor: ClassVar[int] = 1
    few: ClassVar[int] = 16
    activations: ClassVar[int] = 3

    @abstractmethod
    def segment_forward(
        self, segment: Segment, state: Tensor, inputs: Inputs
    ) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """Compute a segment's outputs, and the tensors to save for its backward.

        Args:
            segment: the chunks.
            state: `[sequences, H, K, V]` in the layout's order; advanced over the segment in place.
            inputs: all inputs, not yet packed into chunks.

        Returns:
            o `[G, C, V]`, and a NamedTuple of saved tensors.
        """

    @abstractmethod
    def segment_backward(
        self, segment: Segment, d_state: Tensor, saved: Any, d_o: Tensor, inputs: Inputs
    ) -> tuple[Tensor | None, ...]:
        """Compute the gradients of a segment's inputs.

        Args:
            segment: the chunks.
            d_state: gradient of the state after the segment; moved back over it in place.
            saved: the NamedTuple from `segment_forward`.
            d_o: gradient of the outputs, not yet packed into chunks.
            inputs: as in `segment_forward`; None for the `unread` ones.

        Returns:
            One `[G, C, D]` per input, None for an input that is None.
        """

    @abstractmethod
    def summarize(self, one_rank: Run, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """The tokens' affine effect (M, C) on a state, see `_sharded`; `one_rank(*inputs)` runs the recurrence."""

    @abstractmethod
    def triton(
        self, inputs: Inputs, initial_state: Tensor | None, documents: Documents | None
    ) -> tuple[Tensor, Tensor]:
        """Outputs and final states by the Triton kernels, imported lazily because not every machine has Triton."""

    @abstractmethod
    def advance(self, state_BHKV: Tensor, inputs: Inputs) -> Tensor:
        """Advance the state over one token in place and return the token's output `[B, H, V]`, for generation.

        The inputs are `[B, H, D]` or `[B, H]`, in the state's dtype. A state is read once for what it gives to the
        output and to a correction, and written once.
        """

    def step(self, state_BHKV: Tensor, inputs: Inputs) -> Tensor:
        """The state after one token, whose inputs after q are `[B, H, D]` or `[B, H]`; defines the reference."""
        raise NotImplementedError

    def per_head(self, inputs: Inputs) -> dict[str, tuple[Tensor, int | None]]:
        """The inputs after q, k and v by name, each with its size after `[B, T, H]` (None: no such axis)."""
        raise NotImplementedError

    def check(self, inputs: Inputs, initial_state: Tensor | None, documents: Documents | None) -> tuple[int, Documents]:
        """Raise ValueError for inconsistent shapes; returns H, and the sequences (rows or documents)."""
        q, k, v = inputs[:3]
        per_head = self.per_head(inputs)
        for name, x in (("q", q), ("k", k), ("v", v)):
            if x.dim() != 4:
                raise ValueError(f"{name} must be [B, T, H, D], got shape {tuple(x.shape)}")
        if k.shape[-1] != q.shape[-1]:
            raise ValueError(f"q and k must have the same key dimension, got {q.shape[-1]} and {k.shape[-1]}")
        for name, (x, dim) in per_head.items():
            if x.dim() != (3 if dim is None else 4) or (dim is not None and x.shape[-1] != dim):
                wanted = "[B, T, H]" if dim is None else f"[B, T, H, {dim}]"
                raise ValueError(f"{name} must be {wanted}, got shape {tuple(x.shape)}")
        tensors = {"q": q, "k": k, "v": v} | {name: x for name, (x, _) in per_head.items()}
        heads = max(x.shape[2] for x in tensors.values())
        for name, x in tensors.items():
            if not x.is_floating_point():
                raise ValueError(f"{name} must be a floating-point tensor, got {x.dtype}")
            if x.shape[:2] != q.shape[:2]:
                raise ValueError(
                    f"{name} must begin with q's [B, T] = {tuple(q.shape[:2])}, got shape {tuple(x.shape)}"
                )
            if not x.shape[2] or heads % x.shape[2]:
                raise ValueError(f"{name} has {x.shape[2]} heads, which does not divide the largest number, {heads}")
        if q.numel() == 0 or v.numel() == 0:
            raise ValueError(f"empty input: q has shape {tuple(q.shape)}, v {tuple(v.shape)}")
        sequences = sequences_in(q.shape[0], q.shape[1], documents)
        state_shape = (len(sequences), *self.state_shape(heads, inputs))
        if initial_state is not None and initial_state.shape != state_shape:
            raise ValueError(
                f"initial_state must be [N, H, K, V] = {state_shape}, got shape {tuple(initial_state.shape)}"
            )
        return heads, sequences

    def state_shape(self, heads: int, inputs: Inputs) -> tuple[int, ...]:
        """Shape of one sequence's state."""
        return heads, inputs[0].shape[-1], inputs[2].shape[-1]

    def fits_triton(self, inputs: Inputs) -> bool:
        """Whether the Triton kernels support these sizes."""
        return inputs[0].shape[-1] <= LARGEST_KEY

    def reference(
        self, inputs: Inputs, initial_state: Tensor | None, documents: Documents | None
    ) -> tuple[Tensor, Tensor]:
        """Token by token: o `[B, T, H, V]` in v's dtype and the final states `[N, H, K, V]`."""
        heads, sequences = self.check(inputs, initial_state, documents)
        if documents is None:
            return self._token_by_token(heads, inputs, initial_state)
        results = []
        for n, (start, end) in enumerate(pairwise(sequences.bounds)):
            state = None if initial_state is None else initial_state[n : n + 1]
            pieces = [None if x is None else x[:, start:end] for x in inputs]
            results.append(self._token_by_token(heads, pieces, state))
        return torch.cat([o for o, _ in results], dim=1), torch.cat([state for _, state in results])

    def recurrent(
        self, heads: int, inputs: Inputs, initial_state: Tensor | None, reuse_state: bool
    ) -> tuple[Tensor, Tensor]:
        """`reference` without gradients, in fewer operations, and in the memory of the initial state if allowed."""
        dtype, out_dtype = compute_dtype(*inputs, initial_state), inputs[self.value].dtype
        prepared = [None if x is None else _of_heads(x, heads).to(dtype) for x in inputs]
        if initial_state is None:
            first = inputs[0]
            state = first.new_zeros(first.shape[0], *self.state_shape(heads, inputs), dtype=dtype)
        else:
            state = initial_state.to(dtype, copy=not reuse_state)
        outputs = [
            self.advance(state, [None if x is None else x[:, t] for x in prepared]) for t in range(inputs[0].shape[1])
        ]
        o = outputs[0][:, None] if len(outputs) == 1 else torch.stack(outputs, dim=1)
        return o.to(out_dtype), state

    def _token_by_token(self, heads: int, inputs: Inputs, initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
        dtype, out_dtype = compute_dtype(*inputs, initial_state), inputs[self.value].dtype
        # Neighbouring heads share an input head, as in grouped-query attention.
        q, *others = (None if x is None else x.to(dtype).repeat_interleave(heads // x.shape[2], dim=2) for x in inputs)
        assert q is not None
        shape = (q.shape[0], *self.state_shape(heads, inputs))
        state = q.new_zeros(shape) if initial_state is None else initial_state.to(dtype)
        outputs = []
        for t in range(q.shape[1]):
            state = self.step(state, [None if x is None else x[:, t] for x in others])
            outputs.append(self.scale * torch.einsum("bhkv,bhk->bhv", state, q[:, t]))
        return torch.stack(outputs, dim=1).to(out_dtype), state


def run(
    recurrence: Recurrence,
    *inputs: Tensor | None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    documents: Documents | None = None,
    group: dist.ProcessGroup | None = None,
    backend: str = "auto",
    reuse_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Run `recurrence` over all tokens. The public functions call this, and their docstrings explain the arguments.

    Returns:
        o `[B, T, H, V]`, and the final states `[N, H, K, V]` in float32 (float64 if any input is) or None.

    Raises:
        ValueError: if shapes, heads, `documents` or `backend` do not fit.
    """
    if group is not None:
        # Each rank runs this same function on its own tokens, without a group.
        one_rank = partial(run, recurrence, backend=backend)
        summarize = partial(_summarize, recurrence, one_rank)
        return run_sharded(one_rank, summarize, inputs, group, initial_state, output_final_state, documents)
    heads, sequences = recurrence.check(inputs, initial_state, documents)
    first = inputs[0]
    assert first is not None  # the one that no recurrence does without
    # Kernels choose their dtypes themselves, so autocast must not change them.
    with torch.autocast(first.device.type, enabled=False), fastest_products(first):
        available = implementations(first.shape[1])
        available = with_triton(available, *inputs, initial_state, fits=recurrence.fits_triton(inputs))
        if documents is None and not torch.is_grad_enabled():
            # Preferred where it is faster: below a chunk's fixed costs.
            is_faster = is_generating() and first.shape[1] <= recurrence.few
            available = ("recurrent", *available) if is_faster else (*available, "recurrent")
        choice = resolve(recurrence.name, backend, available)
        if choice == "recurrent":
            o, state = recurrence.recurrent(heads, inputs, initial_state, reuse_state)
        elif choice == "reference":
            o, state = recurrence.reference(inputs, initial_state, documents)
        elif choice == "triton":
            o, state = recurrence.triton(inputs, initial_state, documents)
        else:
            layout = sequences.made(chunk_layout, first.device)
            o, state = _Chunked.apply(recurrence, layout, heads, initial_state, *inputs)
    return o, state if output_final_state else None


def _summarize(recurrence: Recurrence, one_rank: Run, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """`recurrence.summarize`; if saved activations are compressed, run again in backward."""
    if not compresses():
        return recurrence.summarize(one_rank, inputs)
    transition, contribution = _Summary.apply(recurrence, one_rank, *inputs)
    return transition, contribution


class _Summary(torch.autograd.Function):
    """(M, C) of a rank's tokens. Saves the inputs only, as `_Chunked` does.

    torch's own operations would save decays and states, which compression must not round.
    """

    @staticmethod
    def forward(ctx: Any, recurrence: Recurrence, one_rank: Run, *inputs: Any) -> tuple[Tensor, Tensor]:
        ctx.recurrence, ctx.one_rank = recurrence, one_rank
        outputs = recurrence.summarize(one_rank, inputs)
        activations = recurrence.activations
        # Last, because the recurrence within names what it saves.
        save(ctx, activations=inputs[:activations], statistics=inputs[activations:])
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_transition: Tensor, d_contribution: Tensor) -> tuple[Tensor | None, ...]:
        # Only floating tensors have gradients; None stands for an optional input.
        inputs = [None if x is None else x.detach().requires_grad_() for x in ctx.saved_tensors]
        with torch.enable_grad():
            outputs = ctx.recurrence.summarize(ctx.one_rank, inputs)
        given = [x for x in inputs if x is not None]
        pairs = [(y, d) for y, d in zip(outputs, (d_transition, d_contribution), strict=True) if y.requires_grad]
        outputs, grads = zip(*pairs, strict=True)
        found = iter(torch.autograd.grad(outputs, given, grads, allow_unused=True))
        return None, None, *(None if x is None else next(found) for x in inputs)


class _Chunked(torch.autograd.Function):
    """A recurrence in chunks, segment by segment. Saves the inputs, and each segment's saved tensors."""

    @staticmethod
    def forward(
        ctx: Any, recurrence: Recurrence, layout: ChunkLayout, heads: int, initial_state: Tensor | None, *inputs: Any
    ) -> tuple[Tensor, Tensor]:
        value, shape = inputs[recurrence.value], recurrence.state_shape(heads, inputs)
        full = compute_dtype(*inputs, initial_state)
        operands = operand_dtype(inputs[:3], full)
        o = value.new_empty(*value.shape[:2], heads, shape[-1])
        state = layout.sort_state(initial_state, (layout.num_sequences, *shape), o.new_empty((), dtype=full))
        elements = heads * layout.chunk * max(shape[1:]) // recurrence.segment_factor
        segments = [Segment(part, heads, full, operands) for part in layout.segments(elements, o.is_cpu)]
        saved = []
        for segment in segments:
            o_c, kept = recurrence.segment_forward(segment, state, inputs)
            segment.layout.unpack(o_c, o)
            saved.append(kept)
        read = [None if place in recurrence.unread else x for place, x in enumerate(inputs)]
        # Only tensors can be saved, so each segment's NamedTuple is flattened here and rebuilt in backward.
        activations = recurrence.activations
        save(
            ctx,
            activations=read[:activations],
            statistics=(*read[activations:], initial_state, *chain.from_iterable(saved)),
        )
        ctx.recurrence, ctx.layout, ctx.segments, ctx.saved_as = recurrence, layout, segments, type(saved[0])
        ctx.like = [None if x is None else (x.shape, x.dtype) for x in inputs]
        return o, layout.unsort_state(state)

    @staticmethod
    @once_differentiable
    @with_fastest_products
    def backward(ctx: Any, d_o: Tensor, d_final: Tensor) -> tuple[Tensor | None, ...]:
        # Read once: in a recomputed region torch refuses a second read.
        tensors = ctx.saved_tensors
        inputs, initial_state, kept = (
            tensors[: len(ctx.like)],
            tensors[len(ctx.like)],
            iter(tensors[len(ctx.like) + 1 :]),
        )
        saved = [ctx.saved_as(*(next(kept) for _ in ctx.saved_as._fields)) for _ in ctx.segments]
        d_state = ctx.layout.sort_state(d_final, d_final.shape, d_final.new_empty((), dtype=ctx.segments[0].full))
        grads = [None if like is None else d_o.new_empty(like[0], dtype=like[1]) for like in ctx.like]
        # Segments in reverse, because the gradient of the state flows from the last to the first.
        for segment, of_segment in reversed(list(zip(ctx.segments, saved, strict=True))):
            packed = ctx.recurrence.segment_backward(segment, d_state, of_segment, d_o, inputs)
            for packed_grad, grad in zip(packed, grads, strict=True):
                if grad is not None:
                    segment.layout.unpack(packed_grad, _with_axis(grad))
        d_initial = None if initial_state is None else ctx.layout.unsort_state(d_state).to(initial_state.dtype)
        return None, None, None, d_initial, *grads


def _of_heads(x: Tensor, heads: int) -> Tensor:
    """Repeat the heads of an input `[B, T, H', ...]`: neighbouring ones share it."""
    return x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], dim=2)


def _with_axis(x: Tensor) -> Tensor:
    """View `[B, T, H]` as `[B, T, H, 1]`."""
    return x if x.dim() == 4 else x[..., None]


def implementations(time: int) -> tuple[str, ...]:
    """Available implementations, preferred first: a single token (decoding) does not fill a chunk, so step directly."""
    return ("reference", "torch") if time == 1 else ("torch", "reference")


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """Dtype of states and sums: float64 if any input is float64, else float32."""
    return torch.float64 if any(x is not None and x.dtype == torch.float64 for x in tensors) else torch.float32


def operand_dtype(factors: Sequence[Tensor], full: torch.dtype) -> torch.dtype:
    """Operand dtype of large products: bfloat16 if all `factors` are bfloat16 and the device is fast at it, else
    `full`.

    With AVX512-BF16 a batch of 64 x 64 products takes a third of its float32 time, conversions included. Without it,
    bfloat16 products on a CPU are slower than float32.
    """
    narrow = all(x.dtype == torch.bfloat16 for x in factors)
    return torch.bfloat16 if narrow and (not factors[0].is_cpu or multiplies_bfloat16()) else full
