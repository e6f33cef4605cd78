"""The divergence between two linear heads' distributions against log_softmax on whole logits."""

import math
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.losses import _blocks
from kernels.losses.distillation import Direction, distillation_kl, distillation_kl_reference
from kernels.triton import usable
from tests.kernels.test_linear_cross_entropy import _LargestOutput
from tests.kernels.triton._compare import DEVICE, random

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 2e-2}
DIRECTIONS = get_args(Direction)
TRITON = ["triton"] if usable(torch.empty(0, device=DEVICE)) else []
BLOCK = 16


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of tokens, and several of softmax rows in each, at test sizes."""
    monkeypatch.setattr(_blocks, "_MIN_TOKENS", BLOCK)
    monkeypatch.setattr(_blocks, "_MAX_TOKENS", BLOCK)
    monkeypatch.setattr(_blocks, "_SOFTMAX_ELEMENTS", 300)


def _draw(tokens: int, width: int, teacher_width: int, vocabulary: int) -> tuple[list[Tensor], Tensor]:
    """Both models' hidden states and heads, in float64, and token weights of which some are 0."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((tokens, width), (vocabulary, width), (tokens, teacher_width), (vocabulary, teacher_width))
    inputs = [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]
    token_weights = torch.rand(tokens, generator=generator)
    token_weights[torch.rand(tokens, generator=generator) < 0.2] = 0
    return inputs, token_weights


def _leaves(inputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Copies, of which the student's two are leaves with a gradient."""
    return [x.detach().to(dtype, copy=True).requires_grad_(i < 2) for i, x in enumerate(inputs)]


def _compare(inputs: list[Tensor], token_weights: Tensor | None, dtype: torch.dtype, **options: Any) -> None:
    """Loss, divergences and gradients against float64 logits of what the dtype made of the inputs."""
    fast = _leaves(inputs, dtype)
    exact = _leaves(fast, torch.float64)
    loss, kl = distillation_kl(*fast, token_weights, **options)
    target, target_kl = distillation_kl_reference(*exact, token_weights, **options)
    (3 * loss).backward()
    (3 * target).backward()
    assert loss.dtype == kl.dtype == torch.promote_types(dtype, torch.float32)
    assert not kl.requires_grad and loss.dim() == 0
    for result, expected in ((loss, target), (kl, target_kl), *((x.grad, y.grad) for x, y in zip(fast[:2], exact))):
        assert result.shape == expected.shape
        assert (result.detach().double() - expected.detach()).norm() <= TOLERANCE[dtype] * expected.norm()
    assert all(x.grad is None for x in fast[2:])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("weighted", [False, True])
def test_matches_full_logits(dtype: torch.dtype, direction: str, weighted: bool) -> None:
    inputs, token_weights = _draw(75, 24, 10, 130)
    _compare(inputs, token_weights if weighted else None, dtype, direction=direction, temperature=1.5)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    tokens=st.integers(1, 40),
    width=st.integers(1, 8),
    teacher_width=st.integers(1, 8),
    vocabulary=st.integers(2, 50),
    direction=st.sampled_from(DIRECTIONS),
    temperature=st.sampled_from([0.3, 1.0, 4.0]),
    weighted=st.booleans(),
)
def test_any_size(
    tokens: int, width: int, teacher_width: int, vocabulary: int, direction: str, temperature: float, weighted: bool
) -> None:
    inputs, token_weights = _draw(tokens, width, teacher_width, vocabulary)
    weights = token_weights if weighted else None
    _compare(inputs, weights, torch.float64, direction=direction, temperature=temperature)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_gradcheck(direction: str) -> None:
    (hidden, weight, *teacher), token_weights = _draw(18, 3, 2, 6)

    def loss(*student: Tensor) -> Tensor:
        return distillation_kl(*student, *teacher, token_weights.double(), direction=direction, temperature=0.7)[0]

    assert torch.autograd.gradcheck(loss, (hidden.requires_grad_(), weight.requires_grad_()))


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_against_the_sum_of_the_definition(backend: str, direction: str) -> None:
    """In plain Python, with log-probabilities down to hundreds below 0 and a probability of all but nothing."""
    inputs, _ = _draw(6, 4, 3, 9)
    inputs[0] *= torch.tensor([0.0, 0.1, 1.0, 10.0, 100.0, 1000.0])[:, None]
    temperature = 1.7
    _, found = distillation_kl(*inputs, direction=direction, temperature=temperature, backend=backend)
    logits = [(hidden @ weight.T).tolist() for hidden, weight in (inputs[:2], inputs[2:])]
    for *rows, kl in zip(*logits, found.tolist()):
        logs = []
        for row in rows:
            total = math.fsum(math.exp((z - max(row)) / temperature) for z in row)
            logs.append([(z - max(row)) / temperature - math.log(total) for z in row])
        first, second = logs if direction == "reverse" else logs[::-1]
        assert kl == pytest.approx(math.fsum(math.exp(a) * (a - b) for a, b in zip(first, second)), rel=1e-9)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_teacher_that_is_the_student(direction: str) -> None:
    """No divergence and no gradient, to the last bit."""
    inputs, token_weights = _draw(40, 6, 6, 70)
    hidden, weight = (x.float().requires_grad_() for x in inputs[:2])
    loss, kl = distillation_kl(hidden, weight, hidden, weight, token_weights, direction=direction, temperature=0.9)
    assert loss == 0 and not kl.any()
    assert not any(x.any() for x in torch.autograd.grad(loss, (hidden, weight)))


@pytest.mark.parametrize("backend", ["torch", *TRITON])
def test_nan_stays_in_its_row_and_what_counts_nothing_has_no_part(backend: str) -> None:
    hidden, weight = random(20, 4, seed=0), random(9, 4, seed=1)
    teacher, teacher_weight = random(20, 3, seed=2).detach(), random(9, 3, seed=3).detach()
    token_weights, poisoned, ignored = torch.ones(20, device=DEVICE), 3, (11, 17)
    token_weights[list(ignored)] = 0
    with torch.no_grad():
        hidden[poisoned, 0] = hidden[ignored[0], 1] = teacher[ignored[1], 1] = torch.nan
    loss, kl = distillation_kl(hidden, weight, teacher, teacher_weight, token_weights, backend=backend)
    assert loss.isnan() and kl.isnan().nonzero().tolist() == [[poisoned]] and not kl[list(ignored)].any()
    (grad,) = torch.autograd.grad(loss, hidden)
    assert grad.isnan().any(1).nonzero().tolist() == [[poisoned]] and not grad[list(ignored)].any()
    token_weights[poisoned] = 0
    loss, _ = distillation_kl(hidden, weight, teacher, teacher_weight, token_weights, backend=backend)
    assert all(x.isfinite().all() for x in (loss, *torch.autograd.grad(loss, (hidden, weight))))


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("rows", [0, 1, 20])
def test_nothing_counts(backend: str, rows: int) -> None:
    (hidden, weight, *teacher), _ = _draw(rows, 4, 3, 9)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    loss, kl = distillation_kl(*leaves, *teacher, torch.zeros(rows), backend=backend)
    gradients = torch.autograd.grad(loss, leaves)
    assert [x.shape for x in (loss, kl, *gradients)] == [(), (rows,), hidden.shape, weight.shape]
    assert not any(x.any() for x in (loss, kl, *gradients))


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (False, False)])
def test_no_work_that_nobody_asked_for(wanted: tuple[bool, bool]) -> None:
    (hidden, weight, *teacher), _ = _draw(2 * BLOCK, 6, 5, 30)
    leaves = [x.requires_grad_(needs) for x, needs in zip((hidden, weight), wanted)]
    with _LargestOutput() as seen:
        loss, _ = distillation_kl(*leaves, *teacher)
    if any(wanted):
        loss.backward()
    assert [leaf.grad is not None for leaf in leaves] == list(wanted)
    assert seen.matmuls == 2 * (2 + sum(wanted))  # both models' logits and the gradients, of two blocks
    with torch.no_grad(), _LargestOutput() as seen:
        distillation_kl(*leaves, *teacher)
    assert seen.matmuls == 2 * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_never_holds_all_logits(dtype: torch.dtype) -> None:
    inputs, _ = _draw(8 * BLOCK, 8, 5, 700)
    with _LargestOutput() as seen:
        distillation_kl(*_leaves(inputs, dtype))[0].backward()
    assert seen.numel == BLOCK * 700
    assert seen.matmuls == 8 * 4


def test_models_of_two_dtypes() -> None:
    """A teacher in bfloat16 under a student in float32: logits of each in its own dtype, the rest in float32."""
    inputs, _ = _draw(30, 6, 5, 40)
    student, teacher = _leaves(inputs[:2], torch.float32), [x.bfloat16() for x in inputs[2:]]
    loss, kl = distillation_kl(*student, *teacher)
    logits = (teacher[0] @ teacher[1].T).float()
    _, expected = distillation_kl_reference(*student, logits, torch.eye(40))
    assert loss.dtype == kl.dtype == torch.float32
    torch.testing.assert_close(kl, expected, rtol=1e-5, atol=1e-6)


def test_errors() -> None:
    inputs, token_weights = _draw(6, 4, 3, 5)
    hidden, weight, teacher, teacher_weight = inputs
    for wrong in (
        (hidden[None], weight, teacher, teacher_weight),
        (hidden, weight[:, :3], teacher, teacher_weight),
        (hidden, weight, teacher, teacher_weight.float()),
        (hidden, weight, teacher[:3], teacher_weight),
        (hidden, weight, teacher, teacher_weight[:4]),
        (hidden, weight, teacher.long(), teacher_weight.long()),
        (hidden, weight, teacher, teacher_weight, token_weights[:3]),
        (hidden, weight, teacher, teacher_weight, token_weights.requires_grad_()),
    ):
        with pytest.raises(ValueError, match="distillation_kl"):
            distillation_kl(*wrong)
    for temperature in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="temperature must be above 0"):
            distillation_kl(*inputs, temperature=temperature)
    with pytest.raises(ValueError, match="forward or reverse, not 'both'"):
        distillation_kl(*inputs, direction="both")


@pytest.mark.slow
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_large_vocabulary_in_float32(direction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against full logits in float32, too."""
    monkeypatch.setattr(_blocks, "_SOFTMAX_ELEMENTS", 1 << 17)
    inputs, _ = _draw(64, 64, 48, 152064)
    found = []
    for function in (distillation_kl, distillation_kl_reference):
        leaves = _leaves(inputs, torch.float32)
        loss, kl = function(*leaves, direction=direction, temperature=0.9)
        found.append([loss, kl, *torch.autograd.grad(loss, leaves[:2])])
    for actual, expected in zip(*found):
        assert (actual - expected).norm() <= 1e-5 * expected.norm()
