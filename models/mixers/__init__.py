"""Token mixers, selected per layer by name."""

from models.config import ModelConfig
from models.mixers.base import Mixer
from models.mixers.gated_delta_net import GatedDeltaNet
from models.mixers.gated_linear_attention import GatedLinearAttention
from models.mixers.softmax import FullAttention, SlidingWindowAttention

_MIXERS: dict[str, type[Mixer]] = {
    "full_attention": FullAttention,
    "sliding_window_attention": SlidingWindowAttention,
    "gated_delta_net": GatedDeltaNet,
    "gated_linear_attention": GatedLinearAttention,
}


def build_mixer(name: str, config: ModelConfig) -> Mixer:
    """The mixer of one layer; `name` is one of models.config.MIXERS."""
    return _MIXERS[name](config)  # type: ignore[call-arg]
