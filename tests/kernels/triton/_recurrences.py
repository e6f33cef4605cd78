"""Inputs for the recurrences' kernels, and the plain recurrence that they are compared with."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.documents import Documents
from tests.kernels.triton._compare import DEVICE, random

Op = Callable[..., Sequence[Tensor]]
LENGTHS = [5, 1, 40, 17]


def decays(*shape: int, strongest: float, seed: int) -> Tensor:
    """Natural logarithms between 0 and -strongest, a third of them 0."""
    uniform = torch.rand(*shape, generator=torch.Generator().manual_seed(seed))
    return (-strongest * (1.5 * uniform - 0.5).clamp_min(0)).to(DEVICE).requires_grad_()


def sequences(batch: int, time: int, documents: Documents | None) -> list[tuple[int, int, int]]:
    """(row, first token, end) of each."""
    if documents is None:
        return [(row, 0, time) for row in range(batch)]
    return [(0, start, end) for start, end in pairwise(documents.bounds)]


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    initial_state: Tensor | None,
    scale: float,
    documents: Documents | None,
) -> list[Tensor]:
    """Token by token: the delta rule if `beta` is given, else gated linear attention; o and the final states."""
    given = [x for x in (q, k, v, log_decay, beta) if x is not None]
    heads = max(x.shape[2] for x in given)
    q, k, v = (x.repeat_interleave(heads // x.shape[2], 2) for x in (q, k, v))
    log_decay, beta = (None if x is None else x.repeat_interleave(heads // x.shape[2], 2) for x in (log_decay, beta))
    outputs, finals = [], []
    for n, (row, start, end) in enumerate(sequences(q.shape[0], q.shape[1], documents)):
        state = q.new_zeros(heads, q.shape[3], v.shape[3]) if initial_state is None else initial_state[n]
        for t in range(start, end):
            if log_decay is not None:
                state = log_decay[row, t].exp().view(heads, -1, 1) * state
            written = v[row, t]
            if beta is not None:
                written = beta[row, t][:, None] * (written - torch.einsum("hkv,hk->hv", state, k[row, t]))
            state = state + k[row, t][:, :, None] * written[:, None]
            outputs.append(scale * torch.einsum("hkv,hk->hv", state, q[row, t]))
        finals.append(state)
    return [torch.stack(outputs).view(*v.shape), torch.stack(finals)]


def make_inputs(
    batch: int,
    time: int,
    *,
    axes: int,
    delta: bool,
    heads: tuple[int, int, int, int] = (2, 2, 2, 2),
    dims: tuple[int, int] = (16, 16),
    strongest: float = 1.0,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> list[Tensor]:
    """q, k of norm 1, v, log_decay of `axes` axes (none if 0) and, for the delta rule, beta; `heads` in this order."""
    q, k, v = (
        random(batch, time, count, dim, seed=seed + i)
        for i, (count, dim) in enumerate(zip(heads, (*dims[:1], *dims), strict=False))
    )
    inputs = [q, F.normalize(k.detach(), dim=-1), v]
    inputs = [x.detach().to(dtype).requires_grad_() for x in inputs]
    if axes:
        shape = (batch, time, heads[3], dims[0])[:axes]
        inputs.append(decays(*shape, strongest=strongest, seed=seed + 3))
    if delta:
        inputs.append(random(batch, time, heads[3], seed=seed + 4).detach().sigmoid().requires_grad_())
    return inputs
