"""Tensor, sequence and expert parallelism: sharded layers, and their communication in forward and backward.

Only this file of models/ imports Megatron, and only if there is something to communicate: a single process is plain
PyTorch. Modules declare which of their parameters are sharded, and how (models.parameters).

A block's mixer and feed-forward are tensor-parallel regions (arXiv 1909.08053). Their input is the same on every rank
and their outputs are summed over ranks; inside, each rank has its own heads and channels. With sequence parallelism
(arXiv 2205.05198) the residual stream between regions is sharded along the sequence: it is all-gathered on entry and
reduce-scattered on exit.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kernels.autograd import Role, derive, exact, label, name, once_differentiable
from kernels.embedding import embedding, sharded_embedding
from kernels.losses.linear_cross_entropy import linear_cross_entropy
from kernels.matmul import linear
from kernels.moe import permute, unpermute
from models.compression import numbered, numbers_by_expert, token_numbers
from models.parameters import Groups, Module, Placement, local_part, normal, zeros


class _Enter(torch.autograd.Function):
    """Identity; backward all-reduces. mcore 0.16.1's version does not reduce gradients that are not contiguous."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _sum(grad, ctx.group), None


class _Leave(torch.autograd.Function):
    """All-reduce; backward is the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return _sum(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def _sum(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    # all_reduce works in place, and autograd may still need x.
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def enter_region(x: Tensor, groups: Groups) -> Tensor:
    """Enter a region: the residual stream x [T, B, D], or [T/P, B, D] with sequence parallelism, becomes [T, B, D].

    Inside the region each rank computes only its share of the gradient of x, so backward sums the shares.
    """
    if groups.tensor is None:
        return x
    if groups.sequence:
        from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

        entered: Tensor = gather_from_sequence_parallel_region(x, group=groups.tensor)
        # Each rank stores its own tokens; backward gathers them again, as Megatron's linear layers do.
        derive(entered, partial(gather_from_sequence_parallel_region, group=groups.tensor), (x,))
        return entered
    return _Enter.apply(x, groups.tensor)


def leave_region(x: Tensor, groups: Groups) -> Tensor:
    """Leave a region: sum the ranks' shares x [T, B, D], sharding the sum by sequence with sequence parallelism."""
    if groups.tensor is None:
        return x
    if groups.sequence:
        from megatron.core.tensor_parallel.mappings import reduce_scatter_to_sequence_parallel_region

        return reduce_scatter_to_sequence_parallel_region(x, group=groups.tensor)
    return _Leave.apply(x, groups.tensor)


class _GatherColumns(torch.autograd.Function):
    """All-gather of columns. Every rank uses the result alike, so backward keeps this rank's columns."""

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
    """All-gather this rank's columns [..., n] to [..., P * n]."""
    return x if group is None else _GatherColumns.apply(x, group)


def sum_over(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """All-reduce in forward and backward, for a sum that each rank then uses differently."""
    if group is None:
        return x
    from torch.distributed.nn.functional import all_reduce

    total: Tensor = all_reduce(x, group=group)
    return total


def sum_of_shares(x: Tensor, groups: Groups) -> Tensor:
    """Sum each tensor-parallel rank's share; every rank uses the sum alike, and its share gets the sum's gradient."""
    return x if groups.tensor is None else _Leave.apply(x, groups.tensor)


def sum_counts(x: Tensor, groups: Groups) -> Tensor:
    """Sum x, which needs no gradient, over the ranks that share a micro-batch."""
    # Without sequence parallelism, tensor-parallel ranks all count the same tokens.
    for group in (groups.tensor if groups.sequence else None, groups.context):
        if group is not None:
            x = _sum(x, group)
    return x


_BIAS = Placement(zeros, decayed=False)


class Projection(Module):
    """Base of the layers that multiply their input by a weight [..., out, in].

    Attributes:
        neuron: Turns the input into spikes before the product (models.spiking). None uses the input itself.
        rounding: Rounds the weight before the product. None uses the weight itself.
        adapter: Maps the input that enters the product to what is added to it (models.lora). None adds nothing.
    """

    neuron: Callable[[Tensor], Tensor] | None = None
    rounding: Callable[[Tensor], Tensor] | None = None
    adapter: Callable[..., Tensor] | None = None
    weight: Tensor

    @property
    def factor(self) -> Tensor:
        """The weight that enters the product: rounded, if `rounding` is set."""
        return self.weight if self.rounding is None else self.rounding(self.weight)

    def spikes(self, x: Tensor) -> Tensor:
        """Return the input [..., in] that enters the product: the spikes of x, if `neuron` is set."""
        return x if self.neuron is None else self.neuron(x)

    def adapted(self, product: Tensor, *inputs: Tensor) -> Tensor:
        """Return a product of these inputs, plus that of the adapter, if there is one."""
        return product if self.adapter is None else product + self.adapter(*inputs)


class Linear(Projection, nn.Linear):
    """Linear layer that uses the device's fastest matrix product. Weight [out, in], replicated."""

    placements: ClassVar[Mapping[str, Placement]] = {"weight": Placement(normal), "bias": _BIAS}

    def forward(self, x: Tensor) -> Tensor:
        """Project x [..., in] to [..., out]."""
        x = self.spikes(x)
        return self.adapted(linear(x, self.factor, self.bias), x)


class ColumnLinear(Linear):
    """Linear layer sharded by outputs (heads, feed-forward channels), inside a region. Weight [out, in]."""

    placements: ClassVar = {"weight": Placement(normal, shard_axis=0), "bias": replace(_BIAS, shard_axis=0)}


class RowLinear(Linear):
    """Linear layer sharded by inputs, which ends a region and writes to the residual stream. Weight [out, in]."""

    # A bias would be added once per rank before the sum over ranks, so this layer has none.
    placements: ClassVar = {"weight": Placement(normal, shard_axis=1, writes_residual=True), "bias": _BIAS}

    def forward(self, x: Tensor) -> Tensor:
        """Project x [T, B, in] to the residual stream [T, B, out]."""
        return leave_region(super().forward(x), self.groups)


class VocabEmbedding(Module, nn.Embedding):
    """Embedding sharded by vocabulary. Weight [V, D]."""

    placements: ClassVar = {"weight": Placement(normal, shard_axis=0)}

    def forward(self, tokens: Tensor) -> Tensor:
        """Embed token ids [T, B] into the residual stream [T, B, D]."""
        if self.groups.tensor is None:
            return embedding(tokens, self.weight)
        return leave_region(sharded_embedding(tokens, self.weight, self.groups.tensor), self.groups)


def vocabulary_loss(
    hidden_TBD: Tensor, weight_VD: Tensor, labels_BT: Tensor, mask_BT: Tensor, groups: Groups
) -> tuple[Tensor, Tensor]:
    """Next-token cross entropy over the vocabulary, without materialising all logits.

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
    indices: Tensor | None = None,
) -> Tensor:
    """Dispatch tokens to their experts and combine the results, weighted by the gates.

    Args:
        x_ND: This rank's tokens.
        gates_NE: Gate weights, float32.
        routing_map_NE: Expert assignment of each token, bool; any number of experts.
        experts: Applies this rank's experts to rows sorted by expert, given the number of rows for each.
        dispatcher: Result of `token_dispatcher`; None if this rank has all experts.
        num_rows: Sum of the map, if the host knows it. Without a dispatcher this avoids a device-to-host read.
        indices: Indices of this rank's experts in the whole layer, int64. None means the first ones or, with a
            dispatcher, the dispatcher's.

    Returns:
        [N, D].
    """
    numbers = token_numbers()
    if dispatcher is None:
        rows, row_gates, row_tokens, counts = permute(x_ND, routing_map_NE, gates_NE, num_rows=num_rows)
        if numbers is not None:
            indices = torch.arange(len(counts), device=x_ND.device) if indices is None else indices
            numbers = numbers_by_expert(numbers.to(x_ND.device)[row_tokens], indices, counts)
        with numbered(numbers):
            rows = experts(rows, counts)
            # Without a label, the place would depend on the order of saving. That order differs between layouts,
            # because the token exchange saves tensors of its own.
            label(rows=rows)
            return unpermute(rows, row_tokens, len(x_ND), row_gates)
    if numbers is not None:
        # Send the token numbers through the same exchange. The dispatcher does not report the tokens of its rows.
        numbers_N1, counts, _ = _exchange(dispatcher, numbers[:, None].double(), routing_map_NE, gates_NE.detach())
        indices = torch.tensor(dispatcher.local_expert_indices)
        numbers = numbers_by_expert(numbers_N1[:, 0].long(), indices.to(x_ND.device), counts.to(x_ND.device))
    rows, counts, row_gates = _exchange(dispatcher, x_ND, routing_map_NE, gates_NE)
    with numbered(numbers):
        rows = experts(rows, counts.to(rows.device))
        label(rows=rows)
        row_gates_N1 = row_gates[:, None]
        name([(row_gates_N1, Role.STATISTIC)])
        rows = rows * row_gates_N1
    combined = dispatcher.token_combine(dispatcher.combine_preprocess(rows.to(x_ND.dtype)))
    y_ND: Tensor = dispatcher.combine_postprocess(combined)
    return y_ND


def _exchange(dispatcher: Any, x_ND: Tensor, routing_map_NE: Tensor, gates_NE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Send tokens to the ranks of their experts.

    Returns:
        Rows sorted by expert, the number of rows of each expert, and the gate of each row.
    """
    # Only gates are saved here. Without an exchange none are, so they must not be counted as an activation.
    with exact():
        rows, row_gates = dispatcher.dispatch_preprocess(x_ND, routing_map_NE, gates_NE)
        rows, row_gates = dispatcher.token_dispatch(rows, row_gates)
        rows, counts, row_gates = dispatcher.dispatch_postprocess(rows, row_gates)
    return rows, counts, row_gates


class _Replicate(torch.autograd.Function):
    """Replicates some experts' weights on every rank; backward reduces the replicas' gradients to the owner.

    The reduction is in float32, like a single product over all rows of the expert.
    """

    @staticmethod
    def forward(ctx: Any, weight_EOD: Tensor, experts: Sequence[int], group: dist.ProcessGroup) -> Tensor:
        ctx.group, ctx.shape = group, weight_EOD.shape
        # The owning rank of each expert, and the expert's index there.
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
        # Always a copy: on ranks other than the destination, the collective leaves unspecified values in it.
        wide = torch.promote_types(grad.dtype, torch.float32)
        grads = grad.to(wide, copy=True, memory_format=torch.contiguous_format)
        for grad_OD, (owner, place) in zip(grads, ctx.places, strict=True):
            dist.reduce(grad_OD, group=ctx.group, group_dst=owner)
            if owner == dist.get_rank(ctx.group):
                grad_weight = grad.new_zeros(ctx.shape) if grad_weight is None else grad_weight
                grad_weight[place] = grad_OD
        return grad_weight, None, None


def replicate_experts(weight_EOD: Tensor, experts: Sequence[int], groups: Groups) -> Tensor:
    """Return the weights [R, O, D] of R experts, given by global index, on every rank of the expert group.

    `weight_EOD` holds this rank's own experts. Every rank must request the same experts in the same order.
    """
    copies: Tensor = _Replicate.apply(weight_EOD, experts, groups.expert)
    return copies


def token_dispatcher(num_experts: int, group: dist.ProcessGroup) -> Any:
    """Return mcore's all-to-all token exchange between the ranks that share experts.

    To size its buffers without token dropping, mcore assumes that every token has the same number of experts. With a
    capacity factor it counts the assignments instead. Without padding, the factor has no other effect in the
    dispatcher.
    """
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    ranks = dist.get_world_size(group)
    # Only the expert fields matter; the rest satisfies TransformerConfig's validation.
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
