"""Pools of worker processes, one for each world size, reused by every case."""

import json
import re
import time

import pytest
import torch

from tests.helpers import WAIT
from tests.processes import start

# Each layout's groups bring gloo threads, and not all of them end with the groups.
JOBS_OF_A_POOL = 12


class Pool:
    """`ranks` processes that train what they are told to, one job after another."""

    def __init__(self, ranks, folder):
        self.ranks, self.folder, self.number = ranks, folder, 0
        self.process = start("-m", "tests.parity.worker", folder, ranks=ranks, imported="deepspeed")

    def run(self, job, timeout=WAIT):
        """Every rank's result of a job."""
        path = self.folder / f"job_{self.number}.json"
        path.with_suffix(".part").write_text(json.dumps(job))
        path.with_suffix(".part").rename(path)
        paths = [self.folder / f"result_{self.number}_{rank}.pt" for rank in range(self.ranks)]
        self.number += 1
        end = time.monotonic() + timeout
        while not all(path.exists() for path in paths):
            failed = [torch.load(path)["error"] for path in paths if path.exists() and "error" in torch.load(path)]
            ended = self.process.poll() is not None
            if failed or ended or time.monotonic() > end:
                told = [f"{len(failed)} ranks failed" + ", and all have ended" * ended, *failed[:1]]
                raise AssertionError("\n".join([*told, self.process.output()[-4000:]]))
            time.sleep(0.02)
        results = [torch.load(path) for path in paths]
        errors = [result["error"] for result in results if "error" in result]
        assert not errors, errors[0]
        return results

    def is_used_up(self):
        """Whether a process has ended, or has run so many jobs that what gloo leaves behind of each slows it down."""
        return self.number >= JOBS_OF_A_POOL or self.process.poll() is not None

    def close(self):
        """End the processes."""
        self.process.kill()


@pytest.fixture(scope="session")
def pools(tmp_path_factory):
    """The pool of a world size, started when it is first asked for; started anew after a failure."""
    running = {}

    def pool(ranks):
        if ranks in running and running[ranks].is_used_up():
            running.pop(ranks).close()
        if ranks not in running:
            running[ranks] = Pool(ranks, tmp_path_factory.mktemp(f"pool_{ranks}_"))
        return running[ranks]

    yield pool
    for left in running.values():
        left.close()


def pytest_terminal_summary(terminalreporter):
    """Seconds of every linear mixer in every layout, where they ran."""
    seconds = {}
    for report in terminalreporter.stats.get("passed", []):
        case = re.search(r"test_every_linear_mixer\[(.+)\]$", report.nodeid)
        if case and report.when == "call":
            # Neither holds a hyphen: pytest joins the two by one.
            layout, mixer = sorted(case[1].split("-"), key=str.islower)
            seconds.setdefault(layout, {})[mixer] = report.duration
    if not seconds:
        return
    mixers = sorted({mixer for row in seconds.values() for mixer in row})
    width = max(map(len, seconds))
    terminalreporter.section("seconds of every linear mixer in every layout, beside its attention layers")
    for number, mixer in enumerate(mixers):
        terminalreporter.write_line(f"({number}) {mixer}")
    terminalreporter.write_line(" " * width + "".join(f"{f'({i})':>7}" for i in range(len(mixers))))
    for layout, row in seconds.items():
        cells = (f"{row[mixer]:7.1f}" if mixer in row else f"{'':7}" for mixer in mixers)
        terminalreporter.write_line(f"{layout:<{width}}" + "".join(cells))
