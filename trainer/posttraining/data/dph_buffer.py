"""Buffers of DPH-RL (arXiv 2509.07430): answers of the initial policy, with its log-probabilities, out of a .pt file.

DPH-RL keeps them as a pickle of verl's DataProto. Opening such a pickle runs whatever program it contains, so only
files of plain tensors are converted. In DPH-RL's own environment, `torch.save(dict(data.batch), "plain.pt")` writes
one.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainer.errors import ConfigError
from trainer.posttraining.data.sequences import TokenSequence, save_sequences

REFERENCE = "ref_log_probs"
"""Name of the extra values with the log-probabilities under the policy that wrote an answer, 0 for the prompt."""
_NEEDED = ("input_ids", "attention_mask", "responses", "old_log_probs")


def convert_buffer(source: Path, output: Path) -> int:
    """Convert a buffer to the safetensors file that `sequences.load_sequences` reads; returns the number of answers.

    Args:
        source: A .pt file of a dictionary with `input_ids` and `attention_mask`, integers `[N, P + R]`, `responses`,
            integers `[N, R]`, and `old_log_probs`, floats `[N, R]`, or of a dictionary with that one as `batch`.
            Padding is left of prompts and right of answers, and has attention 0.
        output: The file to write.

    Raises:
        ConfigError: the file holds anything but tensors, or not these.
    """
    try:
        found: Any = torch.load(source, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ConfigError(f"{source} cannot be read ({error.strerror}); check the path") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ConfigError(
            f"{source} holds more than tensors, and opening it could run any program: where it was written, save "
            "dict(data.batch) with torch.save, and convert that file"
        ) from error
    if isinstance(found, dict) and isinstance(found.get("batch"), dict):
        found = found["batch"]
    missing = [name for name in _NEEDED if not isinstance(found, dict) or not isinstance(found.get(name), torch.Tensor)]
    if missing:
        raise ConfigError(f"{source} has no tensor {', '.join(missing)}; save dict(data.batch) of the buffer again")
    sequences = [_sequence(*rows) for rows in zip(*(found[name] for name in _NEEDED), strict=True)]
    if not sequences:
        raise ConfigError(f"{source} has no answers; name another file")
    save_sequences(output, sequences)
    return len(sequences)


def _sequence(
    input_ids: torch.Tensor, attention: torch.Tensor, responses: torch.Tensor, log_probs: torch.Tensor
) -> TokenSequence:
    size = responses.shape[0]
    learned, values = np.zeros((2, input_ids.shape[0]), np.float32)
    learned[-size:], values[-size:] = 1, log_probs.float().numpy()
    kept = attention.numpy() != 0
    return TokenSequence(input_ids.numpy()[kept].astype(np.int32), learned[kept], {REFERENCE: values[kept]})
