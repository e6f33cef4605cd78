"""README.md's and docs/' commands run as they are written, in a copy with tiny recipes."""

import os
import re
import subprocess

import pytest

from tests.documented import documented_commands
from tests.test_documented_commands import lay_out

# Commands that are left to others, by a pattern and with the reason.
NOT_RUN_HERE = {
    r"make ": "they install; CI runs the tests, and the recipe of `make pretrain` is run first",
    r"source ": "the other commands are run in the environment that it sets up",
    r"sbatch ": "tests/slurm submits jobs",
    r"pytest -m gpu|.*gpu[-_]check": "needs a GPU; tests/test_gpu_check.py runs it without one",
    r"spiketrain bench \w": "minutes each; tests/launch runs every benchmark at small sizes",
    r"spiketrain serve": "serves until it is ended; tests/launch/test_serve.py",
    r"python -m kernels.compile": "minutes each; tests/kernels/triton/test_compile.py",
    r".*tinystories": "fetches from the hub",
    r".*/smollm2\.yaml": "needs the weights of a package, and an hour; docs/results.md has what it gave",
    r"python -m trainer.combinations": "rewrites the page it stands on; tests/trainer/test_combinations.py",
}
# The recipe of `make pretrain`, whose results the commands after it read.
FIRST = "spiketrain pretrain --config configs/pretrain/laptop.yaml"


def commands_to_run():
    """Each once, in the order of the pages."""
    chosen = [FIRST]
    for command in documented_commands():
        elsewhere = any(re.match(pattern, command.text) for pattern in NOT_RUN_HERE)
        if command.in_block and not elsewhere and command.text not in chosen:
            chosen.append(command.text)
    return chosen


COMMANDS = commands_to_run()


@pytest.fixture(scope="module")
def run_up_to(tmp_path_factory):
    """Run the command of a number, and before it those of lower numbers, whose results it may read."""
    desk = lay_out(tmp_path_factory.mktemp("desk") / "spiketrain")
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "COLUMNS")}
    environment |= {"PYTHONPATH": str(desk), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    results = []

    def run(number):
        while len(results) <= number:
            shell = ["bash", "-c", f"source .venv/bin/activate && {COMMANDS[len(results)]}"]
            done = subprocess.run(
                shell, cwd=desk, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
            )
            results.append((done.returncode, done.stdout[-1000:] + done.stderr[-2000:]))
        return results[number]

    return run


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(COMMANDS)), ids=COMMANDS)
def test_a_documented_command_runs(run_up_to, number):
    code, output = run_up_to(number)
    assert code == 0, output


def test_every_page_has_commands_that_run():
    assert len(COMMANDS) > 25 and len(set(COMMANDS)) == len(COMMANDS)
