"""Commands of this project in processes that are forked from one that has imported what they need.

Importing torch and megatron takes longer than a small run. A process that crashes takes nothing else with it.
"""

import importlib
import multiprocessing
import os
import resource
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.studies.runs import ROOT

_IMPORTED = ["trainer.posttraining.run", "trainer.engines.megatron", "trainer.stored.inference"]


def run_script(name: str, words: Sequence[str], log: Path) -> None:
    """Run `spiketrain NAME` with these options, as `call` calls a function."""
    call(f"{__name__}:script", (name, list(words)), log)


def call(target: str, arguments: tuple[Any, ...], log: Path) -> None:
    """Call a function, named as MODULE:FUNCTION, in one thread, and wait. What it prints is appended to a log.

    Raises:
        RuntimeError: it failed; the message names the log.
    """
    # The process that forks has the environment of the first call.
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED)
    log.parent.mkdir(parents=True, exist_ok=True)
    process = context.Process(target=_logged, args=(target, arguments, log))
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"{target} ended with {process.exitcode}: see {log}")


def script(name: str, words: list[str]) -> None:
    """Be the command of this name."""
    path = ROOT / "launch" / f"{name}.py"
    sys.argv = [str(path), *words]
    runpy.run_path(str(path), run_name="__main__")


def _logged(target: str, arguments: tuple[Any, ...], log: Path) -> None:
    with log.open("a") as sink:
        for descriptor in (1, 2):
            os.dup2(sink.fileno(), descriptor)
    os.chdir(ROOT)
    module, _, function = target.partition(":")
    try:
        getattr(importlib.import_module(module), function)(*arguments)
    finally:
        own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        seconds = own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime
        print(f"{' '.join(map(str, arguments))}: {seconds:.1f} s of a processor", flush=True)
