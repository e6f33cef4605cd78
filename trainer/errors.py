"""Error types, and one-line descriptions of failures."""

import shutil
import traceback
from pathlib import Path


class ConfigError(ValueError):
    """Invalid user input. The message is one line that names the error and its remedy; the program exits with 2."""


def disk_error(path: Path, error: OSError) -> str:
    """Describe an OS error together with the mount point and free space of the file system it occurred on."""
    # The path itself may not exist yet: ask its nearest existing parent.
    there = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
    mount = next(parent for parent in (there, *there.parents) if parent.is_mount())
    free = shutil.disk_usage(there).free
    return f"{error.strerror or error} (the file system at {mount} has {free / 1e6:.0f} MB free)"


def describe_failure(error: BaseException) -> str:
    """The exception and the file and line that raised it, as one line for status.json."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{place}"
