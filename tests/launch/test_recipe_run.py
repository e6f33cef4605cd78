"""`spiketrain convert run`: a whole conversion by one command, in one process and on two ranks."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml

from launch.convert import COMMANDS
from tests.helpers import WAIT
from tests.processes import QUIET
from tests.trainer.conftest import ROOT
from trainer.cli import make_parser, parse
from trainer.config import PretrainConfig
from trainer.evaluation.config import EvaluateConfig
from trainer.recipe import read_steps
from trainer.stored.opening import open_weights

PATTERN = "gated_delta_net, sliding_window_attention"


def recipe(trained, tiny_data, folder, **train):
    """From a trained run to a hybrid that is trained further, and evaluated."""
    steps = [
        {"hybrid": {"source": str(trained), "output": "hybrid", "pattern": PATTERN}},
        {"train": {"init": "hybrid", "run": {"dir": "further"}, "train": {"steps": 4, **train}}},
        {"export": {"checkpoint": "further", "output": "weights"}},
        {"evaluate": {"checkpoint": "weights", "data": str(tiny_data), "seq_len": 32, "json": "figures.json",
                      "compare_compressors": False}},
    ]  # fmt: skip
    values = {"dir": "convert", "base": {"config": str(trained / "config.yaml")}, "steps": steps}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    return values


def run(folder, *ranks):
    """Start the recipe; returns the process."""
    command = [sys.executable, str(ROOT / "launch/main.py"), "convert", "run", *ranks, "--config", "recipe.yaml"]
    environment = os.environ | QUIET | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def states(folder):
    entries = json.loads((folder / "convert" / "recipe.json").read_text())
    return {output: entry["state"] for output, entry in entries.items()}


def test_a_recipe_is_checked_without_torch(launch, trained, tiny_data, tmp_path):
    recipe(trained, tiny_data, tmp_path)
    code, out, errors, imported = launch("convert", "run", "--config", "recipe.yaml", "--check", "true")
    assert code == 0 and imported == [], errors
    lines = out.strip().splitlines()
    assert lines[0].startswith(
        f"spiketrain convert hybrid --source {trained} --output hybrid --pattern 'gated_delta_net"
    )
    assert lines[1].endswith("--init hybrid --run.dir further --train.steps 4")
    assert lines[3].startswith("spiketrain evaluate --checkpoint weights")
    code, _, errors, _ = launch("convert", "run")
    assert code == 2 and "steps: there are none; give a recipe with --config" in errors


@pytest.mark.slow
def test_a_recipe_runs_goes_on_and_is_skipped(trained, tiny_data, tmp_path):
    values = recipe(trained, tiny_data, tmp_path)
    values["steps"][3]["evaluate"]["data"] = "nowhere"
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    process = run(tmp_path)
    out, _ = process.communicate(timeout=WAIT)
    assert process.returncode == 2 and "error: data: nowhere is neither prepared data" in out, out
    assert states(tmp_path) == {"hybrid": "done", "further": "done", "weights": "done", "figures.json": "ended"}
    process = run(tmp_path)
    out, _ = process.communicate(timeout=WAIT)
    assert process.returncode == 2 and "step 3, export to weights (of 4): has ended" in out, out
    recipe(trained, tiny_data, tmp_path)
    process = run(tmp_path)
    out, _ = process.communicate(timeout=WAIT)
    assert process.returncode == 0 and set(states(tmp_path).values()) == {"done"}, out
    assert json.loads((tmp_path / "figures.json").read_text())["loss"] > 0
    assert open_weights(tmp_path / "weights").model.layer_mixers()[1] == "sliding_window_attention"
    process = run(tmp_path)
    out, _ = process.communicate(timeout=WAIT)
    assert process.returncode == 0 and out.count("has ended") == 4, out


@pytest.mark.slow
def test_two_ranks_stop_and_go_on(trained, tiny_data, tmp_path):
    """The ranks share the training step alone. A signal to the launcher stops it with a checkpoint."""
    recipe(trained, tiny_data, tmp_path, steps=2000)
    process = run(tmp_path, "--ranks", "2")
    deadline = time.monotonic() + WAIT
    while not (tmp_path / "further" / "metrics.jsonl").exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=WAIT)
    assert process.returncode == 75, out
    assert states(tmp_path) == {"hybrid": "done", "further": "ended"}
    values = recipe(trained, tiny_data, tmp_path, steps=2000)
    entries = json.loads((tmp_path / "convert" / "recipe.json").read_text())
    values["steps"][1]["train"]["train"]["steps"] = 8
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    process = run(tmp_path, "--ranks", "2")
    out, _ = process.communicate(timeout=WAIT)
    assert process.returncode == 2 and "(train.steps: 2000 -> 8)" in out, out
    assert json.loads((tmp_path / "convert" / "recipe.json").read_text()) == entries


@pytest.mark.parametrize("name", ["laptop", "spikingbrain-7b"])
def test_the_recipes_of_the_repository_are_valid(name, monkeypatch):
    """Names and layouts; data and weights are made by the steps before, or are the reader's."""
    monkeypatch.chdir(ROOT)
    values = yaml.safe_load((ROOT / f"configs/convert/{name}.yaml").read_text())
    known = {command: kind for command, (_, kind, _) in COMMANDS.items()}
    commands = known | {"train": PretrainConfig, "evaluate": EvaluateConfig}
    steps = read_steps(values["base"], values["steps"], commands)
    model = [] if name == "laptop" else ["--model", f"configs/models/{name}.yaml"]
    for step in (step for step in steps if step.is_training):
        words = step.arguments()
        for option in ("--init", "--data.blend"):
            if option in words:
                place = words.index(option)
                del words[place : place + 2]
        config, _ = parse(PretrainConfig, make_parser(PretrainConfig, ""), [*words, *model])
        config.validate_layout(1 if name == "laptop" else 256)
        if name != "laptop":
            tokens = config.train.steps * config.train.global_batch_size * config.train.seq_len
            assert tokens == pytest.approx(step.options["tokens"], rel=1e-3)
