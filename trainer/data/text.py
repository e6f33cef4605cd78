"""Text files, read to the last byte. Standard library only."""

from __future__ import annotations

from pathlib import Path

from trainer.errors import ConfigError


def read_utf8(key: str, path: Path) -> str:
    """The text of a file as its bytes have it: line ends, byte-order marks and NULs stay.

    Args:
        key: the option that named it, for messages.
        path: the file.

    Raises:
        ConfigError: it cannot be read, or is not UTF-8; naming the first wrong byte.
    """
    try:
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise ConfigError(f"{key}: {path} cannot be read ({error.strerror}); check the path") from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{key}: {path} is not UTF-8 (byte 0x{error.object[error.start]:02X} at offset {error.start}); convert it, "
            f"as with `iconv -f LATIN1 -t UTF-8 {path}`"
        ) from error
