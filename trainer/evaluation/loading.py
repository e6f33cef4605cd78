"""Opens a checkpoint for tasks."""

import sys
from typing import TYPE_CHECKING

import torch

from trainer.evaluation.scoring import Scorer
from trainer.stored.inference import LoadedModel, load_model

if TYPE_CHECKING:
    from trainer.evaluation.config import EvaluateConfig


def load_scorer(config: "EvaluateConfig", device: torch.device) -> tuple[LoadedModel, Scorer]:
    """Load the model with its tokenizer, if it has one, and what scores sequences with it."""
    loaded = load_model(config.checkpoint, device, config.tokenizer)
    if config.tokenizer is not None:
        print(f"tokenizer: {config.tokenizer}, in place of the checkpoint's", file=sys.stderr)
    tokenizer, data = loaded.tokenizer, loaded.settings["data"]
    eod_id = data["eod_id"] if tokenizer is None else tokenizer.eod_id
    return loaded, Scorer(
        loaded.model,
        loaded.model.vocab_size if tokenizer is None else tokenizer.vocab_size,
        eod_id if data["document_mask"] else None,
        config.batch_size * (config.seq_len or loaded.settings["train"]["seq_len"]),
    )
