"""The value head of PPO (Schulman et al. 2017, arXiv:1707.06347): a number for every token beside its distribution."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from models.parallel import gather_columns
from models.parameters import Module, Placement, zeros

# A head beside a language model learns slower than its values change in bfloat16's steps.
_PLACEMENT = Placement(zeros, float32=True, decayed=False)


class ValueHead(Module):
    """w · h + b of the final hidden states h, 0 at first. Every tensor-parallel rank has it whole.

    Args:
        hidden_size: Size of h.
    """

    placements: ClassVar = {"weight": _PLACEMENT, "bias": _PLACEMENT}

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size))
        self.bias = nn.Parameter(torch.empty(1))

    def forward(self, hidden: Tensor) -> Tensor:
        """Compute the values [B, T] of hidden states [T, B, D]; [T/P, B, D] with sequence parallelism over P ranks."""
        dtype = torch.promote_types(hidden.dtype, self.weight.dtype)
        values_BT = (hidden.to(dtype) @ self.weight.to(dtype) + self.bias.to(dtype)).transpose(0, 1)
        return gather_columns(values_BT, self.groups.tensor if self.groups.sequence else None)
