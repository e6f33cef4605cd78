"""Peak host memory and time of converting weights to and from Hugging Face's layout, against the model's size.

The model's parameters are drawn at random while its directory is written, and then imported, exported and read as a
tensor-parallel rank does. Each step runs in a process of its own. Resident memory beyond that of the loaded libraries
counts; the operating system's cache of files does not.
"""

import importlib
import multiprocessing
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from models.config import ModelConfig
from trainer.benchmarks.report import Comparison, report, say
from trainer.cli import from_mapping
from trainer.config import PretrainConfig
from trainer.errors import ConfigError
from trainer.memory import resident_bytes

if TYPE_CHECKING:
    from torch import Tensor

DESCRIPTION = "Peak host memory and time of importing and exporting Hugging Face weights, against the model's size."


@dataclass
class Config:
    """Models to convert.

    Attributes:
        json: Write the comparisons to this file.
        models: Model sections (YAML), with a vocab_size.
        tensor: Tensor-parallel ranks, one of which reads its shard of the directory.
        folder: Directory for three copies of a model in bfloat16, removed afterwards; null for the system's own.
    """

    json: str | None = None
    models: list[str] = field(
        default_factory=lambda: [
            "configs/models/llama-3.2-1b.yaml",
            "configs/models/study-1.3b-gated-delta-net.yaml",
        ]
    )
    tensor: int = 4
    folder: str | None = None

    def __post_init__(self) -> None:
        if self.tensor < 1:
            raise ConfigError(f"tensor is {self.tensor}: it must be at least 1")
        for path in self.models:
            if not Path(path).is_file():
                raise ConfigError(f"models: {path} is not there; name YAML files of model sections")
        if self.folder is not None and not Path(self.folder).is_dir():
            raise ConfigError(f"folder: {self.folder} is not a directory; name one with room for the models")
        if sys.platform != "linux":
            raise ConfigError("peak memory is read from /proc, which Linux alone has; run this benchmark there")


def main(config: Config) -> None:
    """Convert every model and print the table."""
    lines = []
    for path in config.models:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        model = from_mapping(PretrainConfig, {"model": values}).model
        if model.vocab_size is None:
            raise ConfigError(f"models: {path} has no vocab_size; set it")
        folder = Path(tempfile.mkdtemp(prefix="spiketrain_weights_", dir=config.folder))
        try:
            lines += _convert(Path(path).stem, model, folder, config.tensor)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    report("converting weights: peak resident memory, and the model's or shard's bytes", lines, config.json)


def _convert(name: str, model: ModelConfig, folder: Path, ranks: int) -> list[Comparison]:
    steps: dict[str, tuple[Callable[..., tuple[int, int]], tuple[Any, ...]]] = {
        "export": (_draw, (model, folder / "hub")),
        "import": (_import, (folder / "hub", folder / "weights")),
        "export again": (_export, (folder / "weights", folder / "again")),
        f"read by 1 of {ranks} ranks": (_read, (folder / "hub", ranks)),
    }
    lines = []
    for step, (function, arguments) in steps.items():
        say(f"{name}: {step}")
        # A new process per step, because a process's peak memory never falls.
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            size, largest, peak, seconds = pool.apply(_measured, (function, arguments))
        note = f"largest tensor {largest / 1e9:.3f} GB; {seconds:.0f} s"
        lines.append(Comparison(f"{name}: {step}", peak / 1e9, size / 1e9, size / max(peak, 1), "GB", note))
    return lines


def _measured(function: Callable[..., tuple[int, int]], arguments: tuple[Any, ...]) -> tuple[int, int, int, float]:
    """Return the bytes that a step reads or writes, its largest parameter's, its peak rise of memory, and seconds."""
    import torch

    # Before the measurement, as is all that drawing a small matrix loads.
    importlib.import_module("trainer.stored.export")
    torch.empty(1024, 64, dtype=torch.bfloat16).normal_()
    before, start = resident_bytes(), time.monotonic()
    size, largest = function(*arguments)
    return size, largest, resident_bytes(peak=True) - before, time.monotonic() - start


def _sizes(parameters: "dict[str, Tensor]") -> tuple[int, int]:
    sizes = [tensor.nbytes for tensor in parameters.values()]
    return sum(sizes), max(sizes)


def _draw(model: ModelConfig, output: Path) -> tuple[int, int]:
    """Write a Hugging Face directory with drawn parameters, as an export does."""
    import torch

    from models.decoder import shapes
    from models.hub.registry import adapter_for, to_hub
    from models.parameters import cast_parameters
    from trainer.stored import weights
    from trainer.stored.on_disk import kept_tensors

    rows = model.padded_vocab_size(model.vocab_size or 1)
    decoder = shapes(model, rows)
    cast_parameters(decoder, torch.bfloat16)

    def read(tensors: "dict[str, Tensor]") -> None:
        for tensor in tensors.values():
            tensor.normal_(std=0.02)

    weights.write(
        output,
        decoder,
        read,
        tokenizer=None,
        max_file_bytes=5e9,
        report=say,
        config=to_hub(model, rows, "bfloat16", 4096),
        adapter=adapter_for(model),
    )
    return _sizes(kept_tensors(decoder))


def _import(source: Path, output: Path) -> tuple[int, int]:
    from trainer.stored.export import import_weights

    import_weights(source, output, "bf16", 5e9, say)
    return _stored_sizes(output)


def _export(source: Path, output: Path) -> tuple[int, int]:
    from trainer.stored.export import export

    export(source, output, None, 5e9, say, hugging_face=True)
    return _stored_sizes(source)


def _stored_sizes(folder: Path) -> tuple[int, int]:
    import torch

    from models.decoder import build
    from trainer.stored.on_disk import kept_tensors
    from trainer.stored.opening import open_weights

    found = open_weights(folder)
    return _sizes(kept_tensors(build(found.model, found.vocab_size, dtype=torch.bfloat16, device="meta")))


def _read(source: Path, ranks: int) -> tuple[int, int]:
    """Build a tensor-parallel rank's shard and fill it from the directory."""
    import torch

    from models.decoder import build
    from trainer.planning.dry_run import Cut, fake_groups
    from trainer.stored import weights
    from trainer.stored.on_disk import kept_tensors
    from trainer.stored.opening import open_weights

    found = open_weights(source)
    with fake_groups(Cut(ranks, 1, 1, ranks > 1)) as groups:
        shard = build(found.model, found.vocab_size, groups=groups, dtype=torch.bfloat16)
        weights.fill(shard, found)
        return _sizes(kept_tensors(shard))
