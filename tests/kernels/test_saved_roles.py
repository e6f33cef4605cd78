"""What autograd keeps says what it is: activations, weights, statistics, indices."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from kernels.activations import swiglu, swiglu_packed
from kernels.autograd import Role, name, role_of, save
from kernels.losses.linear_cross_entropy import linear_cross_entropy
from kernels.losses.token_log_probs import token_log_probs
from kernels.matmul import linear
from kernels.moe import dense_to_sparse_gate, grouped_linear, permute, top_k_gate, unpermute
from kernels.norms import gated_rms_norm, l2_norm, rms_norm
from kernels.rotary import apply_rotary, rotary_tables

ROOT = Path(__file__).resolve().parents[2]
A, W, S, I = Role  # noqa: E741 - as short as the table below


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()


def flowing(*shape: int) -> Tensor:
    """What an earlier layer gives."""
    return leaf(*shape) * 1


MAP = torch.tensor([[True, False, True], [False, True, True], [True, True, False], [True, False, False]])
COUNTS = torch.tensor([2, 1, 1])
TOKENS = torch.tensor([0, 2, 1, 3])


def tables() -> tuple[Tensor, Tensor]:
    return rotary_tables(torch.arange(4), 8, 10.0)


CASES: dict[str, tuple[Any, dict[Role, int]]] = {
    "rms_norm": (lambda: rms_norm(flowing(4, 8), leaf(8), 1e-6, backend="torch"), {A: 1, W: 1, S: 1}),
    "gated_rms_norm": (
        lambda: gated_rms_norm(flowing(4, 8), flowing(4, 8), leaf(8), 1e-6, backend="torch"),
        {A: 2, W: 1, S: 1},
    ),
    "l2_norm": (lambda: l2_norm(flowing(4, 8), backend="torch"), {A: 1, S: 1}),
    "swiglu": (lambda: swiglu(flowing(4, 8), flowing(4, 8), backend="torch"), {A: 2}),
    "swiglu_packed": (lambda: swiglu_packed(flowing(4, 8), backend="torch"), {A: 1}),
    "rotary": (lambda: apply_rotary(flowing(1, 4, 1, 8), *tables(), backend="torch"), {S: 2}),
    "linear through torch": (lambda: linear(flowing(4, 8), leaf(3, 8), backend="torch"), {A: 1, W: 1}),
    "linear in bfloat16": (
        lambda: linear(flowing(4, 8).bfloat16(), leaf(3, 8).bfloat16(), backend="float32"),
        {A: 1, W: 1},
    ),
    "grouped_linear": (
        lambda: grouped_linear(flowing(4, 8), flowing(3, 5, 8), COUNTS, backend="torch"),
        {A: 1, W: 1, I: 1},
    ),
    "top_k_gate": (lambda: top_k_gate(flowing(4, 6), 2, backend="torch"), {S: 2, I: 1}),
    "dense_to_sparse_gate": (
        lambda: dense_to_sparse_gate(flowing(4, 6), torch.tensor(1.0), 0.1, backend="torch"),
        {S: 3, I: 1},
    ),
    "permute": (lambda: permute(flowing(4, 8), MAP, flowing(4, 3), backend="torch"), {I: 2}),
    "unpermute": (lambda: unpermute(flowing(4, 8), TOKENS, 4, flowing(4), backend="torch"), {A: 1, S: 1, I: 1}),
    "unpermute without weights": (lambda: unpermute(flowing(4, 8), TOKENS, 4, backend="torch"), {I: 1}),
    "linear_cross_entropy": (lambda: linear_cross_entropy(flowing(4, 8), leaf(9, 8), TOKENS, backend="torch"), {S: 2}),
    "token_log_probs": (
        lambda: token_log_probs(flowing(4, 8), leaf(9, 8), TOKENS, entropy=True, backend="torch"),
        {A: 1, W: 1, S: 3, I: 1},
    ),
    # Of torch's own operations.
    "silu": (lambda: F.silu(flowing(4)), {A: 1}),
    "mask": (lambda: flowing(4).masked_fill(torch.ones(4, dtype=torch.bool), 0.0), {I: 1}),
    "table": (lambda: flowing(4) * torch.ones(4), {S: 1}),
    "weight": (lambda: flowing(4) * leaf(4), {A: 1, W: 1}),
    "attention": (
        lambda: F.scaled_dot_product_attention(*(flowing(1, 2, 8, 16) for _ in range(3)), is_causal=True),
        {A: 4, S: 1},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_that_is_kept_has_its_role(case: str) -> None:
    run, expected = CASES[case]
    roles: list[Role] = []

    def pack(tensor: Tensor) -> Tensor:
        roles.append(role_of(tensor))
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    assert Counter(roles) == Counter(expected)


def test_nothing_in_kernels_is_saved_without_a_role() -> None:
    saving = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "kernels").rglob("*.py")
        if "ctx.save_for_backward" in path.read_text(encoding="utf-8")
    }
    assert saving == {"kernels/autograd.py"}


class _Both(torch.autograd.Function):
    """x · w, and x's sum as a statistic, which is a result, too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        total = x.sum()
        save(ctx, statistics=(total, None), weights=(w,), activations=(x,))
        return x * w, total

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_total: Tensor) -> tuple[Tensor, Tensor]:
        x, w, total, nothing = ctx.saved_tensors
        assert nothing is None and torch.equal(total, x.sum())
        return grad * w + grad_total, grad * x


def test_the_order_is_that_of_roles_and_results_keep_theirs() -> None:
    x, w = flowing(3), flowing(3)
    roles = []

    def pack(tensor: Tensor) -> Tensor:
        roles.append((tuple(tensor.shape), role_of(tensor)))
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        y, total = _Both.apply(x, w)
    assert roles == [((3,), A), ((3,), W), ((), S)]
    (y.sum() + total).backward()


def test_a_name_holds_until_others_are_named() -> None:
    x = flowing(3)
    assert role_of(x) is A
    name([(x, S), (None, W)])
    assert role_of(x) is S
    name([])
    assert role_of(x) is A
