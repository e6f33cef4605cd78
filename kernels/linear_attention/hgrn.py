"""HGRN (Qin et al. 2023, arXiv 2311.04823, eq. 5): an elementwise gated recurrence of vectors.

    h_t = exp(log_decay_t) h_{t-1} + x_t

Chunked form: all chunks of all sequences start from zero and advance together, one token at a time, and so do the
products P of their decays. Then the state is carried from chunk to chunk. Its contribution to a token, P_i times the
state at the chunk's start, is added everywhere at once. All products are of numbers <= 1, so nothing overflows.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.documents import Documents, sequences_in, takes_cu_seqlens
from kernels.linear_attention._chunks import ChunkLayout
from kernels.linear_attention._sharded import decays_after
from kernels.linear_attention.driver import Inputs, Recurrence, Run, Segment, compute_dtype, run


class _Saved(NamedTuple):
    """Outputs h, and the incoming state of each chunk."""

    h_NCD: Tensor
    met_ND: Tensor


class _HGRN(Recurrence):
    """Inputs as one head of vectors: x and log_decay `[B, T, 1, D]`. States `[N, 1, D]` are the outputs themselves."""

    name = "hgrn"
    value = 0
    unread = (0,)
    # Each slot of a chunk is one small step, and small steps are dominated by overhead, hence longer segments.
    segment_factor = 4
    few = 32
    activations = 1

    def advance(self, state_B1D: Tensor, inputs: Inputs) -> Tensor:
        x_B1D, log_decay_B1D = inputs
        # A copy, because the next token overwrites the state.
        return state_B1D.mul_(log_decay_B1D.exp()).add_(x_B1D).clone()

    def segment_forward(self, segment: Segment, state: Tensor, inputs: Inputs) -> tuple[Tensor, _Saved]:
        x_NCD, log_decay_NCD = (segment.pack(x, segment.full) for x in inputs)
        saved = _Saved(*_scan(segment.layout, x_NCD, log_decay_NCD.exp_(), state[:, 0]))
        return saved.h_NCD, saved

    def segment_backward(
        self, segment: Segment, d_state: Tensor, saved: _Saved, d_o: Tensor, inputs: Inputs
    ) -> tuple[Tensor, ...]:
        decay_NCD = segment.pack(inputs[1], segment.full).exp_()
        d_h_NCD = segment.pack(d_o, segment.full)
        d_x_NCD, _ = _scan(segment.layout, d_h_NCD, decay_NCD, d_state[:, 0], reverse=True)
        # h_{i-1} of each token; for a chunk's first token the incoming state.
        before_NCD = torch.cat((saved.met_ND[:, None], saved.h_NCD[:, :-1]), dim=1)
        return d_x_NCD, before_NCD.mul_(decay_NCD).mul_(d_x_NCD)

    def check(self, inputs: Inputs, initial_state: Tensor | None, documents: Documents | None) -> tuple[int, Documents]:
        batch, time, _, dim = inputs[0].shape
        sequences = sequences_in(batch, time, documents)
        if initial_state is not None and initial_state.shape != (len(sequences), 1, dim):
            given = (*initial_state.shape[:1], *initial_state.shape[2:])
            raise ValueError(f"initial_state must be [N, D] = {(len(sequences), dim)}, got {given}")
        return 1, sequences

    def state_shape(self, heads: int, inputs: Inputs) -> tuple[int, ...]:
        return 1, inputs[0].shape[-1]

    def fits_triton(self, inputs: Inputs) -> bool:
        return True

    def reference(
        self, inputs: Inputs, initial_state: Tensor | None, documents: Documents | None
    ) -> tuple[Tensor, Tensor]:
        x, log_decay = inputs
        _, sequences = self.check(inputs, initial_state, documents)
        dtype = compute_dtype(x, log_decay, initial_state)
        x_THD, decay_THD = (tensor.to(dtype).flatten(0, 1) for tensor in (x, log_decay.exp()))
        outputs, finals = [], []
        for n, (start, end) in enumerate(pairwise(sequences.bounds)):
            state = torch.zeros_like(x_THD[0]) if initial_state is None else initial_state[n].to(dtype)
            for t in range(start, end):
                state = decay_THD[t] * state + x_THD[t]
                outputs.append(state)
            finals.append(state)
        return torch.stack(outputs).view(x.shape).to(x.dtype), torch.stack(finals)

    def summarize(self, one_rank: Run, inputs: Inputs) -> tuple[Tensor, Tensor]:
        x, log_decay = inputs
        dtype = compute_dtype(x, log_decay)
        decays = decays_after(log_decay.to(dtype))
        return decays[:, 0], (x.to(dtype) * decays[:, 1:]).sum(1)

    def triton(
        self, inputs: Inputs, initial_state: Tensor | None, documents: Documents | None
    ) -> tuple[Tensor, Tensor]:
        from kernels.triton.hgrn import scan_hgrn

        # The kernel has no head axis.
        state = None if initial_state is None else initial_state.flatten(1)
        x, log_decay = inputs
        h, final = scan_hgrn(x.flatten(2), log_decay.flatten(2), state, documents)
        return h[:, :, None], final[:, None]


def _scan(
    layout: ChunkLayout, x_NCD: Tensor, decay_NCD: Tensor, state: Tensor, reverse: bool = False
) -> tuple[Tensor, Tensor]:
    """h_i = decay_i h_{i-1} + x_i, starting from `state` `[N_sequences, D]`, which becomes the final state in place.

    In reverse, h_i = x_i + decay_{i+1} h_{i+1}, and the state is decay_i h_i of a chunk's first token, which is passed
    to the preceding token. Returns h `[N, C, D]` and the incoming state of each chunk `[N, D]`.
    """
    slots = range(x_NCD.shape[1])[:: -1 if reverse else 1]
    h_NCD, products = torch.empty_like(x_NCD), torch.empty_like(x_NCD)
    h_NCD[:, slots[0]] = x_NCD[:, slots[0]]
    products[:, slots[0]] = 1 if reverse else decay_NCD[:, slots[0]]
    for before, slot in pairwise(slots):
        decay = decay_NCD[:, before if reverse else slot]
        torch.addcmul(x_NCD[:, slot], decay, h_NCD[:, before], out=h_NCD[:, slot])
        torch.mul(products[:, before], decay, out=products[:, slot])
    met = torch.empty_like(x_NCD[:, 0])
    for first, count in reversed(layout.spans) if reverse else layout.spans:
        chunks, active = slice(first, first + count), state[:count]
        met[chunks] = active
        last = torch.addcmul(h_NCD[chunks, slots[-1]], products[chunks, slots[-1]], active)
        torch.mul(last, decay_NCD[chunks, 0], out=active) if reverse else active.copy_(last)
    return h_NCD.addcmul_(products, met[:, None]), met


def _one_head(x: Tensor, log_decay: Tensor, initial_state: Tensor | None) -> tuple[Inputs, Tensor | None]:
    """View inputs `[B, T, D]` and states `[N, D]` as one head; ValueError if the inputs are invalid."""
    if x.dim() != 3 or not x.is_floating_point() or x.numel() == 0:
        raise ValueError(
            f"x must be a floating-point tensor [B, T, D] that is not empty, got {tuple(x.shape)} {x.dtype}"
        )
    if log_decay.shape != x.shape or not log_decay.is_floating_point():
        raise ValueError(
            f"log_decay must be a floating-point tensor of x's shape {tuple(x.shape)}, got {tuple(log_decay.shape)} "
            f"{log_decay.dtype}"
        )
    return (x[:, :, None], log_decay[:, :, None]), None if initial_state is None else initial_state.unsqueeze(1)


def hgrn_reference(
    x: Tensor, log_decay: Tensor, *, initial_state: Tensor | None = None, documents: Documents | None = None
) -> tuple[Tensor, Tensor]:
    """The recurrence token by token; arguments as in `hgrn`; always returns the final state."""
    inputs, initial_state = _one_head(x, log_decay, initial_state)
    h, state = _HGRN().reference(inputs, initial_state, documents)
    return h.flatten(2), state.flatten(1)


@takes_cu_seqlens
def hgrn(
    x: Tensor,
    log_decay: Tensor,
    *,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    documents: Documents | None = None,
    group: dist.ProcessGroup | None = None,
    backend: str = "auto",
    reuse_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """HGRN's recurrence (arXiv 2311.04823): h_t = exp(log_decay_t) h_{t-1} + x_t.

    Args:
        x: `[B, T, D]`, float32, bfloat16 or float64.
        log_decay: `[B, T, D]`, natural logarithm, <= 0. Use float32 even if x is bfloat16.
        initial_state: `[B, D]`, float32 (float64 with float64 inputs); zeros by default.
        output_final_state: whether to return the final state, else None.
        documents: the N documents packed into B = 1; states are then `[N, D]`.
        group: ranks that hold consecutive, equal shards of the sequence. `documents` and states then describe the whole
            sequence and are the same on every rank; the gradient of initial_state is this rank's share.
        backend: auto, reference (token by token), torch (chunked), triton (chunked, on a GPU) or recurrent (token by
            token without gradients, for generation).
        reuse_state: whether `recurrent` may write the final state to initial_state's memory.

    Returns:
        h `[B, T, D]` in x's dtype, and the final state `[B, D]` in float32 (float64 if any input is) or None.

    Raises:
        ValueError: if shapes, `documents` or `backend` are invalid.
    """
    inputs, initial_state = _one_head(x, log_decay, initial_state)
    h, state = run(
        _HGRN(),
        *inputs,
        initial_state=initial_state,
        output_final_state=output_final_state,
        documents=documents,
        group=group,
        backend=backend,
        reuse_state=reuse_state,
    )
    return h.flatten(2), None if state is None else state.flatten(1)
