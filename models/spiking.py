"""Spiking neurons in front of a block's linear layers: x̂ = s V, with integer counts s = round(x / V).

A pattern chooses the linear layers (`model.spiking.layers`); kernels.spiking.neuron has arithmetic and gradient.
Thresholds are adaptive, V = mean|x| / k for each token (SpikingBrain, arXiv 2509.05276, section 3.3); or they come from
moving averages M of mean|x| over all tokens of a step, V = M / k, of a whole neuron or of each of its channels.

What reads one tensor has one neuron: the queries', keys', values' and gates' projections of a mixer, the gate and up
projection of a feed-forward. It computes x̂ once for all of them, and backward keeps it once. What enters a layer that
writes to the residual stream (o_proj, down_proj) has a neuron of its own. Under tensor parallelism the channels of such
an input lie on several ranks, and the mean is over all of them: one number a token is summed. Routed experts of a layer
share their neurons; every row has its own threshold.

Softmax attention may have neurons for its rotated queries, and keys and values in int8; the chosen linear layers may
have int8 weights (W8A-spike). Before `start_step` all are floats. All is a function of step, parameters, and the moving
averages, which an engine updates after a step from sums over all micro-batches and ranks, like the routers' loads.
"""

import difflib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kernels.autograd import once_differentiable
from kernels.documents import Documents
from kernels.quantization.int8 import fake_int8, fake_int8_weight
from kernels.shapes import has_values
from kernels.spiking import delta_changes, delta_levels, delta_spike, float_counts, spike
from kernels.spiking.neuron import LEAST_THRESHOLD, mean_abs
from models.auxiliary_loss import add_loss
from models.config import SpikingConfig
from models.parallel import Projection, sum_of_shares
from models.parameters import Drawing, Module, Placement, zeros
from models.saved_activations import is_recomputing

# Inputs that share a scale of int8 weights, as in the published W8A-spike models.
WEIGHT_GROUP = 128


def _start_log_k(block: Tensor, drawing: Drawing) -> None:
    block.fill_(math.log(drawing.config.spiking.k))


_AVERAGE = Placement(zeros, float32=True, decayed=False)


@dataclass(frozen=True)
class _Last:
    """What a neuron saw last, and what it gave."""

    x: Tensor
    version: int
    recorded: bool
    spikes: Tensor

    def is_of(self, x: Tensor) -> bool:
        """Whether these are the spikes of x: not of an earlier content, nor without the gradient that is asked for."""
        return self.x is x and self.version == x._version and self.recorded == torch.is_grad_enabled()

    def has_content_of(self, x: Tensor) -> bool:
        """Whether x is the same memory: ZeRO 3 gives each layer an alias of its input."""
        same = self.x.data_ptr() == x.data_ptr() and self.x.shape == x.shape
        return same and self.version == x._version


@dataclass(frozen=True)
class Order:
    """Which tokens of a micro-batch follow each other.

    Attributes:
        documents: Those packed into the row; None if every row is one sequence.
        group: Context-parallel ranks, which hold consecutive shards of the sequence; None if this rank has all of it.
        states: What neurons carry from token to token in generation, by name; None outside of it.
    """

    documents: Documents | None
    group: dist.ProcessGroup | None
    states: dict[str, Tensor] | None


_ORDER: ContextVar[Order | None] = ContextVar("order", default=None)


@contextmanager
def in_order(order: Order) -> Iterator[None]:
    """In here neurons know which tokens follow each other; also in what runs again, if that is in here."""
    token = _ORDER.set(order)
    try:
        yield
    finally:
        _ORDER.reset(token)


class Scheduled(Module):
    """A part of a spiking model, on from start_step on.

    Attributes:
        step: Number of training steps taken before this one; None once training is over.
    """

    step: int | None = None

    def __init__(self, config: SpikingConfig) -> None:
        super().__init__()
        self.config = config

    @property
    def is_on(self) -> bool:
        """Whether its time has come."""
        return self.config.is_on(self.step)


class Int8(Scheduled):
    """Keys or values [B, T, H, K] in int8, with a scale for each token and head."""

    def forward(self, x: Tensor) -> Tensor:
        """X rounded to int8; x itself before start_step."""
        return fake_int8(x) if self.is_on else x


class Int8Weight(Scheduled):
    """A weight [..., O, D] in int8, with a scale for each group of inputs.

    Args:
        config: `model.spiking`.
        is_split: Whether tensor-parallel ranks hold consecutive inputs each.
    """

    def __init__(self, config: SpikingConfig, is_split: bool) -> None:
        super().__init__(config)
        self.is_split = is_split

    def forward(self, weight: Tensor) -> Tensor:
        """The weight rounded to int8; itself before start_step."""
        group = self.groups.tensor if self.is_split else None
        return fake_int8_weight(weight, WEIGHT_GROUP, group=group) if self.is_on else weight


class Neuron(Scheduled):
    """The neurons of one input [..., D], for all linear layers that read it.

    Attributes:
        is_ready: Whether moving averages have begun. Until then, in the first step, thresholds are adaptive.
        statistics: Sums of |x| since the start of the step, float64 [1] or [D], and at the end the number of summands
            of each; None if nobody collects them, or nobody needs them.
        name: Of the input, unique in the layer.
        observer: Gets the counts [..., D] of every input once, while there are spikes (models.spiking_statistics).
        log_k: Logarithm of a learned k, which keeps k positive, float32 [1].
        magnitude: Moving average of mean|x|, float32 [1].
        magnitudes: That of each channel, float32 [D].
        loss_scale: Factor of a micro-batch's loss before backward.
        repeats: Whether tensor-parallel ranks all have the same input, so that each is to add its share of the loss.
    """

    placements: ClassVar = {
        "log_k": Placement(_start_log_k, float32=True, decayed=False),
        "magnitude": _AVERAGE,
        "magnitudes": _AVERAGE,
    }
    is_split: ClassVar[bool] = False
    is_ready: bool = False
    loss_scale: float = 1.0
    name: str = ""
    observer: Callable[[Tensor], None] | None = None

    def __init__(self, config: SpikingConfig, channels: int, repeats: bool = False) -> None:
        super().__init__(config)
        self.channels, self.repeats = channels, repeats
        kind = config.threshold
        self.log_k: nn.Parameter | None
        self.magnitude: Tensor | None
        self.magnitudes: Tensor | None
        self.register_parameter("log_k", nn.Parameter(torch.empty(1)) if kind == "learned" else None)
        self.register_buffer("magnitude", torch.zeros(1) if kind == "running" else None)
        self.register_buffer("magnitudes", torch.zeros(channels) if kind == "per_channel" else None)
        self.statistics: Tensor | None = None
        self._last: _Last | None = None

    @property
    def average(self) -> Tensor | None:
        """The moving average that thresholds come from, this rank's shard; None if they come from the tokens."""
        return self.magnitude if self.magnitudes is None else self.magnitudes

    def forward(self, x: Tensor) -> Tensor:
        """Spikes of x [..., D], times their thresholds; x itself before start_step."""
        if self._last is not None and self._last.is_of(x):
            return self._last.spikes
        training = self.training and torch.is_grad_enabled()
        if training and not is_recomputing():
            self._observe(x)
        y = self._fire(x) if self.is_on else self._leave_alone(x)
        if training and self.is_on and self.config.activity.loss != "none":
            y = add_loss(y, self._activity_loss(x), self.loss_scale)
        self._last = _Last(x, x._version, torch.is_grad_enabled(), y)
        return y

    def forget(self) -> None:
        """Forget the last input, at the end of the module that the linear layers are in."""
        self._last = None

    def count_options(self) -> dict[str, Any]:
        """What says how kernels.spiking counts: k or threshold, count_range and group."""
        k, average, bounds = self.config.k_at(self.step), self.average, self.config.count_range
        given: dict[str, Any] = {"k": k}
        if self.log_k is not None:
            given = {"k": self.log_k.float().exp()[0]}
        elif average is not None and (self.is_ready or not has_values()):
            given = {"threshold": (average[0] if self.magnitudes is None else average) / k}
        return given | {
            "count_range": None if bounds is None else tuple(bounds),
            "group": self.groups.tensor if self.is_split else None,
        }

    def _observer_of(self, x: Tensor) -> Callable[[Tensor], None] | None:
        """Who wants the counts of x, and has not got them for another layer that reads it."""
        known = self._last is not None and self._last.has_content_of(x)
        return None if known or is_recomputing() else self.observer

    def _fire(self, x: Tensor) -> Tensor:
        options = self.count_options()
        if self.config.code == "delta" and "threshold" in options:
            return self._fire_changes(x, options)
        if (observer := self._observer_of(x)) is not None:
            observer(float_counts(x, **options)[0])
        return spike(x, gradient=self.config.gradient, **options)

    def _fire_changes(self, x_TBD: Tensor, options: dict[str, Any]) -> Tensor:
        """What a receiver of temporal-delta spikes holds; only a dead zone lets it depend on earlier tokens."""
        order, zone = _ORDER.get(), self.config.dead_zone
        assert order is not None, "a block says which tokens follow each other"
        x_BTD, bounds = x_TBD.transpose(0, 1), options["count_range"]
        common: dict[str, Any] = {"threshold": options["threshold"], "dead_zone": zone, "count_range": bounds}
        state = None if order.states is None else order.states.get(self.name)
        place: dict[str, Any] = {"initial_state": state, "documents": order.documents, "group": order.group}
        if (observer := self._observer_of(x_TBD)) is not None:
            levels_BTD, _ = delta_levels(x_BTD, **common, **place)
            observer(delta_changes(levels_BTD, **place).transpose(0, 1))
        keeps = bool(zone) and order.states is not None
        y_BTD, last = delta_spike(x_BTD, gradient=self.config.gradient, output_final_state=keeps, **common, **place)
        if order.states is not None and last is not None:
            order.states[self.name] = last
        return y_BTD.transpose(0, 1)

    def _activity_loss(self, x: Tensor) -> Tensor:
        """The loss of a micro-batch, a sum over tokens, or this rank's share of it.

        |s| has the gradient of |x / V|, straight through; V is constant but for a learned k.
        """
        activity, options = self.config.activity, self.count_options()
        wide, ranks = x.float(), dist.get_world_size(self.groups.tensor) if self.groups.tensor is not None else 1
        threshold = options.get("threshold")
        if threshold is None:
            threshold = mean_abs(wide.detach(), options["group"]) / options["k"]
        # mean|x| of a token of zeros is 0; kernels.spiking has the same limit.
        ratio = wide / threshold.clamp(min=LEAST_THRESHOLD)
        low, high = options["count_range"] or (-math.inf, math.inf)
        counts = ratio + (ratio.round().clamp(low, high) - ratio).detach()
        mean = counts.abs().sum(-1) / (x.shape[-1] * (ranks if self.is_split else 1))
        if self.is_split:
            mean = sum_of_shares(mean, self.groups)
        loss = mean if activity.loss == "l1" else (mean - activity.target).square()
        # Where all ranks have the same input, or of split ones the same mean, each adds its part to the sum of all.
        return activity.weight * loss.sum() / (ranks if self.repeats else 1)

    def _leave_alone(self, x: Tensor) -> Tensor:
        """X itself; a learned k gets a gradient of zero, which reductions may wait for."""
        untouched: Tensor = x if self.log_k is None else _Unused.apply(x, self.log_k)
        return untouched

    @torch.no_grad()
    def _observe(self, x: Tensor) -> None:
        """Add a micro-batch to the step's sums; before start_step, too, so that thresholds are there when it comes."""
        if self.statistics is None:
            return
        magnitudes = x.detach().flatten(0, -2).abs()
        if self.magnitudes is None:
            self.statistics[0] += magnitudes.sum(dtype=torch.float64)
            self.statistics[-1] += magnitudes.numel()
            return
        ranks, rank, own = 1, 0, x.shape[-1]
        if self.is_split and self.groups.tensor is not None:
            ranks, rank = dist.get_world_size(self.groups.tensor), dist.get_rank(self.groups.tensor)
        # Of ranks with channels of their own each counts all tokens, and sums up a part.
        self.statistics[rank * own : (rank + 1) * own] += ranks * magnitudes.sum(0, dtype=torch.float64)
        self.statistics[-1] += len(magnitudes)

    @torch.no_grad()
    def begin(self, counts: bool) -> None:
        """Begin a step; `counts` resets the sums for the moving averages, if there are any."""
        self.forget()
        average = self.average
        if average is not None and not self.is_ready:
            # Read once: after an update, or a checkpoint that has one, it stays so.
            self.is_ready = bool(average.any())
        self.statistics = None
        if counts and average is not None:
            size = 1 if self.magnitudes is None else self.channels
            self.statistics = average.new_zeros(size + 1, dtype=torch.float64)

    @torch.no_grad()
    def update(self, sums: Tensor) -> None:
        """Move the averages towards the means of a step, given `statistics` summed over all ranks; the first are taken.

        Without a token, as of experts that got none, nothing moves.
        """
        average = self.average
        assert average is not None, "only moving averages are updated"
        mean = sums[:-1] / sums[-1].clamp(min=1)
        if self.is_split and self.magnitudes is not None and self.groups.tensor is not None:
            mean = mean.chunk(dist.get_world_size(self.groups.tensor))[dist.get_rank(self.groups.tensor)]
        kept = self.config.momentum if self.is_ready else 0.0
        moved = kept * average.double() + (1 - kept) * mean
        average.copy_(torch.where(sums[-1] > 0, moved, average.double()))


class SplitNeuron(Neuron):
    """Neurons of an input whose channels are divided among tensor-parallel ranks: that of a RowLinear."""

    placements: ClassVar = Neuron.placements | {
        "magnitudes": Placement(zeros, shard_axis=0, float32=True, decayed=False)
    }
    is_split: ClassVar = True


class _Unused(torch.autograd.Function):
    """Identity on x; the parameter gets zeros."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, parameter: Tensor) -> Tensor:
        ctx.like = parameter.detach().new_empty(()).expand(parameter.shape)
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, torch.zeros_like(ctx.like)


def add_neurons(layers: nn.ModuleDict, config: SpikingConfig, is_whole: bool) -> None:
    """Put neurons in front of the linear layers of these blocks that the configuration picks.

    Args:
        layers: The blocks of a decoder, or of a stage of it, by number.
        config: `model.spiking`.
        is_whole: Whether these are all blocks, among which every pattern must find something.

    Raises:
        ValueError: a pattern matches no linear layer, or routed experts would get changes.
    """
    if not config.layers:
        return
    owners = [(f"layers.{name}", module) for name, module in layers.named_modules() if isinstance(module, Module)]
    found = [(owner, path, list(_inputs(path, owner))) for path, owner in owners]
    if is_whole:
        _require_matches(config, [name for *_, inputs in found for _, named in inputs for name, _ in named])
    for owner, path, inputs in found:
        for name, named in inputs:
            readers = [projection for reader, projection in named if config.picks(reader)]
            if readers:
                _share(owner, path, name, readers, config)


def _require_matches(config: SpikingConfig, names: list[str]) -> None:
    for pattern in config.unmatched(names):
        close = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3) or names[:3]
        raise ValueError(
            f"model.spiking.layers: {pattern!r} matches no linear layer; close names are {', '.join(close)}, and all "
            "and released are sets of them"
        )


def _inputs(path: str, owner: Module) -> Iterator[tuple[str, list[tuple[str, Projection]]]]:
    """The inputs of a module's own linear layers: a name of each, and the layers that read it, by their names.

    Those that do not write to the residual stream read what enters the module, and so does the first of several in
    sequence; the later ones have inputs of their own.
    """
    entering: dict[int, list[tuple[str, Projection]]] = {}
    for name, child in owner.named_children():
        parts = child.named_children() if isinstance(child, nn.Sequential) else [("", child)]
        for number, (part, projection) in enumerate(parts):
            if not isinstance(projection, Projection):
                continue
            named = (f"{path}.{name}.{part}".rstrip("."), projection)
            if number or projection.placements["weight"].writes_residual:
                yield (f"{name}_{part}" if part else name), [named]
            else:
                entering.setdefault(_width(projection), []).append(named)
    for width, readers in entering.items():
        yield ("input" if len(entering) == 1 else f"input_{width}"), readers


def _width(projection: Projection) -> int:
    """Channels of a linear layer's input."""
    return projection.get_parameter("weight").shape[-1]


def _share(owner: Module, path: str, name: str, readers: list[Projection], config: SpikingConfig) -> None:
    """Give the layers one neuron, a part of the module that they are in, and int8 weights if they are to have them."""
    placement = readers[0].placements["weight"]
    if config.code == "delta" and placement.expert:
        raise ValueError(
            f"model.spiking.layers picks {path}, which gets tokens out of order, and code=delta sends their changes; "
            "leave routed experts out, or use code=counts"
        )
    is_split = placement.shard_axis == 1
    # Of routed experts every rank has rows of its own.
    repeats = not is_split and not placement.expert
    neuron = (SplitNeuron if is_split else Neuron)(config, _width(readers[0]), repeats)
    neuron.name = f"{path}.{name}"
    spikes = attach(owner, name, neuron)
    for reader in readers:
        reader.neuron = spikes
        if config.weights == "int8":
            reader.int8 = Int8Weight(config, is_split)
            reader.rounding = reader.int8.__call__


def attach(owner: Module, name: str, neuron: Neuron) -> Callable[[Tensor], Tensor]:
    """Make a neuron a part of the module in whose forward it runs, at the end of which it forgets what it saw.

    Returns:
        What gives the spikes of an input: the bound method, for as a module it would be a part of every reader, with
        parameters of several names.
    """
    group = getattr(owner, "neurons", None)
    if group is None:
        group = owner.neurons = nn.ModuleDict()
        # Whatever runs again, or for another micro-batch, begins anew; and no activation outlives its region.
        owner.register_forward_hook(_forget, always_call=True)
    group[name] = neuron
    spikes: Callable[[Tensor], Tensor] = neuron.__call__
    return spikes


def _forget(owner: Any, inputs: Any, output: Any) -> None:
    for neuron in owner.neurons.values():
        neuron.forget()


def neurons(models: Iterable[nn.Module]) -> list[Neuron]:
    """All neurons of models or stages, in module order."""
    return [module for model in models for module in model.modules() if isinstance(module, Neuron)]


def set_step(models: Sequence[nn.Module], step: int) -> None:
    """Set the schedules to a training step (steps taken before it)."""
    for model in models:
        for module in model.modules():
            if isinstance(module, Scheduled):
                module.step = step
    for neuron in neurons(models):
        neuron.begin(counts=False)


def begin_step(models: Sequence[nn.Module], step: int, loss_scale: float = 1.0) -> None:
    """Set the step and the factor of the loss before backward, and reset what neurons count."""
    set_step(models, step)
    for neuron in neurons(models):
        neuron.loss_scale = loss_scale
        neuron.begin(counts=True)


def finish_step(models: Iterable[nn.Module], group: dist.ProcessGroup | None) -> None:
    """Update the moving averages of a step that was not skipped. Every rank of the group calls this.

    Args:
        models: This rank's stages.
        group: All ranks that hold these stages or shards of them; None means all ranks of the run.
    """
    counting = [neuron for neuron in neurons(models) if neuron.statistics is not None]
    if not counting:
        return
    sums = [neuron.statistics for neuron in counting if neuron.statistics is not None]
    flat = torch.cat(sums)
    if dist.is_initialized() and dist.get_world_size(group) > 1:
        dist.all_reduce(flat, group=group)
    for neuron, total in zip(counting, flat.split([len(own) for own in sums]), strict=True):
        neuron.update(total)


def missing_tensors(model: nn.Module, stored: Iterable[str]) -> list[str]:
    """Tensors of neurons that are not among the stored ones: those of a model without spikes, or with other ones."""
    own = {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if isinstance(module, Neuron)
        for name in module.state_dict()
    }
    return sorted(own.difference(stored))
