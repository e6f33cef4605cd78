"""Routed experts on shapes alone. The rows of an expert depend on data, so here every expert gets the same number.

The tensors saved and the bytes sent are those of `models.parallel.apply_experts`, step by step: tokens are copied to
rows, one per chosen expert; rows and gates are sent to the experts' ranks, and the outputs are sent back.
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
    """Give every expert equally many rows. A token visits as many experts as at the end of the gate's schedule."""
    for module in decoder.modules():
        if isinstance(module, MoELayer):
            module.exchange = _evenly(module.config.experts_at(None))


def _evenly(
    experts_per_token: int,
) -> Callable[[Tensor, Tensor, Callable[[Tensor, Tensor], Tensor], Groups], Tensor]:
    def exchange(x_ND: Tensor, gates_NE: Tensor, experts: Callable[[Tensor, Tensor], Tensor], groups: Groups) -> Tensor:
        count, group = len(x_ND) * experts_per_token, groups.expert
        # kernels.moe.permute finds a row's token and expert as two columns of one tensor, whose storage is kept whole.
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
        # scatter_add as in mcore. index_add would also save the rows.
        return torch.zeros_like(x_ND).scatter_add(0, row_tokens[:, None].expand_as(back), back)

    return exchange
