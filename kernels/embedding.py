"""Embedding, whole or with the vocabulary sharded over ranks.

    x_t = W[token_t] = sum_p W_p[token_t]     with W_p[token] = 0 if rank p does not hold that row

Vocabulary-parallel embedding as in Shoeybi et al. 2019, arXiv:1909.08053, section 3.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from kernels.indices import check_range


def embedding(tokens: Tensor, weight: Tensor) -> Tensor:
    """Look up the tokens' rows of weight [V, D]: [..., D], differentiable in weight.

    Raises:
        ValueError: a token is outside the vocabulary. On a GPU a device assertion fails instead.
    """
    check_range("embedding", "token", tokens, len(weight))
    return F.embedding(tokens, weight)


def sharded_embedding(tokens: Tensor, weight: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Look up this rank's PARTIAL embedding: its own rows, and zeros for tokens whose row another rank holds.

    The embedding is the sum over the ranks. The caller sums, by all-reduce or by reduce-scatter along the sequence.
    This function does not communicate.

    Args:
        tokens: int64 of any shape, the same on every rank, in the whole vocabulary.
        weight: [V, D], this rank's shard, with the same V on every rank: rank r holds rows r · V to (r + 1) · V.
        group: the ranks over which the vocabulary is sharded.

    Returns:
        [..., D] in weight's dtype, differentiable in weight. If each rank gets the gradient of the sum, the gradient of
        weight is complete for this rank's rows.

    Raises:
        ValueError: weight is not a matrix, or a token is outside the whole vocabulary. On a GPU a device assertion
            fails instead for tokens.
    """
    if weight.dim() != 2:
        raise ValueError(f"sharded_embedding: weight must be [V, D], not {tuple(weight.shape)}")
    check_range("sharded_embedding", "token", tokens, len(weight) * dist.get_world_size(group))
    owner = tokens.div(len(weight), rounding_mode="floor")
    # Other ranks' tokens look up rows spread over the shard: backward adds zeros there, and would crowd a single row.
    # Tokens outside the vocabulary are passed on, so that the lookup fails on a GPU too.
    exists = (owner >= 0) & (owner < dist.get_world_size(group))
    rows = torch.where(exists, tokens.remainder(len(weight)), tokens)
    return F.embedding(rows, weight).masked_fill((owner != dist.get_rank(group))[..., None], 0.0)
