"""Logging to rank 0's terminal and run.log."""

import logging
import sys
from pathlib import Path

from rich.console import Console
from rich.logging import RichHandler

# Messages and the progress line share one console, so that a message does not break the line.
CONSOLE = Console(stderr=True)


def configure(run_dir: Path | None, rank: int) -> logging.Logger:
    """Set up the logger `spiketrain`; ranks other than 0 log warnings only."""
    # Tests and restarts may configure it again: duplicate handlers would repeat every line.
    logger = logging.getLogger("spiketrain")
    logger.handlers.clear()
    logger.propagate = False
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    plain = logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S")
    if sys.stderr.isatty():
        logger.addHandler(RichHandler(console=CONSOLE, show_path=False, show_level=False, log_time_format="%H:%M:%S"))
    else:
        stream = logging.StreamHandler()
        stream.setFormatter(plain)
        logger.addHandler(stream)
    if run_dir is not None and rank == 0:
        file = logging.FileHandler(run_dir / "run.log")
        file.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        logger.addHandler(file)
    return logger
