"""events.jsonl: whole lines, of all starts of a run, and what each kind says."""

import json
import os
import re
import threading
from dataclasses import replace

import pytest

from models.config import MoEConfig
from tests.trainer.conftest import in_process_config, leave_groups, metrics, status
from trainer import pretrain
from trainer.engines.megatron import MegatronEngine
from trainer.events import EventLog, read_events
from trainer.loop import Trainer

# The file


def test_an_event_is_a_line(tmp_path):
    EventLog(tmp_path).record("skip", 7, loss=float("nan"), grad_norm=1.5)
    (line,) = (tmp_path / "events.jsonl").read_text().splitlines()
    event = json.loads(line)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", event.pop("time"))
    assert event == {"step": 7, "kind": "skip", "loss": None, "grad_norm": 1.5}
    assert list(json.loads(line)) == ["time", "step", "kind", "loss", "grad_norm"]


def test_no_events_yet(tmp_path):
    EventLog(tmp_path).cut_torn_line()
    assert read_events(tmp_path) == [] and list(tmp_path.iterdir()) == []


def test_a_torn_line_is_neither_read_nor_continued(tmp_path):
    log = EventLog(tmp_path)
    log.record("start", 0)
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"time": "2026-1')
    assert [event["kind"] for event in read_events(tmp_path)] == ["start"]
    log.cut_torn_line()
    log.record("resume", 3)
    assert [event["kind"] for event in read_events(tmp_path)] == ["start", "resume"]


def test_a_line_that_does_not_fit_leaves_nothing(tmp_path, monkeypatch):
    log, write = EventLog(tmp_path), os.write
    log.record("start", 0)
    before = (tmp_path / "events.jsonl").read_bytes()
    with monkeypatch.context() as full:
        full.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:10]))
        with pytest.raises(OSError, match=r"events\.jsonl could not be written: 10 of \d+ bytes fit"):
            log.record("done", 1)
    assert (tmp_path / "events.jsonl").read_bytes() == before


def test_who_writes_at_the_same_time_writes_whole_lines(tmp_path):
    def write(number):
        for step in range(50):
            EventLog(tmp_path).record("skip", step, of="x" * 200 * number)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(1, 5)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert all(event["kind"] == "skip" for event in read_events(tmp_path))
    assert len(read_events(tmp_path)) == 200


# A run's


def told(run_dir):
    """Kind, step and fields of each event, those left out that differ from run to run."""
    events = read_events(run_dir)
    for event in events:
        assert event.pop("time") and event.pop("seconds", 0.0) >= 0
    return [(event.pop("kind"), event.pop("step"), event) for event in events]


def saved(run_dir, step, now=None):
    """The two events of a checkpoint of `step`, published at step `now`."""
    path = str(run_dir / f"checkpoints/step_{step:08d}")
    return [
        ("checkpoint", step, {"state": "begun", "path": path}),
        ("checkpoint", now or step, {"state": "published", "path": path}),
    ]


def validated(run_dir, step):
    line = next(line for line in metrics(run_dir) if "split" in line and line["step"] == step)
    return ("evaluation", step, {key: line[key] for key in ("split", "loss", "bits_per_byte")})


def test_the_events_of_a_run_that_is_stopped_and_goes_on(tiny_data, tmp_path, monkeypatch):
    run_dir, step = tmp_path / "run", Trainer._step
    config = in_process_config(tiny_data, run_dir)

    def stop_after_the_fourth(self):
        if self.progress.step == 3:
            self.stop_requested, self.stop_reason = True, "SIGTERM"
        return step(self)

    monkeypatch.setattr(Trainer, "_step", stop_after_the_fourth)
    assert pretrain.run(config, "") == 75
    first = [
        ("start", 0, {"ranks": 1, "init": None}),
        *saved(run_dir, 3),
        validated(run_dir, 3),
        ("stop", 4, {"why": "SIGTERM"}),
        *saved(run_dir, 4),
    ]
    assert told(run_dir) == first
    monkeypatch.setattr(Trainer, "_step", step)
    assert pretrain.run(config, "") == 0
    assert told(run_dir) == [
        *first,
        ("resume", 4, {"ranks": 1, "path": str(run_dir / "checkpoints/step_00000004")}),
        *saved(run_dir, 6),
        validated(run_dir, 6),
        ("done", 6, {}),
    ]
    again = replace(config, checkpoint=replace(config.checkpoint, resume="never"), train=replace(config.train, steps=1))
    assert pretrain.run(again, "") == 0
    assert (run_dir / "events.1.jsonl").exists() and told(run_dir)[0][0] == "start"


def test_the_events_of_a_run_that_spawns_skips_and_gives_up(tiny_data, tmp_path, monkeypatch):
    run_dir, norm = tmp_path / "run", MegatronEngine._grad_norm
    config = in_process_config(tiny_data, run_dir, max_skipped_steps=2)
    moe = MoEConfig(num_experts=4, spawn_step=1)
    config = replace(config, model=replace(config.model, moe=moe), checkpoint=replace(config.checkpoint, every=0))
    # The third step and all after it.
    monkeypatch.setattr(MegatronEngine, "_grad_norm", lambda self: norm(self) if self._updates < 2 else float("nan"))
    assert pretrain.run(config, "") == 1
    leave_groups()
    lines = {line["step"]: line for line in metrics(run_dir) if "grad_norm" in line}
    skips = [
        ("skip", step, {"loss": lines[step]["loss"], "grad_norm": None, "in_a_row": in_a_row})
        for step, in_a_row in ((3, 1), (4, 2))
    ]
    assert [event for event in told(run_dir) if event[0] != "evaluation"] == [
        ("start", 0, {"ranks": 1, "init": None}),
        ("spawn", 1, {"experts": 4}),
        *skips,
        ("failure", 4, {"ranks": [0], "message": status(run_dir)["message"]}),
    ]
