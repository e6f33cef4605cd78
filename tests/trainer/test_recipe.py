"""Staged recipes: what their steps are, and what the record of earlier runs allows."""

import os
import re
import threading

import pytest
import yaml

from launch.convert import COMMANDS
from trainer.config import PretrainConfig
from trainer.errors import ConfigError
from trainer.evaluation.config import EvaluateConfig
from trainer.recipe import Record, of_ranks, read_steps, single_process, wait_for

KNOWN = {name: kind for name, (_, kind, _) in COMMANDS.items() if name != "run"}
KNOWN |= {"train": PretrainConfig, "evaluate": EvaluateConfig}
TRAIN = {"run": {"dir": "trained"}}
HYBRID = {"source": "trained", "output": "hybrid", "pattern": "gated_delta_net"}


def steps_of(*steps, base=None):
    return read_steps(base or {}, list(steps), KNOWN)


def test_a_step_is_a_command_line():
    blend = {"data/books": 3, "data/web.v2": 1}
    phases = [{"from_step": 10, "train": {"seq_len": 64}}]
    training = {"init": "hybrid", "data": {"blend": blend}, "phases": phases, "parallel.tensor": 2, **TRAIN}
    base = {"config": "base.yaml", "data": {"document_mask": False}, "parallel": {"tensor": 4}}
    train, hybrid = steps_of(
        {"train": training}, {"hybrid": {**HYBRID, "gated_delta_net": {"expand_v": 2.0}}}, base=base
    )
    assert train.arguments() == [
        *("--config", "base.yaml", "--data.document_mask", "false", "--parallel.tensor", "2", "--init", "hybrid"),
        *("--data.blend", '{"data/books": 3, "data/web.v2": 1}'),
        *("--phases", '[{"from_step": 10, "train": {"seq_len": 64}}]', "--run.dir", "trained"),
    ]
    assert hybrid.arguments()[-2:] == ["--gated_delta_net.expand_v", "2.0"]
    assert str(hybrid) == "step 2, hybrid to hybrid" and str(train.output) == "trained"


def test_tokens_are_steps_of_the_batch(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.yaml").write_text(yaml.safe_dump({"train": {"seq_len": 100, "global_batch_size": 4}}))
    base = {"config": "base.yaml"}
    (step,) = steps_of({"train": {"tokens": 1.0e6, **TRAIN}}, base=base)
    assert step.arguments()[2:4] == ["--train.steps", "2500"]
    (step,) = steps_of({"train": {"tokens": 1001, "train": {"seq_len": 50}, **TRAIN}}, base=base)
    assert step.arguments()[2:4] == ["--train.steps", "6"]


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ("hybrid", "steps: step 2 must name one command with its options"),
        ({"hybrid": HYBRID, "train": TRAIN}, "steps: step 2 must name one command with its options"),
        ({"hybrids": HYBRID}, "steps: step 2: no command 'hybrids'; choose from export, import, layers, hybrid"),
        ({"hybrid": HYBRID | {"patterns": "x"}}, "unknown option 'patterns' of hybrid; did you mean 'pattern'?"),
        ({"hybrid": HYBRID | {"tokens": 5}}, "unknown option 'tokens' of hybrid; "),
        ({"train": {"run": {"dirr": "x"}}}, "unknown option 'run.dirr' of train; did you mean 'run.dir'?"),
        ({"hybrid": {"source": "trained"}}, "steps: step 2: hybrid needs output, by which it is known whether"),
        ({"evaluate": {"checkpoint": "trained"}}, "steps: step 2: evaluate needs json, by which it is known whether"),
        ({"train": TRAIN}, "steps: two steps write to trained; give each an output of its own"),
        ({"train": {"run.dir": "x", "tokens": "many"}}, "tokens is 'many': it must be a positive number"),
        (
            {"train": {"run.dir": "x", "tokens": 9, "phases": [{"from_step": 1}]}},
            "tokens sets train.steps, and is not for phases",
        ),
        ({"train": {"run.dir": "x", "tokens": 9, "train": {"steps": 3}}}, "tokens sets train.steps, and is not for"),
    ],
)
def test_what_is_no_step(step, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        steps_of({"train": TRAIN}, step)


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """Three steps, of which two have ended, and their record."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.yaml").write_text("model: model.yaml\ntrain: {steps: 5}\n")
    (tmp_path / "model.yaml").write_text("num_layers: 2\n")
    steps = [{"train": TRAIN}, {"hybrid": HYBRID}, {"train": {"init": "hybrid", "run": {"dir": "further"}}}]
    record = Record(tmp_path / "record")
    for step in read(steps)[:2]:
        record.write(step, state="begun", settings=step.settings(), launch="first", port=1)
        assert not record.is_done(step)
        record.check(read(steps))
        step.output.mkdir()
        record.write(step, state="done", exit_code=0)
        assert record.is_done(step)
    return steps, record


def read(steps):
    return read_steps({"config": "base.yaml"}, steps, KNOWN)


def test_a_file_that_a_step_writes_is_none_of_its_options(recipe, tmp_path):
    steps, record = recipe
    choice = {"layers": {"source": "trained", "output": "choice.yaml", "json": "choice.json"}}
    step = read([*steps[:2], choice])[2]
    record.write(step, state="begun", settings=step.settings())
    (tmp_path / "choice.yaml").write_text("pattern: hgrn\n")
    record.check(read([*steps[:2], choice]))
    hybrid = {"hybrid": {"source": "trained", "output": "other", "layers_file": "choice.yaml"}}
    assert read([*steps, hybrid])[3].settings()["layers_file.pattern"] == "hgrn"


def test_what_has_ended_stays(recipe):
    steps, record = recipe
    record.check(read(steps))
    assert [record.is_done(step) for step in read(steps)] == [True, True, False]


def test_changed_options_are_refused_by_name(recipe, tmp_path):
    steps, record = recipe
    changed = [steps[0], {"hybrid": HYBRID | {"seed": 1}}, steps[2]]
    message = (
        "step 2, hybrid to hybrid: it was run with other options (seed: None -> 1); restore them, or remove hybrid"
    )
    with pytest.raises(ConfigError, match=re.escape(message)):
        record.check(read(changed))
    (tmp_path / "model.yaml").write_text("num_layers: 3\n")
    with pytest.raises(ConfigError, match=re.escape("(config.model.num_layers: 2 -> 3)")):
        record.check(read(steps))


def test_a_step_that_failed_can_be_corrected(recipe):
    steps, record = recipe
    step = read(steps)[2]
    record.write(step, state="ended", settings=step.settings(), exit_code=2)
    changed = [*steps[:2], {"train": {"init": "hybrid", "run": {"dir": "further"}, "train": {"steps": 3}}}]
    record.check(read(changed))
    step.output.mkdir()
    record.check(read(changed))
    record.write(step, state="ended", exit_code=75)
    with pytest.raises(ConfigError, match=re.escape("(train.steps: None -> 3)")):
        record.check(read(changed))


def test_what_was_made_of_something_older_is_refused(recipe, tmp_path):
    steps, record = recipe
    (tmp_path / "trained").rmdir()
    message = "step 2, hybrid to hybrid: it was made from an earlier trained, which is to be made again; remove hybrid"
    with pytest.raises(ConfigError, match=re.escape(message)):
        record.check(read(steps))
    (tmp_path / "hybrid").rmdir()
    record.check(read(steps))
    # A new step before others is one that they were not made from.
    (tmp_path / "trained").mkdir()
    (tmp_path / "hybrid").mkdir()
    between = {"export": {"checkpoint": "trained", "output": "weights"}}
    with pytest.raises(ConfigError, match="step 3, hybrid to hybrid: it was made from an earlier weights"):
        record.check(read([steps[0], between, *steps[1:]]))


def test_a_conversion_that_ended_before_the_record_said_so(recipe):
    steps, record = recipe
    step = read(steps)[1]
    record.write(step, state="begun")
    assert record.is_done(step), "outputs appear when they are complete"
    training = read(steps)[0]
    record.write(training, state="begun")
    assert not record.is_done(training), "a run directory appears at its beginning"


def test_other_ranks_wait_for_what_concerns_them(recipe, tmp_path):
    steps, record = recipe
    _, hybrid, further = read(steps)
    assert wait_for(record, hybrid, "second")["state"] == "done"
    record.write(further, state="ended", launch="first", exit_code=75)

    def begin():
        record.write(further, state="begun", launch="second", port=7)

    timer = threading.Timer(0.2, begin)
    timer.start()
    assert wait_for(record, further, "second", 0.01)["port"] == 7
    timer.join()
    record.write(further, state="ended", exit_code=2)
    assert wait_for(record, further, "second", 0.01)["exit_code"] == 2
    (tmp_path / "hybrid").rmdir()
    record.write(hybrid, state="begun", launch="second")
    timer = threading.Timer(0.2, lambda: record.write(hybrid, state="ended", exit_code=3))
    timer.start()
    assert wait_for(record, hybrid, "second", 0.01)["exit_code"] == 3, "a conversion is no business of theirs"
    timer.join()


def test_environments():
    ours = {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "MASTER_PORT": "5",
        "TORCHELASTIC_RUN_ID": "x",
        "PATH": "p",
        "OMP_NUM_THREADS": "1",
    }
    assert single_process(ours) == {"PATH": "p", "OMP_NUM_THREADS": "1"}
    added = {"MASTER_PORT": "9", "TORCHELASTIC_USE_AGENT_STORE": "False", "SPIKETRAIN_WRAPPER": str(os.getpid())}
    assert of_ranks(9, ours) == ours | added
