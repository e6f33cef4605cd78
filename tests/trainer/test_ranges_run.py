"""Running ranges in a run: in checkpoints, alike when resumed, and alike in every layout."""

import json

import pytest

from tests.trainer.conftest import finish, metrics
from trainer.callbacks.ranges import RunningRanges
from trainer.config import CompressionConfig, ModuleCompression

RUNNING = (
    "--train.compression={bits: 8, range: running, decay: 0.5, min_bytes: 0, group: 8}",
    "--train.micro_batch_size=1",
    "--model.attention.num_kv_heads=2",
    "--checkpoint.every=4",
    "--checkpoint.keep=10",
    # The same rates in a run of four steps and in one of eight.
    "--optim.schedule=wsd",
    "--optim.decay_fraction=0",
    "--optim.lr=0.001",
)


def run(tiny_run, directory, *options, ranks=1):
    code, output = finish(tiny_run(directory, *RUNNING, *options, ranks=ranks))
    assert code == 0, output
    return [line["loss"] for line in metrics(directory) if "grad_norm" in line]


def ranges_at(directory, step):
    (path,) = directory.glob(f"checkpoints/*{step}/callbacks.json")
    return json.loads(path.read_text())["compression_ranges"]["state"]


@pytest.mark.slow
def test_a_resumed_run_is_the_uninterrupted_one(tiny_run, tmp_path):
    whole = run(tiny_run, tmp_path / "whole")
    run(tiny_run, tmp_path / "parts", "--train.steps=4")
    parts = run(tiny_run, tmp_path / "parts")
    assert ranges_at(tmp_path / "whole", 8) == ranges_at(tmp_path / "parts", 8)
    assert parts[-4:] == whole[-4:]
    # Exact ranges give other numbers, so that these were used.
    assert run(tiny_run, tmp_path / "exact", "--train.compression.range=exact") != whole


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["tensor", "pipeline", "context", "data"])
def test_layouts_have_the_ranges_of_one_process(tiny_run, tmp_path, layout):
    options = () if layout == "data" else (f"--parallel.{layout}=2",)
    # Attention alone: convolutions and recurrences of context-parallel ranks round differently.
    pattern = ("--model.mixers.pattern=full_attention",)
    expected = run(tiny_run, tmp_path / "one", *pattern)
    found = run(tiny_run, tmp_path / layout, *pattern, *options, ranks=2)
    assert found == pytest.approx(expected, rel=1e-5)
    ours, theirs = (ranges_at(tmp_path / name, 8) for name in (layout, "one"))
    assert set(ours) == set(theirs)
    for place, bounds in theirs.items():
        for own, other in zip(ours[place], bounds, strict=True):
            assert own == pytest.approx(other, rel=1e-3, abs=1e-5), place


def test_a_run_without_running_ranges_has_no_callback_for_them():
    assert not CompressionConfig(bits=8).has_running_ranges
    assert CompressionConfig(bits=8, range="running").has_running_ranges
    assert not CompressionConfig(range="running").has_running_ranges
    assert CompressionConfig(bits=8, modules={"*": ModuleCompression(range="running")}).has_running_ranges
    with pytest.raises(ValueError, match=r"train\.compression\.decay=1 "):
        CompressionConfig(decay=1)


def test_state_goes_through_json():
    callback = RunningRanges()
    state = {"layers.0.ffn.0": [[-1.5, 0.1], [2.0, 3.0]]}
    callback.load_state_dict(state, 1)
    again = json.loads(json.dumps(callback.state_dict()))
    assert [round(x, 6) for row in again["layers.0.ffn.0"] for x in row] == [-1.5, 0.1, 2.0, 3.0]
