"""The mixture-of-experts feed-forward: routed and shared experts (axes: N tokens, E experts, O outputs, D inputs).

y = sum over the kept experts e of gate_e(x) FFN_e(x), plus FFN_shared(x) (arXiv 1701.06538, 2401.06066). Nothing has a
size of tokens times experts times width: rows are gathered by expert, multiplied group by group, and added up.
"""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.activations import swiglu
from kernels.moe import grouped_linear
from models.config import ModelConfig
from models.moe.router import Router
from models.parallel import WHOLE, ColumnLinear, Groups, RowLinear, apply_experts, enter_region

_GATED = {"swiglu": swiglu, "geglu": lambda gate, up: F.gelu(gate) * up}
_PLAIN = {"gelu": F.gelu, "relu_squared": lambda x: F.relu(x).square()}


class ExpertLinear(nn.Module):
    """One linear layer for each expert. Weight [E, O, D]; expert-parallel ranks have consecutive experts of it."""

    expert_weights: ClassVar = ("weight",)

    def __init__(self, experts: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, outputs, inputs))

    def forward(self, rows_ND: Tensor, tokens_per_expert_E: Tensor) -> Tensor:
        """Multiply the rows, of which each expert has so many one after the other: [N, D] to [N, O]."""
        return grouped_linear(rows_ND, self.weight, tokens_per_expert_E)


class ExpertRowLinear(ExpertLinear):
    """ExpertLinear that writes into the residual stream."""

    writes_residual: ClassVar = True


class Experts(nn.Module):
    """The routed experts that this rank has."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        experts, d_model, d_ffn = config.moe.num_experts, config.hidden_size, config.expert_hidden_size
        self.activation = config.moe.activation
        self.gate_proj = ExpertLinear(experts, d_model, d_ffn) if self.activation in _GATED else None
        self.up_proj = ExpertLinear(experts, d_model, d_ffn)
        self.down_proj = ExpertRowLinear(experts, d_ffn, d_model)

    def forward(self, rows_ND: Tensor, tokens_per_expert_E: Tensor) -> Tensor:
        """Transform the rows, sorted by expert."""
        up = self.up_proj(rows_ND, tokens_per_expert_E)
        gate = None if self.gate_proj is None else self.gate_proj(rows_ND, tokens_per_expert_E)
        down_ND: Tensor = self.down_proj(_activate(self.activation, gate, up), tokens_per_expert_E)
        return down_ND


class SharedExperts(nn.Module):
    """The experts that every token goes to, as one feed-forward of their width together; cut as a dense one is."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d_model, d_ffn = config.hidden_size, config.moe.shared_experts * config.expert_hidden_size
        self.activation = config.moe.activation
        gated = self.activation in _GATED
        self.gate_proj = ColumnLinear(d_model, d_ffn, bias=False) if gated else None
        self.up_proj = ColumnLinear(d_model, d_ffn, bias=False)
        self.down_proj = RowLinear(d_ffn, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Transform x [T, B, D]."""
        gate = None if self.gate_proj is None else self.gate_proj(x)
        down: Tensor = self.down_proj(_activate(self.activation, gate, self.up_proj(x)))
        return down


class MoELayer(nn.Module):
    """Routed and shared experts in place of a feed-forward.

    Attributes:
        dispatcher: Exchanges tokens between the ranks that share the experts (models.parallel.token_dispatcher).
    """

    groups: Groups = WHOLE
    dispatcher: Any = None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config.moe
        self.router = Router(config.moe, config.hidden_size)
        self.experts = Experts(config)
        self.shared_experts = SharedExperts(config) if config.moe.shared_experts else None

    def forward(self, x: Tensor, token_keys: Tensor | None = None) -> Tensor:
        """Transform the residual stream x [T, B, D], with sequence parallelism this rank's part of it.

        token_keys, int64 [T, B], tell the tokens apart for the router's noise.
        """
        routing = self.router(x, token_keys)
        tokens_ND = x.flatten(0, 1)
        routed = apply_experts(tokens_ND, routing.gates, routing.routing_map, self.experts, self.dispatcher)
        y = routed.view_as(x)
        if self.shared_experts is not None:
            y = y + self.shared_experts(enter_region(x, self.groups))
        return y


def _activate(name: str, gate: Tensor | None, up: Tensor) -> Tensor:
    return _PLAIN[name](up) if gate is None else _GATED[name](gate, up)
