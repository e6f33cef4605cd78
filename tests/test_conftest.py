"""What conftest.py does for tests marked gpu, and for threads."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
INNER = """
import pytest, torch

def test_plain():
    assert torch.get_num_threads() == 1

@pytest.mark.gpu
@pytest.mark.parametrize("size", [1, 2])
def test_on_a_gpu(size):
    raise AssertionError

@pytest.mark.gpu
@pytest.mark.skipif(True, reason="another reason")
def test_with_another_reason():
    raise AssertionError

@pytest.mark.gpu
class TestGroup:
    def test_in_a_class(self):
        raise AssertionError

@pytest.mark.skip(reason="unrelated")
def test_unrelated():
    raise AssertionError
"""


@pytest.mark.parametrize("options", [[], ["-n", "2"]], ids=["one process", "xdist"])
def test_gpu_tests_are_skipped_and_listed(tmp_path, options):
    shutil.copy(HERE / "conftest.py", tmp_path)
    shutil.copy(HERE.parent / "pyproject.toml", tmp_path)
    (tmp_path / "test_inner.py").write_text(INNER)
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options, "test_inner.py"],
        cwd=tmp_path,
        env=environment | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout
    assert "1 passed, 5 skipped" in result.stdout
    lines = [line for line in result.stdout.splitlines() if line]
    heading = next(i for i, line in enumerate(lines) if "needs a GPU, not run here:" in line)
    assert lines[heading + 1 : heading + 5] == [
        "test_inner.py::TestGroup::test_in_a_class",
        "test_inner.py::test_on_a_gpu[1]",
        "test_inner.py::test_on_a_gpu[2]",
        "test_inner.py::test_with_another_reason",
    ]
    assert "test_unrelated" not in "".join(lines[heading:])


@pytest.mark.gpu
def test_a_gpu_is_there_for_tests_marked_gpu():
    assert torch.ones(2, device="cuda").sum().item() == 2
