"""Bits per byte of a checkpoint on an indexed dataset or on text files.

spiketrain evaluate --checkpoint runs/laptop --data data/stdlib-bpe4096 --split test
spiketrain evaluate --checkpoint runs/laptop --data README.md
spiketrain evaluate --checkpoint runs/laptop --spiking true --raster spikes.png
"""

import glob
import json
import math
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from models.config import SpikingConfig
from trainer.cli import entry
from trainer.data.layout import info_of_prefix, resolve_prefix, tokenizer_sha256
from trainer.data.text import read_utf8
from trainer.errors import ConfigError

if TYPE_CHECKING:
    from trainer.data.dataset import EvaluationStream
    from trainer.spiking_evaluation import Comparison
    from trainer.stored.inference import LoadedModel


@dataclass
class EvaluateConfig:
    """Settings of an evaluation.

    Attributes:
        checkpoint: A run directory (its newest complete checkpoint), one checkpoint, or weights.
        data: A directory made by spiketrain prepare_data, the prefix of a Megatron .bin/.idx pair, or a text file or
            glob of UTF-8 files, one document per file.
        split: Split of a prepared directory.
        seq_len: Tokens in a window; null takes the run's train.seq_len, for weights its default.
        stride: New tokens in each window, the rest being context; null takes seq_len (no overlap).
        batch_size: Windows computed at a time.
        compare_compressors: Also print the bits per byte of gzip -9 and xz -9 on the same text.
        tokenizer: Use this tokenizer instead of the checkpoint's.
        device: cpu or cuda; auto takes CUDA if available.
        json: Write the figures to this file.
        spiking: Compare the model with spikes to the same weights without: loss, sparsity and energy, by layer
            (docs/spiking.md). The figures of the model are then those with spikes.
        neurons: Neurons to evaluate in place of the checkpoint's; a checkpoint without takes those of the report.
        raster: Draw spikes of the first windows into this file, .png or .svg.
    """

    checkpoint: str = "runs/laptop"
    data: str = "data/stdlib-bpe4096"
    split: Literal["train", "validation", "test"] = "validation"
    seq_len: int | None = None
    stride: int | None = None
    batch_size: int = 8
    compare_compressors: bool = True
    tokenizer: str | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    json: str | None = None
    spiking: bool = False
    neurons: SpikingConfig = field(default_factory=SpikingConfig)
    raster: str | None = None

    def __post_init__(self) -> None:
        if not Path(self.checkpoint).is_dir():
            raise ConfigError(f"checkpoint: {self.checkpoint} does not exist; give a run directory")
        for name in ("seq_len", "stride", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}: it must be at least 1")
        if self.json is not None and not Path(self.json).absolute().parent.is_dir():
            raise ConfigError(f"json: the directory of {self.json} does not exist; make it first")
        self._check_spiking()
        if not is_indexed(self.data):
            files = text_files(self.data)
            if not files:
                raise ConfigError(
                    f"data: {self.data} is neither prepared data, nor a .bin/.idx prefix, nor an existing file"
                )
            if not any(path.stat().st_size for path in files):
                raise ConfigError(f"data: {self.data} holds no text; name files that are not empty")

    def _check_spiking(self) -> None:
        if self.raster is not None and Path(self.raster).suffix not in (".png", ".svg"):
            raise ConfigError(f"raster: {self.raster} must end in .png or .svg")
        if not self.spiking and (self.raster is not None or self.neurons != SpikingConfig()):
            raise ConfigError("raster and neurons need an evaluation with spikes; add --spiking true")


def is_indexed(path: str) -> bool:
    """Whether `path` is prepared data or the prefix of a .bin/.idx pair; otherwise it names text files."""
    return Path(path).is_dir() or Path(f"{path.removesuffix('.bin').removesuffix('.idx')}.idx").is_file()


def text_files(data: str) -> list[Path]:
    """The file named by `data`, or the files that match it as a glob."""
    if Path(data).is_file():
        return [Path(data)]
    return [path for name in sorted(glob.glob(data, recursive=True)) if (path := Path(name)).is_file()]


def read_texts(data: str) -> list[str]:
    """Read text files as documents; empty files are skipped, as in preparation."""
    files = text_files(data)
    texts = [text for path in files if (text := read_utf8("data", path))]
    if len(texts) < len(files):
        print(f"{len(files) - len(texts)} of {len(files)} files are empty and left out", file=sys.stderr)
    return texts


def check_tokenizer(config: EvaluateConfig, loaded: "LoadedModel") -> None:
    """Check the tokenizer against the one that made the data: with another one, the same ids mean different text.

    Raises:
        ConfigError: they differ.
    """
    own = loaded.tokenizer_path
    used = own if config.tokenizer is None else Path(config.tokenizer)
    assert used is not None, "the model has a tokenizer"
    sha256 = tokenizer_sha256(used)
    if config.tokenizer is not None:
        other = own is not None and tokenizer_sha256(own) != sha256
        note = ", which is another: the figures mean little" if other else ""
        print(f"tokenizer: {used}, in place of the checkpoint's{note}", file=sys.stderr)
    info = (info_of_prefix(resolve_prefix(config.data, config.split)) or {}) if is_indexed(config.data) else {}
    if info.get("tokenizer_sha256", sha256) != sha256:
        raise ConfigError(
            f"data: {config.data} was made with another tokenizer than {used}; prepare it with that one "
            f"(--tokenizer.path {used}), or give the text itself"
        )


def open_stream(
    config: EvaluateConfig, loaded: "LoadedModel", texts: list[str], limit: int | None = None
) -> "EvaluationStream":
    """Open the windows to evaluate, from prepared data or from `texts`: all, or `limit` evenly spaced ones.

    Raises:
        ConfigError: the data has token ids that the model lacks.
    """
    from trainer.data.dataset import EvaluationStream
    from trainer.data.indexed import TokenArray

    tokenizer = loaded.require_tokenizer()
    source: str | TokenArray = config.data
    if texts:
        documents = [[*tokenizer.encode(text), tokenizer.eod_id] for text in texts]
        source = TokenArray.from_documents(documents, config.data)
    stream = EvaluationStream(
        source,
        config.seq_len or loaded.settings["train"]["seq_len"],
        micro_batch_size=config.batch_size,
        split=config.split,
        eod_id=tokenizer.eod_id,
        stride=config.stride,
        document_mask=loaded.settings["data"]["document_mask"],
        limit=limit,
    )
    tokens, known = stream.file.tokens, min(tokenizer.vocab_size, loaded.model.vocab_size)
    smallest, largest = int(tokens.min()), int(tokens.max())
    if smallest < 0 or largest >= known:
        raise ConfigError(
            f"data: {config.data} has the token {smallest if smallest < 0 else largest}, and the tokenizer and the "
            f"model know 0 to {known - 1}; it was made with another tokenizer, or is damaged: prepare it again"
        )
    return stream


def chosen_neurons(config: EvaluateConfig) -> SpikingConfig:
    """The neurons of the model to evaluate.

    Raises:
        ConfigError: the checkpoint has no usable ones, or lacks what these need.
    """
    from trainer.spiking_evaluation import choose
    from trainer.stored.inference import open_checkpoint

    stored = open_checkpoint(config.checkpoint)
    return choose(stored.model.spiking, stored.last_step, config.neurons)


def open_comparison(config: EvaluateConfig, loaded: "LoadedModel") -> "Comparison":
    """Compare a model with spikes, which this begins to count, to the same weights without."""
    from trainer.spiking_evaluation import Comparison
    from trainer.stored.inference import load_model

    device = loaded.model.head_weight.device
    return Comparison(loaded.model, load_model(loaded.path, device, config.tokenizer, SpikingConfig()).model)


def finite(values: Any) -> Any:
    """Values as JSON has them: without NaN and infinities, which become null."""
    if isinstance(values, dict):
        return {name: finite(value) for name, value in values.items()}
    return None if isinstance(values, float) and not math.isfinite(values) else values


def main(config: EvaluateConfig) -> None:
    """Load the model, run over every window once with a progress bar, and print bits per byte."""
    # Read the texts before importing torch and loading the model: a file may be invalid.
    texts = [] if is_indexed(config.data) else read_texts(config.data)
    import torch
    from rich.progress import track

    from trainer.data.compressors import bits_per_byte_of_compressors
    from trainer.device import choose_device, keep_freed_memory
    from trainer.evaluation import EvaluationSums
    from trainer.logs import CONSOLE
    from trainer.stored.inference import load_model

    keep_freed_memory()
    device = choose_device(config.device)
    neurons = chosen_neurons(config) if config.spiking else None
    loaded = load_model(config.checkpoint, device, config.tokenizer, neurons)
    tokenizer = loaded.require_tokenizer()
    check_tokenizer(config, loaded)
    stream = open_stream(config, loaded, texts)
    comparison = open_comparison(config, loaded) if config.spiking else None
    token_bytes, sums, start = tokenizer.token_bytes(), EvaluationSums(), time.perf_counter()
    with torch.no_grad():
        for batch in track(stream, total=len(stream), description="evaluating", console=CONSOLE, transient=True):
            moved = batch.to(device)
            loss, _ = loaded.model(moved.tokens, moved.positions, moved.documents, moved.labels, moved.loss_mask)
            sums += EvaluationSums.of([batch], float(loss), token_bytes)
            if comparison is not None:
                comparison.add(moved)
    own_bytes = sum(len(text.encode()) for text in texts)
    # A lossy tokenizer would make the text look shorter, so bits per byte are relative to the files' own size.
    if texts and own_bytes != sums.text_bytes:
        print(
            f"the tokenizer does not keep every byte: its tokens stand for {sums.text_bytes:.0f} of {own_bytes}; bits "
            "per byte are of the files' own",
            file=sys.stderr,
        )
        sums = replace(sums, text_bytes=float(own_bytes))
    if sums.text_bytes == 0:
        raise ConfigError(f"data: the tokens of {config.data} stand for no text; use the tokenizer that made them")
    result: dict[str, Any] = {
        "checkpoint": str(loaded.path),
        "data": config.data,
        "tokens": int(sums.tokens),
        "bytes": int(sums.text_bytes),
        "loss": sums.loss,
        "bits_per_byte": sums.bits_per_byte,
        "tokens_per_second": sums.tokens / (time.perf_counter() - start),
    }
    if config.compare_compressors:
        text = "".join(texts) or tokenizer.decode(stream.file.tokens.tolist())
        result |= bits_per_byte_of_compressors(text.encode())
    for name, value in result.items():
        print(f"{name:>18}: {value:.4f}" if isinstance(value, float) else f"{name:>18}: {value}")
    if comparison is not None:
        result["spiking"] = comparison.result(sums)
        comparison.print_table(result["spiking"])
        if config.raster:
            comparison.draw(Path(config.raster))
    if config.json:
        Path(config.json).write_text(json.dumps(finite(result), indent=1) + "\n")


if __name__ == "__main__":
    entry(main, EvaluateConfig, "Bits per byte of a checkpoint on an indexed dataset or on text files.")
