"""Spike rasters: counts of some channels over tokens, one line per channel, as an image or as a figure."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from trainer.figures import pyplot, save

CHANNELS, TOKENS = 16, 256
# Larger counts are drawn like this one. It is the largest |count| in three steps.
_LARGEST = 7
_MOST_NEURONS = 24


def image(rasters: Mapping[str, np.ndarray]) -> np.ndarray:
    """Stack the neurons' rasters [channels, T] vertically into a grayscale image, uint8 [lines, T].

    |count| from 0 to 7 maps to black to white. A gray line separates neurons.
    """
    parts: list[np.ndarray] = []
    for raster in rasters.values():
        if parts:
            parts.append(np.full((1, raster.shape[1]), 64, np.uint8))
        parts.append((np.minimum(np.abs(raster), _LARGEST) * (255 / _LARGEST)).astype(np.uint8))
    return np.concatenate(parts)


def draw(rasters: Mapping[str, np.ndarray], path: Path) -> None:
    """Draw the neurons' rasters into a file: negative counts in blue, zeros in white, positive counts in red.

    Draws at most 24 neurons, evenly spaced over the depth.
    """
    step = -(-len(rasters) // _MOST_NEURONS)
    shown = dict(list(rasters.items())[::step])
    figure, rows = pyplot().subplots(
        len(shown), 1, figsize=(11, 0.75 * len(shown) + 1), sharex=True, squeeze=False, constrained_layout=True
    )
    for (axes,), (name, raster) in zip(rows, shown.items(), strict=True):
        drawn = axes.imshow(
            raster, aspect="auto", interpolation="nearest", cmap="RdBu_r", vmin=-_LARGEST, vmax=_LARGEST
        )
        axes.set_yticks([])
        label = name.removeprefix("layers.").replace(".neurons.", "\n")
        axes.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=7)
    rows[-1, 0].set_xlabel(f"token ({len(next(iter(shown.values())))} channels of each input)")
    figure.colorbar(drawn, ax=rows[:, 0].tolist(), label="spike count", shrink=min(1.0, 6 / len(shown)))
    save(figure, path)
