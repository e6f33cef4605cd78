"""Tensors that some writers store although they follow from others: a tied head, and rotary frequencies."""

from collections.abc import Mapping

import torch

from kernels.rotary import frequencies
from models.config import ModelConfig
from trainer.errors import ConfigError
from trainer.stored.tensor_files import StoredTensor

_HEAD = "lm_head.weight"
_ROWS = 4096


def require_agreement(spare: Mapping[str, StoredTensor], embedding: StoredTensor, model: ModelConfig) -> None:
    """Check that spare tensors equal what they follow from.

    Args:
        spare: The tensors by name.
        embedding: The embedding, which a tied head equals.
        model: The model's configuration, from which rotary frequencies follow.

    Raises:
        ConfigError: one does not, so config.json describes another model than the tensors.
    """
    for name, tensor in spare.items():
        if name.endswith(".inv_freq"):
            _require_frequencies(name, tensor, model)
        elif name == _HEAD and not _same(tensor, embedding):
            raise ConfigError(
                f"{tensor.file}: {_HEAD} differs from the embedding, and config.json says tie_word_embeddings=true; "
                "set it to false, or remove the wrong one"
            )


def _require_frequencies(name: str, stored: StoredTensor, model: ModelConfig) -> None:
    """Check stored rotary frequencies against those of the configuration, up to the rounding of their dtype."""
    attention = model.attention
    assert attention.rope_theta is not None, "Hugging Face's architectures rotate"
    found = stored.read()
    exact = frequencies(model.attention_head_dim, attention.rope_theta, attention.rope_scaling.rotary()).double()
    rounding = torch.finfo(found.dtype)
    if found.shape == exact.shape and torch.allclose(
        found.double(), exact, rtol=max(4 * rounding.eps, 1e-5), atol=rounding.tiny
    ):
        return
    raise ConfigError(
        f"{stored.file}: {name} holds other rotary frequencies than rope_theta={attention.rope_theta:g} gives with "
        f"rope_scaling {attention.rope_scaling.kind}; correct config.json"
    )


def _same(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two stored matrices are equal, read a few rows at a time."""
    if one.shape != other.shape:
        return False
    parts = [(slice(start, min(start + _ROWS, one.shape[0])),) for start in range(0, one.shape[0], _ROWS)]
    return all(torch.equal(one.read(part).double(), other.read(part).double()) for part in parts)
