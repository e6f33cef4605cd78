"""What a new mixer takes: a class and a row of the registry. Everything else follows from what they declare."""

from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from models.config import MIXERS, MixerType
from models.decoder import Decoder, build, flops_per_token, initialize
from models.layers import RMSNorm
from models.mixers.base import LayerCache, Mixer, SequenceInfo
from models.parallel import ColumnLinear, RowLinear
from models.parameters import Groups, Placement, ones, parameter_rows, partial_gradients
from models.saved_activations import EVERYTHING, RECOMPUTE, BlockPolicy
from tests.helpers import VOCABULARY, draw_tokens, tiny_model_config
from trainer.config import ParallelConfig
from trainer.planning.dry_run import Cut, DryRun


class Shift(Mixer):
    """y_t = W_o (s * RMSNorm(W_v x_(t-1))), a gain s for each channel."""

    placements: ClassVar = {"gain": Placement(ones, shard_axis=0, float32=True, decayed=False)}

    def __init__(self, config):
        super().__init__()
        size = config.hidden_size
        self.v_proj = ColumnLinear(size, size, bias=False)
        self.norm = RMSNorm(8, config.norm_eps)
        self.gain = nn.Parameter(torch.empty(size))
        self.o_proj = RowLinear(size, size, bias=False)

    def forward(self, x: Tensor, info: SequenceInfo, cache: LayerCache | None = None) -> Tensor:
        v = self.norm(self.v_proj(x).unflatten(-1, (-1, 8))).flatten(-2)
        return self.o_proj(nn.functional.pad(v, (0, 0, 0, 0, 1, 0))[:-1] * self.gain.to(v.dtype))


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    shift = MixerType(
        f"{__name__}.Shift",
        None,
        state=lambda model: (1, 1, model.hidden_size),
        state_products=0,
        shared=lambda model: {"hidden_size / 8": model.hidden_size // 8},
    )
    monkeypatch.setitem(MIXERS, "shift", shift)


def test_it_trains_beside_the_others():
    config = tiny_model_config("shift, full_attention")
    model = Decoder(config, VOCABULARY)
    initialize(model, 0)
    tokens = draw_tokens(2, 12)
    positions = torch.arange(12).expand(2, 12)
    before, _ = model(tokens, positions, labels=tokens)
    before.backward()
    assert all(parameter.grad.norm() > 0 for parameter in model.layers["0"].mixer.parameters())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 1e-4 * parameter.grad
        after, _ = model(tokens, positions, labels=tokens)
    assert after < before
    assert flops_per_token(model, 12) > 0


def test_what_it_declares_is_what_ranks_do():
    config = tiny_model_config("shift")
    rows = parameter_rows(build(config, VOCABULARY, dtype=torch.bfloat16))
    gain = rows["layers.0.mixer.gain"]
    assert gain.tensor.dtype == torch.float32 and not gain.placement.decayed and gain.axis == 0
    shared = partial_gradients(Decoder(config, VOCABULARY), Groups(tensor=object()))
    assert [parameter.shape for parameter in shared] == [(8,)] * config.num_layers
    with pytest.raises(ValueError, match=r"model.hidden_size / 8=\d+ does not divide by parallel.tensor=5"):
        ParallelConfig(tensor=5).require_divisible(replace(config, vocab_multiple=5, ffn_hidden_size=50))


def test_it_is_planned():
    config = tiny_model_config("shift, full_attention")
    run = DryRun(config, VOCABULARY, torch.float32)
    halves = [run.parameters(range(1), Cut(tensor=ranks)) for ranks in (1, 2)]
    sizes = [{spec.name: spec.numel for spec in found} for found in halves]
    assert sizes[0]["layers.0.mixer.gain"] == 2 * sizes[1]["layers.0.mixer.gain"]
    assert run.kept(0, Cut(), 64, EVERYTHING) > run.kept(0, Cut(), 64, BlockPolicy(mixer=RECOMPUTE))
