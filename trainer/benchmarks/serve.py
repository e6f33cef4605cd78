"""Throughput and time to first token of the HTTP server: several clients at once against one after another.

Server and clients are processes of one machine, which they share. Every client sends its next request when the last
one is answered; all numbers of clients send the same requests, as streams.
"""

import asyncio
import json
import multiprocessing
import os
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from urllib.parse import urlsplit

from trainer.benchmarks.report import Comparison, report, say
from trainer.errors import ConfigError
from trainer.serving.config import ServeConfig

DESCRIPTION = "Requests and tokens a second, and time to first token, of `serve`: several clients against one."


@dataclass
class Config:
    """Model, load and rounds.

    Attributes:
        json: Write the comparisons to this file.
        checkpoint: What to serve. Default: an untrained model of the file `model`.
        model: Model file (YAML), in fp32.
        vocab_size: Pieces of the tokenizer that is learned for it from the standard library's source.
        clients: Numbers of clients, each against one.
        requests: Requests of a round.
        prompt_tokens: Length of a prompt.
        new_tokens: Tokens to draw, unless the document ends before.
        slots: Requests that the server continues at once.
        rounds: Rounds of each number of clients, by turns; the medians count.
        threads: CPU threads of the server; 0 uses every core.
    """

    json: str | None = None
    checkpoint: str | None = None
    model: str = "configs/models/laptop.yaml"
    vocab_size: int = 1024
    clients: list[int] = field(default_factory=lambda: [1, 8, 32])
    requests: int = 32
    prompt_tokens: int = 32
    new_tokens: int = 32
    slots: int = 32
    rounds: int = 3
    threads: int = 0

    def __post_init__(self) -> None:
        for name in ("requests", "prompt_tokens", "new_tokens", "slots", "rounds", "vocab_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if not self.clients or min(self.clients) < 1 or max(self.clients) > self.requests:
            raise ConfigError(f"clients are {self.clients}: they must be from 1 to the {self.requests} requests")
        if self.threads < 0:
            raise ConfigError(f"threads is {self.threads}: it must not be negative (0 is every core)")
        if not Path(self.checkpoint or self.model).exists():
            raise ConfigError(f"{self.checkpoint or self.model} does not exist; name a checkpoint or a model file")


@dataclass(frozen=True)
class Round:
    """What the clients of one round saw.

    Attributes:
        seconds: From the first request to the last token.
        tokens: Tokens drawn.
        first: Seconds to the first token of each request.
    """

    seconds: float
    tokens: int
    first: tuple[float, ...]


def main(config: Config) -> None:
    """Measure every number of clients, and print the table."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = config.checkpoint or _untrained(config, Path(folder))
        with _server(config, checkpoint) as address:
            rounds = _measure(config, address, ServeConfig(checkpoint).name)
    lines = [line for clients in config.clients for line in _compare(clients, rounds[clients], rounds[1])]
    title = f"serve: {config.requests} requests of {config.prompt_tokens} tokens, up to {config.new_tokens} new ones"
    report(f"{title}; the peer is one client", lines, config.json)


def _untrained(config: Config, folder: Path) -> str:
    """Write weights of an untrained model with a tokenizer; return their directory."""
    import torch
    import yaml

    from models.decoder import build, initialize
    from models.parameters import declared
    from trainer.cli import from_mapping
    from trainer.config import PretrainConfig
    from trainer.data.tokenizer import learn_sentencepiece
    from trainer.stored import weights

    say(f"{config.model}: a tokenizer and untrained weights")
    model = from_mapping(PretrainConfig, {"model": yaml.safe_load(Path(config.model).read_text())}).model
    sources = sorted(Path(os.__file__).parent.glob("*.py"))[:40]
    texts = [source.read_text(encoding="utf-8") for source in sources]
    (folder / "tokenizer").mkdir()
    learn_sentencepiece(texts, "bpe", config.vocab_size).save(folder / "tokenizer")
    decoder = build(model, config.vocab_size)
    initialize(decoder, 0)
    drawn = {row.name: row.tensor.detach() for row in declared(decoder).values()}

    def read(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            tensor.copy_(drawn[name])

    output = folder / Path(config.model).stem
    weights.write(output, decoder, read, tokenizer=folder / "tokenizer", max_file_bytes=1e10, report=say)
    return str(output)


@contextmanager
def _server(config: Config, checkpoint: str) -> Iterator[str]:
    """A server in a process of its own; its address."""
    settings = ServeConfig(checkpoint, port=0, slots=config.slots, queue=max(config.clients))
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(settings, config.threads, there))
    process.start()
    there.close()
    try:
        yield here.recv()
    except EOFError as error:
        raise RuntimeError("the server has not started") from error
    finally:
        process.terminate()
        process.join()


def _serve(settings: ServeConfig, threads: int, there: Connection) -> None:
    from trainer.device import configure_threads
    from trainer.serving.server import serve

    configure_threads(threads)
    serve(settings, there.send)


def _measure(config: Config, address: str, model: str) -> dict[int, list[Round]]:
    """The rounds of every number of clients; always of one, too."""
    draw = random.Random(0)
    fields = {"model": model, "max_tokens": config.new_tokens, "stream": True}
    fields |= {"stream_options": {"include_usage": True}}
    bodies = []
    for number in range(config.requests):
        prompt = [draw.randrange(2, config.vocab_size) for _ in range(config.prompt_tokens)]
        bodies.append(json.dumps(fields | {"prompt": prompt, "seed": number}).encode())
    rounds: dict[int, list[Round]] = {clients: [] for clients in dict.fromkeys((1, *config.clients))}
    for turn in range(-1, config.rounds):
        for clients, found in rounds.items():
            # A first round warms up with few requests.
            seen = asyncio.run(_round(address, bodies if turn >= 0 else bodies[: max(clients, 2)], clients))
            if turn >= 0:
                found.append(seen)
                say(f"  round {turn + 1}/{config.rounds}: {clients} clients, {seen.tokens / seen.seconds:.0f} tokens/s")
    return rounds


async def _round(address: str, bodies: list[bytes], clients: int) -> Round:
    left = iter(bodies)
    first: list[float] = []

    async def client() -> int:
        tokens = 0
        for body in left:
            seconds, count = await _ask(address, body)
            first.append(seconds)
            tokens += count
        return tokens

    start = time.perf_counter()
    tokens = sum(await asyncio.gather(*(client() for _ in range(clients))))
    return Round(time.perf_counter() - start, tokens, tuple(first))


async def _ask(address: str, body: bytes) -> tuple[float, int]:
    """Send a request; return the seconds to its first event, and the tokens drawn."""
    where = urlsplit(address)
    start = time.perf_counter()
    reader, writer = await asyncio.open_connection(where.hostname, where.port)
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {where.netloc}\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    writer.write(head.encode() + body)
    status = await reader.readline()
    if b" 200 " not in status:
        raise RuntimeError(f"the server answered {status.decode().strip()}: {(await reader.read()).decode()}")
    seconds, tokens = 0.0, 0
    async for line in reader:
        if line.startswith(b"data: {"):
            seconds = seconds or time.perf_counter() - start
            tokens = (json.loads(line.removeprefix(b"data: ")).get("usage") or {}).get("completion_tokens", tokens)
    writer.close()
    return seconds, tokens


def _compare(clients: int, rounds: list[Round], peer: list[Round]) -> list[Comparison]:
    """The table's lines of one number of clients."""
    requests = len(rounds[0].first)
    name = f"{clients} client{'s' if clients > 1 else ''}"
    note = f"{rounds[0].tokens} tokens a round"
    lines = []
    for unit in ("tokens/s", "requests/s"):
        ours, theirs = (
            statistics.median((seen.tokens if unit == "tokens/s" else requests) / seen.seconds for seen in side)
            for side in (rounds, peer)
        )
        lines.append(Comparison(f"{name}, {unit}", ours, theirs, ours / theirs, unit, note))
    for share in (50, 99):
        ours, theirs = (1e3 * _percentile([x for seen in side for x in seen.first], share) for side in (rounds, peer))
        lines.append(Comparison(f"{name}, first token, p{share}", ours, theirs, theirs / ours, "ms", note))
    return lines


def _percentile(values: list[float], share: int) -> float:
    """The smallest value that so many percent of the values do not exceed."""
    ordered = sorted(values)
    return ordered[max(-(-len(ordered) * share // 100) - 1, 0)]
