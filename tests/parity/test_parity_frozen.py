"""Training of some parameters only: in every layout what one process gives, at the memory of what is trained."""

import pytest
import torch

from models.decoder import shapes
from models.parameters import matches
from tests.parity.test_parity import STEPS, VOCAB, compare, configuration, whole
from tests.parity.test_parity_objectives import case
from trainer.cli import from_mapping
from trainer.config import PretrainConfig

QUICK = ("TP2+SP", "PP2", "ZeRO-2")
CASES = ["TP2", "TP2+SP", "PP2", "PP2 interleaved", "CP2", "DP2", "EP2", "ZeRO-2", "ZeRO-3"]
# Of every kind something is trained, and something is not; the tied or untied head and the lower bounds are frozen.
SOME = ["layers.*.mixer.*", "layers.*.ffn_norm.weight", "layers.1.ffn.*"]
# Nothing that the first of two stages has.
LAST = ["final_norm.weight", "layers.3.*"]


def numel(config, patterns):
    """Elements of the parameters that are trained."""
    model = shapes(from_mapping(PretrainConfig, config).model, VOCAB)
    return sum(parameter.numel() for name, parameter in model.named_parameters() if matches(name, patterns))


def frozen(config, patterns):
    return config | {"train": config["train"] | {"trainable": patterns}}


def check(pools, name, patterns, **settings):
    ranks, alone, sharded = case(name, **settings)
    job = {"steps": STEPS}
    reference = whole(pools(1).run(job | {"config": frozen(alone, patterns) | {"parallel": {}}}))
    results = pools(ranks).run(job | {"config": frozen(sharded, patterns)})
    compare(whole(results), reference)
    assert {matches(gradient, patterns) for gradient in reference["gradients"]} == {True}
    trained = numel(alone, patterns)
    assert reference["held"]["moments"] == 2 * trained
    # Padding of buckets, and what several ranks have alike.
    assert 2 * trained <= sum(result["held"]["moments"] for result in results) < 2 * ranks * trained + 4096
    return results


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in CASES]
)
def test_some_parameters_are_trained(pools, name):
    check(pools, name, SOME)


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ["PP2", "PP2 interleaved"])
def test_a_stage_may_have_nothing_to_train(pools, name, tied):
    check(pools, name, LAST, tie=tied)


def test_frozen_parameters_have_no_gradient_buffer(pools):
    config = configuration()
    (everything,) = pools(1).run({"steps": 1, "config": config})
    (some,) = pools(1).run({"steps": 1, "config": frozen(config, SOME)})
    for result, patterns in ((everything, ["*"]), (some, SOME)):
        trained = numel(config, patterns)
        assert result["held"]["moments"] == 2 * trained
        # mcore pads parameters to 64 elements.
        assert trained <= result["held"]["gradients"] < 1.05 * trained


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "PP2" else pytest.mark.slow) for name in ("PP2", "EP2", "ZeRO-3")]
)
def test_a_resumed_run_is_the_uninterrupted_one(pools, tmp_path, name):
    """Also one that goes on to train what was frozen before, whose moments begin at zero."""
    ranks, _, sharded = case(name)
    config = frozen(sharded, SOME)
    pool, path = pools(ranks), str(tmp_path / "state")
    uninterrupted = pool.run({"steps": STEPS, "config": config, "save_after": 2, "save": path})
    resumed = pool.run({"steps": STEPS, "config": config, "first_step": 2, "load": path})
    for before, after in zip(uninterrupted, resumed, strict=True):
        assert after["digest"] == before["digest"]
        assert after["steps"] == before["steps"][2:]
    thawed = pool.run({"steps": STEPS, "config": sharded, "first_step": 2, "load": path})
    assert all(torch.isfinite(torch.tensor(result["steps"])).all() for result in thawed)
    assert whole(thawed)["gradients"].keys() > whole(resumed)["gradients"].keys()
