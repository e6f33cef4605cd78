"""Spike statistics of a model's neurons, collected in a training step or an evaluation, and measures by layer.

While statistics are collected, each neuron has an observer that receives its counts for every micro-batch, but not for
recomputations. The observer adds to a row, float64 [TALLIES + D]: the tallies of kernels.spiking.measures, and for each
channel the number of micro-batches in which it fired. The engine sums the rows of all neurons over all ranks, together
with the loss. Each count is tallied on one rank only: on the first tensor-parallel rank if all of them hold the same
channels, and on the rank that holds the channel if channels are sharded.

One tally takes as long as several spikes, so the engine collects statistics in some steps only.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from kernels.documents import Documents
from kernels.spiking.measures import TALLIES, Measures, Operations, tally
from models.config import ModelConfig
from models.decoder import Decoder, shapes
from models.parallel import Projection
from models.spiking import Neuron


@dataclass(frozen=True)
class Place:
    """A neuron's place in the whole model.

    Attributes:
        layer: Number of its layer.
        channels: Channels of its input, over all ranks.
        outputs: Outputs of the linear layers that read it, over all ranks; for routed experts, the outputs of one
            expert.
        is_routed: Whether it belongs to routed experts. It then sees a token once per expert that the token is sent to.
    """

    layer: int
    channels: int
    outputs: int
    is_routed: bool


@dataclass(frozen=True)
class Activity:
    """Spike statistics of one or several neurons.

    Attributes:
        measures: Measures of their counts.
        operations: Operations of the linear layers that read them.
        channels: Number of channels.
        silent_channels: Number of channels that never fired.
    """

    measures: Measures = field(default_factory=lambda: Measures.of([0.0] * TALLIES))
    operations: Operations = field(default_factory=Operations)
    channels: int = 0
    silent_channels: int = 0

    @classmethod
    def of(cls, place: Place, row: Sequence[float]) -> "Activity":
        """Compute a neuron's activity from its row of `collect`, summed over ranks."""
        measures = Measures.of(row[:TALLIES])
        silent = sum(not fired for fired in row[TALLIES:])
        return cls(measures, Operations.of(measures, place.outputs), place.channels, silent)

    def __add__(self, other: "Activity") -> "Activity":
        return Activity(
            self.measures + other.measures,
            self.operations + other.operations,
            self.channels + other.channels,
            self.silent_channels + other.silent_channels,
        )


class _Counter:
    """A neuron's observer during a step.

    Attributes:
        sums: The row of sums, float64 [TALLIES + D]. None if the observer has received no counts.
    """

    def __init__(self, neuron: Neuron, is_routed: bool) -> None:
        groups = neuron.groups
        self._channels, self._is_split = neuron.channels, neuron.is_split
        self._rank = 0 if groups.tensor is None else dist.get_rank(groups.tensor)
        # With sequence parallelism, each rank sends different tokens to the experts.
        self._counts = self._rank == 0 or neuron.is_split or (is_routed and groups.sequence)
        self.sums: Tensor | None = None

    def __call__(self, counts: Tensor) -> None:
        if not self._counts:
            return
        if self.sums is None:
            self.sums = torch.zeros(TALLIES + self._channels, dtype=torch.float64, device=counts.device)
        tallies = tally(counts)
        if self._is_split and self._rank:
            # Only the first rank counts the tokens, which all ranks share.
            tallies[-1] = 0
        self.sums[:TALLIES] += tallies
        own = counts.shape[-1]
        first = TALLIES + (self._rank * own if self._is_split else 0)
        self.sums[first : first + own] += (counts != 0).flatten(0, -2).any(0)


def named_neurons(decoders: Iterable[Decoder]) -> dict[str, Neuron]:
    """Return the neurons of a rank's stages by their names in the whole model, in module order.

    Neurons of queries are left out: the number of keys varies, so their spikes have no fixed number of operations.
    """
    return {
        name: module
        for decoder in decoders
        for name, module in decoder.named_modules()
        if isinstance(module, Neuron) and module.name
    }


_PLACES: dict[str, dict[str, Place]] = {}


def places(config: ModelConfig) -> dict[str, Place]:
    """Return the places of all neurons of the whole model, by name. The result is the same on every rank."""
    key = repr(config)
    if key not in _PLACES:
        _PLACES[key] = _find_places(shapes(config, 1)) if config.spiking.layers else {}
    return _PLACES[key]


def _find_places(model: Decoder) -> dict[str, Place]:
    outputs: dict[Neuron, int] = {}
    routed: dict[Neuron, bool] = {}
    for module in model.modules():
        if isinstance(module, Projection) and module.neuron is not None:
            # `module.neuron` is a bound method (models.spiking.attach).
            neuron = cast(Neuron, module.neuron.__self__)  # type: ignore[attr-defined]
            outputs[neuron] = outputs.get(neuron, 0) + module.get_parameter("weight").shape[-2]
            routed[neuron] = module.placements["weight"].expert
    return {
        name: Place(int(name.split(".")[1]), neuron.channels, outputs[neuron], routed[neuron])
        for name, neuron in named_neurons([model]).items()
    }


def begin(decoders: Iterable[Decoder], config: ModelConfig) -> None:
    """Start collecting: give every neuron an observer."""
    known = places(config)
    for name, neuron in named_neurons(decoders).items():
        neuron.observer = _Counter(neuron, known[name].is_routed)


def collect(decoders: Iterable[Decoder], config: ModelConfig) -> list[float]:
    """Stop collecting and return this rank's rows, which the engine sums over all ranks.

    The rows of all neurons of the whole model are concatenated, with zeros for neurons of other ranks' layers. The list
    is empty if the model has no neurons.
    """
    own = named_neurons(decoders)
    counted: dict[str, Tensor] = {}
    for name, neuron in own.items():
        if isinstance(neuron.observer, _Counter) and neuron.observer.sums is not None:
            counted[name] = neuron.observer.sums
        neuron.observer = None
    device = next((sums.device for sums in counted.values()), torch.device("cpu"))
    rows = []
    for name, place in places(config).items():
        empty = torch.zeros(TALLIES + place.channels, dtype=torch.float64, device=device)
        rows.append(counted.get(name, empty))
    # A single device-to-host copy for all neurons.
    collected: list[float] = torch.cat(rows).tolist() if rows else []
    return collected


def activities(config: ModelConfig, totals: Sequence[float]) -> dict[str, Activity]:
    """Return each neuron's activity by name, from the result of `collect` summed over all ranks."""
    found, first = {}, 0
    for name, place in places(config).items():
        size = TALLIES + place.channels
        found[name] = Activity.of(place, totals[first : first + size])
        first += size
    return found


def by_layer(config: ModelConfig, found: dict[str, Activity]) -> dict[int, Activity]:
    """Sum the activities of each layer's neurons. Return them by layer number; layers without neurons are left out."""
    layers: dict[int, Activity] = {}
    for name, place in places(config).items():
        layers[place.layer] = layers.get(place.layer, Activity()) + found[name]
    return layers


def tokens(config: ModelConfig, found: dict[str, Activity]) -> float:
    """Return the number of tokens counted. It is 0 if only routed experts have neurons: their rows are not tokens."""
    rows = [found[name].measures.rows for name, place in places(config).items() if not place.is_routed]
    return max(rows, default=0.0)


def metrics(config: ModelConfig, totals: Sequence[float]) -> dict[str, Any]:
    """Compute a step's `spiking/` metrics from the sums over all ranks. Return none if nothing was counted.

    Metrics named `_by_layer` are lists with one value per layer that has neurons.
    """
    if not totals:
        return {}
    found = activities(config, totals)
    layers = by_layer(config, found)
    total = sum(layers.values(), Activity())
    if not total.measures.counts:
        # Before start_step.
        return {}
    named = summary(total, tokens(config, found))
    rows = [summary(layer, tokens(config, found)) for layer in layers.values()]
    shown = "sparsity", "firing_rate", "silent_channels", "picojoules_per_token"
    return {f"spiking/{name}": value for name, value in named.items()} | {
        f"spiking/{name}_by_layer": [[row[name] for row in rows]] for name in shown if name in named
    }


def summary(activity: Activity, counted: float) -> dict[str, float]:
    """Return an activity's measures by name (docs/spiking.md).

    `counted` is the number of tokens. If it is 0, the operations and the energy per token are left out.
    """
    measures, operations = activity.measures, activity.operations
    named = {
        "sparsity": measures.sparsity,
        "sparsity_all_steps": measures.sparsity_all_steps,
        "firing_rate": measures.firing_rate,
        "mean_count": measures.mean_count,
        "within_window": measures.within_window,
        "silent": measures.silent,
        "silent_channels": activity.silent_channels / max(activity.channels, 1),
        "energy_saved": operations.saved(operations.picojoules_fp16),
    }
    if counted:
        named |= {
            "operations_per_token": operations.additions / counted,
            "picojoules_per_token": operations.picojoules / counted,
        }
    return {name: 0.0 if math.isnan(value) else value for name, value in named.items()}


@torch.no_grad()
def record(
    decoder: Decoder, tokens_BT: Tensor, positions_BT: Tensor, documents: Documents | None = None
) -> dict[str, Tensor]:
    """Run the decoder and return every neuron's counts [T, B, D], by name.

    Routed experts are left out, because their rows are not in token order. Before start_step the result is empty.
    """
    known, counts = places(decoder.model_config), dict[str, Tensor]()
    own = {name: neuron for name, neuron in named_neurons([decoder]).items() if not known[name].is_routed}
    try:
        for name, neuron in own.items():
            neuron.observer = partial(counts.__setitem__, name)
        decoder.hidden_states(tokens_BT, positions_BT, documents)
    finally:
        for neuron in own.values():
            neuron.observer = None
    return counts


def rasters(counts: dict[str, Tensor], channels: int, tokens_shown: int) -> dict[str, np.ndarray]:
    """Select `channels` evenly spaced channels and the first tokens of batch row 0 from the result of `record`.

    Returns:
        Counts [channels, T] for each neuron, by name.
    """
    found = {}
    for name, counts_TBD in counts.items():
        first_TD = counts_TBD[:tokens_shown, 0]
        step = max(first_TD.shape[1] // channels, 1)
        found[name] = first_TD[:, ::step][:, :channels].T.float().cpu().numpy()
    return found
