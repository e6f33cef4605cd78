"""Resolves the `data` section of a configuration into tokenizer, training batches and validation files.

Imports torch only when batches are opened, so that a run's sources can be checked without it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.config import PretrainConfig
from trainer.data.layout import Corpora, find_corpora, info_of_prefix, resolve_prefix, tokenizer_file
from trainer.data.prepare_config import finished, stdlib_config
from trainer.data.tokenizer import Tokenizer
from trainer.errors import ConfigError

if TYPE_CHECKING:
    from trainer.data.dataset import Sampler


@dataclass(frozen=True)
class DataSources:
    """The resolved inputs of a run.

    Attributes:
        paths: Prepared directories or prefixes, with their shares of the samples.
        validation: Directory or prefix for validation; None if there is none.
        tokenizer: None if neither the configuration nor the data names one.
        tokenizer_path: Path from which it was loaded.
        eod_id: The end-of-document token; None if unknown.
        vocab_size: Number of token ids, before padding.
        unprepared: Those of `paths` that do not exist yet and are prepared when the run starts.
    """

    paths: dict[str, float]
    validation: str | None
    tokenizer: Tokenizer | None
    tokenizer_path: Path | None
    eod_id: int | None
    vocab_size: int
    unprepared: tuple[str, ...] = ()

    def open_training(self, config: PretrainConfig) -> Sampler:
        """Open the training batches."""
        from trainer.data.dataset import open_training_data

        return open_training_data(
            self.paths,
            seed=config.train.seed,
            seq_len=config.train.seq_len,
            global_batch_size=config.train.global_batch_size,
            eod_id=self.eod_id,
            document_mask=config.data.document_mask,
            vocab_size=self.vocab_size,
        )


def find_sources(config: PretrainConfig, prepare: bool = True) -> DataSources:
    """Prepare `stdlib` if requested, and find the tokenizer and the validation split.

    Args:
        config: The run.
        prepare: If false, unprepared sources are only listed in `DataSources.unprepared`.

    Raises:
        ConfigError: the sources are inconsistent, or nothing determines the vocabulary size.
    """
    data = config.data
    located = [(*_locate(config, source, prepare), share) for source, share in data.shares().items()]
    paths = {path: share for path, _, share in located}
    if len(paths) < len(located):
        raise ConfigError(f"data.blend names one source twice ({', '.join(paths)}): add its weights")
    unprepared = tuple(path for path, there, _ in located if not there)
    there = {path: share for path, share in paths.items() if path not in unprepared}
    tokenizer_path = _tokenizer_path(data.tokenizer, there)
    tokenizer = Tokenizer.load(tokenizer_path) if tokenizer_path else None
    # Unprepared sources have no files to inspect yet.
    corpora = find_corpora(there) if there else Corpora((), (), None, None)
    learned = data.vocab_size if unprepared else None
    # In order of authority: the tokenizer, prepared data, the vocabulary that will be learned, the model's setting.
    vocab_size = tokenizer.vocab_size if tokenizer else corpora.vocab_size or learned or config.model.vocab_size
    if vocab_size is None:
        raise ConfigError(
            "nothing says how large the vocabulary of data.path is; set data.tokenizer, or model.vocab_size"
        )
    eod_id = _agreed_end(
        {
            "data.eod_id": data.eod_id,
            f"dataset.json beside {', '.join(map(str, corpora.prefixes))}": corpora.eod_id,
            f"the tokenizer {tokenizer_path}": tokenizer.eod_id if tokenizer else None,
        }
    )
    return DataSources(paths, _validation(config, there), tokenizer, tokenizer_path, eod_id, vocab_size, unprepared)


def _locate(config: PretrainConfig, source: str, prepare: bool) -> tuple[str, bool]:
    """The path of a source, and whether its data exists."""
    if source != "stdlib":
        return os.path.expanduser(source), True
    wanted = stdlib_config(config.data.cache_dir, config.data.vocab_size)
    output = os.path.expanduser(wanted.output)
    if prepare:
        from trainer.data.prepare import prepare_stdlib

        return str(prepare_stdlib(config.data.cache_dir, config.data.vocab_size)), True
    return output, finished(output, wanted.settings()) is not None


def _tokenizer_path(named: str | None, paths: Mapping[str, float]) -> Path | None:
    """The configured tokenizer, or the one beside the first prepared data that has one."""
    if named is not None:
        return tokenizer_file(named)
    for path in paths:
        prefix = resolve_prefix(path)
        # Only beside prepared data: a tokenizer beside bare Megatron files may belong to something else.
        prepared = os.path.isdir(path) or info_of_prefix(prefix) is not None
        if prepared and any(prefix.parent.glob("tokenizer.*")):
            return tokenizer_file(prefix.parent)
    return None


def _agreed_end(named: dict[str, int | None]) -> int | None:
    """The end-of-document token on which all sources of information agree; None if nothing names it.

    Raises:
        ConfigError: they disagree.
    """
    known = {name: token for name, token in named.items() if token is not None}
    if len(set(known.values())) > 1:
        what = ", ".join(f"{token} by {name}" for name, token in known.items())
        raise ConfigError(
            f"the end-of-document token is given differently: {what}; leave data.eod_id out, or set data.tokenizer to "
            "the one that made the data, with its eos_token in tokenizer_config.json beside it"
        )
    return next(iter(known.values()), None)


def _validation(config: PretrainConfig, paths: Mapping[str, float]) -> str | None:
    named = config.data.validation_path
    if named is not None:
        return os.path.expanduser(named)
    return next((path for path in paths if os.path.isfile(os.path.join(path, "validation.idx"))), None)
