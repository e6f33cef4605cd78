"""The fused head and loss against F.cross_entropy on whole logits."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.losses import _blocks
from kernels.losses.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of tokens, and several of softmax rows in each, at test sizes."""
    monkeypatch.setattr(_blocks, "_MIN_TOKENS", 16)
    monkeypatch.setattr(_blocks, "_MAX_TOKENS", 16)
    monkeypatch.setattr(_blocks, "_SOFTMAX_ELEMENTS", 300)


def _draw(tokens: int, width: int, vocabulary: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden = torch.randn(tokens, width, dtype=torch.float64)
    weight = torch.randn(vocabulary, width, dtype=torch.float64)
    labels = torch.randint(0, vocabulary, (tokens,))
    labels[torch.rand(tokens) < 0.2] = -100
    token_weights = torch.rand(tokens)
    token_weights[torch.rand(tokens) < 0.2] = 0
    return hidden, weight, labels, token_weights


def _compare(hidden: Tensor, weight: Tensor, labels: Tensor, token_weights: Tensor | None, dtype: torch.dtype) -> None:
    fast = [x.to(dtype).clone().requires_grad_() for x in (hidden, weight)]
    exact = [x.detach().double().clone().requires_grad_() for x in fast]
    loss, nll = linear_cross_entropy(*fast, labels, token_weights)
    target, target_nll = linear_cross_entropy_reference(*exact, labels, token_weights)
    (3 * loss).backward()
    (3 * target).backward()
    assert loss.dtype == nll.dtype == torch.promote_types(dtype, torch.float32)
    assert not nll.requires_grad and loss.dim() == 0
    pairs = ((loss, target), (nll, target_nll), *((x.grad, y.grad) for x, y in zip(fast, exact)))
    for result, expected in pairs:
        assert result.shape == expected.shape
        assert (result.detach().double() - expected.detach()).norm() <= TOLERANCE[dtype] * expected.norm()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("weighted", [False, True])
def test_matches_reference(dtype: torch.dtype, weighted: bool) -> None:
    torch.manual_seed(0)
    hidden, weight, labels, token_weights = _draw(75, 24, 130)
    _compare(hidden, weight, labels, token_weights if weighted else None, dtype)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 8), st.integers(1, 50), st.booleans())
def test_any_size(tokens: int, width: int, vocabulary: int, weighted: bool) -> None:
    torch.manual_seed(0)
    hidden, weight, labels, token_weights = _draw(tokens, width, vocabulary)
    _compare(hidden, weight, labels, token_weights if weighted else None, torch.float64)


def test_gradcheck() -> None:
    hidden, weight, labels, token_weights = _draw(20, 3, 5)
    leaves = (hidden.requires_grad_(), weight.requires_grad_())
    assert torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, labels, token_weights.double())[0], leaves)


@pytest.mark.parametrize("factor", [1.0, 0.25])
def test_tied_weight_adds_both_gradients(factor: float) -> None:
    _, weight, labels, _ = _draw(40, 6, 40)
    tokens, gradients = torch.randint(0, 40, (40,)), []
    for function in (linear_cross_entropy, linear_cross_entropy_reference):
        tied = weight.clone().requires_grad_()
        (factor * function(tied[tokens], tied, labels)[0]).backward()
        gradients.append(tied.grad)
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("by_weight", [False, True])
def test_nothing_counts(by_weight: bool) -> None:
    hidden, weight, labels, _ = _draw(40, 6, 30)
    labels = labels.clamp(min=0) if by_weight else torch.full_like(labels, -100)
    leaves = (hidden.requires_grad_(), weight.requires_grad_())
    loss, nll = linear_cross_entropy(*leaves, labels, torch.zeros(40) if by_weight else None)
    loss.backward()
    assert loss.item() == 0 and not nll.any()
    assert not hidden.grad.any() and not weight.grad.any()


def test_an_infinite_loss_that_does_not_count() -> None:
    hidden, weight, labels, _ = _draw(40, 6, 30)
    hidden[0], labels[0] = float("inf"), -100
    loss, nll = linear_cross_entropy(hidden, weight, labels)
    assert loss.isfinite() and nll.isfinite().all()


@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
def test_one_gradient_alone(wanted: tuple[bool, bool]) -> None:
    hidden, weight, labels, _ = _draw(40, 6, 30)
    leaves = [x.requires_grad_(needs) for x, needs in zip((hidden, weight), wanted)]
    linear_cross_entropy(*leaves, labels)[0].backward()
    assert [leaf.grad is not None for leaf in leaves] == list(wanted)


class _LargestOutput(TorchDispatchMode):
    """The elements of the largest tensor that any operation returns, and the matmuls."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = self.matmuls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.matmuls += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_)
        if isinstance(out, Tensor):
            self.numel = max(self.numel, out.numel())
        return out


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_never_holds_all_logits(dtype: torch.dtype) -> None:
    tokens, width, vocabulary = 512, 8, 700
    hidden, weight, labels, _ = _draw(tokens, width, vocabulary)
    leaves = [x.to(dtype).requires_grad_() for x in (hidden, weight)]
    with _LargestOutput() as largest:
        linear_cross_entropy(*leaves, labels)[0].backward()
    assert largest.numel == 16 * vocabulary  # one block of tokens
    assert largest.matmuls == 3 * tokens // 16


def test_no_gradient_work_without_grad() -> None:
    hidden, weight, labels, _ = _draw(32, 8, 30)
    weight.requires_grad_()
    with torch.no_grad(), _LargestOutput() as largest:
        linear_cross_entropy(hidden, weight, labels)
    assert largest.matmuls == 2


def test_errors() -> None:
    hidden, weight, labels, token_weights = _draw(6, 4, 5)
    for wrong in (
        (hidden[None], weight, labels, None),
        (hidden, weight[:, :3], labels, None),
        (hidden, weight.float(), labels, None),
        (hidden, weight[:0], torch.full_like(labels, -100), None),
        (hidden, weight, labels[:3], None),
        (hidden, weight, labels.int(), None),
        (hidden, weight, labels, token_weights[:3]),
    ):
        with pytest.raises(ValueError, match="linear_cross_entropy"):
            linear_cross_entropy(*wrong)
