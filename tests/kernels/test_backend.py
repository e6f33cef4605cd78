"""The choice of an implementation: argument, environment, first available."""

import inspect
import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels import backend
from kernels.backend import resolve
from kernels.linear_attention import delta_rule, driver, gated_delta_rule, gla, hgrn2, retention
from kernels.moe import dense_to_sparse_gate, grouped_linear, top_k_gate
from kernels.norms import gated_rms_norm, l2_norm, rms_norm
from kernels.spiking import spike
from kernels.triton import LARGEST_KEY, LARGEST_ROW, implementations

AVAILABLE = ("triton", "torch", "reference")


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPIKETRAIN_BACKEND", raising=False)
    monkeypatch.setattr(backend, "_logged", set())


@pytest.mark.parametrize(
    ("argument", "environment", "expected"),
    [
        ("auto", "", "triton"),
        ("auto", "auto", "triton"),
        ("auto", "reference", "reference"),
        ("torch", "reference", "torch"),
        ("auto", "gla=reference,attention=sdpa", "reference"),
        ("auto", "attention=sdpa", "triton"),
        ("auto", "torch, gla = reference", "reference"),
        ("auto", "gla=torch,reference", "torch"),
        ("auto", "gla=auto,reference", "triton"),
    ],
)
def test_argument_then_environment_then_first(
    monkeypatch: pytest.MonkeyPatch, argument: str, environment: str, expected: str
) -> None:
    monkeypatch.setenv("SPIKETRAIN_BACKEND", environment)
    assert resolve("gla", argument, AVAILABLE) == expected


@pytest.mark.parametrize(("argument", "environment"), [("trition", ""), ("auto", "gla=trition"), ("auto", "trition")])
def test_unknown_name_lists_what_exists(monkeypatch: pytest.MonkeyPatch, argument: str, environment: str) -> None:
    monkeypatch.setenv("SPIKETRAIN_BACKEND", environment)
    with pytest.raises(ValueError, match=r"gla.*'trition'.*triton, torch, reference"):
        resolve("gla", argument, AVAILABLE)


def test_each_choice_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="spiketrain"):
        for choice in ("torch", "torch", "reference", "torch"):
            resolve("gla", choice, AVAILABLE)
        resolve("hgrn", "torch", AVAILABLE)
    assert [record.getMessage() for record in caplog.records] == [
        "gla: backend torch",
        "gla: backend reference",
        "hgrn: backend torch",
    ]


def _zeros(*shape: int) -> Tensor:
    return torch.zeros(shape)


# By operation: the name that is resolved, a call for a size, and the largest size that the Triton kernels take.
SIZES: dict[str, tuple[str, Callable[..., object], int]] = {
    "gla": ("gla", lambda k, **b: gla(*[_zeros(1, 2, 1, k)] * 4, **b), LARGEST_KEY),
    "hgrn2": ("gla", lambda k, **b: hgrn2(*[_zeros(1, 2, 1, k)] * 3, **b), LARGEST_KEY),
    "retention": ("retention", lambda k, **b: retention(*[_zeros(1, 2, 1, k)] * 3, _zeros(1), **b), LARGEST_KEY),
    "delta_rule": (
        "gated_delta_rule",
        lambda k, **b: delta_rule(*[_zeros(1, 2, 1, k)] * 3, _zeros(1, 2, 1), **b),
        LARGEST_KEY,
    ),
    "gated_delta_rule": (
        "gated_delta_rule",
        lambda k, **b: gated_delta_rule(*[_zeros(1, 2, 1, k)] * 4, _zeros(1, 2, 1), **b),
        LARGEST_KEY,
    ),
    "rms_norm": ("rms_norm", lambda d, **b: rms_norm(_zeros(2, d), _zeros(d), 1e-6, **b), LARGEST_ROW),
    "gated_rms_norm": (
        "gated_rms_norm",
        lambda d, **b: gated_rms_norm(_zeros(2, d), _zeros(2, d), _zeros(d), 1e-6, **b),
        LARGEST_ROW,
    ),
    "l2_norm": ("l2_norm", lambda d, **b: l2_norm(_zeros(2, d), **b), LARGEST_ROW),
    "spike": ("spike", lambda d, **b: spike(_zeros(2, d), k=3.0, **b), LARGEST_ROW),
    "top_k_gate": ("top_k_gate", lambda e, **b: top_k_gate(_zeros(2, e), 2, **b), LARGEST_ROW),
    "dense_to_sparse_gate": (
        "dense_to_sparse_gate",
        lambda e, **b: dense_to_sparse_gate(_zeros(2, e), 1.0, 0.1, **b),
        LARGEST_ROW,
    ),
    "grouped_linear": (
        "grouped_linear",
        lambda e, **b: grouped_linear(_zeros(0, 1), _zeros(e, 1, 1), torch.zeros(e, dtype=torch.int64), **b),
        LARGEST_ROW - 1,
    ),
}


@pytest.mark.parametrize("name", SIZES)
def test_sizes_that_triton_does_not_take_are_served_without_it(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """As where every kernel can run."""
    offered: list[tuple[str, ...]] = []

    class Chosen(Exception):
        pass

    def choose(op: str, wish: str, available: tuple[str, ...]) -> str:
        offered.append(available)
        resolve(op, wish, available)
        raise Chosen(op)

    op, call, largest = SIZES[name]
    monkeypatch.setattr("kernels.triton.usable", lambda *_: True)
    # Where the operation that is resolved looks for it: the recurrences have one driver.
    module = inspect.getmodule(globals()[op])
    monkeypatch.setattr(module if hasattr(module, "resolve") else driver, "resolve", choose)
    for size in (largest, largest + 1):
        with pytest.raises(Chosen, match=op):
            call(size)
    assert ["triton" in names for names in offered] == [True, False]
    with pytest.raises(
        ValueError, match=f"{op}: argument backend asks for 'triton', which does not .* torch, reference$"
    ):
        call(largest + 1, backend="triton")


def test_triton_comes_first_but_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernels.triton.usable", lambda *_: True)
    for device, offered in (("meta", ("triton", "torch", "reference")), ("cpu", ("torch", "reference", "triton"))):
        x = torch.empty(0, device=device)
        assert implementations(("torch", "reference"), x) == offered
        assert implementations(("torch", "reference"), x, fits=False) == ("torch", "reference")
