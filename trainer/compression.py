"""From train.recompute and train.compression to what every block keeps for backward."""

import math

from models.compression import Compression, Ranges, Rule
from models.parameters import matches
from models.saved_activations import BlockPolicy
from trainer.config import PretrainConfig
from trainer.errors import ConfigError

# Tensors of a module, by the names that they may have in it (models.compression).
_TENSORS = ("q", "k", "v", "rows", *(f"input_{i}" for i in range(3)), *map(str, range(10)))


def block_policy(config: PretrainConfig) -> BlockPolicy:
    """What every block of a run keeps."""
    train = config.train
    above = config.model.moe.recompute_above
    return BlockPolicy.of_config(train.recompute, train.recompute_modules, above, compression(config))


def compression(config: PretrainConfig) -> Compression | None:
    """How a run stores activations; None without train.compression."""
    settings = config.train.compression
    if not settings.bits:
        return None
    # No number of tensor-parallel ranks divides all sizes that is not a divisor of this one.
    shards = math.gcd(*config.model.tensor_parallel_sizes().values())
    rules = [Rule(pattern, rule.bits, rule.group, rule.range) for pattern, rule in settings.modules.items()]
    # Before those of modules, which may say otherwise for a part of a stage.
    rules[:0] = _rules_by_stage(config)
    bits, group, seed = settings.bits, settings.group, config.train.seed
    ranges = Ranges(settings.decay)
    return Compression(bits, group, settings.min_bytes, seed, shards, tuple(rules), settings.range, ranges)


def _rules_by_stage(config: PretrainConfig) -> list[Rule]:
    stages = config.parallel.stage_layers(config.model.num_layers)
    return [
        Rule(f"layers.{layer}.*", bits)
        for stage, bits in config.train.compression.by_stage.items()
        for layers in stages[stage :: config.parallel.pipeline]
        for layer in layers
    ]


def check_compression(config: PretrainConfig) -> None:
    """Check that every pattern of train.compression.modules is of a module's tensors. May import torch.

    Raises:
        ConfigError: one matches nothing.
    """
    patterns = config.train.compression.modules
    if not patterns:
        return
    from models.decoder import shapes

    # Names do not depend on the vocabulary: one row is enough.
    modules = [name for name, _ in shapes(config.model, 1).layers.named_modules(prefix="layers") if "." in name]
    places = [f"{module}.{tensor}" for module in modules for tensor in _TENSORS]
    for pattern in patterns:
        if not any(matches(place, [pattern]) for place in places):
            raise ConfigError(
                f"train.compression.modules: no module's tensors match {pattern!r}; they are named as {places[0]}, "
                f"that is {modules[1]}.*"
            )
