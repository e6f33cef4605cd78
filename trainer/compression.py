"""Translation of train.recompute and train.compression into the policy of what every block keeps for backward."""

import math

from models.compression import Compression, Ranges, Rule
from models.parameters import matches
from models.saved_activations import BlockPolicy
from trainer.config import PretrainConfig
from trainer.errors import ConfigError

# Names that a tensor may have within its module (models.compression).
_TENSORS = ("q", "k", "v", "rows", *(f"input_{i}" for i in range(3)), *map(str, range(10)))


def block_policy(config: PretrainConfig) -> BlockPolicy:
    """Return the policy of what every block of a run keeps for backward."""
    train = config.train
    above = config.model.moe.recompute_above
    return BlockPolicy.of_config(train.recompute, train.recompute_modules, above, compression(config))


def compression(config: PretrainConfig) -> Compression | None:
    """Return how a run stores activations. None if train.compression is off."""
    settings = config.train.compression
    if not settings.bits:
        return None
    # The number of tensor-parallel ranks must divide all these sizes, so it divides their greatest common divisor.
    shards = math.gcd(*config.model.tensor_parallel_sizes().values())
    rules = [Rule(pattern, rule.bits, rule.group, rule.range) for pattern, rule in settings.modules.items()]
    # Put them first, so that the rules of train.compression.modules override them.
    rules[:0] = _rules_by_stage(config)
    bits, group, seed = settings.bits, settings.group, config.train.seed
    ranges = Ranges(settings.decay)
    rounding = settings.range, ranges, settings.check
    return Compression(bits, group, settings.min_bytes, seed, shards, tuple(rules), *rounding)


def _rules_by_stage(config: PretrainConfig) -> list[Rule]:
    stages = config.parallel.stage_layers(config.model.num_layers)
    return [
        Rule(f"layers.{layer}.*", bits)
        for stage, bits in config.train.compression.by_stage.items()
        for layers in stages[stage :: config.parallel.pipeline]
        for layer in layers
    ]


def check_compression(config: PretrainConfig) -> None:
    """Check that every pattern of train.compression.modules matches a tensor. Imports torch if there are patterns.

    Raises:
        ConfigError: a pattern matches nothing.
    """
    patterns = config.train.compression.modules
    if not patterns:
        return
    from models.decoder import shapes

    # The names do not depend on the vocabulary, so a vocabulary of one token is enough.
    modules = [name for name, _ in shapes(config.model, 1).layers.named_modules(prefix="layers") if "." in name]
    places = [f"{module}.{tensor}" for module in modules for tensor in _TENSORS]
    for pattern in patterns:
        if not any(matches(place, [pattern]) for place in places):
            raise ConfigError(
                f"train.compression.modules: {pattern!r} matches no tensor; tensors are named after their modules, "
                f"such as {modules[1]}.0; {modules[1]}.* matches all tensors of that module"
            )
