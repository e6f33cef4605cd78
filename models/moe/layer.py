"""The mixture-of-experts feed-forward: routed and shared experts (axes: N tokens, E experts, O outputs, D inputs).

y = sum over the chosen experts e of gate_e(x) FFN_e(x), plus FFN_shared(x) (arXiv 1701.06538, 2401.06066). No tensor
has N * E * D elements: rows are gathered by expert, multiplied group by group, and summed per token.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from kernels.activations import relu, swiglu
from kernels.moe import grouped_linear
from kernels.shapes import has_values
from models.compression import selected
from models.config import ModelConfig
from models.moe.router import Router, Routing
from models.parallel import (
    ColumnLinear,
    Projection,
    RowLinear,
    apply_experts,
    enter_region,
    replicate_experts,
    token_dispatcher,
)
from models.parameters import Groups, Module, Placement, normal, parameter_rows
from models.saved_activations import EVERYTHING, BlockPolicy, run_region

# Each activation is split in two steps. The first step's results are all that the activation's backward saves, and the
# second step can be recomputed from them.
_GATED: dict[str, tuple[Callable[..., tuple[Tensor, ...]], Callable[..., Tensor]]] = {
    "swiglu": (lambda gate, up: (gate, up), swiglu),
    "geglu": (lambda gate, up: (F.gelu(gate), up), torch.mul),
}
_PLAIN: dict[str, tuple[Callable[..., tuple[Tensor, ...]], Callable[..., Tensor]]] = {
    "gelu": (lambda up: (up,), F.gelu),
    "relu_squared": (lambda up: (relu(up),), torch.square),
}


class ExpertLinear(Projection):
    """One linear layer per expert. Weight [E, O, D]; each expert-parallel rank holds a consecutive range of experts."""

    placements: ClassVar[Mapping[str, Placement]] = {"weight": Placement(normal, expert=True)}

    def __init__(self, experts: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, outputs, inputs))

    def forward(self, rows_ND: Tensor, tokens_per_expert_E: Tensor) -> Tensor:
        """Multiply each row by its expert's weight: [N, D] to [N, O]. Rows are sorted by expert."""
        rows_ND = self.spikes(rows_ND)
        product_NO = grouped_linear(rows_ND, self.factor, tokens_per_expert_E)
        return self.adapted(product_NO, rows_ND, tokens_per_expert_E)


class ExpertRowLinear(ExpertLinear):
    """An ExpertLinear whose output is added to the residual stream."""

    placements: ClassVar = {"weight": Placement(normal, expert=True, writes_residual=True)}


class Experts(Module):
    """The routed experts of this rank."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        experts, d_model, d_ffn = config.moe.num_experts, config.hidden_size, config.expert_hidden_size
        self.activation = config.moe.activation
        self.gate_proj = ExpertLinear(experts, d_model, d_ffn) if self.activation in _GATED else None
        self.up_proj = ExpertLinear(experts, d_model, d_ffn)
        self.down_proj = ExpertRowLinear(experts, d_ffn, d_model)

    def forward(self, rows_ND: Tensor, tokens_per_expert_E: Tensor, policy: BlockPolicy = EVERYTHING) -> Tensor:
        """Transform the rows [N, D], sorted by expert. tokens_per_expert [E] counts each expert's rows."""
        up = self.up_proj(rows_ND, tokens_per_expert_E)
        gate = None if self.gate_proj is None else self.gate_proj(rows_ND, tokens_per_expert_E)
        down = partial(self.down_proj, tokens_per_expert_E=tokens_per_expert_E)
        return _activate_and_project(policy, self.activation, gate, up, down)


class SharedExperts(Module):
    """The experts that every token visits, as one feed-forward of their total width, sharded like a dense one."""

    in_region: ClassVar = True

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d_model, d_ffn = config.hidden_size, config.moe.shared_experts * config.expert_hidden_size
        self.activation = config.moe.activation
        gated = self.activation in _GATED
        self.gate_proj = ColumnLinear(d_model, d_ffn, bias=False) if gated else None
        self.up_proj = ColumnLinear(d_model, d_ffn, bias=False)
        self.down_proj = RowLinear(d_ffn, d_model, bias=False)

    def forward(self, x: Tensor, policy: BlockPolicy = EVERYTHING) -> Tensor:
        """Transform x [T, B, D]."""
        up, gate = self.up_proj(x), None if self.gate_proj is None else self.gate_proj(x)
        return _activate_and_project(policy, self.activation, gate, up, self.down_proj)


class SharedExpertGate(Module):
    """Gate sigmoid(w . x) of the shared experts' output (Qwen1.5-MoE and later). Weight [1, D]."""

    placements: ClassVar = {"weight": Placement(normal)}

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        """The factors [T, B, 1] of tokens x [T, B, D] of the residual stream."""
        return torch.sigmoid(F.linear(x, self.weight))


Exchange = Callable[[Tensor, Tensor, Callable[[Tensor, Tensor], Tensor], Groups], Tensor]
"""Maps tokens [N, D], gates [N, E], a function that runs the experts, and process groups to the output [N, D]."""


class MoELayer(Module):
    """Routed and shared experts in place of a feed-forward.

    Attributes:
        policy: The block's settings for tensors kept for backward. This layer applies moe_activation, moe_experts and
            recompute_above; the block applies the settings that enclose the whole layer.
        exchange: Replaces `apply_experts` in a run on shapes alone, which has no values to route by
            (trainer.planning.experts). None otherwise.
    """

    policy: BlockPolicy = EVERYTHING
    exchange: Exchange | None = None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config.moe
        self.router = Router(config.moe, config.hidden_size)
        self.experts = Experts(config)
        self.shared_experts = SharedExperts(config) if config.moe.shared_experts else None
        self.shared_expert_gate = SharedExpertGate(config.hidden_size) if config.moe.shared_expert_gate else None
        self._dispatcher: Any = None

    @property
    def dispatcher(self) -> Any:
        """Exchanges tokens between expert-parallel ranks. None if one rank holds all experts."""
        if self._dispatcher is None and self.groups.expert is not None:
            self._dispatcher = token_dispatcher(self.config.num_experts, self.groups.expert)
        return self._dispatcher

    def forward(
        self,
        x: Tensor,
        token_keys: Tensor | None = None,
        are_sinks: bool = False,
        experts: Tensor | None = None,
    ) -> Tensor:
        """Transform the residual stream x [T, B, D]. With sequence parallelism x is this rank's shard of it.

        token_keys, int64 [T, B], identify tokens for the router's noise. Sinks are routed as in evaluation. experts,
        int16 [T, B, k], replaces the router's choice, see models.moe.router.
        """
        routing = self.policy.run("moe_activation", self.router, x, token_keys, are_sinks, experts)
        tokens_ND = x.flatten(0, 1)
        if self.router.replicated:
            routed = self._apply_with_copies(tokens_ND, routing.gates, routing.routing_map, self.router.replicated)
        else:
            routed = self._through_experts(tokens_ND, routing, self._run_own_experts)
        y = routed.view_as(x)
        if self.shared_experts is not None:
            shared = self._run(self.shared_experts, enter_region(x, self.groups))
            y = y + (shared if self.shared_expert_gate is None else shared * self.shared_expert_gate(x))
        return y

    def _through_experts(self, x_ND: Tensor, routing: Routing, experts: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        if self.exchange is not None:
            return self.exchange(x_ND, routing.gates, experts, self.groups)
        return apply_experts(x_ND, routing.gates, routing.routing_map, experts, self.dispatcher, routing.rows)

    def _apply_with_copies(
        self, x_ND: Tensor, gates_NE: Tensor, routing_map_NE: Tensor, copied: Sequence[int]
    ) -> Tensor:
        """`apply_experts`, except that tokens for the replicated experts `copied` stay on their rank.

        A rank without such tokens takes part too: the other ranks wait for its gradients of the copies, which are zero.
        """
        # Only the experts' weights: neurons belong to no expert and are on every rank.
        weights = {
            name: replicate_experts(row.tensor, copied, self.groups)
            for name, row in parameter_rows(self.experts).items()
            if row.placement.expert
        }
        others = len(set(self.dispatcher.local_expert_indices).difference(copied))
        places = torch.tensor(copied, device=x_ND.device)

        def copies(*inputs: Any, **options: Any) -> Tensor:
            y_ND: Tensor = functional_call(self.experts, weights, inputs, options)
            return y_ND

        def run_copies(rows_ND: Tensor, tokens_per_expert_R: Tensor) -> Tensor:
            mean = routing_map_NE.sum() / routing_map_NE.shape[1]
            return self._run_experts(copies, rows_ND, tokens_per_expert_R, mean)

        def run_others(rows_ND: Tensor, tokens_per_expert_E: Tensor) -> Tensor:
            return self._run_experts(self.experts, rows_ND, tokens_per_expert_E, len(rows_ND) / max(others, 1))

        sent_map = routing_map_NE.index_fill(1, places, False)
        sent = apply_experts(x_ND, gates_NE, sent_map, run_others, self.dispatcher)
        own_gates, own_map = gates_NE.index_select(1, places), routing_map_NE.index_select(1, places)
        kept = apply_experts(x_ND, own_gates, own_map, run_copies, indices=places)
        return sent + kept

    def _run(self, experts: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        return self.policy.run("moe_experts", partial(experts, policy=self.policy), *inputs)

    def _run_own_experts(self, rows_ND: Tensor, tokens_per_expert_E: Tensor) -> Tensor:
        return self._run_experts(self.experts, rows_ND, tokens_per_expert_E, len(rows_ND) / len(tokens_per_expert_E))

    def _run_experts(
        self, experts: Callable[..., Tensor], rows_ND: Tensor, tokens_per_expert_E: Tensor, mean: Tensor | float
    ) -> Tensor:
        above = self.policy.busy_experts_above
        if above is None:
            return self._run(experts, rows_ND, tokens_per_expert_E)
        busy_E, busy_N, others_N = find_busy(tokens_per_expert_E, len(rows_ND), above, mean)
        if not len(busy_N):
            return self._run(experts, rows_ND, tokens_per_expert_E)
        with selected(others_N):
            kept = self._run(experts, rows_ND.index_select(0, others_N), tokens_per_expert_E * ~busy_E)
        with selected(busy_N):
            again = run_region(experts, rows_ND.index_select(0, busy_N), tokens_per_expert_E * busy_E, exact=False)
        # index_copy would save its source for backward.
        return torch.cat([kept, again]).index_select(0, torch.cat([others_N, busy_N]).argsort())


def find_busy(
    tokens_per_expert_E: Tensor, rows: int, above: float, mean: Tensor | float
) -> tuple[Tensor, Tensor, Tensor]:
    """Find the experts with more than `above` times `mean` rows.

    Without values (in a run on shapes alone) every expert is assumed to have the mean: all are busy, or none is.

    Returns:
        Whether each expert is busy, bool [E]; the indices of the busy experts' rows, and of the other rows. Both lists
        are ascending, and together they hold all `rows`.
    """
    if not has_values():
        busy = rows if above < 1 else 0
        return tokens_per_expert_E > 0, tokens_per_expert_E.new_zeros(busy), tokens_per_expert_E.new_zeros(rows - busy)
    busy_E = tokens_per_expert_E > above * mean
    of_busy_N = busy_E.repeat_interleave(tokens_per_expert_E, output_size=rows)
    return busy_E, of_busy_N.nonzero()[:, 0], (~of_busy_N).nonzero()[:, 0]


def _activate_and_project(
    policy: BlockPolicy, activation: str, gate: Tensor | None, up: Tensor, down: Callable[..., Tensor]
) -> Tensor:
    """Compute down(activation(gate, up)). The policy decides which tensors are kept for backward."""
    if gate is None:
        return policy.run_product(*_PLAIN[activation], (up,), down)
    return policy.run_product(*_GATED[activation], (gate, up), down)
