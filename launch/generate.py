"""Sample text from a checkpoint: of one prompt to the terminal, or of a file of prompts into a file.

spiketrain generate --checkpoint runs/laptop --prompt 'def main(' --temperature 0.8
spiketrain generate --checkpoint runs/laptop --prompts prompts.jsonl --output completions.jsonl
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from trainer.cli import entry
from trainer.data.prompts import Completions, Prompt, read_prompts
from trainer.data.text import read_utf8
from trainer.errors import ConfigError

if TYPE_CHECKING:
    from models.generation import Engine, Event, Request
    from trainer.data.tokenizer import Tokenizer


@dataclass
class GenerateConfig:
    """Settings of text generation.

    Attributes:
        checkpoint: A run directory (its newest complete checkpoint), one checkpoint, weights, a Hugging Face directory,
            or a GGUF file.
        prompt: Text to continue; empty starts a document.
        prompt_file: Read the prompt byte for byte from this UTF-8 file, instead of prompt.
        prompts: Complete all prompts of this file: lines of text, or a .jsonl with "prompt" or "messages" in each line.
        output: Write a line of JSON for each prompt of prompts to this file. Prompts that it has already are skipped.
        chat: Put prompts into the tokenizer's chat template, as messages of a user.
        max_new_tokens: Stop after this many tokens, unless the document ends first.
        samples: Number of continuations.
        temperature: Divides the logits; 0 always takes the most likely token.
        top_k: Draw from this many of the most likely tokens; 0 does not limit them.
        top_p: Draw from the most likely tokens whose probabilities add up to this.
        min_p: Draw from tokens at least this many times as likely as the most likely one.
        repetition_penalty: Makes tokens of the prompt and of the text so far less likely; 1 does not.
        stop: Texts that end a continuation, and are left out of it.
        seed: Seed of the draws.
        slots: Continuations that are computed at once.
        deterministic: Make every continuation independent of the others to the last bit, at the cost of speed.
        compile: Compile the layers with a C++ compiler: up to twice as fast, after half a minute. For many tokens.
        tokenizer: Use this tokenizer instead of the checkpoint's.
        device: cpu or cuda; auto takes CUDA if available.
    """

    checkpoint: str = "runs/laptop"
    prompt: str = ""
    prompt_file: str | None = None
    prompts: str | None = None
    output: str | None = None
    chat: bool = False
    max_new_tokens: int = 256
    samples: int = 1
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 0.95
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: list[str] = field(default_factory=list)
    seed: int = 1234
    slots: int = 16
    deterministic: bool = False
    compile: bool = False
    tokenizer: str | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def __post_init__(self) -> None:
        if not Path(self.checkpoint).exists():
            raise ConfigError(f"checkpoint: {self.checkpoint} does not exist; give a run directory")
        for name in ("max_new_tokens", "samples", "slots"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if not self.temperature >= 0:
            raise ConfigError(f"temperature is {self.temperature}: it must not be negative (0 is greedy)")
        if self.top_k < 0:
            raise ConfigError(f"top_k is {self.top_k}: it must not be negative (0 does not limit)")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}: it must be in (0, 1]")
        if not 0 <= self.min_p <= 1:
            raise ConfigError(f"min_p is {self.min_p}: it must be in [0, 1]")
        if not self.repetition_penalty > 0:
            raise ConfigError(f"repetition_penalty is {self.repetition_penalty}: it must be positive (1 is none)")
        if not all(self.stop):
            raise ConfigError("stop has an empty text, which would end everything at once; leave it out")
        given = [name for name in ("prompt", "prompt_file", "prompts") if getattr(self, name)]
        if len(given) > 1:
            raise ConfigError(f"{' and '.join(given)} are both given; leave one of them out")
        if self.output is not None and self.prompts is None:
            raise ConfigError("output is for the completions of prompts; give a file of prompts too")
        self._read()

    def _read(self) -> None:
        """Check the files, and read a prompt from its file."""
        for name in ("prompt_file", "prompts"):
            path = getattr(self, name)
            if path is not None and not Path(path).is_file():
                raise ConfigError(f"{name}: {path} does not exist")
        if self.output is not None and not Path(self.output).absolute().parent.is_dir():
            raise ConfigError(f"output: there is no directory {Path(self.output).absolute().parent}; create it")
        if self.prompt_file is not None:
            self.prompt = read_utf8("prompt_file", Path(self.prompt_file))
        try:
            self.prompt.encode()
        except UnicodeEncodeError as error:
            # Python represents non-UTF-8 bytes of the command line as lone surrogates.
            raise ConfigError("prompt is not UTF-8; convert it, or give a file with prompt_file") from error


def main(config: GenerateConfig) -> None:
    """Load the model, then complete the prompts: into the output file, or to the terminal as the text grows."""
    # Bad files are found before the model is read.
    prompts = [Prompt(config.prompt)] if config.prompts is None else read_prompts(Path(config.prompts))
    output = None if config.output is None else Completions(Path(config.output), prompts)
    left = [number for number in range(len(prompts)) if output is None or number not in output.done]
    if not left:
        print(f"{config.output} has all completions already", file=sys.stderr)
        return

    from models.generation import Engine
    from trainer.device import choose_device
    from trainer.stored.inference import load_model

    loaded = load_model(config.checkpoint, choose_device(config.device), config.tokenizer)
    tokenizer = loaded.require_tokenizer()
    requests = _requests(config, tokenizer, prompts)
    print(f"checkpoint: {loaded.path}", file=sys.stderr)
    if config.tokenizer is not None:
        print(f"tokenizer: {config.tokenizer}, in place of the checkpoint's", file=sys.stderr)
    try:
        engine = Engine(
            loaded.model,
            slots=config.slots,
            vocab_size=tokenizer.vocab_size,
            deterministic=config.deterministic,
            compile=config.compile,
            prefixes=4 if len(left) > 1 else 0,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    try:
        if output is None:
            _show(config, engine, tokenizer, prompts, requests)
        else:
            _write(config, engine, tokenizer, output, requests, left)
    except FloatingPointError as error:
        raise ConfigError(f"checkpoint: {loaded.path}: {error}; choose another, or a temperature") from error


def _requests(config: GenerateConfig, tokenizer: "Tokenizer", prompts: list[Prompt]) -> "list[Request]":
    from models.generation import Request, Sampling
    from trainer.data.chat import ChatTemplate, stop_tokens

    sampling = Sampling(
        config.max_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        min_p=config.min_p,
        repetition_penalty=config.repetition_penalty,
        seed=config.seed,
        stop_tokens=stop_tokens(tokenizer),
    )
    needs_template = config.chat or any(prompt.messages is not None for prompt in prompts)
    template = ChatTemplate(tokenizer) if needs_template else None
    requests = []
    for prompt in prompts:
        messages = [{"role": "user", "content": prompt.text}] if prompt.messages is None else prompt.messages
        if template is not None and (config.chat or prompt.messages is not None):
            ids = template.encode(messages)
        else:
            # In training, every document follows the end of another.
            ids = tokenizer.encode(prompt.text) or [tokenizer.eod_id]
        requests.append(Request(tuple(ids), sampling, config.samples))
    return requests


class _Text:
    """The text of one sample as its events arrive, up to a stop string."""

    def __init__(self, config: GenerateConfig, tokenizer: "Tokenizer", request: "Request") -> None:
        from models.generation import StopStrings, TextStream

        self._stream = TextStream(tokenizer.decode, request.prompt)
        self._stops = StopStrings(config.stop)
        self.tokens = 0
        self.finish: str | None = None

    def feed(self, event: "Event") -> str:
        """Return the text that can be shown after an event."""
        if self.finish is not None:
            return ""
        self.tokens += 1
        text = "" if event.finish == "stop" else self._stops.feed(self._stream.feed(event.token))
        if event.finish is not None:
            text += self._stops.feed(self._stream.finish())
        if self._stops.stopped is not None:
            self.finish = "stop"
        elif event.finish is not None:
            text += self._stops.finish()
            self.finish = event.finish
        return text


def _events(
    config: GenerateConfig, engine: "Engine", tokenizer: "Tokenizer", requests: "list[Request]", numbers: list[int]
) -> Iterator[tuple[int, int, _Text, str]]:
    """Complete requests; yield (number of the prompt, sample, the sample so far, new text) as text arrives."""
    by_request = {engine.submit(requests[number]): number for number in numbers}
    texts: dict[tuple[int, int], _Text] = {}
    while not engine.is_idle:
        for event in engine.step():
            number = by_request[event.request]
            text = texts.setdefault((number, event.sample), _Text(config, tokenizer, requests[number]))
            was_open = text.finish is None
            shown = text.feed(event)
            if was_open and text.finish is not None:
                # After a stop string, which the engine knows nothing of.
                engine.cancel(event.request, event.sample)
            if was_open:
                yield number, event.sample, text, shown


def _show(
    config: GenerateConfig, engine: "Engine", tokenizer: "Tokenizer", prompts: list[Prompt], requests: "list[Request]"
) -> None:
    """Print all samples in order: the first one that is not finished as it grows, later ones when it is their turn."""
    order = [(number, sample) for number in range(len(requests)) for sample in range(config.samples)]
    held: dict[tuple[int, int], list[str]] = {key: [] for key in order}
    finished: set[tuple[int, int]] = set()
    turn = 0
    _begin(config, prompts, order, turn)
    for number, sample, text, shown in _events(config, engine, tokenizer, requests, list(range(len(requests)))):
        held[number, sample].append(shown)
        if text.finish is not None:
            finished.add((number, sample))
        while turn < len(order):
            print("".join(held[order[turn]]), end="", flush=True)
            held[order[turn]].clear()
            if order[turn] not in finished:
                break
            print()
            turn += 1
            _begin(config, prompts, order, turn)


def _begin(config: GenerateConfig, prompts: list[Prompt], order: list[tuple[int, int]], turn: int) -> None:
    """Print what stands before a sample: which one it is, and the prompt if it is text."""
    if turn == len(order):
        return
    number, sample = order[turn]
    if len(prompts) > 1 or config.samples > 1:
        of_prompt = f"prompt {number + 1} of {len(prompts)}, " if len(prompts) > 1 else ""
        print(f"--- {of_prompt}sample {sample + 1} of {config.samples} ---", file=sys.stderr)
    if not config.chat:
        print(prompts[number].text, end="", flush=True)


def _write(
    config: GenerateConfig,
    engine: "Engine",
    tokenizer: "Tokenizer",
    output: Completions,
    requests: "list[Request]",
    left: list[int],
) -> None:
    """Write the completions of the prompts that are left, each when all of its samples are finished."""
    samples: dict[int, list[dict[str, Any]]] = {
        number: [{"text": ""} for _ in range(config.samples)] for number in left
    }
    open_samples = dict.fromkeys(left, config.samples)
    tokens = 0
    for number, sample, text, shown in _events(config, engine, tokenizer, requests, left):
        record = samples[number][sample]
        record["text"] += shown
        tokens += 1
        if text.finish is None:
            continue
        record |= {"finish": text.finish, "tokens": text.tokens}
        open_samples[number] -= 1
        if not open_samples[number]:
            output.add(number, samples.pop(number))
            done, total = len(output.done), len(requests)
            print(f"{done} of {total} prompts, {tokens} new tokens", file=sys.stderr, flush=True)


if __name__ == "__main__":
    entry(main, GenerateConfig, "Sample text from a checkpoint.")
