"""Model configuration: nested dataclasses that validate themselves.

Nothing here imports torch, so that an invalid configuration is reported before torch is loaded.
"""

from models.config.experts import DenseToSparseConfig as DenseToSparseConfig
from models.config.experts import MoEConfig as MoEConfig
from models.config.experts import RouterConfig as RouterConfig
from models.config.experts import RouterLossConfig as RouterLossConfig
from models.config.lora import ADAPTERS as ADAPTERS
from models.config.lora import LoraConfig as LoraConfig
from models.config.mixers import LINEAR_MIXERS as LINEAR_MIXERS
from models.config.mixers import MIXERS as MIXERS
from models.config.mixers import SOFTMAX_MIXERS as SOFTMAX_MIXERS
from models.config.mixers import AttentionConfig as AttentionConfig
from models.config.mixers import DeltaNetConfig as DeltaNetConfig
from models.config.mixers import GatedDeltaNetConfig as GatedDeltaNetConfig
from models.config.mixers import GatedLinearAttentionConfig as GatedLinearAttentionConfig
from models.config.mixers import HGRN2Config as HGRN2Config
from models.config.mixers import KimiDeltaAttentionConfig as KimiDeltaAttentionConfig
from models.config.mixers import MixerLayoutConfig as MixerLayoutConfig
from models.config.mixers import MixerType as MixerType
from models.config.mixers import RetentionConfig as RetentionConfig
from models.config.mixers import RopeScalingConfig as RopeScalingConfig
from models.config.mixers import Rotary as Rotary
from models.config.mixers import SpikingBrainGLAConfig as SpikingBrainGLAConfig
from models.config.mixers import branches as branches
from models.config.mixers import parse_pattern as parse_pattern
from models.config.model import ModelConfig as ModelConfig
from models.config.spiking import ActivityConfig as ActivityConfig
from models.config.spiking import SpikingConfig as SpikingConfig
