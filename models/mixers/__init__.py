"""Token mixers, selected per layer by name."""

from collections.abc import Callable

from models.config import ModelConfig, branches
from models.mixers.base import Mixer
from models.mixers.delta_net import DeltaNet
from models.mixers.gated_delta_net import GatedDeltaNet
from models.mixers.gated_linear_attention import GatedLinearAttention
from models.mixers.hgrn import HGRN, HGRN2
from models.mixers.kimi_delta_attention import KimiDeltaAttention
from models.mixers.parallel_branches import ParallelBranches
from models.mixers.retention import Retention
from models.mixers.softmax import FullAttention, SlidingWindowAttention
from models.mixers.spikingbrain_gla import SpikingBrainGLA, SpikingBrainTiedGLA

_MIXERS: dict[str, Callable[[ModelConfig], Mixer]] = {
    "full_attention": FullAttention,
    "sliding_window_attention": SlidingWindowAttention,
    "gated_delta_net": GatedDeltaNet,
    "gated_linear_attention": GatedLinearAttention,
    "retention": Retention,
    "hgrn": HGRN,
    "hgrn2": HGRN2,
    "delta_net": DeltaNet,
    "kimi_delta_attention": KimiDeltaAttention,
    "spikingbrain_gla": SpikingBrainGLA,
    "spikingbrain_tied_gla": SpikingBrainTiedGLA,
}


def build_mixer(layer: str, config: ModelConfig) -> Mixer:
    """The mixer of one layer, by one of the names that ModelConfig.layer_mixers gives."""
    mixers = [_MIXERS[name](config) for name in branches(layer)]
    return mixers[0] if len(mixers) == 1 else ParallelBranches(mixers, config)
