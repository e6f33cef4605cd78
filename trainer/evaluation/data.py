"""Bits per byte of a checkpoint on an indexed dataset or on text files. Imports torch only when it computes."""

import glob
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.config import SpikingConfig
from trainer.data.layout import info_of_prefix, resolve_prefix, tokenizer_sha256
from trainer.data.text import read_utf8
from trainer.errors import ConfigError

if TYPE_CHECKING:
    from trainer.data.dataset import EvaluationStream
    from trainer.evaluation.config import EvaluateConfig
    from trainer.evaluation.sums import EvaluationSums
    from trainer.spiking_evaluation import Comparison
    from trainer.stored.inference import LoadedModel


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


def check_tokenizer(config: "EvaluateConfig", loaded: "LoadedModel") -> None:
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
    config: "EvaluateConfig", loaded: "LoadedModel", texts: list[str], limit: int | None = None
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


def chosen_neurons(config: "EvaluateConfig") -> SpikingConfig:
    """The neurons of the model to evaluate.

    Raises:
        ConfigError: the checkpoint has no usable ones, or lacks what these need.
    """
    from trainer.spiking_evaluation import choose
    from trainer.stored import opening
    from trainer.stored.inference import open_checkpoint

    if opening.are_at(config.checkpoint):
        # Weights are of a model whose schedules have ended.
        return choose(opening.open_weights(config.checkpoint).model.spiking, sys.maxsize, config.neurons)
    stored = open_checkpoint(config.checkpoint)
    return choose(stored.model.spiking, stored.last_step, config.neurons)


def open_comparison(config: "EvaluateConfig", loaded: "LoadedModel") -> "Comparison":
    """Compare a model with spikes, which this begins to count, to the same weights without."""
    from trainer.spiking_evaluation import Comparison
    from trainer.stored.inference import load_model

    device = loaded.model.head_weight.device
    return Comparison(loaded.model, load_model(loaded.path, device, config.tokenizer, SpikingConfig()).model)


def evaluate_data(config: "EvaluateConfig") -> dict[str, Any]:
    """Run over every window once with a progress bar, print the figures, and return them as plain values."""
    # Read the texts before importing torch and loading the model: a file may be invalid.
    texts = [] if is_indexed(config.data) else read_texts(config.data)
    import torch
    from rich.progress import track

    from trainer.data.compressors import bits_per_byte_of_compressors
    from trainer.device import choose_device, keep_freed_memory
    from trainer.evaluation.positions import PositionSums, print_table
    from trainer.evaluation.sums import EvaluationSums
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
    positions = PositionSums(token_bytes, tokenizer.eod_id) if config.by_position else None
    with torch.no_grad():
        for batch in track(stream, total=len(stream), description="evaluating", console=CONSOLE, transient=True):
            moved = batch.to(device)
            loss, losses = loaded.model(moved.tokens, moved.positions, moved.documents, moved.labels, moved.loss_mask)
            sums += EvaluationSums.of([batch], float(loss), token_bytes)
            if positions is not None:
                positions.add(batch, losses.cpu().numpy())
            if comparison is not None:
                comparison.add(moved)
    sums = _of_whole_text(config, texts, sums)
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
    if positions is not None:
        result["by_position"] = positions.rows()
        print_table(result["by_position"])
    if comparison is not None:
        result["spiking"] = comparison.result(sums)
        comparison.print_table(result["spiking"])
        if config.raster:
            comparison.draw(Path(config.raster))
    return result


def _of_whole_text(config: "EvaluateConfig", texts: list[str], sums: "EvaluationSums") -> "EvaluationSums":
    """The sums with the bytes of the texts themselves: a lossy tokenizer would make the text look shorter.

    Raises:
        ConfigError: the tokens stand for no text.
    """
    own_bytes = sum(len(text.encode()) for text in texts)
    if texts and own_bytes != sums.text_bytes:
        print(
            f"the tokenizer does not keep every byte: its tokens stand for {sums.text_bytes:.0f} of {own_bytes}; bits "
            "per byte are of the files' own",
            file=sys.stderr,
        )
        sums = replace(sums, text_bytes=float(own_bytes))
    if sums.text_bytes == 0:
        raise ConfigError(f"data: the tokens of {config.data} stand for no text; use the tokenizer that made them")
    return sums
