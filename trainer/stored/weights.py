"""Weights: a directory of safetensors files that runs of either engine start from and are exported to.

    weights/
        model.safetensors    parameters by their names in models.decoder.Decoder; above a size limit several files,
                             model-00001-of-00002.safetensors and so on, with model.safetensors.index.json
        config.json          the model section of the configuration, the number of embedding rows, the dtype
        tokenizer.model      or tokenizer.json, if the run had one, with its special tokens, chat template and
                             generation_config.json

File layout, index and file names follow Hugging Face. Pickles are never read. Names, shapes and dtypes are validated
from the file headers, without importing torch.
"""

import json
import os
import secrets
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from models.config import MIXERS, ModelConfig
from trainer.cli import from_mapping
from trainer.config import PretrainConfig
from trainer.data.layout import find_corpora
from trainer.durable import flush_to_disk
from trainer.errors import ConfigError
from trainer.json_files import read_object
from trainer.run_directory import differences, flatten, starts_anew

if TYPE_CHECKING:
    from torch import Tensor

    from models.decoder import Decoder

CONFIG_NAME = "config.json"
_MODEL_TYPE = "spiketrain"
_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_TYPES = ("F64", "F32", "F16", "BF16")
# Lossless conversions: pairs of (dtype in the file, dtype of the parameter).
_EXACT = {("F32", "float32"), ("F16", "float32"), ("BF16", "float32"), ("BF16", "bfloat16")}
# Only initialisation depends on these. vocab_size and vocab_multiple matter through the number of rows, which is
# compared separately.
_NOT_COMPARED = ("init_std", "scale_residual_init", "vocab_size", "vocab_multiple")
# The weights hold all experts, whether or not they were spawned and however their activations are kept in training.
_NOT_COMPARED_OF_EXPERTS = ("spawn_step", "spawn_diversify", "recompute_above", "replicate_above")
# When spikes begin, how they are trained, and what more may become coarse: no stored tensor depends on these.
_NOT_COMPARED_OF_SPIKES = (
    *("start_step", "k_start", "anneal_steps", "momentum", "gradient", "activity"),
    *("queries", "int8_keys_values", "weights"),
)
_NAMES_SHOWN = 3


@dataclass(frozen=True)
class StoredTensor:
    """A tensor's file, shape and dtype, the latter in safetensors' notation such as BF16."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Weights:
    """The contents of a weights directory as its headers describe them; no tensor data is read.

    Attributes:
        path: The directory.
        model: Configuration of the model.
        vocab_size: Rows of the embedding.
        tensors: Stored tensors by parameter name.
    """

    path: Path
    model: ModelConfig
    vocab_size: int
    tensors: dict[str, StoredTensor]


def are_at(path: str | Path) -> bool:
    """Whether a path is a directory of weights, by its files' names; a run directory and a checkpoint are none."""
    return (Path(path) / CONFIG_NAME).is_file() and any((Path(path) / name).is_file() for name in (_WHOLE, _INDEX))


def open_weights(path: str | Path, key: str = "checkpoint.init") -> Weights:
    """Read config.json and the headers of a directory of weights. `key` names the directory in errors.

    Raises:
        ConfigError: the directory does not exist, or its files are invalid.
    """
    path = Path(path)
    if not path.is_dir():
        raise ConfigError(f"{key}: {path} is not a directory; name one that spiketrain convert wrote")
    tensors = read_headers(path)
    model, vocab_size = _read_config(path)
    return Weights(path, model, vocab_size, tensors)


def _read_config(path: Path) -> tuple[ModelConfig, int]:
    """Read the model configuration and the number of embedding rows from config.json.

    Raises:
        ConfigError: config.json has neither.
    """
    config = read_json(path / CONFIG_NAME)
    if isinstance(config.get("model"), dict) and isinstance(config.get("vocab_size"), int):
        return from_mapping(ModelConfig, config["model"]), config["vocab_size"]
    if config.get("model_type", _MODEL_TYPE) != _MODEL_TYPE:
        raise ConfigError(
            f"{path / CONFIG_NAME} is another program's (model_type={config['model_type']!r}); make weights of that "
            f"model first: spiketrain convert import --source {path} --output weights/NAME"
        )
    raise ConfigError(
        f"{path / CONFIG_NAME} has no model section and vocab_size; spiketrain convert writes one that has"
    )


def read_headers(path: Path) -> dict[str, StoredTensor]:
    """Read the headers of all safetensors files in a directory: tensors by name.

    Raises:
        ConfigError: there are no such files, or they are incomplete.
    """
    tensors: dict[str, StoredTensor] = {}
    for file, names in _files(path).items():
        found = _read_header(file)
        if names is not None and names != found.keys():
            raise ConfigError(
                f"{path / _INDEX} and {file.name} differ in {listed(names ^ found.keys())}; get both from one place"
            )
        tensors |= found
    # Both a single file and an index: programs disagree on which of them they read.
    if (path / _WHOLE).is_file() and all(tensor.file.name != _WHOLE for tensor in tensors.values()):
        raise ConfigError(
            f"{path} holds both {_WHOLE} and {_INDEX}, which names other files; keep the one that is meant"
        )
    return tensors


def _files(path: Path) -> dict[Path, set[str] | None]:
    """Files mapped to the tensor names that the index assigns to them; None without an index."""
    if (path / _INDEX).is_file():
        files: dict[Path, set[str] | None] = {}
        weight_map = read_json(path / _INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ConfigError(f"{path / _INDEX} has no weight_map; write the weights again")
        for name, file in weight_map.items():
            # Plain file names only: an index must not reach outside its directory.
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


def _read_header(file: Path) -> dict[str, StoredTensor]:
    try:
        # No tensor is read here, so the framework does not matter; numpy avoids importing torch.
        with safe_open(file, framework="np") as opened:
            names = opened.keys()
            slices = {name: opened.get_slice(name) for name in names}
            types = {name: part.get_dtype() for name, part in slices.items()}
            found = {name: StoredTensor(file, tuple(part.get_shape()), types[name]) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{file} is not a whole safetensors file ({error}); write the weights again") from error
    for name, kind in types.items():
        if kind not in _TYPES:
            raise ConfigError(f"{file}: {name} is {kind}; weights are {', '.join(_TYPES)}")
    return found


def check(config: PretrainConfig) -> None:
    """Check the initial weights of a run against its configuration, as far as possible without torch.

    Raises:
        ConfigError: the weights cannot be read, or belong to a different model.
    """
    if config.checkpoint.init is None or not starts_anew(config):
        return
    weights = open_weights(config.checkpoint.init)
    # A mixer's section matters only if both models have layers that use it.
    read = _sections(weights.model) & _sections(config.model)
    model = config.model
    if not weights.model.spiking.is_used:
        # A model of floats may learn to spike.
        model = replace(model, spiking=weights.model.spiking)
    differing = differences(_compared(weights.model, read), _compared(model, read))
    if differing:
        raise ConfigError(
            f"checkpoint.init: {weights.path} holds another model ({'; '.join(differing)}); "
            f"set these keys as {weights.path / CONFIG_NAME} has them, or give --init {weights.path}"
        )
    vocab_size = config.model.vocab_size or _vocab_size_of_data(config)
    if vocab_size is not None:
        _require_rows(weights, config.model.padded_vocab_size(vocab_size))


def check_tensors(config: PretrainConfig) -> None:
    """Check the names and shapes of the initial weights against the model's parameters. Imports torch if there are any.

    Raises:
        ConfigError: tensors are missing, unexpected or of the wrong shape.
    """
    if config.checkpoint.init is None or not starts_anew(config):
        return
    from models.decoder import shapes

    weights = open_weights(config.checkpoint.init)
    model = shapes(config.model, weights.vocab_size)
    require_tensors(weights.path, weights.tensors, model, drawn=_drawn(model, weights))


def check_spiking(config: PretrainConfig) -> None:
    """Check that every pattern of model.spiking.layers matches a linear layer. Imports torch if there are any.

    Raises:
        ConfigError: a pattern matches none.
    """
    if not config.model.spiking.is_used:
        return
    from models.decoder import shapes

    try:
        shapes(config.model, 1)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def require_tensors(
    path: Path,
    tensors: dict[str, StoredTensor],
    model: "Decoder",
    name_of: Callable[[str], str] = str,
    drawn: Iterable[str] = (),
) -> None:
    """Check the stored tensors against a model's parameters: one tensor is needed under `name_of` each parameter name.

    Those that are `drawn` need none.

    Raises:
        ConfigError: tensors are missing, unexpected or of the wrong shape.
    """
    expected = {name_of(name): tuple(tensor.shape) for name, tensor in _kept(model).items() if name not in drawn}
    found = {name: tensor.shape for name, tensor in tensors.items()}
    if missing := expected.keys() - found.keys():
        raise ConfigError(f"{path} lacks {listed(missing)}; write the weights again")
    if extra := found.keys() - expected.keys():
        raise ConfigError(f"{path} holds {listed(extra)}, which the model does not have; write the weights again")
    if other := [name for name in expected if found[name] != expected[name]]:
        name = other[0]
        raise ConfigError(
            f"{path} has other shapes than the model in {listed(other)} "
            f"({name}: {list(found[name])} -> {list(expected[name])}); write the weights again"
        )


def check_vocabulary(config: PretrainConfig, vocab_size: int) -> None:
    """Check that the weights' embedding has as many rows as the run's.

    Raises:
        ConfigError: the numbers of rows differ.
    """
    if config.checkpoint.init is not None and starts_anew(config):
        _require_rows(open_weights(config.checkpoint.init), vocab_size)


def start(model: "Decoder", init: str | None, seed: int, resumes: bool = False) -> None:
    """Initialise this rank's shard of a model or pipeline stage.

    Values are read from the weights `init`, or else drawn from `seed`, as are those of neurons that are new to the
    weights' model. If a checkpoint will be loaded (`resumes`), neither happens.
    """
    from models.decoder import initialize, seed_routers
    from models.parameters import draw

    if init is None and not resumes:
        initialize(model, seed)
        return
    if init is not None and not resumes:
        weights = open_weights(init)
        draw(model, model.model_config, seed, model.groups, names=_drawn(model, weights))
        fill(model, weights)
    # The routers' noise depends on the seed, which neither weights nor checkpoints hold.
    seed_routers(model, seed)


def arguments_from(path: str | Path) -> list[str]:
    """The options that start a run from weights: model section, tokenizer and `checkpoint.init`.

    Raises:
        ConfigError: the directory does not exist, or its files are invalid.
    """
    path = Path(path).expanduser()
    if not path.is_dir():
        raise ConfigError(
            f"--init: {path} is not a directory; name one that spiketrain convert wrote, or, to go on with a run whose "
            "weights are gone, give --config RUN/config.yaml"
        )
    weights = open_weights(path)
    has_tokenizer = any((path / name).is_file() for name in ("tokenizer.model", "tokenizer.json"))
    tokenizer = [f"--data.tokenizer={path}"] if has_tokenizer else []
    return [f"--model={json.dumps(asdict(weights.model))}", *tokenizer, f"--checkpoint.init={path}"]


def expand_init(arguments: Sequence[str]) -> list[str]:
    """Expand `--init DIR`, and `--model DIR/config.json` of a weights directory, into the options they stand for.

    The expansion keeps its place on the command line, so later options override it.

    Raises:
        ConfigError: see `arguments_from`.
    """
    expanded, rest = [], list(arguments)
    while rest:
        argument = rest.pop(0)
        name, given, value = argument.partition("=")
        if name not in ("--init", "--model"):
            expanded.append(argument)
            continue
        if not given and not rest:
            raise ConfigError(f"{name} needs a value: --help says which")
        value = value if given else rest.pop(0)
        expanded += arguments_from(value) if name == "--init" else [f"--model={_model_section(value)}"]
    return expanded


def _model_section(value: str) -> str:
    """Resolve the value of --model: for config.json of a weights directory its model section, else the value itself."""
    value = os.path.expanduser(value)
    # Not pathlib: the value may be an inline section, which can exceed the length limit of file names.
    if os.path.basename(value) != CONFIG_NAME or not os.path.isfile(value):
        return value
    return json.dumps(asdict(_read_config(Path(value).parent)[0])) if "model_type" in read_json(Path(value)) else value


def fill(model: "Decoder", weights: Weights) -> None:
    """Read this rank's shards of a model or stage, and nothing else, converting to the parameters' dtypes.

    Neurons of a model that the weights' model has without spikes keep what they have.
    """
    from models.parameters import declared

    parts: dict[str, tuple[slice, ...]] = {}
    for name, row in declared(model).items():
        # Parameters without a sharded axis, or in a group of one rank, are read whole.
        axis, rank, ranks = row.place(model.groups)
        if axis is not None and ranks > 1:
            size = row.tensor.shape[axis]
            parts[name] = (*[slice(None)] * axis, slice(rank * size, (rank + 1) * size))
    drawn = _drawn(model, weights)
    into = {name: tensor for name, tensor in _kept(model).items() if name not in drawn}
    read_tensors(into, weights.tensors, parts=parts)


def _drawn(model: "Decoder", weights: Weights) -> list[str]:
    """The tensors of neurons where the weights are those of a model without spikes; else none."""
    from models.spiking import missing_tensors

    return [] if weights.model.spiking.is_used else missing_tensors(model, weights.tensors)


def _kept(model: "Decoder") -> dict[str, "Tensor"]:
    """The tensors that weights hold: parameters, and buffers such as the routers' counters."""
    return {name: tensor.detach() for name, tensor in (*model.named_parameters(), *model.named_buffers())}


def read_tensors(
    into: dict[str, "Tensor"],
    stored: dict[str, StoredTensor],
    name_of: Callable[[str], str] = str,
    parts: Mapping[str, tuple[slice, ...]] | None = None,
) -> None:
    """Fill tensors one at a time from those stored under `name_of` their names, or from the slices in `parts`."""
    parts = parts or {}
    # Opens each file once. Tensors are read one by one, so memory holds at most one beyond `into`.
    for file in {stored[name_of(name)].file for name in into}:
        with safe_open(file, framework="pt") as opened:
            for name, tensor in into.items():
                if stored[name_of(name)].file == file:
                    stored_name = name_of(name)
                    part = parts.get(name)
                    read = opened.get_tensor(stored_name) if part is None else opened.get_slice(stored_name)[part]
                    tensor.copy_(read)
                    # Only float64 exceeds the range of float32 and bfloat16.
                    if stored[name_of(name)].dtype == "F64" and not read.isfinite().equal(tensor.isfinite()):
                        raise ConfigError(f"{file}: {name_of(name)} has values beyond the range of {tensor.dtype}")


def read_tensor(name: str, stored: StoredTensor) -> "Tensor":
    """Read one tensor in its stored dtype."""
    with safe_open(stored.file, framework="pt") as opened:
        tensor: Tensor = opened.get_tensor(name)
    return tensor


def read_parts(name: str, stored: StoredTensor, rows: int = 4096) -> Iterator["Tensor"]:
    """Read one tensor in its stored dtype, `rows` rows at a time."""
    with safe_open(stored.file, framework="pt") as opened:
        part = opened.get_slice(name)
        for start in range(0, stored.shape[0], rows):
            yield part[start : start + rows]


def conversions(stored: Iterable[StoredTensor], dtype: str) -> list[str]:
    """Describe the dtype conversions from files to parameters (float32 or bfloat16), and whether they are exact."""
    counts = Counter(tensor.dtype for tensor in stored)
    lossy = {kind: "exactly" if (kind, dtype) in _EXACT else "rounded" for kind in counts}
    own = {"float32": "F32", "bfloat16": "BF16"}[dtype]
    return [f"{count} tensors from {kind} to {dtype}, {lossy[kind]}" for kind, count in counts.items() if kind != own]


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
    files: Mapping[str, bytes] | None = None,
) -> None:
    """Write a weights directory, holding at most one of its files in memory.

    Args:
        output: The directory. It must be empty or absent, and appears only once it is complete.
        model: Shapes and dtypes of the parameters, on the meta device.
        read: Fills the empty tensors passed to it, by name.
        tokenizer: Directory whose tokenizer is copied, with special tokens, chat template and so on.
        max_file_bytes: Size above which several files are written; a parameter is never split.
        report: Called with a line per file.
        config: Content of config.json in place of our own, which `open_weights` reads.
        name_of: Maps a parameter's name to its name in the files.
        files: Further files by name; they replace the tokenizer's files of the same names.

    Raises:
        ConfigError: the disk is full, the directory is not writable, or something was written there meanwhile.
    """
    # `.` and `x/..` have no final component to put a sibling beside.
    output = output.resolve()
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        # A random suffix, because another process may be writing to the same output.
        unfinished = output.with_name(f".saving_{output.name}.{secrets.token_hex(4)}")
        unfinished.mkdir()
    except OSError as error:
        raise ConfigError(f"output: {output} cannot be written ({error.strerror}); name another") from error
    for other in sorted(output.parent.glob(f".saving_{output.name}.*")):
        if other != unfinished:
            report(f"{other} is left of a write that did not end, or of one under way; if none is, remove it")
    try:
        _write_tensors(unfinished, model, read, max_file_bytes, report, name_of)
        _write_json(unfinished / CONFIG_NAME, _facts(model) if config is None else config)
        _copy_tokenizer(tokenizer, unfinished, files or {})
        for path in (*unfinished.rglob("*"), unfinished):
            flush_to_disk(path)
        # rename(2) fails if the target is a non-empty directory.
        unfinished.rename(output)
    except OSError as error:
        reason = "something else was written there meanwhile" if _is_taken(output) else error.strerror or str(error)
        raise ConfigError(f"output: {output} cannot be written ({reason}); name another") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    # The files are durable. Flushing the parent makes the name durable too, but is impossible if it is unreadable.
    with suppress(OSError):
        flush_to_disk(output.parent)


def _is_taken(output: Path) -> bool:
    return output.is_file() or (output.is_dir() and any(output.iterdir()))


def _write_tensors(
    folder: Path,
    model: "Decoder",
    read: Callable[[dict[str, "Tensor"]], None],
    max_file_bytes: float,
    report: Callable[[str], None],
    name_of: Callable[[str], str],
) -> None:
    """Write the parameters, and an index if there are several files."""
    import torch
    from safetensors.torch import save_file

    parameters = _kept(model)
    shards = _shards({name: parameter.nbytes for name, parameter in parameters.items()}, max_file_bytes)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = _WHOLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: torch.empty_like(parameters[name], device="cpu") for name in names}
        read(tensors)
        named = {name_of(name): tensor for name, tensor in tensors.items()}
        try:
            save_file(named, folder / file, metadata={"format": "pt"})
        # safetensors raises its own error for a full disk.
        except SafetensorError as error:
            raise OSError(str(error)) from error
        weight_map |= dict.fromkeys(named, file)
        size = sum(tensor.nbytes for tensor in tensors.values())
        report(f"{file} ({number} of {len(shards)}): {len(names)} tensors, {size / 1e9:.3f} GB")
    if len(shards) > 1:
        total = sum(parameter.nbytes for parameter in parameters.values())
        _write_json(folder / _INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _facts(model: "Decoder") -> dict[str, Any]:
    """Our own config.json, which `open_weights` reads."""
    embedding = _kept(model)["embedding.weight"]
    return {
        "model_type": _MODEL_TYPE,
        "dtype": str(embedding.dtype).removeprefix("torch."),
        "vocab_size": model.vocab_size,
        "model": asdict(model.model_config),
    }


def _copy_tokenizer(source: Path | None, folder: Path, instead: Mapping[str, bytes]) -> None:
    """Copy a tokenizer's files, then write `instead`, which replaces files of the same names or adds new ones."""
    from trainer.data.tokenizer import tokenizer_files

    files = {path.relative_to(source): path for path in tokenizer_files(source)} if source is not None else {}
    for own, path in files.items():
        target = folder / own
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)
    for name, content in instead.items():
        (folder / name).write_bytes(content)


def _shards(sizes: dict[str, int], most: float) -> list[list[str]]:
    """Group names, in order, into files of at most `most` bytes; a larger tensor gets a file to itself."""
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


def _sections(model: ModelConfig) -> set[str | None]:
    return {MIXERS[mixer].section for mixer in model.used_mixers()}


def _compared(model: ModelConfig, read: set[str | None]) -> dict[str, Any]:
    """The keys that define the parameters' meaning; of the mixers' sections only those in `read`."""
    unread = {mixer.section for mixer in MIXERS.values()} - read
    values = {name: value for name, value in asdict(model).items() if name not in (*_NOT_COMPARED, *unread)}
    for section, names in (("moe", _NOT_COMPARED_OF_EXPERTS), ("spiking", _NOT_COMPARED_OF_SPIKES)):
        values[section] = {name: value for name, value in values[section].items() if name not in names}
    return flatten({"model": values | {"mixers": ", ".join(model.layer_mixers())}})


def _vocab_size_of_data(config: PretrainConfig) -> int | None:
    """Vocabulary size of prepared data; None if only the tokenizer or the built-in corpus would tell."""
    data = config.data
    paths = data.shares()
    return None if data.tokenizer is not None or "stdlib" in paths else find_corpora(paths).vocab_size


def _require_rows(weights: Weights, rows: int) -> None:
    if weights.vocab_size != rows:
        raise ConfigError(
            f"checkpoint.init: {weights.path} has {weights.vocab_size} rows of vocabulary and the run's data, padded "
            f"to model.vocab_multiple, {rows}; use the weights' tokenizer, or set model.vocab_size={weights.vocab_size}"
        )


def listed(names: Any) -> str:
    """The first few names, and how many more there are."""
    shown = sorted(names)[:_NAMES_SHOWN]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")
