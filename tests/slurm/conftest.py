"""The cluster of this session, and jobs on it that train the tiny model of tests/trainer."""

import shutil
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pytest
import yaml

from tests.helpers import WAIT
from tests.slurm.cluster import Cluster, missing_programs
from tests.trainer.conftest import ROOT, in_process_config

SCRIPT = "launch/slurm/pretrain.sbatch"
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}


def pytest_collection_modifyitems(items):
    """They need a cluster: none of them is for `make test`."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def cluster():
    missing = missing_programs()
    if missing:
        pytest.skip(f"SLURM is not installed ({', '.join(missing)}): bash tests/slurm/install.sh")
    # Not pytest's directory: a socket's path may have no more than 107 characters.
    root = Path(tempfile.mkdtemp(prefix="slurm-"))
    running = Cluster(root)
    try:
        running.start()
        yield running
    finally:
        running.stop()
        shutil.rmtree(root)


@dataclass
class Job:
    """A submitted job."""

    cluster: Cluster
    number: int
    log: Path

    def field(self, name: str) -> str:
        """A field of `scontrol show job`."""
        return self.cluster.job(self.number)[name]

    def wait_until(self, condition, what: str, timeout: float = WAIT, ended: bool = False) -> None:
        """Poll until the condition holds; fails where the job ends before it does, unless it has `ended` already."""
        end = time.monotonic() + timeout
        while not condition():
            over = not ended and self.field("JobState") in ENDED
            # Asked once more: it may have come true as the job ended.
            if (over and not condition()) or time.monotonic() > end:
                raise AssertionError(f"not {what}: {self.field('JobState')}\n{self.output()}\n{self.cluster.logs()}")
            time.sleep(0.2)

    def wait(self) -> str:
        """Wait for its end; returns the state."""
        self.wait_until(lambda: self.field("JobState") in ENDED, "ended")
        return self.field("JobState")

    def output(self) -> str:
        """What it has printed so far."""
        return self.log.read_text() if self.log.exists() else ""


@pytest.fixture(scope="module")
def submit(cluster, tmp_path_factory):
    """Submit the batch script: sbatch's options, then the script's arguments. What is still there at the end goes."""
    logs = tmp_path_factory.mktemp("jobs")
    numbers = []

    def start(options, arguments, python=sys.executable, chdir=ROOT, script=SCRIPT):
        log = logs / f"{len(numbers)}.log"
        command = ["sbatch", "--parsable", f"--output={log}", f"--chdir={chdir}", *options, str(ROOT / script)]
        environment = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHON": str(python)}
        numbers.append(int(cluster.run(*command, *map(str, arguments), **environment)))
        return Job(cluster, numbers[-1], log)

    yield start
    for number in numbers:
        cluster.run("scancel", "--full", "--signal=KILL", str(number), check=False)
        cluster.run("scancel", str(number), check=False)


@pytest.fixture(scope="module")
def configuration(tiny_data, tmp_path_factory):
    """Write the tiny run's configuration; returns its file and its run directory."""

    def write(steps, every=0):
        directory = tmp_path_factory.mktemp("run")
        config = in_process_config(tiny_data, directory / "run", steps=steps)
        config = replace(
            config,
            checkpoint=replace(config.checkpoint, every=every),
            evaluation=replace(config.evaluation, every=60),
        )
        (directory / "config.yaml").write_text(yaml.safe_dump(asdict(config)))
        return directory / "config.yaml", directory / "run"

    return write
