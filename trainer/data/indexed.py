"""Megatron's indexed format.

A `.bin` file holds tokens and nothing else. Its `.idx` holds a header, the length and byte offset of every sequence,
and the numbers of the sequences that begin the documents. Training reads through mcore's IndexedDataset; preparation
and evaluation, which must not need megatron (its import alone takes 5 s), through the few lines here. The tests hold
the two against each other.
"""

from __future__ import annotations

import os
import struct
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from trainer.cli import ConfigError

_MAGIC = b"MMIDIDX\x00\x00"
# Magic, version, dtype code, number of sequences, number of documents + 1.
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
_DTYPE_CODES = {np.dtype(dtype): code for code, dtype in _DTYPES.items()}


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file that is either complete or not there, even after a power cut."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def token_dtype(vocab_size: int) -> np.dtype:
    """The dtype that Megatron's `DType.optimal_dtype` chooses."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


def write_index(path: Path, lengths: np.ndarray, dtype: np.dtype) -> None:
    """Write Megatron's `.idx` for documents of one sequence each.

    Args:
        path: the file.
        lengths: tokens of each document.
        dtype: of the tokens in the `.bin` file.
    """
    pointers = np.zeros(len(lengths), np.int64)
    np.cumsum(lengths[:-1] * dtype.itemsize, out=pointers[1:])
    header = _HEADER.pack(_MAGIC, 1, _DTYPE_CODES[dtype], len(lengths), len(lengths) + 1)
    arrays = (lengths.astype("<i4"), pointers.astype("<i8"), np.arange(len(lengths) + 1, dtype="<i8"))
    write_atomically(path, header + b"".join(array.tobytes() for array in arrays))


def read_index(path: Path) -> tuple[np.dtype, np.ndarray, np.ndarray]:
    """Read Megatron's `.idx`.

    Returns:
        The dtype of the tokens; int32 `[sequences]`, the tokens of each; int64 `[documents + 1]`, document d being
        the sequences from entry d to entry d + 1.

    Raises:
        ConfigError: if the file is missing, damaged or of another format.
    """
    try:
        with path.open("rb") as file:
            magic, version, code, sequences, documents = _HEADER.unpack(file.read(_HEADER.size))
        if magic != _MAGIC or version != 1 or code not in _DTYPES:
            raise ValueError(f"header {magic!r}, version {version}, dtype code {code}")
        content = np.memmap(path, mode="r")
        lengths = np.frombuffer(content, "<i4", sequences, _HEADER.size)
        # Between the two lie the byte offsets, which follow from the lengths.
        borders = np.frombuffer(content, "<i8", documents, _HEADER.size + 12 * sequences)
        if not len(borders) or borders[-1] != sequences:
            raise ValueError(f"its documents do not cover its {sequences} sequences")
    except (struct.error, ValueError, OSError) as error:
        raise ConfigError(
            f"{path} cannot be read as the index of Megatron token files ({error}): copy or prepare it again"
        ) from error
    return np.dtype(_DTYPES[code]), lengths, borders


class TokenArray:
    """Tokens as a flat array, with the borders of their documents.

    Args:
        tokens: integers, all documents one after the other.
        borders: int64 `[documents + 1]`; document d is `tokens[borders[d]:borders[d + 1]]`.
        name: where they came from, for messages.
    """

    def __init__(self, tokens: np.ndarray, borders: np.ndarray, name: str) -> None:
        self.tokens, self.borders, self.name = tokens, borders, name

    @staticmethod
    def from_documents(documents: Sequence[Sequence[int]], name: str) -> TokenArray:
        """Tokens in memory.

        Raises:
            ConfigError: if there are none.
        """
        borders = np.cumsum([0, *(len(document) for document in documents)])
        if borders[-1] == 0:
            raise ConfigError(f"{name} holds no text")
        return TokenArray(np.concatenate([np.asarray(document, np.int64) for document in documents]), borders, name)

    def check_ends(self, eod_id: int, documents: int = 64) -> None:
        """Refuse data whose documents do not end with `eod_id`: document masks would silently find no borders.

        Raises:
            ConfigError: naming the first of the leading `documents` documents that ends otherwise.
        """
        ends = self.borders[1 : documents + 1][np.diff(self.borders[: documents + 1]) > 0]
        wrong = np.flatnonzero(self.tokens[ends - 1] != eod_id)
        if wrong.size:
            raise ConfigError(
                f"{self.name}: document {wrong[0]} ends with token {self.tokens[ends[wrong[0]] - 1]}, not with the "
                f"end-of-document token {eod_id}: correct data.tokenizer, prepare with Megatron's --append-eod, or set "
                "data.document_mask to false"
            )


class TokenFile(TokenArray):
    """A `.bin`/`.idx` pair, mapped into memory.

    Args:
        prefix: path without `.bin` and `.idx`. Documents may have several sequences; any integer dtype will do.
    """

    def __init__(self, prefix: str | Path) -> None:
        dtype, lengths, documents = read_index(Path(f"{prefix}.idx"))
        starts = np.zeros(len(lengths) + 1, np.int64)
        np.cumsum(lengths, out=starts[1:])
        count, held = int(starts[-1]), Path(f"{prefix}.bin").stat().st_size // dtype.itemsize
        if count == 0:
            raise ConfigError(f"{prefix}.bin holds no tokens: prepare the data again from documents that are not empty")
        if held < count:
            raise ConfigError(
                f"{prefix}.bin is cut short: {held:,} of the {count:,} tokens in its index; copy or prepare it again"
            )
        tokens = np.asarray(np.memmap(f"{prefix}.bin", dtype=dtype, mode="r", shape=(count,)))
        super().__init__(tokens, starts[documents], str(prefix))


def open_through_megatron(prefix: str | Path) -> TokenArray:
    """Open a pair for training, with mcore's IndexedDataset as the reader.

    Our own reader goes first: it says in one line what is wrong with a damaged pair.
    """
    checked = TokenFile(prefix)
    with warnings.catch_warnings():
        # mcore warns that TransformerEngine and Apex are absent; reading a file needs neither.
        warnings.simplefilter("ignore", UserWarning)
        from megatron.core.datasets.indexed_dataset import IndexedDataset
    dataset = IndexedDataset(str(prefix), mmap=True)
    starts = np.zeros(len(dataset) + 1, np.int64)
    np.cumsum(dataset.sequence_lengths, out=starts[1:])
    tokens = dataset.bin_reader.read(dtype=dataset.index.dtype, count=int(starts[-1]), offset=0)
    array = TokenArray(tokens, starts[dataset.document_indices], checked.name)
    # The dataset closes its mapping when it goes, under whoever still reads `tokens`.
    array.owner = dataset  # type: ignore[attr-defined]
    return array
