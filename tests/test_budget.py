"""The slow suites' budget: what begins, what is cut short, what the summary and the exit code say; the rotation."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.budget import rotated

ROOT = Path(__file__).resolve().parents[1]
INNER = """
import time
import pytest

FAILS = {fails}

@pytest.mark.parametrize("number", range({cases}))
def test_case(number):
    assert not FAILS
    time.sleep({seconds})

def test_not_chosen():
    raise AssertionError
"""


def run(tmp_path, *options, cases=3, seconds=0.0, fails=False):
    """Exit code and lines of a pytest with the plugin."""
    (tmp_path / "test_inner.py").write_text(INNER.format(cases=cases, seconds=seconds, fails=fails))
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "tests.budget", "-k", "test_case", "-v"]
    # Plugins that have no part in this take longer to import than the cases to run.
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command += [*options, "test_inner.py"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    return result.returncode, [line for line in result.stdout.splitlines() if line]


def order(lines):
    return [int(line.split("[")[1].split("]")[0]) for line in lines if line.startswith("test_inner.py::test_case[")]


def test_what_fits_runs(tmp_path):
    code, lines = run(tmp_path, "--budget=600")
    assert code == 0 and "3 passed, 1 deselected" in lines[-1]
    assert "3 cases ran, 0 were left" in lines


@pytest.mark.parametrize("options", [(), ("-p", "xdist", "-n", "2")], ids=["one process", "xdist"])
def test_what_does_not_begin_in_time_is_left(tmp_path, options):
    code, lines = run(tmp_path, "--budget=0", *options)
    assert code == 0 and "3 skipped" in lines[-1]
    assert "0 cases ran, 3 were left" in lines


def test_what_is_not_done_after_the_grace_is_cut_short_and_named(tmp_path):
    """The first begins in time and would sleep for an hour, the others are left."""
    code, lines = run(tmp_path, "--budget=8", "--grace=0.1", cases=4, seconds=3600)
    assert code == 0 and "4 skipped" in lines[-1]
    assert "0 cases ran, 4 were left" in lines
    assert [line for line in lines if line.startswith("cut short:")] == ["cut short: test_inner.py::test_case[0]"]


def test_what_ran_and_failed_is_a_failure(tmp_path):
    code, lines = run(tmp_path, "--budget=600", fails=True)
    assert code == 1 and "3 failed" in lines[-1]
    assert "3 cases ran, 0 were left" in lines


def test_without_a_budget_all_run_in_their_order(tmp_path):
    code, lines = run(tmp_path)
    assert code == 0 and order(lines) == [0, 1, 2]
    assert not any("were left" in line for line in lines)


def test_the_order_is_rotated_by_a_text(tmp_path):
    """By a commit, which is the same on every machine, and of what has been chosen alone."""
    orders = {text: order(run(tmp_path, f"--rotate={text}", cases=7)[1]) for text in ("3d62858", "5e65aeb")}
    assert orders["3d62858"] != orders["5e65aeb"]
    for text, found in orders.items():
        assert found == rotated(list(range(7)), text)


def test_a_rotation_loses_nothing_and_keeps_neighbours_together():
    begins = set()
    for text in map(str, range(60)):
        found = rotated(list(range(5)), text)
        begins.add(found[0])
        assert all((after - before) % 5 == 1 for before, after in zip(found, found[1:], strict=False))
        assert sorted(found) == list(range(5))
    assert begins == set(range(5))
    assert rotated([], "3d62858") == []
