"""Hybrids from models of softmax attention (models.conversion), on disk. Imports neither megatron nor deepspeed."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from models import conversion
from models.config import ModelConfig
from models.config.conversion import drops_biases, hybrid_config
from models.decoder import Decoder, shapes
from models.parameters import cast_parameters
from trainer.errors import ConfigError
from trainer.stored import weights
from trainer.stored.source import DTYPES, Source, open_source


@dataclass(frozen=True)
class Hybrid:
    """The result of a conversion.

    Attributes:
        source: The checkpoint or directory that was read.
        model: Configuration of the hybrid.
        parameters: Number of its parameters.
        new: Number of those that are new.
        origins: For every kind of converted layer, where its parameters come from, with their number in one layer:
            `{"gated_delta_net": {"q_proj": ("q_proj", 1024), …}}`.
    """

    source: Path
    model: ModelConfig
    parameters: int
    new: int
    origins: dict[str, dict[str, tuple[str, int]]]

    def lines(self) -> list[str]:
        """Describe what was reused and what is new."""
        layers = Counter(self.model.layer_mixers())
        lines = [f"layers: {', '.join(f'{count} {kind}' for kind, count in layers.items())}"]
        for kind, parts in self.origins.items():
            described = (f"{name} ({origin}, {count:,})" for name, (origin, count) in parts.items())
            lines.append(f"{kind}: {', '.join(described)}")
        lines.append(f"{self.new:,} of {self.parameters:,} parameters are new, {self.new / self.parameters:.2%}")
        return lines


def convert(
    source: Path,
    output: Path,
    pattern: str,
    given: Mapping[str, Any],
    *,
    window: int | None,
    sink_tokens: int | None,
    drop_biases: bool,
    seed: int,
    precision: Literal["fp32", "bf16"],
    max_file_bytes: float,
    report: Callable[[str], None],
) -> Hybrid:
    """Write weights of a hybrid with the matrices of a model of softmax attention.

    Args:
        source: The model: a weights directory, a run directory or one of its checkpoints.
        output: Output directory: empty or absent.
        pattern: Mixers of the hybrid's layers, repeated over all of them.
        given: Settings of the linear mixers by section of the model's configuration.
        window: Keys that a sliding-window layer sees; None keeps the model's.
        sink_tokens: Learned tokens in front of every sequence; None keeps the model's.
        drop_biases: Leave out biases that a linear mixer cannot have.
        seed: New parameters are drawn from (seed, name).
        precision: Dtype of the weights; decays are always float32.
        max_file_bytes: Size above which several files are written.
        report: Called with what is reused, and with a line per file.

    Raises:
        ConfigError: there is no usable model at `source`, or the pattern does not fit it.
    """
    opened = open_source(source, precision)
    config = checked_config(opened, pattern, given, window, sink_tokens, drop_biases)
    before, after = shapes(opened.model, opened.vocab_size), shapes(config, opened.vocab_size)
    cast_parameters(after, DTYPES[precision])
    hybrid = describe(opened.path, before, after)
    for line in hybrid.lines():
        report(line)

    def read(tensors: dict[str, Tensor]) -> None:
        conversion.fill(tensors, opened.read, before, after, seed)

    weights.write(
        output,
        after,
        read,
        tokenizer=opened.tokenizer,
        max_file_bytes=max_file_bytes,
        report=report,
        max_positions=opened.max_positions,
    )
    return hybrid


def checked_config(
    source: Source,
    pattern: str,
    given: Mapping[str, Any],
    window: int | None,
    sink_tokens: int | None,
    drop_biases: bool,
) -> ModelConfig:
    """Return the configuration of the hybrid; see `convert` for the arguments.

    Raises:
        ConfigError: the pattern or the settings do not fit the model, or biases would be lost.
    """
    if source.model.spiking.is_used:
        raise ConfigError(f"source: {source.path} has spikes, which its training fitted; convert the model without")
    try:
        config = hybrid_config(source.model, pattern, given, window, sink_tokens)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    for layer in () if drop_biases else drops_biases(source.model, config):
        for name in ("q_proj", "k_proj", "v_proj"):
            whole = f"layers.{layer}.mixer.{name}.bias"
            bias = torch.empty(shapes(source.model, 1).get_parameter(whole).shape)
            source.read({whole: bias})
            if bias.any():
                raise ConfigError(
                    f"pattern: {config.layer_mixers()[layer]} has no biases, and {whole} of {source.path} is not 0: "
                    "choose spikingbrain_gla, or give --drop_biases true and let training make up for it"
                )
    return config


def describe(source: Path, before: Decoder, after: Decoder) -> Hybrid:
    """Count what a hybrid takes from a model and what is new; both may be on the meta device."""
    total, new = 0, 0
    origins: dict[str, dict[str, tuple[str, int]]] = {}
    first: dict[str, int | None] = {}
    for name, parameter in after.named_parameters():
        place = conversion.place(name, before.model_config, after.model_config)
        total += parameter.numel()
        new += parameter.numel() * place.origin.is_new
        if place.mixer is not None and place.layer == first.setdefault(place.mixer, place.layer):
            part, parts = place.source.split(".")[0], origins.setdefault(place.mixer, {})
            parts[part] = (place.origin.words, parts.get(part, ("", 0))[1] + parameter.numel())
    return Hybrid(source, after.model_config, total, new, origins)
