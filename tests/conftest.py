"""One thread a process, and tests that need a GPU: skipped where there is none, and listed by name."""

import os
import sysconfig
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
    """A prepared dataset of a few standard-library files."""
    from trainer.data.prepare import prepare
    from trainer.data.prepare_config import PrepareConfig, TokenizerConfig

    output = tmp_path_factory.mktemp("data") / "tiny"
    source = f"{sysconfig.get_paths()['stdlib']}/json/*.py"
    prepare(
        PrepareConfig(
            source=source,
            output=str(output),
            validation=source,
            test_share=0.0,
            workers=1,
            tokenizer=TokenizerConfig(vocab_size=512),
        )
    )
    return output
