"""Check every kernel on the GPU that is there, and say what is wrong.

    python -m tests.gpu_check                       everything that fits into eight minutes, the most important first
    python -m tests.gpu_check --group gla --switches
    python -m tests.gpu_check --dry-run             tiny sizes in Triton's interpreter, on a CPU

Exit codes: 0 all holds; 1 something is wrong or failed, by name; 2 no device or wrong arguments; 3 nothing wrong so
far, but the time was over before everything had run. docs/gpu.md says what is compared with what.
"""

import argparse
import os
import sys
from importlib.util import find_spec
from pathlib import Path


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m tests.gpu_check", description="Check every kernel on the GPU.")
    parser.add_argument("--seconds", type=float, default=480, help="after which no case is begun (default 480)")
    parser.add_argument("--only", default="", metavar="TEXT", help="only cases with this in their name")
    parser.add_argument("--group", default="", metavar="NAME", help="only cases of this recurrence or set of kernels")
    parser.add_argument("--list", action="store_true", help="name the cases and stop")
    parser.add_argument("--json", type=Path, default=Path("gpu-check.json"), metavar="FILE", help="written as it goes")
    parser.add_argument("--switches", action="store_true", help="run what failed again with each switch of the plan")
    parser.add_argument("--jobs", type=int, help="processes at once; 0 for none but this one")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes in the interpreter, without a GPU")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if (options.jobs is not None and options.jobs < 0) or options.seconds <= 0:
        parser.error("--jobs must not be negative, --seconds must be positive")
    if not options.json.parent.is_dir():
        parser.error(f"--json: there is no directory {options.json.parent}")
    return options


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    options = _parse(arguments)
    missing = [name for name in ("torch", "triton") if find_spec(name) is None]
    if missing:
        print(f"gpu_check: {' and '.join(missing)} cannot be imported: pip install torch triton", file=sys.stderr)
        return 2
    if options.dry_run:
        # Triton reads it when it is imported.
        os.environ["TRITON_INTERPRET"] = "1"
    import torch

    if not options.dry_run and not options.list and not torch.cuda.is_available():
        print("gpu_check: no CUDA or ROCm device; --dry-run goes through it in the interpreter", file=sys.stderr)
        return 2
    if not options.dry_run and os.environ.get("TRITON_INTERPRET", "0") == "1":
        print("gpu_check: TRITON_INTERPRET is set, and nothing would be compiled: unset it", file=sys.stderr)
        return 2
    from kernels.triton.chunked import plan_switches
    from tests.gpu_check import runner

    try:
        plan_switches()
    except ValueError as error:
        print(f"gpu_check: {error}", file=sys.stderr)
        return 2
    cases = runner.cases(dry=options.dry_run)
    if options.worker:
        return runner.serve(cases, dry=options.dry_run)
    chosen = [case for case in cases if options.only in case.name and options.group in ("", case.group)]
    if not chosen:
        groups = ", ".join(dict.fromkeys(case.group for case in cases))
        print(f"gpu_check: no such case; see --list, the groups are {groups}", file=sys.stderr)
        return 2
    if options.list:
        print("\n".join(case.name for case in chosen))
        return 0
    return runner.check(chosen, options)


if __name__ == "__main__":
    sys.exit(main())
