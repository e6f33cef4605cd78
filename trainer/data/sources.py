"""From the `data` section of a configuration to tokenizer, training batches and validation files."""

from dataclasses import dataclass
from pathlib import Path

from trainer.cli import ConfigError
from trainer.config import PretrainConfig
from trainer.data.dataset import Sampler, open_training_data
from trainer.data.layout import find_corpora
from trainer.data.prepare import prepare_stdlib
from trainer.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class DataSources:
    """What a run reads.

    Attributes:
        paths: Prepared directories or prefixes, with the share of samples each gives.
        validation: Directory or prefix for validation, None without one.
        tokenizer: None where the data is bare and none was named.
        eod_id: The end-of-document token, None where nothing says.
        vocab_size: Token ids, before padding.
    """

    paths: dict[str, float]
    validation: str | None
    tokenizer: Tokenizer | None
    eod_id: int | None
    vocab_size: int

    def open_training(self, config: PretrainConfig) -> Sampler:
        """The training batches."""
        return open_training_data(
            self.paths,
            seed=config.train.seed,
            seq_len=config.train.seq_len,
            global_batch_size=config.train.global_batch_size,
            eod_id=self.eod_id,
            document_mask=config.data.document_mask,
        )


def find_sources(config: PretrainConfig) -> DataSources:
    """Prepare `stdlib` if it is asked for, find the tokenizer and the validation split.

    Raises:
        ConfigError: the vocabulary's size is not known from anywhere.
    """
    data = config.data
    paths = {_prepared(config, source): share for source, share in (data.blend or {data.path: 1.0}).items()}
    directories = [Path(path) for path in paths if Path(path).is_dir()]
    tokenizer = _find_tokenizer(data.tokenizer, directories)
    eod_id = tokenizer.eod_id if tokenizer else None
    corpora = find_corpora(paths, "train", eod_id)
    vocab_size = tokenizer.vocab_size if tokenizer else corpora.vocab_size or config.model.vocab_size
    if vocab_size is None:
        raise ConfigError(
            "nothing says how large the vocabulary of data.path is; set data.tokenizer, or model.vocab_size"
        )
    has_split = (directory for directory in directories if (directory / "validation.idx").is_file())
    validation = data.validation_path or next((str(directory) for directory in has_split), None)
    return DataSources(paths, validation, tokenizer, corpora.eod_id, vocab_size)


def _prepared(config: PretrainConfig, source: str) -> str:
    return str(prepare_stdlib(config.data.cache_dir, config.data.vocab_size)) if source == "stdlib" else source


def _find_tokenizer(named: str | None, directories: list[Path]) -> Tokenizer | None:
    if named is not None:
        return Tokenizer.load(named)
    for directory in directories:
        if any(directory.glob("tokenizer.*")):
            return Tokenizer.load(directory)
    return None
