"""Bits per byte of a checkpoint on an indexed dataset or on text files.

python launch/evaluate.py --checkpoint runs/laptop --data data/stdlib-bpe4096 --split test
python launch/evaluate.py --checkpoint runs/laptop --data README.md
"""

import glob
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from trainer.cli import ConfigError, entry

if TYPE_CHECKING:
    from trainer.data.dataset import EvaluationStream
    from trainer.inference import LoadedModel


@dataclass
class EvaluateConfig:
    """What to evaluate.

    Attributes:
        checkpoint: A run directory (its newest whole checkpoint), or one checkpoint.
        data: A directory made by launch/prepare_data.py, the prefix of a Megatron .bin/.idx pair, or a text file or
            glob, one document a file.
        split: Which split of a prepared directory.
        seq_len: Tokens in a window; null takes what the run trained with.
        stride: New tokens in each window, the rest being context; null takes seq_len (no overlap).
        batch_size: Windows computed at a time.
        compare_compressors: Also print what gzip -9 and xz -9 make of the same text.
        tokenizer: Use this tokenizer in place of the checkpoint's.
        device: cpu or cuda; auto takes CUDA where there is one.
        json: Write the figures to this file.
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

    def __post_init__(self) -> None:
        if not Path(self.checkpoint).is_dir():
            raise ConfigError(f"checkpoint: {self.checkpoint} does not exist; give a run directory")
        for name in ("seq_len", "stride", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}: it must be at least 1")
        if not is_indexed(self.data) and not glob.glob(self.data, recursive=True):
            raise ConfigError(
                f"data: {self.data} is neither prepared data, nor a .bin/.idx prefix, nor an existing file"
            )


def is_indexed(path: str) -> bool:
    """Whether `path` is prepared data or the prefix of a .bin/.idx pair; else it names text files."""
    return Path(path).is_dir() or Path(f"{path.removesuffix('.bin').removesuffix('.idx')}.idx").is_file()


def open_stream(config: EvaluateConfig, loaded: "LoadedModel") -> "EvaluationStream":
    """The windows to evaluate."""
    from trainer.data.dataset import EvaluationStream
    from trainer.data.indexed import TokenArray

    tokenizer = loaded.require_tokenizer()
    source: str | TokenArray = config.data
    if not is_indexed(config.data):
        paths = [Path(name) for name in sorted(glob.glob(config.data, recursive=True)) if Path(name).is_file()]
        documents = [[*tokenizer.encode(path.read_text(encoding="utf-8")), tokenizer.eod_id] for path in paths]
        source = TokenArray.from_documents(documents, config.data)
    return EvaluationStream(
        source,
        config.seq_len or loaded.settings["train"]["seq_len"],
        micro_batch_size=config.batch_size,
        split=config.split,
        eod_id=tokenizer.eod_id,
        stride=config.stride,
        document_mask=loaded.settings["data"]["document_mask"],
    )


def main(config: EvaluateConfig) -> None:
    """Load, run over every window once with a progress bar, print bits per byte."""
    import torch
    from rich.progress import track

    from trainer.data.compressors import bits_per_byte_of_compressors
    from trainer.device import choose_device, keep_freed_memory
    from trainer.inference import load_model
    from trainer.logs import CONSOLE

    keep_freed_memory()
    device = choose_device(config.device)
    loaded = load_model(config.checkpoint, device, config.tokenizer)
    tokenizer = loaded.require_tokenizer()
    stream = open_stream(config, loaded)
    token_bytes = torch.from_numpy(tokenizer.token_bytes())
    nll_sum, tokens, text_bytes, start = 0.0, 0.0, 0.0, time.perf_counter()
    with torch.no_grad():
        for batch in track(stream, total=len(stream), description="evaluating", console=CONSOLE, transient=True):
            text_bytes += float((token_bytes[batch.labels] * batch.loss_mask).sum())
            tokens += float(batch.loss_mask.sum())
            moved = batch.to(device)
            loss, _ = loaded.model(moved.tokens, moved.positions, moved.cu_seqlens, moved.labels, moved.loss_mask)
            nll_sum += float(loss)
    result = {
        "checkpoint": str(loaded.path),
        "data": config.data,
        "tokens": int(tokens),
        "bytes": int(text_bytes),
        "loss": nll_sum / max(tokens, 1.0),
        "bits_per_byte": nll_sum / math.log(2) / max(text_bytes, 1.0),
        "tokens_per_second": tokens / (time.perf_counter() - start),
    }
    if config.compare_compressors:
        text = tokenizer.decode(stream.file.tokens.tolist()).encode()
        result |= bits_per_byte_of_compressors(text)
    for name, value in result.items():
        print(f"{name:>18}: {value:.4f}" if isinstance(value, float) else f"{name:>18}: {value}")
    if config.json:
        Path(config.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    entry(main, EvaluateConfig, "Bits per byte of a checkpoint on an indexed dataset or on text files.")
