"""Sockets and signals of the server, and its life: bind, load, listen, drain, end."""

import asyncio
import ipaddress
import socket
import sys
import time
from collections.abc import Callable, Sequence
from types import FrameType

import uvicorn

from models.generation import Engine
from trainer.data.chat import ChatTemplate, Message, stop_tokens
from trainer.data.tokenizer import Tokenizer
from trainer.device import choose_device
from trainer.errors import ConfigError
from trainer.serving.app import Application
from trainer.serving.config import API_KEY, ServeConfig
from trainer.serving.errors import unavailable
from trainer.serving.metrics import Metrics
from trainer.serving.scheduler import Scheduler
from trainer.serving.service import Served, Service
from trainer.stored.inference import load_model

# After the drain, answers that their clients have not read yet have this long.
_SECONDS_TO_FLUSH = 2


def bind(config: ServeConfig) -> socket.socket:
    """Reserve the address. Clients cannot connect before the server listens.

    Raises:
        ConfigError: the address is not known, in use, or can be reached from outside and there is no API key.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0]
    # Names that are no names are UnicodeErrors.
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"host: {config.host!r} is no address of this machine; give one, as 127.0.0.1") from error
    if config.api_key is None and not ipaddress.ip_address(address[0]).is_loopback:
        raise ConfigError(
            f"host {config.host} can be reached from other machines: set api_key, or the environment variable {API_KEY}"
        )
    bound = socket.socket(family, kind, protocol)
    # The connections of an earlier server may linger.
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise ConfigError(
            f"{config.host}:{config.port} cannot be listened on ({error.strerror}); choose another host or port"
        ) from error
    return bound


def serve(config: ServeConfig, announce: Callable[[str], None]) -> int:
    """Reserve the address, load the model, and serve until a signal ends it.

    Args:
        config: The settings.
        announce: Called with the address, http://HOST:PORT, once clients can connect.

    Returns:
        The exit code: 0, or 1 if the engine has failed.

    Raises:
        ConfigError: the address or the model cannot be served.
    """
    # Before the model is loaded, which may take minutes.
    bound = bind(config)
    loaded = load_model(config.checkpoint, choose_device(config.device), config.tokenizer)
    tokenizer = loaded.require_tokenizer()

    def make_engine() -> Engine:
        return Engine(
            loaded.model,
            slots=config.slots,
            vocab_size=tokenizer.vocab_size,
            deterministic=config.deterministic,
            prefixes=config.prefixes,
        )

    served = Served(config.name, tokenizer, stop_tokens(tokenizer), _renderer(tokenizer))
    return asyncio.run(Server(config, served, make_engine, announce).run_on(bound))


def _renderer(tokenizer: Tokenizer) -> Callable[[Sequence[Message]], list[int]]:
    """What turns conversations into tokens; without a template it refuses all of them with the reason."""
    try:
        return ChatTemplate(tokenizer).encode
    except ConfigError as error:
        reason = str(error)

    def refuse(messages: Sequence[Message]) -> list[int]:
        raise ConfigError(reason)

    return refuse


class Server(uvicorn.Server):
    """A web server that finishes what is in flight before it ends.

    The first SIGTERM or SIGINT refuses further requests with 503 and ends the server as soon as nothing is in flight,
    at the latest after `drain_seconds`. A second one ends it at once.

    Args:
        config: The settings.
        served: The model.
        make_engine: Makes an engine for it.
        announce: Called with the address once clients can connect.
    """

    def __init__(
        self, config: ServeConfig, served: Served, make_engine: Callable[[], Engine], announce: Callable[[str], None]
    ) -> None:
        metrics = Metrics()
        metrics.watch("slots", "Choices that can be continued at once", lambda: config.slots)
        self._announce = announce
        self._scheduler = Scheduler(make_engine, config.slots + config.queue, metrics)
        self._service = Service(served, self._scheduler, config)
        self._application = Application(self._service, metrics)
        self._deadline = float("inf")
        super().__init__(
            uvicorn.Config(
                self._application.asgi,
                lifespan="off",
                ws="none",
                log_config=None,
                # The application reports its failures itself, and those of clients are in the figures.
                log_level="critical",
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=_SECONDS_TO_FLUSH,
            )
        )

    async def run_on(self, bound: socket.socket) -> int:
        """Serve on a socket until the end; return the exit code."""
        self._scheduler.start()
        try:
            await self.serve(sockets=[bound])
        finally:
            self._scheduler.stop(unavailable("the server is shutting down"))
        if self._scheduler.failure is not None:
            print(f"error: the engine has failed: {self._scheduler.failure}", file=sys.stderr, flush=True)
            return 1
        return 0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Take a signal."""
        if self._service.is_draining:
            self.should_exit = self.force_exit = True
        self._service.is_draining = True
        self._deadline = min(self._deadline, time.monotonic() + self._service.config.drain_seconds)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say where."""
        await super().startup(sockets)
        assert sockets
        host, port = sockets[0].getsockname()[:2]
        where = f"[{host}]" if ":" in host else host
        self._announce(f"http://{where}:{port}")

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second: whether to end."""
        if self._scheduler.failure is not None:
            self.should_exit = True
        if self._service.is_draining and not self.should_exit:
            late = time.monotonic() > self._deadline
            if late:
                self._scheduler.stop(unavailable("the server is shutting down"))
            self.should_exit = late or not self._application.in_flight
        return await super().on_tick(counter)
