"""The softmax kernels of the fused linear layer: cross entropy, log-probabilities and entropies, divergences."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.losses import _blocks
from kernels.losses.distillation import distillation_kl, distillation_kl_reference
from kernels.losses.linear_cross_entropy import IGNORE_LABEL, linear_cross_entropy, linear_cross_entropy_reference
from kernels.losses.token_log_probs import token_log_probs, token_log_probs_reference
from tests.kernels.triton._compare import DEVICE, assert_matches, error, random, results

triton_losses = pytest.importorskip("kernels.triton.losses")
SETTINGS = settings(max_examples=8, deadline=None, derandomize=True)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_losses, "_BLOCK_V", 32)
    monkeypatch.setattr(_blocks, "block_tokens", lambda weight: 5)


def labels_and_weights(tokens: int, vocabulary: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(vocabulary, (tokens,), generator=generator)
    labels[torch.rand(tokens, generator=generator) < 0.2] = IGNORE_LABEL
    weights = torch.rand(tokens, generator=generator).mul(1.5).sub(0.3).clamp_min(0)  # a fifth of them 0
    return labels.to(DEVICE), weights.to(DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@SETTINGS
@given(
    tokens=st.integers(1, 17),
    vocabulary=st.sampled_from([1, 2, 31, 32, 33, 100]),
    weighted=st.booleans(),
    size=st.sampled_from([1.0, 30.0]),
    seed=st.integers(0, 99),
)
def test_loss_and_gradients(
    dtype: torch.dtype, tokens: int, vocabulary: int, weighted: bool, size: float, seed: int
) -> None:
    hidden, weight = random(tokens, 8, seed=seed, dtype=dtype), random(vocabulary, 8, seed=seed + 1, dtype=dtype)
    hidden = (hidden.detach() * (size if dtype == torch.float32 else 1)).requires_grad_()
    labels, token_weights = labels_and_weights(tokens, vocabulary, seed)
    labels[0] = 0
    token_weights[0] = 1.0
    arguments = (labels, token_weights if weighted else None)
    assert_matches(
        lambda h, w: linear_cross_entropy(h, w, *arguments, backend="triton"),
        lambda h, w: linear_cross_entropy_reference(h, w, *arguments),
        [hidden, weight],
        dtype,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@SETTINGS
@given(
    tokens=st.integers(1, 12),
    vocabulary=st.sampled_from([2, 31, 32, 33, 100]),
    padding=st.sampled_from([0, 1, 40]),
    entropy=st.booleans(),
    temperature=st.sampled_from([0.5, 1.0, 3.0]),
    seed=st.integers(0, 99),
)
def test_log_probs_entropies_and_gradients(
    dtype: torch.dtype, tokens: int, vocabulary: int, padding: int, entropy: bool, temperature: float, seed: int
) -> None:
    hidden, weight = random(tokens, 8, seed=seed), random(vocabulary + padding, 8, seed=seed + 1)
    # bfloat16 logits of large numbers are off by whole units.
    hidden, weight = ((x.detach() * 0.5).to(dtype).requires_grad_() for x in (hidden, weight))
    ids, _ = labels_and_weights(tokens, vocabulary, seed)
    ids[0] = 0
    options = {"temperature": temperature, "entropy": entropy, "vocab_size": vocabulary}

    def some(results: tuple[Tensor, Tensor | None]) -> list[Tensor]:
        return [x for x in results if x is not None]

    assert_matches(
        lambda h, w: some(token_log_probs(h, w, ids, **options, backend="triton")),
        lambda h, w: some(token_log_probs_reference(h, w, ids, **options)),
        [hidden, weight],
        dtype,
        tolerance={torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype],
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@SETTINGS
@given(
    tokens=st.integers(1, 12),
    vocabulary=st.sampled_from([2, 31, 32, 33, 100]),
    direction=st.sampled_from(["forward", "reverse"]),
    temperature=st.sampled_from([0.5, 1.0, 3.0]),
    seed=st.integers(0, 99),
)
def test_divergence_and_gradients(
    dtype: torch.dtype, tokens: int, vocabulary: int, direction: str, temperature: float, seed: int
) -> None:
    shapes = ((tokens, 8), (vocabulary, 8), (tokens, 5), (vocabulary, 5))
    # bfloat16 logits of large numbers are off by whole units.
    hidden, weight, *teacher = (
        (random(*shape, seed=seed + i).detach() * 0.5).to(dtype).requires_grad_(i < 2) for i, shape in enumerate(shapes)
    )
    _, token_weights = labels_and_weights(tokens, vocabulary, seed)
    token_weights[0] = 1.0
    options = {"direction": direction, "temperature": temperature}
    assert_matches(
        lambda h, w: distillation_kl(h, w, *teacher, token_weights, **options, backend="triton"),
        lambda h, w: distillation_kl_reference(h, w, *(x.double() for x in teacher), token_weights, **options),
        [hidden, weight],
        dtype,
        tolerance={torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype],
    )


def test_tokens_that_count_nothing_are_not_read() -> None:
    logits = torch.full((2, 40), torch.nan, device=DEVICE)
    logits[1] = 0.0
    nll, target = torch.empty(2, device=DEVICE), torch.tensor([0, 3], device=DEVICE)
    triton_losses.to_gradient(logits, target, torch.tensor([0.0, 2.0], device=DEVICE), nll, True)
    assert torch.equal(logits[0], torch.zeros_like(logits[0]))
    torch.testing.assert_close(nll.cpu(), torch.tensor([0.0, 40.0]).clamp_min(1).log())
    expected = torch.full((40,), 2 / 40)
    expected[3] -= 2
    torch.testing.assert_close(logits[1].cpu(), expected)


def test_logits_of_minus_infinity_and_logits_kept_without_gradients() -> None:
    logits = torch.full((1, 70), -torch.inf, device=DEVICE)
    logits[0, 60:] = random(10, seed=0).detach()
    before, nll = logits.clone(), torch.empty(1, device=DEVICE)
    triton_losses.to_gradient(
        logits, torch.tensor([65], device=DEVICE), torch.ones(1, device=DEVICE), nll, wants_gradient=False
    )
    assert torch.equal(logits, before)
    assert error(nll, -before.double().log_softmax(-1)[:, 65]) < 1e-6


def test_no_tokens() -> None:
    hidden, weight = random(0, 8, seed=0), random(5, 8, seed=1)
    labels = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    loss, nll, dhidden, dweight = results(
        lambda h, w: linear_cross_entropy(h, w, labels, backend="triton"), [hidden, weight]
    )
    assert (loss.item(), len(nll), dhidden.shape, dweight.abs().sum().item()) == (0.0, 0, (0, 8), 0.0)
