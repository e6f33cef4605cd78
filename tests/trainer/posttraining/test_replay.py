"""Runs that replay the experts of the sampler's routers."""

import pytest

from models.config import MoEConfig, RouterConfig, RouterLossConfig
from tests.launch.serving import write_model
from tests.trainer.conftest import metrics
from tests.trainer.posttraining.conftest import run, steps

REPLAY = ("--rl.routing_replay=rollout", "--train.steps=4")


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    moe = MoEConfig(
        num_experts=4, expert_hidden_size=16, router=RouterConfig(top_k=2), losses=RouterLossConfig(balance=0.0)
    )
    return write_model(tmp_path_factory.mktemp("experts"), rows=448, moe=moe)


@pytest.fixture(scope="module")
def alone(experts, rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    run(experts, rows, folder, "rl", *REPLAY)
    return folder


def test_training_begins_at_the_policy_and_resumes(experts, rows, tmp_path, alone):
    """With two updates a rollout, whose old log-probabilities are of the same experts; step 3 is the second of two."""
    lines = [line for line in metrics(alone) if "grad_norm" in line]
    assert lines[0]["policy/ratio"] == pytest.approx(1, abs=1e-5) and lines[0]["policy/sampler_k3"] < 1e-5
    assert all(line["grad_norm"] > 0 for line in lines) and lines[1]["policy/k3"] > 0
    run(experts, rows, tmp_path / "cut", "rl", *REPLAY, "--train.steps=3")
    run(experts, rows, tmp_path / "cut", "rl", *REPLAY)
    assert steps(tmp_path / "cut") == steps(alone)


LAYOUTS = {
    "accumulation": (1, "megatron", ("--train.micro_batch_size=1",)),
    "expert": (2, "megatron", ("--parallel.expert=2",)),
    "tensor, sequence": (2, "megatron", ("--parallel.tensor=2", "--parallel.sequence=true")),
    "context": (2, "megatron", ("--parallel.context=2",)),
    "ZeRO 2": (2, "deepspeed", ("--engine.name=deepspeed", "--engine.zero_stage=2")),
}


# Whoever chooses by himself then takes other steps.
NEXT = """
import runpy, sys
from models.moe import router

recorded_experts = router.recorded_experts
router.recorded_experts = lambda keep, top_k: recorded_experts(keep.roll(1, 1), top_k)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_with_the_next(experts, rows, folder, *options, **how):
    """A run whose sampler tells the next experts in place of those that it chose; its steps."""
    (folder / "next.py").write_text(NEXT)
    different = ("--rl.max_mismatch=1000", *options)
    run(experts, rows, folder / "run", "rl", *REPLAY, *different, wrapper=folder / "next.py", **how)
    return steps(folder / "run")


@pytest.fixture(scope="module")
def by_the_next(experts, rows, tmp_path_factory):
    return run_with_the_next(experts, rows, tmp_path_factory.mktemp("next"))


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_tokens_keep_their_experts_in_every_layout(experts, rows, tmp_path, alone, by_the_next, layout):
    ranks, engine, options = LAYOUTS[layout]
    found = run_with_the_next(experts, rows, tmp_path, *options, ranks=ranks, imported=engine)
    for (_, loss, norm), (_, expected, expected_norm) in zip(found, by_the_next, strict=True):
        assert loss == pytest.approx(expected, abs=2e-5) and norm == pytest.approx(expected_norm, rel=1e-3)
    assert abs(by_the_next[0][2] / steps(alone)[0][2] - 1) > 0.01, "other experts take other steps"


def test_what_has_no_experts_is_refused(model, experts, rows, tmp_path):
    output = run(model, rows, tmp_path, "rl", *REPLAY, imported="torch", code=2)
    assert "the model has no experts" in output.splitlines()[-1]
    options = (*REPLAY, "--rl.strict=true", "--train.micro_batch_size=1")
    output = run(experts, rows, tmp_path, "rl", *options, imported="torch", code=2)
    assert "with rl.strict the choices are the same" in output.splitlines()[-1]
