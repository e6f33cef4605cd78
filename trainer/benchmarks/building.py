"""Peak host memory of a rank that builds and initialises its shard of a model, relative to the shard's size.

The rank belongs to the largest pipeline stage of a recipe's layout. Its process groups are fake, because building a
shard needs no communication. Resident memory is compared, so pages that were never written do not count.
"""

import multiprocessing
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from trainer.benchmarks.report import Comparison, report, say
from trainer.cli import make_parser, parse
from trainer.config import ParallelConfig, PretrainConfig
from trainer.errors import ConfigError
from trainer.memory import resident_bytes

DESCRIPTION = "Peak host memory while a rank's shard of a model is built and drawn, against the shard."


@dataclass
class Config:
    """Recipes and layouts to measure.

    Attributes:
        json: Write the comparisons to this file.
        recipes: Pretraining recipes (YAML).
        tensor: Tensor-parallel ranks. 0 takes the recipe's.
        expert: Expert-parallel ranks. 0 takes the recipe's.
        pipeline: Pipeline stages. 0 takes the recipe's.
    """

    json: str | None = None
    recipes: list[str] = field(
        default_factory=lambda: [
            "configs/pretrain/spikingbrain-7b-128k.yaml",
            "configs/pretrain/spikingbrain-76b.yaml",
        ]
    )
    tensor: int = 0
    expert: int = 0
    pipeline: int = 0

    def __post_init__(self) -> None:
        for name in ("tensor", "expert", "pipeline"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}: it must be positive, or 0 for the recipe's")
        for recipe in self.recipes:
            if not Path(recipe).is_file():
                raise ConfigError(f"recipes: {recipe} is not there; name YAML files of pre-training runs")
        if sys.platform != "linux":
            raise ConfigError("peak memory is read from /proc, which Linux alone has; run this benchmark there")

    def layout(self, recipe: PretrainConfig) -> ParallelConfig:
        """Return the recipe's layout with the configured changes."""
        asked = {name: value for name in ("tensor", "expert", "pipeline") if (value := getattr(self, name))}
        # Expert parallelism with tensor parallelism requires sequence parallelism: each rank routes its own tokens.
        return replace(recipe.parallel, **asked, sequence=asked.get("tensor", recipe.parallel.tensor) > 1)


def main(config: Config) -> None:
    """Build every recipe's largest rank and print the table."""
    lines = []
    for path in config.recipes:
        recipe, _ = parse(PretrainConfig, make_parser(PretrainConfig, ""), [f"--config={path}"])
        say(f"{path}: building its largest rank")
        # A new process per recipe, because a process's peak memory never falls.
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            layers, shard, peak, seconds = pool.apply(_build, (recipe, config.layout(recipe)))
        lines.append(
            Comparison(
                Path(path).stem,
                peak / 1e9,
                shard / 1e9,
                shard / peak,
                "GB",
                f"layers {layers.start} to {layers.stop - 1}; peak is {peak / shard:.3f} of the shard; {seconds:.0f} s",
            )
        )
    report("building the largest rank's shard: peak resident memory, and the shard's bytes", lines, config.json)


def _build(config: PretrainConfig, parallel: ParallelConfig) -> tuple[range, int, int, float]:
    """Return the largest stage's layers, the bytes of a rank's shard, the peak rise of memory, and seconds."""
    import torch

    from models.decoder import build, initialize
    from models.parameters import declared
    from trainer.planning.dry_run import Cut, fake_groups

    model = config.model
    vocab_size = model.padded_vocab_size(model.vocab_size or 1)
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    with fake_groups(Cut(parallel.tensor, 1, parallel.expert, parallel.sequence)) as groups:

        def shard_bytes(layers: range) -> int:
            shard = build(model, vocab_size, layers, groups=groups, dtype=dtype, device="meta")
            return sum(row.tensor.nbytes for row in declared(shard).values())

        layers = max(parallel.stage_layers(model.num_layers), key=shard_bytes)
        size = shard_bytes(layers)
        # Drawing a small matrix first makes the libraries allocate their own memory, which must not count.
        torch.empty(1024, 64).normal_()
        before, start = resident_bytes(), time.monotonic()
        initialize(build(model, vocab_size, layers, groups=groups, dtype=dtype), config.train.seed)
        return layers, size, resident_bytes(peak=True) - before, time.monotonic() - start
