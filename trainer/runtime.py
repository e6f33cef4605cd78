"""The process of a command: its rank, its exit codes, its threads, and what it leaves in status.json.

Imports no torch: OpenMP reads its settings when torch is imported.
"""

import json
import os
import sys
from pathlib import Path

from trainer.durable import write_atomically
from trainer.errors import disk_error

EXIT_CONFIG_ERROR = 2
EXIT_STOPPED = 75

# Rounds of waiting, a pause instruction each: what libgomp takes itself where its threads outnumber the cores. Without
# a setting it takes 300,000 where they do not.
_SPIN_COUNT = 1000
# What the drivers of NVIDIA (also under WSL) and AMD make.
_GPU_DEVICES = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")


def keep_threads_awake(device: str | None = None) -> None:
    """Have GNU's OpenMP threads spin for a moment between parallel regions. It reads this once, as torch is imported.

    A training step has thousands of short regions, and waking a sleeping thread costs more than many of them. Spinning
    for long is worse: where another process wants a core, one thread spins while the one that it waits for has none.
    Where the user has set either variable, and where a GPU computes, nothing is set.

    Args:
        device: What the user wants to compute on: cpu, cuda, or anything else for a GPU where there is one.
    """
    has_gpu = any(os.path.exists(path) for path in _GPU_DEVICES)
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys() and (device == "cpu" or not has_gpu):
        os.environ["GOMP_SPINCOUNT"] = str(_SPIN_COUNT)


def rank() -> int:
    """The rank of this process under torchrun; 0 without it."""
    return int(os.environ.get("RANK", "0"))


def write_status(run_dir: str | Path, state: str, exit_code: int, message: str = "", any_rank: bool = False) -> None:
    """Write run_dir/status.json: state is done, stopped, config_error or failed. Rank 0 only, unless `any_rank`."""
    if rank() != 0 and not any_rank:
        return
    path = Path(run_dir)
    content = json.dumps({"state": state, "exit_code": exit_code, "message": message}) + "\n"
    try:
        path.mkdir(parents=True, exist_ok=True)
        write_atomically(path / "status.json", content.encode())
    except OSError as error:
        # run.dir, or a full disk, may be the very thing that is wrong: a second error must not hide the first.
        if state != "config_error":
            print(
                f"error: {path}/status.json cannot be written: {disk_error(path, error)}", file=sys.stderr, flush=True
            )
