"""What is told of failures, in one line."""

import shutil
import traceback
from pathlib import Path


class ConfigError(ValueError):
    """Bad input. The message is one line that says what is wrong and how to mend it; the program exits with 2."""


def disk_error(path: Path, error: OSError) -> str:
    """What an error of a file system says, and which file system it is."""
    there = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
    mount = next(parent for parent in (there, *there.parents) if parent.is_mount())
    free = shutil.disk_usage(there).free
    return f"{error.strerror or error} (the file system at {mount} has {free / 1e6:.0f} MB free)"


def describe_failure(error: BaseException) -> str:
    """The last line of a traceback with the place it came from, for status.json."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{place}"
