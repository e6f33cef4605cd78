"""The driver of the chunked recurrences with one of the fewest lines: linear attention without decay."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from kernels.documents import Documents
from kernels.linear_attention.driver import Inputs, Recurrence, Run, Segment, run
from tests.helpers import documents_of


class Saved(NamedTuple):
    nothing: None
    states_GKV: Tensor


class Sum(Recurrence):
    """S_t = S_{t-1} + k_t v_t^T, o_t = scale * S_t^T q_t."""

    name = "sum"

    def per_head(self, inputs: Inputs) -> dict[str, tuple[Tensor, int | None]]:
        return {}

    def step(self, state_BHKV: Tensor, inputs: Inputs) -> Tensor:
        k_BHK, v_BHV = inputs
        return state_BHKV + k_BHK[..., None] * v_BHV[..., None, :]

    def advance(self, state_BHKV: Tensor, inputs: Inputs) -> Tensor:
        q_BHK, k_BHK, v_BHV = inputs
        state_BHKV += k_BHK[..., None] * v_BHV[..., None, :]
        return self.scale * (q_BHK[..., None, :] @ state_BHKV)[..., 0, :]

    def packed(self, segment: Segment, inputs: Inputs) -> tuple[Tensor, ...]:
        q, k, v = (segment.pack(x, segment.operands) for x in inputs)
        return q.mul_(self.scale), k, v, torch.ones_like(q[:, 0], dtype=segment.full)

    def segment_forward(self, segment: Segment, state: Tensor, inputs: Inputs) -> tuple[Tensor, Saved]:
        q, k, v, no_decay = self.packed(segment, inputs)
        states = segment.scan_states(state, no_decay, segment.product(k.mT, v))
        return segment.add_product(segment.product(segment.product(q, k.mT).tril_(), v), q, states), Saved(None, states)

    def segment_backward(
        self, segment: Segment, d_state: Tensor, saved: Saved, d_o: Tensor, inputs: Inputs
    ) -> tuple[Tensor, ...]:
        q, k, v, no_decay = self.packed(segment, inputs)
        d_o = segment.pack(d_o, segment.operands)
        d_after = segment.scan_states(d_state, no_decay, segment.product(q.mT, d_o), reverse=True)
        scores, d_scores = segment.product(q, k.mT).tril_(), segment.product(d_o, v.mT).tril_()
        d_q = segment.add_product(segment.product(d_scores, k), d_o, saved.states_GKV.mT).mul_(self.scale)
        d_k = segment.add_product(segment.product(d_scores.mT, q), v, d_after.mT)
        return d_q, d_k, segment.add_product(segment.product(scores.mT, d_o), k, d_after)

    def summarize(self, one_rank: Run, inputs: Inputs) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def triton(
        self, inputs: Inputs, initial_state: Tensor | None, documents: Documents | None
    ) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


@pytest.mark.parametrize("lengths", [None, [70, 3, 130]])
def test_a_recurrence_is_its_step_and_its_segments(lengths: list[int] | None) -> None:
    batch, time, sequences = (2, 150, 2) if lengths is None else (1, sum(lengths), len(lengths))
    documents = None if lengths is None else documents_of(lengths)
    generator = torch.Generator().manual_seed(0)
    shapes = (batch, time, 4, 8), (batch, time, 2, 8), (batch, time, 2, 5), (sequences, 4, 8, 5)
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    *inputs, state = tensors

    def results(backend: str) -> list[Tensor]:
        o, final = run(
            Sum(0.3), *inputs, initial_state=state, output_final_state=True, documents=documents, backend=backend
        )
        assert final is not None
        weights = (torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype) for x in (o, final))
        loss = sum((x * weight).sum() for x, weight in zip((o, final), weights))
        return [o, final, *torch.autograd.grad(loss, tensors)]

    for chunked, reference in zip(results("torch"), results("reference"), strict=True):
        torch.testing.assert_close(chunked, reference, rtol=1e-10, atol=1e-10)
    if documents is None:
        with torch.no_grad():
            advanced = run(Sum(0.3), *inputs, initial_state=state, output_final_state=True, backend="recurrent")
        for mine, reference in zip(advanced, results("reference")[:2], strict=True):
            torch.testing.assert_close(mine, reference, rtol=1e-10, atol=1e-10)


def test_the_name_is_what_the_environment_chooses_by(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPIKETRAIN_BACKEND", "sum=nonsense")
    q = torch.zeros(1, 4, 1, 2)
    with pytest.raises(ValueError, match="sum: environment variable SPIKETRAIN_BACKEND asks for 'nonsense'"):
        run(Sum(), q, q, q)
