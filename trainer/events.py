"""events.jsonl, the log of a run's events. Imports neither torch nor megatron.

Each line is a JSON object. The keys `time`, `step` and `kind` come first:

    {"time": "2026-11-28T22:50:13.120Z", "step": 100, "kind": "checkpoint", "state": "published", "path": …}

The file is the history of all starts of a run. Unlike metrics.jsonl it is never truncated to the resumed step, so after
a crash a step may occur twice.
"""

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from trainer.json_lines import as_line

NAME = "events.jsonl"


class EventLog:
    """Appends events to a run's events.jsonl, each with a single write. A line is written whole or not at all.

    Rank 0 writes, except that a failure is written by the rank that reports it.

    Args:
        run_dir: The run directory. It must exist at the first event.
    """

    def __init__(self, run_dir: str | Path) -> None:
        self.path = Path(run_dir) / NAME

    def record(self, kind: str, step: int, **fields: Any) -> None:
        """Append an event with the current time.

        Raises:
            OSError: the write failed. The file is then unchanged.
        """
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        line = as_line({"time": now, "step": step, "kind": kind, **fields}).encode()
        # Opened for each event, because any thread may write, and the file may have been renamed meanwhile.
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            written = os.write(descriptor, line)
            if written < len(line):
                # A short write, as on a full disk. Remove the fragment.
                os.ftruncate(descriptor, os.lseek(descriptor, 0, os.SEEK_CUR) - written)
                raise OSError(f"{self.path} could not be written: {written} of {len(line)} bytes fit")
        finally:
            os.close(descriptor)

    def cut_torn_line(self) -> None:
        """Drop an incomplete last line, which a power failure may leave. Call it before anything is written."""
        if self.path.exists():
            os.truncate(self.path, len(_whole_lines(self.path)))


def read_events(run_dir: str | Path) -> list[dict[str, Any]]:
    """Return all events of a run, oldest first. Empty if there is no file."""
    path = Path(run_dir) / NAME
    return [json.loads(line) for line in _whole_lines(path).splitlines()] if path.exists() else []


def _whole_lines(path: Path) -> bytes:
    """Read the file without an incomplete last line."""
    content = path.read_bytes()
    return content[: content.rfind(b"\n") + 1]
