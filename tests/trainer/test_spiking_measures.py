"""Measures of spikes in a run: its lines, TensorBoard's images, and a run of floats that has none."""

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.trainer.conftest import finish, metrics
from trainer.config import LoggingConfig

SPIKING = ("--model.spiking.layers=[all]", "--model.spiking.start_step=2", "--train.steps=6")


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["megatron", "deepspeed"])
def test_a_run_writes_its_measures(tiny_run, tmp_path, engine):
    options = (f"--engine.name={engine}", "--logging.measure_every=2", "--logging.tensorboard=true")
    code, output = finish(tiny_run(tmp_path / "run", *SPIKING, *options))
    assert code == 0, output
    lines = [line for line in metrics(tmp_path / "run") if "grad_norm" in line]
    # Spikes begin with the third step.
    assert [line["step"] for line in lines if "spiking/sparsity" in line] == [4, 6]
    for line in lines[3::2]:
        assert 0.3 < line["spiking/sparsity"] < 0.9 and 0 < line["spiking/firing_rate"] < 3
        assert len(line["spiking/sparsity_by_layer"][0]) == 2
        assert sum(line["spiking/picojoules_per_token_by_layer"][0]) == pytest.approx(
            line["spiking/picojoules_per_token"]
        )
    read = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    read.Reload()
    assert "spiking/sparsity" in read.Tags()["scalars"]
    assert {"spiking/raster", "spiking/sparsity_by_layer"} <= set(read.Tags()["images"])
    # Counting changes no number of the run.
    code, output = finish(tiny_run(tmp_path / "other", *SPIKING, options[0], "--logging.measure_every=0"))
    assert code == 0, output
    others = [line for line in metrics(tmp_path / "other") if "grad_norm" in line]
    assert not any(name.startswith("spiking/") for line in others for name in line)
    assert [line["loss"] for line in others] == [line["loss"] for line in lines]


@pytest.mark.parametrize(("every", "measure_every", "expected"), [(1, 10, 10), (4, 10, 12), (100, 10, 100), (7, 0, 0)])
def test_what_is_counted_is_written(every, measure_every, expected):
    assert LoggingConfig(every=every, measure_every=measure_every).steps_between_measures == expected


def test_a_negative_number_of_steps_is_refused():
    with pytest.raises(ValueError, match=r"logging\.measure_every is -1"):
        LoggingConfig(measure_every=-1)
