"""Plain weights: a directory of safetensors files that runs of either engine are exported to and start from.

    weights/
        model.safetensors    the parameters by the names that models.decoder.Decoder gives them; above a size several
                             files, model-00001-of-00002.safetensors and so on, and model.safetensors.index.json
        config.json          the model's section of the configuration, the rows of the embedding, the type
        tokenizer.model      or tokenizer.json; where the run had one

Files, index and names of files are as Hugging Face has them. Pickles are not read. What can be said against weights
from names and headers is said before torch is imported.
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from models.config import MIXERS, ModelConfig, branches, mixer_section
from trainer.cli import ConfigError, from_mapping
from trainer.config import PretrainConfig
from trainer.data.layout import find_corpora
from trainer.run_directory import differences, flatten, starts_anew

if TYPE_CHECKING:
    from torch import Tensor

    from models.decoder import Decoder

CONFIG_NAME = "config.json"
_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_TYPES = ("F64", "F32", "F16", "BF16")
# They matter where parameters are drawn; the embedding's rows are compared as they are.
_NOT_COMPARED = ("init_std", "scale_residual_init", "vocab_size", "vocab_multiple")
# The weights hold all experts, however these came to be, and whatever is kept of them in training.
_NOT_COMPARED_OF_EXPERTS = ("spawn_step", "spawn_diversify", "recompute_above", "replicate_above")
_NAMES_SHOWN = 3


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies, and its shape."""

    file: Path
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Weights:
    """What the files of a directory say of themselves, their tensors unread.

    Attributes:
        path: The directory.
        model: The shape of the model.
        vocab_size: Rows of its embedding.
        tensors: By the names of the model's parameters.
    """

    path: Path
    model: ModelConfig
    vocab_size: int
    tensors: dict[str, StoredTensor]


def open_weights(path: str | Path) -> Weights:
    """Read config.json and the headers of a directory of weights.

    Raises:
        ConfigError: there is none, or its files are not what they should be.
    """
    path = Path(path)
    if not path.is_dir():
        raise ConfigError(f"checkpoint.init: {path} is not a directory; name one that launch/convert.py wrote")
    tensors = read_headers(path)
    config = read_json(path / CONFIG_NAME)
    if not isinstance(config.get("model"), dict) or not isinstance(config.get("vocab_size"), int):
        raise ConfigError(
            f"{path / CONFIG_NAME} has no model section and vocab_size; launch/convert.py writes one that has"
        )
    return Weights(path, from_mapping(ModelConfig, config["model"]), config["vocab_size"], tensors)


def read_headers(path: Path) -> dict[str, StoredTensor]:
    """The tensors of the safetensors files of a directory, by name.

    Raises:
        ConfigError: there are none, or they are not whole.
    """
    tensors: dict[str, StoredTensor] = {}
    for file, names in _files(path).items():
        found = _read_header(file)
        if names is not None and names != found.keys():
            raise ConfigError(
                f"{path / _INDEX} and {file.name} differ in {_listed(names ^ found.keys())}; get both from one place"
            )
        tensors |= found
    return tensors


def _files(path: Path) -> dict[Path, set[str] | None]:
    """The files with the tensors that the index says they hold; None without an index."""
    if (path / _INDEX).is_file():
        files: dict[Path, set[str] | None] = {}
        weight_map = read_json(path / _INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ConfigError(f"{path / _INDEX} has no weight_map; write the weights again")
        for name, file in weight_map.items():
            if Path(str(file)).name != file:
                raise ConfigError(f"{path / _INDEX} names {file!r}; it may only name files beside it")
            names = files.setdefault(path / file, set())
            assert names is not None
            names.add(name)
        return files
    if (path / _WHOLE).is_file():
        return {path / _WHOLE: None}
    pickles = sorted(file.name for file in path.iterdir() if file.suffix in _PICKLES)
    reason = f"; {pickles[0]} may be a pickle, which can run code and is never read" if pickles else ""
    raise ConfigError(f"{path} holds neither {_WHOLE} nor {_INDEX}{reason}; give weights as safetensors")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ConfigError: there is none.
    """
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{path} is missing; name a directory that has it beside the tensors") from None
    except ValueError as error:
        raise ConfigError(f"{path} cannot be read ({error}); write the weights again") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} is not a JSON object; write the weights again")
    return values


def _read_header(file: Path) -> dict[str, StoredTensor]:
    try:
        # The framework is that of tensors, of which none is read here.
        with safe_open(file, framework="np") as opened:
            names = opened.keys()
            slices = {name: opened.get_slice(name) for name in names}
            types = {name: part.get_dtype() for name, part in slices.items()}
            found = {name: StoredTensor(file, tuple(part.get_shape())) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{file} is not a whole safetensors file ({error}); write the weights again") from error
    for name, kind in types.items():
        if kind not in _TYPES:
            raise ConfigError(f"{file}: {name} is {kind}; weights are {', '.join(_TYPES)}")
    return found


def check(config: PretrainConfig) -> None:
    """Hold the weights that a run is to start from against its configuration, as far as that needs no torch.

    Raises:
        ConfigError: they cannot be read, or are of another model.
    """
    if config.checkpoint.init is None or not starts_anew(config):
        return
    weights = open_weights(config.checkpoint.init)
    # Sections that either has no layer for mean nothing to it.
    read = _sections(weights.model) & _sections(config.model)
    differing = differences(_compared(weights.model, read), _compared(config.model, read))
    if differing:
        raise ConfigError(
            f"checkpoint.init: {weights.path} holds another model ({'; '.join(differing)}); "
            f"set these keys as {weights.path / CONFIG_NAME} has them"
        )
    vocab_size = config.model.vocab_size or _vocab_size_of_data(config)
    if vocab_size is not None:
        _require_rows(weights, config.model.padded_vocab_size(vocab_size))


def check_tensors(config: PretrainConfig) -> None:
    """Hold names and shapes of the tensors against the model's parameters. Imports torch, if there are weights at all.

    Raises:
        ConfigError: tensors are missing, too many, or of another shape.
    """
    if config.checkpoint.init is None or not starts_anew(config):
        return
    from models.decoder import shapes

    weights = open_weights(config.checkpoint.init)
    require_tensors(weights.path, weights.tensors, shapes(config.model, weights.vocab_size))


def require_tensors(
    path: Path, tensors: dict[str, StoredTensor], model: "Decoder", name_of: Callable[[str], str] = str
) -> None:
    """Hold the tensors of a directory against a model's parameters: there must be one under `name_of` each name.

    Raises:
        ConfigError: tensors are missing, too many, or of another shape.
    """
    expected = {name_of(name): tuple(tensor.shape) for name, tensor in _kept(model).items()}
    found = {name: tensor.shape for name, tensor in tensors.items()}
    if missing := expected.keys() - found.keys():
        raise ConfigError(f"{path} lacks {_listed(missing)}; write the weights again")
    if extra := found.keys() - expected.keys():
        raise ConfigError(f"{path} holds {_listed(extra)}, which the model does not have; write the weights again")
    if other := [name for name in expected if found[name] != expected[name]]:
        name = other[0]
        raise ConfigError(
            f"{path} has other shapes than the model in {_listed(other)} "
            f"({name}: {list(found[name])} -> {list(expected[name])}); write the weights again"
        )


def check_vocabulary(config: PretrainConfig, vocab_size: int) -> None:
    """Hold the rows of the weights' embedding against those of the run's.

    Raises:
        ConfigError: they differ.
    """
    if config.checkpoint.init is not None and starts_anew(config):
        _require_rows(open_weights(config.checkpoint.init), vocab_size)


def start(model: "Decoder", config: PretrainConfig) -> None:
    """Give a model, or a stage of one before it is cut, the parameters that its run begins with.

    They are read from checkpoint.init, or drawn: so, too, where a checkpoint is about to take their place.
    """
    from models.decoder import initialize, seed_routers

    if config.checkpoint.init is None or not starts_anew(config):
        initialize(model, config.train.seed)
    else:
        fill(model, open_weights(config.checkpoint.init))
        seed_routers(model, config.train.seed)


def fill(model: "Decoder", weights: Weights) -> None:
    """Read the parameters that a model or stage has into its own types."""
    read_tensors(_kept(model), weights.tensors)


def _kept(model: "Decoder") -> dict[str, "Tensor"]:
    """What weights hold of a model: its parameters, and what its routers have counted."""
    return {name: tensor.detach() for name, tensor in (*model.named_parameters(), *model.named_buffers())}


def read_tensors(
    into: dict[str, "Tensor"], stored: dict[str, StoredTensor], name_of: Callable[[str], str] = str
) -> None:
    """Fill tensors from those that are stored under `name_of` their names, one at a time."""
    for file in {stored[name_of(name)].file for name in into}:
        with safe_open(file, framework="pt") as opened:
            for name, tensor in into.items():
                if stored[name_of(name)].file == file:
                    tensor.copy_(opened.get_tensor(name_of(name)))


def write(
    output: Path,
    model: "Decoder",
    read: Callable[[dict[str, "Tensor"]], None],
    *,
    tokenizer: Path | None,
    max_file_bytes: float,
    report: Callable[[str], None],
    config: dict[str, Any] | None = None,
    name_of: Callable[[str], str] = str,
) -> None:
    """Write a directory of weights, holding no more in memory than one file of it.

    Args:
        output: The directory: it is empty or is not there, and only appears whole.
        model: Shapes and types of the parameters, on the meta device.
        read: Fills empty tensors, which it is given by name.
        tokenizer: A directory whose tokenizer is copied.
        max_file_bytes: More are put into several files; a parameter is never cut.
        report: Told of every file.
        config: What config.json holds, in place of what `open_weights` reads.
        name_of: Gives the name of a parameter in the files.
    """
    import torch
    from safetensors.torch import save_file

    unfinished = output.with_name(f".saving_{output.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    parameters = _kept(model)
    shards = _shards({name: parameter.nbytes for name, parameter in parameters.items()}, max_file_bytes)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = _WHOLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: torch.empty_like(parameters[name], device="cpu") for name in names}
        read(tensors)
        named = {name_of(name): tensor for name, tensor in tensors.items()}
        save_file(named, unfinished / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(named, file)
        size = sum(tensor.nbytes for tensor in tensors.values())
        report(f"{file} ({number} of {len(shards)}): {len(names)} tensors, {size / 1e9:.3f} GB")
    if len(shards) > 1:
        total = sum(parameter.nbytes for parameter in parameters.values())
        _write_json(unfinished / _INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    facts = {
        "model_type": "spiketrain",
        "dtype": str(parameters["embedding.weight"].dtype).removeprefix("torch."),
        "vocab_size": model.vocab_size,
        "model": asdict(model.model_config),
    }
    _write_json(unfinished / CONFIG_NAME, facts if config is None else config)
    for path in sorted(tokenizer.glob("tokenizer*")) if tokenizer is not None else ():
        shutil.copyfile(path, unfinished / path.name)
    os.replace(unfinished, output)


def _shards(sizes: dict[str, int], most: float) -> list[list[str]]:
    """Names in their order, in groups of `most` bytes or fewer; what is larger alone is a group."""
    groups: list[list[str]] = []
    room = 0.0
    for name, size in sizes.items():
        if not groups or size > room:
            groups.append([])
            room = most
        groups[-1].append(name)
        room -= size
    return groups


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=1) + "\n")


def _sections(model: ModelConfig) -> set[str]:
    return {mixer_section(mixer) for layer in model.layer_mixers() for mixer in branches(layer)}


def _compared(model: ModelConfig, read: set[str]) -> dict[str, Any]:
    """The keys that give parameters their meaning, of mixers those in the sections `read`."""
    unread = {mixer_section(mixer) for mixer in MIXERS} - read
    values = {name: value for name, value in asdict(model).items() if name not in (*_NOT_COMPARED, *unread)}
    values["moe"] = {name: value for name, value in values["moe"].items() if name not in _NOT_COMPARED_OF_EXPERTS}
    return flatten({"model": values | {"mixers": ", ".join(model.layer_mixers())}})


def _vocab_size_of_data(config: PretrainConfig) -> int | None:
    """Token ids of prepared data, where that is known before anything is read."""
    data = config.data
    paths = data.blend or {data.path: 1.0}
    return None if data.tokenizer is not None or "stdlib" in paths else find_corpora(paths).vocab_size


def _require_rows(weights: Weights, rows: int) -> None:
    if weights.vocab_size != rows:
        raise ConfigError(
            f"checkpoint.init: {weights.path} has {weights.vocab_size} rows of vocabulary and the run's data, padded "
            f"to model.vocab_multiple, {rows}; use the weights' tokenizer, or set model.vocab_size={weights.vocab_size}"
        )


def _listed(names: Any) -> str:
    """The first names, and how many more there are."""
    shown = sorted(names)[:_NAMES_SHOWN]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")
