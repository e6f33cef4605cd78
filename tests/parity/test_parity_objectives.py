"""Objectives other than the language model's give in every layout what they give in one process."""

import pytest

from tests.parity.test_parity import LAYOUTS, ZERO, compare, configuration, ranks_of, whole

STEPS = 4
LOG_PROBS = {"weights": "advantages", "temperature": 0.7, "entropy": 0.1}
EXPERTS = {"num_experts": 4, "expert_hidden_size": 32, "shared_experts": 1, "router": {"top_k": 2}}
QUICK = ("TP2+SP", "PP2")
CASES = [*(name for name in LAYOUTS if name in ("TP2", "TP2+SP", "PP2", "PP2 interleaved", "CP2", "DP2")), "EP2"]
CASES += ["ZeRO-2", "ZeRO-3"]


def case(name, **settings):
    """Ranks, and the configuration of one process and of that many."""
    layout = ZERO[name][2] if name in ZERO else LAYOUTS.get(name, {"data": 2})
    ranks, keys = ranks_of(layout)
    config = configuration(**settings, **keys)
    if name == "EP2":
        config["model"] = config["model"] | {"moe": EXPERTS}
        return ranks, config, config | {"parallel": {"expert": 2}}
    if name in ZERO:
        engine = {"name": "deepspeed", "zero_stage": ZERO[name][0], "offload": ZERO[name][1]}
        return ranks, config, config | {"engine": engine}
    return ranks, config, config


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in CASES]
)
def test_weighted_log_probs(pools, name):
    ranks, alone, sharded = case(name)
    job = {"steps": STEPS, "log_probs": LOG_PROBS}
    reference = whole(pools(1).run(job | {"config": alone | {"parallel": {}}}))
    ours = whole(pools(ranks).run(job | {"config": sharded}))
    compare(ours, reference)
    for mine, theirs in zip(ours["metrics"], reference["metrics"], strict=True):
        assert theirs["entropy"] > 0 > theirs["log_prob"]
        assert mine["log_prob"] == pytest.approx(theirs["log_prob"], rel=1e-5)
        assert mine["entropy"] == pytest.approx(theirs["entropy"], rel=1e-5)


def test_advantages_of_one_are_the_language_model(pools):
    """With weights 1, temperature 1 and no entropy the loss and every gradient are those of pretraining."""
    config = configuration()
    ours = whole(pools(1).run({"steps": STEPS, "config": config, "log_probs": {"weights": "ones"}}))
    compare(ours, whole(pools(1).run({"steps": STEPS, "config": config})))
