"""A model on disk that a conversion reads tensor by tensor: a checkpoint or weights. Imports no engine."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from models.config import ModelConfig
from models.decoder import shapes
from trainer.stored import weights
from trainer.stored.export import DTYPES
from trainer.stored.inference import open_checkpoint


class Source(NamedTuple):
    """A model on disk: the common interface of a checkpoint and a weights directory.

    Attributes:
        path: The checkpoint or directory.
        model: Configuration of the model.
        vocab_size: Rows of its embedding.
        tokenizer: Directory that may hold its tokenizer.
        read: Fills tensors by their names in the model.
    """

    path: Path
    model: ModelConfig
    vocab_size: int
    tokenizer: Path | None
    read: Callable[[dict[str, Tensor]], None]


def open_source(path: Path, precision: Literal["fp32", "bf16"]) -> Source:
    """Open weights, a run directory (its newest whole checkpoint) or one of its checkpoints.

    Args:
        path: The directory.
        precision: The dtype that its tensors will be written in. fp32 from a bf16 run takes the optimizer's float32
            main parameters.

    Raises:
        ConfigError: there is no usable model.
    """
    if (path / weights.CONFIG_NAME).is_file():
        opened = weights.open_weights(path)
        weights.require_tensors(path, opened.tensors, shapes(opened.model, opened.vocab_size))
        return Source(
            path,
            opened.model,
            opened.vocab_size,
            path,
            lambda tensors: weights.read_tensors(tensors, opened.tensors),
        )
    stored = open_checkpoint(path)
    main = (stored.dtype, DTYPES[precision]) == (torch.bfloat16, torch.float32)
    return Source(
        stored.path, stored.model, stored.vocab_size, stored.tokenizer, lambda tensors: stored.read(tensors, main)
    )
