"""Runs that compute a prompt once for all answers to it take the steps of runs that compute it with each."""

import pytest

from models.config import MoEConfig, SpikingConfig
from tests.helpers import tiny_model_config
from tests.trainer.conftest import metrics
from tests.trainer.posttraining.conftest import VALUES, run, steps
from trainer.config import CompressionConfig, EngineConfig, ParallelConfig, TrainConfig
from trainer.posttraining.config import PosttrainConfig, RlConfig


def training(**changes):
    return TrainConfig(seq_len=512, global_batch_size=8, **changes)


VARIANTS = {
    "kl": ("--rl.kl=0.05",),
    "kl in the reward": ("--rl.kl=0.05", "--rl.kl_in=reward", "--rl.objective=gspo"),
    "one update": ("--rl.prompts=2", "--rl.kl=0.05"),
    "cut answers": ("--rl.mask_overlong=true",),
    "values": VALUES,
    "adapters": ("--model.lora.rank=3", "--model.lora.alpha=6", "--optim.lr=0.02"),
}
LAYOUTS = {
    "data": (2, ()),
    "tensor": (2, ("--parallel.tensor=2",)),
}


def compare(model, rows, tmp_path, options, ranks=1):
    run(model, rows, tmp_path / "apart", "rl", "--train.steps=4", *options, "--rl.share_prompts=null", ranks=ranks)
    run(model, rows, tmp_path / "shared", "rl", "--train.steps=4", *options, "--rl.share_prompts=0", ranks=ranks)
    for name in ("loss", "grad_norm", "policy/entropy", "policy/sampler_k3", "reward/mean"):
        ours, theirs = (
            [line[name] for line in metrics(tmp_path / which) if name in line] for which in ("shared", "apart")
        )
        assert ours and ours == pytest.approx(theirs, rel=1e-3, abs=2e-5), name


def test_a_run_takes_the_same_steps(model, rows, tmp_path):
    """The KL term, whose reference is scored without the policy, begins at 0."""
    compare(model, rows, tmp_path, VARIANTS["one update"])
    first, *later = [line["policy/kl"] for line in metrics(tmp_path / "shared") if "policy/kl" in line]
    assert first == pytest.approx(0, abs=1e-7) and max(later) > 1e-5
    lines = [line for line in metrics(tmp_path / "shared") if "policy/kl" in line]
    assert all(line["rollout/scoring_seconds"] > 0 for line in lines)
    # The policy in training is the one that answered.
    assert all(line["policy/ratio_sample_size"] == pytest.approx(1, abs=1e-5) for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "one update"])
def test_variants_take_the_same_steps(model, rows, tmp_path, variant):
    compare(model, rows, tmp_path, VARIANTS[variant])


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_take_the_same_steps(model, rows, tmp_path, layout):
    ranks, options = LAYOUTS[layout]
    compare(model, rows, tmp_path, (*options, *VARIANTS["kl"]), ranks)


def test_a_resumed_run_is_the_uninterrupted_one(model, rows, tmp_path):
    """Also between two updates of a rollout, whose answers are read from a file."""
    run(model, rows, tmp_path / "whole", "rl", "--rl.share_prompts=0")
    run(model, rows, tmp_path / "cut", "rl", "--rl.share_prompts=0", "--train.steps=3")
    run(model, rows, tmp_path / "cut", "rl", "--rl.share_prompts=0")
    assert steps(tmp_path / "cut") == steps(tmp_path / "whole")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 256),
        ({"rl": RlConfig(share_prompts=7)}, 7),
        ({"rl": RlConfig(share_prompts=None)}, None),
        ({"stage": "sft"}, None),
        ({"rl": RlConfig(strict=True), "train": training(micro_batch_size=1)}, None),
        ({"engine": EngineConfig(name="deepspeed")}, None),
        ({"parallel": ParallelConfig(tensor=2)}, 256),
        ({"parallel": ParallelConfig(tensor=2, sequence=True)}, None),
        ({"parallel": ParallelConfig(context=2)}, None),
        ({"train": training(recompute="full")}, None),
        ({"train": training(compression=CompressionConfig(bits=8))}, None),
    ],
)
def test_which_runs_share(changes, expected):
    values = {"stage": "rl", "rl": RlConfig(), "train": training()} | changes
    assert PosttrainConfig(**values).shared_tokens == expected


def test_models_of_experts_and_spikes_do_not_share():
    for model in (
        tiny_model_config(moe=MoEConfig(num_experts=4)),
        tiny_model_config(spiking=SpikingConfig(layers=["all"])),
    ):
        assert PosttrainConfig(stage="rl", train=training(), model=model).shared_tokens is None


def test_a_negative_number_is_refused():
    with pytest.raises(ValueError, match="it must not be negative; null never shares"):
        RlConfig(share_prompts=-1)
