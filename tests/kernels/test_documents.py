"""Packed documents: what they refuse, and that what they keep is fit for every kind of run, whichever asks first."""

import ast
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels.attention import attention
from kernels.convolution import causal_conv1d
from kernels.documents import Documents, sequences_in
from kernels.linear_attention import delta_rule, gated_delta_rule, gla, hgrn, hgrn2, retention
from kernels.triton import usable
from tests.helpers import documents_of

ROOT = Path(__file__).resolve().parents[2]
DIM = 16
BACKENDS = ["torch", *(["triton"] if usable(torch.empty(0)) else [])]


def test_no_other_cache_holds_tensors() -> None:
    plain = {"None", "bool", "int", "float", "str", "ModuleType | None"}
    for folder in ("kernels", "models"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                decorators = [ast.unparse(d) for d in getattr(node, "decorator_list", ())]
                if path.name != "documents.py" and any("lru_cache" in d or d.endswith("cache") for d in decorators):
                    assert node.returns and ast.unparse(node.returns) in plain, f"{path}: {node.name}: Documents.made"


def test_kept_tensors_are_plain_and_made_once() -> None:
    made = []

    def ones(bounds: tuple[int, ...], size: int) -> Tensor:
        made.append((bounds, size))
        return torch.ones(size)

    documents = Documents((0, 2, 5))
    with torch.inference_mode():
        assert not documents.made(ones, 3).is_inference()
    with FakeTensorMode():
        documents.made(ones, 4)
    assert documents.made(ones, 4).tolist() == [1.0] * 4 and documents.made(ones, 3) is documents.made(ones, 3)
    assert made == [((0, 2, 5), 3), ((0, 2, 5), 4)]


def test_rows_are_kept_from_layer_to_layer() -> None:
    assert sequences_in(3, 4, None).bounds == (0, 4, 8, 12)
    assert sequences_in(3, 4, None) is sequences_in(3, 4, None)


def test_what_documents_know() -> None:
    documents = Documents.of(torch.tensor([0, 3, 4, 9]))
    assert documents == documents_of([3, 1, 5]) and documents != documents_of([4, 5])
    assert (len(documents), documents.tokens, documents.lengths) == (3, 9, (3, 1, 5))
    bounds = documents.cu_seqlens(torch.device("cpu"))
    assert bounds.dtype == torch.int32 and bounds.tolist() == [0, 3, 4, 9]
    assert documents.cu_seqlens(torch.device("cpu")) is bounds
    assert documents.cu_seqlens(torch.device("meta")).is_meta
    assert sequences_in(1, 9, documents) is documents


@pytest.mark.parametrize("bounds", [(), (0,), (1, 3), (0, 0), (0, 3, 3), (0, 3, 2, 5), (-1, 4)])
def test_bounds_that_do_not_rise_from_0(bounds: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="cu_seqlens must"):
        Documents(bounds)


def test_documents_of_another_row() -> None:
    with pytest.raises(ValueError, match="cu_seqlens must run from 0 to T = 8, got 0 … 9"):
        sequences_in(1, 8, documents_of([9]))
    with pytest.raises(ValueError, match="batch size must be 1, got 2"):
        sequences_in(2, 9, documents_of([9]))


@pytest.mark.parametrize("tensor", [torch.zeros(2, 2, dtype=torch.int32), torch.tensor([0.0, 3.0]), torch.tensor(3)])
def test_tensors_that_are_no_bounds(tensor: Tensor) -> None:
    with pytest.raises(ValueError, match=r"cu_seqlens must be int32 \[N\+1\]"):
        Documents.of(tensor)


def _heads(x: Tensor) -> Tensor:
    return x.view(1, -1, 1, DIM)


OPS: dict[str, Callable[..., tuple[Tensor, Tensor | None]]] = {
    "causal_conv1d": lambda x, **options: causal_conv1d(x, x[0, :4].T, **options),
    "delta_rule": lambda x, **options: delta_rule(*[_heads(x)] * 3, x[..., :1].sigmoid(), **options),
    "gated_delta_rule": lambda x, **options: gated_delta_rule(
        *[_heads(x)] * 3, -x[..., :1].square(), x[..., :1].sigmoid(), **options
    ),
    "gla": lambda x, **options: gla(*[_heads(x)] * 3, -_heads(x).square(), **options),
    "hgrn": lambda x, **options: hgrn(x, -x.square(), **options),
    "hgrn2": lambda x, **options: hgrn2(*[_heads(x)] * 2, -_heads(x).square(), **options),
    "retention": lambda x, **options: retention(*[_heads(x)] * 3, -x[0, 0, :1].square(), **options),
}


@pytest.mark.parametrize("name", OPS)
def test_what_layers_share_is_made_by_the_first(name: str) -> None:
    documents, x = documents_of([3, 7, 2]), torch.randn(1, 12, DIM)
    OPS[name](x, documents=documents, backend="torch")
    made = dict(documents._made)
    OPS[name](x, documents=documents, backend="torch")
    assert made and documents._made == made


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OPS)
def test_training_after_inference(name: str, backend: str) -> None:
    documents = documents_of([3, 7, 2])
    x = torch.randn(1, 12, DIM, generator=torch.Generator().manual_seed(0)) / 4
    options = {"documents": documents, "output_final_state": True, "backend": backend}
    with torch.inference_mode():
        scored, _ = OPS[name](x, **options)
    x.requires_grad_()
    y, state = OPS[name](x, **options)
    assert torch.equal(y, scored.clone())
    (y.sum() + state.sum()).backward()
    assert x.grad.isfinite().all() and x.grad.any()


def test_kernels_take_the_bounds_as_a_tensor_too():
    """As flash-attn and fla name them; also where they were first used in inference mode."""
    x, weight = torch.randn(1, 12, 4), torch.randn(4, 3)
    bounds = torch.tensor([0, 5, 12], dtype=torch.int32)
    expected, _ = causal_conv1d(x, weight, documents=Documents((0, 5, 12)))
    with torch.inference_mode():
        causal_conv1d(x, weight, cu_seqlens=bounds)
    y, state = causal_conv1d(x.requires_grad_(), weight, cu_seqlens=bounds, output_final_state=True)
    assert torch.equal(y, expected)
    (y.sum() + state.sum()).backward()
    q, k, v = (torch.randn(1, 12, 2, 8) for _ in range(3))
    assert torch.equal(attention(q, k, v, cu_seqlens=bounds), attention(q, k, v, documents=Documents((0, 5, 12))))
    with pytest.raises(ValueError, match="documents and cu_seqlens are the same bounds: give one of them"):
        attention(q, k, v, cu_seqlens=bounds, documents=Documents((0, 5, 12)))
