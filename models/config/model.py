"""Configuration of a whole model."""

from dataclasses import asdict, dataclass, field

from models.config.checks import require, require_positive
from models.config.experts import MoEConfig
from models.config.lora import LoraConfig
from models.config.mixers import (
    LINEAR_MIXERS,
    MIXERS,
    SOFTMAX_MIXERS,
    AttentionConfig,
    DeltaNetConfig,
    GatedDeltaNetConfig,
    GatedLinearAttentionConfig,
    HGRN2Config,
    KimiDeltaAttentionConfig,
    MixerLayoutConfig,
    RetentionConfig,
    Rotary,
    SpikingBrainGLAConfig,
    State,
    branches,
)
from models.config.spiking import SpikingConfig


@dataclass
class ModelConfig:
    """A decoder: embedding, pre-norm blocks of a mixer and a SwiGLU feed-forward, final norm, head.

    Attributes:
        num_layers: Number of blocks.
        hidden_size: Width of the residual stream.
        ffn_hidden_size: Inner width of the SwiGLU feed-forward.
        vocab_size: Rows of the embedding; null takes the tokenizer's size, rounded up to vocab_multiple.
        vocab_multiple: The number of embedding rows is rounded up to a multiple of this.
        tie_embeddings: Share the embedding with the output head.
        norm_eps: Epsilon of every RMSNorm.
        zero_centered_norms: Norms of the residual stream, queries and keys multiply by 1 + weight, not by weight.
        init_std: Standard deviation of the normal initialisation of matrices.
        scale_residual_init: Divide init_std of the projections into the residual stream by sqrt(2 * num_layers).
        sink_tokens: Learned tokens in front of every sequence that all its tokens see in softmax layers (models.sinks).
        mixers: Assignment of mixers to layers.
        attention: Softmax attention.
        gated_delta_net: Gated delta net.
        gated_linear_attention: Gated linear attention.
        retention: Retention.
        hgrn2: HGRN2; HGRN has no settings.
        delta_net: Delta net.
        kimi_delta_attention: Kimi delta attention.
        spikingbrain_gla: SpikingBrain's linear attention, with its own gate or the tied one.
        moe: Mixture of experts in place of the feed-forward.
        spiking: Spiking neurons in front of linear layers.
        lora: Low-rank adapters beside linear layers, which are trained in their place.
    """

    num_layers: int = 8
    hidden_size: int = 256
    ffn_hidden_size: int = 768
    vocab_size: int | None = None
    vocab_multiple: int = 64
    tie_embeddings: bool = True
    norm_eps: float = 1e-6
    zero_centered_norms: bool = False
    init_std: float = 0.02
    scale_residual_init: bool = True
    sink_tokens: int = 0
    mixers: MixerLayoutConfig = field(default_factory=MixerLayoutConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    gated_delta_net: GatedDeltaNetConfig = field(default_factory=GatedDeltaNetConfig)
    gated_linear_attention: GatedLinearAttentionConfig = field(default_factory=GatedLinearAttentionConfig)
    retention: RetentionConfig = field(default_factory=RetentionConfig)
    hgrn2: HGRN2Config = field(default_factory=HGRN2Config)
    delta_net: DeltaNetConfig = field(default_factory=DeltaNetConfig)
    kimi_delta_attention: KimiDeltaAttentionConfig = field(default_factory=KimiDeltaAttentionConfig)
    spikingbrain_gla: SpikingBrainGLAConfig = field(default_factory=SpikingBrainGLAConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)
    spiking: SpikingConfig = field(default_factory=SpikingConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)

    def __post_init__(self) -> None:
        names = ("num_layers", "hidden_size", "ffn_hidden_size", "vocab_multiple", "norm_eps", "init_std")
        require_positive("model", self, *names)
        require(self.vocab_size is None or self.vocab_size > 0, f"model.vocab_size={self.vocab_size} must be positive")
        # Sections of unused mixers are not checked: they need not fit this model.
        for mixer in self.used_mixers():
            if (check := MIXERS[mixer].check) is not None:
                check(self)
        for layer in self.layer_mixers():
            # Branches of a layer share one table of cosines and sines.
            rotations = {rotary for mixer in branches(layer) if (rotary := self.rotary(mixer)) is not None}
            require(
                len(rotations) <= 1,
                f"model.mixers: {layer!r} rotates by different (channels, base, scaling), "
                f"{' and '.join(sorted(map(str, rotations)))}; make them alike, or model.attention.rope_theta null",
            )
        require(self.sink_tokens >= 0, f"model.sink_tokens is {self.sink_tokens}: it must not be negative")
        require(
            not self.sink_tokens or not set(self.used_mixers()) <= set(LINEAR_MIXERS),
            f"model.sink_tokens={self.sink_tokens}: no layer would see them; add one with full_attention or "
            "sliding_window_attention, or set it to 0",
        )
        require(
            not self.lora.is_on or self.moe.spawn_step is None,
            f"model.lora freezes the experts that model.moe.spawn_step={self.moe.spawn_step} would write to; use "
            "model.lora.rank=0 up to that step, or leave spawn_step out",
        )
        if self.moe.num_experts:
            dense = self.moe.dense_layers
            # A strict subset, because a model with only dense layers should have num_experts=0.
            require(
                set(dense) < set(range(self.num_layers)),
                f"model.moe.dense_layers={dense} must be some, not all, of the layers 0 to {self.num_layers - 1}",
            )

    def layer_mixers(self) -> list[str]:
        """The name of each layer: its mixer, or its parallel branches (see `branches`)."""
        period = self.mixers.period()
        return [period[i % len(period)] for i in range(self.num_layers)]

    def used_mixers(self) -> list[str]:
        """All mixers in use, without repetition, in layer order."""
        return list(dict.fromkeys(mixer for layer in self.layer_mixers() for mixer in branches(layer)))

    def differing_mixers(self, other: "ModelConfig") -> list[int]:
        """Layers whose mixers are of another kind, or set differently, than those of a model with as many layers."""
        pairs = list(zip(self.layer_mixers(), other.layer_mixers(), strict=True))
        return [
            layer
            for layer, (own, theirs) in enumerate(pairs)
            if own != theirs or any(self._settings(mixer) != other._settings(mixer) for mixer in branches(own))
        ]

    def _settings(self, mixer: str) -> dict[str, object]:
        """The settings that a mixer reads, with the default of its head size resolved."""
        section = MIXERS[mixer].section
        values = {} if section is None else asdict(getattr(self, section))
        if mixer in SOFTMAX_MIXERS:
            values["head_dim"] = self.attention_head_dim
        if mixer == "full_attention":
            del values["window"]
        return values

    def bounded_layers(self) -> list[int]:
        """Layers whose decays have a learned lower bound: those with HGRN or HGRN2, except layer 0 (bound 0)."""
        layers = self.layer_mixers()
        return [i for i in range(1, self.num_layers) if any(MIXERS[name].lower_bounded for name in branches(layers[i]))]

    def rotary(self, mixer: str) -> Rotary | None:
        """(rotated channels, base, scaling) of a mixer's rotary embedding; None if it has none."""
        rotary = MIXERS[mixer].rotary
        return None if rotary is None else rotary(self)

    def moe_layers(self) -> list[int]:
        """Indices, from 0, of the layers whose feed-forward is a mixture of experts."""
        layers = range(self.num_layers) if self.moe.num_experts else ()
        return [layer for layer in layers if layer not in self.moe.dense_layers]

    @property
    def expert_hidden_size(self) -> int:
        """Inner width of an expert, with the default resolved."""
        return self.moe.expert_hidden_size or self.ffn_hidden_size

    def tensor_parallel_sizes(self) -> dict[str, int]:
        """Sizes that must divide over tensor-parallel ranks, by key: heads, channels and embedding rows."""
        sizes = {"vocab_multiple": self.vocab_multiple}
        if len(self.moe_layers()) < self.num_layers:
            sizes["ffn_hidden_size"] = self.ffn_hidden_size
        if self.moe_layers() and self.moe.shared_experts:
            sizes["moe.shared_experts * expert_hidden_size"] = self.moe.shared_experts * self.expert_hidden_size
        for mixer in self.used_mixers():
            sizes |= MIXERS[mixer].shared_sizes(self)
        return {f"model.{name}": size for name, size in sizes.items()}

    def state_shape(self, mixer: str) -> State:
        """(heads, key size, value size) of a linear mixer's state; (1, 1, size) for HGRN's vector."""
        state = MIXERS[mixer].state
        require(state is not None, f"{mixer!r} carries no state; choose from {', '.join(LINEAR_MIXERS)}")
        assert state is not None
        return state(self)

    @property
    def attention_head_dim(self) -> int:
        """Head size of the softmax mixers, with the default resolved."""
        return self.attention.head_dim or self.hidden_size // self.attention.num_heads

    def padded_vocab_size(self, tokenizer_vocab_size: int) -> int:
        """Number of embedding rows for a tokenizer.

        Raises:
            ValueError: model.vocab_size is smaller than the tokenizer's vocabulary.
        """
        wanted = self.vocab_size or tokenizer_vocab_size
        require(
            wanted >= tokenizer_vocab_size,
            f"model.vocab_size={self.vocab_size} is smaller than the tokenizer's {tokenizer_vocab_size}; "
            "raise it or set it to null",
        )
        return -(-wanted // self.vocab_multiple) * self.vocab_multiple
