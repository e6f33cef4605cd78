"""Spiking models: every layout trains as one process does.

Counts are integers, and layouts round differently: where an x / V lies within rounding of a half, one count may differ
by one, and with it numbers by more than rounding. Steps are therefore few, and the seed is the first for which none
lies there in one process on this machine; then the tolerances are those of models of floats. Adam's epsilon is large:
it would blow up the rounding of gradients that are almost zero.
"""

import functools

import pytest
import torch

from tests.parity.test_parity import compare, configuration, ranks_of, whole
from tests.parity.test_parity_moe import GATES

STEPS, MARGIN, MOST_SEEDS = 3, 1e-5, 100
# The surrogate gradient is proportional to x / V's distance from its count, whose rounding grows a hundredfold a step.
STEPS_OF = {"learned": 1}
EXPERTS = {"num_experts": 4, "shared_experts": 1, "expert_hidden_size": 32, "dense_layers": [1]} | GATES["top-k"]
NEURONS = {
    "adaptive": {"layers": ["all"]},
    "learned": {"layers": ["all"], "threshold": "learned", "gradient": "surrogate"},
    "running": {"layers": ["all"], "threshold": "running", "momentum": 0.5},
    "per_channel": {"layers": ["all"], "threshold": "per_channel", "momentum": 0.5, "count_range": [-8, 8]},
    "int8": {"layers": ["all"], "queries": True, "int8_keys_values": True, "weights": "int8"},
    "rate": {"layers": ["all"], "threshold": "learned", "activity": {"loss": "rate", "weight": 0.5}},
    "l1": {"layers": ["all"], "threshold": "per_channel", "activity": {"loss": "l1", "weight": 0.5}},
    # A zone that ends between counts, so that the margin holds for it, too.
    "delta": {"layers": ["all"], "threshold": "per_channel", "momentum": 0.5, "code": "delta", "dead_zone": 1.5},
}
LAYOUTS = {
    "TP2": {"tensor": 2},
    "TP2+SP": {"tensor": 2, "sequence": True},
    "PP2": {"pipeline": 2},
    "CP2": {"context": 2},
    "DP2": {"data": 2},
    "EP2 x DP2": {"expert": 2, "data": 2},
    "EP2 x TP2": {"expert": 2, "tensor": 2},
}


def spiking(neuron, experts=False, engine=None, seed=0, **keys):
    """A run's configuration as plain values; its gradients are not clipped, of which engines leave different ones."""
    config = configuration("gated_delta_net, full_attention", **keys)
    model = config["model"] | {"num_layers": 2, "init_std": 0.1, "spiking": NEURONS[neuron]}
    config |= {"model": model | ({"moe": EXPERTS} if experts else {})}
    config |= {"logging": {"measure_every": 1}, "optim": {"lr": 0.003, "eps": 1e-4, "clip_grad": 0.0}}
    config |= {"train": config["train"] | {"seq_len": 8, "seed": seed}}
    return config | ({"engine": {"name": "deepspeed"} | engine} if engine else {})


@pytest.fixture(scope="session")
def one_process(pools):
    """A seed whose counts rounding does not decide, and what one process does with it."""

    @functools.cache
    def run(neuron, experts):
        for seed in range(MOST_SEEDS):
            steps = STEPS_OF.get(neuron, STEPS)
            job = {"config": spiking(neuron, experts, seed=seed), "steps": steps, "margin": True}
            found = whole(pools(1).run(job))
            if found["margin"] > MARGIN:
                return seed, found
        raise AssertionError(f"{neuron}: rounding could decide a count with each of {MOST_SEEDS} seeds")

    return run


def check(pools, one_process, layout, neuron, experts=False, engine=None):
    seed, reference = one_process(neuron, experts)
    ranks, keys = ranks_of(LAYOUTS[layout])
    steps = STEPS_OF.get(neuron, STEPS)
    ours = whole(pools(ranks).run({"config": spiking(neuron, experts, engine, seed, **keys), "steps": steps}))
    compare(ours, reference)
    for mine, theirs in zip(ours["metrics"], reference["metrics"], strict=True):
        # Integers, each counted once.
        counted = {name: value for name, value in theirs.items() if name.startswith("spiking/")}
        assert counted and {name: mine[name] for name in counted} == counted
    assert any(name.endswith("log_k") for name in ours["gradients"]) == (neuron in ("learned", "rate"))


CASES = [
    *[(layout, "adaptive") for layout in ("TP2", "TP2+SP", "PP2", "CP2", "DP2")],
    *[
        (layout, neuron)
        for layout in ("TP2", "TP2+SP", "PP2", "CP2", "DP2")
        for neuron in ("learned", "per_channel", "delta")
    ],
    *[(layout, "running") for layout in ("TP2", "DP2")],
    *[(layout, neuron) for layout in ("TP2", "TP2+SP", "PP2", "CP2", "DP2") for neuron in ("int8", "rate")],
    ("TP2", "l1"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "neuron"), CASES)
def test_a_spiking_model(pools, one_process, layout, neuron):
    check(pools, one_process, layout, neuron)


@pytest.mark.slow
@pytest.mark.parametrize("neuron", [neuron for neuron in NEURONS if neuron != "delta"])
@pytest.mark.parametrize("layout", ["EP2 x DP2", "EP2 x TP2"])
def test_spiking_experts(pools, one_process, layout, neuron):
    check(pools, one_process, layout, neuron, experts=True)


ZERO = [(2, "DP2", "adaptive"), (2, "DP2", "learned"), (2, "DP2", "per_channel"), (3, "DP2", "learned")]
ZERO += [(2, "DP2", "int8"), (2, "DP2", "rate"), (1, "TP2", "l1")]
ZERO += [(1, "TP2", "learned"), (1, "TP2", "per_channel")]


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "layout", "neuron"), ZERO)
def test_deepspeed(pools, one_process, stage, layout, neuron):
    check(pools, one_process, layout, neuron, engine={"zero_stage": stage})


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["TP2", "EP2 x TP2", "PP2"])
def test_recomputation_changes_no_digit(pools, layout):
    ranks, keys = ranks_of(LAYOUTS[layout])
    found = []
    for choice in ({"recompute": "none"}, {"recompute": "selective"}, {"recompute": "full"}):
        config = spiking("per_channel", experts="EP" in layout, **keys)
        config |= {"train": config["train"] | choice}
        found.append(whole(pools(ranks).run({"config": config, "steps": STEPS})))
    kept, *recomputed = found
    for result in recomputed:
        assert (result["steps"], result["digest"]) == (kept["steps"], kept["digest"])


@pytest.mark.slow
def test_a_checkpoint_moves_to_another_layout(pools, tmp_path):
    """Averages of channels that two ranks divide among them are read by one process, and by stages."""
    saved = str(tmp_path / "state")
    ranks, keys = ranks_of(LAYOUTS["TP2"])
    reference = pools(ranks).run(
        {"config": spiking("per_channel", **keys), "steps": STEPS, "save": saved, "save_after": 2}
    )[0]["steps"]
    for layout in ({}, LAYOUTS["PP2"], LAYOUTS["CP2"]):
        ranks, keys = ranks_of(layout)
        job = {"config": spiking("per_channel", **keys), "load": saved, "first_step": 2, "steps": STEPS}
        torch.testing.assert_close(whole(pools(ranks).run(job))["steps"][0][0], reference[2][0], rtol=1e-5, atol=0)
