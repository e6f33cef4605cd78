"""Layouts that cannot run are refused at once, and once."""

import os
import subprocess
import sys
import time

import pytest

from tests.trainer.conftest import ROOT, finish, status

WRONG = {
    "heads": (["--parallel.tensor=8"], 8, "does not divide by parallel.tensor=8"),
    "layers": (["--parallel.pipeline=16"], 16, "use at most 8 stages"),
    "world-size": (["--parallel.tensor=2"], 3, "world size 3 does not divide"),
    "length": (["--parallel.context=3"], 3, "train.seq_len=512 does not divide over 3 ranks"),
}


@pytest.mark.parametrize(("overrides", "ranks", "message"), list(WRONG.values()), ids=list(WRONG))
def test_check_refuses_a_wrong_layout_without_torch(tmp_path, overrides, ranks, message):
    program = "import runpy, sys\ntry: runpy.run_path(sys.argv.pop(1), run_name='__main__')\n"
    program += "finally: assert 'torch' not in sys.modules\n"
    start = time.monotonic()
    command = [sys.executable, "-c", program, str(ROOT / "launch/pretrain.py"), "--check", f"--world-size={ranks}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, *overrides], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert message in done.stderr and len(done.stderr.splitlines()) == 1
    assert time.monotonic() - start < 3


def test_torchrun_says_a_wrong_layout_once_at_eight_ranks(tiny_run, tmp_path):
    start = time.monotonic()
    code, output = finish(tiny_run(tmp_path / "run", "--parallel.tensor=8", "--train.global_batch_size=2", ranks=8))
    assert time.monotonic() - start < 20
    assert code == 1
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "does not divide by parallel.tensor=8" in errors[0], output
    assert status(tmp_path / "run")["state"] == "config_error"
