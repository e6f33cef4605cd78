"""Opens checkpoints and weights for generation and evaluation. Imports neither megatron nor deepspeed."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models import spiking
from models.config import LoraConfig, ModelConfig, SpikingConfig
from models.decoder import Decoder, build
from models.moe.statistics import set_step
from models.parameters import declared
from trainer.cli import from_mapping
from trainer.config import PretrainConfig
from trainer.data.tokenizer import Tokenizer
from trainer.engines.pieces import MODEL, Reader, Shard
from trainer.errors import ConfigError
from trainer.run_directory import last_step, settings_of
from trainer.stored import checkpoint, opening, weights
from trainer.stored.parameters import read_parameters


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready to use.

    Attributes:
        model: The trained parameters, in evaluation mode.
        tokenizer: The checkpoint's tokenizer. None if the run had none.
        path: Path of the checkpoint, or of the weights.
        settings: The run's configuration as plain values, in the phase of the checkpoint's last step; of weights the
            defaults.
        tokenizer_path: Directory of the tokenizer that came with the parameters. None if there was none.
    """

    model: Decoder
    tokenizer: Tokenizer | None
    path: Path
    settings: dict[str, Any]
    tokenizer_path: Path | None

    def require_tokenizer(self) -> Tokenizer:
        """Return the tokenizer.

        Raises:
            ConfigError: the run had no tokenizer.
        """
        if self.tokenizer is None:
            raise ConfigError(f"{self.path} was trained without a tokenizer; name one with --tokenizer")
        return self.tokenizer


def find_checkpoint(path: str | Path) -> Path:
    """Return the newest whole checkpoint of a run directory, or `path` itself if it is a checkpoint.

    Raises:
        ConfigError: there is none, or the given one is damaged.
    """
    path = Path(path)
    # Checkpoints have a state directory, run directories do not.
    if (path / "state").is_dir():
        reason = checkpoint.damage(path)
        if reason:
            raise ConfigError(f"{path} is damaged ({reason}); choose another checkpoint")
        return path
    latest, complaints = checkpoint.find_latest(path)
    if latest is None:
        detail = f" ({'; '.join(complaints)})" if complaints else ""
        raise ConfigError(f"{path} holds no usable checkpoint{detail}; give a run directory or a checkpoint in one")
    return latest


@dataclass(frozen=True)
class StoredModel:
    """A checkpoint whose parameters can be read, in a single process.

    Attributes:
        path: Path of the checkpoint.
        settings: The run's configuration as plain values, in the phase of the checkpoint's last step.
        model: Configuration of the model without adapters, which reading merges into its weights.
        vocab_size: Rows of its embedding.
        dtype: Data type of its parameters, except those with models.parameters.Placement.float32.
        tokenizer: Directory of the checkpoint's tokenizer. None if the run had none.
        lora: Configuration of the adapters.
    """

    path: Path
    settings: dict[str, Any]
    model: ModelConfig
    vocab_size: int
    dtype: torch.dtype
    tokenizer: Path | None
    lora: LoraConfig = field(default_factory=LoraConfig)

    def read(self, parameters: dict[str, Tensor], main: bool = False) -> None:
        """Fill parameters, given by name, from the checkpoint. With `main`, from the optimizer's main parameters."""
        self._read({name: (into, Shard.of(into)) for name, into in parameters.items()}, main)

    def fill(self, decoder: Decoder) -> None:
        """Fill this shard of a model or stage. Set schedules to their state in the validation after the last step."""
        rows = declared(decoder).values()
        self._read({row.name: (row.tensor, Shard.of(row.tensor, *row.place(decoder.groups))) for row in rows})
        set_step([decoder], self.last_step)
        spiking.set_step([decoder], self.last_step)

    def _read(self, shards: Mapping[str, tuple[Tensor, Shard]], main: bool = False) -> None:
        read_parameters(Reader(self.path / "state"), shards, self.lora, main)

    @property
    def last_step(self) -> int:
        """Number of the last training step, from 0."""
        return last_step(self.path)


def open_checkpoint(path: str | Path) -> StoredModel:
    """Open a checkpoint, or a run directory's newest one.

    Raises:
        ConfigError: the path holds no usable checkpoint.
    """
    found = find_checkpoint(path)
    settings = settings_of(found)
    # Stored with the vocabulary's padding, which the configuration alone does not determine.
    embedding = Reader(found / "state").stored[f"{MODEL}embedding.weight"]
    dtype = torch.bfloat16 if settings["train"]["precision"] == "bf16" else torch.float32
    tokenizer = found / "tokenizer"
    model = from_mapping(ModelConfig, settings["model"])
    return StoredModel(
        found,
        settings,
        replace(model, lora=LoraConfig()),
        embedding.size[0],
        dtype,
        tokenizer if tokenizer.is_dir() else None,
        model.lora,
    )


def load_model(
    path: str | Path, device: torch.device, tokenizer: str | None = None, neurons: SpikingConfig | None = None
) -> LoadedModel:
    """Load the parameters of a checkpoint or of weights, in a single process.

    Args:
        path: A run directory, one of its checkpoints, or a directory of weights.
        device: Device of the returned model.
        tokenizer: Path of a tokenizer to use instead of the checkpoint's.
        neurons: `model.spiking` to use instead of the checkpoint's. Its tensors must be stored.

    Raises:
        ConfigError: the path holds no usable parameters, or the tokenizer has more ids than the model.
    """
    opened = _open_weights(path, neurons) if opening.are_at(path) else _open_checkpoint(path, neurons)
    decoder, own, found, settings = opened
    chosen = tokenizer or own
    loaded = Tokenizer.load(chosen) if chosen else None
    # A smaller tokenizer is fine: padding rows have no token.
    if loaded is not None and loaded.vocab_size > decoder.vocab_size:
        raise ConfigError(
            f"tokenizer: {chosen} has {loaded.vocab_size} ids and the model of {found} {decoder.vocab_size}; "
            "name the one that it was trained with"
        )
    return LoadedModel(decoder.to(device).eval(), loaded, found, settings, own)


_Opened = tuple[Decoder, Path | None, Path, dict[str, Any]]


def _open_checkpoint(path: str | Path, neurons: SpikingConfig | None) -> _Opened:
    stored = open_checkpoint(path)
    model = stored.model if neurons is None else replace(stored.model, spiking=neurons)
    decoder = build(model, stored.vocab_size, dtype=stored.dtype)
    stored.fill(decoder)
    return decoder, stored.tokenizer, stored.path, stored.settings


def _open_weights(path: str | Path, neurons: SpikingConfig | None) -> _Opened:
    found = opening.open_weights(path)
    model = found.model if neurons is None else replace(found.model, spiking=neurons)
    decoder = build(model, found.vocab_size, dtype=getattr(torch, found.dtype))
    found.require(decoder)
    weights.fill(decoder, found)
    return decoder, found.tokenizer, found.path, asdict(PretrainConfig(model=found.model))
