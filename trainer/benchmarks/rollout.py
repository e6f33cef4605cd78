"""Rollouts: answers a second to one long prompt, by the generation engine against transformers.generate, same weights.

A group of answers shares a prompt. The engine computes the prompt once and clones its state; `transformers` computes it
once for each answer, as does the engine if every answer is a request of its own. All sides draw at temperature 1 with
one thread, and every answer has the same number of tokens. The sides alternate, and the clock is processor time.
"""

import importlib.util
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from trainer.benchmarks.report import Comparison, report, say
from trainer.errors import ConfigError

DESCRIPTION = "Answers a second to one long prompt, against transformers.generate and without clones."


@dataclass
class Config:
    """Model and answers.

    Attributes:
        json: Write the comparisons to this file.
        samples: Answers to the prompt.
        prompt: Tokens of the prompt.
        new_tokens: Tokens of an answer.
        precision: Data type of the weights.
        layers: Number of layers.
        hidden_size: Width of the model, a multiple of 64.
        vocab_size: Size of the vocabulary.
        rounds: Number of rounds, in which the sides alternate.
    """

    json: str | None = None
    samples: int = 64
    prompt: int = 2048
    new_tokens: int = 32
    precision: Literal["fp32", "bf16"] = "bf16"
    layers: int = 4
    hidden_size: int = 256
    vocab_size: int = 4096
    rounds: int = 3

    def __post_init__(self) -> None:
        for name in ("samples", "prompt", "new_tokens", "layers", "hidden_size", "vocab_size", "rounds"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.hidden_size % 64:
            raise ConfigError(f"hidden_size is {self.hidden_size}: it must be a multiple of 64, the size of a head")
        if importlib.util.find_spec("transformers") is None:
            raise ConfigError("the peer is Hugging Face transformers: pip install 'transformers>=5,<6'")


def main(config: Config) -> None:
    """Measure and print the table."""
    import torch

    from trainer.benchmarks.decode import Config as DecodeConfig
    from trainer.benchmarks.decode import build
    from trainer.benchmarks.transformers_peer import build_generating_peer

    torch.set_num_threads(1)
    model = build(
        DecodeConfig(
            precision=config.precision,
            layers=config.layers,
            hidden_size=config.hidden_size,
            vocab_size=config.vocab_size,
        )
    )
    prompt = torch.randint(config.vocab_size, (config.prompt,), generator=torch.Generator().manual_seed(0)).tolist()
    sides: dict[str, Callable[[], object]] = {
        "ours": lambda: _ours(config, model, prompt, clones=True),
        "without clones": lambda: _ours(config, model, prompt, clones=False),
        "transformers": lambda: _of_transformers(config, peer, prompt),
    }
    peer = build_generating_peer(model, config.vocab_size)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(config.rounds):
        for name, side in sides.items():
            say(f"round {number + 1} of {config.rounds}: {name}")
            start = time.process_time()
            side()
            seconds[name].append(time.process_time() - start)
    own = statistics.median(seconds["ours"])
    case = f"{config.samples} answers of {config.new_tokens} tokens to {config.prompt}, {config.precision}"
    lines = []
    for name in list(sides)[1:]:
        other = statistics.median(seconds[name])
        note = (
            f"{config.samples / own:.1f} and {config.samples / other:.1f} answers a second; median of {config.rounds}"
        )
        lines.append(Comparison(f"{case}: {name}", own, other, other / own, "s", note))
    report("rollouts: seconds of processor time", lines, config.json)


def _ours(config: Config, model: Any, prompt: list[int], clones: bool) -> None:
    from models.generation import Engine, Request, Sampling

    engine = Engine(model, slots=config.samples)
    if clones:
        requests = [Request(tuple(prompt), Sampling(config.new_tokens), config.samples)]
    else:
        requests = [Request(tuple(prompt), Sampling(config.new_tokens, seed=seed)) for seed in range(config.samples)]
    completions = engine.generate(requests)
    assert sum(map(len, completions)) == config.samples


def _of_transformers(config: Config, peer: Any, prompt: list[int]) -> None:
    import torch

    tokens = torch.tensor([prompt])
    with torch.no_grad():
        found = peer.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=config.new_tokens,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            num_return_sequences=config.samples,
            pad_token_id=0,
        )
    assert found.shape == (config.samples, config.prompt + config.new_tokens)
