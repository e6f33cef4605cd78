"""Megatron's indexed dataset format, and integrity checks of its files.

A `.bin` file holds only tokens. Its `.idx` holds a header, the length and byte offset of every sequence, and the index
of each document's first sequence. Training reads through mcore's IndexedDataset. Preparation and evaluation must not
need megatron (its import alone takes 5 s), and read through the code here. Tests compare the two.
"""

from __future__ import annotations

import os
import struct
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trainer.durable import write_atomically
from trainer.errors import ConfigError

_MAGIC = b"MMIDIDX\x00\x00"
# Magic, version, dtype code, number of sequences, number of documents + 1.
_HEADER = struct.Struct("<9sQBQQ")
# Megatron's DType codes. 6 and 7 are floats.
_DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
_DTYPE_CODES = {np.dtype(dtype): code for code, dtype in _DTYPES.items()}

# Limits of the checks before a run: larger files are sampled. Checking this much takes a fraction of a second.
CHECKED_BYTES = 1 << 26
CHECKED_ENTRIES = 1 << 22
CHECKED_DOCUMENTS = 512


def token_dtype(vocab_size: int) -> np.dtype:
    """The dtype that Megatron's `DType.optimal_dtype` chooses for a vocabulary."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


def write_index(path: Path, lengths: np.ndarray, dtype: np.dtype) -> None:
    """Write Megatron's `.idx` for documents of one sequence each.

    Args:
        path: the file.
        lengths: tokens per document.
        dtype: dtype of the tokens in the `.bin` file.
    """
    if len(lengths) and lengths.max() > np.iinfo(np.int32).max:
        raise ConfigError(f"{path}: a document of {lengths.max():,} tokens; the format holds 2,147,483,647: cut it")
    pointers = np.zeros(len(lengths), np.int64)
    np.cumsum(lengths[:-1] * dtype.itemsize, out=pointers[1:])
    header = _HEADER.pack(_MAGIC, 1, _DTYPE_CODES[dtype], len(lengths), len(lengths) + 1)
    arrays = (lengths.astype("<i4"), pointers.astype("<i8"), np.arange(len(lengths) + 1, dtype="<i8"))
    write_atomically(path, header + b"".join(array.tobytes() for array in arrays))


@dataclass(frozen=True)
class Index:
    """The contents of an `.idx` file, memory-mapped.

    Attributes:
        prefix: prefix of the pair.
        dtype: dtype of the tokens.
        lengths: int32 `[sequences]`, tokens per sequence.
        offsets: int64 `[sequences]`, byte offset of each sequence in the `.bin`.
        borders: int64 `[documents + 1]`; document d consists of sequences `borders[d]` to `borders[d + 1]`.
    """

    prefix: str
    dtype: np.dtype
    lengths: np.ndarray
    offsets: np.ndarray
    borders: np.ndarray

    @property
    def tokens(self) -> int:
        """Number of tokens in the pair."""
        end = int(self.offsets[-1]) + int(self.lengths[-1]) * self.dtype.itemsize if len(self.lengths) else 0
        return end // self.dtype.itemsize

    @property
    def documents(self) -> int:
        """Number of documents in the pair."""
        return len(self.borders) - 1

    def check(self, sampled: bool = False) -> None:
        """Check lengths, offsets, documents and the size of the `.bin` against each other.

        Tokens are read as one array, so every sequence must begin where the previous one ends.

        Args:
            sampled: check at most `CHECKED_ENTRIES` of each, spread over the file.

        Raises:
            ConfigError: names the inconsistency.
        """
        for part in parts(len(self.lengths), 1, CHECKED_ENTRIES if sampled else None):
            lengths, offsets = self.lengths[part], self.offsets[part]
            negative = np.flatnonzero(lengths < 0)
            if negative.size:
                number = part.start + int(negative[0])
                raise self._damaged(f"sequence {number:,} has {lengths[negative[0]]} tokens")
            # int64: the byte length of a long sequence exceeds int32.
            wrong = np.flatnonzero(np.diff(offsets) != lengths[:-1].astype(np.int64) * self.dtype.itemsize)
            if wrong.size or (part.start == 0 and len(offsets) and offsets[0] != 0):
                number = part.start + int(wrong[0]) + 1 if wrong.size else 0
                raise self._damaged(f"sequence {number:,} does not begin where it should")
        for part in parts(len(self.borders), 1, CHECKED_ENTRIES if sampled else None):
            if (np.diff(self.borders[part]) < 0).any():
                raise self._damaged("its documents are not in order")
        if self.borders[0] != 0 or self.borders[-1] != len(self.lengths):
            raise self._damaged(f"its documents do not cover its {len(self.lengths):,} sequences")
        self._check_tokens()

    def _check_tokens(self) -> None:
        try:
            size = os.stat(f"{self.prefix}.bin").st_size
        except OSError as error:
            raise ConfigError(
                f"{self.prefix}.bin cannot be read ({error.strerror}): copy or prepare it again"
            ) from error
        wanted = self.tokens * self.dtype.itemsize
        if not wanted:
            raise ConfigError(
                f"{self.prefix}.bin holds no tokens: prepare the data again from documents that are not empty"
            )
        if size < wanted:
            raise ConfigError(
                f"{self.prefix}.bin is cut short: {size // self.dtype.itemsize:,} of the {self.tokens:,} tokens in its "
                "index; copy or prepare it again"
            )
        if size > wanted:
            raise ConfigError(
                f"{self.prefix}.bin holds {size:,} bytes, but its index needs {wanted:,}: "
                "the two files do not belong together; copy or prepare them again"
            )

    def _damaged(self, reason: str) -> ConfigError:
        return ConfigError(f"{self.prefix}.idx is damaged ({reason}): copy or prepare it again")


def parts(count: int, overlap: int, limit: int | None = None) -> list[slice]:
    """Slices of `count` entries: all of them, or about `limit`: the first, the last and a random selection.

    Neighbouring slices share `overlap` entries. The selection is the same on every call.
    """
    size = 1 << 20
    if limit is not None and count > limit:
        size = max(limit // 64, 1)
        starts = {0, count - size, *(np.random.Philox(0).random_raw(62) % np.uint64(count - size)).tolist()}
    else:
        starts = set(range(0, count, size))
    return [slice(start, min(start + size + overlap, count)) for start in sorted(starts)]


def read_index(prefix: str | Path) -> Index:
    """Map the `.idx` of a pair without checking its content.

    Raises:
        ConfigError: if the file is missing, truncated or in another format.
    """
    path = Path(f"{prefix}.idx")
    try:
        with path.open("rb") as file:
            magic, version, code, sequences, documents = _HEADER.unpack(file.read(_HEADER.size))
        if magic != _MAGIC or version != 1 or code not in _DTYPES:
            raise ValueError(f"header {magic!r}, version {version}, dtype code {code}")
        size, wanted = path.stat().st_size, _HEADER.size + 12 * sequences + 8 * documents
        # Megatron's multimodal files have one extra byte per sequence.
        if size not in (wanted, wanted + sequences) or not documents:
            raise ValueError(f"{size:,} bytes for {sequences:,} sequences and {documents - 1:,} documents")
        content = np.memmap(path, mode="r")
        lengths = np.frombuffer(content, "<i4", sequences, _HEADER.size)
        offsets = np.frombuffer(content, "<i8", sequences, _HEADER.size + 4 * sequences)
        borders = np.frombuffer(content, "<i8", documents, _HEADER.size + 12 * sequences)
    except (struct.error, ValueError, OSError) as error:
        raise ConfigError(
            f"{path} cannot be read as the index of Megatron token files ({error}): copy or prepare it again"
        ) from error
    return Index(str(prefix), np.dtype(_DTYPES[code]), lengths, offsets, borders)


class TokenArray:
    """Tokens as a flat array, with the bounds of their documents.

    Args:
        tokens: integers, all documents concatenated.
        borders: int64 `[documents + 1]`; document d is `tokens[borders[d]:borders[d + 1]]`.
        name: their origin, for messages.
    """

    def __init__(self, tokens: np.ndarray, borders: np.ndarray, name: str) -> None:
        self.tokens, self.borders, self.name = tokens, borders, name

    @staticmethod
    def from_documents(documents: Sequence[Sequence[int]], name: str) -> TokenArray:
        """Build an array from documents in memory.

        Raises:
            ConfigError: if there are no tokens.
        """
        borders = np.cumsum([0, *(len(document) for document in documents)])
        if borders[-1] == 0:
            raise ConfigError(f"{name} holds no text")
        return TokenArray(np.concatenate([np.asarray(document, np.int64) for document in documents]), borders, name)

    def check_ends(self, eod_id: int) -> None:
        """Refuse data whose documents do not end with `eod_id`: document masks would silently find no bounds.

        In files up to `CHECKED_BYTES` every document is checked. In larger files a fixed random sample of
        `CHECKED_DOCUMENTS` is, including the first and the last. Documents without tokens are skipped.

        Raises:
            ConfigError: names the first checked document that ends with another token.
        """
        limit = None if self.tokens.nbytes <= CHECKED_BYTES else CHECKED_DOCUMENTS
        for part in parts(len(self.borders) - 1, 0, limit):
            borders = self.borders[part.start : part.stop + 1]
            documents = np.flatnonzero(np.diff(borders) > 0)
            ends = self.tokens[borders[documents + 1] - 1]
            wrong = np.flatnonzero(ends != eod_id)
            if wrong.size:
                raise ConfigError(
                    f"{self.name}: document {part.start + int(documents[wrong[0]])} ends with token "
                    f"{ends[wrong[0]]}, not with the end-of-document token {eod_id}: correct data.tokenizer or "
                    "data.eod_id, prepare with Megatron's --append-eod, or set data.document_mask to false"
                )

    def id_range(self) -> tuple[int, int, bool]:
        """The smallest and largest token id, and whether all tokens were read rather than a sample.

        Files up to `CHECKED_BYTES` are read whole; of larger files that many bytes are sampled, including both ends.
        """
        limit = CHECKED_BYTES // self.tokens.itemsize
        whole = len(self.tokens) <= limit
        blocks = [self.tokens[part] for part in parts(len(self.tokens), 0, limit)]
        return min(int(block.min()) for block in blocks), max(int(block.max()) for block in blocks), whole


class TokenFile(TokenArray):
    """A memory-mapped `.bin`/`.idx` pair with a checked index.

    Args:
        prefix: path without `.bin` and `.idx`. Documents may have several sequences, and tokens any integer dtype.
        sampled: check only a sample of a large index.

    Raises:
        ConfigError: if the pair is damaged.
    """

    def __init__(self, prefix: str | Path, sampled: bool = False) -> None:
        index = read_index(prefix)
        index.check(sampled)
        tokens = np.asarray(np.memmap(f"{prefix}.bin", dtype=index.dtype, mode="r", shape=(index.tokens,)))
        # Offset of each sequence in tokens: a document begins at one of these.
        starts = np.append(index.offsets // index.dtype.itemsize, index.tokens)
        super().__init__(tokens, starts[index.borders], str(prefix))


def open_through_megatron(prefix: str | Path) -> TokenArray:
    """Open a pair for training, with mcore's IndexedDataset as the reader.

    Our own reader opens it first, because it describes damage in one line.
    """
    checked = TokenFile(prefix)
    with warnings.catch_warnings():
        # mcore warns that TransformerEngine and Apex are missing; reading needs neither.
        warnings.simplefilter("ignore", UserWarning)
        from megatron.core.datasets.indexed_dataset import IndexedDataset
    dataset = IndexedDataset(str(prefix), mmap=True)
    starts = np.zeros(len(dataset) + 1, np.int64)
    np.cumsum(dataset.sequence_lengths, out=starts[1:])
    tokens = dataset.bin_reader.read(dtype=dataset.index.dtype, count=int(starts[-1]), offset=0)
    array = TokenArray(tokens, starts[dataset.document_indices], checked.name)
    # Keeps the dataset alive: it closes its mapping when collected, even while `tokens` still uses it.
    array.owner = dataset  # type: ignore[attr-defined]
    return array
