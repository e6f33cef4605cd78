"""Embedding, whole or over a vocabulary that is cut over ranks.

    x_t = W[token_t] = sum_p W_p[token_t]     with W_p[token] = 0 where rank p does not hold that row

Vocabulary-parallel embedding as in Shoeybi et al. 2019, arXiv:1909.08053, section 3.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from kernels.indices import check_range


def embedding(tokens: Tensor, weight: Tensor) -> Tensor:
    """Look up rows of weight [V, D]: [..., D], differentiable in weight.

    Raises:
        ValueError: a token is outside the vocabulary; on a GPU, a failed assertion of the device.
    """
    check_range("embedding", "token", tokens, len(weight))
    return F.embedding(tokens, weight)


def sharded_embedding(tokens: Tensor, weight: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Look up this rank's PARTIAL embedding: its own rows, zeros for tokens whose row another rank holds.

    The sum over the ranks is the embedding; whether by all-reduce, or by reduce-scatter along the sequence, is the
    caller's choice. No rank talks to another here.

    Args:
        tokens: int64 of any shape, the same on every rank, in the whole vocabulary.
        weight: [V, D], this rank's part, as large on every rank: rank r holds rows r · V to (r + 1) · V of the whole.
        group: the ranks over which the vocabulary is cut.

    Returns:
        [..., D] in weight's dtype, differentiable in weight. Given the whole sum's gradient on each rank, the gradient
        of weight is that of this rank's rows, and whole.

    Raises:
        ValueError: weight is not a matrix, or a token is outside the whole vocabulary; on a GPU, a failed assertion of
            the device.
    """
    if weight.dim() != 2:
        raise ValueError(f"sharded_embedding: weight must be [V, D], not {tuple(weight.shape)}")
    check_range("sharded_embedding", "token", tokens, len(weight) * dist.get_world_size(group))
    owner = tokens.div(len(weight), rounding_mode="floor")
    # Tokens of other ranks read, and add zeros to, rows all over the part, not crowded at one of them.
    # Those of no rank go on as they are, so that the lookup refuses them on a GPU, too.
    exists = (owner >= 0) & (owner < dist.get_world_size(group))
    rows = torch.where(exists, tokens.remainder(len(weight)), tokens)
    return F.embedding(rows, weight).masked_fill((owner != dist.get_rank(group))[..., None], 0.0)
