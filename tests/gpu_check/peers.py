"""flash-linear-attention's functions on our inputs, where it is installed; tensors have the same shapes there."""

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec

from torch import Tensor

# Module and function, and which of our inputs it takes under which name. Neither has an initial state here.
_FUNCTIONS = {
    "gated_delta_rule": ("gated_delta_rule", "chunk_gated_delta_rule", {"log_decay": "g", "beta": "beta"}),
    "kimi_delta_rule": ("kda", "chunk_kda", {"log_decay": "g", "beta": "beta"}),
    "delta_rule": ("delta_rule", "chunk_delta_rule", {"beta": "beta"}),
    "gla": ("gla", "chunk_gla", {"log_decay": "g"}),
    "retention": ("retention", "chunk_retention", {}),
}


def fla_call(op: str) -> Callable[[dict[str, Tensor]], Tensor] | None:
    """The function of q, k, v and what else `op` has that gives o; None without fla-core or its like of `op`."""
    if op not in _FUNCTIONS or find_spec("fla") is None:
        return None
    module, name, others = _FUNCTIONS[op]
    function = getattr(import_module(f"fla.ops.{module}"), name)

    def call(inputs: dict[str, Tensor]) -> Tensor:
        given = {theirs: inputs[ours] for ours, theirs in others.items()}
        o: Tensor = function(q=inputs["q"], k=inputs["k"], v=inputs["v"], **given)[0]
        return o

    return call
