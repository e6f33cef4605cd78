"""Spiking neurons in front of a block's linear layers: x̂ = s V, with integer counts s = round(x / V).

`model.spiking.layers` selects the linear layers by name patterns. kernels.spiking.neuron implements the arithmetic and
the gradient. Thresholds are adaptive, V = mean|x| / k for each token (SpikingBrain, arXiv 2509.05276, section 3.3), or
come from running averages M of mean|x| over all tokens of a step, V = M / k. There is one average per neuron or one per
channel.

Linear layers that read the same tensor share one neuron: a mixer's query, key, value and gate projections, or a
feed-forward's gate and up projections. The neuron computes x̂ once for all of them, and backward keeps x̂ once. A layer
that writes to the residual stream (o_proj, down_proj) has its own neuron. Under tensor parallelism, the channels of its
input are sharded. The mean is then over the channels of all ranks, which all-reduces one number per token. The routed
experts of a layer share their neurons; an adaptive threshold is still computed for each row.

Softmax attention can have neurons for its rotated queries, and int8 keys and values. The selected linear layers can
have int8 weights (W8A-spike). Before `start_step`, everything is in floating point. Results depend only on the step,
the parameters and the running averages. After each step, the engine updates the averages from sums over all
micro-batches and ranks, as it does for the routers' loads.
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

# Number of inputs that share a scale in int8 weights, as in the published W8A-spike models.
WEIGHT_GROUP = 128


def _start_log_k(block: Tensor, drawing: Drawing) -> None:
    block.fill_(math.log(drawing.config.spiking.k))


_AVERAGE = Placement(zeros, float32=True, decayed=False)


@dataclass(frozen=True)
class _Last:
    """A neuron's last input and output.

    Attributes:
        x: The input.
        version: The input's version counter at that time.
        recorded: Whether autograd recorded the output.
        spikes: The output.
    """

    x: Tensor
    version: int
    recorded: bool
    spikes: Tensor

    def is_of(self, x: Tensor) -> bool:
        """Return whether `spikes` can serve as the output for x: same tensor, same content, same gradient mode."""
        return self.x is x and self.version == x._version and self.recorded == torch.is_grad_enabled()

    def has_content_of(self, x: Tensor) -> bool:
        """Return whether x has the same memory and content. Under ZeRO 3 each layer gets an alias of its input."""
        same = self.x.data_ptr() == x.data_ptr() and self.x.shape == x.shape
        return same and self.version == x._version


@dataclass(frozen=True)
class Order:
    """The order of a micro-batch's tokens, which temporal-delta spikes need.

    Attributes:
        documents: Documents packed into the row. None if every row is one sequence.
        group: Context-parallel ranks, which hold consecutive shards of the sequence. None if this rank holds all of it.
        states: States that neurons carry from token to token in generation, by neuron name. None outside generation.
        are_sinks: Whether the tokens are sinks, which count neither for statistics nor for activity losses.
    """

    documents: Documents | None
    group: dist.ProcessGroup | None
    states: dict[str, Tensor] | None
    are_sinks: bool = False


_ORDER: ContextVar[Order | None] = ContextVar("order", default=None)


def _are_sinks() -> bool:
    order = _ORDER.get()
    return order is not None and order.are_sinks


def _counts() -> bool:
    """Whether the tokens of this forward pass count: those of a recomputed one have been counted."""
    return not is_recomputing() and not _are_sinks()


@contextmanager
def in_order(order: Order) -> Iterator[None]:
    """Context in which neurons use `order`. A recomputed forward must run inside it, too."""
    token = _ORDER.set(order)
    try:
        yield
    finally:
        _ORDER.reset(token)


class Scheduled(Module):
    """A part of a spiking model that is switched on at `start_step`.

    Attributes:
        step: Number of training steps taken before this one. None after training.
    """

    step: int | None = None

    def __init__(self, config: SpikingConfig) -> None:
        super().__init__()
        self.config = config

    @property
    def is_on(self) -> bool:
        """Whether `start_step` is reached."""
        return self.config.is_on(self.step)


class Int8(Scheduled):
    """Rounds keys or values [B, T, H, K] to int8, with one scale per token and head."""

    def forward(self, x: Tensor) -> Tensor:
        """Quantize and dequantize x. Before start_step return x."""
        return fake_int8(x) if self.is_on else x


class Int8Weight(Scheduled):
    """Rounds a weight [..., O, D] to int8, with one scale per output and group of inputs.

    Args:
        config: `model.spiking`.
        is_split: Whether the inputs are sharded over tensor-parallel ranks.
    """

    def __init__(self, config: SpikingConfig, is_split: bool) -> None:
        super().__init__(config)
        self.is_split = is_split

    def forward(self, weight: Tensor) -> Tensor:
        """Quantize and dequantize the weight. Before start_step return it unchanged."""
        group = self.groups.tensor if self.is_split else None
        return fake_int8_weight(weight, WEIGHT_GROUP, group=group) if self.is_on else weight


class Neuron(Scheduled):
    """The neuron of one input [..., D], shared by all linear layers that read it.

    Attributes:
        is_ready: Whether the running averages are initialised. Until then, in the first step, thresholds are adaptive.
        statistics: Sums of |x| since the start of the step for the running averages, float64 [1] or [D], with the
            number of summands of each sum appended. None if the step does not collect them, or thresholds need none.
        name: Path of the owning module and the name of the input. Empty for the neurons of queries.
        observer: Called once with the counts [..., D] of every input while the neuron is on
            (models.spiking_statistics).
        log_k: Logarithm of a learned k, float32 [1]. The logarithm keeps k positive.
        magnitude: Running average of mean|x|, float32 [1].
        magnitudes: Running average of each channel's mean|x|, float32 [D].
        loss_scale: Factor by which a micro-batch's loss is multiplied before backward.
        repeats: Whether all tensor-parallel ranks have the same input. Each rank then adds an equal share of the
            activity loss.
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
        """The running average for the thresholds, this rank's shard. None if thresholds come from the tokens."""
        return self.magnitude if self.magnitudes is None else self.magnitudes

    def forward(self, x: Tensor) -> Tensor:
        """Compute x̂ = s V for x [..., D]. Before start_step return x."""
        if self._last is not None and self._last.is_of(x):
            return self._last.spikes
        training = self.training and torch.is_grad_enabled()
        if training and _counts():
            self._observe(x)
        y = self._fire(x) if self.is_on else self._leave_alone(x)
        if training and self.is_on and self.config.activity.loss != "none" and not _are_sinks():
            y = add_loss(y, self._activity_loss(x), self.loss_scale)
        self._last = _Last(x, x._version, torch.is_grad_enabled(), y)
        return y

    def forget(self) -> None:
        """Forget the last input and output. Called at the end of the owning module's forward."""
        self._last = None

    def count_options(self) -> dict[str, Any]:
        """Return the arguments of kernels.spiking that determine counts: k or threshold, count_range and group."""
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
        """Return the observer, or None if it already got the counts of x, or if x is a recomputed input."""
        known = self._last is not None and self._last.has_content_of(x)
        return None if known or not _counts() else self.observer

    def _fire(self, x: Tensor) -> Tensor:
        options = self.count_options()
        if self.config.code == "delta" and "threshold" in options:
            return self._fire_changes(x, options)
        if (observer := self._observer_of(x)) is not None:
            observer(float_counts(x, **options)[0])
        return spike(x, gradient=self.config.gradient, **options)

    def _fire_changes(self, x_TBD: Tensor, options: dict[str, Any]) -> Tensor:
        """Compute x̂ with temporal-delta spikes. Only with a dead zone does it depend on earlier tokens."""
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
        """Return a micro-batch's activity loss, summed over tokens, or this rank's share of it.

        The gradient of |s| is that of |x / V| (straight-through estimator). V is a constant unless k is learned.
        """
        activity, options = self.config.activity, self.count_options()
        wide, ranks = x.float(), dist.get_world_size(self.groups.tensor) if self.groups.tensor is not None else 1
        threshold = options.get("threshold")
        if threshold is None:
            threshold = mean_abs(wide.detach(), options["group"]) / options["k"]
        # mean|x| is 0 for a token of zeros. kernels.spiking has the same lower limit.
        ratio = wide / threshold.clamp(min=LEAST_THRESHOLD)
        low, high = options["count_range"] or (-math.inf, math.inf)
        counts = ratio + (ratio.round().clamp(low, high) - ratio).detach()
        mean = counts.abs().sum(-1) / (x.shape[-1] * (ranks if self.is_split else 1))
        if self.is_split:
            mean = sum_of_shares(mean, self.groups)
        loss = mean if activity.loss == "l1" else (mean - activity.target).square()
        # If all tensor-parallel ranks have the same input, each adds an equal share, and the shares sum to the loss.
        return activity.weight * loss.sum() / (ranks if self.repeats else 1)

    def _leave_alone(self, x: Tensor) -> Tensor:
        """Return x. A learned k gets a zero gradient, because gradient reductions may wait for it."""
        untouched: Tensor = x if self.log_k is None else _Unused.apply(x, self.log_k)
        return untouched

    @torch.no_grad()
    def _observe(self, x: Tensor) -> None:
        """Add a micro-batch to the step's sums. This also runs before start_step, so that thresholds exist by then."""
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
        # With sharded channels every rank counts all tokens, so the summed number of tokens is `ranks` times too large.
        # The factor `ranks` compensates in the sums of |x|.
        self.statistics[rank * own : (rank + 1) * own] += ranks * magnitudes.sum(0, dtype=torch.float64)
        self.statistics[-1] += len(magnitudes)

    @torch.no_grad()
    def begin(self, counts: bool) -> None:
        """Begin a step. With `counts`, reset the sums for the running averages, if the neuron has any."""
        self.forget()
        average = self.average
        if average is not None and not self.is_ready:
            # Synchronises with a GPU until the averages are initialised, by an update or from a checkpoint.
            self.is_ready = bool(average.any())
        self.statistics = None
        if counts and average is not None:
            size = 1 if self.magnitudes is None else self.channels
            self.statistics = average.new_zeros(size + 1, dtype=torch.float64)

    @torch.no_grad()
    def update(self, sums: Tensor) -> None:
        """Update the running averages from `statistics` summed over all ranks.

        The first update sets them to the step's means. If there was no token, as can happen to experts, they keep their
        values.
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
    """The neuron of an input whose channels are sharded over tensor-parallel ranks: the input of a RowLinear."""

    placements: ClassVar = Neuron.placements | {
        "magnitudes": Placement(zeros, shard_axis=0, float32=True, decayed=False)
    }
    is_split: ClassVar = True


class _Unused(torch.autograd.Function):
    """Identity on x, with a zero gradient for the parameter."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, parameter: Tensor) -> Tensor:
        ctx.like = parameter.detach().new_empty(()).expand(parameter.shape)
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, torch.zeros_like(ctx.like)


def add_neurons(layers: nn.ModuleDict, config: SpikingConfig, is_whole: bool) -> None:
    """Put neurons in front of the linear layers that the configuration selects.

    Args:
        layers: The blocks of a decoder or of one of its stages, by layer number.
        config: `model.spiking`.
        is_whole: Whether these are all blocks of the model. If so, every pattern must match a linear layer.

    Raises:
        ValueError: a pattern matches no linear layer, or routed experts would get temporal-delta spikes.
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
            f"model.spiking.layers: {pattern!r} matches no linear layer; the closest names are {', '.join(close)}, and "
            "the presets are all and released"
        )


def _inputs(path: str, owner: Module) -> Iterator[tuple[str, list[tuple[str, Projection]]]]:
    """Yield the inputs of a module's own linear layers: each input's name, and the named layers that read it.

    A linear layer reads the module's input unless it writes to the residual stream. In an nn.Sequential, only the first
    linear layer does so. Each other linear layer has an input of its own.
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
    """Return the number of input channels of a linear layer on this rank."""
    return projection.get_parameter("weight").shape[-1]


def _share(owner: Module, path: str, name: str, readers: list[Projection], config: SpikingConfig) -> None:
    """Give the layers a shared neuron, which becomes a submodule of their owner, and int8 weights if configured."""
    placement = readers[0].placements["weight"]
    if config.code == "delta" and placement.expert:
        raise ValueError(
            f"model.spiking.layers selects the routed experts {path}, whose tokens do not follow each other, but "
            "code=delta sends changes from token to token; leave routed experts out of layers, or use code=counts"
        )
    is_split = placement.shard_axis == 1
    # Routed experts have different rows on every rank.
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
    """Make a neuron a submodule of `owner`, at the end of whose forward it forgets its last input.

    Returns:
        The neuron as a function from an input to its spikes. It is a bound method: readers that stored the module
        itself would register it as their submodule, and its parameters would have several names.
    """
    group = getattr(owner, "neurons", None)
    if group is None:
        group = owner.neurons = nn.ModuleDict()
        # Recomputation and the next micro-batch then start afresh, and no activation outlives its recomputed region.
        owner.register_forward_hook(_forget, always_call=True)
    group[name] = neuron
    spikes: Callable[[Tensor], Tensor] = neuron.__call__
    return spikes


def _forget(owner: Any, inputs: Any, output: Any) -> None:
    for neuron in owner.neurons.values():
        neuron.forget()


def neurons(models: Iterable[nn.Module]) -> list[Neuron]:
    """Return all neurons of models or stages, in module order."""
    return [module for model in models for module in model.modules() if isinstance(module, Neuron)]


def set_step(models: Sequence[nn.Module], step: int) -> None:
    """Set the schedules to a training step, given as the number of steps taken before it."""
    for model in models:
        for module in model.modules():
            if isinstance(module, Scheduled):
                module.step = step
    for neuron in neurons(models):
        neuron.begin(counts=False)


def begin_step(models: Sequence[nn.Module], step: int, loss_scale: float = 1.0) -> None:
    """Set the step and the factor of the loss before backward, and reset the neurons' sums."""
    set_step(models, step)
    for neuron in neurons(models):
        neuron.loss_scale = loss_scale
        neuron.begin(counts=True)


def finish_step(models: Iterable[nn.Module], group: dist.ProcessGroup | None) -> None:
    """Update the running averages after a step that was not skipped. Every rank of the group must call this.

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
    """Return the names of neuron tensors that `stored` lacks, because it has no spikes or other thresholds."""
    own = {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if isinstance(module, Neuron)
        for name in module.state_dict()
    }
    return sorted(own.difference(stored))
