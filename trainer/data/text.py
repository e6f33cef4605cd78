"""Text files, read byte for byte. Standard library only."""

from __future__ import annotations

from pathlib import Path

from trainer.errors import ConfigError


def read_utf8(key: str, path: Path) -> str:
    """Read a UTF-8 file unchanged: line ends, byte-order marks and NULs are kept.

    Args:
        key: option that named the file, for messages.
        path: the file.

    Raises:
        ConfigError: the file is unreadable or not UTF-8; names the first invalid byte.
    """
    # Not read_text, which would turn \r\n into \n.
    try:
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise ConfigError(f"{key}: {path} cannot be read ({error.strerror}); check the path") from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{key}: {path} is not UTF-8 (byte 0x{error.object[error.start]:02X} at offset {error.start}); convert it, "
            f"as with `iconv -f LATIN1 -t UTF-8 {path}`"
        ) from error
