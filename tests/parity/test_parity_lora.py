"""Low-rank adapters: in every layout what one process gives, at the memory of the adapters."""

import pytest
import torch

from models.config import ADAPTERS
from models.decoder import shapes
from models.parameters import matches
from tests.parity.test_parity import VOCAB, compare, whole
from tests.parity.test_parity_objectives import EXPERTS, case
from trainer.cli import from_mapping
from trainer.config import PretrainConfig

STEPS = 4
QUICK = ("TP2+SP",)
CASES = ["TP2", "TP2+SP", "PP2", "CP2", "DP2", "EP2", "ZeRO-1", "ZeRO-2", "ZeRO-3"]


def lora(config, **keys):
    return config | {"model": config["model"] | {"lora": {"rank": 3, "alpha": 6} | keys}}


def sized(config):
    """Elements of the adapters, and of the whole model."""
    model = shapes(from_mapping(PretrainConfig, config).model, VOCAB)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    return sum(size for name, size in sizes.items() if matches(name, [ADAPTERS])), sum(sizes.values())


def check(pools, name, steps=STEPS, **settings):
    ranks, alone, sharded = case(name, **settings)
    # Until the first update B is zero, and with it the gradient of A.
    job = {"steps": steps, "gradients_of": 1}
    reference = whole(pools(1).run(job | {"config": lora(alone) | {"parallel": {}}}))
    results = pools(ranks).run(job | {"config": lora(sharded)})
    compare(whole(results), reference)
    trained, everything = sized(lora(alone))
    assert len(reference["gradients"]) and all(matches(gradient, [ADAPTERS]) for gradient in reference["gradients"])
    assert reference["held"]["moments"] == 2 * trained < everything
    # Padding of buckets, and what several ranks have alike.
    assert 2 * trained <= sum(result["held"]["moments"] for result in results) < 2 * ranks * trained + 4096
    if results[0]["held"]["gradients"]:
        assert results[0]["held"]["gradients"] < 2 * trained + 4096
    return results


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in CASES]
)
def test_layouts_train_adapters_as_one_process_does(pools, name):
    check(pools, name)


@pytest.mark.slow
def test_experts_are_sharded_with_their_adapters(pools):
    """Experts, tensor and sequence parallelism together."""
    ranks, config, _ = case("TP2+SP")
    experts = config | {"model": config["model"] | {"moe": EXPERTS}}
    job = {"steps": STEPS, "gradients_of": 1}
    reference = whole(pools(1).run(job | {"config": lora(experts) | {"parallel": {}}}))
    sharded = experts | {"parallel": config["parallel"] | {"expert": 2}}
    compare(whole(pools(ranks).run(job | {"config": lora(sharded)})), reference)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["PP2", "TP2"])
def test_adapters_of_some_layers(pools, name):
    """The first of two stages has none."""
    ranks, alone, sharded = case(name)
    targets = {"targets": ["layers.3.*_proj"]}
    job = {"steps": STEPS, "gradients_of": 1}
    reference = whole(pools(1).run(job | {"config": lora(alone, **targets) | {"parallel": {}}}))
    compare(whole(pools(ranks).run(job | {"config": lora(sharded, **targets)})), reference)
    assert {name.split(".")[1] for name in reference["gradients"]} == {"3"}


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_changes_no_digit(pools, recompute):
    _, config, _ = case("DP2")
    found = []
    for choice in ("none", recompute):
        own = lora(config | {"train": config["train"] | {"recompute": choice}, "parallel": {}})
        found.append(whole(pools(1).run({"config": own, "steps": STEPS})))
    assert (found[0]["steps"], found[0]["digest"]) == (found[1]["steps"], found[1]["digest"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["TP2", "ZeRO-2"])
def test_a_resumed_run_is_the_uninterrupted_one(pools, tmp_path, name):
    ranks, alone, sharded = case(name)
    config, pool, path = lora(sharded), pools(ranks), str(tmp_path / "state")
    uninterrupted = pool.run({"steps": STEPS, "config": config, "save_after": 2, "save": path})
    resumed = pool.run({"steps": STEPS, "config": config, "first_step": 2, "load": path})
    for before, after in zip(uninterrupted, resumed, strict=True):
        assert after["steps"] == before["steps"][2:]
        assert after["digest"] == before["digest"]
    # And under another layout.
    (moved,) = pools(1).run({"steps": STEPS, "config": lora(alone) | {"parallel": {}}, "first_step": 2, "load": path})
    expected = torch.tensor([loss for loss, *_ in uninterrupted[0]["steps"][2:]])
    torch.testing.assert_close(torch.tensor([loss for loss, *_ in moved["steps"]]), expected, rtol=1e-5, atol=0)
