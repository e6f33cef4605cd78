"""Token mixers, selected per layer by name."""

import importlib

from models.config import MIXERS, ModelConfig, branches
from models.mixers.base import Mixer
from models.mixers.parallel_branches import ParallelBranches


def build_mixer(layer: str, config: ModelConfig) -> Mixer:
    """Build the mixer of one layer from a name in ModelConfig.layer_mixers."""
    mixers = [_build(name, config) for name in branches(layer)]
    return mixers[0] if len(mixers) == 1 else ParallelBranches(mixers, config)


def _build(name: str, config: ModelConfig) -> Mixer:
    module, _, kind = MIXERS[name].implementation.rpartition(".")
    mixer: Mixer = getattr(importlib.import_module(module), kind)(config)
    return mixer
