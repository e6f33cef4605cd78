"""Study: does an activation before the softmax make a gate's temperature identifiable? Fit errors over sample size.

The study samples Gaussian mixtures of two experts and fits them by maximum likelihood, from random starts of fixed
width. A fit has two experts (exact) or three (over-specified), and a free temperature. For each gate, the slope of an
error is that of log10(median over replicates) against log10(n), by least squares. Its 95 % confidence interval is a
bootstrap that resamples the replicates of every n. A slope of 0 is no convergence, -0.5 the parametric rate.

In the table and the JSON file, `ours` is the measured slope, `peer` the slope that theory predicts, and `ratio`
10^(peer - ours): the additional factor by which the error falls for ten times the data. 1 is as predicted.

Every finished fit is appended to a file, and the same command continues from there.
"""

import itertools
import json
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.benchmarks.report import Comparison, report, say
from trainer.cli import fail
from trainer.errors import ConfigError
from trainer.figures import pyplot, save

DESCRIPTION = "Error of gate parameters against sample size: mixtures of experts fitted by maximum likelihood."
GATE_NAMES = ("linear", "relu", "sigmoid", "tanh", "gelu")
SETTINGS = {2: "exact", 3: "over-specified"}
# Names of the errors of `gaussian_experts.errors`.
ERRORS = {
    "voronoi": "Voronoi loss",
    "gate_raw": "gate parameters",
    "gate_scaled": "gate parameters / tau",
    "expert": "expert parameters",
    "gate_function": "gate function",
    "density": "density",
}


@dataclass
class Config:
    """Sizes. The defaults are the whole experiment.

    Attributes:
        json: Write the comparisons to this file.
        output: File of finished fits, one JSON object per line. A rerun continues from it.
        plot: Draw errors against sample size into this file.
        sample_sizes: Observations per sample.
        million: Add samples of a million observations.
        replicates: Samples of each size, per gate and number of experts.
        restarts: Random starts of each fit.
        seed: Seed of samples and starts.
        cpu_minutes: Stop when the fits in the file have taken this much processor time.
        quick: Sizes that take seconds. They only show that the command works, and measure no rates.
    """

    json: str | None = None
    output: str = "runs/gate_identifiability/fits.jsonl"
    plot: str | None = None
    sample_sizes: list[int] = field(default_factory=lambda: [1000, 3162, 10000, 31623, 100000])
    million: bool = False
    replicates: int = 40
    restarts: int = 30
    seed: int = 0
    cpu_minutes: float = 120.0
    quick: bool = False

    def __post_init__(self) -> None:
        if self.quick:
            self.sample_sizes, self.replicates, self.restarts = [200, 500], 2, 2
        if self.million:
            self.sample_sizes = [*self.sample_sizes, 1_000_000]
        if len(set(self.sample_sizes)) < 2 or min(self.sample_sizes) < 100:
            raise ConfigError(f"sample_sizes is {self.sample_sizes}: a slope takes two sizes, each at least 100")
        for name in ("replicates", "restarts", "cpu_minutes"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} is {getattr(self, name)}: it must be positive")


Key = tuple[str, int, int, int]
Fits = dict[Key, dict[str, Any]]


def read_fits(path: Path, config: Config) -> Fits:
    """Read the finished fits by (gate, experts, n, replicate). Drops a last line that a kill left incomplete.

    Raises:
        ConfigError: the fits were made with another seed or number of restarts.
    """
    if not path.exists():
        return {}
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole)
    fits = {}
    for line in whole.splitlines():
        fit = json.loads(line)
        for name in ("seed", "restarts"):
            if fit[name] != getattr(config, name):
                raise ConfigError(f"{path} has fits with {name} {fit[name]}: name another --output or --{name}")
        fits[fit["gate"], fit["experts"], fit["n"], fit["replicate"]] = fit
    return fits


def _keys(config: Config) -> Iterator[Key]:
    """Yield the keys, replicate by replicate, so that an unfinished file covers all gates and sizes."""
    for replicate in range(config.replicates):
        for n in config.sample_sizes:
            for experts in SETTINGS:
                for gate in GATE_NAMES:
                    yield gate, experts, n, replicate


def _fit(key: Key, config: Config) -> dict[str, Any]:
    import numpy as np

    from trainer.studies.gaussian_experts import TRUTH, fit, likelihood, sample

    gate, experts, n, replicate = key
    start = time.process_time()
    # A generator per fit: results do not depend on the order or on restarts of the command.
    generator = np.random.default_rng([config.seed, GATE_NAMES.index(gate), experts, n, replicate])
    x, y = sample(gate, n, generator)
    theta, value, evaluations = fit(gate, experts, x, y, config.restarts, generator)
    return {
        **dict(zip(("gate", "experts", "n", "replicate"), key)),
        "seed": config.seed,
        "restarts": config.restarts,
        "nats_above_truth": n * (value - likelihood(TRUTH.vector(), gate, x, y)[0]),
        "evaluations": evaluations,
        "theta": theta.tolist(),
        "cpu_seconds": round(time.process_time() - start, 3),
    }


def run(config: Config) -> Fits:
    """Compute the missing fits, with progress, until all exist or the processor time is used up."""
    path = Path(config.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    fits = read_fits(path, config)
    keys = list(_keys(config))
    spent = sum(fit["cpu_seconds"] for fit in fits.values())
    with path.open("a") as file:
        for index, key in enumerate(keys):
            if key in fits:
                continue
            if spent > 60 * config.cpu_minutes:
                say(f"{config.cpu_minutes:g} minutes of processor time are spent; raise --cpu_minutes to go on")
                break
            fits[key] = _fit(key, config)
            spent += fits[key]["cpu_seconds"]
            file.write(json.dumps(fits[key]) + "\n")
            file.flush()
            if (index + 1) % 10 == 0:
                say(
                    f"  {index + 1}/{len(keys)} fits, {spent:.0f} s of processor time; replicate {key[3]}, n = {key[2]}"
                )
    return {key: fits[key] for key in keys if key in fits}


@dataclass(frozen=True)
class Curve:
    """An error of a gate in a setting, against n.

    Attributes:
        sizes: The values of n.
        medians: Medians over replicates, for each n.
        low, high: 95 % confidence intervals of the medians.
        slope: Slope of log10 median against log10 n.
        interval: 95 % confidence interval of the slope.
    """

    sizes: list[int]
    medians: list[float]
    low: list[float]
    high: list[float]
    slope: float
    interval: tuple[float, float]


def curve(values: Mapping[int, Sequence[float]], draws: int = 2000) -> Curve:
    """Compute the curve of an error from its replicates at each n."""
    import numpy as np

    generator = np.random.default_rng(0)
    sizes = sorted(values)
    medians, drawn = [], []
    for n in sizes:
        # The floor keeps the logarithm finite for a perfect fit.
        replicates = np.maximum(values[n], 1e-12)
        medians.append(np.median(replicates))
        drawn.append(np.median(replicates[generator.integers(0, len(replicates), (draws, len(replicates)))], axis=1))
    centred = np.log10(sizes) - np.mean(np.log10(sizes))
    # The least-squares slope is linear in the logarithms, so one product handles all bootstrap draws.
    contrast = centred / (centred**2).sum()
    slopes = contrast @ np.log10(drawn)
    low, high = np.quantile(drawn, [0.025, 0.975], axis=1)
    left, right = np.quantile(slopes, [0.025, 0.975])
    slope = float(contrast @ np.log10(medians))
    return Curve(sizes, np.array(medians).tolist(), low.tolist(), high.tolist(), slope, (float(left), float(right)))


Curves = dict[tuple[str, int, str], Curve]


def curves(fits: Fits) -> Curves:
    """Compute every curve, by (error, experts, gate)."""
    import numpy as np

    from trainer.studies.gaussian_experts import errors

    values: dict[tuple[str, int, str], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for (gate, experts, n, _), fit in fits.items():
        for name, value in errors(np.array(fit["theta"]), gate).items():
            values[name, experts, gate][n].append(value)
    return {key: curve(of_size) for key, of_size in values.items()}


def predicted(error: str, experts: int, gate: str) -> float:
    """Return the predicted slope (arXiv 2401.13875; the usual rate of maximum likelihood where the paper is silent).

    (beta, tau) -> (c beta, c tau) leaves linear and ReLU gates unchanged, so errors of tau alone cannot converge there.
    """
    if error in ("voronoi", "gate_raw") and gate in ("linear", "relu"):
        return 0.0
    return -0.25 if error == "expert" and experts > 2 else -0.5


def comparisons(fits: Fits, found: Curves) -> list[Comparison]:
    """Return a line per curve."""
    lines = []
    for experts, setting in SETTINGS.items():
        for error, words in ERRORS.items():
            for gate in GATE_NAMES:
                line, peer = found[error, experts, gate], predicted(error, experts, gate)
                replicates = min(Counter(n for g, k, n, _ in fits if (g, k) == (gate, experts)).values())
                note = (
                    f"95 % interval {line.interval[0]:.2f} to {line.interval[1]:.2f}, {replicates} replicates; "
                    f"median {line.medians[0]:.3g} at n = {line.sizes[0]}, {line.medians[-1]:.3g} at {line.sizes[-1]}"
                )
                case = f"{setting}, {words}, {gate}"
                lines.append(Comparison(case, line.slope, peer, 10 ** (peer - line.slope), "slope", note))
    return lines


# Okabe and Ito's palette, readable without colour vision.
_COLORS = {"linear": "#D55E00", "relu": "#E69F00", "sigmoid": "#0072B2", "tanh": "#56B4E9", "gelu": "#009E73"}
_MARKERS = {"linear": "o", "relu": "s", "sigmoid": "^", "tanh": "v", "gelu": "D"}


def _spread(heights: Sequence[float], gap: float) -> list[float]:
    """Move heights apart to at least `gap`, in their order and near their positions."""
    order = sorted(range(len(heights)), key=lambda index: heights[index])
    moved = list(heights)
    # Repeated, because moving one pair apart may bring another together.
    for _ in range(200):
        for lower, upper in itertools.pairwise(order):
            lack = gap - (moved[upper] - moved[lower])
            if lack > 0:
                moved[lower] -= lack / 2
                moved[upper] += lack / 2
    return moved


def draw(found: Curves, path: Path) -> None:
    """Draw medians against n, with a column per error and a row per setting."""
    shown = [error for error in ERRORS if error != "density"]
    figure, grid = pyplot().subplots(
        len(SETTINGS), len(shown), figsize=(17, 7), sharex=True, sharey="col", constrained_layout=True
    )
    panels = {
        axes: {gate: found[error, experts, gate] for gate in GATE_NAMES}
        for row, experts in zip(grid, SETTINGS, strict=True)
        for axes, error in zip(row, shown, strict=True)
    }
    for axes, panel in panels.items():
        _draw_panel(axes, panel)
    for row, (experts, setting) in zip(grid, SETTINGS.items(), strict=True):
        row[0].set_ylabel(f"{setting}: {experts} experts for 2\nmedian error")
    for axes, error in zip(grid[0], shown, strict=True):
        axes.set_title(ERRORS[error])
    figure.supxlabel("observations, n   (dotted: $n^{-1/2}$; bands: 95 % intervals of the medians; numbers: slopes)")
    figure.draw_without_rendering()  # fixes the axes' positions, which the labels need
    for axes, panel in panels.items():
        _label_panel(axes, panel)
    save(figure, path)
    say(f"drawn: {path}")


def _draw_panel(axes: Any, panel: Mapping[str, Curve]) -> None:
    for gate, line in panel.items():
        axes.plot(line.sizes, line.medians, color=_COLORS[gate], marker=_MARKERS[gate], markersize=4.5, linewidth=1.6)
        axes.fill_between(line.sizes, line.low, line.high, color=_COLORS[gate], alpha=0.12, linewidth=0)
    sizes = panel["tanh"].sizes
    lowest = min(line.medians[0] for line in panel.values())
    axes.plot(sizes, [0.5 * lowest * (n / sizes[0]) ** -0.5 for n in sizes], color="gray", linestyle=":", linewidth=1.4)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.grid(alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)


def _label_panel(axes: Any, panel: Mapping[str, Curve]) -> None:
    """Write each gate's name and slope right of its line's end, moved apart where they would overlap."""
    ends = [axes.transData.transform((line.sizes[-1], line.medians[-1])) for line in panel.values()]
    moved = _spread([float(height) for _, height in ends], gap=15.0)
    for (gate, line), (right, _), height in zip(panel.items(), ends, moved, strict=True):
        place = axes.transAxes.inverted().transform((right + 9, height))
        text = f"{gate} {line.slope:.2f}".replace("-", "−")
        axes.text(*place, text, color=_COLORS[gate], transform=axes.transAxes, va="center", fontsize=9)


def main(config: Config) -> None:
    """Fit, print the slopes and draw."""
    import torch

    torch.set_num_threads(1)
    fits = run(config)
    if len({key[:3] for key in fits}) < len({key[:3] for key in _keys(config)}):
        fail("there are too few fits for slopes yet: raise --cpu_minutes, and the same command goes on")
    below = sum(fit["nats_above_truth"] < 0 for fit in fits.values())
    say(f"{len(fits)} fits, of which {below} have a smaller likelihood than the truth: their search failed")
    found = curves(fits)
    report("slopes found (ours) and predicted (peer)", comparisons(fits, found), config.json)
    if config.plot:
        draw(found, Path(config.plot))
