"""A run with experts on two ranks: what it reports, that it goes on where it was, and that its checkpoint opens."""

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from models.moe.statistics import routers
from tests.trainer.conftest import finish, metrics, trajectory
from trainer.errors import ConfigError
from trainer.stored.export import export
from trainer.stored.inference import load_model

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


@pytest.mark.slow
def test_a_run_that_stops_where_experts_are_spawned_goes_on_to_the_bit(tiny_run, tmp_path):
    """Its checkpoint holds them as they were before; it can be evaluated, and not be exported."""
    spawning = (
        "--model.moe.num_experts=4",
        "--model.moe.dense_layers=[0]",
        "--model.moe.spawn_step=4",
        "--model.moe.spawn_diversify=0.1",
        "--train.precision=bf16",
        "--train.steps=6",
        "--checkpoint.every=4",
    )
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    code, output = finish(tiny_run(whole, *spawning))
    assert code == 0, output
    assert "up to step 4 all tokens go to the first expert; then the others become copies of it" in output
    routed = [line["moe/experts_per_token"] for line in metrics(whole) if "grad_norm" in line]
    assert routed == [1.0] * 4 + [2.0] * 2

    stopped = whole / "checkpoints/step_00000004"
    (router,) = routers([load_model(stopped, torch.device("cpu")).model]).values()
    assert router(torch.randn(3, 2, 32)).routing_map.sum(0).tolist() == [6, 0, 0, 0]
    options = {"precision": None, "max_file_bytes": 1e9, "report": print}
    with pytest.raises(ConfigError, match="has experts that are to be spawned at step 4; train on past it"):
        export(stopped, tmp_path / "weights", **options)
    assert not (tmp_path / "weights").exists()
    export(whole, tmp_path / "weights", **options)

    code, output = finish(tiny_run(resumed, *spawning, f"--checkpoint.resume={stopped}"))
    assert code == 0, output
    assert trajectory(resumed)[0] == trajectory(whole)[0][4:]
