"""events.jsonl: what happened to a run, and when. Imports neither torch nor megatron.

One JSON object a line, the keys `time`, `step` and `kind` first:

    {"time": "2026-11-28T22:50:13.120Z", "step": 100, "kind": "checkpoint", "state": "published", "path": …}

It is the history of all starts of a run, so that, unlike metrics.jsonl, it is never cut back: after a crash a step may
occur in it twice.
"""

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from trainer.json_lines import as_line

NAME = "events.jsonl"


class EventLog:
    """Appends events to a run's events.jsonl, each by one write: a line is there as a whole or not at all.

    Rank 0 writes; of a failure the rank that tells of it.

    Args:
        run_dir: The run directory, which is there by the first event.
    """

    def __init__(self, run_dir: str | Path) -> None:
        self.path = Path(run_dir) / NAME

    def record(self, kind: str, step: int, **fields: Any) -> None:
        """Add an event of now.

        Raises:
            OSError: it could not be written; then nothing of it is.
        """
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        line = as_line({"time": now, "step": step, "kind": kind, **fields}).encode()
        # Opened anew each time: any thread may write, and the file may have been set aside since.
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            written = os.write(descriptor, line)
            if written < len(line):
                # As on a disk that is full.
                os.ftruncate(descriptor, os.lseek(descriptor, 0, os.SEEK_CUR) - written)
                raise OSError(f"{self.path} could not be written: {written} of {len(line)} bytes fit")
        finally:
            os.close(descriptor)

    def cut_torn_line(self) -> None:
        """Drop an unfinished last line, as a power cut may leave it. To be called before anyone writes."""
        if self.path.exists():
            os.truncate(self.path, len(_whole_lines(self.path)))


def read_events(run_dir: str | Path) -> list[dict[str, Any]]:
    """The events of a run so far, oldest first; none where there is no file."""
    path = Path(run_dir) / NAME
    return [json.loads(line) for line in _whole_lines(path).splitlines()] if path.exists() else []


def _whole_lines(path: Path) -> bytes:
    """Without an unfinished last line."""
    content = path.read_bytes()
    return content[: content.rfind(b"\n") + 1]
