"""A model on disk that a conversion reads tensor by tensor: a checkpoint, weights, a Hugging Face directory or a file.

Imports no engine.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from models.config import ModelConfig
from models.decoder import shapes
from trainer.errors import ConfigError
from trainer.stored.checkpoint import read_progress
from trainer.stored.inference import StoredModel, open_checkpoint
from trainer.stored.on_disk import CONFIG_NAME
from trainer.stored.opening import open_weights

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Source(NamedTuple):
    """A model on disk: the common interface of a checkpoint and of what `open_weights` opens.

    Attributes:
        path: The checkpoint, directory or file.
        model: Configuration of the model.
        vocab_size: Rows of its embedding.
        tokenizer: Directory that may hold its tokenizer.
        read: Fills tensors by their names in the model.
        dtype: Dtype of its parameters.
        max_positions: Length of the longest sequence in training, in tokens; None if nothing tells.
        masks_documents: Whether training masked attention between documents.
    """

    path: Path
    model: ModelConfig
    vocab_size: int
    tokenizer: Path | None
    read: Callable[[dict[str, Tensor]], None]
    dtype: torch.dtype = torch.float32
    max_positions: int | None = None
    masks_documents: bool = False


def open_source(path: Path, precision: Literal["fp32", "bf16"] | None) -> Source:
    """Open weights, a Hugging Face directory, a GGUF file, a run directory's newest checkpoint, or a checkpoint.

    Args:
        path: The directory or file.
        precision: The dtype that its tensors will be written in; None for its own. fp32 from a bf16 run takes the
            optimizer's float32 main parameters.

    Raises:
        ConfigError: there is no usable model.
    """
    if path.suffix != ".gguf" and not (path / CONFIG_NAME).is_file():
        return _of_checkpoint(open_checkpoint(path), precision)
    found = open_weights(path, "source")
    found.require(shapes(found.model, found.vocab_size))
    dtype = getattr(torch, found.dtype)
    return Source(path, found.model, found.vocab_size, found.tokenizer, found.read, dtype, found.max_positions, False)


def _of_checkpoint(stored: StoredModel, precision: Literal["fp32", "bf16"] | None) -> Source:
    main = precision is not None and (stored.dtype, DTYPES[precision]) == (torch.bfloat16, torch.float32)
    return Source(
        stored.path,
        stored.model,
        stored.vocab_size,
        stored.tokenizer,
        lambda tensors: stored.read(tensors, main),
        stored.dtype,
        stored.settings["train"]["seq_len"],
        stored.settings["data"]["document_mask"],
    )


def require_spawned(source: Source) -> None:
    """Check that a checkpoint's experts exist. Before spawning, it holds their common ancestor, not the model.

    Raises:
        ConfigError: they are to be spawned later.
    """
    moe, is_checkpoint = source.model.moe, (source.path / "state").is_dir()
    if is_checkpoint and moe.num_experts and not moe.is_spawned(read_progress(source.path).step - 1):
        raise ConfigError(
            f"checkpoint: {source.path} has experts that are to be spawned at step {moe.spawn_step}; train on past it"
        )
