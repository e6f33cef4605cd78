"""Log-probabilities and entropies of a linear head against log_softmax on whole logits."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.losses import _blocks
from kernels.losses import token_log_probs as module
from kernels.losses.token_log_probs import token_log_probs, token_log_probs_reference
from kernels.triton import usable
from tests.kernels.test_linear_cross_entropy import TOLERANCE, _LargestOutput
from tests.kernels.triton._compare import DEVICE, random

TRITON = ["triton"] if usable(torch.empty(0, device=DEVICE)) else []
BLOCK = 16


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of tokens, and several of softmax rows in each, at test sizes."""
    monkeypatch.setattr(_blocks, "_MIN_TOKENS", BLOCK)
    monkeypatch.setattr(_blocks, "_MAX_TOKENS", BLOCK)
    monkeypatch.setattr(_blocks, "_SOFTMAX_ELEMENTS", 300)


def _draw(tokens: int, width: int, vocabulary: int, ids: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocabulary, width, generator=generator, dtype=torch.float64)
    chosen = torch.randint(0, ids or vocabulary, (tokens,), generator=generator)
    chosen[torch.rand(tokens, generator=generator) < 0.2] = -100
    return hidden, weight, chosen


def _compare(
    hidden: Tensor, weight: Tensor, tokens: Tensor, dtype: torch.dtype, read: str = "both", **options: Any
) -> None:
    """Both results, and the gradients of a weighted sum of those that are `read`."""
    fast = [x.to(dtype).clone().requires_grad_() for x in (hidden, weight)]
    exact = [x.detach().double().clone().requires_grad_() for x in fast]
    found = token_log_probs(*fast, tokens, **options)
    expected = token_log_probs_reference(*exact, tokens, **options)
    factors = torch.randn(2, len(tokens), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for results in (found, expected):
        used = {"log_probs": results[:1], "entropies": results[1:]}.get(read, results)
        sum((x * factor).sum() for x, factor in zip(used, factors) if x is not None).backward()
    pairs = [(x, y) for x, y in zip(found, expected) if x is not None]
    assert len(pairs) == 1 + options.get("entropy", True)
    assert all(x.dtype == torch.promote_types(dtype, torch.float32) for x, _ in pairs)
    for result, target in [*pairs, *((x.grad, y.grad) for x, y in zip(fast, exact))]:
        assert result.shape == target.shape
        # A vocabulary of one token has an entropy and gradients of 0.
        assert (result.double() - target).norm() <= TOLERANCE[dtype] * max(target.norm().item(), 1e-3)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("read", ["both", "log_probs", "entropies"])
def test_matches_reference(dtype: torch.dtype, read: str) -> None:
    _compare(*_draw(75, 24, 130), dtype, read, temperature=1.5)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    tokens=st.integers(1, 40),
    width=st.integers(1, 8),
    vocabulary=st.integers(1, 50),
    padding=st.integers(0, 20),
    temperature=st.sampled_from([0.3, 1.0, 2.0]),
    entropy=st.booleans(),
)
def test_any_size(tokens: int, width: int, vocabulary: int, padding: int, temperature: float, entropy: bool) -> None:
    case = _draw(tokens, width, vocabulary + padding, ids=vocabulary)
    _compare(*case, torch.float64, temperature=temperature, entropy=entropy, vocab_size=vocabulary)


def test_gradcheck() -> None:
    hidden, weight, tokens = _draw(18, 3, 6, ids=5)
    options: dict[str, Any] = {"temperature": 0.7, "vocab_size": 5}
    leaves = (hidden.requires_grad_(), weight.requires_grad_())
    assert torch.autograd.gradcheck(lambda h, w: token_log_probs(h, w, tokens, **options), leaves)


@pytest.mark.parametrize("backend", ["torch", "reference", *TRITON])
@pytest.mark.parametrize("size", [0.0, 1.0, 300.0])
def test_against_the_sums_of_their_definitions(backend: str, size: float) -> None:
    """Also where logits are far apart, and where one token has all but 1e-7 of the probability."""
    hidden, weight, temperature = size * random(6, 4, seed=0).detach(), random(9, 4, seed=1).detach(), 1.7
    tokens = torch.tensor([0, 8, 3, 3, 5, 1], device=DEVICE)
    log_probs, entropies = token_log_probs(hidden, weight, tokens, temperature=temperature, backend=backend)
    logits = (hidden @ weight.T).double().tolist()
    for row, token, log_prob, entropy in zip(logits, tokens.tolist(), log_probs.tolist(), entropies.tolist()):
        powers = [math.exp((z - max(row)) / temperature) for z in row]
        probabilities = [power / sum(powers) for power in powers]
        expected = -sum(p * math.log(p) for p in probabilities if p > 0)
        assert entropy == pytest.approx(expected, rel=1e-5, abs=3e-7)
        assert entropy >= 0
        exact = (row[token] - max(row)) / temperature - math.log(sum(powers))
        assert log_prob == pytest.approx(exact, rel=1e-5, abs=1e-6 * (1 + size))


@pytest.mark.parametrize("backend", ["torch", *TRITON])
def test_nan_stays_in_its_row_and_what_counts_nothing_has_no_part(backend: str) -> None:
    hidden, weight = random(20, 4, seed=0), random(9, 4, seed=1)
    tokens, poisoned, ignored = torch.arange(20, device=DEVICE) % 9, 3, 17
    tokens[ignored] = -100
    with torch.no_grad():
        hidden[poisoned, 0] = hidden[ignored, 1] = torch.nan
    results = token_log_probs(hidden, weight, tokens, backend=backend)
    for x in results:
        assert x.isnan().nonzero().tolist() == [[poisoned]] and x[ignored] == 0
    (grad,) = torch.autograd.grad(sum(x.sum() for x in results), hidden, retain_graph=True)
    assert grad.isnan().any(1).nonzero().tolist() == [[poisoned]] and not grad[ignored].any()
    # A token that the loss leaves out has no part either.
    for read in (results, results[:1], results[1:]):
        loss = sum(x[poisoned + 1 :].sum() for x in read)
        d_hidden, d_weight = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
        assert d_hidden.isfinite().all() and d_weight.isfinite().all() and not d_hidden[: poisoned + 1].any()
        assert d_hidden[poisoned + 1 : ignored].all()


@pytest.mark.parametrize("backend", ["torch", "reference", *TRITON])
@pytest.mark.parametrize("rows", [0, 1, 20])
def test_nothing_counts(backend: str, rows: int) -> None:
    hidden, weight = random(rows, 4, seed=0), random(9, 4, seed=1)
    tokens = torch.full((rows,), -100, device=DEVICE)
    results = token_log_probs(hidden, weight, tokens, backend=backend)
    gradients = torch.autograd.grad(sum(x.sum() for x in results), (hidden, weight))
    assert [x.shape for x in (*results, *gradients)] == [(rows,), (rows,), hidden.shape, weight.shape]
    assert not any(x.any() for x in (*results, *gradients))


@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
def test_one_gradient_alone(wanted: tuple[bool, bool]) -> None:
    hidden, weight, tokens = _draw(2 * BLOCK, 6, 30)
    leaves = [x.requires_grad_(needs) for x, needs in zip((hidden, weight), wanted)]
    log_probs, _ = token_log_probs(*leaves, tokens)
    with _LargestOutput() as seen:
        log_probs.sum().backward()
    assert [leaf.grad is not None for leaf in leaves] == list(wanted)
    assert seen.matmuls == 2 * 2  # logits and the one gradient, of two blocks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_never_holds_all_logits(dtype: torch.dtype) -> None:
    hidden, weight, tokens = _draw(8 * BLOCK, 8, 700)
    leaves = [x.to(dtype).requires_grad_() for x in (hidden, weight)]
    with _LargestOutput() as forward:
        log_probs, entropies = token_log_probs(*leaves, tokens)
    with _LargestOutput() as backward:
        (log_probs.sum() + entropies.sum()).backward()
    assert forward.numel == backward.numel == BLOCK * 700
    assert (forward.matmuls, backward.matmuls) == (8, 3 * 8)


class _Calls(TorchDispatchMode):
    """How often each operation ran."""

    def __init__(self) -> None:
        super().__init__()
        self.of: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.of[name] = self.of.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def test_no_work_that_nobody_asked_for() -> None:
    hidden, weight, tokens = _draw(BLOCK, 8, 30)
    weight.requires_grad_()
    expected = token_log_probs(hidden, weight, tokens)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), _LargestOutput() as seen:
            results = token_log_probs(hidden, weight, tokens)
        assert seen.matmuls == 1 and not any(x.requires_grad for x in results)
        assert all(torch.equal(x, y) for x, y in zip(results, expected))
    with _Calls() as calls:
        log_probs, entropies = token_log_probs(hidden, weight, tokens, entropy=False)
    assert entropies is None and torch.equal(log_probs, expected[0])
    assert "clamp_min_" not in calls.of  # of the entropy alone
    for read, clamps in (("log_probs", 0), ("entropies", 2)):
        with _Calls() as calls:
            expected[read == "entropies"].sum().backward(retain_graph=True)
        assert calls.of.get("clamp_min_", 0) == clamps


# The interpreter's log 0 = −inf, and 0 / 0 where a part has no finite logit, which the kernel does not use.
@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("backend", ["torch", *TRITON])
@pytest.mark.parametrize(("world", "rows"), [(1, 37), (3, 5), (4, 1), (3, 33)])
def test_parts_of_a_vocabulary(backend: str, world: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The halves of a softmax over parts, in one process: some tokens have logits of −inf, in a whole part or two."""
    if backend == "triton":
        monkeypatch.setattr("kernels.triton.losses._BLOCK_V", 16)
    tokens, temperature = 5, 0.6
    logits = (3 * random(tokens, world * rows, seed=0).detach()).cpu()
    logits[1, : (world - 1) * rows] = -torch.inf
    logits[2, 1 : world * rows : 2] = -torch.inf
    target = torch.full((tokens,), world * rows - 1)
    target[2] = 0
    g, e = (random(tokens, seed=seed).detach().cpu() for seed in (1, 2))
    exact = logits.double().requires_grad_()
    log_p = (exact / temperature).log_softmax(-1).masked_fill(logits == -torch.inf, -1e4)
    log_probs = log_p.gather(1, target[:, None])[:, 0]
    entropies = -(log_p.exp() * log_p).sum(-1)
    (log_probs * g + entropies * e).sum().backward()

    statistics, part_to_gradient = _blocks.choose_halves(backend)
    parts = [part.clone(memory_format=torch.contiguous_format).to(DEVICE) for part in logits.chunk(world, dim=1)]
    told = torch.full((world, 3, tokens), torch.nan, device=DEVICE)
    targets = [(target - rank * rows).to(DEVICE) for rank in range(world)]
    ones = torch.ones(tokens, device=DEVICE)
    for logits_CV, target_C, told_SC in zip(parts, targets, told):
        statistics(logits_CV, target_C, ones, told_SC, 1 / temperature)
    log_total = told[:, 0].logsumexp(0)
    whole = module._whole_entropy(told, log_total)
    scales = [x.to(DEVICE) for x in (-g / temperature, e / temperature)]
    for logits_CV, target_C in zip(parts, targets):
        part_to_gradient(logits_CV, target_C, scales[0], log_total, 1 / temperature, scales[1], whole)
    torch.testing.assert_close(
        told[:, 1].amax(0).sub(log_total).cpu().double(), log_probs.detach(), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(whole.cpu().double(), entropies.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.cat(parts, 1).cpu().double(), exact.grad, rtol=1e-4, atol=1e-5)


def test_errors() -> None:
    hidden, weight, tokens = _draw(6, 4, 5)
    for wrong in (
        (hidden[None], weight, tokens),
        (hidden, weight[:, :3], tokens),
        (hidden, weight.float(), tokens),
        (hidden.long(), weight.long(), tokens),
        (hidden, weight, tokens[:3]),
        (hidden, weight, tokens.int()),
    ):
        with pytest.raises(ValueError, match="token_log_probs"):
            token_log_probs(*wrong)
    for temperature in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="temperature must be above 0"):
            token_log_probs(hidden, weight, tokens, temperature=temperature)
    for vocab_size in (0, 6):
        with pytest.raises(ValueError, match="vocab_size must be 1 to 5, the rows of weight"):
            token_log_probs(hidden, weight, tokens, vocab_size=vocab_size)
    with pytest.raises(ValueError, match="token 4 at place 0 of 6 is outside 0 to 3"):
        token_log_probs(hidden, weight, torch.full((6,), 4), vocab_size=4)


@pytest.mark.slow
def test_a_large_vocabulary_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against full logits in float32, too."""
    monkeypatch.setattr(_blocks, "_SOFTMAX_ELEMENTS", 1 << 17)
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(64, 64, generator=generator), torch.randn(152064, 64, generator=generator)
    tokens = torch.randint(152064, (64,), generator=generator)
    found = []
    for function in (token_log_probs, token_log_probs_reference):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
        results = function(*leaves, tokens, temperature=0.9)
        found.append([*results, *torch.autograd.grad(results[0].sum() + 0.1 * results[1].sum(), leaves)])
    for actual, expected in zip(*found):
        assert (actual - expected).norm() <= 1e-5 * expected.norm()
