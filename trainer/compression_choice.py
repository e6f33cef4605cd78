"""Choose the bits of every place in train.compression from measurements of its bytes and its gradient error.

A place is a tensor of a module that compression encodes (models.compression). Let g be the gradient of all parameters
on one micro-batch, and g_pb the gradient if only place p is stored, in b bits. Its relative squared error is

    e(p, b) = ‖g_pb − g‖² / ‖g‖²

The rounding errors of two places are independent and have a mean near zero, so the errors of several places add up. The
choice starts with every place unchanged. It then takes the steps 16 → 8 → 4 bits of all places in the order of bytes
saved per error added, until the bytes or the error reach their limit. Finally, the whole choice is measured.

The errors of single places are measured in float32. In bfloat16, a change of a single bit grows to 1 % of the gradient,
which would hide them.
"""

import math
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.compression import Compression, Rule
from models.compression_statistics import Meter, measure
from models.decoder import Decoder, build
from models.parallel import vocabulary_loss
from models.parameters import matches
from models.saved_activations import BlockPolicy, Policy
from trainer import trainable
from trainer.compression import block_policy, check_compression, compression
from trainer.config import CompressionConfig, PretrainConfig
from trainer.data.batch import Batch
from trainer.data.sources import find_sources
from trainer.device import choose_device
from trainer.errors import ConfigError
from trainer.precision import choose as choose_precision
from trainer.stored import weights
from trainer.trainable import trained

# Bits per element in the order of rising error. 16 means that a place is stored unchanged.
BITS = (16, 8, 4)
# Largest number of times that a choice for a cosine is measured and corrected.
_ATTEMPTS = 6


class Place(NamedTuple):
    """A tensor of a module, given by its layer and its name within the block."""

    layer: int
    name: str

    @property
    def path(self) -> str:
        """The name that train.compression.modules matches."""
        return f"layers.{self.layer}.{self.name}"


@dataclass(frozen=True)
class Measured:
    """Result of one micro-batch's forward and backward under a policy.

    Attributes:
        gradient: The gradient of every trained parameter.
        meters: Each layer's measures of the activations that it keeps, by layer number.
    """

    gradient: list[Tensor]
    meters: dict[int, Meter]

    @property
    def kept(self) -> int:
        """Bytes that all layers keep."""
        return sum(meter.kept for meter in self.meters.values())

    @property
    def saved(self) -> int:
        """Bytes that all layers would keep without compression."""
        return sum(meter.saved for meter in self.meters.values())

    def error_of(self, exact: Sequence[Tensor]) -> float:
        """Return ‖g − exact‖² / ‖exact‖²."""
        pairs = zip(self.gradient, exact, strict=True)
        difference = sum(float((ours.double() - theirs.double()).square().sum()) for ours, theirs in pairs)
        return difference / sum(float(theirs.double().square().sum()) for theirs in exact)

    def cosine(self, exact: Sequence[Tensor]) -> float:
        """Return the cosine of the angle between the two gradients."""
        pairs = [(ours.double(), theirs.double()) for ours, theirs in zip(self.gradient, exact, strict=True)]
        product = sum(float((ours * theirs).sum()) for ours, theirs in pairs)
        norms = (math.sqrt(sum(float(pair[i].square().sum()) for pair in pairs)) for i in range(2))
        return product / math.prod(norms)


@dataclass(frozen=True)
class Choice:
    """The bits of every place, with the measured results.

    Attributes:
        bits: Bits per element by place.
        settings: The same choice in the form of train.compression.
        kept: Bytes of a micro-batch that all layers keep.
        saved: Bytes that all layers would keep without compression.
        cosine: Cosine between the gradients with and without compression.
        layers: For each layer number, the bytes without compression, the bytes kept, and the relative error
            ‖g_l − g‖ / ‖g‖ of the gradient if only this layer compresses.
    """

    bits: dict[Place, int]
    settings: CompressionConfig
    kept: int
    saved: int
    cosine: float
    layers: dict[int, tuple[int, int, float]]


class Probe:
    """A model with one micro-batch of its training data, on one device.

    Args:
        config: The run. Its weights come from checkpoint.init or, without one, from its initialisation.
        dtype: Dtype of parameters and activations.

    Raises:
        ConfigError: the run's data or weights do not fit.
    """

    def __init__(self, config: PretrainConfig, dtype: torch.dtype) -> None:
        device = choose_device(config.run.device)
        sources = find_sources(config)
        vocabulary = config.model.padded_vocab_size(sources.vocab_size)
        self._decoder: Decoder = build(config.model, vocabulary, dtype=dtype, device=device)
        weights.start(self._decoder, config.checkpoint.init, config.train.seed)
        for name, parameter in self._decoder.named_parameters():
            parameter.requires_grad_(matches(name, trained(config)))
        batch = sources.open_training(config).micro_batches(0, config.train.micro_batch_size)[0]
        self._batch: Batch = batch.to(device)
        self._config = config

    @property
    def tokens(self) -> int:
        """Tokens of the micro-batch."""
        return self._batch.tokens.numel()

    def run(self, stored: Compression) -> Measured:
        """Run forward and backward of the language model's loss with these compression settings."""
        decoder, batch = self._decoder, self._batch
        decoder.keep(Policy(replace(self._policy, compression=stored)))
        decoder.zero_grad()
        given = {"documents": batch.documents, "origin": batch.origin}
        hidden, meters = measure(decoder, batch.tokens, batch.positions, **given)
        total, _ = vocabulary_loss(hidden, decoder.head_weight, batch.labels, batch.loss_mask, decoder.groups)
        (total / batch.loss_mask.sum().clamp(min=1)).backward()
        return Measured([p.grad.clone() for p in decoder.parameters() if p.grad is not None], meters)

    @cached_property
    def _policy(self) -> BlockPolicy:
        return block_policy(_compressing(self._config, CompressionConfig(bits=8)))


def _dtype(config: PretrainConfig) -> torch.dtype:
    precision: str = config.train.precision
    if precision == "auto":
        precision, _ = choose_precision(config, choose_device(config.run.device))
    return torch.bfloat16 if precision == "bf16" else torch.float32


def _compressing(config: PretrainConfig, settings: CompressionConfig) -> PretrainConfig:
    return replace(config, train=replace(config.train, compression=settings))


class Chooser:
    """Measures the places of a run's model, and chooses their bits.

    Args:
        config: The run. Choices take group and min_bytes from its train.compression.
    """

    def __init__(self, config: PretrainConfig) -> None:
        self._config = config
        self._probe = Probe(config, _dtype(config))
        given = config.train.compression
        self._base = replace(given, bits=16, modules={}, by_stage={})
        _say(f"measuring the gradient of a micro-batch of {self._probe.tokens} tokens")
        self._exact = self._probe.run(self._stored(self._base))
        self._places = self._find_places()

    @cached_property
    def _in_float32(self) -> tuple[Probe, list[Tensor]]:
        """A float32 probe for the errors of single places, and its gradient without rounding."""
        if _dtype(self._config) is torch.float32:
            return self._probe, self._exact.gradient
        probe = Probe(self._config, torch.float32)
        return probe, probe.run(self._stored(self._base)).gradient

    def _stored(self, settings: CompressionConfig) -> Compression:
        stored = compression(_compressing(self._config, settings))
        assert stored is not None, "bits=16 is a setting, too: only bits=0 is off"
        return stored

    def _find_places(self) -> dict[Place, dict[int, int]]:
        """Return every place that can be encoded, with its bytes by number of bits."""
        found: dict[Place, dict[int, int]] = {}
        for bits in (8, 4):
            run = self._probe.run(replace(self._stored(self._base), bits=bits))
            for layer, meter in run.meters.items():
                for name, tensors in meter.places.items():
                    found.setdefault(Place(layer, name), {16: tensors.saved})[bits] = tensors.kept
        if not found:
            least = self._base.min_bytes
            raise ConfigError(
                f"nothing is compressed: every tensor is smaller than train.compression.min_bytes={least}; lower it"
            )
        return found

    def _of(self, bits: Mapping[Place, int]) -> Compression:
        rules = tuple(Rule(place.path, chosen) for place, chosen in bits.items())
        return replace(self._stored(self._base), rules=rules)

    def _measure(self, bits: Mapping[Place, int]) -> Measured:
        return self._probe.run(self._of(bits))

    def _error(self, bits: Mapping[Place, int]) -> float:
        probe, exact = self._in_float32
        return probe.run(self._of(bits)).error_of(exact)

    def sensitivities(self) -> dict[Place, dict[int, float]]:
        """Return e(p, b) for every place and number of bits."""
        found: dict[Place, dict[int, float]] = {}
        for number, place in enumerate(self._places, 1):
            found[place] = {16: 0.0}
            for bits in (8, 4):
                found[place][bits] = self._error({place: bits})
            _say(f"{number}/{len(self._places)} {place.path}: gradient error {_errors(found[place])}")
        return found

    def for_cosine(self, least: float) -> Choice:
        """Return the choice with the fewest bytes at which the cosine of the gradients is at least `least`.

        Raises:
            ConfigError: no attempt reaches this cosine.
        """
        errors = self.sensitivities()
        # If the error is orthogonal to the gradient, cos² = 1 / (1 + e).
        limit = most = 1 / least**2 - 1
        for _ in range(_ATTEMPTS):
            bits = choose(self._places, errors, error=limit)
            found = self._measure(bits)
            if found.cosine(self._exact.gradient) >= least:
                return self._as_choice(bits, found)
            # The errors of norms and activation functions are biased, so their sum underestimates their joint error.
            limit *= 0.9 * most / max(1 / found.cosine(self._exact.gradient) ** 2 - 1, most)
        raise ConfigError(f"--cosine {least:g} was not reached in {_ATTEMPTS} attempts; use a lower value")

    def for_bytes(self, most: float) -> Choice:
        """Return the choice with the least error at which all layers keep at most `most` bytes of a micro-batch.

        Raises:
            ConfigError: the layers keep more even with 4 bits everywhere.
        """
        # Tensors that are never encoded take the same bytes under every choice.
        fixed = self._exact.kept - sum(sizes[16] for sizes in self._places.values())
        least = fixed + sum(min(sizes.values()) for sizes in self._places.values())
        if least > most:
            raise ConfigError(
                f"--megabytes {most / 1e6:g} is not enough: at 4 bits everywhere the layers keep {least / 1e6:.4g} MB"
            )
        bits = choose(self._places, self.sensitivities(), size=most - fixed)
        return self._as_choice(bits, self._measure(bits))

    def configured(self) -> Choice:
        """Measure the run's own train.compression, and return it as a choice."""
        stored = self._stored(self._config.train.compression)
        bits = {place: stored.settings_of(place.path)[0] or 16 for place in self._places}
        return self._as_choice(bits, self._measure(bits))

    def _as_choice(self, bits: dict[Place, int], found: Measured) -> Choice:
        layers = {}
        for layer, meter in found.meters.items():
            own = {place: chosen for place, chosen in bits.items() if place.layer == layer}
            error = math.sqrt(self._error(own))
            layers[layer] = meter.saved, meter.kept, error
            _say(f"layer {layer}: gradient error {error:.2%}")
        settings = as_settings(bits, self._base)
        return Choice(bits, settings, found.kept, found.saved, found.cosine(self._exact.gradient), layers)


def choose(
    sizes: Mapping[Place, Mapping[int, int]],
    errors: Mapping[Place, Mapping[int, float]],
    *,
    error: float = math.inf,
    size: float = -math.inf,
) -> dict[Place, int]:
    """Lower the bits of places until their bytes are at most `size`, keeping the sum of errors at most `error`.

    Args:
        sizes: Bytes by place and bits.
        errors: Errors by place and bits.
        error: Largest sum of errors.
        size: Bytes of all places at which to stop.
    """
    steps = sorted((step for place in sizes for step in _steps(place, sizes[place], errors[place])), reverse=True)
    bits = dict.fromkeys(sizes, BITS[0])
    total, kept = 0.0, sum(sizes[place][bits[place]] for place in sizes)
    for _, place, before, after in steps:
        added = errors[place][after] - errors[place][before]
        # If the first step of a place was skipped, its second one must be skipped too.
        if kept <= size or bits[place] != before or total + added > error:
            continue
        bits[place], total, kept = after, total + added, kept + sizes[place][after] - sizes[place][before]
    return bits


class _Step(NamedTuple):
    gain: float
    place: Place
    before: int
    after: int


def _steps(place: Place, sizes: Mapping[int, int], errors: Mapping[int, float]) -> list[_Step]:
    """Return the steps of a place, starting at 16 bits, with the bytes that each saves per error added.

    Only the steps on the convex hull of bytes and error are returned.
    """

    def gain(before: int, after: int) -> float:
        return (sizes[before] - sizes[after]) / max(errors[after] - errors[before], 1e-30)

    first, second = gain(16, 8), gain(8, 4)
    if second >= first:
        # Where 8 bits are worth their error, 4 bits are worth theirs as well, so go there directly.
        return [_Step(gain(16, 4), place, 16, 4)]
    return [_Step(first, place, 16, 8), _Step(second, place, 8, 4)]


def as_settings(bits: Mapping[Place, int], base: CompressionConfig) -> CompressionConfig:
    """Return a choice in the form of train.compression: the most frequent bits, and the exceptions as patterns.

    A pattern starts with `layers.*` if all layers agree on the bits of the name.
    """
    common = Counter(bits.values()).most_common(1)[0][0]
    by_name: dict[str, dict[int, int]] = {}
    for place, chosen in bits.items():
        by_name.setdefault(place.name, {})[place.layer] = chosen
    patterns: dict[str, int] = {}
    for name, by_layer in by_name.items():
        values = set(by_layer.values())
        if len(values) == 1:
            patterns |= {f"layers.*.{name}": chosen for chosen in values - {common}}
        else:
            patterns |= {f"layers.{layer}.{name}": own for layer, own in by_layer.items() if own != common}
    settings = _with(base, common, patterns)
    stored = Compression(rules=tuple(Rule(pattern, chosen) for pattern, chosen in patterns.items()), bits=common)
    if all(stored.settings_of(place.path)[0] == chosen for place, chosen in bits.items()):
        return settings
    # A pattern also matches longer names that end in the same way. Give every exceptional place by its path instead.
    return _with(base, common, {place.path: chosen for place, chosen in bits.items() if chosen != common})


def _with(base: CompressionConfig, bits: int, patterns: Mapping[str, int]) -> CompressionConfig:
    from trainer.cli import from_mapping

    modules = {pattern: {"bits": chosen} for pattern, chosen in patterns.items()}
    values: dict[str, Any] = {"bits": bits, "group": base.group, "min_bytes": base.min_bytes, "modules": modules}
    return from_mapping(CompressionConfig, values)


def check(config: PretrainConfig) -> None:
    """Check a run before anything is measured.

    Raises:
        ConfigError: weights or patterns do not fit the model.
    """
    weights.check_layers(config)
    weights.check_tensors(config)
    trainable.check(config)
    check_compression(config)


def _errors(errors: Mapping[int, float]) -> str:
    return ", ".join(f"{math.sqrt(errors[bits]):.2%} at {bits} bits" for bits in (8, 4))


def by_name(bits: Iterable[tuple[Place, int]]) -> dict[str, dict[int, int]]:
    """Return, for each name, the number of layers that store it in each number of bits."""
    found: dict[str, Counter[int]] = {}
    for place, chosen in bits:
        found.setdefault(place.name, Counter())[chosen] += 1
    return {name: dict(counted) for name, counted in found.items()}


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
