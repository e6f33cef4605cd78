"""Files of prompts, and files of completions that are written one line at a time and can be continued."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.data.text import read_utf8
from trainer.errors import ConfigError


@dataclass(frozen=True)
class Prompt:
    """One prompt: text, or a conversation.

    Attributes:
        text: The text to continue; empty for a conversation.
        messages: The messages of a conversation; None for text.
    """

    text: str = ""
    messages: Sequence[Mapping[str, Any]] | None = None

    @property
    def record(self) -> dict[str, Any]:
        """The prompt as it stands in a line of JSON."""
        return {"prompt": self.text} if self.messages is None else {"messages": self.messages}


def read_prompts(path: Path) -> list[Prompt]:
    """Read a .jsonl file, whose lines are objects with "prompt" or "messages", or a text file with a prompt a line.

    Raises:
        ConfigError: the file is unreadable or empty, or a line is of another kind.
    """
    lines = [line for line in read_utf8("prompts", path).split("\n") if line.strip()]
    if not lines:
        raise ConfigError(f"prompts: {path} has no prompts")
    if path.suffix != ".jsonl":
        return [Prompt(line.removesuffix("\r")) for line in lines]
    return [_parse(line, f"prompts: line {number} of {path}") for number, line in enumerate(lines, 1)]


def _parse(line: str, where: str) -> Prompt:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{where} is no JSON ({error})") from error
    if isinstance(record, dict) and isinstance(record.get("prompt"), str):
        return Prompt(record["prompt"])
    messages = record.get("messages") if isinstance(record, dict) else None
    is_conversation = isinstance(messages, list) and all(isinstance(x, dict) and "role" in x for x in messages)
    if messages and is_conversation:
        return Prompt(messages=messages)
    raise ConfigError(f'{where} has neither "prompt", a text, nor "messages", a list of objects with a role')


class Completions:
    """A .jsonl file of completions, one line for each prompt, in the order in which they are finished.

    A line has the prompt's number from 0 in `index`, the prompt itself, and `samples`. A line that was cut off is
    dropped, and its prompt counts as not done.

    Args:
        path: The file. It is created if it does not exist.
        prompts: The prompts.

    Attributes:
        done: Numbers of the prompts whose completions the file has already.

    Raises:
        ConfigError: the file has completions of other prompts, or is of another kind.
    """

    def __init__(self, path: Path, prompts: Sequence[Prompt]) -> None:
        self._path, self._prompts = path, prompts
        self.done: set[int] = set()
        content = path.read_bytes() if path.is_file() else b""
        whole = content[: content.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), 1):
            self.done.add(self._number_of(line, f"output: line {number} of {path}"))
        if whole != content:
            path.write_bytes(whole)

    def _number_of(self, line: bytes, where: str) -> int:
        try:
            record = json.loads(line)
            index = record["index"]
            known = self._prompts[index].record
        except (ValueError, LookupError, TypeError) as error:
            raise ConfigError(f"{where} is no completion of these prompts; name another file") from error
        if any(record.get(key) != value for key, value in known.items()):
            raise ConfigError(f"{where} completes another prompt than number {index} of prompts; name another file")
        return int(index)

    def add(self, index: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """Append the completions of a prompt."""
        line = json.dumps({"index": index, **self._prompts[index].record, "samples": samples}, ensure_ascii=False)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        self.done.add(index)
