"""Integers that point nowhere: refused on a CPU, a result that is not finite on a GPU, never a plausible number."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels import indices
from kernels.attention import attention
from kernels.convolution import causal_conv1d
from kernels.documents import Documents
from kernels.embedding import embedding
from kernels.indices import check_range
from kernels.linear_attention import gla, hgrn
from kernels.losses.linear_cross_entropy import linear_cross_entropy
from kernels.losses.token_log_probs import token_log_probs
from kernels.moe import grouped, grouped_linear, permutation, unpermute
from kernels.rotary import apply_rotary, rotary_tables
from kernels.triton import usable

TRITON = ["triton"] if usable(torch.empty(0)) else []
BACKENDS = ["torch", "reference", *TRITON]


@pytest.fixture
def unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, nobody looks at the integers."""
    for module in (indices, permutation):
        monkeypatch.setattr(module, "on_host", lambda _: False)


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).requires_grad_()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("label", [-1, -99, 5, 1 << 40])
def test_labels_outside_the_vocabulary(backend: str, label: int) -> None:
    labels = torch.tensor([0, -100, label, 4])
    with pytest.raises(ValueError, match=rf"label {label} at place 2 of 4 is outside 0 to 4 \(or -100\)"):
        linear_cross_entropy(draw(4, 3), draw(5, 3), labels, torch.tensor([1.0, 1, 0, 1]), backend=backend)


@pytest.mark.parametrize("backend", ["torch", *TRITON])
@pytest.mark.parametrize("label", [-1, 5, 1 << 40])
@pytest.mark.parametrize("token_weight", [0.0, 2.0])
def test_unseen_labels_make_the_loss_nan(unseen: None, backend: str, label: int, token_weight: float) -> None:
    hidden, weight = draw(4, 3), draw(5, 3)
    labels, weights = torch.tensor([0, -100, label, 4]), torch.tensor([1.0, 1.0, token_weight, 1.0])
    loss, nll = linear_cross_entropy(hidden, weight, labels, weights, backend=backend)
    loss.backward()
    assert loss.isnan() and nll.isnan().tolist() == [False, False, True, False] and nll[1] == 0
    assert hidden.grad[2].isnan().all() and hidden.grad[[0, 1, 3]].isfinite().all()
    assert weight.grad.isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("token", [-1, 5, 1 << 40])
def test_tokens_without_a_probability(backend: str, token: int) -> None:
    with pytest.raises(ValueError, match=rf"token {token} at place 2 of 4 is outside 0 to 4 \(or -100\)"):
        token_log_probs(draw(4, 3), draw(5, 3), torch.tensor([0, -100, token, 4]), backend=backend)


@pytest.mark.parametrize("backend", ["torch", *TRITON])
@pytest.mark.parametrize("token", [-1, 5, 1 << 40])
def test_unseen_tokens_have_no_log_probability(unseen: None, backend: str, token: int) -> None:
    hidden, weight = draw(4, 3), draw(5, 3)
    for results in token_log_probs(hidden, weight, torch.tensor([0, -100, token, 4]), backend=backend):
        assert results.isnan().tolist() == [False, False, True, False] and results[1] == 0
        hidden.grad = weight.grad = None
        results.sum().backward(retain_graph=True)
        assert hidden.grad[2].isnan().all() and hidden.grad[[0, 1, 3]].isfinite().all()
        assert weight.grad.isnan().all()


@pytest.mark.skipif(not TRITON, reason="no Triton")
def test_the_softmax_kernel_reads_no_target_outside_its_row() -> None:
    from kernels.triton.losses import to_gradient

    # The middle one of three rows, so that what lies beside it is there to be read.
    logits, nll = torch.tensor([[5.0, 5.0], [0.0, 0.0], [7.0, 7.0]]), torch.empty(3)
    to_gradient(logits, torch.tensor([0, 2, -1]), torch.ones(3), nll, False)
    assert nll[0].isfinite() and nll[1:].tolist() == [torch.inf] * 2


@pytest.mark.parametrize("token", [-1, 3])
def test_tokens_outside_the_vocabulary(token: int) -> None:
    with pytest.raises(ValueError, match=f"embedding: token {token} at place 3 of 4 is outside 0 to 2"):
        embedding(torch.tensor([[0, 1], [2, token]]), draw(3, 2))


COUNTS = {
    "too few": [1, 2, 0],
    "none": [0, 0, 0],
    "too many": [2, 3, 40],
    "negative": [8, -4, 1],
    "far": [1 << 33, 3, 0],
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_counts_that_are_not_those_of_the_rows(backend: str, counts: list[int]) -> None:
    with pytest.raises(ValueError, match=r"grouped_linear: counts must not be negative and add up to the 5 rows"):
        grouped_linear(draw(5, 4), draw(3, 2, 4), torch.tensor(counts), backend=backend)


@pytest.mark.skipif(not TRITON, reason="no Triton")
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_unseen_counts_make_the_products_nan(unseen: None, counts: list[int]) -> None:
    x, weight = draw(5, 4), draw(3, 2, 4)
    y = grouped_linear(x, weight, torch.tensor(counts), backend="triton")
    y.sum().backward()
    assert y.shape == (5, 2) and y.isnan().all() and x.grad.isnan().all()


@pytest.mark.parametrize(
    "counts", [*COUNTS.values(), [1 << 31, 1 << 31, 5], [2, 0, 3]], ids=[*COUNTS, "right in 32 bits", "right"]
)
def test_torchs_product_is_held_within_its_rows(counts: list[int]) -> None:
    x, weight = draw(5, 8).detach().bfloat16(), draw(3, 16, 8).detach().bfloat16()
    y = grouped._grouped_mm(x, weight, torch.tensor(counts))
    assert y.isnan().all() if counts != [2, 0, 3] else y.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("token", [-1, 3])
def test_rows_of_tokens_that_do_not_exist(backend: str, token: int) -> None:
    with pytest.raises(ValueError, match=f"unpermute: row's token {token} at place 1 of 3 is outside 0 to 2"):
        unpermute(draw(3, 2), torch.tensor([0, token, 2]), 3, backend=backend)


@pytest.mark.parametrize(("backend", "token"), [("torch", 3), *((name, token) for name in TRITON for token in (-1, 3))])
@pytest.mark.parametrize("weighted", [False, True])
def test_unseen_rows_of_no_token_make_the_sums_nan(unseen: None, backend: str, token: int, weighted: bool) -> None:
    probs = draw(3) if weighted else None
    assert unpermute(draw(3, 2), torch.tensor([0, token, 2]), 3, probs, backend=backend).isnan().all()


@pytest.mark.skipif(not TRITON, reason="no Triton")
def test_the_gather_kernel_reads_no_row_outside() -> None:
    from kernels.triton.permutation import _gather

    rows, _ = _gather(draw(4, 3).detach()[1:3], torch.tensor([0, 2, -1, 1]), None, None)
    assert rows.isnan().all(1).tolist() == [False, True, True, False]


@pytest.mark.parametrize("position", [-1, 1 << 24])
def test_positions_that_float32_has_not(position: int, monkeypatch: pytest.MonkeyPatch) -> None:
    positions = torch.tensor([0, (1 << 24) - 1, position])
    with pytest.raises(ValueError, match=f"position {position} at place 2 of 3 is outside 0 to 16777215"):
        rotary_tables(positions, 4, 10.0)
    monkeypatch.setattr(indices, "on_host", lambda _: False)
    for table in rotary_tables(positions, 4, 10.0):
        assert table[:2].isfinite().all() and table[2].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batch", [(2,), (3, 1), (0,)])
def test_tables_of_another_batch(backend: str, batch: tuple[int, ...]) -> None:
    table = torch.zeros(*batch, 5, 2)
    with pytest.raises(ValueError, match=r"apply_rotary: x .* needs tables"):
        apply_rotary(draw(3, 5, 1, 4), table, table, backend=backend)


def test_what_is_no_integer() -> None:
    half = torch.tensor([0.0, 1.5, 2.0])
    for call in (
        lambda: embedding(half, draw(3, 2)),
        lambda: rotary_tables(half, 4, 10.0),
        lambda: unpermute(draw(3, 2), half, 3),
        lambda: grouped_linear(draw(3, 2), draw(3, 2, 2), half),
        lambda: Documents.of(half),
    ):
        with pytest.raises(ValueError, match=r"integer|int32"):
            call()


RECURRENCES: dict[str, Callable[[Documents, str], object]] = {
    "attention": lambda bounds, _: attention(*[draw(1, 6, 1, 4)] * 3, documents=bounds),
    "causal_conv1d": lambda bounds, name: causal_conv1d(draw(1, 6, 4), draw(4, 2), documents=bounds, backend=name),
    "gla": lambda bounds, name: gla(*[draw(1, 6, 1, 4)] * 4, documents=bounds, backend=name),
    "hgrn": lambda bounds, name: hgrn(*[draw(1, 6, 4)] * 2, documents=bounds, backend=name),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", RECURRENCES)
def test_bounds_that_are_none(name: str, backend: str) -> None:
    for bounds in ([0, 4, 2, 6], [0, 7], [1, 6], [0, 5], [-1, 6], [0, -2, 6], []):
        with pytest.raises(ValueError, match="cu_seqlens"):
            RECURRENCES[name](Documents.of(torch.tensor(bounds, dtype=torch.int32)), backend)


def test_a_run_on_shapes_alone_has_no_integers() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        check_range("op", "id", torch.ones(3, dtype=torch.int64), 1)
        with pytest.raises(ValueError, match="op: id 2 at place 0 of 1"):
            check_range("op", "id", SEEN, 2)


SEEN = torch.tensor([2])
