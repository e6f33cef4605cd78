"""Alternating timing, progress on stderr, the result table and the JSON file."""

import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Comparison:
    """A line of a benchmark's results.

    Attributes:
        case: The measured case.
        ours: Our figure.
        peer: The peer's figure.
        ratio: Greater than 1 if ours is better.
        unit: Unit of both figures.
        note: Facts that a reader needs to judge the figures.
    """

    case: str
    ours: float
    peer: float
    ratio: float
    unit: str
    note: str


def say(message: str) -> None:
    """Print progress on stderr."""
    print(message, file=sys.stderr, flush=True)


def time_by_turns(
    sides: Mapping[str, Callable[[], object]],
    rounds: int,
    warmup: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Time `rounds` calls of each side in seconds. The sides alternate, after `warmup` untimed rounds.

    On a shared machine `time.process_time` is the fair clock, but with one thread only.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(-warmup, rounds):
        for name, call in sides.items():
            # Within a round the sides run one after the other, so that drift affects them equally.
            start = clock()
            call()
            if turn >= 0:
                seconds[name].append(clock() - start)
        if turn >= 0:
            medians = ", ".join(f"{name} {statistics.median(taken):.3f} s" for name, taken in seconds.items())
            say(f"  round {turn + 1}/{rounds}: medians {medians}")
    return seconds


def report(title: str, comparisons: Sequence[Comparison], json_path: str | None) -> None:
    """Print the table, and write the JSON file if a path is given."""
    table = Table(title=title, title_justify="left")
    table.add_column("case")
    for name in ("ours", "peer", "ratio"):
        table.add_column(name, justify="right")
    table.add_column("unit")
    for line in comparisons:
        table.add_row(line.case, _figure(line.ours), _figure(line.peer), f"{line.ratio:.2f}", line.unit)
    # For files and pipes rich would assume 80 columns.
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    for line in comparisons:
        console.print(f"{line.case}: {line.note}", style="dim", highlight=False)
    if json_path:
        path = Path(json_path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps([asdict(line) for line in comparisons], indent=1) + "\n")


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
