"""What routers count in a step, summed over micro-batches and ranks, and what follows from it.

Each router adds up, once for each micro-batch (not again in the recomputation), float64 [E + 7]: the load of every
expert before any are dropped, then dropped assignments, entropy (nats), balance loss, z-loss, temperature, experts of
which every rank has a copy, each summed over tokens, and tokens. The engine sums the rows of all layers over all ranks,
along with the loss: every token is on one rank, and a pipeline stage has zeros for the layers that it lacks.
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
    """The routers of a rank's stages, by layer."""
    return {
        int(layer): module
        for decoder in decoders
        for layer, block in decoder.layers.items()
        for module in block.modules()
        if isinstance(module, Router)
    }


def set_step(decoders: Iterable[Decoder], step: int) -> None:
    """Have the routers' schedules stand where they do at a training step (steps taken before it)."""
    for router in routers(decoders).values():
        router.step = step


def begin_step(decoders: Iterable[Decoder], step: int, loss_scale: float = 1.0) -> None:
    """Tell the routers the step, and what the loss is multiplied with before backward; count from zero."""
    set_step(decoders, step)
    for router in routers(decoders).values():
        router.loss_scale = loss_scale
        router.choose_replicated()
        size = router.config.num_experts + len(_AFTER_LOAD)
        router.statistics = torch.zeros(size, dtype=torch.float64, device=router.weight.device)


def collect(decoders: Iterable[Decoder], config: ModelConfig) -> list[float]:
    """What this rank has counted, to be summed over all ranks: rows of all MoE layers, one after the other."""
    own = routers(decoders)
    if not config.moe_layers():
        return []
    device = next((router.weight.device for router in own.values()), torch.device("cpu"))
    empty = torch.zeros(config.moe.num_experts + len(_AFTER_LOAD), dtype=torch.float64, device=device)
    rows = [own[layer].statistics if layer in own else empty for layer in config.moe_layers()]
    # One read of the device, whatever the number of layers.
    counted: list[float] = torch.stack([row for row in rows if row is not None]).flatten().tolist()
    return counted


def finish_step(decoders: Iterable[Decoder], config: ModelConfig, totals: list[float]) -> None:
    """Bring selection biases and loads up to date with the sums over all ranks of what `collect` gave."""
    loads, _ = _parts(config, totals)
    own = routers(decoders)
    for layer, load in zip(config.moe_layers(), loads, strict=True):
        if layer not in own or load.sum() == 0:
            continue
        router = own[layer]
        if not router.config.is_spawned(router.step):
            # The only expert's load is no measure of a choice.
            continue
        if router.bias is not None:
            router.bias += config.moe.router.bias_update_rate * (load.mean() - load).sign().to(router.bias)
        if router.load is not None:
            router.load.copy_(load / load.sum())


def metrics(config: ModelConfig, totals: list[float]) -> dict[str, Any]:
    """The `moe/` metrics of a step from the sums over all ranks: means over layers, but `dead_experts`,
    `dropped_tokens` (assignments) and `replicated_experts`, which are sums, and `load`, the experts' shares by layer.
    """
    if not config.moe_layers():
        return {}
    loads, rest = _parts(config, totals)
    sums = dict(zip(_AFTER_LOAD, rest.unbind(-1), strict=True))
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
    """The loads [L, E] of the MoE layers, and the rest [L, 7]."""
    layers, experts = len(config.moe_layers()), config.moe.num_experts
    rows = torch.tensor(totals, dtype=torch.float64).view(layers, experts + len(_AFTER_LOAD) if layers else 0)
    return rows[:, :experts], rows[:, experts:]
