"""Sink tokens: learned embeddings in front of every sequence that all its tokens see (SpikingBrain-76B, 2509.05276).

A softmax layer lets every token attend to the sinks of its sequence, whatever its window, and the sinks attend to each
other in both directions. So they depend on parameters alone: a pass of the layers over the sinks gives the keys and
values that all documents of a micro-batch share. Linear mixers read the sinks as a sequence of their own. (The report
tells the number of sinks and the mask; that they precede each document's positions is a choice made here.)
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.parameters import Module, Placement, local_part, normal


class SinkTokens(Module):
    """The embeddings of sink tokens. Weight [S, D]."""

    placements: ClassVar = {"weight": Placement(normal)}

    def __init__(self, count: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, size))

    def forward(self) -> Tensor:
        """The residual stream of the sinks [S, 1, D]; with sequence parallelism this rank's shard of it."""
        return local_part(self.weight, self.groups.tensor if self.groups.sequence else None)[:, None]


@dataclass(eq=False)
class SinkKeys:
    """Keys [1, S, Hkv, K] and values [1, S, Hkv, V] of a layer's sinks, by softmax mixer: parallel branches have two.

    Attributes:
        by_mixer: Filled by the pass over the sinks.
    """

    by_mixer: dict[nn.Module, tuple[Tensor, Tensor]] = field(default_factory=dict)


def attend_among_sinks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention without a mask: q [1, S, H, K], k and v [1, S, Hkv, K] to [1, S, H, K]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)
