"""Builders that several test files share."""

import os
from collections.abc import Iterable, Sequence
from itertools import accumulate, zip_longest
from typing import Any

import torch
from torch import Tensor

from kernels.documents import Documents
from kernels.quantization.int8 import encode_int8
from kernels.spiking import spike_counts
from models.config import (
    AttentionConfig,
    DeltaNetConfig,
    GatedDeltaNetConfig,
    GatedLinearAttentionConfig,
    HGRN2Config,
    KimiDeltaAttentionConfig,
    MixerLayoutConfig,
    ModelConfig,
    RetentionConfig,
    SpikingBrainGLAConfig,
)
from models.decoder import Decoder, initialize
from models.generation import Engine, Request, Sampling
from models.spiking import Int8, Neuron

VOCABULARY = 50
# Seconds after which a test gives up what it waits for: only something that hangs takes as long, on any machine.
WAIT = 600.0 * float(os.environ.get("TEST_TIME_FACTOR", "1"))


def examples(count: int) -> int:
    """How many examples of a large property test to try: all in the slow suite (tests/test_all_examples.py), else 8."""
    return count if "TEST_ALL_EXAMPLES" in os.environ else min(count, 8)


def tiny_model_config(pattern: str | None = None, **changes: Any) -> ModelConfig:
    """Two layers of 32 channels; `changes` are fields of ModelConfig, or of one of its parts as `attention__window`."""
    parts: dict[str, dict[str, Any]] = {
        "attention": {"num_heads": 4, "num_kv_heads": 2, "window": 5},
        "gated_delta_net": {"num_heads": 2, "num_v_heads": 4, "head_dim": 8, "expand_v": 1.5},
        "gated_linear_attention": {"num_heads": 2, "gate_low_rank": 4},
        "retention": {"num_heads": 2, "expand_v": 1.5},
        "hgrn2": {"head_dim": 8},
        "delta_net": {"num_heads": 2, "head_dim": 8, "expand_v": 1.5},
        "kimi_delta_attention": {"num_heads": 2, "num_v_heads": 4, "head_dim": 8, "expand_v": 1.5},
        "spikingbrain_gla": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "gate_low_rank": 4},
    }
    top: dict[str, Any] = {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48, "init_std": 0.2}
    for name, value in changes.items():
        part, _, leaf = name.partition("__")
        if leaf:
            parts[part][leaf] = value
        else:
            top[name] = value
    return ModelConfig(
        mixers=MixerLayoutConfig(pattern=pattern),
        attention=AttentionConfig(**parts["attention"]),
        gated_delta_net=GatedDeltaNetConfig(**parts["gated_delta_net"]),
        gated_linear_attention=GatedLinearAttentionConfig(**parts["gated_linear_attention"]),
        retention=RetentionConfig(**parts["retention"]),
        hgrn2=HGRN2Config(**parts["hgrn2"]),
        delta_net=DeltaNetConfig(**parts["delta_net"]),
        kimi_delta_attention=KimiDeltaAttentionConfig(**parts["kimi_delta_attention"]),
        spikingbrain_gla=SpikingBrainGLAConfig(**parts["spikingbrain_gla"]),
        **top,
    )


def tiny_decoder(pattern: str | None = None, seed: int = 0, **changes: Any) -> Decoder:
    """The model of `tiny_model_config`, initialised; biases and lower bounds are drawn too, for tests to see them."""
    model = Decoder(tiny_model_config(pattern, **changes), VOCABULARY)
    initialize(model, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith((".bias", "lower_bounds")):
                parameter.normal_(generator=generator)
    return model


def draw_tokens(*shape: int, seed: int = 0) -> Tensor:
    """Random token ids."""
    return torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def documents_of(lengths: Iterable[int]) -> Documents:
    """Documents of these lengths."""
    return Documents((0, *accumulate(lengths)))


def pack(documents: list[Tensor]) -> tuple[Tensor, Tensor, Documents]:
    """Documents [T_i] as tokens [1, T], positions [1, T] and their bounds in one packed row."""
    positions = torch.cat([torch.arange(len(document)) for document in documents])
    return torch.cat(documents)[None], positions[None], documents_of(map(len, documents))


def greedy(model: Decoder, prompt: Tensor, count: int) -> Tensor:
    """The most likely continuations [B, count] of prompts [B, T], by the generation engine."""
    engine = Engine(model, chunk=4)
    completions = engine.generate([Request(row, Sampling(count, temperature=0)) for row in prompt.tolist()])
    return torch.tensor([completion.tokens for (completion,) in completions])


def rows(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens [B, T] with their positions, each row one sequence."""
    return tokens, torch.arange(tokens.shape[1]).expand(tokens.shape)


class FakeCollectives:
    """What one rank, or one of several, hears; `others` are the flags that other ranks have set, the same each time."""

    def __init__(self, others: Sequence[bool] = ()) -> None:
        self.others = others

    def any_rank(self, flags: Sequence[bool]) -> list[bool]:
        """Of each flag whether it is set here or elsewhere."""
        return [flag or other for flag, other in zip_longest(flags, self.others, fillvalue=False)]

    def sum_over_data(self, values: Sequence[float]) -> list[float]:
        """There is one data-parallel rank."""
        return list(values)

    def gather(self, value: Any) -> list[Any]:
        """There is one rank."""
        return [value]

    def broadcast(self, value: Any) -> Any:
        """Rank 0 is the only one."""
        return value

    def barrier(self) -> None:
        """One rank never waits."""


# What every training step's line of metrics.jsonl has.
STEP_KEYS = {
    "step",
    "loss",
    "grad_norm",
    "lr",
    "tokens",
    "tokens_per_second",
    "step_seconds",
    "data_seconds",
    "forward_backward_seconds",
    "reduce_seconds",
    "optimizer_seconds",
    "checkpoint_seconds",
    "model_flops_utilization",
    "peak_memory_bytes",
    "skipped",
    "skipped_total",
}


class CountMargin:
    """In here the least distance of any x / V to where its count steps, a half, is noted; of keys and values, too.

    Rounding differs between layouts, and where it decides a count numbers differ by more than rounding.
    """

    def __init__(self) -> None:
        self.least = 0.5
        self._fire, self._round = Neuron._fire, Int8.forward

    def __enter__(self) -> "CountMargin":
        def fire(neuron: Neuron, x: Tensor) -> Tensor:
            with torch.no_grad():
                self._note(x, *spike_counts(x, **neuron.count_options() | {"count_range": None}))
            return self._fire(neuron, x)

        def to_int8(int8: Int8, x: Tensor) -> Tensor:
            if int8.is_on:
                self._note(x.detach(), *encode_int8(x))
            return self._round(int8, x)

        Neuron._fire, Int8.forward = fire, to_int8  # type: ignore[method-assign]
        return self

    def _note(self, x: Tensor, codes: Tensor, scale: Tensor) -> None:
        margins = 0.5 - (x / scale - codes).abs()
        self.least = min(self.least, float(margins.min()) if margins.numel() else self.least)

    def __exit__(self, *raised: object) -> None:
        Neuron._fire, Int8.forward = self._fire, self._round  # type: ignore[method-assign]
