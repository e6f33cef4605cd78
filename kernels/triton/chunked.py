"""Gated linear attention and the delta rules in Triton: block sizes, launches and gradients; see `chunk_kernels`."""

# mypy: disable-error-code="import-untyped"

import os
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from kernels.autograd import once_differentiable, save
from kernels.documents import Documents, sequences_in
from kernels.triton import LARGEST_KEY
from kernels.triton.chunk_kernels import (
    NO_DECAY,
    PER_CHANNEL,
    PER_HEAD,
    outputs_kernel,
    prepare_backward_per_channel_kernel,
    prepare_backward_per_head_kernel,
    prepare_kernel,
    reads_backward_kernel,
    scan_backward_kernel,
    scan_kernel,
    scores_backward_kernel,
)
from kernels.triton.launch import KernelSpec, dot_precision, log_known_faults, next_power, target_name
from kernels.triton.sequences import ChunkTable, Launcher, chunk_table

PLAN_VARIABLE = "SPIKETRAIN_TRITON_PLAN"
# Permitted values of SPIKETRAIN_TRITON_PLAN, see `plan_switches`.
_SWITCHES = {
    "chunk": (16, 32, 64),
    "block_key": (16, 32, 64, 128),
    "num_warps": (1, 2, 4, 8),
    "scan_warps": (1, 2, 4, 8),
}


@dataclass(frozen=True)
class Plan:
    """Sizes of one problem, and its block sizes.

    The scan holds the whole key dimension of the state, as tiles of `scan_key`, for `scan_value` values. The other
    kernels are parallel over chunks and use `block_key` and `block_value`.
    """

    heads: int
    key_dim: int
    value_dim: int
    decay: int
    delta: bool
    target: str
    chunk: int
    block_key: int
    block_value: int
    scan_key: int
    scan_value: int
    prepare_key: int
    scan_warps: int
    prepare_warps: int
    prepare_backward_warps: int
    warps: int

    @property
    def levels(self) -> int:
        """Number of levels of the binary tree over a chunk."""
        return self.chunk.bit_length() - 1


def make_plan(
    heads: int, dims: tuple[int, int], log_decay: Tensor | None, delta: bool, operand: torch.dtype, target: str
) -> Plan:
    """Block sizes for `dims` (K, V) with products of dtype `operand` on `target`; ValueError if K is too large.

    They were chosen with `python -m kernels.compile` and Triton 3.9 so that no registers spill.
    """
    key_dim, value_dim = dims
    if key_dim > LARGEST_KEY:
        raise ValueError(f"the Triton kernels take key dimensions up to {LARGEST_KEY}, got {key_dim}")
    decay = NO_DECAY if log_decay is None else PER_HEAD if log_decay.dim() == 3 else PER_CHANNEL
    amd, wide, long = target.startswith("gfx"), operand == torch.float32, key_dim > 128
    # Threads have 255 registers on NVIDIA, and 512 on AMD in programs of four warps. float32 products take three times
    # the operands on NVIDIA.
    blackwell, synchronous = target in ("sm_100", "sm_103"), target not in ("sm_90", "sm_100", "sm_103")
    small = not amd and (decay == PER_CHANNEL or wide or synchronous)
    largest_value = 16 if wide and not amd else 32 if blackwell else 64
    # On Blackwell the backward scan spills at 32, unlike elsewhere. Halving the chunk doubles the saved states.
    chunk = 16 if wide and blackwell and key_dim > 64 else 32 if small or long else 64
    block_value = min(max(16, next_power(value_dim)), largest_value)
    # On Hopper, fla-core 0.6 excludes 4 warps with blocks of 32 keys because of wrong results, and keeps them with 64.
    plan = Plan(
        heads,
        key_dim,
        value_dim,
        decay,
        delta,
        target,
        chunk=chunk,
        block_key=min(max(16, next_power(key_dim)), 32 if wide or target != "sm_90" else 64),
        block_value=block_value,
        scan_key=min(max(16, next_power(key_dim)), 64 if wide and not amd else LARGEST_KEY),
        scan_value=min(block_value, 16 if long or (wide and not amd) else 32),
        prepare_key=16 if small else 32,
        scan_warps=4,
        prepare_warps=4 if amd or small else 8,
        prepare_backward_warps=4 if amd else 8,
        warps=4,
    )
    return _switched(plan)


def plan_switches() -> dict[str, int]:
    """Overrides from SPIKETRAIN_TRITON_PLAN, such as "scan_warps=2,chunk=32": workarounds for compiler faults.

    chunk       tokens of a chunk
    block_key   key block of the kernels that are parallel over chunks, if K is that large
    num_warps   maximum warps of every program except the scans; 2 avoid NVIDIA's warp-group instructions
    scan_warps  the same for the scans over states

    Raises:
        ValueError: unknown switch or value.
    """
    found = {}
    for entry in filter(None, (part.strip() for part in os.environ.get(PLAN_VARIABLE, "").split(","))):
        name, _, value = (part.strip() for part in entry.partition("="))
        if value not in map(str, _SWITCHES.get(name, ())):
            known = "; ".join(f"{switch}={'|'.join(map(str, values))}" for switch, values in _SWITCHES.items())
            raise ValueError(f"{PLAN_VARIABLE}: {entry!r} is not one of {known}; separate entries by commas")
        found[name] = int(value)
    return found


def _switched(plan: Plan) -> Plan:
    changes: dict[str, Any] = {}
    for name, value in plan_switches().items():
        if name == "num_warps":
            for field in ("prepare_warps", "prepare_backward_warps", "warps"):
                changes[field] = min(value, getattr(plan, field))
        elif name == "block_key":
            changes[name] = min(max(16, next_power(plan.key_dim)), value)
        else:
            changes[name] = value
    return replace(plan, **changes)


def _operand(q: Tensor, k: Tensor, v: Tensor) -> torch.dtype:
    """Dtype of the products: both operands have the same dtype, and differing dtypes are promoted to float32."""
    return q.dtype if q.dtype == k.dtype == v.dtype else torch.float32


class _Prepared(NamedTuple):
    """Outputs of `prepare_kernel`, `[T, H, K]` in the operands' dtype; total is `[N, H, K]` float32."""

    q_decayed: Tensor
    k_decayed: Tensor | None
    k_written: Tensor
    total: Tensor


class _Problem:
    """The inputs of one call as rows of tokens, and its kernel launches."""

    def __init__(
        self,
        plan: Plan,
        table: ChunkTable,
        scale: float,
        inputs: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None],
    ) -> None:
        self.plan, self.table, self.scale = plan, table, scale
        q, k, v = inputs[:3]
        self.operand = _operand(q, k, v)
        self.q, self.k, self.v = (x.to(self.operand).flatten(0, 1).contiguous() for x in (q, k, v))
        self.log_decay, self.beta = (None if x is None else x.flatten(0, 1).contiguous() for x in inputs[3:])
        self.tokens, self.groups = self.q.shape[0], table.num_chunks * plan.heads
        self.launch = Launcher()
        self.constants: dict[str, Any] = {
            "CHUNK": plan.chunk,
            "DELTA": plan.delta,
            "PRECISION": dot_precision(plan.target),
        }
        self.sizes = {"KEY": plan.key_dim, "VALUE": plan.value_dim}

    def _rows(self, dim: int, dtype: torch.dtype) -> Tensor:
        return self.q.new_empty(self.tokens, self.plan.heads, dim, dtype=dtype)

    def _states(self, count: int, dtype: torch.dtype) -> Tensor:
        return self.q.new_empty(count, self.plan.heads, self.plan.key_dim, self.plan.value_dim, dtype=dtype)

    def _flops(self, *products: int) -> float:
        """FLOPs of products of `[C, a] [a, b]` in every chunk, each given as a * b."""
        return 2.0 * self.groups * self.plan.chunk * sum(products)

    def _decay_arguments(self) -> dict[str, Any]:
        plan = self.plan
        return {
            "q": self.q,
            "k": self.k,
            "log_decay": self.log_decay,
            "beta": self.beta,
            "chunks": self.table.chunks,
            "scale": self.scale,
            "heads": plan.heads,
            "q_heads": self.q.shape[1],
            "k_heads": self.k.shape[1],
            "decay_heads": 1 if self.log_decay is None else self.log_decay.shape[1],
            "beta_heads": 1 if self.beta is None else self.beta.shape[1],
            "KEY": plan.key_dim,
            "BLOCK_K": plan.prepare_key,
            "levels": plan.levels,
            "DECAY": plan.decay,
        }

    def _scores_flops(self) -> float:
        plan = self.plan
        levels = 2 * plan.levels if plan.decay == PER_CHANNEL else 1
        return self._flops(levels * (1 + plan.delta) * plan.chunk * plan.key_dim)

    def prepare(self, *, scores: bool) -> tuple[_Prepared, Tensor | None, Tensor | None]:
        """Compute the operands of the scan; with `scores` also the scores and the delta rule's inverse."""
        plan, key = self.plan, self.plan.key_dim
        prepared = _Prepared(
            self._rows(key, self.operand),
            self._rows(key, self.operand) if plan.delta else None,
            self._rows(key, self.operand),
            self.q.new_empty(self.table.num_chunks, plan.heads, key, dtype=torch.float32),
        )
        scores_THC = self._rows(plan.chunk, self.operand) if scores else None
        inverse_THC = self._rows(plan.chunk, self.operand) if scores and plan.delta else None
        self.launch(
            prepare_kernel,
            (self.groups,),
            num_warps=plan.prepare_warps,
            flops=self._scores_flops() if scores else 0.0,
            **self._decay_arguments(),
            **prepared._asdict(),
            **self.constants,
            scores=scores_THC,
            inverse=inverse_THC,
            SCORES=scores,
        )
        return prepared, scores_THC, inverse_THC

    def scan(
        self, prepared: _Prepared, inverse: Tensor | None, initial: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The state at each chunk's start, r (v itself without the delta rule) and the final states."""
        plan, table = self.plan, self.table
        states = self._states(table.num_chunks, self.operand)
        residual = self._rows(plan.value_dim, self.operand) if plan.delta else None
        final = self._states(table.num_sequences, torch.float32)
        self.launch(
            scan_kernel,
            (table.num_sequences * plan.heads, triton.cdiv(plan.value_dim, plan.scan_value)),
            num_warps=plan.scan_warps,
            flops=self._flops(plan.key_dim * plan.value_dim * (1 + plan.delta)),
            v=self.v,
            k_decayed=prepared.k_decayed,
            k_written=prepared.k_written,
            total=prepared.total,
            inverse=inverse,
            initial=initial,
            chunks=table.chunks,
            first_chunk=table.first,
            states=states,
            residual=residual,
            final=final,
            heads=plan.heads,
            v_heads=self.v.shape[1],
            PIECES=triton.cdiv(plan.key_dim, plan.scan_key),
            BLOCK_K=plan.scan_key,
            BLOCK_V=plan.scan_value,
            INITIAL=initial is not None,
            **self.sizes,
            **self.constants,
        )
        return states, self.v if residual is None else residual, final

    def outputs(self, prepared: _Prepared, scores: Tensor, residual: Tensor, states: Tensor) -> Tensor:
        """Compute o `[T, H, V]`."""
        plan = self.plan
        o = self._rows(plan.value_dim, self.operand)
        self.launch(
            outputs_kernel,
            (self.groups, triton.cdiv(plan.value_dim, plan.block_value)),
            num_warps=plan.warps,
            flops=self._flops(plan.key_dim * plan.value_dim, plan.chunk * plan.value_dim),
            q_decayed=prepared.q_decayed,
            scores=scores,
            residual=residual,
            states=states,
            chunks=self.table.chunks,
            o=o,
            heads=plan.heads,
            residual_heads=residual.shape[1],
            BLOCK_K=plan.block_key,
            BLOCK_V=plan.block_value,
            CHUNK=plan.chunk,
            PRECISION=self.constants["PRECISION"],
            **self.sizes,
        )
        return o

    def scan_backward(
        self, d_o: Tensor, prepared: _Prepared, scores: Tensor, inverse: Tensor | None, d_final: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of the state after each chunk, of v per output head, and of the initial states."""
        plan, table = self.plan, self.table
        d_states = self._states(table.num_chunks, self.operand)
        d_v = self._rows(plan.value_dim, self.operand)
        d_initial = self._states(table.num_sequences, torch.float32)
        self.launch(
            scan_backward_kernel,
            (table.num_sequences * plan.heads, triton.cdiv(plan.value_dim, plan.scan_value)),
            num_warps=plan.scan_warps,
            flops=self._flops(plan.key_dim * plan.value_dim * (2 + plan.delta), plan.chunk * plan.value_dim),
            d_o=d_o,
            **prepared._asdict(),
            scores=scores,
            inverse=inverse,
            d_final=d_final,
            chunks=table.chunks,
            first_chunk=table.first,
            d_states=d_states,
            d_v=d_v,
            d_initial=d_initial,
            heads=plan.heads,
            PIECES=triton.cdiv(plan.key_dim, plan.scan_key),
            BLOCK_K=plan.scan_key,
            BLOCK_V=plan.scan_value,
            **self.sizes,
            **self.constants,
        )
        return d_states, d_v, d_initial

    def scores_backward(self, d_o: Tensor, d_v: Tensor, residual: Tensor) -> tuple[Tensor, Tensor | None]:
        """Gradients of the scores and of the matrix before inversion, including above the diagonal."""
        plan = self.plan
        d_scores = self._rows(plan.chunk, torch.float32)
        d_strict = torch.empty_like(d_scores) if plan.delta else None
        self.launch(
            scores_backward_kernel,
            (self.groups,),
            num_warps=plan.warps,
            flops=self._flops(plan.chunk * plan.value_dim * (1 + plan.delta)),
            d_o=d_o,
            d_v=d_v,
            residual=residual,
            chunks=self.table.chunks,
            d_scores=d_scores,
            d_strict=d_strict,
            heads=plan.heads,
            residual_heads=residual.shape[1],
            VALUE=plan.value_dim,
            BLOCK_V=plan.block_value,
            **self.constants,
        )
        return d_scores, d_strict

    def reads_backward(
        self, d_o: Tensor, d_v: Tensor, residual: Tensor, states: Tensor, d_states: Tensor, total: Tensor
    ) -> dict[str, Any]:
        """Gradients of the scan operands, in float32, by argument name of the backward kernels of `prepare`."""
        plan = self.plan
        gradients: dict[str, Any] = {
            "d_q_decayed": self._rows(plan.key_dim, torch.float32),
            "d_k_decayed": self._rows(plan.key_dim, torch.float32) if plan.delta else None,
            "d_k_written": self._rows(plan.key_dim, torch.float32),
            "d_total": torch.empty_like(total),
        }
        self.launch(
            reads_backward_kernel,
            (self.groups, triton.cdiv(plan.key_dim, plan.block_key)),
            num_warps=plan.warps,
            flops=self._flops(plan.key_dim * plan.value_dim * (2 + plan.delta)),
            d_o=d_o,
            d_v=d_v,
            residual=residual,
            states=states,
            d_states=d_states,
            total=total,
            chunks=self.table.chunks,
            **gradients,
            heads=plan.heads,
            residual_heads=residual.shape[1],
            BLOCK_K=plan.block_key,
            BLOCK_V=plan.block_value,
            **self.sizes,
            **self.constants,
        )
        return gradients

    def prepare_backward(
        self, reads: dict[str, Any], d_scores: Tensor, d_strict: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Gradients of q, k, log_decay and beta per output head, in float32."""
        plan = self.plan
        d_q, d_k = self._rows(plan.key_dim, torch.float32), self._rows(plan.key_dim, torch.float32)
        # With one decay per channel, blocks of channels are independent except for beta, whose shares are summed here.
        blocks = triton.cdiv(plan.key_dim, plan.prepare_key) if plan.decay == PER_CHANNEL else 1
        d_beta = None if self.beta is None else d_q.new_empty(*d_q.shape[:2], blocks)
        d_log_decay = None
        if self.log_decay is not None:
            d_log_decay = d_q.new_empty(d_q.shape[:2] if plan.decay == PER_HEAD else d_q.shape)
        self.launch(
            prepare_backward_per_channel_kernel if plan.decay == PER_CHANNEL else prepare_backward_per_head_kernel,
            (self.groups, blocks),
            num_warps=plan.prepare_backward_warps,
            flops=3 * self._scores_flops(),
            **self._decay_arguments(),
            **reads,
            d_scores=d_scores,
            d_strict=d_strict,
            d_q=d_q,
            d_k=d_k,
            d_log_decay=d_log_decay,
            d_beta=d_beta,
            **self.constants,
        )
        return d_q, d_k, d_log_decay, None if d_beta is None else d_beta.sum(2)

    def forward(self, initial: Tensor | None) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
        """Compute o `[T, H, V]`, the final states, and the tensors that `backward` needs."""
        prepared, scores, inverse = self.prepare(scores=True)
        states, residual, final = self.scan(prepared, inverse, initial)
        assert scores is not None
        o = self.outputs(prepared, scores, residual, states)
        return o, final, (scores, inverse, states, residual if self.plan.delta else None)

    def backward(
        self, d_o: Tensor, d_final: Tensor, saved: tuple[Tensor | None, ...]
    ) -> tuple[list[Tensor | None], Tensor]:
        """Gradients of q, k, v, log_decay, beta (per output head) and the initial states; `saved` is by `forward`."""
        scores, inverse, states, residual = saved
        assert scores is not None
        assert states is not None
        residual = self.v if residual is None else residual
        # Recomputed, because saving them would keep up to three more tensors of q's size.
        prepared, _, _ = self.prepare(scores=False)
        d_states, d_v, d_initial = self.scan_backward(d_o, prepared, scores, inverse, d_final)
        reads = self.reads_backward(d_o, d_v, residual, states, d_states, prepared.total)
        d_q, d_k, d_log_decay, d_beta = self.prepare_backward(reads, *self.scores_backward(d_o, d_v, residual))
        return [d_q, d_k, d_v, d_log_decay, d_beta], d_initial


def _like(gradient_TH: Tensor | None, x: Tensor | None) -> Tensor | None:
    """Reduce a gradient per output head to that of `x` `[B, T, H', …]` by summing repeated heads."""
    if gradient_TH is None or x is None:
        return None
    own_heads = x.shape[2]
    if gradient_TH.shape[1] != own_heads:
        # Summed in float32, because many heads may share one.
        gradient_TH = gradient_TH.unflatten(1, (own_heads, -1)).sum(2, dtype=torch.float32)
    return gradient_TH.view(x.shape).to(x.dtype)


class _Chunked(torch.autograd.Function):
    """Saves the inputs, the scores, the inverse, r and the state at each chunk's start; recomputes everything else."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor | None,
        beta: Tensor | None,
        initial_state: Tensor | None,
        scale: float,
        plan: Plan,
        table: ChunkTable,
    ) -> tuple[Tensor, Tensor]:
        problem = _Problem(plan, table, scale, (q, k, v, log_decay, beta))
        initial = None if initial_state is None else initial_state.contiguous()
        o, final, saved = problem.forward(initial)
        save(ctx, activations=(q, k, v, beta), statistics=(log_decay, initial_state, *saved))
        ctx.scale, ctx.plan, ctx.table = scale, plan, table
        return o.view(*v.shape[:2], plan.heads, plan.value_dim).to(v.dtype), final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_o: Tensor, d_final: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, beta, log_decay, initial_state, *saved = ctx.saved_tensors
        inputs = q, k, v, log_decay, beta
        problem = _Problem(ctx.plan, ctx.table, ctx.scale, inputs)
        d_o = d_o.to(problem.operand).flatten(0, 1).contiguous()
        gradients, d_initial = problem.backward(d_o, d_final.contiguous(), tuple(saved))
        found = [_like(gradient, x) for gradient, x in zip(gradients, inputs, strict=True)]
        return *found, None if initial_state is None else d_initial.to(initial_state.dtype), None, None, None


def chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    initial_state: Tensor | None,
    scale: float,
    documents: Documents | None,
) -> tuple[Tensor, Tensor]:
    """The recurrence of the module's docstring: the delta rule if `beta` is given, else gated linear attention.

    Args:
        q, k: `[B, T, H', K]`, K <= 256; float32, bfloat16 or float16.
        v: `[B, T, H', V]`.
        log_decay: None, `[B, T, H']` or `[B, T, H', K]`, natural logarithm, <= 0.
        beta: `[B, T, H']` or None.
        initial_state: `[N, H, K, V]`; None for zeros.
        scale: factor of the output.
        documents: the N documents packed into B = 1, or None.

    Each H' divides the largest one, H; neighbouring heads share an input head.

    Returns:
        o `[B, T, H, V]` in v's dtype and the final states `[N, H, K, V]` in float32.

    Raises:
        ValueError: if K is larger than 256, or `documents` do not cover one row.
    """
    heads = max(x.shape[2] for x in (q, k, v, log_decay, beta) if x is not None)
    dims, operand = (q.shape[-1], v.shape[-1]), _operand(q, k, v)
    target = target_name(q.device)
    # On a CPU the interpreter runs the kernels, which compiler faults do not affect.
    if q.is_cuda:
        log_known_faults(target)
    plan = make_plan(heads, dims, log_decay, beta is not None, operand, target)
    table = sequences_in(q.shape[0], q.shape[1], documents).made(chunk_table, plan.chunk, q.device)
    return _Chunked.apply(q, k, v, log_decay, beta, initial_state, scale, plan, table)


def chunked_specs(target: str, head_dim: int, dtype: str, decays: tuple[int, ...], delta: bool) -> list[KernelSpec]:
    """Kernels of forward and backward for 8192 tokens of 16 heads, K = V = `head_dim`, for each entry of `decays`.

    `decays` holds the number of axes of log_decay, or 0 for no decay.
    """
    tokens, heads = 8192, 16
    operand = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    # Meta tensors, because specs need shapes and dtypes, but neither values nor a GPU.
    qkv = torch.empty(1, tokens, heads, head_dim, dtype=operand, device="meta")
    specs = []
    for axes in decays:
        log_decay = torch.empty(qkv.shape[:axes], device="meta") if axes else None
        beta = torch.empty(qkv.shape[:3], device="meta") if delta else None
        plan = make_plan(heads, (head_dim, head_dim), log_decay, delta, operand, target)
        table = chunk_table((0, tokens), plan.chunk, torch.device("meta"))
        problem = _Problem(plan, table, head_dim**-0.5, (qkv, qkv, qkv, log_decay, beta))
        initial = torch.empty(1, heads, head_dim, head_dim, device="meta")
        o, final, saved = problem.forward(initial)
        problem.backward(o, final, saved)
        suffix = {0: "no_decay", 3: "per_head", 4: "per_channel"}[axes]
        specs += [replace(spec, name=f"{spec.name}_{suffix}") for spec in problem.launch.specs]
    return specs
