"""Conversion between checkpoints, weights and Hugging Face layouts. Imports neither megatron nor deepspeed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

from models.decoder import shapes
from models.hub.registry import adapter_for
from models.parameters import cast_parameters
from trainer.config import TrainConfig
from trainer.errors import ConfigError
from trainer.stored import weights
from trainer.stored.hub_files import hub_files, imported_files
from trainer.stored.on_disk import CONFIG_NAME, Weights, listed
from trainer.stored.opening import open_weights
from trainer.stored.source import DTYPES, Source, open_source, require_spawned


def export(
    checkpoint: str | Path,
    output: Path,
    precision: Literal["fp32", "bf16"] | None,
    max_file_bytes: float,
    report: Callable[[str], None],
    hugging_face: bool = False,
) -> Path:
    """Write the parameters of a checkpoint or of weights as a weights directory; returns the path that was read.

    Args:
        checkpoint: A run directory, one of its checkpoints, or weights.
        output: Output directory: empty or absent.
        precision: Dtype of the weights; None keeps the run's. fp32 from a bf16 run takes the optimizer's float32 main
            parameters. Decays are always float32 (models.parameters.Placement.float32).
        max_file_bytes: Size above which several files are written.
        report: Called with a line per file.
        hugging_face: Write names and config.json of the Hugging Face architecture that computes the model.

    Raises:
        ConfigError: there is no usable checkpoint, or no such architecture.
    """
    opened = open_source(Path(checkpoint), precision)
    require_spawned(opened)
    dtype = opened.dtype if precision is None else DTYPES[precision]
    model = shapes(opened.model, opened.vocab_size)
    cast_parameters(model, dtype)
    layout = _hub_layout(opened, dtype, report) if hugging_face else {"max_positions": opened.max_positions}
    weights.write(
        output,
        model,
        opened.read,
        tokenizer=opened.tokenizer,
        max_file_bytes=max_file_bytes,
        report=report,
        **layout,
    )
    return opened.path


def _hub_layout(opened: Source, dtype: torch.dtype, report: Callable[[str], None]) -> dict[str, Any]:
    """Arguments of `weights.write` for a Hugging Face layout. Reports where transformers will behave differently."""
    name, positions = str(dtype).removeprefix("torch."), opened.max_positions or TrainConfig().seq_len
    try:
        adapter = adapter_for(opened.model)
        config = adapter.to_hub(opened.model, opened.vocab_size, name, positions, None)
    except ValueError as error:
        raise ConfigError(f"{opened.path}: {error}; leave --layout hf out") from error
    beside = hub_files(opened.tokenizer, adapter.model_type, opened.vocab_size)
    for note in beside.notes:
        report(note)
    if opened.masks_documents:
        report("training masked attention between documents; give transformers one document per row, or a block mask")
    return {"config": config | beside.ids, "adapter": adapter, "files": beside.files}


def import_weights(
    source: Path,
    output: Path,
    precision: Literal["fp32", "bf16"],
    max_file_bytes: float,
    report: Callable[[str], None],
) -> None:
    """Convert the directory of a Hugging Face model, or a GGUF file, into weights.

    Args:
        source: Directory with config.json and safetensors, or a file; its tokenizer is copied.
        output: Output directory: empty or absent.
        precision: Dtype of the weights.
        max_file_bytes: Size above which several files are written.
        report: Called with a line per file.

    Raises:
        ConfigError: the model is of another kind, or tensors are missing, unexpected, of the wrong shape, or stored
            twice with different values.
    """
    opened = open_weights(source)
    if opened.adapter is None:
        raise ConfigError(f"{source} holds weights of this program already; give them to --init")
    model = shapes(opened.model, opened.vocab_size)
    opened.require(model)
    cast_parameters(model, DTYPES[precision])
    for line in (*opened.conversions(model), *_what_is_left(opened)):
        report(line)
    weights.write(
        output,
        model,
        opened.read,
        tokenizer=opened.tokenizer,
        max_file_bytes=max_file_bytes,
        report=report,
        files=imported_files(opened.tokenizer or source, opened.config),
        max_positions=opened.max_positions,
    )


def _what_is_left(opened: Weights) -> list[str]:
    """Lines that describe everything in the source that the import ignores."""
    assert opened.adapter is not None, "only other programs' models are imported"
    lines = []
    if opened.spare:
        lines.append(f"left out, for they are redundant: {listed(opened.spare)}")
    if keys := opened.adapter.left_out(opened.config):
        lines.append(f"{CONFIG_NAME}: left out, for models here have nothing of the kind: {', '.join(keys)}")
    read = {tensor.file for tensor in (*opened.tensors.values(), *opened.spare.values())}
    if unread := [path.name for path in sorted(opened.path.glob("*.safetensors")) if path not in read]:
        lines.append(f"not read: {', '.join(unread)}")
    if opened.tokenizer is None:
        lines.append(
            f"{opened.path} has no tokenizer.json or tokenizer.model: name a tokenizer where runs start from this"
        )
    return lines
