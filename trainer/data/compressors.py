"""Compression baselines for bits per byte: a language model should do better than general-purpose compressors."""

import gzip
import lzma


def bits_per_byte_of_compressors(text: bytes) -> dict[str, float]:
    """Bits per byte of `gzip -9` and `xz -9` over one text."""
    size = max(len(text), 1)
    return {
        "gzip -9": 8 * len(gzip.compress(text, compresslevel=9)) / size,
        "xz -9": 8 * len(lzma.compress(text, preset=9)) / size,
    }
