"""Tensor, sequence and expert parallelism: the sharded layers, and what ranks exchange in forward and backward.

The only file in models/ that knows Megatron, and it imports it only where there is something to exchange: one process
is plain PyTorch. Which parameters are sharded, and how, their modules declare (models.parameters).

A block's mixer and feed-forward are tensor-parallel regions (arXiv 1909.08053). What enters is the same on every rank,
what leaves is summed over them; inside, each rank has its heads and channels. With sequence parallelism (arXiv
2205.05198) the residual stream between regions is sharded along the sequence: it is gathered where it enters, and
reduce-scattered where it leaves.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kernels.autograd import once_differentiable
from kernels.embedding import embedding, sharded_embedding
from kernels.losses.linear_cross_entropy import linear_cross_entropy
from kernels.matmul import linear
from kernels.moe import permute, unpermute
from models.parameters import Groups, Module, Placement, local_part, normal, zeros


class _Enter(torch.autograd.Function):
    """Pass x on; backward sums over ranks. mcore 0.16.1's own leaves a gradient that is not contiguous unsummed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _sum(grad, ctx.group), None


class _Leave(torch.autograd.Function):
    """The sum of x over ranks; backward gives each the gradient of the sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return _sum(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def _sum(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def enter_region(x: Tensor, groups: Groups) -> Tensor:
    """The residual stream x [T, B, D], or [T/P, B, D] with sequence parallelism, as a region takes it: [T, B, D].

    What the region does to it is only this rank's share of its gradient: backward sums the shares.
    """
    if groups.tensor is None:
        return x
    if groups.sequence:
        from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

        return gather_from_sequence_parallel_region(x, group=groups.tensor)
    return _Enter.apply(x, groups.tensor)


def leave_region(x: Tensor, groups: Groups) -> Tensor:
    """The sum over ranks of their shares x [T, B, D], cut along the sequence with sequence parallelism."""
    if groups.tensor is None:
        return x
    if groups.sequence:
        from megatron.core.tensor_parallel.mappings import reduce_scatter_to_sequence_parallel_region

        return reduce_scatter_to_sequence_parallel_region(x, group=groups.tensor)
    return _Leave.apply(x, groups.tensor)


class _GatherColumns(torch.autograd.Function):
    """All ranks' columns side by side; every rank makes the same use of them, so backward takes its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return local_part(grad, ctx.group, -1), None


def gather_columns(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The columns [..., P * n] of all ranks of a group, from this rank's [..., n]."""
    return x if group is None else _GatherColumns.apply(x, group)


def sum_over(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The sum of every rank's x, of which every rank goes on to make a different use: backward sums, too."""
    if group is None:
        return x
    from torch.distributed.nn.functional import all_reduce

    total: Tensor = all_reduce(x, group=group)
    return total


def sum_counts(x: Tensor, groups: Groups) -> Tensor:
    """The sum of x, which has no gradient, over the ranks that share a micro-batch."""
    for group in (groups.tensor if groups.sequence else None, groups.context):
        if group is not None:
            x = _sum(x, group)
    return x


_BIAS = Placement(zeros, decayed=False)


class Linear(Module, nn.Linear):
    """Linear layer through the fastest matrix product of the device. Weight [out, in], whole on every rank."""

    placements: ClassVar[Mapping[str, Placement]] = {"weight": Placement(normal), "bias": _BIAS}

    def forward(self, x: Tensor) -> Tensor:
        """Project x [..., in] to [..., out]."""
        return linear(x, self.weight, self.bias)


class ColumnLinear(Linear):
    """Linear layer sharded along its outputs (heads, feed-forward channels), within a region. Weight [out, in]."""

    placements: ClassVar = {"weight": Placement(normal, shard_axis=0), "bias": replace(_BIAS, shard_axis=0)}


class RowLinear(Linear):
    """Linear layer sharded along its inputs; it ends a region and writes into the residual stream. Weight [out, in]."""

    # Added to a sum over ranks, a bias would count once a rank: there is none.
    placements: ClassVar = {"weight": Placement(normal, shard_axis=1, writes_residual=True), "bias": _BIAS}

    def forward(self, x: Tensor) -> Tensor:
        """Project x [T, B, in] to the residual stream [T, B, out]."""
        return leave_region(super().forward(x), self.groups)


class VocabEmbedding(Module, nn.Embedding):
    """Embedding sharded along the vocabulary. Weight [V, D]."""

    placements: ClassVar = {"weight": Placement(normal, shard_axis=0)}

    def forward(self, tokens: Tensor) -> Tensor:
        """The residual stream [T, B, D] of token ids [T, B]."""
        if self.groups.tensor is None:
            return embedding(tokens, self.weight)
        return leave_region(sharded_embedding(tokens, self.weight, self.groups.tensor), self.groups)


def vocabulary_loss(
    hidden_TBD: Tensor, weight_VD: Tensor, labels_BT: Tensor, mask_BT: Tensor, groups: Groups
) -> tuple[Tensor, Tensor]:
    """Cross entropy of the next token over the vocabulary, without ever holding all logits.

    Returns:
        The sum over tokens of mask times negative log-likelihood (nats, differentiable), and the negative
        log-likelihoods [B*T] (float32, detached).
    """
    hidden_ND = enter_region(hidden_TBD, groups).transpose(0, 1).flatten(0, 1)
    return linear_cross_entropy(hidden_ND, weight_VD, labels_BT.flatten(), mask_BT.flatten(), group=groups.tensor)


def apply_experts(
    x_ND: Tensor,
    gates_NE: Tensor,
    routing_map_NE: Tensor,
    experts: Callable[[Tensor, Tensor], Tensor],
    dispatcher: Any = None,
    num_rows: int | None = None,
) -> Tensor:
    """Send tokens to their experts, and add up what comes back, times the gates.

    Args:
        x_ND: This rank's tokens.
        gates_NE: Weights, float32.
        routing_map_NE: Which experts a token goes to, bool; any number of them.
        experts: Transforms the rows of this rank's experts, sorted by expert, given the number of each.
        dispatcher: What `token_dispatcher` gives; None where this rank has all experts.
        num_rows: The map's sum, if the host knows it; without a dispatcher it need then not be read back.

    Returns:
        [N, D].
    """
    if dispatcher is None:
        rows, row_gates, row_tokens, counts = permute(x_ND, routing_map_NE, gates_NE, num_rows=num_rows)
        return unpermute(experts(rows, counts), row_tokens, len(x_ND), row_gates)
    rows, row_gates = dispatcher.dispatch_preprocess(x_ND, routing_map_NE, gates_NE)
    rows, row_gates = dispatcher.token_dispatch(rows, row_gates)
    rows, counts, row_gates = dispatcher.dispatch_postprocess(rows, row_gates)
    rows = experts(rows, counts.to(rows.device)) * row_gates[:, None]
    combined = dispatcher.token_combine(dispatcher.combine_preprocess(rows.to(x_ND.dtype)))
    y_ND: Tensor = dispatcher.combine_postprocess(combined)
    return y_ND


class _Replicate(torch.autograd.Function):
    """Copies of some experts' weights on every rank; backward sums the copies' gradients where the expert is.

    In float32, as one product over all of its rows would.
    """

    @staticmethod
    def forward(ctx: Any, weight_EOD: Tensor, experts: Sequence[int], group: dist.ProcessGroup) -> Tensor:
        ctx.group, ctx.shape = group, weight_EOD.shape
        # The rank that has an expert, and its place there.
        ctx.places = [divmod(expert, len(weight_EOD)) for expert in experts]
        copies = weight_EOD.new_empty(len(experts), *weight_EOD.shape[1:])
        for copy_OD, (owner, place) in zip(copies, ctx.places, strict=True):
            if owner == dist.get_rank(group):
                copy_OD.copy_(weight_EOD[place])
            dist.broadcast(copy_OD, group=group, group_src=owner)
        return copies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
        grad_weight = None
        # A copy in any case, for on ranks that do not get the sum the collective leaves something else in it.
        wide = torch.promote_types(grad.dtype, torch.float32)
        grads = grad.to(wide, copy=True, memory_format=torch.contiguous_format)
        for grad_OD, (owner, place) in zip(grads, ctx.places, strict=True):
            dist.reduce(grad_OD, group=ctx.group, group_dst=owner)
            if owner == dist.get_rank(ctx.group):
                grad_weight = grad.new_zeros(ctx.shape) if grad_weight is None else grad_weight
                grad_weight[place] = grad_OD
        return grad_weight, None, None


def replicate_experts(weight_EOD: Tensor, experts: Sequence[int], groups: Groups) -> Tensor:
    """The weights [R, O, D] of R experts, counted over all ranks that share them, from this rank's own [E, O, D].

    Every rank must ask for the same experts in the same order.
    """
    copies: Tensor = _Replicate.apply(weight_EOD, experts, groups.expert)
    return copies


def token_dispatcher(num_experts: int, group: dist.ProcessGroup) -> Any:
    """Mcore's all-to-all exchange of tokens between the ranks that share experts.

    Where nothing is dropped, mcore sizes the rows for the same number of experts for every token. Given a capacity
    factor it counts them, and that is all that its dispatcher does with one while it is not told to pad.
    """
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    ranks = dist.get_world_size(group)
    config = TransformerConfig(
        num_layers=1,
        hidden_size=1,
        num_attention_heads=1,
        num_moe_experts=num_experts,
        moe_expert_capacity_factor=1.0,
        moe_token_dispatcher_type="alltoall",
        expert_model_parallel_size=ranks,
        expert_tensor_parallel_size=1,
    )
    groups = ProcessGroupCollection()
    groups.ep = groups.tp_ep = group
    groups.expt_tp = parallel_state.get_expert_tensor_parallel_group()
    own = num_experts // ranks
    first = dist.get_rank(group) * own
    return MoEAlltoAllTokenDispatcher(own, list(range(first, first + own)), config, groups)
