"""JSON files that hold an object. Standard library only."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer.errors import ConfigError


def read_object(
    path: Path, way_out: str, pairs_hook: Callable[[list[tuple[str, Any]]], dict[str, Any]] | None = None
) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        path: The file.
        way_out: What to do where there is none, for the message.
        pairs_hook: Makes the objects in it, as json.loads has it.

    Raises:
        FileNotFoundError: there is no such file.
        ConfigError: it cannot be read, or holds something else.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); {way_out}") from error
    return parse_object(content, path, way_out, pairs_hook)


def parse_object(
    content: bytes,
    name: str | Path,
    way_out: str,
    pairs_hook: Callable[[list[tuple[str, Any]]], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """The object that the content of a file is, which messages call `name`; else as `read_object`."""
    try:
        values = json.loads(content, object_pairs_hook=pairs_hook)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{name} cannot be read ({error}); {way_out}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{name} is not a JSON object; {way_out}")
    return values
