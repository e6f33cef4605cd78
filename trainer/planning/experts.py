"""Routed experts on shapes alone: how many rows an expert gets depends on data, so here they get the same number.

What autograd keeps and what is sent is that of `models.parallel.apply_experts`, step by step: tokens are copied to
rows, one for each of their experts; rows and gates go to the ranks that have the experts, and the outputs come back.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.moe import unpermute
from models.config import MoEConfig


@contextmanager
def balanced(config: MoEConfig) -> Iterator[None]:
    """Within, every token goes to as many experts as the gate ends with, and every expert gets as many rows."""
    experts_per_token = config.experts_at(None)

    def apply_experts(
        x_ND: Tensor,
        gates_NE: Tensor,
        routing_map_NE: Tensor,
        experts: Callable[[Tensor, Tensor], Tensor],
        group: dist.ProcessGroup | None = None,
    ) -> Tensor:
        count = len(x_ND) * experts_per_token
        row_tokens, places = torch.zeros(count, dtype=torch.int64), torch.zeros(count, dtype=torch.int64)
        rows, gates = x_ND.index_select(0, row_tokens), gates_NE.flatten().index_select(0, places)
        counts = torch.zeros(gates_NE.shape[1] // _size(group), dtype=torch.int64)
        if group is None:
            return unpermute(experts(rows, counts), row_tokens, len(x_ND), gates)
        from megatron.core.tensor_parallel.mappings import all_to_all

        rows, gates = all_to_all(group, rows), all_to_all(group, gates)
        rows = (experts(rows, counts) * gates[:, None]).to(x_ND.dtype)
        back = all_to_all(group, rows)
        return torch.zeros_like(x_ND).index_add(0, row_tokens, back)

    with ExitStack() as stack:
        # The dispatcher is the group: what mcore's does besides is to count rows.
        for name, value in (
            ("models.moe.layer.token_dispatcher", lambda experts, group: group),
            ("models.moe.layer.apply_experts", apply_experts),
            # The products are arithmetic alone.
            ("kernels.moe.grouped._experts", lambda counts: ()),
        ):
            stack.enter_context(mock.patch(name, value))
        yield


def _size(group: dist.ProcessGroup | None) -> int:
    return 1 if group is None else dist.get_world_size(group)
