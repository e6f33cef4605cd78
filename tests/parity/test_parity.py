"""Every layout trains as one process does: losses, gradient norms, gradients of every parameter, validation."""

import functools
import json

import pytest
import torch

from models.config import LINEAR_MIXERS
from models.decoder import Decoder, initialize, shapes
from tests.parity.worker import VOCAB
from trainer.cli import from_mapping
from trainer.config import PretrainConfig
from trainer.stored.weights import write

STEPS = 10
MODEL = {
    "num_layers": 4,
    "hidden_size": 32,
    "ffn_hidden_size": 64,
    "attention": {"num_heads": 4, "num_kv_heads": 2, "window": 12},
    "gated_delta_net": {"num_heads": 2, "num_v_heads": 4, "head_dim": 8},
    "gated_linear_attention": {"num_heads": 2, "gate_low_rank": 4},
    "retention": {"num_heads": 2},
    "hgrn2": {"head_dim": 8},
    "delta_net": {"num_heads": 2, "head_dim": 8},
    "kimi_delta_attention": {"num_heads": 2, "head_dim": 8},
    "spikingbrain_gla": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "gate_low_rank": 4},
}
# Linear, softmax and sliding-window layers, unlike neighbours on every border of a stage.
HYBRID = "gated_delta_net, full_attention, hgrn, sliding_window_attention"


def configuration(pattern=HYBRID, tie=True, packed=True, micro=1, model=None, **parallel_keys):
    """A run's configuration as plain values."""
    return {
        "model": MODEL | {"mixers": {"pattern": pattern}, "tie_embeddings": tie} | (model or {}),
        "data": {"document_mask": packed},
        "train": {"seq_len": 32, "micro_batch_size": micro, "global_batch_size": 4},
        "optim": {"lr": 0.003},
        "parallel": parallel_keys,
    }


def whole(results):
    """The steps, and the gradients of all stages together."""
    for result in results[1:]:
        assert result["steps"] == results[0]["steps"], "every rank reports the same"
        assert result["validation"] == results[0]["validation"]
    together = {}
    for result in results:
        for name, gradient in result["gradients"].items():
            torch.testing.assert_close(gradient, together.setdefault(name, gradient), rtol=0, atol=0, msg=name)
    return results[0] | {"gradients": together}


@pytest.fixture(scope="session")
def one_process(pools):
    """What one process does with a configuration, once for each."""

    @functools.cache
    def run(text):
        return whole(pools(1).run({"config": json.loads(text), "steps": STEPS}))

    return lambda config: run(json.dumps(config | {"parallel": {}}, sort_keys=True))


@pytest.fixture(scope="session")
def weights_directory(tmp_path_factory):
    """Weights that training would not draw."""
    model = from_mapping(PretrainConfig, configuration()).model
    decoder = Decoder(model, VOCAB)
    initialize(decoder, seed=5)
    parameters = dict(decoder.named_parameters())

    def read(tensors):
        for name, tensor in tensors.items():
            tensor.copy_(parameters[name].detach())

    output = tmp_path_factory.mktemp("weights")
    write(output, shapes(model, VOCAB), read, tokenizer=None, max_file_bytes=20_000, report=print)
    return str(output)


def compare(ours, reference):
    """To 1e-5 in losses and the norm of the first gradient, 1e-4 in each of its parameters."""
    assert ours["gradients"].keys() == reference["gradients"].keys()
    for name, gradient in ours["gradients"].items():
        theirs = reference["gradients"][name]
        assert gradient.norm() > 0, name
        assert (gradient - theirs).norm() <= 1e-4 * theirs.norm(), name
    assert ours["steps"][0][1] == pytest.approx(reference["steps"][0][1], rel=1e-5)
    for mine, theirs in zip(ours["steps"], reference["steps"], strict=True):
        assert mine[2] == theirs[2]
        assert mine[0] == pytest.approx(theirs[0], rel=1e-5)
    assert ours["validation"] == pytest.approx(reference["validation"], rel=1e-5)


LAYOUTS = {
    "TP2": {"tensor": 2},
    "TP2+SP": {"tensor": 2, "sequence": True},
    "PP2": {"pipeline": 2},
    "PP2 uneven": {"pipeline": 2, "pipeline_layers": [3, 1]},
    "PP2 interleaved": {"pipeline": 2, "virtual_pipeline": 2},
    "CP2": {"context": 2},
    "CP4": {"context": 4},
    "DP2": {"data": 2},
    "TP2 x PP2": {"tensor": 2, "pipeline": 2},
    "TP2+SP x PP2": {"tensor": 2, "sequence": True, "pipeline": 2},
    "TP2 x CP2": {"tensor": 2, "context": 2},
    "TP2+SP x CP2": {"tensor": 2, "sequence": True, "context": 2},
    "PP2 x DP2": {"pipeline": 2, "data": 2},
    "PP2 x CP2": {"pipeline": 2, "context": 2},
    "CP2 x DP2": {"context": 2, "data": 2},
    "TP2 x PP2 x CP2": {"tensor": 2, "pipeline": 2, "context": 2},
}


def ranks_of(layout):
    """Ranks that a layout takes, and its keys under `parallel`."""
    keys = dict(layout)
    ranks = keys.pop("data", 1)
    for name in ("tensor", "pipeline", "context"):
        ranks *= keys.get(name, 1)
    return ranks, keys


def check(pools, one_process, layout, **settings):
    ranks, keys = ranks_of(layout)
    config = configuration(**settings, **keys)
    compare(whole(pools(ranks).run({"config": config, "steps": STEPS})), one_process(config))


QUICK = ("TP2+SP", "PP2", "CP2", "DP2")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS]
)
def test_a_hybrid_model(pools, one_process, name):
    check(pools, one_process, LAYOUTS[name])


ZERO = {
    "ZeRO-1": (1, "none", {"data": 2}),
    "ZeRO-2": (2, "none", {"data": 2}),
    "ZeRO-3": (3, "none", {"data": 2}),
    "ZeRO-2 offload": (2, "optimizer", {"data": 2}),
    "ZeRO-0 x TP2": (0, "none", {"tensor": 2}),
    "ZeRO-1 x TP2": (1, "none", {"tensor": 2}),
    "ZeRO-1 x TP2+SP": (1, "none", {"tensor": 2, "sequence": True}),
    "ZeRO-1 x TP2 x DP2": (1, "none", {"tensor": 2, "data": 2}),
    "ZeRO-2 x TP2 x DP2": (2, "none", {"tensor": 2, "data": 2}),
    "ZeRO-2 offload x TP2+SP x DP2": (2, "optimizer", {"tensor": 2, "sequence": True, "data": 2}),
    "ZeRO-3 x TP2 x DP2": (3, "none", {"tensor": 2, "data": 2}),
}


@pytest.mark.parametrize(
    "name", [name if name == "ZeRO-1 x TP2" else pytest.param(name, marks=pytest.mark.slow) for name in ZERO]
)
def test_deepspeed(pools, one_process, name):
    """Against one process of the other engine."""
    stage, offload, layout = ZERO[name]
    ranks, keys = ranks_of(layout)
    reference = configuration(**keys)
    config = reference | {"engine": {"name": "deepspeed", "zero_stage": stage, "offload": offload}}
    compare(whole(pools(ranks).run({"config": config, "steps": STEPS})), one_process(reference))


# Layout by layout, so that all mixers of one stand together in the output.
MIXER_LAYOUTS = (
    "TP2",
    "TP2+SP",
    "PP2",
    "PP2 interleaved",
    "CP2",
    "DP2",
    "CP4",
    "TP2 x PP2",
    "TP2 x CP2",
    "PP2 x DP2",
    "TP2 x PP2 x CP2",
)


@pytest.mark.slow
@pytest.mark.parametrize("mixer", LINEAR_MIXERS)
@pytest.mark.parametrize("name", MIXER_LAYOUTS)
def test_every_linear_mixer(pools, one_process, name, mixer):
    pattern = f"{mixer}, full_attention, {mixer}, sliding_window_attention"
    check(pools, one_process, LAYOUTS[name], pattern=pattern)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["TP2", "TP2+SP", "PP2", "CP2"])
def test_parallel_branches(pools, one_process, name):
    pattern = "spikingbrain_tied_gla + sliding_window_attention, hgrn + full_attention"
    check(pools, one_process, LAYOUTS[name], pattern=pattern)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["TP2", "TP2+SP", "PP2", "PP2 interleaved", "CP2", "DP2", "TP2+SP x PP2", "PP2 x CP2"])
def test_sink_tokens(pools, one_process, name):
    pattern = "sliding_window_attention, full_attention, hgrn + sliding_window_attention, gated_delta_net"
    check(pools, one_process, LAYOUTS[name], pattern=pattern, model={"sink_tokens": 4})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ZeRO-1 x TP2+SP", "ZeRO-3 x TP2 x DP2"])
def test_sink_tokens_with_deepspeed(pools, one_process, name):
    stage, offload, layout = ZERO[name]
    ranks, keys = ranks_of(layout)
    reference = configuration("sliding_window_attention, full_attention", model={"sink_tokens": 4}, **keys)
    config = reference | {"engine": {"name": "deepspeed", "zero_stage": stage, "offload": offload}}
    compare(whole(pools(ranks).run({"config": config, "steps": STEPS})), one_process(reference))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["TP2", "TP2+SP", "PP2", "CP2"])
def test_gated_attention_with_partial_rotation(pools, one_process, name):
    attention = MODEL["attention"] | {"qk_norm": True, "output_gate": True, "partial_rotary_factor": 0.5}
    check(pools, one_process, LAYOUTS[name], model={"attention": attention, "zero_centered_norms": True})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["TP2", "PP2", "PP2 x DP2", "TP2+SP x CP2"])
def test_an_untied_head_and_whole_rows(pools, one_process, name):
    check(pools, one_process, LAYOUTS[name], tie=False, packed=False, micro=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "recompute"),
    [("TP2+SP", "full"), ("PP2", "selective"), ("PP2 interleaved", "full"), ("CP2", "full"), ("TP2 x CP2", "full")],
)
def test_recomputed_activations(pools, one_process, name, recompute):
    """Collectives in what is recomputed run again, and the steps are those of the same ranks without, to the bit."""
    ranks, keys = ranks_of(LAYOUTS[name])
    kept = configuration(**keys)
    recomputed = kept | {"train": kept["train"] | {"recompute": recompute}}
    theirs, ours = (whole(pools(ranks).run({"config": config, "steps": STEPS})) for config in (kept, recomputed))
    assert ours["steps"] == theirs["steps"]
    compare(ours, one_process(kept))


@pytest.mark.slow
@pytest.mark.parametrize("tie", [True, False])
def test_a_checkpoint_moves_to_another_layout(pools, one_process, tmp_path, tie):
    """Saved under TP2 x PP2 after five steps; under CP2 x DP2, interleaved and in one process the run goes on."""
    saved = str(tmp_path / "state")
    config = configuration(tie=tie)
    reference = one_process(config)["steps"]
    written = configuration(tie=tie, tensor=2, pipeline=2)
    pools(4).run({"config": written, "steps": 5, "save": saved, "save_after": 5})
    for layout in ({"context": 2, "data": 2}, {"pipeline": 2, "virtual_pipeline": 2}, {}):
        ranks, keys = ranks_of(layout)
        moved = configuration(tie=tie, **keys)
        results = pools(ranks).run({"config": moved, "load": saved, "first_step": 5, "steps": STEPS})
        for mine, theirs in zip(whole(results)["steps"], reference[5:], strict=True):
            assert mine[0] == pytest.approx(theirs[0], rel=1e-5), layout


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS]
)
def test_a_run_starts_from_weights(pools, one_process, weights_directory, name):
    """Every rank reads its stage's, and has its part of them."""
    ranks, keys = ranks_of(LAYOUTS[name])
    config = configuration(**keys) | {
        "checkpoint": {"init": weights_directory},
        "run": {"dir": f"{weights_directory}/run"},
    }
    reference = one_process(config)
    compare(whole(pools(ranks).run({"config": config, "steps": STEPS})), reference)
    drawn = one_process(configuration(**keys))
    assert abs(reference["steps"][0][0] - drawn["steps"][0][0]) > 1e-4
