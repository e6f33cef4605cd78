"""What is counted of routers, and what follows from it."""

import math

import pytest
import torch

from models.config import MoEConfig, RouterConfig, RouterLossConfig
from models.decoder import Decoder, initialize
from models.moe.statistics import begin_step, collect, finish_step, metrics, routers, set_step
from tests.helpers import VOCABULARY, draw_tokens, tiny_model_config

CONFIG = tiny_model_config(
    num_layers=4,
    moe=MoEConfig(
        num_experts=4, dense_layers=[1], router=RouterConfig(bias_update_rate=0.5), losses=RouterLossConfig(balance=1.0)
    ),
)
# Layers 0, 2 and 3: loads, then dropped, entropy, balance, z, temperature, replicated, tokens.
TOTALS = [
    *(8.0, 8.0, 8.0, 8.0, 2.0, 16 * math.log(4), 16.0, 8.0, 8.0, 32.0, 16.0),
    *(16.0, 0.0, 0.0, 0.0, 0.0, 0.0, 48.0, 0.0, 16.0, 0.0, 16.0),
    *(6.0, 2.0, 4.0, 4.0, 1.0, 16.0, 32.0, 16.0, 24.0, 16.0, 16.0),
]


def build(layers=None):
    model = Decoder(CONFIG, VOCABULARY, layers)
    initialize(model, 0)
    return model


def test_metrics_of_known_counts():
    found = metrics(CONFIG, TOTALS)
    load = found.pop("moe/load")
    assert load == [[0.25] * 4, [1.0, 0.0, 0.0, 0.0], [0.375, 0.125, 0.25, 0.25]]
    assert found == pytest.approx(
        {
            "moe/experts_per_token": (30 + 16 + 15) / 48,
            "moe/load_cv": (0 + math.sqrt(3) + math.sqrt(2) / 4) / 3,
            "moe/max_load": (1 + 4 + 1.5) / 3,
            "moe/entropy": (math.log(4) + 0 + 1) / 3,
            "moe/dropped_tokens": 3,
            "moe/dead_experts": 3,
            "moe/replicated_experts": 3,
            "moe/balance_loss": (1 + 3 + 2) / 3,
            "moe/z_loss": 0.5,
            "moe/temperature": 1.0,
        }
    )


def test_bias_and_load_follow_the_batch():
    """Experts above the mean load lose, those below gain, those at it keep their bias (arXiv 2408.15664)."""
    model = build()
    finish_step([model], CONFIG, TOTALS)
    found = routers([model])
    assert list(found) == [0, 2, 3]
    assert found[0].bias.tolist() == [0.0] * 4
    assert found[2].bias.tolist() == [-0.5, 0.5, 0.5, 0.5]
    assert found[3].bias.tolist() == [-0.5, 0.5, 0.0, 0.0]
    assert found[3].load.tolist() == [0.375, 0.125, 0.25, 0.25]
    state = model.state_dict()
    assert "layers.2.ffn.router.bias" in state and "layers.2.ffn.router.load" in state


def test_a_bias_moves_the_choice_and_no_gate():
    model = build()
    router = routers([model])[0].eval()
    x = torch.randn(50, 1, 32)
    before = router(x)
    router.bias += torch.tensor([0.0, 0.0, 0.0, 100.0])
    after = router(x)
    assert after.routing_map[:, 3].all() and not before.routing_map[:, 3].all()
    both = before.routing_map & after.routing_map
    assert torch.equal(before.gates[both], after.gates[both])


def test_micro_batches_and_stages_add_up():
    """Two stages of two micro-batches each, summed as ranks would be, against the whole model."""
    whole = build()
    stages = [build(range(2)), build(range(2, 4))]
    tokens, positions = draw_tokens(2, 12), torch.arange(12)[None]
    for models in ([whole], stages):
        begin_step(models, 7)
    for row in tokens.split(1):
        whole(row, positions, labels=row)
        hidden = stages[0].hidden_states(row, positions)
        stages[1].hidden_states(row, positions, entering=hidden)
    parts = [collect([stage], CONFIG) for stage in stages]
    assert [sum(pair) for pair in zip(*parts, strict=True)] == pytest.approx(collect([whole], CONFIG))
    counts = torch.tensor(collect([whole], CONFIG)).view(3, -1)
    assert counts[:, -1].tolist() == [24.0] * 3 and counts[:, :4].sum(-1).tolist() == [48.0] * 3
    begin_step([whole], 8)
    assert not any(collect([whole], CONFIG)), "a step counts from zero"


def test_a_dense_model_counts_nothing():
    config = tiny_model_config()
    model = Decoder(config, VOCABULARY)
    begin_step([model], 0)
    assert collect([model], config) == [] and metrics(config, []) == {}
    finish_step([model], config, [])


def test_steps_reach_every_router():
    model = build()
    assert {router.step for router in routers([model]).values()} == {None}
    set_step([model], 5)
    assert {router.step for router in routers([model]).values()} == {5}
