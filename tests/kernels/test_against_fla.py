"""The linear attentions against fla-core's naive references: an oracle that we did not write."""

import importlib
import sys
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.linear_attention import delta_rule, gated_delta_rule, gla, hgrn, hgrn2, retention
from tests.kernels.test_linear_attention import assert_same, make_inputs

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="fla-core needs Triton, which is for Linux")


def naive(module: str, name: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that there is no GPU
        return getattr(importlib.import_module(f"fla.ops.{module}.naive"), name)


def heads_first(*tensors: Tensor) -> list[Tensor]:
    return [x.transpose(1, 2) for x in tensors]


def fla_gla(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    return naive("gla", "naive_recurrent_gla")(q, k, v, log_decay)[0]


def fla_hgrn2(q: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    return fla_gla(q, 1 - log_decay.exp(), v, log_decay)


def fla_hgrn(x: Tensor, log_decay: Tensor) -> Tensor:
    return naive("hgrn", "naive_recurrent_hgrn")(x, log_decay)[0]


def fla_delta_rule(q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
    return naive("delta_rule", "delta_rule_recurrence")(*heads_first(q, k, v, beta))[0].transpose(1, 2)


def fla_gated_delta_rule(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor) -> Tensor:
    return naive("gated_delta_rule", "naive_recurrent_gated_delta_rule")(q, k, v, beta, log_decay)[0]


def fla_kda(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor) -> Tensor:
    return naive("kda", "naive_recurrent_kda")(q, k, v, log_decay, beta)[0]


CASES = {
    "gla": (gla, fla_gla),
    "hgrn": (hgrn, fla_hgrn),
    "hgrn2": (hgrn2, fla_hgrn2),
    "delta_rule": (delta_rule, fla_delta_rule),
    "gated_delta_rule": (gated_delta_rule, fla_gated_delta_rule),
    "kimi_delta_rule": (gated_delta_rule, fla_kda),
}


@pytest.mark.parametrize("time", [1, 70, 200])
@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_are_those_of_fla(name: str, time: int) -> None:
    ours, theirs = CASES[name]
    inputs = make_inputs(name, 2, time, dtype=torch.float32)
    weight = torch.randn(ours(*inputs)[0].shape, generator=torch.Generator().manual_seed(1))

    def outputs_and_gradients(o: Tensor) -> list[Tensor]:
        return [o, *torch.autograd.grad((o * weight).sum(), inputs)]

    expected = outputs_and_gradients(theirs(*inputs))
    assert_same(outputs_and_gradients(ours(*inputs)[0]), expected, 1e-5)


def test_retention_with_the_paper_s_decays_is_that_of_fla() -> None:
    q, k, v, _ = make_inputs("retention", 2, 150, dtype=torch.float32)
    log_decay = torch.log1p(-(2.0 ** (-5 - torch.arange(2))))
    expected = naive("retention", "naive_retention")(*heads_first(q, k, v)).transpose(1, 2)
    actual, _ = retention(q, k, v, log_decay)
    loss = torch.randn(actual.shape, generator=torch.Generator().manual_seed(1))
    gradients = [torch.autograd.grad((o * loss).sum(), (q, k, v)) for o in (actual, expected)]
    assert_same([actual, *gradients[0]], [expected, *gradients[1]], 1e-5)
