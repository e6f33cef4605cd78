"""Long contexts: time to the first token, decoding time and state size against length, linear against softmax.

One process and one thread. The models have the same width, depth, heads and feed-forwards, and differ in their mixers:

    linear    gated delta nets only
    hybrid    gated delta nets, and a sliding window in every other layer
    softmax   full attention

Or checkpoints, each against the first: a converted model against the one that it was converted from.
"""

import statistics
import time
from dataclasses import dataclass, field
from typing import Any, Literal

from trainer.benchmarks.report import Comparison, report, say
from trainer.errors import ConfigError

DESCRIPTION = "Time to first token, decoding time and state bytes against length, linear and hybrid against softmax."

_PATTERNS = {
    "linear": "gated_delta_net",
    "hybrid": "gated_delta_net, sliding_window_attention",
    "softmax": "full_attention",
}
# Steps before the timing: the engine traces a model's blocks after so many.
_WARMUP = 70


@dataclass
class Config:
    """Models and lengths.

    Attributes:
        json: Write the comparisons to this file.
        checkpoints: Measure these runs, checkpoints or weights, with their own data type, instead of the three models;
            the first is what the others are compared with.
        lengths: Prompt lengths in tokens, ascending.
        softmax_limit: Longest prompt for the softmax model, whose time grows with the square of the length.
        hybrid_limit: Longest prompt for the hybrid.
        precision: Data type of the weights.
        layers: Number of layers.
        hidden_size: Width of the model, a multiple of 64.
        window: Window of the sliding-window layers.
        chunk: Prompt tokens computed at once.
        steps: Decoding steps to time.
    """

    json: str | None = None
    checkpoints: list[str] = field(default_factory=list)
    lengths: list[int] = field(default_factory=lambda: [4096, 16384, 65536, 262144, 1048576])
    softmax_limit: int = 262144
    hybrid_limit: int = 1048576
    precision: Literal["fp32", "bf16"] = "bf16"
    layers: int = 2
    hidden_size: int = 128
    window: int = 512
    chunk: int = 2048
    steps: int = 32

    def __post_init__(self) -> None:
        for name in ("layers", "hidden_size", "window", "chunk", "steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.hidden_size % 64:
            raise ConfigError(f"hidden_size is {self.hidden_size}: it must be a multiple of 64, the size of a head")
        if len(self.checkpoints) == 1:
            raise ConfigError("checkpoints has one model, and nothing to compare it with; name two or more")
        if not self.lengths or min(self.lengths) < 1 or sorted(set(self.lengths)) != self.lengths:
            raise ConfigError("lengths must be positive and ascending")


@dataclass(frozen=True)
class _Measured:
    """Seconds to the first token, seconds of a decoding step, and bytes of the state after the prompt."""

    first: float
    step: float
    size: int


def main(config: Config) -> None:
    """Measure every model at every length and print the table."""
    import torch

    torch.set_num_threads(1)
    if config.checkpoints:
        _compare_checkpoints(config)
        return
    limits = {"linear": config.lengths[-1], "hybrid": config.hybrid_limit, "softmax": config.softmax_limit}
    found: dict[tuple[str, int], _Measured] = {}
    for name, pattern in _PATTERNS.items():
        model = _build(config, pattern)
        for length in config.lengths:
            if length <= limits[name]:
                found[name, length] = _measure(config, model, length)
                say(f"{name} {length}: {found[name, length]}")
    lines = []
    for name in ("linear", "hybrid"):
        for length in config.lengths:
            if (name, length) in found:
                base = found.get(("softmax", length)) or found[name, config.lengths[0]]
                against = "softmax" if ("softmax", length) in found else f"itself at {config.lengths[0]}"
                lines += _compare(f"{name}, {length} tokens: {against}", found[name, length], base)
    report("long contexts on one core: ours is the linear or hybrid model", lines, config.json)


def _compare_checkpoints(config: Config) -> None:
    import torch

    from trainer.stored.inference import load_model

    found = []
    for path in config.checkpoints:
        model = load_model(path, torch.device("cpu")).model
        found.append([_measure(config, model, length) for length in config.lengths])
        say(f"{path}: {found[-1]}")
    lines = []
    for path, measured in list(zip(config.checkpoints, found, strict=True))[1:]:
        for length, ours, peer in zip(config.lengths, measured, found[0], strict=True):
            lines += _compare(f"{path}, {length} tokens", ours, peer)
    report(f"long contexts on one core: the peer is {config.checkpoints[0]}", lines, config.json)


def _compare(case: str, ours: _Measured, peer: _Measured) -> list[Comparison]:
    per_token = f"one step after the prompt: {ours.step * 1e3:.2f} and {peer.step * 1e3:.2f} ms"
    return [
        Comparison(f"{case}, first token", ours.first, peer.first, peer.first / ours.first, "s", per_token),
        Comparison(f"{case}, step", ours.step * 1e3, peer.step * 1e3, peer.step / ours.step, "ms", "median"),
        Comparison(f"{case}, state", ours.size / 1e6, peer.size / 1e6, peer.size / ours.size, "MB", "of one sequence"),
    ]


def _build(config: Config, pattern: str) -> Any:
    import torch

    from models.config import AttentionConfig, GatedDeltaNetConfig, MixerLayoutConfig, ModelConfig
    from models.decoder import build, initialize

    heads = config.hidden_size // 64
    model = ModelConfig(
        num_layers=config.layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=3 * config.hidden_size,
        mixers=MixerLayoutConfig(pattern=pattern),
        attention=AttentionConfig(num_heads=heads, num_kv_heads=heads, window=config.window),
        gated_delta_net=GatedDeltaNetConfig(num_heads=heads, head_dim=64, expand_v=1.0),
        tie_embeddings=True,
    )
    decoder = build(model, 1024, dtype=torch.bfloat16 if config.precision == "bf16" else torch.float32)
    initialize(decoder, 0)
    return decoder


def _measure(config: Config, model: Any, length: int) -> _Measured:
    import torch

    from models.generation import Engine, Request, Sampling

    prompt = torch.randint(min(1024, model.vocab_size), (length,), generator=torch.Generator().manual_seed(0)).tolist()
    engine = Engine(model, slots=1, chunk=config.chunk)
    start = time.process_time()
    engine.submit(Request(tuple(prompt), Sampling(_WARMUP + config.steps + 2, temperature=0)))
    while not engine.slots_in_use:
        engine.step()
    first = time.process_time() - start
    size = engine.state_bytes
    for _ in range(_WARMUP):
        engine.step()
    seconds = []
    for _ in range(config.steps):
        start = time.process_time()
        engine.step()
        seconds.append(time.process_time() - start)
    return _Measured(first, statistics.median(seconds), size)
