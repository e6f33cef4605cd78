"""Files that are whole or not there, after a power cut too."""

import os
from pathlib import Path


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file that is either complete or not there, even after a power cut."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        # On a full disk the pieces of failed tries would take what room is left.
        temporary.unlink(missing_ok=True)
        raise


def flush_to_disk(path: Path) -> None:
    """Have a file's content, or a directory's names, reach the disk, before something is written that needs them."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
