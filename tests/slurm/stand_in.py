"""In place of the interpreter, for what the batch script does around torchrun: `write` makes a script for PYTHON.

Where the batch script starts torchrun, this starts one child that acts as a rank: it leaves a status.json and ends.
Everything else goes to the interpreter itself.
"""

import sys
from pathlib import Path

_SCRIPT = """\
#!{python}
import json, os, pathlib, signal, subprocess, sys

plan = {plan!r}
if sys.argv[1:3] == ["-m", "torch.distributed.run"]:
    print("torchrun", *sys.argv[3:], flush=True)
    sys.exit(1 if subprocess.run([sys.executable, __file__, "rank"]).returncode else 0)
if sys.argv[1:] != ["rank"]:
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
if os.environ["SLURM_NODEID"] != "0":
    sys.exit(plan["exit_code"])
run_dir = pathlib.Path(plan["run_dir"])
if plan["waits_for"] is not None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {{plan["waits_for"]}})
    (run_dir / "waiting").touch()
    signal.sigwait({{plan["waits_for"]}})
if plan["state"] is not None:
    status = {{"state": plan["state"], "exit_code": plan["exit_code"], "message": ""}}
    (run_dir / "new.json").write_text(json.dumps(status) + "\\n")
    (run_dir / "new.json").replace(run_dir / "status.json")
sys.exit(plan["exit_code"])
"""


def write(path: Path, run_dir: Path, state: str | None, exit_code: int, waits_for: int | None = None) -> Path:
    """A stand-in whose first rank leaves `state` (None: nothing), once the signal `waits_for` has come, if any."""
    plan = {"run_dir": str(run_dir), "state": state, "exit_code": exit_code, "waits_for": waits_for and int(waits_for)}
    path.write_text(_SCRIPT.format(python=sys.executable, plan=plan))
    path.chmod(0o755)
    return path
