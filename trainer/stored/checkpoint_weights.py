"""Checkpoints as weights, from which runs start and teachers are read without an export in between.

Names, shapes and dtypes come from a checkpoint's metadata, a pickle. Stand-ins take the place of torch's classes in it,
so it runs no code, and torch is not imported. Values are read by trainer.stored.parameters.
"""

import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.config import LoraConfig, ModelConfig
from models.hub.tensors import Index, everything
from trainer.cli import from_mapping
from trainer.errors import ConfigError
from trainer.run_directory import last_step, list_checkpoints, settings_of
from trainer.runtime import rank
from trainer.stored import checksums
from trainer.stored.on_disk import TOKENIZERS, Weights
from trainer.stored.tensor_files import TYPES, StoredTensor

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.engines.pieces import Reader

# By torch's name: safetensors'.
_KINDS = {name: kind for kind, name in TYPES.items()}
_MODEL = "model."


@dataclass(frozen=True)
class CheckpointTensor(StoredTensor):
    """A parameter in a checkpoint, with its adapter merged into it; `file` is the checkpoint's metadata.

    Attributes:
        name: Its name in the model.
        lora: Configuration of the adapters.
        reader: Opens the checkpoint.
    """

    name: str
    lora: LoraConfig
    reader: Callable[[], "Reader"]

    def read(self, index: Index = ()) -> "Tensor":
        """Read a block, in the stored dtype; without an index the whole parameter."""
        block = [entry for entry in index or everything(self.shape) if isinstance(entry, slice)]
        assert len(block) == len(self.shape), "parameters of ours are read as ranges"
        start = tuple(entry.start for entry in block)
        sizes = tuple(entry.stop - entry.start for entry in block)
        # Imported here, because it loads torch.
        from trainer.stored.parameters import read_block

        return read_block(self.reader(), self.name, start, sizes, self.lora)


def is_at(path: Path) -> bool:
    """Whether a path is a run directory or a checkpoint, by the names in it."""
    return any((path / name).exists() for name in ("config.yaml", "checkpoints", "state"))


def newest(path: Path, key: str) -> Path:
    """Return a run directory's newest complete checkpoint, or `path` itself if it is a checkpoint.

    Complete is what has all files of its list; `require_whole` compares their content.

    Raises:
        ConfigError: there is none, or the given one is incomplete.
    """
    complaints = []
    for found in [path] if (path / "state").is_dir() else reversed(list_checkpoints(path)):
        try:
            checksums.read(found)
            return found
        except ValueError as error:
            complaints.append(f"{found.name}: {error}")
    raise ConfigError(f"{key}: {path} holds no complete checkpoint ({'; '.join(complaints) or 'none'}); name another")


def open_as_weights(path: Path, key: str) -> Weights:
    """Open a checkpoint, or a run directory's newest complete one.

    Raises:
        ConfigError: there is none, its metadata cannot be read, or its experts do not exist yet.
    """
    found = newest(path, key)
    try:
        return _open(found, _changed(found))
    except ValueError as error:
        raise ConfigError(f"{key}: {error}") from error


def require_whole(weights: Weights, key: str) -> None:
    """Compare the files of a checkpoint with their checksums; of other weights nothing. Rank 0 does it for all.

    Raises:
        ConfigError: a file differs.
    """
    if rank() == 0 and weights.is_checkpoint and (wrong := _wrong_files(weights.path, _changed(weights.path))):
        raise ConfigError(
            f"{key}: {weights.path} is damaged ({wrong[0]} does not match its checksum); name another checkpoint"
        )


def _changed(checkpoint: Path) -> int:
    """When a checkpoint was sealed: a key of the caches, for another may have its name later."""
    return (checkpoint / checksums.NAME).stat().st_mtime_ns


# A run asks for its weights several times, and their content takes long to read.
@lru_cache
def _wrong_files(checkpoint: Path, changed: int) -> list[str]:
    del changed
    listed = checksums.read(checkpoint)
    return checksums.wrong_files(checkpoint, listed, listed)


@lru_cache
def _open(checkpoint: Path, changed: int) -> Weights:
    del changed
    settings = settings_of(checkpoint)
    model, train = from_mapping(ModelConfig, settings["model"]), settings["train"]
    _require_spawned(model, checkpoint)
    tokenizer = checkpoint / "tokenizer"
    file, reader = checkpoint / checksums.METADATA, cache(partial(_reader, checkpoint))
    tensors: dict[str, StoredTensor] = {
        name: CheckpointTensor(file, shape, kind, 0, name, model.lora, reader)
        for name, (shape, kind) in _headers(file).items()
    }
    return Weights(
        checkpoint,
        # Reading merges adapters.
        replace(model, lora=LoraConfig()),
        tensors["embedding.weight"].shape[0],
        tensors,
        tokenizer if any((tokenizer / name).is_file() for name in TOKENIZERS) else None,
        config={"max_position_embeddings": train["seq_len"]},
    )


def _reader(checkpoint: Path) -> "Reader":
    # Imported here, because it loads torch.
    from trainer.engines.pieces import Reader

    return Reader(checkpoint / "state")


def _require_spawned(model: ModelConfig, checkpoint: Path) -> None:
    """Check that experts exist. Before spawning, a checkpoint holds their common ancestor, not the model."""
    if model.moe.num_experts and not model.moe.is_spawned(last_step(checkpoint)):
        raise ValueError(
            f"{checkpoint} has experts that are to be spawned at step {model.moe.spawn_step}; train on past it"
        )


def _headers(file: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shapes and safetensors' dtypes of the parameters that weights hold, by their names in the model.

    Raises:
        ValueError: the file cannot be read, or a parameter has another dtype.
    """
    try:
        with file.open("rb") as stream:
            stored = _Headers(stream).load().state_dict_metadata
        entries = {name.removeprefix(_MODEL): entry for name, entry in stored.items() if name.startswith(_MODEL)}
        # Adapters are merged, and a head for values is no part of the language model.
        kept = {name: entry for name, entry in entries.items() if ".lora." not in name and "value_head." not in name}
        return {name: (entry.size, _KINDS[entry.properties.state[0]]) for name, entry in kept.items()}
    except Exception as error:
        # A damaged pickle may raise any exception.
        raise ValueError(f"{file} cannot be read ({type(error).__name__}: {error}); name another checkpoint") from error


class _StandIn:
    """In place of a class of torch's: keeps what the pickle gives it."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)
        else:
            self.state = state


class _Headers(pickle.Unpickler):
    """Unpickles a checkpoint's metadata. Sizes become tuples, dtypes their names, all else stand-ins."""

    def find_class(self, module: str, name: str) -> Any:
        if module != "torch":
            return _StandIn
        return tuple if name == "Size" else name
