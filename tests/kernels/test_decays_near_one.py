"""What enters a state where it hardly decays: 1 - a, in float32, to more digits than subtracting from 1 leaves."""

import pytest
import torch
import torch.nn.functional as F

from kernels.linear_attention import hgrn2
from models.mixers import hgrn as mixers
from tests.helpers import tiny_model_config

# 2^-20: 1 - exp(-x) would keep three bits of it.
SMALL = 2.0**-20


def test_hgrn2_kernel() -> None:
    generator = torch.Generator().manual_seed(0)
    q, v = (torch.randn(1, 6, 2, 4, generator=generator) for _ in range(2))
    log_decay = -SMALL * torch.rand(1, 6, 2, 4, generator=generator)
    ours, _ = hgrn2(q, v, log_decay)
    exact, _ = hgrn2(q.double(), v.double(), log_decay.double())
    torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-4 * float(exact.detach().abs().max()))


def test_hgrn_mixer(monkeypatch: pytest.MonkeyPatch) -> None:
    entered = []

    def record(op, entering, log_decay, **options):  # type: ignore[no-untyped-def]
        entered.append(entering.transpose(0, 1))
        return entering

    monkeypatch.setattr(mixers, "run_recurrence", record)
    mixer = mixers.HGRN(tiny_model_config("hgrn"))
    bound = torch.full((32,), 1 - SMALL)
    monkeypatch.setattr(mixer, "lower_bound", lambda info: bound)
    generator = torch.Generator().manual_seed(0)
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    x = torch.randn(5, 1, 32, generator=generator)
    mixer(x, None)
    f, i = (projection(x).double() for projection in (mixer.f_proj, mixer.i_proj))
    exact = F.silu(i) * (1 - bound.double()) * torch.sigmoid(-f)
    torch.testing.assert_close(entered[0].double(), exact, rtol=1e-3, atol=1e-3 * float(exact.detach().abs().max()))
