"""Every linear attention, forward and backward, against the code that others would run on a CPU.

Peers: transformers' torch fallback of the gated delta rule, fla-core's naive recurrences, and causal SDPA. The sliding
window is compared with SDPA and a boolean mask, and the whole mixer with that of transformers' Qwen3-Next.
"""

import importlib
import importlib.util
import math
import statistics
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from models.config import AttentionConfig, GatedDeltaNetConfig, MixerLayoutConfig, ModelConfig
from trainer.benchmarks.report import Comparison, report, say, time_by_turns
from trainer.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

DESCRIPTION = "Linear attention, forward and backward, against transformers, fla-core's naive forms and SDPA."

VARIANTS = ("retention", "gla", "hgrn", "hgrn2", "delta_rule", "gated_delta_rule", "kimi_delta_rule")

Step = Callable[[], object]


@dataclass
class Config:
    """Sizes and parts to measure.

    Attributes:
        json: Write the comparisons to this file.
        parts: Parts to measure. All by default.
        seq_lens: Tokens of the single row, for the fallback and SDPA.
        naive_seq_len: Tokens for fla-core's token-by-token forms, which are timed once.
        scaling_seq_lens: Tokens over which the growth of each variant's time is fitted.
        window_seq_len: Tokens of the sliding-window comparison.
        window: Keys visible to a query in it.
        mixer_seq_len: Tokens of the mixer comparison.
        heads: Number of heads.
        head_dim: Key and value size of a head.
        rounds: Timed calls of each side. The naive forms and SDPA with a mask are timed once.
        warmup: Untimed calls of each side before.
        threads: CPU threads. 0 takes every core.
        keep_freed_memory: Make the C library keep freed memory for all sides, as in training.
    """

    json: str | None = None
    parts: list[Literal["fallback", "sdpa", "naive", "scaling", "window", "mixer"]] = field(
        default_factory=lambda: ["fallback", "sdpa", "naive", "scaling", "window", "mixer"]
    )
    seq_lens: list[int] = field(default_factory=lambda: [2048, 4096, 16384])
    naive_seq_len: int = 4096
    scaling_seq_lens: list[int] = field(default_factory=lambda: [1 << n for n in range(10, 18)])
    window_seq_len: int = 16384
    window: int = 1024
    mixer_seq_len: int = 4096
    heads: int = 4
    head_dim: int = 128
    rounds: int = 5
    warmup: int = 2
    threads: int = 0
    keep_freed_memory: bool = False

    def __post_init__(self) -> None:
        for name in ("naive_seq_len", "window_seq_len", "window", "mixer_seq_len", "heads", "head_dim", "rounds"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}: it must be at least 1")
        for name in ("seq_lens", "scaling_seq_lens"):
            if not getattr(self, name) or min(getattr(self, name)) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}: name at least one length, each at least 1")
        if "scaling" in self.parts and len(set(self.scaling_seq_lens)) < 2:
            raise ConfigError("scaling_seq_lens needs two lengths to fit a growth to")
        for package, part in (("transformers", "fallback"), ("transformers", "mixer"), ("fla", "naive")):
            if part in self.parts and importlib.util.find_spec(package) is None:
                raise ConfigError(f"the peer of part {part} is missing: pip install '.[dev]', or leave it out of parts")


def main(config: Config) -> None:
    """Measure the parts and print the table."""
    from trainer.device import configure_threads, keep_freed_memory

    warnings.filterwarnings("ignore")
    if config.keep_freed_memory:
        keep_freed_memory()
    threads = configure_threads(config.threads)
    parts = {
        "fallback": _against_fallback,
        "sdpa": _against_sdpa,
        "naive": _against_naive,
        "scaling": _scaling,
        "window": _window,
        "mixer": _mixer,
    }
    lines = [line for name, measure in parts.items() if name in config.parts for line in measure(config)]
    shape = f"{config.heads} heads of {config.head_dim}, float32"
    allocator = "freed memory kept" if config.keep_freed_memory else "the C library's default allocator"
    report(f"linear attention, forward and backward, {shape}, {threads} threads, {allocator}", lines, config.json)


def _medians(config: Config, sides: Mapping[str, Step], slow: bool = False) -> dict[str, float]:
    seconds = time_by_turns(sides, 1 if slow else config.rounds, 0 if slow else config.warmup)
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def _inputs(config: Config, time: int) -> "dict[str, Tensor]":
    """Return tensors [1, T, H, D]: queries and keys of unit norm, mild decays."""
    import torch
    import torch.nn.functional as F

    generator = torch.Generator().manual_seed(0)
    shape = (1, time, config.heads, config.head_dim)

    def uniform(*size: int) -> "Tensor":
        return torch.rand(size, generator=generator)

    tensors = {name: torch.randn(shape, generator=generator) for name in ("q", "k", "v")}
    tensors["q"], tensors["k"] = (F.normalize(tensors[name], dim=-1) for name in ("q", "k"))
    tensors["decay"], tensors["channel_decay"] = -0.1 * uniform(*shape[:3]), -0.1 * uniform(*shape)
    tensors["fixed_decay"], tensors["beta"] = -0.1 * uniform(config.heads), uniform(*shape[:3])
    return {name: tensor.requires_grad_() for name, tensor in tensors.items()}


def _arguments(variant: str, x: "dict[str, Tensor]") -> "list[Tensor]":
    """Return a variant's inputs, in the order of its function's arguments."""
    names = {
        "retention": ("q", "k", "v", "fixed_decay"),
        "gla": ("q", "k", "v", "channel_decay"),
        "hgrn2": ("q", "v", "channel_decay"),
        "delta_rule": ("q", "k", "v", "beta"),
        "gated_delta_rule": ("q", "k", "v", "decay", "beta"),
        "kimi_delta_rule": ("q", "k", "v", "channel_decay", "beta"),
    }
    if variant == "hgrn":
        return [x[name].detach().flatten(2).requires_grad_() for name in ("v", "channel_decay")]
    return [x[name] for name in names[variant]]


def _step(function: "Callable[..., Any]", arguments: "list[Tensor]") -> Step:
    """Return a step: forward and backward of sum(o). The gradients are discarded."""
    import torch

    def step() -> None:
        o = function(*arguments)
        torch.autograd.grad((o[0] if isinstance(o, tuple) else o).sum(), arguments)

    return step


def _ours(variant: str, x: "dict[str, Tensor]") -> Step:
    from kernels import linear_attention

    # Kimi's rule is the gated delta rule with a decay per channel; one function computes both.
    name = "gated_delta_rule" if variant == "kimi_delta_rule" else variant
    return _step(getattr(linear_attention, name), _arguments(variant, x))


def gated_delta_rule_flops(chunk: int, key_dim: int, value_dim: int) -> float:
    """Count the FLOPs of the matrix products per token and head, forward and backward, without the inverse's.

    Forward: scores 4CK, products with the inverse 2CK and 2CV, residual, writes and reads 2KV each, outputs 2CV.
    Backward: scores and inverse 6CK again, gradients of the residual 2CV and 2KV, of the state 4KV, of v 2CV, of the
    scores 4CV, of the decayed factors 6KV, of q, k and beta 8CK.
    """
    return 20.0 * chunk * key_dim + 18.0 * key_dim * value_dim + 12.0 * chunk * value_dim


def _against_fallback(config: Config) -> list[Comparison]:
    import torch

    from kernels.linear_attention._chunks import CHUNK
    from trainer.benchmarks.transformers_peer import without_kernels
    from trainer.device import measure_matmul

    with without_kernels():
        from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule
    lines = []
    for time in config.seq_lens:
        say(f"gated delta rule against transformers' fallback, {time} tokens")
        x = _inputs(config, time)
        sides = {name: _ours(name, x) for name in ("gated_delta_rule", "kimi_delta_rule")}
        sides["fallback"] = _step(torch_chunk_gated_delta_rule, _arguments("gated_delta_rule", x))
        seconds = _medians(config, sides)
        ours, peer = seconds["gated_delta_rule"], seconds["fallback"]
        flops = time * config.heads * gated_delta_rule_flops(CHUNK, config.head_dim, config.head_dim)
        # Measured right beside the timing, because a machine's speed varies over minutes.
        peak = measure_matmul(torch.float32)
        share = f"its products at {flops / ours / peak:.2f} of the matmul peak of {peak / 1e9:.0f} GFLOP/s"
        case = f"gated_delta_rule, transformers' fallback, T={time}"
        lines.append(Comparison(case, ours, peer, peer / ours, "s", share))
        other = seconds["kimi_delta_rule"]
        case = f"kimi_delta_rule, our gated_delta_rule, T={time}"
        lines.append(Comparison(case, other, ours, ours / other, "s", f"{other / ours:.2f} times its time"))
    return lines


def _against_sdpa(config: Config) -> list[Comparison]:
    import torch.nn.functional as F

    def sdpa(q: "Tensor", k: "Tensor", v: "Tensor") -> "Tensor":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    lines = []
    for time in config.seq_lens:
        say(f"every variant against causal SDPA, {time} tokens")
        x = _inputs(config, time)
        sides = {variant: _ours(variant, x) for variant in VARIANTS}
        seconds = _medians(config, {**sides, "sdpa": _step(sdpa, [x["q"], x["k"], x["v"]])})
        peer = seconds.pop("sdpa")
        for variant, ours in seconds.items():
            lines.append(Comparison(f"{variant}, SDPA, T={time}", ours, peer, peer / ours, "s", "causal, whole row"))
    return lines


def _against_naive(config: Config) -> list[Comparison]:
    def naive(module: str, name: str) -> Any:
        return getattr(importlib.import_module(f"fla.ops.{module}.naive"), name)

    gated = naive("gated_delta_rule", "naive_recurrent_gated_delta_rule")
    delta = naive("delta_rule", "delta_rule_recurrence")
    peers: dict[str, Callable[..., Any]] = {
        "gla": naive("gla", "naive_recurrent_gla"),
        "hgrn": naive("hgrn", "naive_recurrent_hgrn"),
        # Here fla-core's layout is [B, H, T, D].
        "delta_rule": lambda *inputs: delta(*(x.transpose(1, 2) for x in inputs)),
        "gated_delta_rule": lambda q, k, v, decay, beta: gated(q, k, v, beta, decay),
        "kimi_delta_rule": naive("kda", "naive_recurrent_kda"),
    }
    time, lines = config.naive_seq_len, []
    x = _inputs(config, time)
    for variant, peer in peers.items():
        say(f"{variant} against fla-core's naive form, {time} tokens; this takes a while")
        ours = _medians(config, {"ours": _ours(variant, x)})["ours"]
        theirs = _medians(config, {"naive": _step(peer, _arguments(variant, x))}, slow=True)["naive"]
        case = f"{variant}, fla-core naive, T={time}"
        lines.append(Comparison(case, ours, theirs, theirs / ours, "s", "token by token; measured once"))
    return lines


def _scaling(config: Config) -> list[Comparison]:
    lengths = sorted(set(config.scaling_seq_lens))
    seconds: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for time in lengths:
        say(f"growth with the length, {time} tokens")
        x = _inputs(config, time)
        for variant, taken in _medians(config, {variant: _ours(variant, x) for variant in VARIANTS}).items():
            seconds[variant].append(taken)
    lines = []
    # The slope in log-log coordinates is the exponent: 1 for linear time.
    for variant, every in seconds.items():
        slope = statistics.linear_regression([math.log(time) for time in lengths], [math.log(t) for t in every]).slope
        case, note = f"{variant}, growth from {lengths[0]} to {lengths[-1]}", f"{every[-1]:.3g} s at {lengths[-1]}"
        lines.append(Comparison(case, slope, 1.0, 1.0 / slope, "exponent of T", note))
    return lines


def _window(config: Config) -> list[Comparison]:
    import torch
    import torch.nn.functional as F

    from kernels.attention import attention

    time, window = config.window_seq_len, config.window
    say(f"sliding window of {window}, {time} tokens; this takes a while")
    x = _inputs(config, time)
    distance = torch.arange(time)[:, None] - torch.arange(time)
    # True where a query sees a key: at most window - 1 tokens back.
    mask = (distance >= 0) & (distance < window)

    def masked(q: "Tensor", k: "Tensor", v: "Tensor") -> "Tensor":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)

    inputs = [x["q"], x["k"], x["v"]]
    ours = _medians(config, {"banded": _step(lambda *qkv: attention(*qkv, window=window, backend="banded"), inputs)})
    theirs = _medians(config, {"sdpa": _step(masked, inputs)}, slow=True)
    case = f"sliding window {window}, SDPA with a mask, T={time}"
    return [Comparison(case, ours["banded"], theirs["sdpa"], theirs["sdpa"] / ours["banded"], "s", "boolean mask")]


def _mixer(config: Config) -> list[Comparison]:
    import torch

    from models.decoder import Decoder, initialize
    from models.mixers.base import SequenceInfo
    from trainer.benchmarks.transformers_peer import build_peer, copy_weights

    width, time = config.heads * config.head_dim, config.mixer_seq_len
    say(f"the whole mixer against that of Qwen3-Next, {time} tokens")
    model = ModelConfig(
        num_layers=1,
        hidden_size=width,
        mixers=MixerLayoutConfig(pattern="gated_delta_net"),
        attention=AttentionConfig(config.heads, config.heads, qk_norm=True),
        gated_delta_net=GatedDeltaNetConfig(num_heads=config.heads, head_dim=config.head_dim),
    )
    decoder = Decoder(model, 64)
    initialize(decoder, seed=0)
    peer: Any = build_peer(model, 64, time)
    copy_weights(decoder, peer)
    mixer: Any = decoder.layers["0"].mixer
    theirs = peer.model.layers[0].linear_attn
    x_TBD = torch.randn(time, 1, width, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def our_forward(x: "Tensor", *_: "Tensor") -> Any:
        return mixer(x, SequenceInfo())

    def their_forward(x: "Tensor", *_: "Tensor") -> Any:
        return theirs(x.transpose(0, 1)).transpose(0, 1)

    # Timing means nothing unless both sides compute the same function.
    with torch.no_grad():
        difference = float((our_forward(x_TBD) - their_forward(x_TBD)).norm() / their_forward(x_TBD).norm())
    # `not <` also refuses NaN.
    if not difference < 1e-4:
        raise RuntimeError(f"the mixers differ by {difference:.1e} on the same weights")
    sides = {
        "ours": _step(our_forward, [x_TBD, *mixer.parameters()]),
        "peer": _step(their_forward, [x_TBD, *theirs.parameters()]),
    }
    seconds = _medians(config, sides)
    note = f"width {width}; outputs differ by {difference:.0e} on the same weights"
    case = f"gated delta net mixer, Qwen3-Next's, T={time}"
    return [Comparison(case, seconds["ours"], seconds["peer"], seconds["peer"] / seconds["ours"], "s", note)]
