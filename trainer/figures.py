"""Figures written to files with matplotlib, which is a development dependency."""

from pathlib import Path
from typing import Any

from trainer.errors import ConfigError


def pyplot() -> Any:
    """Import matplotlib's pyplot for drawing without a display.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as missing:
        raise ConfigError("matplotlib is not installed; pip install 'spiketrain[dev]'") from missing
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def save(figure: Any, path: Path, dpi: int = 110) -> None:
    """Write a figure to a file, in the format of the name's suffix. Create the directory if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dpi)
