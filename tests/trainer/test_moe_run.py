"""A run with experts on two ranks: what it reports, that it goes on where it was, and that its checkpoint opens."""

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from models.moe.statistics import routers
from tests.trainer.conftest import finish, metrics, trajectory
from trainer.inference import load_model

MODEL = (
    "--model.moe.num_experts=4",
    "--model.moe.dense_layers=[0]",
    "--model.moe.router.gate=dense_to_sparse",
    "--model.moe.router.dense_to_sparse.gumbel_noise=true",
    "--model.moe.router.dense_to_sparse.decay_steps=5",
    "--parallel.expert=2",
)
KEYS = "experts_per_token load_cv max_load entropy dropped_tokens dead_experts balance_loss z_loss temperature load"


@pytest.mark.slow
def test_a_run_reports_its_experts_and_goes_on_to_the_bit(tiny_run, tmp_path):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    code, output = finish(tiny_run(whole, *MODEL, "--train.steps=6", ranks=2))
    assert code == 0, output
    assert "experts: 4 routed, 0 shared in 1 layers, over 2 ranks; a token goes to at most 4 at first, 2 in" in output
    lines = [line for line in metrics(whole) if "grad_norm" in line]
    assert all({f"moe/{key}" for key in KEYS.split()} <= line.keys() for line in lines)
    assert [len(line["moe/load"]) for line in lines] == [1] * 6
    assert lines[0]["moe/experts_per_token"] > 3 > lines[-1]["moe/experts_per_token"]
    assert lines[0]["moe/temperature"] == 1.0 > lines[-1]["moe/temperature"]
    events = EventAccumulator(str(whole / "tensorboard")).Reload()
    assert [image.step for image in events.Images("moe/load")] == [3, 6]

    half = f"--checkpoint.resume={whole / 'checkpoints/step_00000003'}"
    code, output = finish(tiny_run(resumed, *MODEL, "--train.steps=6", half, ranks=2))
    assert code == 0, output
    ours, theirs = trajectory(resumed), trajectory(whole)
    assert ours[0] == theirs[0][3:]
    assert [line["moe/load"] for line in metrics(resumed) if "moe/load" in line] == [
        line["moe/load"] for line in lines[3:]
    ]

    opened = load_model(whole, torch.device("cpu"))
    (router,) = routers([opened.model]).values()
    assert router.step == 5, "its schedules stand where the last validation had them"
    torch.testing.assert_close(router.load.tolist(), lines[-1]["moe/load"][0], rtol=0, atol=1e-7)
