"""Linear attention and short convolutions over 2 and 4 ranks equal one rank: outputs, states and every gradient."""

from functools import partial

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from kernels.autograd import Notes, Role, noting, role_of
from kernels.convolution import causal_conv1d
from kernels.documents import Documents
from kernels.linear_attention import _sharded
from kernels.linear_attention.driver import _summarize, run
from kernels.linear_attention.gated_delta_rule import _GatedDeltaRule
from kernels.linear_attention.gla import _GLA
from kernels.linear_attention.retention import _Retention
from tests.processes import run_ranks


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_equal_one(world: int) -> None:
    run_ranks(world, "-m", "tests.kernels.sharded_ranks", "results")


def test_what_travels_has_the_size_of_states_whatever_the_length() -> None:
    run_ranks(3, "-m", "tests.kernels.sharded_ranks", "traffic")


def cut(monkeypatch: pytest.MonkeyPatch, bounds: list[int], time: int, rank: int, world: int) -> _sharded.Shard:
    monkeypatch.setattr(_sharded.dist, "get_rank", lambda _: rank)
    monkeypatch.setattr(_sharded.dist, "get_world_size", lambda _: world)
    return _sharded.cut_documents(Documents(tuple(bounds)), 1, time, None)


def test_documents_are_cut_at_the_borders_of_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, third = (cut(monkeypatch, [0, 3, 4, 9, 12], 4, rank, 3) for rank in range(3))
    assert first == _sharded.Shard(Documents((0, 3, 4)), (0, 1), 4, continues=False, leaves=False)
    assert second == _sharded.Shard(Documents((0, 4)), (2,), 4, continues=False, leaves=True)
    assert third == _sharded.Shard(Documents((0, 1, 4)), (2, 3), 4, continues=True, leaves=False)


def test_bounds_that_do_not_cover_every_rank_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="from 0 to T = 12"):
        cut(monkeypatch, [0, 3, 4], 4, 0, 3)


def test_decays_after_strong_ones_are_exact() -> None:
    log_decay = torch.tensor([[-1e4, -0.5, -torch.inf, -0.25, -0.125]])
    expected = torch.tensor([[0.0, 0.0, 0.0, -0.375, -0.125, 0.0]]).exp()
    expected[0, :3] = 0
    assert torch.equal(_sharded.decays_after(log_decay), expected)


RECURRENCES = {
    "gla": (_GLA(), (8, 8, 6), [(2, 8)]),
    "retention": (_Retention(), (8, 8, 6), [(2,)]),
    "gated_delta_rule": (_GatedDeltaRule(), (8, 8, 6), [(2,), (2,)]),
}


@pytest.mark.parametrize("name", RECURRENCES)
def test_a_summary_under_compression_keeps_its_inputs_alone(name: str) -> None:
    """Decays and states of earlier ranks' tokens are made again: torch's operations would have them rounded."""
    recurrence, sizes, rest = RECURRENCES[name]
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 12, 2, size, generator=generator) for size in sizes)
    others = [torch.rand(1, 12, *shape, generator=generator) for shape in rest]
    inputs = [x.requires_grad_() for x in (q, k / k.norm(dim=-1, keepdim=True), v, -others[0], *others[1:])]
    one_rank = partial(run, recurrence, backend="torch")
    weights = [torch.randn_like(y) for y in recurrence.summarize(one_rank, inputs)]

    def gradients(given: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        outputs = _summarize(recurrence, one_rank, given)
        total = sum((y * weight).sum() for y, weight in zip(outputs, weights, strict=True))
        # Keys and values determine a state; queries do not.
        return torch.autograd.grad(total, given, allow_unused=True)

    expected, roles = gradients(inputs), []

    def keep(x: torch.Tensor) -> torch.Tensor:
        roles.append(role_of(x))
        return x

    with noting(Notes()), saved_tensors_hooks(keep, lambda x: x):
        outputs = _summarize(recurrence, one_rank, inputs)
    assert roles == [Role.ACTIVATION] * 3 + [Role.STATISTIC] * len(rest)
    total = sum((y * weight).sum() for y, weight in zip(outputs, weights, strict=True))
    found = torch.autograd.grad(total, inputs, allow_unused=True)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours is None) == (theirs is None) and (ours is None or torch.equal(ours, theirs))


def test_a_convolution_needs_as_many_tokens_on_each_rank_as_it_looks_back() -> None:
    with pytest.raises(ValueError, match="a convolution of width 4 needs"):
        causal_conv1d(torch.zeros(1, 2, 3), torch.zeros(3, 4), group=object())
