"""Tokenizers: SentencePiece models learned here, and existing SentencePiece or Hugging Face ones, behind one class.

A model learned here is lossless: decoding returns every text byte for byte, and the byte lengths of its tokens sum to
the length of the text. This makes bits per byte comparable between vocabularies. Pieces may cross spaces and newlines
("):\\n" with the next line's indentation is one token), which saves a fifth of the tokens of Python source.
"""

from __future__ import annotations

import io
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from trainer.data.layout import tokenizer_file
from trainer.errors import ConfigError
from trainer.json_files import parse_object

EOD_PIECE = "<|endoftext|>"
# SentencePiece writes a space as U+2581, so a U+2581 in the text itself is encoded as its three bytes.
_SPACE = "\u2581"
# A line together with the indentation of the next one, so that a piece may contain both.
_LINES = re.compile(r"[^\n]*\n+ *|[^\n]+$")
# End-of-document tokens of published tokenizers, most specific first.
_KNOWN_EODS = (
    EOD_PIECE,
    "<|end_of_text|>",
    "<|end▁of▁sentence|>",
    "</s>",
    "<eos>",
    "<|eos|>",
    "[EOS]",
    "<|im_end|>",
    "[SEP]",
)
# Files that Hugging Face stores beside a tokenizer's model: special tokens, chat template, generation settings.
_COMPANIONS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.*",
    "additional_chat_templates/*",
    "generation_config.json",
)
_CONFIG_NAME = "tokenizer_config.json"
# Names the end-of-document token if it differs from eos_token, which chat models use for the end of a turn.
_EOD_KEY = "spiketrain_eod"


def tokenizer_files(directory: Path) -> list[Path]:
    """All tokenizer files in a directory: models, and the files that Hugging Face stores beside them."""
    names = ("tokenizer.model", "tokenizer.json", *_COMPANIONS)
    return [path for name in names for path in sorted(directory.glob(name)) if path.is_file()]


def _read_beside(file: Path) -> dict[str, bytes]:
    """The files that accompany a tokenizer's model, by name, so that `save` can write them again.

    A `tokenizer.json` beside a `tokenizer.model` is a companion, because `tokenizer_file` prefers the latter. The
    reverse does not hold.
    """
    found = {path.relative_to(file.parent).as_posix(): path for path in tokenizer_files(file.parent) if path != file}
    found.pop("tokenizer.model", None)
    if file.suffix == ".json":
        found.pop("tokenizer.json", None)
    return {name: path.read_bytes() for name, path in found.items()}


def token_config(files: Mapping[str, bytes]) -> dict[str, Any]:
    """The tokenizer's configuration merged over its older special_tokens_map.json.

    Raises:
        ConfigError: a file is not a JSON object.
    """
    values: dict[str, Any] = {}
    for name in ("special_tokens_map.json", _CONFIG_NAME):
        found = parse_object(files.get(name, b"{}"), name, "copy the tokenizer again")
        values |= {key: value for key, value in found.items() if value is not None}
    return values


def named_token(config: Mapping[str, Any], key: str) -> str | None:
    """The special token under a key of `token_config`, such as eos_token."""
    value = config.get(key)
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None


class Tokenizer(ABC):
    """Converts text to tokens and back. One token ends documents.

    Attributes:
        vocab_size: number of token ids, including gaps.
        eod_id: the end-of-document token; `encode` never returns it, preparation appends it.
        eod: its name.
        model: content of the model file.
        model_name: file name that `save` gives the model.
        files: files that accompany the model (special tokens, chat template and so on), by name.
    """

    model_name: ClassVar[str]

    vocab_size: int
    eod_id: int
    eod: str
    model: bytes
    files: dict[str, bytes]

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Tokenize `text` without special tokens: text that looks like one is encoded as text."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Decode `ids`; special tokens are omitted, and invalid UTF-8 becomes U+FFFD."""

    @abstractmethod
    def token_bytes(self) -> np.ndarray:
        """int64 `[vocab_size]`: number of UTF-8 bytes of text that each token represents; 0 for special tokens.

        Exact for models learned here and for byte-level BPE. Tokenizers that normalise text (lower-casing, dropping
        spaces) represent a slightly different text than they were given; for these it is the length of the piece.
        """

    @abstractmethod
    def token_id(self, token: str) -> int | None:
        """Id of the token with this name; None if there is none."""

    @abstractmethod
    def save(self, directory: str | Path) -> Path:
        """Write the model file and `files`, from which `load` restores this tokenizer; returns the model's path."""

    @staticmethod
    def load(path: str | Path, eod: str | None = None) -> Tokenizer:
        """Load `tokenizer.json`, a SentencePiece `.model`, or a directory with one.

        Args:
            path: the file or directory.
            eod: the end-of-document token; by default it is looked up.

        Raises:
            ConfigError: if there is no tokenizer, it is unreadable, or its end-of-document token is unknown.
        """
        file = tokenizer_file(path)
        try:
            return (
                HuggingFaceTokenizer(file, eod)
                if file.suffix == ".json"
                else SentencePieceTokenizer(file.read_bytes(), eod, _read_beside(file))
            )
        except ConfigError as error:
            raise ConfigError(f"{file}: {error}") from error
        except Exception as error:  # both libraries raise their own kinds, bare Exception among them
            raise ConfigError(
                f"{file} is not a tokenizer that can be read ({error}): give tokenizer.json or .model"
            ) from error


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model.

    Args:
        model: the serialized model.
        eod: the end-of-document piece; defaults to the one named in `files`, then to the model's `</s>`.
        files: see `Tokenizer`.
    """

    model_name = "tokenizer.model"

    def __init__(self, model: bytes, eod: str | None = None, files: dict[str, bytes] | None = None) -> None:
        from sentencepiece import SentencePieceProcessor

        self.model, self.files = model, files or {}
        named = named_token(token_config(self.files), _EOD_KEY)
        eod = eod or named
        self._processor = SentencePieceProcessor(model_proto=model)
        self.vocab_size = self._processor.vocab_size()
        self.eod_id = self._processor.eos_id() if eod is None else self._processor.piece_to_id(eod)
        if self.eod_id < 0 or self.eod_id == self._processor.unk_id():
            raise ConfigError(
                f"the model has no end-of-document piece{f' {eod}' if eod else ''}; name one with tokenizer.eod"
            )
        self.eod = str(self._processor.id_to_piece(self.eod_id))
        self._eod_is_named = eod == named or (named is None and self.eod_id == self._processor.eos_id())
        byte = self._processor.piece_to_id("<0x00>")
        first = self._processor.encode("a", out_type=str)
        # Without byte pieces, or with a prefixed space, the model is not lossless: the library's own decoding applies.
        self._lossless = self._processor.is_byte(byte) and not first[0].startswith(_SPACE)
        self._space = (
            [self._processor.piece_to_id(f"<0x{value:02X}>") for value in _SPACE.encode()] if self._lossless else []
        )

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer.encode`."""
        if not self._lossless or _SPACE not in text:
            return list(self._processor.encode(text))
        first, *rest = (self._processor.encode(part) for part in text.split(_SPACE))
        return [*first] + [token for part in rest for token in (*self._space, *part)]

    def decode(self, ids: Sequence[int]) -> str:
        """See `Tokenizer.decode`."""
        if not self._lossless:
            return str(self._processor.decode([int(token) for token in ids if token != self.eod_id]))
        return b"".join(self._texts[token] for token in ids).decode("utf-8", errors="replace")

    def token_bytes(self) -> np.ndarray:
        """See `Tokenizer.token_bytes`."""
        return np.array([len(text) for text in self._texts], np.int64)

    @cached_property
    def _texts(self) -> list[bytes]:
        """The bytes of text that each token represents."""
        processor, texts = self._processor, []
        for token in range(self.vocab_size):
            piece = processor.id_to_piece(token)
            if processor.is_byte(token):
                texts.append(bytes([int(piece[3:5], 16)]))
            elif processor.is_control(token) or processor.is_unknown(token):
                texts.append(b"")
            else:
                texts.append(piece.replace(_SPACE, " ").encode())
        return texts

    def token_id(self, token: str) -> int | None:
        """See `Tokenizer.token_id`."""
        found = self._processor.piece_to_id(token)
        # piece_to_id returns the unknown token for unknown pieces, hence the check.
        return None if self._processor.id_to_piece(found) != token else int(found)

    def save(self, directory: str | Path) -> Path:
        """See `Tokenizer.save`."""
        path = Path(directory) / self.model_name
        path.write_bytes(self.model)
        _write_files(self.files if self._eod_is_named else _naming_eod(self.files, self.eod), path.parent)
        return path


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json` of the `tokenizers` library.

    Args:
        file: the JSON file; a `tokenizer_config.json` beside it names the end-of-document token.
        eod: overrides the end-of-document token.
    """

    model_name = "tokenizer.json"

    def __init__(self, file: Path, eod: str | None = None) -> None:
        from tokenizers import Tokenizer as Backend

        self._file, self.model, self.files = file, file.read_bytes(), _read_beside(file)
        self._json: dict[str, Any] = json.loads(self.model)
        self._backend = Backend.from_buffer(self.model)
        self._backend.no_padding()
        self._backend.no_truncation()
        # Text in a document must never become a control token, even in a document about tokenizers.
        self._backend.encode_special_tokens = True
        self._vocab: dict[str, int] = self._backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(self._vocab.values()) + 1
        self.eod = eod or self._find_eod()
        if self.eod not in self._vocab:
            raise ConfigError(
                f"the tokenizer has no token {self.eod}; name its end-of-document token with tokenizer.eod"
            )
        self.eod_id = self._vocab[self.eod]

    def _find_eod(self) -> str:
        found = [name for name in (self._named_eod(), *_KNOWN_EODS) if name in self._vocab]
        if not found:
            special = ", ".join(token["content"] for token in self._json.get("added_tokens", [])[:8])
            raise ConfigError(
                f"which token ends a document is not known; name it with tokenizer.eod, one of: {special}"
            )
        return str(found[0])

    def _named_eod(self) -> str | None:
        config = token_config(self.files)
        return named_token(config, _EOD_KEY) or named_token(config, "eos_token")

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer.encode`."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """See `Tokenizer.decode`."""
        return self._backend.decode([int(token) for token in ids], skip_special_tokens=True)

    def token_bytes(self) -> np.ndarray:
        """See `Tokenizer.token_bytes`."""
        added = {token["id"]: token for token in self._json.get("added_tokens", [])}
        # In byte-level vocabularies each character of a piece represents one byte.
        byte_level = '"ByteLevel"' in json.dumps([self._json.get("pre_tokenizer"), self._json.get("decoder")])
        lengths = np.zeros(self.vocab_size, np.int64)
        for piece, token in self._vocab.items():
            if token in added:
                lengths[token] = 0 if added[token]["special"] else len(piece.encode())
            elif byte_level or re.fullmatch("<0x[0-9A-F]{2}>", piece):
                lengths[token] = len(piece) if byte_level else 1
            else:
                # "##" marks a word's continuation in WordPiece and is no text.
                lengths[token] = len(piece.replace(_SPACE, " ").removeprefix("##").encode())
        lengths[self.eod_id] = 0
        return lengths

    def token_id(self, token: str) -> int | None:
        """See `Tokenizer.token_id`."""
        return self._vocab.get(token)

    def save(self, directory: str | Path) -> Path:
        """See `Tokenizer.save`."""
        path = Path(directory) / self.model_name
        path.write_bytes(self.model)
        _write_files(self.files if self._named_eod() == self.eod else _naming_eod(self.files, self.eod), path.parent)
        return path


def _naming_eod(files: Mapping[str, bytes], eod: str) -> dict[str, bytes]:
    """The tokenizer's files with the end-of-document token added to the configuration; other settings are kept."""
    config = json.loads(files.get(_CONFIG_NAME, b"{}"))
    if named_token(token_config(files), "eos_token") is None:
        config["eos_token"] = eod
    content = json.dumps(config | {_EOD_KEY: eod}, indent=2, ensure_ascii=False) + "\n"
    return {**files, _CONFIG_NAME: content.encode()}


def _write_files(files: Mapping[str, bytes], directory: Path) -> None:
    for name, content in files.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_bytes(content)


def learn_sentencepiece(
    texts: Iterable[str], kind: Literal["bpe", "unigram"], vocab_size: int
) -> SentencePieceTokenizer:
    """Learn a lossless model from `texts`; deterministic.

    Raises:
        ConfigError: if the texts do not contain that many pieces.
    """
    from sentencepiece import SentencePieceTrainer

    if kind == "unigram":
        # Unigram training starts from all frequent substrings and iterates over every sentence. Whole files take
        # minutes, and give worse pieces than lines (3.15 bytes per token against 3.32).
        texts = (line for text in texts for line in _LINES.findall(text))
    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type=kind,
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            # Pieces may cross spaces, scripts and newlines: 3.93 bytes per token instead of 3.26 (stdlib, BPE, 4,096
            # pieces).
            split_by_whitespace=False,
            split_by_unicode_script=False,
            split_digits=True,
            max_sentencepiece_length=32 if kind == "bpe" else 16,
            max_sentence_length=1 << 24,
            character_coverage=0.9999,
            eos_id=0,
            eos_piece=EOD_PIECE,
            unk_id=1,
            bos_id=-1,
            pad_id=-1,
            num_threads=1,  # with more, the order of float sums and so the unigram model would depend on the machine
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ConfigError(f"tokenizer.vocab_size {vocab_size} {_vocabulary_fault(str(error))}") from error
    return SentencePieceTokenizer(model.getvalue())


def _vocabulary_fault(reason: str) -> str:
    """Rephrase SentencePiece's complaint about the vocabulary size, with a size that it accepts."""
    if most := re.search(r"Vocabulary size too high .*value <= (\d+)", reason):
        return (
            f"is more than the sample gives: choose at most {most[1]} (--tokenizer.vocab_size {most[1]}), give more "
            "text, or an existing tokenizer (--tokenizer.path)"
        )
    if least := re.search(r"Vocabulary size is smaller than required_chars\. \d+ vs (\d+)", reason):
        return f"is less than the bytes and characters of the sample: choose at least {least[1]}"
    return f"does not fit the sample ({' '.join(reason.split())}); choose another one, or give more text"
