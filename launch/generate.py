"""Sample text from a checkpoint.

spiketrain generate --checkpoint runs/laptop --prompt 'def main(' --temperature 0.8
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trainer.cli import entry
from trainer.data.text import read_utf8
from trainer.errors import ConfigError


@dataclass
class GenerateConfig:
    """Settings of text generation.

    Attributes:
        checkpoint: A run directory (its newest complete checkpoint), one checkpoint, weights, a Hugging Face directory,
            or a GGUF file.
        prompt: Text to continue; empty starts a document.
        prompt_file: Read the prompt byte for byte from this UTF-8 file, instead of prompt.
        max_new_tokens: Stop after this many tokens, unless the document ends first.
        samples: Number of continuations.
        temperature: Divides the logits; 0 always takes the most likely token.
        top_p: Draw from the most likely tokens whose probabilities add up to this.
        seed: Seed of the draws.
        tokenizer: Use this tokenizer instead of the checkpoint's.
        device: cpu or cuda; auto takes CUDA if available.
    """

    checkpoint: str = "runs/laptop"
    prompt: str = ""
    prompt_file: str | None = None
    max_new_tokens: int = 256
    samples: int = 1
    temperature: float = 0.8
    top_p: float = 0.95
    seed: int = 1234
    tokenizer: str | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def __post_init__(self) -> None:
        if not Path(self.checkpoint).exists():
            raise ConfigError(f"checkpoint: {self.checkpoint} does not exist; give a run directory")
        for name in ("max_new_tokens", "samples"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if not self.temperature >= 0:
            raise ConfigError(f"temperature is {self.temperature}: it must not be negative (0 is greedy)")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}: it must be in (0, 1]")
        if self.prompt_file is not None:
            if self.prompt:
                raise ConfigError("prompt and prompt_file are both given; leave one of them out")
            if not Path(self.prompt_file).is_file():
                raise ConfigError(f"prompt_file: {self.prompt_file} does not exist")
            self.prompt = read_utf8("prompt_file", Path(self.prompt_file))
        try:
            self.prompt.encode()
        except UnicodeEncodeError as error:
            # Python represents non-UTF-8 bytes of the command line as lone surrogates.
            raise ConfigError("prompt is not UTF-8; convert it, or give a file with prompt_file") from error


def main(config: GenerateConfig) -> None:
    """Load the model, then sample and print each continuation with its prompt as it grows."""
    from models.generation import Engine, Request, Sampling, stream_text
    from trainer.device import choose_device
    from trainer.stored.inference import load_model

    device = choose_device(config.device)
    loaded = load_model(config.checkpoint, device, config.tokenizer)
    tokenizer = loaded.require_tokenizer()
    # In training, every document follows the end of another.
    ids = tokenizer.encode(config.prompt) or [tokenizer.eod_id]
    print(f"checkpoint: {loaded.path}", file=sys.stderr)
    if config.tokenizer is not None:
        print(f"tokenizer: {config.tokenizer}, in place of the checkpoint's", file=sys.stderr)
    engine = Engine(loaded.model, slots=1, vocab_size=tokenizer.vocab_size)
    for number in range(config.samples):
        if config.samples > 1:
            print(f"--- sample {number + 1} of {config.samples} ---", file=sys.stderr)
        sampling = Sampling(
            config.max_new_tokens,
            temperature=config.temperature,
            top_p=config.top_p,
            seed=config.seed + number,
            stop_tokens=(tokenizer.eod_id,),
        )
        drawn = engine.stream(Request(tuple(ids), sampling))
        continuation = (event.token for event in drawn if event.finish != "stop")
        print(config.prompt, end="", flush=True)
        try:
            for text in stream_text(tokenizer.decode, ids, continuation):
                print(text, end="", flush=True)
        except FloatingPointError as error:
            raise ConfigError(f"checkpoint: {loaded.path}: {error}; choose another, or a temperature") from error
        print()


if __name__ == "__main__":
    entry(main, GenerateConfig, "Sample text from a checkpoint.")
