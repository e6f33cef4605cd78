"""One run from end to end: what it leaves behind, and what it does when it is started again."""

import json
import logging
import os
import signal
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kernels import backend
from models.decoder import flops_per_token, shapes
from tests.helpers import STEP_KEYS
from tests.trainer.conftest import finish, in_process_config, leave_groups, metrics, status
from trainer import pretrain, runtime
from trainer.cli import from_mapping
from trainer.config import EvaluationConfig, LoggingConfig, PretrainConfig, RunConfig
from trainer.errors import ConfigError
from trainer.events import read_events
from trainer.peers import PeerWatch
from trainer.stored.checkpoint import Progress

# FLOP/s that the run is told the machine can do: more than any step reaches, or the step would raise it.
PEAK = 1e15


@pytest.fixture(scope="module")
def run_dir(tiny_data, tmp_path_factory):
    backend._logged.clear()  # each choice is logged once a process, and another test may have run in this one
    run_dir = tmp_path_factory.mktemp("run")
    config = replace(
        in_process_config(tiny_data, run_dir),
        evaluation=EvaluationConfig(every=4, batches=2, samples=2, sample_tokens=8, compare_compressors=True),
        logging=LoggingConfig(profile_step=2),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "peak_flops", lambda *_: PEAK)
        assert pretrain.run(config, yaml.safe_dump(asdict(config))) == 0
    return run_dir


def test_leaves_what_the_readme_lists(run_dir):
    names = {path.name for path in run_dir.iterdir()}
    expected = {"config.yaml", "metrics.jsonl", "events.jsonl", "tensorboard", "checkpoints", "run.log", "status.json"}
    assert names == expected | {"profile"}
    assert status(run_dir) == {"state": "done", "exit_code": 0, "message": ""}
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["step_00000003", "step_00000006"]
    saved = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert from_mapping(PretrainConfig, saved).train.steps == 6


def test_metrics_have_the_agreed_keys(run_dir):
    lines = metrics(run_dir)
    training = [line for line in lines if "grad_norm" in line]
    assert [line["step"] for line in training] == [1, 2, 3, 4, 5, 6]
    assert all(line.keys() == STEP_KEYS for line in training)
    assert [line["tokens"] for line in training] == [128 * step for step in range(1, 7)]
    saved = from_mapping(PretrainConfig, yaml.safe_load((run_dir / "config.yaml").read_text()))
    flops = flops_per_token(shapes(saved.model, 512), saved.train.seq_len)
    for line in training:
        assert line["model_flops_utilization"] == pytest.approx(flops * line["tokens_per_second"] / PEAK)
        assert line["tokens_per_second"] == pytest.approx(128 / line["step_seconds"])
        phases = [line[f"{phase}_seconds"] for phase in ("data", "forward_backward", "reduce", "optimizer")]
        # All but a few statements of the step is in one of them.
        assert min(phases) > 0 and 0.5 * line["step_seconds"] < sum(phases) <= line["step_seconds"]
    assert [line["checkpoint_seconds"] > 1e-3 for line in training] == [False, False, False, True, False, False]
    validations = [line for line in lines if "split" in line]
    assert [line.keys() for line in validations] == [{"step", "split", "loss", "bits_per_byte"}] * 2
    assert [line["step"] for line in validations] == [4, 6]


def test_tensorboard_has_scalars_samples_and_the_configuration(run_dir):
    events = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    names = {"train/loss", "train/lr", "train/optimizer_seconds", "validation/bits_per_byte", "final/bits_per_byte"}
    assert names <= set(events.Tags()["scalars"])
    assert {"config/text_summary", "sample/0/text_summary", "sample/1/text_summary"} <= set(events.Tags()["tensors"])
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]


def test_the_log_tells_what_ran(run_dir):
    text = (run_dir / "run.log").read_text()
    for line in (
        "2 layers (gated_delta_net, full_attention)",
        "batch: 4 sequences of 32 tokens = 1 data-parallel x 2 micro x 2 accumulated",
        "peak of matrix multiplication",
        "gated_delta_rule: backend",
        "attention: backend",
        "gzip -9 reaches",
        "xz -9 reaches",
        "6 steps in",
    ):
        assert line in text
    choices = [line.split(" ", 2)[2] for line in text.splitlines() if ": backend " in line]
    assert len(choices) == len(set(choices)), "each choice of a kernel is logged once"


def test_the_profile_is_a_trace(run_dir):
    (trace,) = (run_dir / "profile").iterdir()
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert "aten::mm" in names or "aten::addmm" in names


def test_a_finished_run_ends_at_once_and_changes_nothing(tiny_run, tmp_path):
    run_dir = tmp_path / "run"
    assert finish(tiny_run(run_dir, "--train.steps=2"))[0] == 0
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    code, output = finish(tiny_run(run_dir, "--train.steps=2"))
    assert code == 0
    assert output == f"{run_dir} has already reached step 2; raise train.steps to go on\n"
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before


def test_another_model_in_the_same_directory_is_refused(tiny_run, tmp_path):
    run_dir = tmp_path / "run"
    assert finish(tiny_run(run_dir, "--train.steps=2"))[0] == 0
    code, output = finish(tiny_run(run_dir, "--train.steps=4", "--model.ffn_hidden_size=96", "--train.seed=7"))
    assert code == 2
    assert "model.ffn_hidden_size: 64 -> 96; train.seed: 1234 -> 7" in output
    assert len(output.splitlines()) == 1
    assert status(run_dir)["state"] == "config_error"


def test_a_crash_is_reported(tiny_data, tmp_path, monkeypatch):
    def fail(self):
        raise RuntimeError("the disk is on fire")

    monkeypatch.setattr("trainer.loop.Trainer._step", fail)
    with pytest.raises(RuntimeError, match="on fire"):
        pretrain.run(in_process_config(tiny_data, tmp_path / "run"), "")
    leave_groups()
    assert status(tmp_path / "run")["state"] == "failed"
    assert "RuntimeError: the disk is on fire (test_pretrain.py:" in status(tmp_path / "run")["message"]
    failure = read_events(tmp_path / "run")[-1]
    assert (failure["kind"], failure["ranks"], failure["message"]) == (
        "failure",
        [0],
        status(tmp_path / "run")["message"],
    )
    logging.getLogger("spiketrain").handlers.clear()


def test_the_peak_is_that_of_all_ranks(monkeypatch):
    """Those that share a model each count, unlike in what is summed over the data."""
    monkeypatch.setattr(pretrain, "peak_flops", lambda *_: 3.0)
    collectives = SimpleNamespace(
        barrier=lambda: None,
        sum_over_ranks=lambda values: [4 * value for value in values],
        sum_over_data=lambda values: [2 * value for value in values],
    )
    engine = SimpleNamespace(rank=0, device=torch.device("cpu"), collectives=collectives)
    assert pretrain.total_peak_flops(PretrainConfig(), engine) == 12.0


# Signals, and what ranks see of a directory


def stop_this_process():
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_stop_after_the_last_step_changes_nothing(tiny_data, tmp_path, monkeypatch):
    def write_status(*arguments):
        stop_this_process()
        runtime.write_status(*arguments)

    monkeypatch.setattr(pretrain, "write_status", write_status)
    before = signal.getsignal(signal.SIGTERM)
    config = replace(in_process_config(tiny_data, tmp_path / "run", steps=1), evaluation=EvaluationConfig(every=0))
    assert pretrain.run(config, "") == 0
    assert status(tmp_path / "run")["state"] == "done"
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_stop_does_not_keep_a_failure_from_being_written_down(tmp_path, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("broken")

    def report(peers, message):
        stop_this_process()
        told.append(message)

    told = []
    monkeypatch.setattr(pretrain, "_train", fail)
    monkeypatch.setattr(PeerWatch, "report_own_failure", report)
    with pytest.raises(RuntimeError, match="broken"):
        pretrain.run(PretrainConfig(run=RunConfig(dir=str(tmp_path))), "")
    assert len(told) == 1 and told[0].startswith("RuntimeError: broken")


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_go_by_what_they_were_told_of_checkpoints(tmp_path, monkeypatch, rank):
    """Not by what each sees of the directory, which on another host may be older."""
    config = PretrainConfig(run=RunConfig(dir=str(tmp_path)))
    engine, folder = SimpleNamespace(rank=rank), tmp_path / "checkpoints"

    def load(told):
        monkeypatch.setattr(pretrain.checkpoint, "find_latest_over_ranks", lambda *_: told)
        return pretrain._checkpoint_to_load(config, engine)

    complaints = [f"{folder}/.saving_is_damaged was not finished and is passed over"]
    complaints += [f"{folder}/step_0000000{step} is damaged and passed over: it is empty" for step in (2, 1)]
    with pytest.raises(ConfigError, match=r"none can be read \(.*step_00000002 is damaged"):
        load((None, complaints))
    for step in (1, 2):
        (folder / f"step_0000000{step}").mkdir(parents=True)
    assert load((None, complaints[:1])) is None
    whole = folder / "step_00000001"
    assert load((whole, complaints[:2])) == whole
    assert (folder / "damaged_step_00000002").exists() == (rank == 0)


def test_the_configuration_is_replaced_as_a_whole(tmp_path):
    """A run that is killed meanwhile leaves the old one, not an empty one."""
    (tmp_path / "config.yaml").write_text("old")
    (tmp_path / "other name").hardlink_to(tmp_path / "config.yaml")
    pretrain.write_configuration(PretrainConfig(run=RunConfig(dir=str(tmp_path))), "new", Progress())
    assert (tmp_path / "config.yaml").read_text() == "new"
    assert (tmp_path / "other name").read_text() == "old"
