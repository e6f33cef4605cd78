"""The layer against the dense feed-forward and a loop over experts; in a decoder: draws, operations, recomputation."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd.graph import saved_tensors_hooks

from models.config import DenseToSparseConfig, MoEConfig, RouterConfig, RouterLossConfig
from models.decoder import Decoder, flops_per_token, initialize
from models.layers import SwiGLU
from models.moe.layer import Experts, MoELayer
from models.moe.statistics import begin_step, collect
from models.parallel import apply_experts
from models.parameters import expert_parameters, parameter_rows
from models.saved_activations import RECOMPUTE, BlockPolicy, Policy
from tests.helpers import VOCABULARY, draw_tokens, tiny_model_config

SPARSE = RouterConfig(gate="dense_to_sparse", dense_to_sparse=DenseToSparseConfig(threshold=0.2, gumbel_noise=True))


def randomized(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return module


def config_with(num_layers=2, **changes):
    return tiny_model_config(num_layers=num_layers, moe=MoEConfig(**{"num_experts": 4} | changes))


@pytest.mark.parametrize("router", [RouterConfig(top_k=1), SPARSE], ids=["top-k", "dense-to-sparse"])
def test_one_expert_is_the_dense_feed_forward(router):
    config = config_with(num_experts=1, router=RouterConfig(gate=router.gate, top_k=1))
    dense, layer = randomized(SwiGLU(config)).double(), MoELayer(config).double()
    with torch.no_grad():
        layer.router.weight.normal_()
        for name, parameter in dense.named_parameters():
            layer.experts.get_parameter(name).copy_(parameter[None])
    x = torch.randn(5, 2, 32, dtype=torch.float64)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    ours, theirs = layer(inputs[0]), dense(inputs[1])
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for output in (ours, theirs):
        output.square().sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-12, atol=1e-12)
    for name, parameter in dense.named_parameters():
        torch.testing.assert_close(layer.experts.get_parameter(name).grad[0], parameter.grad, rtol=1e-12, atol=1e-12)


def loop_over_experts(experts, x_ND, gates_NE, routing_map_NE):
    """Every expert on the tokens that it gets, one at a time, through nothing but matrix products."""
    y = torch.zeros_like(x_ND)
    for e in range(gates_NE.shape[1]):
        tokens = routing_map_NE[:, e].nonzero()[:, 0]
        rows = x_ND[tokens]
        up = rows @ experts.up_proj.weight[e].T
        if experts.activation in ("swiglu", "geglu"):
            act = torch.nn.functional.silu if experts.activation == "swiglu" else torch.nn.functional.gelu
            up = act(rows @ experts.gate_proj.weight[e].T) * up
        else:
            up = torch.nn.functional.gelu(up) if experts.activation == "gelu" else up.relu().square()
        y = y.index_add(0, tokens, (up @ experts.down_proj.weight[e].T) * gates_NE[tokens, e, None])
    return y


@settings(deadline=None, derandomize=True, max_examples=25)
@given(
    st.integers(0, 20), st.integers(1, 5), st.floats(0, 1), st.sampled_from(["swiglu", "geglu", "gelu", "relu_squared"])
)
def test_groups_equal_a_loop_over_experts(tokens, experts, share, activation):
    """Forward and backward, with any number of experts a token, none too, and experts without tokens."""
    module = randomized(Experts(config_with(num_experts=experts, router=RouterConfig(top_k=1), activation=activation)))
    module.double()
    generator = torch.Generator().manual_seed(tokens)
    routing_map = torch.rand(tokens, experts, generator=generator) < share
    routing_map[:, 0] = False
    leaves = [torch.randn(tokens, size, generator=generator, dtype=torch.float64) for size in (32, experts)]
    results = []
    for apply in (lambda *a: apply_experts(*a, module), lambda *a: loop_over_experts(module, *a)):
        x, gates = (leaf.clone().requires_grad_() for leaf in leaves)
        module.zero_grad()
        y = apply(x, gates, routing_map)
        y.square().sum().backward()
        zero = torch.zeros(())
        grads = [zero if p.grad is None else p.grad.clone() for p in (x, gates, *module.parameters())]
        results.append([y, *grads])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs.expand_as(ours), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("gated", [False, True])
def test_shared_experts_are_added(gated):
    config = config_with(shared_experts=2, shared_expert_gate=gated)
    layer = randomized(MoELayer(config)).double()
    x = torch.randn(5, 2, 32, dtype=torch.float64)
    whole, shared = layer(x), layer.shared_experts(x)
    if gated:
        shared = shared * torch.sigmoid(x @ layer.shared_expert_gate.weight.T)
    assert layer.shared_experts.up_proj.weight.shape == (2 * 48, 32)
    layer.shared_experts = None
    torch.testing.assert_close(layer(x) + shared, whole)


def build(seed=0, **changes):
    model = Decoder(config_with(**changes), VOCABULARY)
    initialize(model, seed)
    begin_step([model], 0)
    return model


def loss_of(model, rows=2, length=24):
    tokens = draw_tokens(rows, length)
    positions = torch.arange(length).expand(rows, length)
    return model(tokens, positions, labels=tokens)[0]


def test_layers_keep_their_draws_whatever_stands_beside_them():
    """And experts start as a dense feed-forward's matrices do."""
    model, other = build(num_layers=3, dense_layers=[1]), build(num_layers=3, shared_experts=1)
    ours, theirs = dict(model.named_parameters()), dict(other.named_parameters())
    assert torch.equal(ours["layers.2.ffn.experts.up_proj.weight"], theirs["layers.2.ffn.experts.up_proj.weight"])
    assert isinstance(model.layers["1"].ffn, SwiGLU)
    assert ours["layers.0.ffn.experts.down_proj.weight"].shape == (4, 32, 48)
    for name in ("up_proj", "down_proj"):
        expert, dense = ours[f"layers.0.ffn.experts.{name}.weight"], ours[f"layers.1.ffn.{name}.weight"]
        assert expert.std().item() == pytest.approx(dense.std().item(), rel=0.1)
    seeds = {layer: model.layers[layer].ffn.router.seed for layer in ("0", "2")}
    assert len(set(seeds.values())) == 2


def test_operations_are_those_of_the_active_experts():
    """Of k experts, the shared ones and the router; the number of experts that are not used costs nothing else."""
    dense = Decoder(tiny_model_config(), VOCABULARY)
    one = 3 * 32 * 48
    for experts, k, shared in ((4, 1, 0), (4, 2, 1), (64, 2, 1)):
        model = build(num_experts=experts, shared_experts=shared, router=RouterConfig(top_k=k))
        difference = flops_per_token(model, 24) - flops_per_token(dense, 24)
        assert difference == 6 * 2 * (one * (k + shared - 1) + 32 * experts)
        more = flops_per_token(model, 24, k + 0.5) - flops_per_token(model, 24)
        assert more == 6 * 2 * one * 0.5
    assert sum(weight.numel() for weight in expert_parameters(model)) == 2 * 64 * one


def test_routers_stay_float32():
    names = [name for name, row in parameter_rows(build(router=SPARSE)).items() if row.placement.float32]
    assert names == [f"layers.{layer}.ffn.router.weight" for layer in (0, 1)]


PARTS = [{"ffn"}, {"mixer"}, {"block"}, {"moe_activation"}, {"moe_experts"}, {"moe_activation", "moe_experts", "mixer"}]


@pytest.mark.parametrize("parts", PARTS, ids=lambda parts: "+".join(sorted(parts)))
def test_recomputation_changes_neither_gradients_nor_counts(parts):
    """With noise, capacity and every loss: what a router does twice is the same, and counted once."""
    losses = RouterLossConfig(balance=0.1, scope="micro_batch", z=0.01)
    model = build(router=SPARSE, losses=losses, capacity_factor=1.0, shared_experts=1)
    results = []
    for recomputed in (set(), parts):
        model.keep(Policy(BlockPolicy(**dict.fromkeys(recomputed, RECOMPUTE))))
        model.zero_grad()
        begin_step([model], 3)
        loss = loss_of(model)
        loss.backward()
        results.append((loss.item(), collect([model], model.model_config), [p.grad for p in model.parameters()]))
    (loss, counted, gradients), (loss_2, counted_2, gradients_2) = results
    assert loss == loss_2 and counted == counted_2
    assert all(torch.equal(a, b) for a, b in zip(gradients, gradients_2, strict=True))


def run_with(parts, tokens=32, recompute_above=None, **moe):
    """Bytes that a layer keeps for backward, each storage once and no parameters; its output; its gradients."""
    config = tiny_model_config(moe=MoEConfig(num_experts=4, shared_experts=1, router=RouterConfig(top_k=1), **moe))
    layer = randomized(MoELayer(config))
    layer.policy = BlockPolicy(**dict.fromkeys(parts, RECOMPUTE), recompute_above=recompute_above)
    known, kept, alive = {p.untyped_storage().data_ptr() for p in layer.parameters()}, {}, []

    def pack(tensor):
        # Alive, so that no other storage gets its address.
        alive.append(tensor)
        if tensor.untyped_storage().data_ptr() not in known:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    x = torch.randn(tokens, 1, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with torch.no_grad():
        counts = layer.router(x).routing_map.sum(0)

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x)
    y.square().sum().backward()
    return sum(kept.values()), y.detach(), [x.grad, *(p.grad for p in layer.parameters())], counts


@pytest.mark.parametrize("activation", ["swiglu", "geglu", "relu_squared"])
def test_each_level_of_recomputation_keeps_less(activation):
    """The bytes of tensors [rows, 48]: the routed rows are as many as the tokens, and so are the shared ones."""
    everything, y, gradients, _ = run_with((), activation=activation)
    light, moderate = (run_with({part}, activation=activation) for part in ("moe_activation", "moe_experts"))
    hidden = 2 * 32 * 48 * 4
    assert everything - light[0] >= hidden
    # At least what enters the activation and what leaves it.
    assert everything - moderate[0] >= (2 if activation == "relu_squared" else 3) * hidden
    assert light[0] > moderate[0]
    for _, output, others, _ in (light, moderate):
        assert torch.equal(output, y)
        assert all(torch.equal(a, b) for a, b in zip(others, gradients, strict=True))


@pytest.mark.parametrize("parts", [set(), {"moe_activation"}], ids=["none", "moe_activation"])
def test_busy_experts_recompute_their_activations(parts):
    everything, y, gradients, counts = run_with(parts)
    for above in (0.5, 1.2, 100.0):
        kept, output, others, _ = run_with(parts, recompute_above=above)
        busy = int(counts[counts > above * counts.float().mean()].sum())
        assert (busy > 0) == (above < 100)
        # Gate, up and, where it was kept, their product; less an index and a place for each row, and counts once more.
        saved = busy * 48 * 4 * (2 if parts else 3) - 2 * 32 * 8 - 4 * 8
        assert everything - kept == (saved if busy else 0)
        assert torch.equal(output, y)
        assert all(torch.equal(a, b) for a, b in zip(others, gradients, strict=True))


def test_the_reported_loss_is_the_language_models_alone():
    plain, heavy = (build(losses=RouterLossConfig(balance=b, scope="micro_batch", z=b)) for b in (0.0, 100.0))
    losses = [loss_of(model) for model in (plain, heavy)]
    assert losses[0].item() == losses[1].item()
    for loss in losses:
        loss.backward()
    norms = [model.layers["0"].ffn.router.weight.grad.norm() for model in (plain, heavy)]
    assert norms[1] > 10 * norms[0]
