"""The picture of a run."""

import importlib.util

import matplotlib.image
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.trainer.conftest import ROOT
from trainer.cli import make_parser, parse

specification = importlib.util.spec_from_file_location("report", ROOT / "launch" / "report.py")
report = importlib.util.module_from_spec(specification)
specification.loader.exec_module(report)


def assert_drawn(path):
    """It decodes to a picture with lines and text: more than the few colours of empty axes, on a white ground."""
    pixels = matplotlib.image.imread(path)
    assert min(pixels.shape[:2]) > 300
    colours = np.unique(pixels.reshape(-1, pixels.shape[2]).round(2), axis=0)
    ground = (pixels == 1).all(axis=2).mean()
    assert len(colours) > 50 and 0.5 < ground < 0.995


def test_draws_a_run(launch, trained, tmp_path):
    code, out, errors, _ = launch(
        "report", "--runs", f"[{trained}]", "--output", "curve.png", "--baselines", "{gzip -9: 1.5}"
    )
    assert code == 0, errors
    assert out.strip() == "curve.png"
    assert_drawn(tmp_path / "curve.png")


def test_reads_steps_and_validations(trained):
    steps, evaluations = report.read_metrics(trained)
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in evaluations] == [3, 6]


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=50))
def test_the_average_stays_within_the_values(values):
    smoothed = report.smooth(values)
    assert len(smoothed) == len(values)
    assert smoothed[0] == pytest.approx(values[0])
    assert min(values) - 1e-9 <= min(smoothed) and max(smoothed) <= max(values) + 1e-9


def test_runs_may_be_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "metrics.jsonl").touch()
    config, _ = parse(report.ReportConfig, make_parser(report.ReportConfig, ""), ["--runs=[~/.]"])
    assert config.runs == [f"{tmp_path}/."]


def test_bad_input_is_one_line(launch, trained):
    code, _, errors, _ = launch("report", "--runs", "[nowhere]")
    assert code == 2 and "nowhere/metrics.jsonl does not exist" in errors
    code, _, errors, _ = launch("report", "--runs", f"[{trained}]", "--output", "curve.pdf")
    assert code == 2 and "must end in .png or .svg" in errors
