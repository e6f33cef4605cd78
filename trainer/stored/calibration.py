"""Conversion of trained models to W8A-spike models: spiking inputs, and int8 weights with calibrated clipping.

SpikingBrain's released W8A-spike models were made after training, from 128 calibration texts (arXiv 2509.05276, section
3.3). How their scales were calibrated is not published. Here the second moments E[x²] of a linear layer's input
channels are measured on spikes. Each group of 128 weights of an output then takes the clipping ratio with the least
expected squared error of the product (kernels.quantization.int8.clip_int8_weight). Imports neither megatron nor
deepspeed.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from kernels.quantization.int8 import clip_int8_weight
from models.config import ModelConfig, SpikingConfig
from models.decoder import Decoder, build, shapes
from models.parallel import Projection
from models.parameters import cast_parameters
from models.spiking import WEIGHT_GROUP, missing_tensors
from trainer.data.batch import Batch
from trainer.errors import ConfigError
from trainer.stored import weights
from trainer.stored.inference import LoadedModel
from trainer.stored.on_disk import listed
from trainer.stored.source import DTYPES

# Clipping ratios, closer together towards 1, because most groups clip little.
RATIOS = (1.0, 0.975, 0.95, 0.925, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5)


@dataclass(frozen=True)
class Calibration:
    """The result of a conversion.

    Attributes:
        tensors: Number of weights rounded to int8.
        error: Σ E[x²] (w − ŵ)² over all of them, relative to Σ E[x²] w².
        unclipped: The same error without clipping.
    """

    tensors: int
    error: float
    unclipped: float


def spiking_model(loaded: LoadedModel, spiking: SpikingConfig) -> Decoder:
    """Return the loaded model with spikes and unrounded weights, in evaluation mode.

    Raises:
        ConfigError: a pattern matches no linear layer, or tensors of trained neurons would be lost or missing.
    """
    parameter, stored = next(loaded.model.parameters()), loaded.model.state_dict()
    new = replace(loaded.model.model_config, spiking=replace(spiking, weights="float"))
    try:
        model = build(new, loaded.model.vocab_size, dtype=parameter.dtype, device=parameter.device)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    lost, missing = stored.keys() - model.state_dict().keys(), missing_tensors(model, stored)
    if lost or missing:
        problem = "would drop trained tensors" if lost else "need trained tensors that the checkpoint lacks"
        raise ConfigError(
            f"threshold={spiking.threshold}: the chosen layers and queries {problem}: {listed(lost or missing)}"
            "; omit layers and queries to keep the checkpoint's, or train with the chosen ones first"
        )
    model.load_state_dict(stored)
    return model.eval()


@torch.no_grad()
def second_moments(model: Decoder, batches: Iterable[Batch]) -> dict[str, Tensor]:
    """Measure E[x²] of each input channel of the linear layers that read spikes.

    Returns:
        Second moments by the layer's name, float64 [D], or [E, 1, D] for experts. They are 0 for an expert that got no
        token.

    Raises:
        ConfigError: there are no batches.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_hook(partial(_observe, sums, counts, name), with_kwargs=True)
        for name, module in model.named_modules()
        if isinstance(module, Projection) and module.neuron is not None
    ]
    try:
        for batch in batches:
            moved = batch.to(next(model.parameters()).device)
            model.hidden_states(moved.tokens, moved.positions, moved.documents)
    finally:
        for hook in hooks:
            hook.remove()
    if not sums:
        raise ConfigError("data: there is nothing to calibrate with; name data that holds text")
    return {name: total / counts[name].clamp(min=1) for name, total in sums.items()}


def _observe(
    sums: dict[str, Tensor],
    counts: dict[str, Tensor],
    name: str,
    module: Projection,
    inputs: Any,
    options: dict[str, Any],
    _: Tensor,
) -> None:
    # This does not compute the spikes again: the neuron keeps them until its owner's forward ends.
    squares = module.spikes(inputs[0]).flatten(0, -2).double().square()
    if module.weight.dim() == 2:
        sums[name] = sums.get(name, 0) + squares.sum(0)
        counts[name] = counts.get(name, squares.new_zeros(())) + len(squares)
        return
    tokens_per_expert_E = options.get("tokens_per_expert_E", *inputs[1:])
    total = squares.new_zeros(len(tokens_per_expert_E), squares.shape[-1])
    experts = torch.arange(len(total), device=total.device).repeat_interleave(tokens_per_expert_E)
    total.index_add_(0, experts, squares)
    sums[name] = sums.get(name, 0) + total[:, None]
    counts[name] = counts.get(name, 0) + tokens_per_expert_E.double()[:, None, None]


def round_weights(model: Decoder, moments: dict[str, Tensor], report: Callable[[str], None]) -> Calibration:
    """Round the weights of the linear layers in `moments` to int8, in place, and report each layer's error."""
    errors, total = torch.zeros(2, dtype=torch.float64), 0.0
    for name, moment in moments.items():
        weight = model.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        rounded, own = clip_int8_weight(weight, moment.float(), RATIOS, WEIGHT_GROUP)
        size = float((weight.detach().double().square() * moment).sum())
        report(
            f"{name}: error {float(own[0]) / max(size, 1e-300):.2e}, {float(own[1]) / max(size, 1e-300):.2e} unclipped"
        )
        weight.data.copy_(rounded)
        errors, total = errors + own.cpu(), total + size
    error, unclipped = (errors / total).tolist()
    return Calibration(len(moments), error, unclipped)


def write(
    output: Path,
    model: Decoder,
    loaded: LoadedModel,
    precision: Literal["fp32", "bf16"] | None,
    max_file_bytes: float,
    report: Callable[[str], None],
) -> None:
    """Write a model with rounded weights to `output`, with `weights=int8` in its configuration."""
    config: ModelConfig = replace(model.model_config, spiking=replace(model.model_config.spiking, weights="int8"))
    whole = shapes(config, model.vocab_size)
    cast_parameters(whole, next(model.parameters()).dtype if precision is None else DTYPES[precision])
    stored = model.state_dict()

    def read(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            tensor.copy_(stored[name])

    weights.write(output, whole, read, tokenizer=loaded.tokenizer_path, max_file_bytes=max_file_bytes, report=report)
