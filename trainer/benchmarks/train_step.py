"""An optimizer step with forward, backward, clipping and AdamW, against Hugging Face transformers.

Ours runs MegatronEngine.train_step, as in training. The peer uses torch's fused AdamW, both eagerly and compiled.
"""

import importlib.util
import logging
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from models.config import AttentionConfig, GatedDeltaNetConfig, MixerLayoutConfig, ModelConfig
from trainer.benchmarks.report import Comparison, report, say, time_by_turns
from trainer.config import OptimConfig, TrainConfig
from trainer.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from trainer.data.batch import Batch
    from trainer.engines.megatron import MegatronEngine

DESCRIPTION = "An optimizer step of ours beside one of Hugging Face transformers, dense and hybrid."

# Largest rounding difference between both losses, with the same weights and tokens in float32.
_LOSS_TOLERANCE = 1e-4


@dataclass
class Config:
    """Sizes of the models and of the measurement.

    Attributes:
        json: Write the comparisons to this file.
        cases: dense, hybrid (3 gated delta net layers per full attention layer), or both.
        precision: fp32, bf16 or both. The hybrid case is always fp32.
        layers: Number of blocks.
        hidden_size: Width of the residual stream.
        ffn_hidden_size: Inner width of the feed-forward.
        heads: Query heads of full attention.
        kv_heads: Key and value heads of full attention.
        delta_heads: Heads of the gated delta net.
        delta_head_dim: Key and value size of each of them.
        vocab_size: Rows of the embedding.
        tie_embeddings: Share the embedding with the head.
        seq_len: Tokens per row of the dense case.
        batch_size: Rows of the dense case.
        hybrid_layers: Blocks of the hybrid case.
        hybrid_seq_len: Tokens of the hybrid case's single row.
        compile: Also compare with the peer under torch.compile (dense case).
        rounds: Timed steps of each side.
        warmup: Untimed steps of each side before.
        threads: CPU threads. 0 takes every core.
        clock: wall, or cpu: the process's CPU time, for a single thread on a shared machine.
        default_allocator: Leave glibc's allocator at its defaults for all sides.
    """

    json: str | None = None
    cases: Literal["both", "dense", "hybrid"] = "both"
    precision: Literal["both", "fp32", "bf16"] = "both"
    layers: int = 8
    hidden_size: int = 512
    ffn_hidden_size: int = 1408
    heads: int = 8
    kv_heads: int = 4
    delta_heads: int = 4
    delta_head_dim: int = 128
    vocab_size: int = 8192
    tie_embeddings: bool = True
    seq_len: int = 512
    batch_size: int = 8
    hybrid_layers: int = 4
    hybrid_seq_len: int = 4096
    compile: bool = True
    rounds: int = 7
    warmup: int = 2
    threads: int = 0
    clock: Literal["wall", "cpu"] = "wall"
    default_allocator: bool = False

    def __post_init__(self) -> None:
        for name in ("seq_len", "batch_size", "hybrid_seq_len", "rounds", "warmup", "vocab_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.clock == "cpu" and self.threads != 1:
            raise ConfigError("clock=cpu adds up the threads' time, waiting included; use it with --threads 1")
        if importlib.util.find_spec("transformers") is None:
            raise ConfigError("the peer is Hugging Face transformers: pip install 'transformers>=5,<6'")
        self.model("dense")
        self.model("hybrid")

    def model(self, case: str) -> ModelConfig:
        """Return the model configuration of a case."""
        hybrid = case == "hybrid"
        return ModelConfig(
            num_layers=self.hybrid_layers if hybrid else self.layers,
            hidden_size=self.hidden_size,
            ffn_hidden_size=self.ffn_hidden_size,
            tie_embeddings=self.tie_embeddings,
            mixers=MixerLayoutConfig(linear_per_full=3 if hybrid else None),
            attention=AttentionConfig(self.heads, self.kv_heads, qk_norm=hybrid, qkv_bias=not hybrid),
            gated_delta_net=GatedDeltaNetConfig(num_heads=self.delta_heads, head_dim=self.delta_head_dim),
        )


@dataclass
class _Setup:
    """Both sides of a case, with the same weights and tokens."""

    name: str
    engine: "MegatronEngine"
    peer: "nn.Module"
    batch: "Batch"
    dtype: "torch.dtype"
    flops: float
    compile_seconds: float = 0.0

    @property
    def tokens(self) -> int:
        """Tokens per step."""
        return self.batch.tokens.numel()


def main(config: Config) -> None:
    """Run the cases and print the table."""
    from trainer.device import configure_threads, keep_freed_memory

    warnings.filterwarnings("ignore")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    if not config.default_allocator:
        keep_freed_memory()
    threads = configure_threads(config.threads)
    lines: list[Comparison] = []
    if config.cases != "hybrid":
        for precision in ("fp32", "bf16") if config.precision == "both" else (config.precision,):
            lines += _measure(config, "dense", precision)
    if config.cases != "dense":
        lines += _measure(config, "hybrid", "fp32")
    allocator = "glibc's default allocator" if config.default_allocator else "freed memory kept, for all sides"
    report(f"train step, {config.clock} time, {threads} threads, {allocator}", lines, config.json)


def _measure(config: Config, case: str, precision: str) -> list[Comparison]:
    """Time a case with alternating sides, and the peak of matrix multiplication in between."""
    from trainer.device import measure_matmul

    say(f"{case} {precision}: building both sides")
    setup = _prepare(config, case, precision)
    sides = {"ours": _our_step(setup), "eager": _peer_step(setup, setup.peer)}
    if config.compile and case == "dense":
        sides["compiled"] = _compiled_step(setup)
    peaks: list[float] = []
    seconds = time_by_turns(
        # Measured between the turns, because a machine's speed drifts.
        {**sides, "matmul": lambda: peaks.append(measure_matmul(setup.dtype, seconds=0.2))},
        config.rounds,
        config.warmup,
        time.process_time if config.clock == "cpu" else time.perf_counter,
    )
    setup.engine.close()
    return _compare(setup, {name: seconds[name] for name in sides}, max(peaks))


def _prepare(config: Config, case: str, precision: str) -> _Setup:
    import torch

    from models.decoder import Decoder, flops_per_token, initialize
    from trainer.benchmarks.transformers_peer import build_peer, copy_weights
    from trainer.engines.megatron import MegatronEngine
    from trainer.engines.spec import EngineSpec

    model = config.model(case)
    rows, seq_len = (1, config.hybrid_seq_len) if case == "hybrid" else (config.batch_size, config.seq_len)
    decoder = Decoder(model, config.vocab_size)
    # The engine initialises its own model with the same seed.
    initialize(decoder, TrainConfig().seed)
    peer = build_peer(model, config.vocab_size, seq_len)
    copy_weights(decoder, peer)
    batch = _random_batch(rows, seq_len, config.vocab_size)
    _check_losses(decoder, peer, batch)
    spec = EngineSpec(model, config.vocab_size, precision=precision, micro_batch_size=rows, global_batch_size=rows)
    flops = flops_per_token(decoder, seq_len)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    engine = MegatronEngine(spec, torch.device("cpu"))
    return _Setup(f"{case} {precision}", engine, peer.to(dtype), batch, dtype, flops)


def _random_batch(rows: int, seq_len: int, vocab_size: int) -> "Batch":
    import numpy as np

    from trainer.data.batch import make_batch

    samples = np.random.default_rng(0).integers(0, vocab_size, (rows, seq_len + 1))
    return make_batch(samples, eod_id=None, document_mask=False)


def _check_losses(decoder: "nn.Module", peer: "nn.Module", batch: "Batch") -> None:
    """Check that both models compute the same function. Otherwise the comparison means nothing."""
    import torch

    with torch.no_grad():
        ours = float(decoder(batch.tokens, batch.positions, None, batch.labels)[0]) / batch.labels.numel()
        theirs = float(_peer_loss(peer, batch))
    say(f"  loss on the same weights: ours {ours:.6f}, peer {theirs:.6f}")
    # `not <=` also refuses NaN.
    if not abs(ours - theirs) <= _LOSS_TOLERANCE:
        raise RuntimeError(f"the models differ: our loss is {ours:.6f}, the peer's {theirs:.6f}, on the same weights")


def _peer_loss(peer: "nn.Module", batch: "Batch") -> "torch.Tensor":
    # With shift_labels transformers uses the labels as given, instead of shifting the tokens.
    return peer(input_ids=batch.tokens, labels=batch.labels, shift_labels=batch.labels).loss  # type: ignore[no-any-return]


def _our_step(setup: _Setup) -> Callable[[], object]:
    from trainer.objectives.language_model import LanguageModel

    objective = LanguageModel()
    return lambda: setup.engine.train_step([setup.batch], objective, 1e-4)


def _peer_step(setup: _Setup, model: "nn.Module") -> Callable[[], object]:
    import torch

    optim = OptimConfig()
    optimizer = torch.optim.AdamW(
        setup.peer.parameters(),
        lr=1e-4,
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        fused=True,
    )

    def step() -> None:
        optimizer.zero_grad()
        loss = _peer_loss(model, setup.batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(setup.peer.parameters(), optim.clip_grad)
        optimizer.step()
        # Our step returns its loss as a number too, which waits for the device.
        float(loss.detach())

    return step


def _compiled_step(setup: _Setup) -> Callable[[], object]:
    import torch

    step = _peer_step(setup, torch.compile(setup.peer))  # type: ignore[arg-type]
    say("  compiling the peer")
    start = time.perf_counter()
    step()
    setup.compile_seconds = time.perf_counter() - start
    return step


def _compare(setup: _Setup, seconds: dict[str, list[float]], peak: float) -> list[Comparison]:
    """Compare tokens per second with each form of the peer, then the shares of the matmul peak."""
    speed = {name: setup.tokens / statistics.median(taken) for name, taken in seconds.items()}
    rows, seq_len = setup.batch.tokens.shape
    parameters = sum(parameter.numel() for parameter in setup.engine.model.parameters())
    shape = f"{parameters / 1e6:.1f} M parameters, {rows} x {seq_len} tokens a step"
    if setup.name.endswith("bf16"):
        shape += "; ours keeps float32 main parameters and gradients, the peer trains bfloat16 parameters alone"
    lines = []
    for name in list(speed)[1:]:
        note = shape + (f"; compiled in {setup.compile_seconds:.0f} s, not timed" if name == "compiled" else "")
        case = f"{setup.name}, transformers {name}"
        lines.append(Comparison(case, speed["ours"], speed[name], speed["ours"] / speed[name], "tokens/s", note))
    used = {name: value * setup.flops / peak for name, value in speed.items()}
    best = setup.tokens * setup.flops / min(seconds["ours"]) / peak
    note = f"model FLOPs over the measured {peak / 1e9:.0f} GFLOP/s; ours {best:.2f} in its quickest step"
    others = "".join(f"; {name} {value:.2f}" for name, value in used.items() if name != "ours")
    case = f"{setup.name}, utilisation"
    ratio = used["ours"] / used["eager"]
    return [*lines, Comparison(case, used["ours"], used["eager"], ratio, "of matmul peak", note + others)]
