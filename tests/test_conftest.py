"""What conftest.py does for tests marked gpu, and for threads; torch is a stand-in, so that a GPU can come and go."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
INNER = """
import os, pytest

def test_plain():
    assert os.environ["OMP_NUM_THREADS"] == "1"

@pytest.mark.gpu
@pytest.mark.parametrize("size", [1, 2])
def test_on_a_gpu(size):
    pass

@pytest.mark.gpu
@pytest.mark.skipif(True, reason="another reason")
def test_with_another_reason():
    raise AssertionError

@pytest.mark.gpu
class TestGroup:
    def test_in_a_class(self):
        pass

@pytest.mark.skip(reason="unrelated")
def test_unrelated():
    raise AssertionError
"""
NEEDS_A_GPU = [
    "test_inner.py::TestGroup::test_in_a_class",
    "test_inner.py::test_on_a_gpu[1]",
    "test_inner.py::test_on_a_gpu[2]",
    "test_inner.py::test_with_another_reason",
]


@pytest.fixture
def pytest_output(tmp_path):
    """Run INNER beside a torch that has a GPU or none; the lines of the terminal."""

    def run(gpu, *options):
        for path in (HERE / "conftest.py", HERE.parent / "pyproject.toml"):
            shutil.copy(path, tmp_path)
        (tmp_path / "test_inner.py").write_text(INNER)
        (tmp_path / "torch.py").write_text(f"class cuda:\n    is_available = staticmethod(lambda: {gpu})\n")
        # What conftest.py imports of ours.
        (tmp_path / "tests").mkdir(exist_ok=True)
        shutil.copy(HERE / "interpreter.py", tmp_path / "tests")
        environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
        # Plugins that have no part in this take longer to import than the tests to run.
        environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options, "test_inner.py"]
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout
        return [line for line in result.stdout.splitlines() if line]

    return run


@pytest.mark.parametrize("options", [[], ["-p", "xdist", "-n", "2"]], ids=["one process", "xdist"])
def test_gpu_tests_are_skipped_and_listed(pytest_output, options):
    lines = pytest_output(False, *options)
    assert "1 passed, 5 skipped" in lines[-1]
    heading = next(i for i, line in enumerate(lines) if "needs a GPU, not run here:" in line)
    assert lines[heading + 1 : -1] == NEEDS_A_GPU


def test_gpu_tests_run_where_there_is_a_gpu(pytest_output):
    lines = pytest_output(True)
    assert "4 passed, 2 skipped" in lines[-1]
    assert not any("needs a GPU" in line for line in lines)


@pytest.mark.gpu
def test_a_gpu_is_there_for_tests_marked_gpu():
    assert torch.ones(2, device="cuda").sum().item() == 2
