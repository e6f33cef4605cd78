"""metrics.jsonl and TensorBoard."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

from tests.helpers import STEP_KEYS
from trainer import raster
from trainer.callbacks.metrics import History, MetricsFile, TensorBoard, cut_back, heat_map
from trainer.config import OptimConfig, PretrainConfig, TrainConfig
from trainer.curves import read_metrics, smooth
from trainer.engines.base import StepResult
from trainer.evaluation import EvaluationSums
from trainer.loop import Trainer
from trainer.stored.checkpoint import Progress

STEPS = 6
SECONDS = {"forward_backward": 0.5, "reduce": 0.25, "optimizer": 0.125}


class FakeEngine:
    """What the trainer and these callbacks ask of an engine, without a model."""

    world_size = data_parallel_size = 1
    data_parallel_rank = 0
    model = SimpleNamespace(vocab_size=64)
    device = None

    def __init__(self, rank=0):
        self.rank = rank


@pytest.fixture
def trainer(monkeypatch):
    """A trainer of 6 steps that has taken none; the callbacks under test are called by hand."""
    monkeypatch.setattr("trainer.loop.flops_per_token", lambda model, seq_len: 1.0)
    config = PretrainConfig(train=TrainConfig(steps=STEPS), optim=OptimConfig(warmup_steps=0))

    def build(step=0, rank=0):
        return Trainer(config, "train: {steps: 6}\n", FakeEngine(rank), None, None, [], Progress(step=step), None)

    return build


def step_metrics(step):
    loads = [[0.5, 0.5], [1 / step, 1 - 1 / step]]
    counted = {"moe/balance": 2.0, "moe/load": loads}
    return {"step": step, "loss": 1.0 / step, "grad_norm": 0.5, "model_flops_utilization": None, **counted}


def evaluation_metrics(step):
    return {"step": step, "split": "validation", "loss": 2.0 / step, "bits_per_byte": 3.0 / step}


def run(trainer, callback, first, last):
    """Call a callback as the loop would, with a validation every third step."""
    callback.on_start(trainer)
    for step in range(first, last + 1):
        trainer.progress = Progress(step=step)
        callback.on_step(trainer, step_metrics(step))
        if step % 3 == 0:
            trainer.samples = [f"text {step}"]
            callback.on_evaluation(trainer, evaluation_metrics(step))
    callback.on_end(trainer)


# metrics.jsonl


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_one_line_for_each_step_and_validation(trainer, tmp_path):
    run(trainer(), MetricsFile(tmp_path / "metrics.jsonl", 1), 1, STEPS)
    expected = [step_metrics(1), step_metrics(2), step_metrics(3), evaluation_metrics(3)]
    expected += [step_metrics(4), step_metrics(5), step_metrics(6), evaluation_metrics(6)]
    assert lines(tmp_path / "metrics.jsonl") == expected


def test_every_nth_step_and_the_last(trainer, tmp_path):
    run(trainer(), MetricsFile(tmp_path / "metrics.jsonl", 4), 1, STEPS)
    steps = [line["step"] for line in lines(tmp_path / "metrics.jsonl") if "split" not in line]
    assert steps == [4, 6]


def test_numbers_that_are_not_finite_are_null(trainer, tmp_path):
    """JSON has no NaN: other readers than Python's refuse the line, and with it the file."""
    callback, running = MetricsFile(tmp_path / "metrics.jsonl", 1), trainer()
    callback.on_start(running)
    callback.on_step(
        running, step_metrics(1) | {"loss": math.nan, "grad_norm": math.inf, "moe/load": [[math.nan, 1.0]]}
    )
    callback.on_step(running, step_metrics(2))
    callback.on_end(running)

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    text = (tmp_path / "metrics.jsonl").read_text().splitlines()
    first, second = (json.loads(line, parse_constant=refuse) for line in text)
    assert (first["loss"], first["grad_norm"], first["moe/load"]) == (None, None, [[None, 1.0]])
    assert second == step_metrics(2)
    losses = [line["loss"] for line in read_metrics(tmp_path)[0]]
    assert math.isnan(losses[0])
    assert smooth([2.0, *losses], half_life=1.0) == [2.0, 2.0, (0.5 * 2.0 + losses[1]) / 1.5]


def test_large_matrices_are_not_in_every_line(trainer, tmp_path):
    callback, running = MetricsFile(tmp_path / "metrics.jsonl", 1), trainer()
    callback.on_start(running)
    for step in range(1, 203):
        callback.on_step(
            running, step_metrics(step) | {"moe/load": [[0.5] * 512] * (2 + (step > 1)), "moe/row": [[1.0]]}
        )
    callback.on_end(running)
    written = lines(tmp_path / "metrics.jsonl")
    # The first is just small enough.
    assert [line["step"] for line in written if "moe/load" in line] == [1, 101, 201]
    assert all("moe/row" in line for line in written)


def test_lines_are_there_at_once(trainer, tmp_path):
    callback, running = MetricsFile(tmp_path / "metrics.jsonl", 1), trainer()
    callback.on_start(running)
    callback.on_step(running, step_metrics(1))
    assert lines(tmp_path / "metrics.jsonl") == [step_metrics(1)]
    callback.on_end(running)


def test_a_resumed_run_goes_on_at_its_checkpoint(trainer, tmp_path):
    path = tmp_path / "metrics.jsonl"
    run(trainer(), MetricsFile(path, 1), 1, 5)
    damaged = '{"loss": 1.0}\n[3]\nnull\n{"step": null}\n\n'
    path.write_text(damaged + path.read_text() + '{"step": 6, "lo')
    run(trainer(3), MetricsFile(path, 1), 4, STEPS)
    assert [line["step"] for line in lines(path) if "split" not in line] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines(path) if "split" in line] == [3, 6]


def test_other_ranks_write_nothing(trainer, tmp_path):
    run(trainer(rank=1), MetricsFile(tmp_path / "metrics.jsonl", 1), 1, STEPS)
    run(trainer(rank=1), TensorBoard(tmp_path / "tensorboard", 1), 1, STEPS)
    assert list(tmp_path.iterdir()) == []


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 9)).map(sorted), st.integers(0, 9), st.integers(0, 30))
def test_cut_back(tmp_path, steps, step, cut_short):
    path = tmp_path / "metrics.jsonl"
    whole = [json.dumps({"step": n, "loss": 0.5}) + "\n" for n in steps]
    fragment = '{"step": 0, "loss": 0.25}'[: min(cut_short, 24)]
    path.write_text("".join(whole) + fragment)
    cut_back(path, step)
    assert path.read_text() == "".join(whole[: sum(n <= step for n in steps)])
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_cut_back_of_nothing(tmp_path):
    cut_back(tmp_path / "metrics.jsonl", 3)
    assert list(tmp_path.iterdir()) == []


# TensorBoard


def events(folder):
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    accumulator.Reload()
    return accumulator


def scalars(folder, name):
    found = events(folder).Scalars(name)
    assert len({event.step for event in found}) == len(found), "a step has two values"
    return {event.step: pytest.approx(event.value) for event in found}


def test_events_can_be_read(trainer, tmp_path):
    run(trainer(), TensorBoard(tmp_path, 1), 1, STEPS)
    assert scalars(tmp_path, "train/loss") == {step: 1.0 / step for step in range(1, 7)}
    assert scalars(tmp_path, "moe/balance") == dict.fromkeys(range(1, 7), 2.0)
    assert scalars(tmp_path, "validation/loss") == {3: 2.0 / 3, 6: 2.0 / 6}
    assert scalars(tmp_path, "validation/bits_per_byte") == {3: 1.0, 6: 0.5}
    read = events(tmp_path)
    assert "train/model_flops_utilization" not in read.Tags()["scalars"]
    texts = {event.step: event.tensor_proto.string_val[0].decode() for event in read.Tensors("sample/0/text_summary")}
    assert texts == {3: "```\ntext 3\n```", 6: "```\ntext 6\n```"}
    assert b"train: {steps: 6}" in read.Tensors("config/text_summary")[0].tensor_proto.string_val[0]


def test_a_matrix_becomes_an_image_over_time(trainer, tmp_path):
    """A line for each expert of each layer, a column for each step, drawn at each validation."""
    run(trainer(), TensorBoard(tmp_path, 1), 1, STEPS)
    read = events(tmp_path)
    assert "moe/load" not in read.Tags()["scalars"]
    assert [(image.step, image.height, image.width) for image in read.Images("moe/load")] == [(3, 4, 3), (6, 4, 6)]


def test_tables_of_a_validation_are_text(trainer, tmp_path):
    running, callback = trainer(), TensorBoard(tmp_path, 1)
    callback.on_start(running)
    running.tables = {"answers": "| prompt |\n|---|\n| 1 |"}
    callback.on_evaluation(running, evaluation_metrics(3))
    callback.on_end(running)
    (found,) = events(tmp_path).Tensors("validation/answers/text_summary")
    assert found.step == 3 and found.tensor_proto.string_val == [b"| prompt |\n|---|\n| 1 |"]


def test_spikes_of_a_validation_are_an_image(trainer, tmp_path):
    running, callback = trainer(), TensorBoard(tmp_path, 1)
    callback.on_start(running)
    callback.on_evaluation(running, evaluation_metrics(3))
    running.rasters = {"a": np.array([[0.0, -7.0, 1.0], [30.0, 0.0, 0.0]]), "b": np.array([[2.0, 0.0, 0.0]])}
    callback.on_evaluation(running, evaluation_metrics(6))
    callback.on_end(running)
    assert [(image.step, image.height, image.width) for image in events(tmp_path).Images("spiking/raster")] == [
        (6, 4, 3)
    ]
    # Silence is black, seven spikes are white, and a grey line is between two inputs.
    assert raster.image(running.rasters).tolist() == [[0, 255, 36], [255, 0, 0], [64, 64, 64], [72, 0, 0]]


def test_history_is_bounded_and_keeps_the_mean():
    history = History(columns=4)
    for step in range(45):
        history.append([float(step), 1.0])
    # Of 4 steps each; the last column is of one step.
    assert history._steps == 8 and [float(mean[0]) for mean in history._means] == [3.5, 11.5, 19.5, 27.5, 35.5]
    assert len(history._open) == 5 and history.image().shape == (2, 4)
    for _ in range(10_000):
        history.append([0.0, 0.0])
    assert len(history._means) < 8


def test_a_heat_map_is_no_wider_than_it_may_be():
    image = heat_map([[0.5, float(column)] for column in range(7)], most=3)
    # Columns 0 to 2, 3 and 4, 5 and 6; the largest mean is white.
    assert image.tolist() == [[int(255 * 0.5 / 5.5)] * 3, [int(255 * mean / 5.5) for mean in (1.0, 3.5, 5.5)]]
    assert heat_map([[0.0]]).tolist() == [[0]]


def test_events_of_every_nth_step_and_the_last(trainer, tmp_path):
    run(trainer(), TensorBoard(tmp_path, 4), 1, STEPS)
    assert set(scalars(tmp_path, "train/loss")) == {4, 6}


def test_events_after_the_checkpoint_are_replaced(trainer, tmp_path):
    run(trainer(), TensorBoard(tmp_path, 1), 1, 5)
    resumed = trainer(3)
    callback = TensorBoard(tmp_path, 1)
    callback.on_start(resumed)
    for step in (4, 5, 6):
        resumed.progress = Progress(step=step)
        callback.on_step(resumed, step_metrics(step) | {"loss": 100.0 + step})
    callback.on_end(resumed)
    assert scalars(tmp_path, "train/loss") == {1: 1.0, 2: 0.5, 3: 1 / 3, 4: 104.0, 5: 105.0, 6: 106.0}


def test_hyper_parameters_of_a_finished_run(trainer, tmp_path):
    run(trainer(), TensorBoard(tmp_path, 1), 1, STEPS)
    read = events(tmp_path)
    content = read.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    info = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info
    assert info.hparams["train.steps"].number_value == STEPS
    assert info.hparams["model.attention.num_heads"].number_value == 4
    assert info.hparams["model.tie_embeddings"].number_value == 1  # torch writes a bool as a number
    assert info.hparams["data.path"].string_value == "stdlib"
    assert scalars(tmp_path, "final/bits_per_byte") == {6: 0.5}


def test_no_hyper_parameters_before_the_end(trainer, tmp_path):
    run(trainer(), TensorBoard(tmp_path, 1), 1, 5)
    assert "_hparams_/session_start_info" not in events(tmp_path).summary_metadata


def test_hyper_parameters_are_flat_and_plain(trainer):
    flat = trainer().hyper_parameters()
    assert {key.split(".")[0] for key in flat} == {"model", "data", "train", "optim", "parallel"}
    assert all(isinstance(value, bool | int | float | str) for value in flat.values())
    assert flat["model.mixers.pattern"] == "None" and flat["parallel.tensor"] == 1


# The loop's lines


def test_a_steps_line_has_the_promised_keys(trainer, monkeypatch):
    running = trainer()
    monkeypatch.setattr("trainer.loop.peak_memory_bytes", lambda device: 7)
    running.source = SimpleNamespace(
        micro_batches=lambda step, micro, rank, world: [], metrics=lambda result: result | {"own": 1.0}
    )
    running.engine.train_step = lambda batches, objective, lr, step: StepResult(2.5, 0.25, 100, True, {}, SECONDS)
    running._flops_per_token, running._peak_flops = 3.0, 1e15
    running.seconds_in_checkpoints = 8.0
    line = running._step()
    assert set(line) == STEP_KEYS | {"own"}
    assert (line["step"], line["tokens"], line["skipped_total"], line["loss"]) == (1, 100, 1, 2.5)
    assert {phase: line[f"{phase}_seconds"] for phase in SECONDS} == SECONDS
    assert 0 <= line["data_seconds"] <= line["step_seconds"]
    assert line["tokens_per_second"] == pytest.approx(100 / line["step_seconds"])
    assert line["model_flops_utilization"] == pytest.approx(3.0 * line["tokens_per_second"] / 1e15)
    assert running.progress == Progress(step=1, tokens=100, skipped=1)
    json.dumps(line)
    # Of saves since the line before, and told once.
    assert line["checkpoint_seconds"] == 8.0 and running._step()["checkpoint_seconds"] == 0.0


def test_no_step_is_above_the_peak(trainer, monkeypatch):
    running = trainer()
    running._peak_flops = 100.0
    said = []
    monkeypatch.setattr("trainer.loop._LOGGER.info", lambda message, *values: said.append(message % values))
    assert [running._utilization(flops) for flops in (50.0, 200.0, 100.0, 400.0, 100.0)] == [0.5, 1, 0.5, 1, 0.25]
    # Once, whoever goes above it again.
    assert ["above the measured peak" in line for line in said] == [True]
    running._peak_flops = None
    assert running._utilization(1.0) is None


def test_a_validations_line(trainer):
    running = trainer(2)
    seen = []
    running.callbacks = [SimpleNamespace(phase="end", on_evaluation=lambda trainer, metrics: seen.append(metrics))]
    running.report_evaluation(
        "validation", EvaluationSums(nll=69.3147180559945, tokens=50, text_bytes=200), seconds=1.5
    )
    assert seen == [
        {
            "step": 2,
            "split": "validation",
            "loss": pytest.approx(1.38629436),
            "bits_per_byte": pytest.approx(0.5),
        }
    ]
