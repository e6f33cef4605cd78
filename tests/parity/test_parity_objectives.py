"""Objectives other than the language model's give in every layout what they give in one process."""

import pytest
import torch

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


# Wider and deeper than the student, unevenly over two stages; its distributions are far from even.
TEACHER = {
    "num_layers": 5,
    "hidden_size": 48,
    "init_std": 0.2,
    "mixers": {"pattern": "full_attention, hgrn"},
    "tie_embeddings": False,
}
WITH_EXPERTS = TEACHER | {"moe": EXPERTS | {"shared_experts": 2}}
DISTILLATION = {"teacher": TEACHER, "temperature": 1.5, "kl_weight": 0.6, "next_token_weight": 0.4}

# A split of the student's layers that the teacher has not, and two cuts of the teacher at once.
MORE = ("PP2 uneven", "TP2+SP x PP2", "PP2 x CP2", "ZeRO-1 x TP2+SP")


def distill(pools, name, **options):
    """A layout against one process: losses, gradients, metrics, and those of an evaluation."""
    ranks, alone, sharded = case(name)
    if name == "EP2":
        options = options | {"teacher": WITH_EXPERTS}
    job = {"steps": STEPS, "distillation": DISTILLATION | options}
    reference = whole(pools(1).run(job | {"config": alone | {"parallel": {}}}))
    ours = whole(pools(ranks).run(job | {"config": sharded}))
    compare(ours, reference)
    assert ours["validated"] == pytest.approx(reference["validated"], rel=1e-5)
    for mine, theirs in zip(ours["metrics"], reference["metrics"], strict=True):
        assert mine.keys() == theirs.keys() and theirs["kl"] > 0.05
        for metric, value in mine.items():
            tolerance = {"rtol": 1e-5, "atol": 0.0} if metric in ("kl", "nll") else {"rtol": 1e-4, "atol": 1e-7}
            torch.testing.assert_close(torch.tensor(value), torch.tensor(theirs[metric]), **tolerance, msg=metric)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in (*CASES, *MORE)],
)
def test_distillation(pools, name):
    distill(pools, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["TP2", "PP2 interleaved", "ZeRO-2"])
def test_distillation_in_reverse_alone(pools, name):
    distill(pools, name, direction="reverse", kl_weight=1.0, next_token_weight=0.0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["TP2", "PP2 interleaved", "ZeRO-0 x TP2"])
def test_a_teacher_with_experts_of_a_dense_student(pools, name):
    """Also over tensor-parallel ranks without sequence parallelism, which trained experts need."""
    distill(pools, name, teacher=WITH_EXPERTS)


@pytest.mark.slow
def test_a_teacher_in_another_precision(pools):
    """Between stages its hidden states travel in its own type, bfloat16, the student's in float32."""
    distill(pools, "PP2", precision="bf16")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["TP2", "PP2", "DP2", "ZeRO-0 x TP2", "ZeRO-2", "ZeRO-3"])
def test_a_teacher_has_no_optimizer_state(pools, name):
    """On every rank the optimizer updates and keeps as many bytes with it as without."""
    ranks, _, config = case(name)
    with_teacher = pools(ranks).run({"config": config, "steps": 1, "distillation": DISTILLATION})
    without = pools(ranks).run({"config": config, "steps": 1})
    assert [one["held"] for one in with_teacher] == [one["held"] for one in without]
    assert all(one["held"]["moments"] > 0 for one in without)


# Softmax everywhere, where the student has other mixers in layers 0, 2 and 3: in both stages, and unevenly.
SOFTMAX = {"mixers": {"pattern": "full_attention"}, "init_std": 0.2, "tie_embeddings": False}
ALIGNED = ["layers.0.mixer.*", "layers.2.mixer.*", "layers.3.mixer.*", "lower_bounds"]


def align(pools, name, teacher=SOFTMAX, **train):
    """A layout against one process: losses, gradients, the loss of every layer, and those of an evaluation."""
    ranks, alone, sharded = case(name)
    alone, sharded = (one | {"train": one["train"] | {"trainable": ALIGNED} | train} for one in (alone, sharded))
    job = {"steps": STEPS, "alignment": teacher}
    reference = whole(pools(1).run(job | {"config": alone | {"parallel": {}}}))
    ours = whole(pools(ranks).run(job | {"config": sharded}))
    compare(ours, reference)
    assert all(
        name.startswith(("layers.0.mixer", "layers.2.mixer", "layers.3.mixer", "lower")) for name in ours["gradients"]
    )
    assert ours["validated"] == pytest.approx(reference["validated"], rel=1e-5)
    for mine, theirs in zip(ours["metrics"], reference["metrics"], strict=True):
        assert list(mine) == [f"alignment/layer_{layer:02d}" for layer in (0, 2, 3)]
        assert mine == pytest.approx(theirs, rel=1e-5) and min(mine.values()) > 0.5 and max(mine.values()) < 2


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in (*CASES, *MORE, "CP4", "ZeRO-1")],
)
def test_alignment(pools, name):
    align(pools, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["TP2+SP", "PP2 x CP2", "ZeRO-3"])
def test_alignment_with_recomputed_mixers(pools, name):
    align(pools, name, recompute="full")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "TP2+SP" else pytest.mark.slow) for name in CASES]
)
def test_logits_of_some_tokens(pools, name):
    ranks, alone, sharded = case(name)
    job = {"steps": STEPS, "logits": True}
    reference = whole(pools(1).run(job | {"config": alone | {"parallel": {}}}))
    ours = whole(pools(ranks).run(job | {"config": sharded}))
    compare(ours, reference)
    assert 0 < reference["metrics"][0]["chosen"] < 0.5


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "PP2" else pytest.mark.slow) for name in ("TP2+SP", "PP2", "EP2")]
)
def test_two_models_are_trained_by_turns_on_the_same_groups(pools, name):
    """A policy and its critic, say: each goes as it would alone, whatever the shape of the other."""
    ranks, _, first = case(name)
    second = first | {"model": first["model"] | {"hidden_size": 48, "init_std": 0.05}}
    both = pools(ranks).run({"config": first, "second": {"config": second}, "steps": STEPS})
    alone = [whole(pools(ranks).run({"config": config, "steps": STEPS})) for config in (first, second)]
    assert whole(both)["steps"] == alone[0]["steps"]
    assert both[0]["second"] == alone[1]["steps"]
