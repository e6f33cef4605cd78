"""Models on disk that other programs or an export wrote: weights, Hugging Face directories, GGUF files.

All are read alike, tensor by tensor and block by block, by the names of our parameters. Pickles are never read. Names,
shapes and dtypes come from the files' headers, without importing torch.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.config import ModelConfig
from models.hub.adapter import Adapter
from models.hub.registry import adapter_of, from_hub
from models.hub.tensors import Copy, Index, overlap, row_blocks, stored_shapes, whole
from trainer.cli import from_mapping
from trainer.errors import ConfigError
from trainer.json_files import read_object
from trainer.stored.tensor_files import TYPES, StoredTensor, read_header

if TYPE_CHECKING:
    from torch import Tensor

    from models.decoder import Decoder

CONFIG_NAME, MODEL_TYPE = "config.json", "spiketrain"
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZERS = ("tokenizer.model", "tokenizer.json")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# Lossless conversions: pairs of (dtype in the file, dtype of the parameter).
_EXACT = {("F16", "float32"), ("BF16", "float32")}
_NAMES_SHOWN = 3
# Elements that are read at a time: 64 MB in float32.
_BLOCK_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class Part:
    """A part of a parameter, such as a rank's shard.

    Attributes:
        shape: Shape of the whole parameter.
        index: One slice a leading dimension; `slice(None)` for all of it.
    """

    shape: tuple[int, ...]
    index: tuple[slice, ...]


@dataclass(frozen=True)
class Weights:
    """A model on disk as its headers describe it; no tensor data is read.

    Attributes:
        path: The directory or file.
        model: Configuration of the model.
        vocab_size: Rows of the embedding.
        tensors: Stored tensors by their names in the files.
        tokenizer: Directory of the tokenizer that came with it; None if there is none.
        adapter: The Hugging Face architecture that the names follow; None for our own names.
        config: Content of config.json.
        spare: Further stored tensors, which follow from others (a tied head, rotary frequencies) or are never read.
    """

    path: Path
    model: ModelConfig
    vocab_size: int
    tensors: dict[str, StoredTensor]
    tokenizer: Path | None = None
    adapter: Adapter | None = None
    config: dict[str, Any] = field(default_factory=dict)
    spare: dict[str, StoredTensor] = field(default_factory=dict)

    @property
    def dtype(self) -> str:
        """The dtype to compute in, as named by torch: bfloat16 if the embedding is stored so, else float32."""
        return "bfloat16" if self._embedding().dtype == "BF16" else "float32"

    @property
    def is_checkpoint(self) -> bool:
        """Whether it is a checkpoint of a run."""
        return (self.path / "state").is_dir()

    @property
    def max_positions(self) -> int | None:
        """Length of the longest sequence in training, in tokens; None if nothing tells."""
        found = self.config.get("max_position_embeddings")
        return found if isinstance(found, int) and found > 0 else None

    def _embedding(self) -> StoredTensor:
        return self.tensors[self.places("embedding.weight", (1, 1))[0].stored]

    def places(self, name: str, shape: tuple[int, ...]) -> list[Copy]:
        """Where a parameter of this shape is stored."""
        if self.adapter is None:
            return [whole(shape, name)]
        return self.adapter.place(name, shape, self.model, self.tensors)

    def require(self, model: "Decoder", drawn: Iterable[str] = ()) -> None:
        """Check the stored tensors against a model's parameters. Those that are `drawn` need none.

        Raises:
            ConfigError: tensors are missing, unexpected or of the wrong shape, or stored twice with different values.
        """
        if self.spare:
            # Imported here, because it loads torch.
            from trainer.stored.redundant import require_agreement

            require_agreement(self.spare, self._embedding(), self.model)
        kept = {name: tuple(tensor.shape) for name, tensor in kept_tensors(model).items() if name not in drawn}
        expected = stored_shapes(copy for name, shape in kept.items() for copy in self.places(name, shape))
        found = {name: tensor.shape for name, tensor in self.tensors.items()}
        if missing := expected.keys() - found.keys():
            raise ConfigError(f"{self.path} lacks {listed(missing)}; write the weights again")
        if extra := found.keys() - expected.keys():
            raise ConfigError(
                f"{self.path} holds {listed(extra)}, which the model does not have; write the weights again"
            )
        if other := [name for name in expected if found[name] != expected[name]]:
            name = other[0]
            raise ConfigError(
                f"{self.path} has other shapes than the model in {listed(other)} "
                f"({name}: {list(found[name])} -> {list(expected[name])}); write the weights again"
            )

    def conversions(self, model: "Decoder") -> list[str]:
        """Describe the conversions from the files' dtypes to those of a model's parameters, and which are exact."""
        counts: Counter[tuple[str, str]] = Counter()
        for name, tensor in kept_tensors(model).items():
            stored = {copy.stored for copy in self.places(name, tuple(tensor.shape))}
            counts.update((self.tensors[other].dtype, str(tensor.dtype).removeprefix("torch.")) for other in stored)
        own = {("F32", "float32"), ("BF16", "bfloat16")}
        return [
            f"{count} tensors from {kind} to {dtype}, {_how(kind, dtype)}"
            for (kind, dtype), count in counts.items()
            if (kind, dtype) not in own
        ]

    def read(self, into: Mapping[str, "Tensor"], parts: Mapping[str, Part] | None = None) -> None:
        """Fill tensors by our names, or the parts of them that `parts` names, one block at a time.

        Raises:
            ConfigError: a value is beyond the range of its parameter's dtype.
        """
        for name, tensor in into.items():
            part = (parts or {}).get(name)
            value = None if self.adapter is None else self.adapter.constant(name, self.model)
            if value is not None:
                tensor.fill_(value)
                continue
            for copy in self.places(name, tuple(tensor.shape) if part is None else part.shape):
                if (blocks := overlap(copy, None if part is None else part.index)) is not None:
                    self._read_block(copy.stored, tensor, *blocks)

    def _read_block(self, stored: str, tensor: "Tensor", index: Index, stored_index: Index) -> None:
        for part, stored_part in row_blocks(index, stored_index, _BLOCK_ELEMENTS):
            self._read_rows(stored, tensor, part, stored_part)

    def _read_rows(self, stored: str, tensor: "Tensor", index: Index, stored_index: Index) -> None:
        block = self.tensors[stored].read(stored_index)
        tensor[index].copy_(block)
        # Only float64 exceeds the range of float32 and bfloat16.
        if self.tensors[stored].dtype == "F64" and not block.isfinite().equal(tensor[index].isfinite()):
            raise ConfigError(f"{self.tensors[stored].file}: {stored} has values beyond the range of {tensor.dtype}")


def hub_weights(
    path: Path, config: dict[str, Any], model: ModelConfig, tensors: dict[str, StoredTensor], tokenizer: Path | None
) -> Weights:
    """A model with Hugging Face's names, with the tensors that follow from others set apart.

    Raises:
        ConfigError: a tensor belongs to another architecture.
    """
    adapter = adapter_of(config)
    try:
        unread = adapter.ignored(tensors)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error
    head = {"lm_head.weight"} if model.tie_embeddings else set()
    spare = {name for name in tensors if name in head | unread or name.endswith(".inv_freq")}
    kept = {name: tensor for name, tensor in tensors.items() if name not in spare}
    apart = {name: tensors[name] for name in sorted(spare)}
    return Weights(path, model, config["vocab_size"], kept, tokenizer, adapter, config, apart)


def model_of(path: Path, config: dict[str, Any]) -> tuple[ModelConfig, int]:
    """The model configuration and the number of embedding rows that a config.json describes.

    Raises:
        ConfigError: it describes none, or one of another kind.
    """
    if isinstance(config.get("model"), dict) and isinstance(config.get("vocab_size"), int):
        return from_mapping(ModelConfig, config["model"]), config["vocab_size"]
    if config.get("model_type", MODEL_TYPE) == MODEL_TYPE:
        raise ConfigError(
            f"{path / CONFIG_NAME} has no model section and vocab_size; spiketrain convert writes one that has"
        )
    try:
        return from_hub(config), config["vocab_size"]
    except KeyError as error:
        raise ConfigError(f"{path / CONFIG_NAME} has no {error.args[0]}; give a whole model") from error
    except ValueError as error:
        raise ConfigError(f"{path / CONFIG_NAME}: {error}") from error


def read_headers(path: Path) -> dict[str, StoredTensor]:
    """Read the headers of all safetensors files in a directory: tensors by name.

    Raises:
        ConfigError: there are no such files, or they are incomplete.
    """
    tensors: dict[str, StoredTensor] = {}
    for file, names in _files(path).items():
        found = read_header(file)
        if names is not None and names != found.keys():
            raise ConfigError(
                f"{path / INDEX} and {file.name} differ in {listed(names ^ found.keys())}; get both from one place"
            )
        tensors |= found
    # Both a single file and an index: programs disagree on which of them they read.
    if (path / WHOLE).is_file() and all(tensor.file.name != WHOLE for tensor in tensors.values()):
        raise ConfigError(f"{path} holds both {WHOLE} and {INDEX}, which names other files; keep the one that is meant")
    return tensors


def _files(path: Path) -> dict[Path, set[str] | None]:
    """Files mapped to the tensor names that the index assigns to them; None without an index."""
    if (path / INDEX).is_file():
        files: dict[Path, set[str] | None] = {}
        weight_map = read_json(path / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ConfigError(f"{path / INDEX} has no weight_map; write the weights again")
        for name, file in weight_map.items():
            # Plain file names only: an index must not reach outside its directory.
            if Path(str(file)).name != file:
                raise ConfigError(f"{path / INDEX} names {file!r}; it may only name files beside it")
            names = files.setdefault(path / file, set())
            assert names is not None
            names.add(name)
        return files
    if (path / WHOLE).is_file():
        return {path / WHOLE: None}
    pickles = sorted(file.name for file in path.iterdir() if file.suffix in _PICKLES)
    reason = f"; {pickles[0]} may be a pickle, which can run code and is never read" if pickles else ""
    raise ConfigError(f"{path} holds neither {WHOLE} nor {INDEX}{reason}; give weights as safetensors")


def read_json(path: Path) -> dict[str, Any]:
    """Read the object in a JSON file.

    Raises:
        ConfigError: the file is missing or is not a JSON object.
    """
    try:
        return read_object(path, "write the weights again", _without_repeats)
    except FileNotFoundError:
        raise ConfigError(f"{path} is missing; name a directory that has it beside the tensors") from None


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    # json.loads silently keeps the last of repeated keys.
    if len(values) < len(pairs):
        repeated = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
        raise ValueError(f"{listed(repeated)} is given twice")
    return values


def _how(kind: str, dtype: str) -> str:
    """How a stored dtype becomes a parameter's. GGUF files have types of their own."""
    return "dequantised" if kind not in TYPES else "exactly" if (kind, dtype) in _EXACT else "rounded"


def kept_tensors(model: "Decoder") -> dict[str, "Tensor"]:
    """The tensors that weights hold: parameters, and buffers such as the routers' counters."""
    return {name: tensor.detach() for name, tensor in (*model.named_parameters(), *model.named_buffers())}


def listed(names: Any) -> str:
    """The first few names, and how many more there are."""
    shown = sorted(names)[:_NAMES_SHOWN]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")
