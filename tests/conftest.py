"""One thread a process, and tests that need a GPU: skipped where there is none, and listed by name."""

import os
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.interpreter import round_to_nearest

# Several test processes share the cores. torch reads this when it is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Triton reads this when it is imported: without a GPU its kernels run in the interpreter.
if not any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/kfd")):
    os.environ.setdefault("TRITON_INTERPRET", "1")
    if find_spec("triton") is not None:
        round_to_nearest()

_NEEDS_GPU = "needs a GPU"


def pytest_configure(config: pytest.Config) -> None:
    """Where the processes of this session meet that fork ranks for it, see tests.processes."""
    if not hasattr(config, "workerinput"):
        os.environ["TEST_FORK_SERVERS"] = tempfile.mkdtemp(prefix="forks-", suffix=f".{os.getpid()}")


def pytest_unconfigure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ["TEST_FORK_SERVERS"])


# What takes longest, in this order: whoever ends last should not have begun with a long file.
_LONGEST_FIRST = (
    "trainer/test_deepspeed_engine.py",
    "parity/test_parity.py",
    "trainer/test_resume.py",
    "trainer/test_plan.py",
    "trainer/test_weights.py",
    "parity/test_parity_moe.py",
    "trainer/test_failures.py",
    "kernels/",
    "trainer/",
    "models/",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first; the order within them stays."""

    def place(item: pytest.Item) -> int:
        name = item.nodeid.removeprefix("tests/")
        return next((i for i, long in enumerate(_LONGEST_FIRST) if name.startswith(long)), len(_LONGEST_FIRST))

    items.sort(key=place)


@pytest.fixture(scope="module", autouse=True)
def no_group_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """A module ends the process groups that it began: each has threads, which would add up over a session."""
    yield
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():
        from tests.trainer.conftest import leave_groups

        leave_groups()
        pytest.fail(f"{request.node.name} leaves process groups: close its engines")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Before any other reason to skip is looked at, so that every test marked gpu is in the list."""
    if item.get_closest_marker("gpu") is None:
        return
    import torch

    if not torch.cuda.is_available():
        pytest.skip(_NEEDS_GPU)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = terminalreporter.stats.get("skipped", [])
    # xdist's controller sees nothing of a test but its report.
    names = {
        report.nodeid
        for report in skipped
        if isinstance(report.longrepr, tuple) and report.longrepr[2] == f"Skipped: {_NEEDS_GPU}"
    }
    if names:
        terminalreporter.section("needs a GPU, not run here:")
        for name in sorted(names):
            terminalreporter.write_line(name)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared dataset of a few standard-library files; a small validation set, which every run reads whole."""
    from trainer.data.prepare import prepare
    from trainer.data.prepare_config import PrepareConfig, TokenizerConfig

    output = tmp_path_factory.mktemp("data") / "tiny"
    stdlib = sysconfig.get_paths()["stdlib"]
    prepare(
        PrepareConfig(
            source=f"{stdlib}/json/*.py",
            output=str(output),
            validation=f"{stdlib}/json/[st]*.py",
            test_share=0.0,
            workers=1,
            tokenizer=TokenizerConfig(vocab_size=512),
        )
    )
    return output
