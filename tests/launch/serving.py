"""A tiny model to serve, and servers of it that tests start."""

import json
import re
import time
import urllib.request
from pathlib import Path

import torch

from models.decoder import Decoder, initialize
from tests.helpers import WAIT, tiny_model_config
from tests.processes import ROOT, start
from trainer.data.tokenizer import learn_sentencepiece
from trainer.stored import weights

VOCABULARY = 400
TEMPLATE = """{% for message in messages %}
{% if loop.last and message.role != "user" %}{{ raise_exception("the last message must be the user's") }}{% endif %}
<|endoftext|>{{ message.role }}: {{ message.content }}
{% endfor %}
<|endoftext|>assistant: """


def write_model(
    folder: Path, rows: int = VOCABULARY, pattern: str = "gated_delta_net, full_attention", **changes: object
) -> Path:
    """Weights of an untrained model with a tokenizer and a chat template; returns their directory.

    Its embedding has so many rows, at least VOCABULARY, its layers these mixers; `changes` are of its configuration.
    """
    tokenizer = folder / "tokenizer"
    tokenizer.mkdir(parents=True)
    learn_sentencepiece([Path(json.__file__).read_text()], "bpe", VOCABULARY).save(tokenizer)
    (tokenizer / "chat_template.jinja").write_text(TEMPLATE)
    model = Decoder(tiny_model_config(pattern, **changes), rows)
    initialize(model, 0)
    drawn = dict(model.named_parameters())

    def read(tensors):
        with torch.no_grad():
            for name, tensor in tensors.items():
                tensor.copy_(drawn[name])

    output = folder / "tiny"
    weights.write(output, model, read, tokenizer=tokenizer, max_file_bytes=1e9, report=lambda line: None)
    return output


class Server:
    """A server in a process of its own.

    Args:
        model: What it serves.
        options: Its options, but for the port.
        environment: Further variables.
    """

    def __init__(self, model: Path, *options: str, **environment: str) -> None:
        command = (ROOT / "launch/main.py", "serve", "--checkpoint", model, "--port", "0", "--device", "cpu", *options)
        self.process = start(*command, imported="torch", **environment)
        self.address = self._address()

    def _address(self) -> str:
        end = time.monotonic() + WAIT
        while (found := re.search(r"at (http://\S+)/v1$", self.process.output(), re.MULTILINE)) is None:
            assert self.process.poll() is None and time.monotonic() < end, self.process.output()
            time.sleep(0.02)
        return found[1]

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self.address.rpartition(":")[2])

    def get(self, path: str) -> str:
        """What a GET of a path gives."""
        with urllib.request.urlopen(self.address + path, timeout=WAIT) as answer:
            return answer.read().decode()

    def figures(self) -> dict[str, float]:
        """Prometheus' figures by name and labels, without the prefix."""
        lines = (line for line in self.get("/metrics").splitlines() if line.startswith("spiketrain_"))
        return {
            name.removeprefix("spiketrain_"): float(value) for name, value in (line.rsplit(" ", 1) for line in lines)
        }

    def wait_until_idle(self) -> dict[str, float]:
        """Wait until no slot is in use and nothing waits; the figures."""
        end = time.monotonic() + WAIT
        while (figures := self.figures())["slots_in_use"] or figures["queue_length"]:
            assert time.monotonic() < end, figures
            time.sleep(0.02)
        return figures

    def stop(self) -> None:
        """End it as a user would; nothing must be wrong by then."""
        self.process.terminate()
        assert self.process.wait(WAIT) == 0, self.process.output()
        assert "Traceback" not in self.process.output() and "error" not in self.process.output()
