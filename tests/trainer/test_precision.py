"""What train.precision=auto becomes, and where it is written down."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import yaml

from tests.helpers import WAIT
from tests.processes import QUIET, finish, start
from tests.trainer.conftest import metrics
from trainer import precision, run_directory
from trainer.cli import dump, make_parser, parse
from trainer.config import EngineConfig, PretrainConfig, TrainConfig
from trainer.planning.config import ClusterConfig, PlanConfig

CPU = torch.device("cpu")
AUTO = PretrainConfig(train=TrainConfig(precision="auto"))


def begun_in(run_dir, name):
    """A run directory with a checkpoint."""
    (run_dir / "checkpoints" / "step_00000001").mkdir(parents=True)
    (run_dir / "config.yaml").write_text(f"train: {{precision: {name}}}\n")
    return run_dir


@pytest.mark.parametrize(("multiplies", "expected"), [(True, "bf16"), (False, "fp32")])
def test_auto_is_what_the_processor_is_faster_in(tmp_path, monkeypatch, multiplies, expected):
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda: multiplies)
    config = replace(AUTO, run=replace(AUTO.run, dir=str(tmp_path)))
    assert precision.choose(config, CPU)[0] == expected
    assert precision.choose(config, torch.device("cuda"))[0] == "bf16"
    without_bf16 = replace(config, engine=EngineConfig("deepspeed", zero_stage=0))
    assert precision.choose(without_bf16, torch.device("cuda"))[0] == "fp32"


@pytest.mark.parametrize("multiplies", [True, False])
@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_a_run_goes_on_as_it_began_on_any_processor(tmp_path, monkeypatch, name, multiplies):
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda: multiplies)
    config = replace(AUTO, run=replace(AUTO.run, dir=str(begun_in(tmp_path / "run", name))))
    assert precision.choose(config, CPU)[0] == name
    assert not any(key.startswith("train.precision") for key in run_directory.differing_keys(tmp_path / "run", config))
    # A checkpoint of another run, gone on with in a fresh directory.
    (tmp_path / "run" / "checkpoints" / "step_00000001" / "config.yaml").write_text(f"train: {{precision: {name}}}\n")
    elsewhere = replace(
        config,
        run=replace(config.run, dir=str(tmp_path / "other")),
        checkpoint=replace(config.checkpoint, resume=str(tmp_path / "run/checkpoints/step_00000001")),
    )
    assert precision.choose(elsewhere, CPU)[0] == name


def test_what_was_asked_for_is_held_against_the_run(tmp_path):
    run = begun_in(tmp_path / "run", "bf16")
    asked = PretrainConfig(train=TrainConfig(precision="fp32"))
    assert "train.precision: bf16 -> fp32" in run_directory.differing_keys(run, asked)


def test_settled_it_is_written_down_and_said_once(tmp_path, monkeypatch):
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda: False)
    said = []
    monkeypatch.setattr("trainer.precision._LOGGER.info", lambda message, *values: said.append(message % values))
    parser = make_parser(PretrainConfig, "")
    config, namespace = parse(PretrainConfig, parser, ["--train.precision=auto", f"--run.dir={tmp_path}"])
    before = dump(parser, namespace, PretrainConfig)
    settled, text = precision.settle(config, before, CPU)
    assert settled.train.precision == "fp32" and config.train.precision == "auto"
    # Not a line but that one differs.
    assert text == before.replace("precision: auto", "precision: fp32") != before
    assert [line.split(",")[0] for line in said] == ["train.precision=auto: fp32"]
    assert precision.settle(settled, text, CPU) == (settled, text)
    assert len(said) == 1


def test_a_plan_takes_what_the_devices_are_faster_in():
    auto = TrainConfig(precision="auto")
    assert PlanConfig(train=auto, cluster=ClusterConfig(peak_bf16=2.0, peak_fp32=1.0)).train.precision == "bf16"
    assert PlanConfig(train=auto, cluster=ClusterConfig(peak_bf16=1.0, peak_fp32=1.0)).train.precision == "fp32"


RANK = """
import json, os, sys, torch
from trainer import precision
from trainer.config import PretrainConfig, TrainConfig
rank = int(os.environ["RANK"])
precision.multiplies_bfloat16 = lambda: rank == 1  # processors of two kinds
config = PretrainConfig(train=TrainConfig(precision="auto"))
settled, text = precision.settle(config, "train: {precision: auto}", torch.device("cpu"))
torch.distributed.init_process_group("gloo")
open(f"{rank}.json", "w").write(json.dumps([rank, settled.train.precision, text.strip()]))
torch.distributed.barrier()
"""


def test_every_rank_takes_rank_0s(tmp_path):
    (tmp_path / "rank.py").write_text(RANK)
    code, said = finish(start(tmp_path / "rank.py", ranks=2, folder=tmp_path))
    assert code == 0, said
    assert_both_take_fp32(tmp_path)


@pytest.mark.slow
def test_every_rank_takes_rank_0s_under_torchrun(tmp_path):
    (tmp_path / "rank.py").write_text(RANK)
    environment = os.environ | QUIET
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "rank.py"]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, timeout=WAIT)
    assert_both_take_fp32(tmp_path)


def assert_both_take_fp32(folder):
    lines = [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]
    text = "train:\n  precision: fp32"
    assert lines == [[0, "fp32", text], [1, "fp32", text]]


def test_a_run_begun_by_auto_goes_on_on_another_processor(tiny_run, tmp_path, monkeypatch):
    """Begun where there are no instructions for bfloat16, in fp32; gone on with where there may be."""
    run_dir = tmp_path / "run"
    options = ("--train.precision=auto", "--evaluation.every=0", "--logging.progress=false")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    code, said = finish(tiny_run(run_dir, *options, "--train.steps=2"))
    assert code == 0 and "train.precision=auto: fp32" in said, said
    for written in (run_dir, run_dir / "checkpoints" / "step_00000002"):
        assert yaml.safe_load((written / "config.yaml").read_text())["train"]["precision"] == "fp32"
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA")
    code, said = finish(tiny_run(run_dir, *options, "--train.steps=3"))
    assert code == 0 and "train.precision=auto: fp32, as the run began" in said, said
    assert [line["step"] for line in metrics(run_dir) if "grad_norm" in line] == [1, 2, 3]
