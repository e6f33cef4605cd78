"""JSON files that contain an object. Standard library only."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer.errors import ConfigError


def read_object(
    path: Path, way_out: str, pairs_hook: Callable[[list[tuple[str, Any]]], dict[str, Any]] | None = None
) -> dict[str, Any]:
    """Read the object in a JSON file.

    Args:
        path: The file.
        way_out: Remedy to name in the error message.
        pairs_hook: `object_pairs_hook` of json.loads.

    Raises:
        FileNotFoundError: the file does not exist.
        ConfigError: the file is unreadable, or is not a JSON object.
    """
    try:
        content = path.read_bytes()
    # Callers word a missing file themselves; FileNotFoundError is an OSError, so it has to be re-raised first.
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
    """Parse the content of a JSON file, called `name` in messages; otherwise like `read_object`."""
    try:
        values = json.loads(content, object_pairs_hook=pairs_hook)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{name} cannot be read ({error}); {way_out}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{name} is not a JSON object; {way_out}")
    return values
