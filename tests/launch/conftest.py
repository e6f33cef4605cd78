"""A tiny trained run, and a way to start the entry points as users do."""

import os
import subprocess
import sys

import pytest

from tests.helpers import WAIT
from tests.trainer.conftest import ROOT, in_process_config


@pytest.fixture(scope="session")
def trained(tiny_data, tmp_path_factory):
    from dataclasses import asdict

    import yaml

    from trainer import pretrain

    run_dir = tmp_path_factory.mktemp("runs") / "tiny"
    config = in_process_config(tiny_data, run_dir)
    assert pretrain.run(config, yaml.safe_dump(asdict(config))) == 0
    return run_dir


@pytest.fixture
def launch(tmp_path):
    """Run `python launch/NAME.py ARGUMENTS`; returns exit code, stdout, stderr and whether megatron was imported."""

    def run(name, *arguments):
        code = (
            "import runpy, sys\n"
            f"sys.argv = [{name!r}, *{list(arguments)!r}]\n"
            "code = 0\n"
            "try:\n"
            f"    runpy.run_path({str(ROOT / 'launch' / (name + '.py'))!r}, run_name='__main__')\n"
            "except SystemExit as stop:\n"
            "    code = stop.code\n"
            "heavy = [m for m in ('torch', 'megatron', 'deepspeed') if m in sys.modules]\n"
            "print('\\nimported:', *heavy)\n"
            "sys.exit(code)\n"
        )
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=WAIT,
            check=False,
        )
        stdout, _, imported = done.stdout.rpartition("\nimported:")
        return done.returncode, stdout, done.stderr, imported.split()

    return run
