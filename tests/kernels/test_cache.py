"""What is cached is fit for every kind of run, whichever asks first."""

import ast
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels.cache import cache_tensors
from kernels.convolution import causal_conv1d
from kernels.linear_attention import delta_rule, gated_delta_rule, gla, hgrn, hgrn2, retention
from kernels.triton import usable

ROOT = Path(__file__).resolve().parents[2]
DIM = 16
BACKENDS = ["torch", *(["triton"] if usable(torch.empty(0)) else [])]


def test_no_other_cache_holds_tensors() -> None:
    plain = {"None", "bool", "int", "float", "str", "ModuleType | None"}
    for folder in ("kernels", "models"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                decorators = [ast.unparse(d) for d in getattr(node, "decorator_list", ())]
                if path.name != "cache.py" and any("lru_cache" in d or d.endswith("cache") for d in decorators):
                    assert node.returns and ast.unparse(node.returns) in plain, f"{path}: {node.name}: cache_tensors"


def test_kept_tensors_are_plain_and_made_once() -> None:
    made = []

    @cache_tensors
    def ones(size: int) -> Tensor:
        made.append(size)
        return torch.ones(size)

    with torch.inference_mode():
        assert not ones(3).is_inference()
    with FakeTensorMode():
        ones(4)
    assert ones(4).tolist() == [1.0] * 4 and ones(3) is ones(3)
    assert made == [3, 4]


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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OPS)
def test_training_after_inference(name: str, backend: str) -> None:
    # Lengths that no other test has, so that this one asks first.
    lengths = [3, 7 + list(OPS).index(name), 2 + BACKENDS.index(backend)]
    cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    x = torch.randn(1, sum(lengths), DIM, generator=torch.Generator().manual_seed(0)) / 4
    options = {"cu_seqlens": cu_seqlens, "output_final_state": True, "backend": backend}
    with torch.inference_mode():
        scored, _ = OPS[name](x, **options)
    x.requires_grad_()
    y, state = OPS[name](x, **options)
    assert torch.equal(y, scored.clone())
    (y.sum() + state.sum()).backward()
    assert x.grad.isfinite().all() and x.grad.any()
