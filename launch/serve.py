"""Serve a model over HTTP, with OpenAI's interface.

spiketrain serve --checkpoint runs/laptop --port 8000
"""

from trainer.cli import entry
from trainer.serving.config import ServeConfig


def main(config: ServeConfig) -> int:
    """Serve until SIGTERM or SIGINT."""
    from trainer.serving.server import serve

    return serve(config, lambda address: print(f"serving {config.name} at {address}/v1", flush=True))


if __name__ == "__main__":
    entry(main, ServeConfig, "Serve a model over HTTP, with OpenAI's interface.")
