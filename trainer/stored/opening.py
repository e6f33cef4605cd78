"""Opens what holds a model by the names of its files: weights, a Hugging Face directory, a GGUF file, a checkpoint."""

from pathlib import Path

from trainer.errors import ConfigError
from trainer.stored import checkpoint_weights
from trainer.stored.on_disk import (
    CONFIG_NAME,
    INDEX,
    MODEL_TYPE,
    TOKENIZERS,
    WHOLE,
    Weights,
    hub_weights,
    model_of,
    read_headers,
    read_json,
)


def are_at(path: str | Path) -> bool:
    """Whether a path is a model to read by `open_weights`, by its files' names; runs and checkpoints are none."""
    path = Path(path)
    if path.suffix == ".gguf":
        return path.is_file()
    return (path / CONFIG_NAME).is_file() and any((path / name).is_file() for name in (WHOLE, INDEX))


def open_weights(path: str | Path, key: str = "checkpoint.init") -> Weights:
    """Open weights, a Hugging Face directory, a GGUF file, a checkpoint, or a run directory's newest complete one.

    `key` names it in errors.

    Raises:
        ConfigError: there is none, its files are invalid, or it is a model of another kind.
    """
    path = Path(path)
    if path.suffix == ".gguf":
        from trainer.stored.gguf_file import open_gguf

        return open_gguf(path)
    if not path.is_dir():
        if path.parent.name == "checkpoints":
            raise ConfigError(f"{key}: {path} does not exist; restore it, or start another run from another checkpoint")
        raise ConfigError(f"{key}: {path} is not a directory; name one that spiketrain convert wrote, or a run")
    if not are_at(path) and checkpoint_weights.is_at(path):
        return checkpoint_weights.open_as_weights(path, key)
    # An adapter's deltas are not in the base weights: ignoring it would read a different model.
    if (path / "adapter_config.json").is_file():
        raise ConfigError(f"{path} has an adapter (adapter_config.json), which is not read; merge it first")
    config = read_json(path / CONFIG_NAME)
    model, vocab_size = model_of(path, config)
    tensors = read_headers(path)
    tokenizer = path if any((path / name).is_file() for name in TOKENIZERS) else None
    if config.get("model_type", MODEL_TYPE) == MODEL_TYPE:
        return Weights(path, model, vocab_size, tensors, tokenizer, config=config)
    return hub_weights(path, config, model, tensors, tokenizer)
