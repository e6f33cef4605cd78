"""Mixtures of experts of transformers' decoders: the router's settings, and one matrix an expert or all in one.

transformers' own files hold a matrix for each expert. Its version 5 computes with all experts of a layer in one tensor,
gate above up, and can store it so.
"""

from collections.abc import Container, Sequence

from models.config import ModelConfig
from models.hub.adapter import Adapter
from models.hub.tensors import Copy, everything, rows


def require_experts(adapter: Adapter, model: ModelConfig) -> None:
    """Check that softmax, top-k and SwiGLU are all that the model's experts need.

    Raises:
        ValueError: they need more, which the message names.
    """
    moe, router = model.moe, model.moe.router
    adapter.refuse(router.gate != "top_k", f"model.moe.router.gate={router.gate}")
    adapter.refuse(router.score != "softmax", f"model.moe.router.score={router.score}")
    adapter.refuse(router.num_groups > 1, f"model.moe.router.num_groups={router.num_groups}")
    adapter.refuse(router.bias_update_rate > 0, f"model.moe.router.bias_update_rate={router.bias_update_rate}")
    adapter.refuse(moe.activation != "swiglu", f"model.moe.activation={moe.activation}")


def constant(name: str, model: ModelConfig) -> float | None:
    """The load of the previous step, which only training reads: even, as at the start of a run."""
    return 1 / model.moe.num_experts if name.endswith(".ffn.router.load") else None


def place_experts(
    kind: str, shape: Sequence[int], fused: str, single: str, names: dict[str, str], stored: Container[str]
) -> list[Copy]:
    """Where the experts' gate, up or down projections [E, O, D] are stored.

    Args:
        kind: gate_proj, up_proj or down_proj.
        shape: Shape of our parameter.
        fused: Prefix of the tensors of all experts, such as model.layers.0.mlp.experts.
        single: Prefix of one expert's, before its number.
        names: One expert's name of each kind.
        stored: Names of the tensors in the files.
    """
    together = f"{fused}.down_proj" if kind == "down_proj" else f"{fused}.gate_up_proj"
    if together in stored:
        experts, outputs, _ = shape
        start = outputs if kind == "up_proj" else 0
        block = (slice(0, experts), *rows(start, start + outputs, shape[1:]))
        return [Copy(everything(shape), together, block)]
    matrix = everything(shape[1:])
    return [Copy((e, *matrix), f"{single}.{e}.{names[kind]}.weight", matrix) for e in range(shape[0])]
