"""Draw the training curves of one or more runs from their metrics.jsonl.

spiketrain report --runs '[runs/laptop]' --output docs/laptop.png
spiketrain report --runs '[runs/grpo]' --output docs/posttraining.png
"""

from dataclasses import dataclass, field
from pathlib import Path

from trainer.cli import entry
from trainer.curves import read_metrics, smooth
from trainer.errors import ConfigError
from trainer.figures import pyplot, save
from trainer.posttraining.curves import draw, is_of_rewards


@dataclass
class ReportConfig:
    """Settings of the figure.

    Attributes:
        runs: Run directories.
        output: Path of the figure, .png or .svg.
        baselines: Named horizontal lines in bits per byte, such as '{gzip -9: 1.67}'.
    """

    runs: list[str] = field(default_factory=lambda: ["runs/laptop"])
    output: str = "curve.png"
    baselines: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for run in self.runs:
            if not (Path(run) / "metrics.jsonl").is_file():
                raise ConfigError(f"runs: {run}/metrics.jsonl does not exist; give run directories")
        if Path(self.output).suffix not in (".png", ".svg"):
            raise ConfigError(f"output: {self.output} must end in .png or .svg")


def main(config: ReportConfig) -> None:
    """Plot training loss and validation bits per byte over tokens; of runs that learn from rewards, these and pass@k.

    Raises:
        ConfigError: the runs are of both kinds, or matplotlib is not installed.
    """
    of_rewards = {is_of_rewards(run) for run in config.runs}
    if len(of_rewards) > 1:
        raise ConfigError("runs: some learn from rewards and some do not; draw them apart")
    if of_rewards == {True}:
        draw(config.runs, Path(config.output))
        print(config.output)
        return
    figure, (left, right) = pyplot().subplots(1, 2, figsize=(10, 3.6), constrained_layout=True)
    for run in config.runs:
        steps, evaluations = read_metrics(run)
        tokens_at = {line["step"]: line["tokens"] / 1e6 for line in steps}
        tokens = list(tokens_at.values())
        losses = [line["loss"] for line in steps]
        (faint,) = left.plot(tokens, losses, linewidth=0.5, alpha=0.3)
        left.plot(tokens, smooth(losses), color=faint.get_color(), label=Path(run).name)
        points = [
            (tokens_at[line["step"]], line["bits_per_byte"])
            for line in evaluations
            if line["step"] in tokens_at and line.get("bits_per_byte") is not None
        ]
        if points:
            right.plot(*zip(*points, strict=True), marker="o", markersize=3, label=Path(run).name)
    for name, value in config.baselines.items():
        right.axhline(value, linestyle="--", linewidth=0.8, color="gray")
        right.annotate(
            f"{name} {value:.2f}", (0.99, value), xycoords=("axes fraction", "data"), ha="right", va="bottom"
        )
    for axes, label in ((left, "training loss, nats per token"), (right, "validation, bits per byte")):
        axes.set_xlabel("tokens, millions")
        axes.set_ylabel(label)
        axes.grid(alpha=0.2)
        if axes.lines:
            axes.legend(frameon=False)
    save(figure, Path(config.output), dpi=130)
    print(config.output)


if __name__ == "__main__":
    entry(main, ReportConfig, "Draw the training curve of one or more runs.")
