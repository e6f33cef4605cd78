"""Experts over ranks: every layout trains as one process does, also where the number of experts of a token varies."""

import pytest
import torch

from tests.parity.test_parity import STEPS, compare, configuration, one_process, ranks_of, whole

__all__ = ["one_process"]

SPARSE = {
    "gate": "dense_to_sparse",
    "top_k": 2,
    "dense_to_sparse": {
        "activation": "tanh",
        "gumbel_noise": True,
        "temperature_end": 0.5,
        "threshold": 0.2,
        "plateau_steps": 2,
        "decay_steps": 6,
        "max_experts_start": 4,
        "max_experts_end": 2,
    },
}
GATES = {
    "variable": {"router": SPARSE, "losses": {"balance": 0.1, "z": 0.01}},
    "learned": {
        "router": SPARSE | {"normalize": "after", "dense_to_sparse": {"schedule": "learned", "threshold": 0.26}},
        "losses": {"balance": 0.1, "scope": "micro_batch"},
    },
    "top-k": {
        "router": {"top_k": 2, "score": "sigmoid", "normalize": "after", "bias_update_rate": 0.01},
        "shared_expert_gate": True,
        "losses": {"balance": 0.1, "scope": "sequence"},
    },
    # Every kind of state there is.
    "moved": {"router": {"top_k": 2, "bias_update_rate": 0.01}, "losses": {"balance": 0.1}},
}
LAYOUTS = {
    "EP2 x DP2": {"expert": 2, "data": 2},
    "EP4 x DP4": {"expert": 4, "data": 4},
    "EP2 x TP2": {"expert": 2, "tensor": 2},
    "EP4 x TP2 x DP2": {"expert": 4, "tensor": 2, "data": 2},
    "EP2 of DP4": {"expert": 2, "data": 4},
    "EP2 x PP2": {"expert": 2, "pipeline": 2, "data": 2},
    "EP2 x PP2 interleaved": {"expert": 2, "pipeline": 2, "virtual_pipeline": 2, "data": 2},
    "EP2 x CP2": {"expert": 2, "context": 2},
    "TP2": {"tensor": 2},
    "PP2": {"pipeline": 2},
    "DP2": {"data": 2},
}


def with_experts(gate="variable", **keys):
    config = configuration(**keys)
    experts = {"num_experts": 4, "shared_experts": 1, "expert_hidden_size": 32, "dense_layers": [1]} | GATES[gate]
    return config | {"model": config["model"] | {"moe": experts, "init_std": 0.1}}


def check(pools, one_process, layout, gate, **settings):
    ranks, keys = ranks_of(LAYOUTS[layout])
    ours = whole(pools(ranks).run({"config": with_experts(gate, **settings, **keys), "steps": STEPS}))
    agree(ours, one_process(with_experts(gate, **settings)))


def agree(ours, reference):
    """Losses, gradients and metrics; one process has nothing to copy."""
    compare(ours, reference)
    for mine, theirs in zip(ours["metrics"], reference["metrics"], strict=True):
        assert mine.keys() == theirs.keys()
        for name, value in mine.items():
            if name == "moe/replicated_experts":
                continue
            torch.testing.assert_close(torch.tensor(value), torch.tensor(theirs[name]), rtol=1e-4, atol=1e-7, msg=name)


QUICK = [("EP2 x DP2", "variable")]
# Every layout with the gate that asks most of it, the others where their state or their losses cross ranks.
SLOW = [(layout, "variable") for layout in LAYOUTS if (layout, "variable") not in QUICK]
SLOW += [
    (layout, gate)
    for layout in ("EP2 x DP2", "EP2 x TP2", "EP2 x PP2", "EP2 x CP2", "TP2")
    for gate in ("learned", "top-k")
]


@pytest.mark.parametrize(("layout", "gate"), [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)])
def test_experts(pools, one_process, layout, gate):
    check(pools, one_process, layout, gate)


def with_copies(config, replicated=2, **keys):
    """Every expert above the mean load counts as busy, so that there are some in every layer."""
    copies = {"replicated_experts": replicated, "replicate_above": 1.0} | keys
    return config | {"model": config["model"] | {"moe": config["model"]["moe"] | copies}}


def recomputing(config, *modules):
    return config | {"train": config["train"] | {"recompute": "selective", "recompute_modules": list(modules)}}


COPIES = [
    ("EP2 x DP2", "top-k", []),
    ("EP2 x DP2", "variable", ["ffn"]),
    ("EP4 x DP4", "top-k", []),
    ("EP2 x TP2", "top-k", ["moe_experts"]),
    ("EP2 x TP2", "top-k", ["moe_activation"]),
    ("EP4 x TP2 x DP2", "variable", []),
    ("EP2 of DP4", "top-k", []),
    ("EP2 x PP2", "top-k", []),
    ("EP2 x PP2 interleaved", "top-k", ["ffn"]),
    ("EP2 x CP2", "top-k", []),
]


@pytest.mark.parametrize(
    ("layout", "gate", "modules"), [COPIES[0], *(pytest.param(*case, marks=pytest.mark.slow) for case in COPIES[1:])]
)
def test_copies_of_busy_experts(pools, one_process, layout, gate, modules):
    ranks, keys = ranks_of(LAYOUTS[layout])
    config = with_copies(with_experts(gate, **keys))
    ours = whole(pools(ranks).run({"config": recomputing(config, *modules) if modules else config, "steps": STEPS}))
    agree(ours, one_process(with_experts(gate)))
    copied = [metrics["moe/replicated_experts"] for metrics in ours["metrics"]]
    assert copied[0] == 0, "no load is known yet"
    # Two of a layer's at most, in three layers.
    assert all(0 < number <= 6 for number in copied[1:]), copied


@pytest.mark.parametrize(
    ("layout", "changes"),
    [
        ("EP2 x DP2", {}),
        pytest.param("EP2 x DP2", {"recompute_above": 1.1}, marks=pytest.mark.slow),
        pytest.param("EP2 x TP2", {"capacity_factor": 0.8}, marks=pytest.mark.slow),
        pytest.param("EP4 x DP4", {"capacity_factor": 1.0, "pad_to_capacity": True}, marks=pytest.mark.slow),
    ],
)
def test_tokens_of_copied_experts_stay(pools, layout, changes):
    """The second step, the first with copies: loss and gradients as without, fewer bytes of tokens, weights instead."""
    ranks, keys = ranks_of(LAYOUTS[layout])
    runs = []
    for replicated in (0, 2):
        config = with_copies(with_experts("top-k", **keys), replicated, **changes)
        job = {"config": config, "steps": 2, "gradients_of": 1, "count": True}
        runs.append((results := pools(ranks).run(job), whole(results)))
    (plain, reference), (copying, ours) = runs
    assert ours["metrics"][1]["moe/replicated_experts"] > 0
    compare(ours, reference)
    for mine, theirs in zip(copying, plain, strict=True):
        (before, after), (unchanged, all_sent) = mine["sent"], theirs["sent"]
        assert before == unchanged
        assert after["alltoall_base"] < all_sent["alltoall_base"]
        assert "broadcast" not in all_sent and after["broadcast"] == after["reduce"] > 0


@pytest.mark.slow
def test_copies_in_bfloat16(pools):
    """Over ten steps no further from float32 than the run without copies."""
    ranks, keys = ranks_of(LAYOUTS["EP2 x DP2"])
    losses = {}
    for name, precision, replicated in (("exact", "fp32", 0), ("plain", "bf16", 0), ("copies", "bf16", 2)):
        config = with_copies(with_experts("top-k", **keys), replicated)
        config |= {"train": config["train"] | {"precision": precision}}
        results = whole(pools(ranks).run({"config": config, "steps": STEPS}))
        losses[name] = torch.tensor([step[0] for step in results["steps"]])
    plain, copies = ((losses[name] - losses["exact"]).abs().max() for name in ("plain", "copies"))
    assert copies < 2 * plain


SPAWN_STEP = 3


def with_spawning(gate="variable", **keys):
    config = with_experts(gate, **keys)
    experts = {"spawn_step": SPAWN_STEP, "spawn_diversify": 0.1}
    model = config["model"] | {"moe": config["model"]["moe"] | experts}
    # The engines leave gradients before, or after they are clipped.
    return config | {"model": model, "optim": config["optim"] | {"clip_grad": 0.0}}


def spawning(pools, ranks, config):
    """Compared are the gradients of the first step with all experts; before, routers have none."""
    return whole(pools(ranks).run({"config": config, "steps": STEPS, "gradients_of": SPAWN_STEP}))


SPAWNING = [
    ("EP2 x DP2", "variable", {}),
    ("EP2 x TP2", "variable", {}),
    ("EP2 x PP2 interleaved", "top-k", {}),
    ("EP4 x DP4", "learned", {}),
    ("EP2 x CP2", "top-k", {}),
    ("TP2", "top-k", {}),
    *[("DP2", "variable", {"zero_stage": stage}) for stage in (0, 1, 3)],
    ("DP2", "learned", {"zero_stage": 2, "offload": "optimizer"}),
]


@pytest.mark.parametrize(
    ("layout", "gate", "engine"),
    [SPAWNING[0], *(pytest.param(*case, marks=pytest.mark.slow) for case in SPAWNING[1:])],
    ids=str,
)
def test_experts_spawned_during_the_run(pools, layout, gate, engine):
    ranks, keys = ranks_of(LAYOUTS[layout])
    config = with_spawning(gate, **keys)
    if engine:
        config |= {"engine": {"name": "deepspeed"} | engine}
    ours, reference = spawning(pools, ranks, config), spawning(pools, 1, with_spawning(gate))
    agree(ours, reference)
    # Of three layers with four experts each.
    dead = [metrics["moe/dead_experts"] for metrics in ours["metrics"]]
    assert dead[:SPAWN_STEP] == [9] * SPAWN_STEP and dead[SPAWN_STEP] == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "engine"), [("EP2 x DP2", {}), *[("DP2", {"zero_stage": stage}) for stage in (1, 2, 3)]], ids=str
)
def test_spawned_experts_are_what_is_trained_on(pools, layout, engine):
    """In bfloat16, with updates that change nothing: the float32 copies, too, are the spawned ones."""
    ranks, keys = ranks_of(LAYOUTS[layout])
    config = with_spawning(**keys)
    config |= {"train": config["train"] | {"precision": "bf16"}, "optim": config["optim"] | {"lr": 1e-12}}
    if engine:
        config |= {"engine": {"name": "deepspeed"} | engine}
    validations = {}
    for name, steps, spawn_step in (("before", 1, 1), ("after", 3, 1), ("others", 1, None)):
        moe = config["model"]["moe"] | {"spawn_step": spawn_step, "spawn_diversify": 0.0}
        moe |= {"router": {"top_k": 2, "normalize": "after"}}
        job = {"config": config | {"model": config["model"] | {"moe": moe}}, "steps": steps}
        validations[name] = whole(pools(ranks).run(job))["validation"]
    assert validations["after"] == pytest.approx(validations["before"], rel=1e-3)
    assert validations["others"] != pytest.approx(validations["before"], rel=5e-3)


@pytest.mark.slow
def test_until_they_are_spawned_every_rank_has_the_first_expert(pools):
    """With copies of busy experts no token travels before."""
    ranks, keys = ranks_of(LAYOUTS["EP2 x DP2"])
    config = with_copies(with_spawning("top-k", **keys))
    results = pools(ranks).run({"config": config, "steps": STEPS, "gradients_of": SPAWN_STEP, "count": True})
    agree(whole(results), spawning(pools, 1, with_spawning("top-k")))
    assert [metrics["moe/replicated_experts"] for metrics in results[0]["metrics"]][:3] == [3] * 3
    for result in results:
        first, spawned = (result["sent"][step].get("alltoall_base", 0) for step in (0, 3))
        assert first < spawned


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_tokens_come_back_from_wherever_they_were_sent(pools, ranks):
    """Any number of experts a token, none at all too, experts without tokens, ranks with different numbers."""
    cases = [(7, 0.5), (1, 0.3), (16, 0.0), (5, 1.0), (33, 0.1)]
    results = pools(ranks).run({"experts": 8, "empty": [1, 6], "cases": cases, "seed": 5})
    assert [result["exact"] for result in results] == [len(cases)] * ranks


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "modules"),
    [
        ("EP2 x DP2", None),
        ("EP2 x TP2", None),
        ("EP2 x PP2", None),
        ("EP2 x TP2", ["moe_activation"]),
        ("EP2 x TP2", ["moe_experts"]),
    ],
)
def test_nothing_is_counted_twice_in_the_recomputation(pools, layout, modules):
    ranks, keys = ranks_of(LAYOUTS[layout])
    kept = with_experts(**keys)
    choice = {"recompute": "selective", "recompute_modules": modules} if modules else {"recompute": "full"}
    recomputed = kept | {"train": kept["train"] | choice}
    theirs, ours = (whole(pools(ranks).run({"config": config, "steps": STEPS})) for config in (kept, recomputed))
    assert ours["steps"] == theirs["steps"]
    assert ours["metrics"] == theirs["metrics"]


@pytest.mark.slow
def test_a_checkpoint_moves_to_another_layout(pools, one_process, tmp_path):
    """Saved by ranks that share experts; one process, other such ranks, and stages go on, bias and load included."""
    saved = str(tmp_path / "state")
    reference = one_process(with_experts("moved"))["steps"]
    ranks, keys = ranks_of(LAYOUTS["EP2 x DP2"])
    pools(ranks).run({"config": with_experts("moved", **keys), "steps": 5, "save": saved, "save_after": 5})
    for layout in ({}, LAYOUTS["EP4 x DP4"], LAYOUTS["EP2 x PP2"], LAYOUTS["EP2 x TP2"]):
        ranks, keys = ranks_of(layout)
        moved = with_experts("moved", **keys)
        results = pools(ranks).run({"config": moved, "load": saved, "first_step": 5, "steps": STEPS})
        for mine, theirs in zip(whole(results)["steps"], reference[5:], strict=True):
            assert mine[0] == pytest.approx(theirs[0], rel=1e-5), layout
