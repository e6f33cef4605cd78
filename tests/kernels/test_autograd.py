"""Second derivatives: every backward of our own refuses them."""

import ast
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels.activations import swiglu, swiglu_packed
from kernels.attention import attention
from kernels.autograd import once_differentiable
from kernels.convolution import causal_conv1d
from kernels.linear_attention import gated_delta_rule, gla, hgrn, retention
from kernels.losses.distillation import distillation_kl
from kernels.losses.linear_cross_entropy import linear_cross_entropy
from kernels.losses.token_log_probs import token_log_probs
from kernels.moe import dense_to_sparse_gate, grouped_linear, permute, top_k_gate, unpermute
from kernels.norms import gated_rms_norm, l2_norm, rms_norm
from kernels.rotary import apply_rotary, rotary_tables
from kernels.spiking import spike

ROOT = Path(__file__).resolve().parents[2]


def own_functions() -> dict[str, tuple[ast.ClassDef, ast.Module]]:
    """Every class of the repository that is derived from autograd's Function, by file and name."""
    found = {}
    for folder in ("kernels", "models", "trainer", "launch"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            module = ast.parse(path.read_text(encoding="utf-8"))
            for node in ast.walk(module):
                bases = [ast.unparse(base) for base in node.bases] if isinstance(node, ast.ClassDef) else []
                if isinstance(node, ast.ClassDef) and any(base.split(".")[-1] == "Function" for base in bases):
                    found[f"{path.relative_to(ROOT)}:{node.name}"] = node, module
    return found


def test_every_backward_of_our_own_refuses() -> None:
    functions = own_functions()
    assert len(functions) >= 35, "the search has lost some"
    for name, (node, module) in functions.items():
        backward = next(part for part in node.body if isinstance(part, ast.FunctionDef) and part.name == "backward")
        assert [ast.unparse(d) for d in backward.decorator_list][:2] == ["staticmethod", "once_differentiable"], name
        origins = {
            imported.module
            for imported in ast.walk(module)
            if isinstance(imported, ast.ImportFrom)
            and any(alias.name == "once_differentiable" for alias in imported.names)
        }
        assert origins == {"kernels.autograd"}, (
            f"{name}: torch's lets second derivatives pass that depend on inputs alone"
        )


def _rotate(x: Tensor) -> Tensor:
    return apply_rotary(x[None, :, None], *rotary_tables(torch.arange(len(x)), 8, 10.0), backend="torch")


def _recur(x: Tensor) -> Tensor:
    heads = x[None, :, None]
    per_token = -x.square().sum(-1)[None, :, None]
    return gated_delta_rule(heads, heads, heads, per_token, per_token.exp(), backend="torch")[0]


ROWS = torch.tensor([1, 0, 2, 4, 3])
MAP = torch.eye(5, dtype=torch.bool)

# Of x [5, 8], through torch's backends.
OPS: dict[str, Callable[[Tensor], Tensor]] = {
    "attention": lambda x: attention(*[x[None, :, None]] * 3, backend="banded"),
    "causal_conv1d": lambda x: causal_conv1d(x[None], x[:2].T, backend="torch")[0],
    "dense_to_sparse_gate": lambda x: dense_to_sparse_gate(x, 0.7, 0.1, backend="torch")[1],
    "distillation_kl": lambda x: distillation_kl(x, x, x.flip(0), x, backend="torch")[0],
    "gated_delta_rule": _recur,
    "gated_rms_norm": lambda x: gated_rms_norm(x, x, x[0], 1e-6, backend="torch"),
    "gla": lambda x: gla(*[x[None, :, None]] * 3, -x[None, :, None].square(), backend="torch")[0],
    "grouped_linear": lambda x: grouped_linear(x, x[None], torch.tensor([5]), backend="torch"),
    "hgrn": lambda x: hgrn(x[None], -x[None].square(), backend="torch")[0],
    "l2_norm": lambda x: l2_norm(x, backend="torch"),
    "linear_cross_entropy": lambda x: linear_cross_entropy(x, x, torch.arange(5), backend="torch")[0],
    "permute": lambda x: permute(x, MAP, backend="torch")[0] ** 2,
    "retention": lambda x: retention(*[x[None, :, None]] * 3, -x[0, :1].square(), backend="torch")[0],
    "rms_norm": lambda x: rms_norm(x, x[0], 1e-6, backend="torch"),
    "rotary": lambda x: _rotate(x).square(),
    "spike": lambda x: spike(x, k=x[0].exp(), gradient="surrogate", backend="torch"),
    "spike, plain": lambda x: spike(x, k=3.0, backend="torch"),
    "swiglu": lambda x: swiglu(x, x, backend="torch"),
    "swiglu_packed": lambda x: swiglu_packed(x, backend="torch"),
    "token_log_probs": lambda x: token_log_probs(x, x, torch.arange(5), backend="torch")[0],
    "token_log_probs, entropies": lambda x: token_log_probs(x, x, torch.arange(5), backend="torch")[1],
    "top_k_gate": lambda x: top_k_gate(x, 2, backend="torch")[1],
    "unpermute": lambda x: unpermute(x, ROWS, 5, x[:, 0], backend="torch"),
}


@pytest.mark.parametrize("name", OPS)
def test_a_penalty_on_a_gradient_is_refused(name: str) -> None:
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    (first,) = torch.autograd.grad(OPS[name](x).sum(), x)
    (recorded,) = torch.autograd.grad(OPS[name](x).sum(), x, create_graph=True)
    torch.testing.assert_close(recorded, first, rtol=1e-12, atol=1e-12)
    with pytest.raises(RuntimeError, match="second derivatives: the kernels' hand-written"):
        recorded.square().sum().backward()


def test_results_that_are_missing_and_graphs_of_other_things() -> None:
    class Half(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor, y: Tensor) -> Tensor:
            return x * 3 + y.detach()

        @staticmethod
        @once_differentiable
        def backward(ctx: object, grad: Tensor) -> tuple[Tensor, None]:
            return grad * 3, None

    x, y, z = (torch.tensor(value, requires_grad=True) for value in (1.0, 2.0, 5.0))
    gradients = torch.autograd.grad(Half.apply(x, y) + z**3, (x, z), create_graph=True)
    assert [gradient.item() for gradient in gradients] == [3.0, 75.0]
    gradients[1].backward()  # the part that has second derivatives keeps them
    assert z.grad.item() == 30.0
    with pytest.raises(RuntimeError, match="second derivatives: the kernels"):
        gradients[0].backward()
