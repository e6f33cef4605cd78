"""Source files: finding them, excluding unreadable ones with a reason, and decompressing by suffix."""

from __future__ import annotations

import glob
import gzip
import hashlib
import io
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from trainer.errors import ConfigError

COMPRESSED = (".gz", ".zst")
# Read as text, an archive would be a document of headers and NULs, or undecodable.
_ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz", ".zip")
_CHUNK = 1 << 16

HIDDEN = "hidden files and directories"
ARCHIVES = "archives"
LINKED = "links to directories"
UNREADABLE = "files and directories without permission to read"
NOT_REGULAR = "broken links and special files"
EMPTY_FILES = "empty files"


@dataclass(frozen=True, slots=True)
class LeftOut:
    """An item of a source that yields no document: its name and the reason."""

    name: str
    reason: str


def stamp(paths: Sequence[str]) -> str:
    """A hash of the files' sizes and modification times, which changes when they are written to."""
    facts = [(stat.st_size, stat.st_mtime_ns) for stat in map(os.stat, paths)]
    return hashlib.blake2b(repr(facts).encode(), digest_size=8).hexdigest()


def find_files(source: str) -> tuple[list[str], list[LeftOut]]:
    """Sorted files of a file, a directory (recursively) or a glob, and the items that were left out.

    Raises:
        ConfigError: if there are no files.
    """
    source = os.path.abspath(os.path.expanduser(source))
    matches = [source] if os.path.exists(source) else glob.glob(source, recursive=True)
    found: set[str] = set()
    left_out: dict[str, LeftOut] = {}

    def leave_out(path: str, reason: str) -> None:
        left_out[path] = LeftOut(path, reason)

    for match in matches:
        for path in _walk(match, leave_out) if os.path.isdir(match) else [match]:
            if reason := _reason_against(path):
                leave_out(path, reason)
            else:
                found.add(path)
    if not found:
        reasons = f" that can be read ({'; '.join(sorted({item.reason for item in left_out.values()}))})"
        raise ConfigError(
            f"{source} holds no files{reasons if left_out else ''}; give a file, directory or glob with documents"
        )
    return sorted(found), [left_out[path] for path in sorted(left_out)]


def _walk(root: str, leave_out: Callable[[str, str], None]) -> Iterator[str]:
    """Yield the files below a directory; reports skipped directories to `leave_out`."""

    def unreadable(error: OSError) -> None:
        leave_out(str(error.filename), UNREADABLE)

    for directory, names, files in os.walk(root, onerror=unreadable):
        for name in list(names):
            path = os.path.join(directory, name)
            if name.startswith("."):
                leave_out(path, HIDDEN)
            elif os.path.islink(path):
                # A link may form a cycle. To read its target, name that as the source.
                leave_out(path, LINKED)
            else:
                continue
            names.remove(name)
        for name in files:
            path = os.path.join(directory, name)
            if name.startswith("."):
                leave_out(path, HIDDEN)
            else:
                yield path


def _reason_against(path: str) -> str | None:
    if not os.path.isfile(path):
        return NOT_REGULAR
    if path.lower().endswith(_ARCHIVES):
        return ARCHIVES
    return None if os.access(path, os.R_OK) else UNREADABLE


class _ZstandardReader(io.RawIOBase):
    """A `.zst` file of one or more frames. Unlike the library's own reader it detects truncation."""

    def __init__(self, path: str) -> None:
        import zstandard

        self._file = open(path, "rb")  # noqa: SIM115 - closed with this object
        # 2^31: `zstd --ultra --long=31` writes windows of this size, which the library refuses by default.
        self._library = zstandard.ZstdDecompressor(max_window_size=1 << 31)
        self._frame = self._library.decompressobj()
        self._begun = False
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._ready:
            data = b""
            # A file may be several frames in a row (pzstd); bytes behind a frame belong to the next one.
            if self._frame.eof:
                data = self._frame.unused_data
                self._frame, self._begun = self._library.decompressobj(), False
            data = data or self._file.read(_CHUNK)
            if not data:
                if self._begun:
                    raise EOFError("it ends within a frame")
                return 0
            self._begun = True
            self._ready = self._frame.decompress(data)
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


@contextmanager
def reading(path: str) -> Iterator[BinaryIO]:
    """Open a file for reading. Files that end in .gz or .zst, in either case, are decompressed.

    Raises:
        ConfigError: if decompression fails.
    """
    with _open(path) as file:
        try:
            yield file
        except (gzip.BadGzipFile, EOFError, zlib.error, _zstandard_error(path)) as error:
            suffix = Path(path).suffix
            raise DamagedFile(
                f"{path} cannot be decompressed ({error}): it is cut short, damaged or no {suffix} file; "
                f"get it again, or rename it without {suffix}"
            ) from error


class DamagedFile(ConfigError):
    """A file whose content does not match its suffix."""


def _open(path: str) -> BinaryIO:
    if path.lower().endswith(".gz"):
        return cast(BinaryIO, gzip.open(path))
    if path.lower().endswith(".zst"):
        return cast(BinaryIO, io.BufferedReader(_ZstandardReader(path), _CHUNK))
    return open(path, "rb")


def _zstandard_error(path: str) -> type[Exception]:
    # EOFError is caught anyway: a stand-in, so that zstandard is imported only for .zst files.
    if not path.lower().endswith(".zst"):
        return EOFError
    import zstandard

    return zstandard.ZstdError
