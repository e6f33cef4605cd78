"""Serve a model over HTTP, with OpenAI's interface.

spiketrain serve --checkpoint runs/laptop --port 8000
"""

import sys

from trainer.cli import entry
from trainer.serving.config import ServeConfig


def main(config: ServeConfig) -> int:
    """Reserve the address, load the model, and serve until SIGTERM or SIGINT."""
    from trainer.device import choose_device
    from trainer.serving.server import bind, run
    from trainer.serving.service import Served
    from trainer.stored.inference import load_model

    # Before the model is loaded, which may take minutes.
    bound = bind(config)
    loaded = load_model(config.checkpoint, choose_device(config.device), config.tokenizer)
    tokenizer = loaded.require_tokenizer()
    print(f"checkpoint: {loaded.path}", file=sys.stderr)
    return run(config, bound, loaded.model, Served(config.name, tokenizer, (tokenizer.eod_id,), None))


if __name__ == "__main__":
    entry(main, ServeConfig, "Serve a model over HTTP, with OpenAI's interface.")
