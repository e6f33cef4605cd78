"""A tiny trained run, and a way to start the entry points as users do."""

import os
import subprocess
import sys

import pytest

from tests.helpers import WAIT
from tests.processes import QUIET, finish, start
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


PROGRAM = """
import runpy, sys
name = sys.argv.pop(1)
code = 0
try:
    runpy.run_path(name, run_name="__main__")
except SystemExit as stop:
    code = stop.code
print("\\nimported:", *[module for module in ("torch", "megatron", "deepspeed") if module in sys.modules])
sys.exit(code)
"""


@pytest.fixture(scope="session")
def program(tmp_path_factory):
    path = tmp_path_factory.mktemp("program") / "program.py"
    path.write_text(PROGRAM)
    return path


@pytest.fixture
def launch(program, tmp_path):
    """Run `python launch/NAME.py ARGUMENTS`; returns exit code, stdout, stderr and what it imported.

    With `forked` it begins in a process that has imported torch already: for what computes.
    """

    def run(name, *arguments, forked=False):
        command = [str(program), str(ROOT / "launch" / f"{name}.py"), *arguments]
        if forked:
            process = start(*command, folder=tmp_path, imported="torch", errors_apart=True)
            code, stdout = finish(process)
            errors = process.errors()
        else:
            done = subprocess.run(
                [sys.executable, *command],
                cwd=tmp_path,
                env=os.environ | QUIET,
                capture_output=True,
                text=True,
                timeout=WAIT,
                check=False,
            )
            code, stdout, errors = done.returncode, done.stdout, done.stderr
        stdout, _, imported = stdout.rpartition("\nimported:")
        return code, stdout, errors, imported.split()

    return run
