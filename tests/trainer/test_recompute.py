"""Recomputed activations: the same numbers to the last bit, and the memory that was to be saved."""

import re
from dataclasses import asdict, replace

import pytest
import torch
import yaml
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from kernels.documents import Documents
from models.config import LINEAR_MIXERS, AttentionConfig, HGRN2Config, MixerLayoutConfig, ModelConfig, MoEConfig
from models.decoder import Decoder, flops_per_token, initialize
from models.generation import Engine, Request, Sampling
from models.saved_activations import EVERYTHING, RECOMPUTE, BlockPolicy, Policy
from tests.trainer.conftest import in_process_config
from tests.trainer.test_megatron_engine import build, run_step
from trainer.cli import from_mapping
from trainer.config import EngineConfig, PretrainConfig, TrainConfig
from trainer.data.sources import find_sources
from trainer.engines.spec import EngineSpec
from trainer.errors import ConfigError
from trainer.run_directory import differing_keys

T = 64
NONE, MIXER, FFN = EVERYTHING, BlockPolicy(mixer=RECOMPUTE), BlockPolicy(ffn=RECOMPUTE)
BOTH, FULL = BlockPolicy(mixer=RECOMPUTE, ffn=RECOMPUTE), BlockPolicy(block=RECOMPUTE)


def small_model(pattern, num_layers=2, hidden_size=32):
    config = ModelConfig(
        num_layers=num_layers,
        hidden_size=hidden_size,
        ffn_hidden_size=3 * hidden_size,
        mixers=MixerLayoutConfig(pattern=pattern),
        attention=AttentionConfig(num_heads=4, num_kv_heads=2, window=16),
        hgrn2=HGRN2Config(head_dim=8),
    )
    model = Decoder(config, 64)
    initialize(model, 1)
    return model


def inputs():
    tokens = torch.randint(0, 64, (1, T + 1), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(40), torch.arange(T - 40)])[None]
    return tokens[:, :-1], positions, Documents((0, 40, T)), tokens[:, 1:]


def loss_and_gradients(model, parts):
    model.keep(Policy(parts))
    model.zero_grad()
    loss, _ = model(*inputs())
    loss.backward()
    return loss.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def kept_by_blocks(model, parts):
    """Bytes that the blocks keep for backward, each storage once; neither parameters nor what all layers share."""
    model.keep(Policy(parts))
    tokens, positions, documents, _ = inputs()
    infos = model._layer_infos(positions, documents)
    shared = [tensor for info in infos for tensor in (info.cos, info.sin, info.lower_bound)]
    known = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *shared] if tensor is not None}
    kept, alive = {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        # An address may come again unless what has it stays.
        alive.append(tensor)
        return tensor

    x = model.embedding(tokens.T).detach().requires_grad_()
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        for layer, info in zip(model.layers.values(), infos, strict=True):
            x = layer(x, info)
    return sum(kept.values())


BRANCHES = "spikingbrain_tied_gla + sliding_window_attention"


@pytest.mark.parametrize("mixer", [*LINEAR_MIXERS, "full_attention", "sliding_window_attention", BRANCHES])
def test_the_numbers_are_the_same_to_the_last_bit(mixer):
    model = small_model(f"{mixer}, {mixer}")
    loss, gradients = loss_and_gradients(model, NONE)
    for parts in (MIXER, FFN, BOTH, FULL):
        again, others = loss_and_gradients(model, parts)
        assert torch.equal(again, loss)
        for name, gradient in gradients.items():
            assert torch.equal(others[name], gradient), (name, parts)
            assert gradient.norm() > 0, name


@pytest.mark.parametrize("mixer", [*LINEAR_MIXERS, "full_attention", "sliding_window_attention"])
def test_memory_shrinks_to_what_enters(mixer):
    """In units of one tensor [T, 1, D]: full keeps one for each block, both regions two; the rest adds up."""
    model = small_model(f"{mixer}, {mixer}")
    unit = 2 * T * 32 * 4
    kept = {parts: kept_by_blocks(model, parts) / unit for parts in (NONE, MIXER, FFN, BOTH, FULL)}
    assert kept[FULL] == 1
    assert kept[BOTH] == 2
    # The feed-forward keeps the norm's input and output, its gate, up and their product, 96 / 32 each; and a number for
    # each row.
    of_ffn = 2 + 3 * 3 + 1 / 32
    assert kept[NONE] - kept[FFN] == pytest.approx(of_ffn - 1, rel=1e-6)
    assert kept[MIXER] == pytest.approx(1 + of_ffn, rel=1e-6)
    # Queries, keys, values and the output of the heads are the least that a mixer keeps, and the norm's output.
    assert kept[NONE] - kept[MIXER] >= 3


def test_of_a_linear_layer_the_mixer_saves_more_for_its_operations_than_the_feed_forward():
    """Why selective means the mixer: bytes saved per operation that runs again."""
    # As wide as its heads ask for: in a narrower model the products within a chunk outweigh the projections.
    model = small_model("gated_delta_net, gated_delta_net", hidden_size=256)
    bytes_saved = {parts: kept_by_blocks(model, NONE) - kept_by_blocks(model, parts) for parts in (MIXER, FFN)}
    operations = {}
    for parts in (NONE, MIXER, FFN):
        with FlopCounterMode(display=False) as counter:
            loss_and_gradients(model, parts)
        operations[parts] = counter.get_total_flops()
    again = {parts: operations[parts] - operations[NONE] for parts in (MIXER, FFN)}
    assert again[MIXER] > 0 and again[FFN] > 0
    assert bytes_saved[MIXER] / again[MIXER] > bytes_saved[FFN] / again[FFN]


def test_without_gradients_nothing_changes(monkeypatch):
    model = small_model("gated_delta_net, full_attention")
    prompt = inputs()[0][:, :8]
    requests = [Request(row, Sampling(6, temperature=0)) for row in prompt.tolist()]
    expected = Engine(model).generate(requests)
    with torch.no_grad():
        loss = model(*inputs())[0]

    def refuse(*args, **kwargs):
        raise AssertionError("nothing is to be recomputed here")

    monkeypatch.setattr("models.saved_activations.checkpoint", refuse)
    for parts in (BOTH, FULL):
        model.keep(Policy(parts))
        assert Engine(model).generate(requests) == expected
        with torch.no_grad():
            assert torch.equal(model(*inputs())[0], loss)
        with pytest.raises(AssertionError, match="nothing is to be recomputed"):
            model(*inputs())


def test_what_is_not_needed_is_not_run_twice():
    """Every module of a recomputed part runs once more, those of the other part once."""
    model = small_model("gated_delta_net", num_layers=1)
    (block,) = model.layers.values()
    calls = []
    for name in ("mixer_norm", "mixer", "ffn_norm", "ffn"):
        getattr(block, name).register_forward_pre_hook(lambda *_, name=name: calls.append(name))
    once = ["mixer_norm", "mixer", "ffn_norm", "ffn"]
    for parts, again in ((NONE, []), (MIXER, once[:2]), (FFN, once[2:]), (BOTH, once[2:] + once[:2]), (FULL, once)):
        calls.clear()
        loss_and_gradients(model, parts)
        assert calls == once + again, parts


STEPS = 4


def engine_steps(data, tmp_path, precision, **train):
    engine, sampler = build(config := in_process_config(data, tmp_path / "run", precision=precision, **train))
    steps = [run_step(engine, sampler, config, step) for step in range(STEPS)]
    engine.close()
    return steps


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_megatron_takes_the_same_steps(tiny_data, tmp_path, precision):
    expected = engine_steps(tiny_data, tmp_path, precision)
    for settings in (
        {"recompute": "selective"},
        {"recompute": "selective", "recompute_modules": ["ffn", "mixer"]},
        {"recompute": "full"},
    ):
        assert engine_steps(tiny_data, tmp_path, precision, **settings) == expected, settings


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_deepspeed_takes_the_same_steps(tiny_data, tmp_path, stage):
    from trainer.engines.deepspeed import DeepSpeedEngine

    def steps(recompute):
        config = in_process_config(tiny_data, tmp_path / "run", recompute=recompute)
        config = replace(config, engine=EngineConfig("deepspeed", stage))
        sources = find_sources(config)
        vocab_size = config.model.padded_vocab_size(sources.vocab_size)
        engine = DeepSpeedEngine(EngineSpec.of(config, vocab_size), torch.device("cpu"))
        taken = [run_step(engine, sources.open_training(config), config, step) for step in range(STEPS)]
        engine.close()
        return taken

    assert steps("selective") == steps("full") == steps("none")


def test_the_engine_asks_for_what_the_configuration_says(tiny_data, tmp_path):
    for recompute, parts in (("none", NONE), ("selective", MIXER), ("full", FULL)):
        engine, _ = build(in_process_config(tiny_data, tmp_path / "run", recompute=recompute))
        assert {block.policy for block in engine.model.layers.values()} == {parts}
        engine.close()


def test_utilisation_does_not_count_what_is_recomputed():
    model = small_model("gated_delta_net, full_attention")
    before = flops_per_token(model, T)
    model.keep(Policy(FULL))
    assert flops_per_token(model, T) == before


def test_a_run_goes_on_with_another_choice(tmp_path):
    """Memory may be short on the next machine: recomputation belongs to the machine, not to the run."""
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(asdict(PretrainConfig())))
    assert differing_keys(tmp_path, PretrainConfig(train=TrainConfig(recompute="full"))) == []
    assert differing_keys(tmp_path, PretrainConfig(ModelConfig(moe=MoEConfig(recompute_above=2.0)))) == []
    assert differing_keys(tmp_path, PretrainConfig(train=TrainConfig(recompute="full", seed=1)))


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"recompute": "some"}, "train.recompute: expected one of 'none', 'selective', 'full'"),
        ({"recompute": "full", "recompute_modules": ["ffn"]}, "use train.recompute=selective, or leave it out"),
        ({"recompute_modules": ["mixer"]}, "has no effect with train.recompute=none"),
        ({"recompute": "selective", "recompute_modules": []}, "name mixer or ffn, or use train.recompute=none"),
        ({"recompute": "selective", "recompute_modules": ["ffn", "moe_experts"]}, "moe_experts beside ffn"),
        ({"recompute": "selective", "recompute_modules": ["moe_activation"]}, "the model has no experts"),
    ],
)
def test_what_makes_no_sense_is_refused(train, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        from_mapping(PretrainConfig, {"train": train})


def test_the_parts_of_a_choice():
    assert BlockPolicy.of_config("none", None, None) == NONE
    assert BlockPolicy.of_config("selective", None, None) == MIXER
    assert BlockPolicy.of_config("selective", ["ffn"], 2.0) == BlockPolicy(ffn=RECOMPUTE, recompute_above=2.0)
    assert BlockPolicy.of_config("full", None, None) == FULL
    with pytest.raises(ValueError, match=r"train\.recompute=some is unknown; use one of none, selective, full"):
        BlockPolicy.of_config("some", None, None)
    with pytest.raises(ValueError, match="has norm; a block has mixer, ffn, moe_activation, moe_experts"):
        BlockPolicy.of_config("selective", ["mixer", "norm"], None)
