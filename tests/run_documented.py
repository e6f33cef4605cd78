"""Run README.md's and docs/' commands as they are written, in their order, in a copy with tiny recipes.

python -m tests.run_documented

Prints a line for each; the exit code is 1 if one failed. It takes some twenty minutes on two cores, so no suite has it.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.documented import documented_commands
from tests.test_documented_commands import lay_out

# Commands that are left to others, by a pattern and with the reason.
NOT_RUN_HERE = {
    r"make ": "they install; CI runs the tests, and the recipe of `make pretrain` is run below",
    r"source ": "the other commands are run in the environment that it sets up",
    r"sbatch ": "tests/slurm submits jobs",
    r"pytest -m gpu|.*gpu[-_]check": "needs a GPU; tests/test_gpu_check.py runs it without one",
    r"spiketrain bench \w": "minutes each; tests/launch runs every benchmark at small sizes",
    r"python -m kernels.compile": "minutes each; tests/kernels/triton/test_compile.py",
    r".*tinystories": "fetches from the hub",
    r"python -m trainer.combinations": "rewrites the page it stands on; tests/trainer/test_combinations.py",
}
# The recipe of `make pretrain`, whose results the commands after it read.
FIRST = "spiketrain pretrain --config configs/pretrain/laptop.yaml"


def main() -> int:
    """Run them."""
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "COLUMNS")}
    commands = documented_commands()
    chosen = [FIRST]
    for command in commands:
        elsewhere = any(re.match(pattern, command.text) for pattern in NOT_RUN_HERE)
        if command.in_block and not elsewhere and command.text not in chosen:
            chosen.append(command.text)
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        desk = lay_out(Path(folder) / "spiketrain")
        environment |= {"PYTHONPATH": str(desk), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        for text in chosen:
            shell = ["bash", "-c", f"source .venv/bin/activate && {text}"]
            result = subprocess.run(
                shell, cwd=desk, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
            )
            print(f"exit {result.returncode}: {text}", flush=True)
            if result.returncode:
                failed.append(text)
                print(result.stdout[-1000:], result.stderr[-2000:], sep="\n", flush=True)
    print(f"documented commands: {len(commands)} found, {len(chosen)} run as written, {len(failed)} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
