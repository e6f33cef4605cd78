"""Measures of compressed activations in a run: its lines by layer, the same on one rank and several."""

import pytest

from tests.trainer.conftest import finish, metrics

COMPRESSED = (
    "--train.compression.bits=8",
    "--train.compression.min_bytes=0",
    "--train.compression.group=16",
    "--logging.measure_every=4",
)


def measured(run_dir):
    lines = [line for line in metrics(run_dir) if "compression/kept_bytes" in line]
    assert [line["step"] for line in lines] == [4, 8]
    return lines[0]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["megatron", "deepspeed"])
def test_a_run_writes_its_measures(tiny_run, tmp_path, engine):
    name = f"--engine.name={engine}"
    code, output = finish(tiny_run(tmp_path / "run", *COMPRESSED, name))
    assert code == 0, output
    line = measured(tmp_path / "run")
    assert line["compression/kept_bytes"] == sum(line["compression/kept_bytes_by_layer"][0])
    assert 0.5 < line["compression/saved"] < 0.9
    assert all(0.001 < error < 0.02 for error in line["compression/error_by_layer"][0])
    # Measuring changes no number of the run.
    code, output = finish(tiny_run(tmp_path / "other", *COMPRESSED[:-1], "--logging.measure_every=0", name))
    assert code == 0, output
    losses = [[line["loss"] for line in metrics(tmp_path / run) if "grad_norm" in line] for run in ("run", "other")]
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_stages_and_replicas_add_up(tiny_run, tmp_path):
    sizes = ("--train.micro_batch_size=1", "--model.attention.num_kv_heads=2")
    code, output = finish(tiny_run(tmp_path / "one", *COMPRESSED, *sizes))
    assert code == 0, output
    expected = measured(tmp_path / "one")
    for layout in ("pipeline", "context", "tensor"):
        options = (f"--parallel.{layout}=2", *sizes)
        code, output = finish(tiny_run(tmp_path / layout, *COMPRESSED, *options, ranks=2))
        assert code == 0, output
        found = measured(tmp_path / layout)
        assert all(0.001 < error < 0.02 for error in found["compression/error_by_layer"][0]), layout
        if layout == "pipeline":
            assert found["compression/kept_bytes_by_layer"] == expected["compression/kept_bytes_by_layer"]
