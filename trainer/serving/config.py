"""Settings of the server. Imports no torch."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trainer.errors import ConfigError

API_KEY = "SPIKETRAIN_API_KEY"


@dataclass
class ServeConfig:
    """Settings of the server.

    Attributes:
        checkpoint: A run directory (its newest complete checkpoint), one checkpoint, weights, a Hugging Face directory,
            or a GGUF file.
        tokenizer: Use this tokenizer instead of the checkpoint's.
        model_name: The name of the model in requests. Default: the last part of checkpoint.
        device: cpu or cuda; auto takes CUDA if available.
        host: Address to listen on. Addresses that other machines reach need an API key.
        port: Port to listen on; 0 takes a free one.
        api_key: Key that requests must bear, also as the environment variable SPIKETRAIN_API_KEY. Without one, none.
        slots: Choices that are continued at once.
        queue: Choices that may wait for a slot. Further requests get status 429.
        max_prompt_tokens: Longest prompt.
        max_new_tokens: Longest choice.
        max_body_bytes: Largest body of a request.
        request_seconds: A request that takes longer is given up.
        drain_seconds: After SIGTERM or SIGINT, requests in flight have this long.
        prefixes: Number of beginnings of prompts whose states are kept for prompts that share them.
        deterministic: Make a seeded answer independent, to the last bit, of what else is running. Slower: choices are
            then continued one at a time.
    """

    checkpoint: str = "runs/laptop"
    tokenizer: str | None = None
    model_name: str | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    slots: int = 16
    queue: int = 64
    max_prompt_tokens: int = 8192
    max_new_tokens: int = 2048
    max_body_bytes: int = 1 << 20
    request_seconds: float = 600.0
    drain_seconds: float = 30.0
    prefixes: int = 0
    deterministic: bool = False

    def __post_init__(self) -> None:
        if not Path(self.checkpoint).exists():
            raise ConfigError(f"checkpoint: {self.checkpoint} does not exist; give a run directory")
        for name in ("slots", "max_prompt_tokens", "max_new_tokens", "max_body_bytes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}: it must be at least 1")
        for name in ("queue", "drain_seconds", "prefixes"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"{name} is {getattr(self, name)}: it must not be negative")
        if not 0 < self.request_seconds < float("inf"):
            raise ConfigError(f"request_seconds is {self.request_seconds}: it must be positive")
        if not 0 <= self.port < 1 << 16:
            raise ConfigError(f"port is {self.port}: it must be from 0 to {(1 << 16) - 1}")
        self.api_key = self.api_key or os.environ.get(API_KEY) or None
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable()):
            raise ConfigError("api_key has characters that a header cannot hold; use printable ASCII")

    @property
    def name(self) -> str:
        """The name of the model in requests."""
        return self.model_name or Path(self.checkpoint).resolve().name
