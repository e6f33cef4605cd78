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
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.config import MIXERS, ModelConfig
from models.hub.adapter import Adapter
from models.hub.tensors import Copy, everything, stored_shapes, whole
from trainer.cli import guess
from trainer.config import PretrainConfig
from trainer.data.layout import find_corpora
from trainer.durable import flush_to_disk
from trainer.errors import ConfigError
from trainer.run_directory import differences, flatten, starts_anew
from trainer.stored.checkpoint_weights import require_whole
from trainer.stored.named_models import INIT, recorded, settled
from trainer.stored.on_disk import (
    CONFIG_NAME,
    INDEX,
    MODEL_TYPE,
    WHOLE,
    Part,
    Weights,
    kept_tensors,
    model_of,
    read_json,
)
from trainer.stored.opening import open_weights
from trainer.stored.tensor_files import Spec, widest_first, write_file

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from models.decoder import Decoder

# Only initialisation depends on the first two. vocab_size and vocab_multiple matter through the number of rows, which
# is compared separately. Weights have no adapters: they are merged.
_NOT_COMPARED = ("init_std", "scale_residual_init", "vocab_size", "vocab_multiple", "lora")
# The weights hold all experts, whether or not they were spawned and however their activations are kept in training.
_NOT_COMPARED_OF_EXPERTS = ("spawn_step", "spawn_diversify", "recompute_above", "replicate_above")
# When spikes begin, how they are trained, and what more may become coarse: no stored tensor depends on these.
_NOT_COMPARED_OF_SPIKES = (
    *("start_step", "k_start", "anneal_steps", "momentum", "gradient", "activity"),
    *("queries", "int8_keys_values", "weights"),
)


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
            f"checkpoint.init: {weights.path} holds another model ({'; '.join(differing)}); set these keys as "
            f"{weights.path / ('config.yaml' if weights.is_checkpoint else CONFIG_NAME)} has them, or give "
            f"--init {weights.path}"
        )
    vocab_size = config.model.vocab_size or _vocab_size_of_data(config)
    if vocab_size is not None:
        _require_rows(weights, config.model.padded_vocab_size(vocab_size))
    require_whole(weights, "checkpoint.init")


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
    weights.require(model, _drawn(model, weights))


def check_layers(config: PretrainConfig) -> None:
    """Check that every pattern of model.spiking.layers and model.lora.targets matches a linear layer.

    Imports torch if there are any.

    Raises:
        ConfigError: a pattern matches none, or selects a layer that cannot have what it is selected for.
    """
    if not (config.model.spiking.is_used or config.model.lora.is_on):
        return
    from models.decoder import shapes

    try:
        shapes(config.model, 1)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def check_vocabulary(config: PretrainConfig, vocab_size: int) -> None:
    """Check that the weights' embedding has as many rows as the run's.

    Raises:
        ConfigError: the numbers of rows differ.
    """
    if config.checkpoint.init is not None and starts_anew(config):
        _require_rows(open_weights(config.checkpoint.init), vocab_size)


def start(model: "Decoder", init: str | None, seed: int, resumes: bool = False) -> None:
    """Initialise this rank's shard of a model or pipeline stage.

    Values are read from the weights `init`, or else drawn from `seed`, as are those of neurons and adapters that are
    new to the weights' model. If a checkpoint will be loaded (`resumes`), neither happens.
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
    """The options that start a run from weights or a checkpoint: model section, tokenizer and `checkpoint.init`.

    Raises:
        ConfigError: the directory does not exist, or its files are invalid.
    """
    path = Path(path).expanduser()
    if not path.is_dir() and path.parent.name != "checkpoints":
        raise ConfigError(
            f"--init: {path} is not a directory; name one that spiketrain convert wrote, or a run, or, to go on with a "
            "run whose weights are gone, give --config RUN/config.yaml"
        )
    weights = open_weights(path, "--init")
    tokenizer = [] if weights.tokenizer is None else [f"--data.tokenizer={weights.tokenizer}"]
    # Weights have no adapters. Those that the run is to train keep their settings.
    model = {name: value for name, value in asdict(weights.model).items() if name != "lora"}
    return [f"--model={json.dumps(model)}", *tokenizer, f"--checkpoint.init={weights.path}"]


def expand_init(arguments: Sequence[str], run_dir: str = "") -> list[str]:
    """Expand `--init DIR`, and `--model DIR/config.json` of a weights directory, into the options they stand for.

    The expansion keeps its place on the command line, so later options override it. A run directory stands for a
    checkpoint, as trainer.stored.named_models says. `run_dir` is that of this run unless the arguments have another.

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
        if name == "--init":
            run = Path(guess(arguments, "run.dir") or run_dir)
            before = recorded(run, guess(arguments, "checkpoint.resume") or "auto")
            expanded += arguments_from(settled(os.path.expanduser(value), INIT, run, before))
        else:
            expanded.append(f"--model={_model_section(value)}")
    return expanded


def _model_section(value: str) -> str:
    """Resolve the value of --model: for config.json of a weights directory its model section, else the value itself."""
    value = os.path.expanduser(value)
    # Not pathlib: the value may be an inline section, which can exceed the length limit of file names.
    if os.path.basename(value) != CONFIG_NAME or not os.path.isfile(value):
        return value
    config = read_json(Path(value))
    return json.dumps(asdict(model_of(Path(value).parent, config)[0])) if "model_type" in config else value


def fill(model: "Decoder", weights: Weights) -> None:
    """Read this rank's shards of a model or stage, and nothing else, converting to the parameters' dtypes.

    Neurons of a model that the weights' model has without spikes keep what they have, and so do adapters.
    """
    from models.parameters import declared

    parts: dict[str, Part] = {}
    for name, row in declared(model).items():
        # Parameters without a sharded axis, or in a group of one rank, are read whole.
        axis, rank, ranks = row.place(model.groups)
        if axis is not None and ranks > 1:
            size = row.tensor.shape[axis]
            shape = tuple(length * ranks if dim == axis else length for dim, length in enumerate(row.tensor.shape))
            parts[name] = Part(shape, (*[slice(None)] * axis, slice(rank * size, (rank + 1) * size)))
    drawn = _drawn(model, weights)
    weights.read({name: tensor for name, tensor in kept_tensors(model).items() if name not in drawn}, parts)


def _drawn(model: "Decoder", weights: Weights) -> list[str]:
    """The tensors that weights lack: of adapters, a value head, and neurons where the weights' model has no spikes."""
    from models.lora import missing_adapters
    from models.spiking import missing_tensors

    heads = [f"value_head.{name}" for name, _ in model.value_head.named_parameters()] if model.value_head else []
    neurons = [] if weights.model.spiking.is_used else missing_tensors(model, weights.tensors)
    return heads + neurons + missing_adapters(model, weights.tensors)


def write(
    output: Path,
    model: "Decoder",
    read: Callable[[dict[str, "Tensor"]], None],
    *,
    tokenizer: Path | None,
    max_file_bytes: float,
    report: Callable[[str], None],
    config: dict[str, Any] | None = None,
    adapter: Adapter | None = None,
    files: Mapping[str, bytes] | None = None,
    max_positions: int | None = None,
) -> None:
    """Write a weights directory. At most the parameters of one stored tensor are in memory, and that tensor.

    Args:
        output: The directory. It must be empty or absent, and appears only once it is complete.
        model: Shapes and dtypes of the parameters, on the meta device.
        read: Fills the empty tensors passed to it, by name.
        tokenizer: Directory whose tokenizer is copied, with special tokens, chat template and so on.
        max_file_bytes: Size above which several files are written; a tensor is never split.
        report: Called with a line per file.
        config: Content of config.json in place of our own, which `open_weights` reads.
        adapter: The Hugging Face architecture whose names and shapes the tensors get; None for ours.
        files: Further files by name; they replace the tokenizer's files of the same names.
        max_positions: Length of the longest sequence in training, in tokens, for our own config.json.

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
        _write_tensors(unfinished, _Targets(model, read, adapter), max_file_bytes, report)
        _write_json(unfinished / CONFIG_NAME, _facts(model, max_positions) if config is None else config)
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


class _Targets:
    """The tensors to write, made of a model's parameters.

    Args:
        model: Shapes and dtypes of the parameters, on the meta device.
        read: Fills the empty tensors passed to it, by name.
        adapter: See `write`.
    """

    def __init__(self, model: "Decoder", read: Callable[[dict[str, "Tensor"]], None], adapter: Adapter | None) -> None:
        self._parameters, self._read = kept_tensors(model), read
        self._in_memory: dict[str, Tensor] = {}
        # By the stored tensor's name: its blocks, each with the parameter that has it.
        self._blocks: dict[str, list[tuple[str, Copy]]] = {}
        for name, parameter in self._parameters.items():
            shape = tuple(parameter.shape)
            copies = (
                [whole(shape, name)] if adapter is None else adapter.place(name, shape, model.model_config, frozenset())
            )
            for copy in copies:
                self._blocks.setdefault(copy.stored, []).append((name, copy))
        shapes = stored_shapes(copy for blocks in self._blocks.values() for _, copy in blocks)
        dtypes = {stored: self._parameters[blocks[0][0]].dtype for stored, blocks in self._blocks.items()}
        if adapter is not None:
            dtypes |= self._narrowed(dtypes, self._parameters["embedding.weight"].dtype)
        self.specs = {stored: Spec(shape, dtypes[stored]) for stored, shape in shapes.items()}

    def _narrowed(self, dtypes: Mapping[str, "torch.dtype"], dtype: "torch.dtype") -> dict[str, "torch.dtype"]:
        """Parameters that training keeps in float32, such as routers, in the model's dtype where that is exact.

        So an import in bfloat16 that is exported again is what it was.
        """
        wide = [stored for stored, own in dtypes.items() if own.itemsize > dtype.itemsize]
        return {stored: dtype for stored in wide if _is_exact(self._gather([stored]), dtype)}

    def _gather(self, stored: Sequence[str]) -> dict[str, "Tensor"]:
        """The parameters of these stored tensors. Those that are in memory already are not read again."""
        import torch

        names = {name for target in stored for name, _ in self._blocks[target]}
        self._in_memory = {name: tensor for name, tensor in self._in_memory.items() if name in names}
        for name in sorted(names - self._in_memory.keys()):
            tensor = torch.empty_like(self._parameters[name], device="cpu")
            self._read({name: tensor})
            self._in_memory[name] = tensor
        return self._in_memory

    def produce(self, stored: str) -> "Tensor":
        """Make one tensor."""
        import torch

        own, blocks, spec = self._gather([stored]), self._blocks[stored], self.specs[stored]
        if len(blocks) == 1 and blocks[0][1].index == everything(own[blocks[0][0]].shape):
            # All of one parameter, at most with another shape: no second copy of a large matrix.
            return own[blocks[0][0]].view(spec.shape).to(spec.dtype)
        made = torch.empty(spec.shape, dtype=spec.dtype)
        for name, copy in blocks:
            made[copy.stored_index] = own[name][copy.index].to(spec.dtype)
        return made


def _is_exact(tensors: Mapping[str, "Tensor"], dtype: "torch.dtype") -> bool:
    return all(tensor.to(dtype).to(tensor.dtype).equal(tensor) for tensor in tensors.values())


def _write_tensors(folder: Path, targets: _Targets, max_file_bytes: float, report: Callable[[str], None]) -> None:
    """Write the tensors, and an index if there are several files."""
    specs = targets.specs
    shards = _shards({name: spec.nbytes for name, spec in specs.items()}, max_file_bytes)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = WHOLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_file(folder / file, {name: specs[name] for name in widest_first(names, specs)}, targets.produce)
        weight_map |= dict.fromkeys(names, file)
        size = sum(specs[name].nbytes for name in names)
        report(f"{file} ({number} of {len(shards)}): {len(names)} tensors, {size / 1e9:.3f} GB")
    if len(shards) > 1:
        total = sum(spec.nbytes for spec in specs.values())
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _facts(model: "Decoder", max_positions: int | None) -> dict[str, Any]:
    """Our own config.json, which `open_weights` reads."""
    embedding = kept_tensors(model)["embedding.weight"]
    return {
        "model_type": MODEL_TYPE,
        "dtype": str(embedding.dtype).removeprefix("torch."),
        "vocab_size": model.vocab_size,
        "max_position_embeddings": max_positions,
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
