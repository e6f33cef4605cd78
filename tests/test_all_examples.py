"""The largest property tests with all of their examples, of which `make test` tries a few."""

import os
import subprocess
import sys

import pytest

from tests.processes import ROOT


@pytest.mark.slow
@pytest.mark.parametrize("file", ["kernels/test_linear_attention.py", "models/test_decoder.py"])
def test_all_examples(file):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", f"tests/{file}"]
    environment = os.environ | {"TEST_ALL_EXAMPLES": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
