"""The communication benchmark: counts equal the formulas, and its exit code says where they do not."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import WAIT
from trainer.benchmarks import communication

ROOT = Path(__file__).resolve().parents[2]
TINY = ["--seq_lens=[64,128]", "--full_seq_lens=[64,128]", "--window=8", "--heads=4", "--head_dim=4"]


def test_counts_equal_the_formulas(tmp_path):
    path = tmp_path / "result.json"
    command = [sys.executable, "launch/bench.py", "communication", *TINY, "--json", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=WAIT)
    assert done.returncode == 0, done.stderr
    lines = json.loads(path.read_text())
    assert len(lines) == 8 * 2 * (2 + 4)
    assert all(line["ours"] == line["peer"] for line in lines)


def test_a_wrong_formula_fails(monkeypatch):
    monkeypatch.setattr(communication, "predicted", lambda *_: 1)
    config = communication.Config(seq_lens=[64], full_seq_lens=[64], ranks=[2], window=8)
    with pytest.raises(SystemExit) as stopped:
        communication.main(config)
    assert stopped.value.code == 1
