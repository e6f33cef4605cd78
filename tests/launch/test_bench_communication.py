"""The communication benchmark: counts equal the formulas, and its exit code says where they do not."""

import json

import pytest

from tests.processes import finish, start

# Ranks that are forks of a process which has imported torch, in place of processes of their own.
FORKED = """
import functools, sys, torch.multiprocessing
spawning = sys.modules["torch.multiprocessing.spawn"]
spawning.spawn = functools.partial(spawning.start_processes, start_method="fork")
"""
WRONG = """
from trainer.benchmarks import communication
communication.predicted = lambda *_: 1
"""
RUN = """
import runpy
if __name__ == "__main__":
    runpy.run_path("launch/bench.py", run_name="__main__")
"""
TINY = ["--seq_lens=[64,128]", "--full_seq_lens=[64,128]", "--window=8", "--heads=4", "--head_dim=4"]


@pytest.mark.parametrize(
    "before", [pytest.param(FORKED, id="forked"), pytest.param("", id="spawned", marks=pytest.mark.slow)]
)
def test_counts_equal_the_formulas(tmp_path, before):
    path = tmp_path / "result.json"
    (tmp_path / "script.py").write_text(before + RUN)
    code, output = finish(start(tmp_path / "script.py", "communication", *TINY, "--json", path))
    assert code == 0, output
    lines = json.loads(path.read_text())
    assert len(lines) == 8 * 2 * (2 + 4)
    assert all(line["ours"] == line["peer"] for line in lines)


def test_a_wrong_formula_fails(tmp_path):
    (tmp_path / "script.py").write_text(FORKED + WRONG + RUN)
    sizes = ["--seq_lens=[64]", "--full_seq_lens=[64]", "--ranks=[2]", "--window=8"]
    code, output = finish(start(tmp_path / "script.py", "communication", *sizes))
    assert code == 1 and "by formula" in output and "Traceback" not in output, output
