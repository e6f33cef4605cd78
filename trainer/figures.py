"""Figures in files, drawn by matplotlib, which only development installs bring."""

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
    """Write a figure into a file, of the kind that its name ends with, and make its directory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dpi)
