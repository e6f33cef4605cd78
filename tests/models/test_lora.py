"""Low-rank adapters: what they compute, where they are, what is trained, and what they are merged into."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import functional_call

from models.config import LINEAR_MIXERS, LoraConfig, ModelConfig, MoEConfig, SpikingConfig
from models.decoder import Decoder, initialize, shapes
from models.generation import Engine, Request, Sampling, traced
from models.lora import Lora, factor_names, factors_of_block, merged, missing_adapters
from models.parallel import ColumnLinear, Linear, RowLinear
from models.parameters import declared
from tests.helpers import VOCABULARY, examples, tiny_decoder, tiny_model_config

EXPERTS = MoEConfig(num_experts=4, shared_experts=1, expert_hidden_size=24)
MIXERS = ["full_attention", "gated_delta_net + sliding_window_attention", *LINEAR_MIXERS]


def adapted(pattern="full_attention", b=True, lora=None, **changes):
    """A decoder with adapters; without `b`, their B stays zero."""
    model = tiny_decoder(pattern, lora=lora or LoraConfig(rank=3, alpha=6.0), **changes)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if b and name.endswith("lora.b.weight"):
                parameter.normal_(std=0.1, generator=generator)
    return model


def tokens(rows=2, length=12):
    drawn = torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(2))
    return drawn, torch.arange(length).expand(rows, length)


def without_adapters(model):
    """The decoder whose weights are merged."""
    values = dict(model.named_parameters())
    found = Decoder(replace(model.model_config, lora=LoraConfig()), VOCABULARY)
    initialize(found, 0)
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            a, b = factor_names(name)
            scale = model.model_config.lora.scale
            parameter.copy_(merged(values[name], values[a], values[b], scale) if a in values else values[name])
    return found.to(next(model.parameters()).dtype)


@pytest.mark.parametrize("scaling", ["lora", "rslora"])
@settings(max_examples=examples(20), deadline=None)
@given(st.integers(1, 5), st.integers(1, 9), st.integers(1, 9), st.integers(0, 100))
def test_a_layer_adds_s_b_a_x(scaling, rank, inputs, outputs, seed):
    generator = torch.Generator().manual_seed(seed)
    config = LoraConfig(rank=rank, alpha=3.0, scaling=scaling)
    layer = ColumnLinear(inputs, outputs).double()
    lora = Lora(config, layer).double()
    layer.adapter = lora.__call__
    x = torch.randn(2, 3, inputs, dtype=torch.float64, generator=generator)
    with torch.no_grad():
        for parameter in (layer.weight, layer.bias, lora.a.weight, lora.b.weight):
            parameter.normal_(generator=generator)
    scale = 3.0 / rank if scaling == "lora" else 3.0 / rank**0.5
    weight = layer.weight + scale * lora.b.weight @ lora.a.weight
    torch.testing.assert_close(layer(x), x @ weight.T + layer.bias, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("experts", [False, True])
@pytest.mark.parametrize("pattern", MIXERS)
def test_the_first_output_is_the_bases(pattern, experts):
    changes = {"moe": EXPERTS} if experts else {}
    base, model = tiny_decoder(pattern, **changes), adapted(pattern, b=False, **changes)
    assert len(missing_adapters(model, ())) == 2 * sum(isinstance(module, Lora) for module in model.modules()) > 0
    assert torch.equal(model(*tokens()), base(*tokens()))
    assert not torch.allclose(adapted(pattern, **changes)(*tokens()), base(*tokens()), atol=1e-3)


@pytest.mark.parametrize("experts", [False, True])
@pytest.mark.parametrize("pattern", MIXERS)
def test_merged_weights_compute_the_same(pattern, experts):
    model = adapted(pattern, **({"moe": EXPERTS} if experts else {}))
    ours, theirs = model(*tokens()), without_adapters(model)(*tokens())
    assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


@pytest.mark.parametrize("experts", [False, True])
def test_gradients_are_those_of_merged_weights(experts):
    """In float64: dA = s Bᵀ dW, dB = s dW Aᵀ."""
    model = adapted("gated_delta_net, full_attention", **({"moe": EXPERTS} if experts else {})).double()
    values = {name: parameter.detach() for name, parameter in model.named_parameters()}
    scale, plain = model.model_config.lora.scale, without_adapters(model)
    weights = {}
    for name, parameter in plain.named_parameters():
        a, b = factor_names(name)
        weight = values[name] + scale * values[b] @ values[a] if a in values else values[name]
        weights[name] = weight.requires_grad_()
        del parameter
    drawn, positions = tokens()
    labels = drawn.roll(-1, 1)
    functional_call(plain, weights, (drawn, positions), {"labels": labels})[0].backward()
    model(drawn, positions, labels=labels)[0].backward()
    checked = 0
    for name, weight in weights.items():
        a, b = factor_names(name)
        if a in values:
            factors = dict(model.named_parameters())
            torch.testing.assert_close(factors[a].grad, scale * values[b].mT @ weight.grad, rtol=1e-6, atol=1e-9)
            torch.testing.assert_close(factors[b].grad, scale * weight.grad @ values[a].mT, rtol=1e-6, atol=1e-9)
            checked += 1
    assert checked == sum(isinstance(module, Lora) for module in model.modules())


def test_shards_follow_their_layers():
    """What sharding needs of a factor: rows of B by outputs, columns of A by inputs, experts of both."""
    rows = declared(adapted("full_attention", moe=EXPERTS))
    axes = {
        name: (rows[f"layers.0.{name}.lora.a.weight"].placement, rows[f"layers.0.{name}.lora.b.weight"].placement)
        for name in ("mixer.q_proj", "mixer.o_proj", "ffn.experts.up_proj")
    }
    assert [(a.shard_axis, b.shard_axis) for a, b in axes.values()] == [(None, 0), (1, None), (None, None)]
    assert [(a.expert, b.expert) for a, b in axes.values()] == [(False, False), (False, False), (True, True)]
    for layer, axis in ((ColumnLinear(6, 8), 0), (RowLinear(6, 8, bias=False), 1), (Linear(6, 8), None)):
        lora = Lora(LoraConfig(rank=2), layer)
        a, b = torch.randn(2, 6), torch.randn(8, 2)
        for rank in range(2):
            part = merged(torch.zeros(8, 6), a, b, 1.0)
            part = part if axis is None else part.chunk(2, axis)[rank]
            offsets = [rank * size if dim == axis else 0 for dim, size in enumerate(part.shape)]
            own = factors_of_block(a, b, offsets, part.shape)
            torch.testing.assert_close(merged(torch.zeros_like(part), *own, 1.0), part)
        assert lora.a.weight.shape == a.shape and lora.b.weight.shape == b.shape


def test_initial_values():
    uniform = adapted(b=False, lora=LoraConfig(rank=16))
    normal = adapted(b=False, lora=LoraConfig(rank=16, init="normal"))
    for model in (uniform, normal):
        assert all(not row.tensor.any() for name, row in declared(model).items() if name.endswith("lora.b.weight"))
    a = uniform.get_parameter("layers.0.ffn.down_proj.lora.a.weight")
    assert a.abs().max() <= 48**-0.5 and a.std().item() == pytest.approx((48 * 3) ** -0.5, rel=0.1)
    a = normal.get_parameter("layers.0.ffn.down_proj.lora.a.weight")
    assert a.std().item() == pytest.approx(1 / 16, rel=0.1)


def names_of(targets):
    model = shapes(tiny_model_config("gated_delta_net, full_attention", lora=LoraConfig(2, targets=targets)), 8)
    return {path.removesuffix(".lora") for path, module in model.named_modules() if isinstance(module, Lora)}


def test_patterns_select_layers():
    assert names_of(["layers.1.mixer.[qv]_proj"]) == {"layers.1.mixer.q_proj", "layers.1.mixer.v_proj"}
    assert names_of(["*.down_proj", "*o_proj"]) == {
        f"layers.{i}.{name}" for i in (0, 1) for name in ("ffn.down_proj", "mixer.o_proj")
    }
    assert names_of(None) == names_of(["*"]) and len(names_of(None)) == 4 + 3 + 7 + 3
    for stray in (["*.q_prj"], ["lm_head"], ["layers.2.*"], ["*q_proj", "embedding"]):
        with pytest.raises(
            ValueError, match=rf"model\.lora\.targets: '{stray[-1].replace('*', '[*]')}' matches no linear"
        ):
            names_of(stray)


def test_a_stage_need_not_have_every_layer():
    config = tiny_model_config("full_attention", lora=LoraConfig(2, targets=["layers.1.*"]))
    with torch.device("meta"):
        first, last = (Decoder(config, 8, range(layer, layer + 1)) for layer in (0, 1))
    assert [bool(missing_adapters(stage, ())) for stage in (first, last)] == [False, True]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"rank": -1}, r"model\.lora\.rank is -1: it must be positive, or 0"),
        ({"rank": 0, "targets": ["*"]}, r"model\.lora\.targets=.* with model\.lora\.rank=0 would add no adapters"),
        ({"rank": 4, "targets": []}, r"model\.lora\.targets is empty"),
        ({"rank": 4, "alpha": 0.0}, r"model\.lora\.alpha is 0\.0"),
        ({"rank": 4, "alpha": float("inf")}, r"model\.lora\.alpha is inf"),
    ],
)
def test_refusals(keys, message):
    with pytest.raises(ValueError, match=message):
        LoraConfig(**keys)


def test_what_does_not_compose_is_refused():
    with pytest.raises(ValueError, match=r"model\.moe\.spawn_step=3 would write to"):
        ModelConfig(moe=MoEConfig(num_experts=4, spawn_step=3), lora=LoraConfig(2))
    rounded = SpikingConfig(layers=["*.down_proj"], weights="int8")
    with pytest.raises(ValueError, match=r"selects layers\.0\.ffn\.down_proj, whose weight .*weights=int8 rounds"):
        shapes(tiny_model_config(spiking=rounded, lora=LoraConfig(2)), 8)
    shapes(tiny_model_config(spiking=rounded, lora=LoraConfig(2, targets=["*q_proj"])), 8)


def test_an_adapter_reads_spikes():
    """As its layer does: so merged weights compute the same with spikes, too."""
    model = adapted("full_attention", spiking=SpikingConfig(layers=["all"]))
    torch.testing.assert_close(model(*tokens()), without_adapters(model)(*tokens()), rtol=1e-5, atol=1e-5)


def test_generation_follows_updates(monkeypatch):
    """Also by traces of blocks, which read the adapters where they are."""
    monkeypatch.setattr(traced, "_STEPS_BEFORE", 2)
    model, prompt = adapted("gated_delta_net, full_attention", b=False).eval(), (1, 2, 3, 4)
    engine = Engine(model, slots=2)
    for update in range(2):
        ((completion, *_),) = engine.generate([Request(prompt, Sampling(12), 2)])
        row = torch.tensor([prompt + completion.tokens])
        with torch.no_grad():
            log_probs = model(row, torch.arange(row.shape[1])[None]).log_softmax(-1)[0, len(prompt) - 1 : -1]
        expected = log_probs.gather(1, row[0, len(prompt) :, None])[:, 0]
        torch.testing.assert_close(torch.tensor(completion.log_probs), expected, rtol=0, atol=1e-5)
        assert engine._tracer._traces, update
        for name, parameter in model.named_parameters():
            if name.endswith("lora.b.weight"):
                parameter.data.fill_(0.05)
        engine.forget()
