"""Settings of data preparation, and their validation before any data is read. Standard library only."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from trainer.data.layout import read_info, tokenizer_sha256
from trainer.errors import ConfigError

# 256 byte pieces and 2 special ones. Characters of the sample add to this; learning reports how many.
_SMALLEST_VOCAB = 258
_LARGEST_VOCAB = 1 << 20


@dataclass
class TokenizerConfig:
    """How to tokenize: with a SentencePiece model learned from the train split, or with an existing tokenizer.

    Attributes:
        kind: Kind of SentencePiece model to learn.
        vocab_size: Its vocabulary size, including 256 bytes and 2 special tokens.
        sample_mb: Megabytes of the train split to learn from; null means 16 for bpe and 2 for the slower unigram.
        path: An existing tokenizer.json, SentencePiece .model, or a directory with one; replaces the three settings
            above.
        eod: End-of-document token of an existing tokenizer, such as <|endoftext|>; null looks for a known one.
    """

    kind: Literal["bpe", "unigram"] = "bpe"
    vocab_size: int = 4096
    sample_mb: float | None = None
    path: str | None = None
    eod: str | None = None

    def __post_init__(self) -> None:
        if not _SMALLEST_VOCAB <= self.vocab_size <= _LARGEST_VOCAB:
            raise ConfigError(
                f"tokenizer.vocab_size is {self.vocab_size}; choose {_SMALLEST_VOCAB} to {_LARGEST_VOCAB} "
                "(256 bytes and 2 special tokens take the first; the characters of the corpus come on top)"
            )
        if self.sample_mb is not None and self.sample_mb <= 0:
            raise ConfigError(f"tokenizer.sample_mb is {self.sample_mb}; it must be positive")
        if self.path is not None and not Path(self.path).expanduser().exists():
            raise ConfigError(
                f"tokenizer.path: {self.path} does not exist; give a tokenizer.json or a SentencePiece .model"
            )
        if self.eod is not None and self.path is None:
            raise ConfigError(
                "tokenizer.eod belongs to tokenizer.path; a tokenizer learned here has its own end-of-document token"
            )


@dataclass
class PrepareConfig:
    """Turn documents into token files that training reads.

    Attributes:
        source: stdlib; a file, directory or glob of .jsonl, .json, .parquet or text files (one document per file), all
            but parquet also as .gz or .zst; or hf:NAME[:CONFIG][@SPLIT], a Hugging Face dataset on the hub or on the
            local disk.
        output: Directory to write.
        validation: A source for the validation split; null takes a share of the documents of source.
        test: A source for the test split; null takes a share of the documents of source.
        validation_share: Share of the documents of source for validation, chosen by a hash of their path or row.
        test_share: The same for test.
        text_key: Key or column of the text in jsonl, parquet and Hugging Face data.
        max_mb: Read only about this many megabytes from the beginning of source, for trials; null reads all.
        workers: Number of tokenizing processes; 0 means one per core.
        tokenizer: The tokenizer.
    """

    source: str = "stdlib"
    output: str = "data/stdlib"
    validation: str | None = None
    test: str | None = None
    validation_share: float = 0.04
    test_share: float = 0.04
    text_key: str = "text"
    max_mb: float | None = None
    workers: int = 0
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)

    def __post_init__(self) -> None:
        shares = (self.validation_share, self.test_share)
        if min(shares) < 0 or sum(shares) >= 1:
            raise ConfigError(
                f"validation_share {shares[0]} and test_share {shares[1]} must not be negative, and must "
                "leave a train split"
            )
        if self.workers < 0:
            raise ConfigError(f"workers is {self.workers}; give 0 for one a core, or a positive number")
        if self.max_mb is not None and self.max_mb <= 0:
            raise ConfigError(f"max_mb is {self.max_mb}; give a positive number, or null for all")
        for key, source in self.sources():
            check_source(key, source)

    def sources(self) -> Iterator[tuple[str, str]]:
        """Yield (key, source) for every source that is set."""
        for key in ("source", "validation", "test"):
            source = getattr(self, key)
            if source is not None:
                yield key, source

    def settings(self) -> dict[str, Any]:
        """All settings that affect the output, flattened; excludes the output path and the number of workers.

        Raises:
            ConfigError: an existing tokenizer is unreadable, or has no end-of-document token.
        """
        values = asdict(self)
        tokenizer = values.pop("tokenizer")
        for key in ("output", "workers"):
            del values[key]
        for key, source in self.sources():
            values[key] = source if is_named(source) else os.path.abspath(os.path.expanduser(source))
        if self.tokenizer.path is not None:
            from trainer.data.tokenizer import Tokenizer

            # Files beside the model may name the end-of-document token, and the model's hash does not cover them.
            eod_id = Tokenizer.load(self.tokenizer.path, self.tokenizer.eod).eod_id
            sha256 = tokenizer_sha256(self.tokenizer.path)
            tokenizer = {"sha256": sha256, "eod": self.tokenizer.eod, "eod_id": eod_id}
        return values | {f"tokenizer.{key}": value for key, value in tokenizer.items()}


def is_named(source: str) -> bool:
    """Whether a source is a name rather than a path."""
    return source == "stdlib" or source.startswith("hf:")


def check_source(key: str, source: str) -> None:
    """Refuse a source that does not exist.

    Raises:
        ConfigError: says which source is missing.
    """
    if source == "hf:":
        raise ConfigError(f"{key}: hf: names no dataset; write hf:NAME, hf:NAME:CONFIG or hf:NAME@SPLIT")
    path = os.path.expanduser(source)
    # Same rule as `find_files`: an existing file wins over a glob, because its name may contain brackets.
    if not is_named(source) and not os.path.exists(path) and not glob.glob(path, recursive=True):
        raise ConfigError(
            f"{key}: no file matches {source}; give an existing file, directory or glob, stdlib, or hf:NAME"
        )


def finished(output: str | Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The `dataset.json` of a complete output made with these settings; None if it is not complete.

    Raises:
        ConfigError: if the output was made with other settings (they are named), or if its files are missing.
    """
    info = read_info(output)
    if info is None:
        return None
    had = info.get("settings", {})
    if "tokenizer.sha256" in had:
        # Earlier versions stored eod_id only beside the settings.
        had = {"tokenizer.eod_id": info.get("eod_id")} | had
    refuse_other_settings(output, had, settings)
    for split in info.get("splits", {}):
        for suffix in (".bin", ".idx"):
            if not (Path(output) / f"{split}{suffix}").is_file():
                raise ConfigError(
                    f"{output} is damaged, {split}{suffix} is missing: delete the directory and prepare the data again"
                )
    return info


def refuse_other_settings(output: str | Path, had: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Refuse to mix data made with different settings.

    Raises:
        ConfigError: names the differing keys with both values.
    """
    differing = sorted(key for key in had.keys() | wanted.keys() if had.get(key) != wanted.get(key))
    if differing:
        changes = ", ".join(f"{key} (there {had.get(key)}, now {wanted.get(key)})" for key in differing)
        raise ConfigError(
            f"{output} holds data made with other settings: {changes}; choose another --output, or delete it"
        )


def stdlib_config(
    cache_dir: str | Path, vocab_size: int = 4096, kind: Literal["bpe", "unigram"] = "bpe", workers: int = 0
) -> PrepareConfig:
    """The settings that prepare `data.path: stdlib`; see `prepare.prepare_stdlib`."""
    output = Path(cache_dir) / f"stdlib-{kind}{vocab_size}"
    tokenizer = TokenizerConfig(kind=kind, vocab_size=vocab_size)
    return PrepareConfig(output=str(output), workers=workers, tokenizer=tokenizer)
