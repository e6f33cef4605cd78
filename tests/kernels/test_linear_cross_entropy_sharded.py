"""A vocabulary cut over 2 and 4 ranks equals one rank's: losses, log-probabilities and embedding, and gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import embedding
from kernels.embedding import sharded_embedding
from kernels.losses import _blocks
from kernels.triton import usable
from tests.kernels.triton._compare import DEVICE, error, random
from tests.processes import run_ranks

SETTINGS = settings(max_examples=12, deadline=None, derandomize=True)


@pytest.mark.parametrize(
    ("world", "backend"), [(2, "gloo"), (4, "gloo"), pytest.param(1, "nccl", marks=pytest.mark.gpu)]
)
def test_ranks_equal_one(world: int, backend: str) -> None:
    run_ranks(world, "-m", "tests.kernels.vocabulary_ranks", backend)


def softmax_of_parts(parts: list[Tensor], target: Tensor, scale: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """The losses and the gradients over the logits of a vocabulary in parts of one size."""
    statistics, part_to_gradient = _blocks.choose_halves(backend)
    told = torch.full((len(parts), 2, len(target)), torch.nan, device=DEVICE)
    for rank, logits in enumerate(parts):
        statistics(logits, target - rank * logits.shape[1], scale, told[rank])
    log_total = told[:, 0].logsumexp(0)
    for rank, logits in enumerate(parts):
        part_to_gradient(logits, target - rank * logits.shape[1], scale, log_total)
    return log_total - told[:, 1].amax(0), torch.cat(parts, dim=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["torch", "triton"])
@SETTINGS
@given(
    world=st.integers(1, 5),
    tokens=st.integers(1, 6),
    rows=st.sampled_from([1, 2, 31, 32, 33, 70]),
    size=st.sampled_from([1.0, 1e3, 1e5]),
    seed=st.integers(0, 99),
)
def test_halves_of_a_softmax(
    backend: str, dtype: torch.dtype, world: int, tokens: int, rows: int, size: float, seed: int
) -> None:
    if backend == "triton" and not usable(torch.empty(0, device=DEVICE)):
        pytest.skip("Triton neither runs nor interprets here")
    generator = torch.Generator().manual_seed(seed)
    logits = (random(tokens, rows * world, seed=seed).detach() * size).to(dtype)
    target = torch.randint(rows * world, (tokens,), generator=generator).to(DEVICE)
    scale = torch.rand(tokens, generator=generator).add(0.1).to(DEVICE)
    exact = logits.double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(exact, target, reduction="none")
    (expected * scale).sum().backward()
    with pytest.MonkeyPatch.context() as patch:
        if backend == "triton":
            patch.setattr("kernels.triton.losses._BLOCK_V", 32)
        patch.setattr(_blocks, "_SOFTMAX_ELEMENTS", 100)
        parts = [part.clone(memory_format=torch.contiguous_format) for part in logits.chunk(world, dim=1)]
        nll, gradient = softmax_of_parts(parts, target, scale, backend)
    # Both terms of a loss are rounded at the size of the logits.
    largest = logits.double().abs().max().item()
    assert (nll.double() - expected).abs().max() <= 1e-6 * (largest + 1)
    # An error of the logsumexp multiplies probabilities; of a gradient that all but vanishes, a share of 1 is left.
    tolerance = 2e-7 * largest + (1e-5 if dtype == torch.float32 else 1e-2)
    assert (gradient.double() - exact.grad).norm() <= tolerance * (exact.grad.norm() + scale.norm() * 1e-2)


@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")  # the interpreter's log of 0, which is −inf
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_part_of_logits_of_minus_infinity_and_a_token_that_counts_nothing(backend: str) -> None:
    if backend == "triton" and not usable(torch.empty(0, device=DEVICE)):
        pytest.skip("Triton neither runs nor interprets here")
    whole = random(2, 40, seed=0).detach()
    whole[:, :20] = -torch.inf
    scale, target = torch.tensor([2.0, 0.0], device=DEVICE), torch.tensor([25, 3], device=DEVICE)
    nll, gradient = softmax_of_parts(list(whole.clone().split(20, dim=1)), target, scale, backend)
    assert error(nll[:1], -whole[:1].double().log_softmax(1)[:, 25]) < 1e-6
    expected = 2 * whole[0].double().softmax(0)
    expected[25] -= 2
    assert error(gradient[0], expected) < 1e-6
    assert not gradient[1].any()


def test_triton_does_not_read_tokens_that_count_nothing() -> None:
    if not usable(torch.empty(0, device=DEVICE)):
        pytest.skip("Triton neither runs nor interprets here")
    parts = [torch.full((2, 10), torch.nan, device=DEVICE) for _ in range(2)]
    target = torch.tensor([4, 15], device=DEVICE)
    nll, gradient = softmax_of_parts(parts, target, torch.zeros(2, device=DEVICE), "triton")
    assert nll.isfinite().all() and torch.equal(gradient, torch.zeros_like(gradient))


def test_a_label_that_no_rank_holds_is_not_passed_over() -> None:
    parts = [random(1, 10, seed=rank).detach() for rank in range(2)]
    nll, _ = softmax_of_parts(parts, torch.tensor([20], device=DEVICE), torch.ones(1, device=DEVICE), "torch")
    assert nll.item() == torch.inf


@pytest.mark.parametrize("token", [-1, 10])
def test_a_token_that_no_rank_holds_is_refused(token: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding.dist, "get_rank", lambda _: 1)
    monkeypatch.setattr(embedding.dist, "get_world_size", lambda _: 2)
    assert sharded_embedding(torch.tensor([4, 5, 9]), torch.ones(5, 1), None).tolist() == [[0], [1], [1]]
    with pytest.raises(ValueError, match=f"token {token} at place 1 of 2 is outside 0 to 9"):
        sharded_embedding(torch.tensor([0, token]), torch.ones(5, 1), None)
    with pytest.raises(ValueError, match="weight must be"):
        sharded_embedding(torch.tensor([0]), torch.ones(5), None)
