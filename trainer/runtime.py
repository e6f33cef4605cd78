"""Process-level facts of a command: its rank, exit codes, OpenMP threads and status.json.

Imports no torch, because OpenMP reads its settings when torch is imported.
"""

import json
import os
import sys
from pathlib import Path

from trainer.durable import write_atomically
from trainer.errors import disk_error

EXIT_CONFIG_ERROR = 2
# sysexits.h calls 75 EX_TEMPFAIL: stopped on request, to be resumed.
EXIT_STOPPED = 75

# Spin iterations, one pause instruction each. libgomp itself uses 1000 when its threads outnumber the cores, and
# 300,000 by default otherwise.
_SPIN_COUNT = 1000
# Device nodes that the drivers of NVIDIA (WSL included) and AMD create.
_GPU_DEVICES = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")


def keep_threads_awake(device: str | None = None) -> None:
    """Make GNU OpenMP threads spin briefly between parallel regions. libgomp reads this once, when torch is imported.

    A training step has thousands of short parallel regions, and for many of them waking a sleeping thread costs more
    than the region itself. Long spinning is worse: when another process competes for cores, a thread spins while the
    thread it waits for has no core. Nothing is set if the user has set either variable, or if a GPU does the computing.

    Args:
        device: Requested device: cpu, cuda, or anything else for a GPU if there is one.
    """
    has_gpu = any(os.path.exists(path) for path in _GPU_DEVICES)
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys() and (device == "cpu" or not has_gpu):
        os.environ["GOMP_SPINCOUNT"] = str(_SPIN_COUNT)


def rank() -> int:
    """Rank of this process under torchrun; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def write_status(run_dir: str | Path, state: str, exit_code: int, message: str = "", any_rank: bool = False) -> None:
    """Write run_dir/status.json, with state done, stopped, config_error or failed. Rank 0 only, unless `any_rank`."""
    if rank() != 0 and not any_rank:
        return
    path = Path(run_dir)
    content = json.dumps({"state": state, "exit_code": exit_code, "message": message}) + "\n"
    try:
        path.mkdir(parents=True, exist_ok=True)
        write_atomically(path / "status.json", content.encode())
    except OSError as error:
        # An unwritable run.dir or a full disk may be the original error, which a second error must not hide.
        if state != "config_error":
            print(
                f"error: {path}/status.json cannot be written: {disk_error(path, error)}", file=sys.stderr, flush=True
            )
