"""Decoding: time per step of the generation engine against transformers.generate and ctranslate2, same dense weights.

All sides decode greedily from prompts of the same length, with one thread. A step is one new token of every row; the
prompts' prefill is not counted. The sides alternate, and the clock is processor time, because others may use the
machine. The hybrid, which neither peer has, is measured at all contexts: its time should not depend on them.
"""

import copy
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

from trainer.benchmarks.report import Comparison, report, say
from trainer.errors import ConfigError

DESCRIPTION = "Time of a decoding step against transformers.generate and ctranslate2, dense and hybrid."

# Steps before the timing: the engine traces or compiles a model's blocks after so many.
_WARMUP = 70


@dataclass
class Config:
    """Model, batches and contexts.

    Attributes:
        json: Write the comparisons to this file.
        batches: Numbers of rows.
        contexts: Tokens before the measured steps.
        precision: Data type of the weights. ctranslate2 has no bf16 on a CPU and is compared in fp32 only.
        layers: Number of layers.
        hidden_size: Width of the model, a multiple of 64.
        vocab_size: Size of the vocabulary.
        steps: Steps of each side in each round.
        rounds: Number of rounds, in which the sides alternate.
        compile: Measure our engine with compiled layers too.
    """

    json: str | None = None
    batches: list[int] = field(default_factory=lambda: [1, 16])
    contexts: list[int] = field(default_factory=lambda: [512, 4096])
    precision: Literal["fp32", "bf16"] = "bf16"
    layers: int = 8
    hidden_size: int = 256
    vocab_size: int = 4096
    steps: int = 8
    rounds: int = 4
    compile: bool = True

    def __post_init__(self) -> None:
        for name in ("layers", "hidden_size", "vocab_size", "steps", "rounds"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.hidden_size % 64:
            raise ConfigError(f"hidden_size is {self.hidden_size}: it must be a multiple of 64, the size of a head")
        if not self.batches or not self.contexts or min(self.batches) < 1 or min(self.contexts) <= _WARMUP:
            raise ConfigError(f"batches must be positive, and contexts longer than {_WARMUP} tokens")
        if importlib.util.find_spec("transformers") is None:
            raise ConfigError("the peer is Hugging Face transformers: pip install 'transformers>=5,<6'")


# Called for another round, returns the seconds of its steps.
Side = Callable[[], list[float]]


def main(config: Config) -> None:
    """Measure every case and print the table."""
    import torch

    from trainer.benchmarks.transformers_peer import build_generating_peer

    torch.set_num_threads(1)
    lines = []
    dense, hybrid = (build(config, hybrid) for hybrid in (False, True))
    peers = {"transformers": build_generating_peer(dense, config.vocab_size)}
    if config.precision == "fp32" and importlib.util.find_spec("ctranslate2") is not None:
        peers["ctranslate2"] = _ctranslate2(peers["transformers"])
    for batch in config.batches:
        first_hybrid: dict[str, list[float]] = {}
        for context in config.contexts:
            prompts = torch.randint(config.vocab_size, (batch, context), generator=torch.Generator().manual_seed(0))
            say(f"{batch} rows of {context} tokens")
            names = ["ours", "compiled"] if config.compile else ["ours"]
            sides: dict[str, Side] = {name: _ours(config, dense, prompts, name == "compiled") for name in names}
            sides["transformers"] = _of_transformers(config, peers["transformers"], prompts)
            if "ctranslate2" in peers:
                sides["ctranslate2"] = _of_ctranslate2(config, peers["ctranslate2"], prompts)
            seconds = _by_turns(sides, config.rounds)
            case = f"{config.precision}, batch {batch}, context {context}"
            for name in names:
                own = "dense" if name == "ours" else "dense, compiled"
                for peer in list(sides)[len(names) :]:
                    lines.append(_compare(f"{own}, {case}: {peer}", seconds[name], seconds[peer], batch))
            hybrids = {name: _ours(config, hybrid, prompts, name == "compiled") for name in names}
            for name, own_seconds in _by_turns(hybrids, config.rounds).items():
                own = "hybrid" if name == "ours" else "hybrid, compiled"
                first = first_hybrid.setdefault(name, own_seconds)
                lines.append(_compare(f"{own}, {case}: itself at {config.contexts[0]}", own_seconds, first, batch))
    report("decoding: milliseconds of processor time per step", lines, config.json)


def _compare(case: str, ours: list[float], peer: list[float], batch: int) -> Comparison:
    own, other = statistics.median(ours), statistics.median(peer)
    note = f"{batch / own:.0f} and {batch / other:.0f} tokens a second; {len(ours)} steps, median"
    return Comparison(case, own * 1e3, other * 1e3, other / own, "ms", note)


def _by_turns(sides: dict[str, Side], rounds: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            seconds[name] += side()
    return seconds


def build(config: Config, hybrid: bool = False) -> Any:
    """Our model, with random weights: all full attention, or gated delta nets and one sliding window in four layers."""
    import torch

    from models.config import AttentionConfig, GatedDeltaNetConfig, MixerLayoutConfig, ModelConfig
    from models.decoder import build as build_decoder
    from models.decoder import initialize

    heads = config.hidden_size // 64
    model = ModelConfig(
        num_layers=config.layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=3 * config.hidden_size,
        mixers=MixerLayoutConfig(pattern="gated_delta_net*3, sliding_window_attention" if hybrid else "full_attention"),
        attention=AttentionConfig(num_heads=heads, num_kv_heads=max(heads // 2, 1), qkv_bias=True, window=256),
        gated_delta_net=GatedDeltaNetConfig(num_heads=heads, head_dim=64, expand_v=1.0),
        tie_embeddings=True,
    )
    decoder = build_decoder(
        model, config.vocab_size, dtype=torch.bfloat16 if config.precision == "bf16" else torch.float32
    )
    initialize(decoder, 0)
    return decoder


def _ours(config: Config, model: Any, prompts: Any, compile: bool) -> Side:
    from models.generation import Engine, Request, Sampling

    rows, context = prompts.shape
    engine = Engine(model, slots=rows, compile=compile)
    # All rows are running when the last prompt is complete; until then the first ones decode.
    chunks = -(-context // engine.chunk) * rows
    new = Sampling(chunks + _WARMUP + config.steps * config.rounds + 1, temperature=0)
    # The measured steps begin at the context.
    for row in prompts[:, : context - _WARMUP].tolist():
        engine.submit(Request(tuple(row), new))
    while engine.slots_in_use < rows:
        engine.step()
    for _ in range(_WARMUP):
        engine.step()

    def run() -> list[float]:
        seconds = []
        for _ in range(config.steps):
            start = time.process_time()
            engine.step()
            seconds.append(time.process_time() - start)
        return seconds

    return run


class _Clock:
    """A stopping criterion that notes the time of each token and stops nothing."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, tokens: Any, scores: Any, **options: Any) -> Any:
        import torch

        self.times.append(time.process_time())
        return torch.zeros(len(tokens), dtype=torch.bool)


def _of_transformers(config: Config, peer: Any, prompts: Any) -> Side:
    import torch
    from transformers import DynamicCache

    state: dict[str, Any] = {"tokens": prompts, "cache": DynamicCache(config=peer.config)}

    def run() -> list[float]:
        clock = _Clock()
        with torch.no_grad():
            state["tokens"] = peer.generate(
                state["tokens"],
                attention_mask=torch.ones_like(state["tokens"]),
                past_key_values=state["cache"],
                max_new_tokens=config.steps + 1,
                do_sample=False,
                pad_token_id=0,
                stopping_criteria=[clock],
            )
        return _differences(clock.times)

    return run


def _ctranslate2(peer: Any) -> Any:
    """The same weights in ctranslate2, through its own converter of Qwen2, which takes a model apart."""
    import ctranslate2
    from ctranslate2.converters import transformers as converter

    spec = converter._MODEL_LOADERS["Qwen2Config"].get_model_spec(copy.deepcopy(peer))
    tokens = ["<unk>", "<bos>", "<eos>", *(f"t{i}" for i in range(3, peer.config.vocab_size))]
    spec.register_vocabulary(tokens)
    spec.config.bos_token, spec.config.eos_token, spec.config.unk_token = tokens[1], tokens[2], tokens[0]
    spec.config.layer_norm_epsilon = peer.config.rms_norm_eps
    spec.validate()
    spec.optimize()
    with tempfile.TemporaryDirectory() as directory:
        spec.save(directory)
        return ctranslate2.Generator(directory, device="cpu", compute_type="float32", inter_threads=1, intra_threads=1)


def _of_ctranslate2(config: Config, generator: Any, prompts: Any) -> Side:
    start = [[f"t{max(token, 3)}" for token in row] for row in prompts.tolist()]

    def run() -> list[float]:
        times = []

        def note(result: Any) -> bool:
            if result.batch_id == 0:
                times.append(time.process_time())
            return False

        # The prefill is repeated in every round, and not counted.
        generator.generate_batch(
            start,
            max_length=config.steps + 2,
            min_length=config.steps + 2,
            include_prompt_in_result=False,
            callback=note,
        )
        return _differences(times[1:])

    return run


def _differences(times: list[float]) -> list[float]:
    return [after - before for before, after in pairwise(times)]
