"""Spawned experts: together they are the first one, each lacks weights of its own, and the gate begins with them."""

import pytest
import torch

from models.config import DenseToSparseConfig, ModelConfig, MoEConfig, RouterConfig
from models.decoder import Decoder, initialize
from models.moe.spawning import expected_gates, expert_weights, masked_copy, spawned
from models.moe.statistics import begin_step, collect, finish_step, metrics, routers
from models.parameters import WHOLE

VOCABULARY = 32
GATES = {
    "top-k": RouterConfig(top_k=2),
    "normalised": RouterConfig(top_k=2, normalize="after"),
    "sigmoid": RouterConfig(score="sigmoid", normalize="none"),
    "dense-to-sparse": RouterConfig(gate="dense_to_sparse"),
    "noise": RouterConfig(
        gate="dense_to_sparse", dense_to_sparse=DenseToSparseConfig(gumbel_noise=True, max_experts_start=2)
    ),
}


def build(gate="top-k", step=10, **changes):
    moe = MoEConfig(num_experts=4, shared_experts=1, router=GATES[gate], spawn_step=step, **changes)
    model = Decoder(ModelConfig(num_layers=2, hidden_size=32, ffn_hidden_size=48, init_std=0.2, moe=moe), VOCABULARY)
    initialize(model, 0)
    return model


def spawn(model, seed=0):
    with torch.no_grad():
        for name, weight, writes_output in expert_weights(model):
            weight.copy_(spawned(weight, name, writes_output, model.model_config.moe, seed, WHOLE))


def loss(model, step):
    tokens = torch.randint(VOCABULARY, (4, 33), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(32).expand(4, -1)
    begin_step([model], step)
    return model(tokens[:, :-1], positions, labels=tokens[:, 1:])[0]


@pytest.mark.parametrize("gate", GATES)
def test_the_copies_do_together_what_the_first_expert_did(gate):
    """Exactly, where every token's gates add up to the same: the output is linear in the last matrix."""
    model = build(gate, spawn_diversify=0.0)
    before = loss(model, 9).item()
    spawn(model)
    after = loss(model, 10).item()
    assert after == pytest.approx(before, rel=2e-2 if gate == "noise" else 2e-4)
    dense = build(gate)
    assert loss(dense, 10).item() != pytest.approx(before, rel=1e-3), "the experts would not be copies"


def test_before_only_the_first_expert_learns_and_all_parameters_have_a_gradient():
    model = build("dense-to-sparse")
    loss(model, 9).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    for layer in model.layers.values():
        assert torch.count_nonzero(layer.ffn.router.weight.grad) == 0
        for weight in layer.ffn.experts.parameters():
            norms = weight.grad.flatten(1).norm(dim=1)
            assert norms[0] > 0 and torch.count_nonzero(norms[1:]) == 0


def test_the_first_expert_is_a_feed_forward_without_a_gate():
    model = build()
    layer = model.layers["1"].ffn
    begin_step([model], 0)
    x = torch.randn(5, 2, 32)
    counts = torch.tensor([10, 0, 0, 0])
    alone = layer.experts(x.flatten(0, 1), counts).view_as(x) + layer.shared_experts(x)
    torch.testing.assert_close(layer(x), alone)


def test_a_matrix_that_is_masked_lacks_its_share():
    matrix = torch.rand(200, 300) + 1
    one, other = (masked_copy(matrix, 0.2, 0, name) for name in ("one", "other"))
    assert (one == 0).float().mean().item() == pytest.approx(0.2, abs=0.01)
    assert not torch.equal(one == 0, other == 0)
    torch.testing.assert_close(one[one != 0], (matrix / 0.8)[one != 0])
    assert torch.equal(masked_copy(matrix, 0.0, 0, "one"), matrix)
    assert torch.equal(masked_copy(matrix, 0.2, 0, "one"), one)


def test_masks_are_drawn_by_seed_and_name():
    models = [build(spawn_diversify=0.25) for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        spawn(model, seed)
    one, same, other = (model.layers["1"].ffn.experts.up_proj.weight for model in models)
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert len({tuple(mask.flatten().tolist()) for mask in one == 0}) == 4, "each copy lacks others"
    assert not torch.equal(one == 0, models[0].layers["0"].ffn.experts.up_proj.weight == 0)


def test_the_gate_s_schedules_begin_with_the_experts():
    sparse = DenseToSparseConfig(plateau_steps=2, decay_steps=4, temperature_end=0.2, hard_top_k_after=8)
    moe = MoEConfig(num_experts=8, router=RouterConfig(gate="dense_to_sparse", dense_to_sparse=sparse), spawn_step=10)
    assert [moe.experts_at(step) for step in (0, 9, 10, 12, 14, 16, 18, None)] == [1, 1, 8, 8, 5, 2, 2, 2]
    model = Decoder(ModelConfig(num_layers=1, hidden_size=32, ffn_hidden_size=48, moe=moe), VOCABULARY)
    initialize(model, 0)
    temperatures = []
    for step in (10, 14, 20):
        loss(model, step)
        temperatures.append(metrics(model.model_config, collect([model], model.model_config))["moe/temperature"])
    assert temperatures == pytest.approx([1.0, 0.6, 0.2])


def test_what_the_only_expert_got_is_no_load():
    router = RouterConfig(bias_update_rate=0.1)
    moe = MoEConfig(num_experts=4, router=router, spawn_step=10)
    model = Decoder(ModelConfig(num_layers=1, hidden_size=32, ffn_hidden_size=48, moe=moe), VOCABULARY)
    initialize(model, 0)
    (state,) = routers([model]).values()
    for step, moved in ((9, False), (10, True)):
        loss(model, step)
        counted = collect([model], model.model_config)
        finish_step([model], model.model_config, counted)
        assert (state.load == 0.25).all().item() is not moved
        assert (state.bias == 0).all().item() is not moved
    assert metrics(model.model_config, counted)["moe/experts_per_token"] == 2


def test_routers_start_near_zero():
    (weight,) = (router.weight for layer, router in routers([build()]).items() if layer == 0)
    assert weight.std().item() == pytest.approx(1e-3, rel=0.3)
    moe = MoEConfig(num_experts=4, router=GATES["normalised"], spawn_step=3)
    assert expected_gates(moe) == pytest.approx(1.0), "of the gate, not of the time before it"
