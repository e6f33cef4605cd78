"""Collects the routers' counters of a step, sums them over micro-batches and ranks, and updates the routers.

Each router adds to float64 [E + 7], once per micro-batch and not in its recomputation. The first E entries are the load
of every expert before any assignment is dropped. Then come dropped assignments, entropy (nats), balance loss, z-loss,
temperature and replicated experts, each summed over tokens, and the number of tokens. The engine sums the rows of all
layers over all ranks, together with the loss. Each token counts on one rank, and a pipeline stage contributes zeros for
layers that it lacks.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from models.config import ModelConfig
from models.decoder import Decoder
from models.moe.router import Router

_AFTER_LOAD = ("dropped", "entropy", "balance", "z", "temperature", "replicated", "tokens")


def routers(decoders: Iterable[Decoder]) -> dict[int, Router]:
    """Return the routers of a rank's stages, by layer."""
    return {
        int(layer): module
        for decoder in decoders
        for layer, block in decoder.layers.items()
        for module in block.modules()
        if isinstance(module, Router)
    }


def set_step(decoders: Iterable[Decoder], step: int) -> None:
    """Set the routers' schedules to a training step (steps taken before it)."""
    for router in routers(decoders).values():
        router.step = step


def begin_step(decoders: Iterable[Decoder], step: int, loss_scale: float = 1.0) -> None:
    """Set the routers' step and the factor of the loss before backward, and reset the counters."""
    set_step(decoders, step)
    for router in routers(decoders).values():
        router.loss_scale = loss_scale
        router.choose_replicated()
        size = router.config.num_experts + len(_AFTER_LOAD)
        router.statistics = torch.zeros(size, dtype=torch.float64, device=router.weight.device)


def collect(decoders: Iterable[Decoder], config: ModelConfig) -> list[float]:
    """Return this rank's counters, to be summed over all ranks: the rows of all MoE layers, concatenated."""
    own = routers(decoders)
    if not config.moe_layers():
        return []
    device = next((router.weight.device for router in own.values()), torch.device("cpu"))
    empty = torch.zeros(config.moe.num_experts + len(_AFTER_LOAD), dtype=torch.float64, device=device)
    # Every rank sends all layers, because the sum needs equal lengths.
    rows = [own[layer].statistics if layer in own else empty for layer in config.moe_layers()]
    # A single device-to-host copy for all layers.
    counted: list[float] = torch.stack([row for row in rows if row is not None]).flatten().tolist()
    return counted


def finish_step(decoders: Iterable[Decoder], config: ModelConfig, totals: list[float]) -> None:
    """Update selection biases and loads from the sums over all ranks of `collect`."""
    loads, _ = _parts(config, totals)
    own = routers(decoders)
    for layer, load in zip(config.moe_layers(), loads, strict=True):
        if layer not in own or load.sum() == 0:
            continue
        router = own[layer]
        if not router.config.is_spawned(router.step):
            # Before spawning all tokens go to one expert, so the load measures no choice.
            continue
        # A fixed step towards the mean load (auxiliary-loss-free balancing, arXiv 2408.15664).
        if router.bias is not None:
            router.bias += config.moe.router.bias_update_rate * (load.mean() - load).sign().to(router.bias)
        if router.load is not None:
            router.load.copy_(load / load.sum())


def metrics(config: ModelConfig, totals: list[float]) -> dict[str, Any]:
    """Compute the `moe/` metrics of a step from the sums over all ranks.

    Without a routed token there are none.

    Metrics are means over layers, except the sums `dead_experts`, `dropped_tokens` (assignments) and
    `replicated_experts`, and `load`, which holds the experts' shares by layer.
    """
    if not config.moe_layers():
        return {}
    loads, rest = _parts(config, totals)
    sums = dict(zip(_AFTER_LOAD, rest.unbind(-1), strict=True))
    if not sums["tokens"].any():
        # Alignment runs no feed-forward.
        return {}
    tokens = sums["tokens"].clamp(min=1)
    mean = loads.mean(-1).clamp(min=1e-9)
    named = {
        "experts_per_token": ((loads.sum(-1) - sums["dropped"]) / tokens).mean(),
        "load_cv": (loads.std(-1, correction=0) / mean).mean(),
        "max_load": (loads.amax(-1) / mean).mean(),
        "entropy": (sums["entropy"] / tokens).mean(),
        "dropped_tokens": sums["dropped"].sum(),
        "dead_experts": (loads == 0).sum(),
        "replicated_experts": (sums["replicated"] / tokens).sum(),
        "balance_loss": (sums["balance"] / tokens).mean(),
        "z_loss": (sums["z"] / tokens).mean(),
        "temperature": (sums["temperature"] / tokens).mean(),
    }
    shares = loads / loads.sum(-1, keepdim=True).clamp(min=1)
    return {f"moe/{name}": float(value) for name, value in named.items()} | {"moe/load": shares.tolist()}


def _parts(config: ModelConfig, totals: list[float]) -> tuple[Tensor, Tensor]:
    """Split the sums into the loads [L, E] of the MoE layers, and the rest [L, 7]."""
    layers, experts = len(config.moe_layers()), config.moe.num_experts
    rows = torch.tensor(totals, dtype=torch.float64).view(layers, experts + len(_AFTER_LOAD) if layers else 0)
    return rows[:, :experts], rows[:, experts:]
