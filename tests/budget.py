"""A pytest plugin for suites that may take longer than there is time.

    python -m pytest -p tests.budget --budget SECONDS

Cases begin until the budget is used up, one in progress may take `--grace` seconds more; the summary says how many ran
and how many were left. `--rotate TEXT` begins the order somewhere else for each text, so that what is left by one
commit runs for another. What has not run is skipped: only what ran and failed is a failure.
"""

import hashlib
import os
import signal
import time
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import pytest

LEFT = "left: the budget is used up"
CUT_SHORT = "cut short: the budget and its grace are used up"
# Of the whole session, for xdist's processes, on the clock that all processes of a machine share.
_END = "TEST_BUDGET_END"


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options of this plugin."""
    group = parser.getgroup("budget")
    group.addoption("--budget", type=float, default=None, help="seconds in which cases may begin")
    group.addoption("--grace", type=float, default=300.0, help="seconds more for a case in progress")
    group.addoption("--rotate", default=None, help="a text, say a commit, that the order of cases begins by")


def pytest_configure(config: pytest.Config) -> None:
    """Begin to count."""
    budget = config.getoption("budget")
    if budget is None:
        return
    if not hasattr(config, "workerinput"):
        os.environ[_END] = str(time.monotonic() + budget)
    config.pluginmanager.register(Budget(float(os.environ[_END]), config.getoption("grace")), "budget-in-use")


def rotated(items: list[Any], text: str) -> list[Any]:
    """The items from one on that the text's hash chooses, then those before it."""
    if not items:
        return items
    start = int(hashlib.sha256(text.encode()).hexdigest(), 16) % len(items)
    return items[start:] + items[:start]


@pytest.hookimpl(trylast=True)  # after -m and -k have chosen
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Rotate."""
    if (text := config.getoption("rotate")) is not None:
        items[:] = rotated(items, text)


class Budget:
    """Skips what would begin after `end` (time.monotonic), and what is not done `grace` seconds later."""

    def __init__(self, end: float, grace: float) -> None:
        self._end, self._grace, self._in_progress = end, grace, False

    def pytest_sessionstart(self) -> None:
        """Have a signal come when the grace is over."""
        signal.signal(signal.SIGALRM, self._cut_short)
        signal.setitimer(signal.ITIMER_REAL, max(self._end + self._grace - time.monotonic(), 0.01), 1.0)

    def pytest_sessionfinish(self) -> None:
        """No signal after the session."""
        signal.setitimer(signal.ITIMER_REAL, 0.0)

    def _cut_short(self, number: int, frame: FrameType | None) -> None:
        # pytest itself must not be cut short: the next signal comes a second later.
        if self._in_progress:
            self._in_progress = False
            pytest.skip(CUT_SHORT)

    @contextmanager
    def _may_be_cut_short(self) -> Generator[None]:
        self._in_progress = True
        try:
            yield
        finally:
            self._in_progress = False

    @pytest.hookimpl(wrapper=True, trylast=True)  # inside of pytest's own, whose teardown expects their setup
    def pytest_runtest_setup(self) -> Generator[None]:
        """Begin no case after the end."""
        if time.monotonic() >= self._end:
            pytest.skip(LEFT)
        with self._may_be_cut_short():
            return (yield)

    @pytest.hookimpl(wrapper=True, trylast=True)
    def pytest_runtest_call(self) -> Generator[None]:
        """A case may be cut short."""
        with self._may_be_cut_short():
            return (yield)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Say how many cases ran and how many were left."""
        reports = terminalreporter.stats
        ran = {report.nodeid for outcome in ("passed", "failed", "error") for report in reports.get(outcome, [])}
        skips = [(report.nodeid, str(report.longrepr)) for report in reports.get("skipped", [])]
        cut_short = sorted(name for name, reason in skips if CUT_SHORT in reason)
        left = len(cut_short) + sum(LEFT in reason for _, reason in skips)
        terminalreporter.section("budget")
        terminalreporter.write_line(f"{len(ran)} cases ran, {left} were left")
        for name in cut_short:
            terminalreporter.write_line(f"cut short: {name}")
