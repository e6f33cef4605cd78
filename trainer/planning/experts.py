"""Routed experts on shapes alone: how many rows an expert gets depends on data, so here they get the same number.

What autograd keeps and what is sent is that of `models.parallel.apply_experts`, step by step: tokens are copied to
rows, one for each of their experts; rows and gates go to the ranks that have the experts, and the outputs come back.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.moe import unpermute
from models.decoder import Decoder
from models.moe.layer import MoELayer
from models.parameters import Groups


def balance(decoder: Decoder) -> None:
    """Have every token go to as many experts as the gate ends with, and every expert get as many rows."""
    for module in decoder.modules():
        if isinstance(module, MoELayer):
            module.exchange = _evenly(module.config.experts_at(None))


def _evenly(
    experts_per_token: int,
) -> Callable[[Tensor, Tensor, Callable[[Tensor, Tensor], Tensor], Groups], Tensor]:
    def exchange(x_ND: Tensor, gates_NE: Tensor, experts: Callable[[Tensor, Tensor], Tensor], groups: Groups) -> Tensor:
        count, group = len(x_ND) * experts_per_token, groups.expert
        # kernels.moe.permute finds tokens and experts as columns of one tensor.
        columns = 2 if group is None else 1
        row_tokens, places = torch.zeros(count, columns, dtype=torch.int64)[:, 0], torch.zeros(count, dtype=torch.int64)
        rows, gates = x_ND.index_select(0, row_tokens), gates_NE.flatten().index_select(0, places)
        ranks = 1 if group is None else dist.get_world_size(group)
        counts = torch.zeros(gates_NE.shape[1] // ranks, dtype=torch.int64)
        if group is None:
            return unpermute(experts(rows, counts), row_tokens, len(x_ND), gates)
        from megatron.core.tensor_parallel.mappings import all_to_all

        rows, gates = all_to_all(group, rows), all_to_all(group, gates)
        rows = (experts(rows, counts) * gates[:, None]).to(x_ND.dtype)
        back = all_to_all(group, rows)
        # As mcore adds up: index_add would keep the rows, too.
        return torch.zeros_like(x_ND).scatter_add(0, row_tokens[:, None].expand_as(back), back)

    return exchange
