"""Checksums of a checkpoint's files: reading and verifying. Imports neither torch nor megatron."""

import hashlib
import json
import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

NAME = "checksums.json"
# Only the current checkpoint format has this file; its absence identifies older formats.
FACTS = "state/facts.json"
# Maps each parameter to its location in the files.
METADATA = "state/.metadata"

# Files that every checkpoint has.
_ALWAYS = ("config.yaml", "progress.json", FACTS)
_DIGEST = re.compile(r"[0-9a-f]{64}")
_THREADS = 8


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read(checkpoint: Path) -> dict[str, str]:
    """Read a checkpoint's digests by file name, and check that all files exist; their content is not verified.

    Raises:
        ValueError: a short description of the problem with the checkpoint.
    """
    try:
        listed = json.loads((checkpoint / NAME).read_text())
    except FileNotFoundError:
        raise ValueError(f"{NAME} is missing: the save did not finish") from None
    except (ValueError, OSError):
        raise ValueError(f"{NAME} is not readable") from None
    if not isinstance(listed, dict) or not all(_is_digest(value) for value in listed.values()):
        raise ValueError(f"{NAME} does not hold checksums")
    if METADATA not in listed:
        raise ValueError(f"{NAME} does not list {METADATA}")
    if FACTS not in listed:
        raise ValueError(f"its format is that of an earlier version, which is not read: it has no {FACTS}")
    for name in _ALWAYS:
        if name not in listed:
            raise ValueError(f"{NAME} does not list {name}")
    for name in listed:
        if not (checkpoint / name).is_file():
            raise ValueError(f"{name} is missing")
    return listed


def _is_digest(value: object) -> bool:
    return isinstance(value, str) and _DIGEST.fullmatch(value) is not None


def wrong_files(checkpoint: Path, listed: dict[str, str], names: Iterable[str]) -> list[str]:
    """Return the named files whose content differs from their digest; several threads read them."""
    names = list(names)
    # hashlib releases the interpreter lock, so threads hash in parallel.
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        found = pool.map(lambda name: _digest_or_none(checkpoint / name), names)
        return [name for name, value in zip(names, found, strict=True) if value != listed[name]]


def _digest_or_none(path: Path) -> str | None:
    try:
        return digest(path)
    except OSError:
        # Another host may not see a file that this one does, and a failing disk may raise an error while reading.
        return None
