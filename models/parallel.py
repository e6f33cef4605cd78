"""The layers that model parallelism cuts, and how their parameters are named to a distributed checkpoint.

The only file in models/ that knows Megatron, and it imports it only to describe a checkpoint: one process is plain
PyTorch. Each class says along which dimension its weight is cut; with one tensor-parallel rank the cut is the whole.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kernels.losses.linear_cross_entropy import linear_cross_entropy
from kernels.matmul import linear


class Linear(nn.Linear):
    """Linear layer through the fastest matrix product of the device. Weight [out, in]."""

    def forward(self, x: Tensor) -> Tensor:
        """Project x [..., in] to [..., out]."""
        return linear(x, self.weight, self.bias)


class ColumnLinear(Linear):
    """Linear layer cut along its outputs (heads, feed-forward channels). Weight [out, in]."""

    shard_axes: ClassVar = {"weight": 0, "bias": 0}


class RowLinear(Linear):
    """Linear layer cut along its inputs; it writes into the residual stream. Weight [out, in]."""

    shard_axes: ClassVar = {"weight": 1}


class VocabEmbedding(nn.Embedding):
    """Embedding cut along the vocabulary. Weight [V, D]."""

    shard_axes: ClassVar = {"weight": 0}


def vocabulary_loss(hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, mask_N: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy of the next token over the vocabulary, without ever holding all logits.

    Returns:
        The sum over tokens of mask times negative log-likelihood (nats, differentiable), and the negative
        log-likelihoods [N] (float32, detached).
    """
    return linear_cross_entropy(hidden_ND, weight_VD, labels_N, mask_N)


def sharded_state_dict(module: nn.Module, prefix: str = "") -> dict[str, Any]:
    """Describe a module's parameters to mcore's dist_checkpointing: global shape, this rank's part, who writes it."""
    from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

    sharded: dict[str, Any] = {}
    for name, child in module.named_modules():
        own = {key: value for key, value in child._parameters.items() if value is not None}
        if own:
            path = f"{prefix}{name}." if name else prefix
            sharded |= make_sharded_tensors_for_checkpoint(own, path, getattr(child, "shard_axes", {}))
    return sharded


def keep_float32(name: str) -> bool:
    """Parameters that stay float32 in bf16 training: the decays, whose small changes bfloat16 would lose."""
    return name.rsplit(".", 1)[-1] in ("A_log", "dt_bias", "lower_bounds")


def cast_parameters(module: nn.Module, dtype: torch.dtype) -> None:
    """Cast every parameter in place, but those that keep_float32 names."""
    for name, parameter in module.named_parameters():
        if not keep_float32(name):
            parameter.data = parameter.data.to(dtype)
