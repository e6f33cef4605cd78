"""Conversion between checkpoints, weights and Hugging Face layouts. Imports neither megatron nor deepspeed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

from models.config import ModelConfig
from models.decoder import shapes
from models.hub.dense import from_hub, hub_name, left_out, to_hub
from models.parameters import cast_parameters
from trainer.errors import ConfigError
from trainer.stored import weights
from trainer.stored.checkpoint import read_progress
from trainer.stored.hub_files import hub_files, imported_files
from trainer.stored.inference import StoredModel, open_checkpoint
from trainer.stored.weights import StoredTensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def export(
    checkpoint: str | Path,
    output: Path,
    precision: Literal["fp32", "bf16"] | None,
    max_file_bytes: float,
    report: Callable[[str], None],
    hugging_face: bool = False,
) -> Path:
    """Write the parameters of a checkpoint as a weights directory; returns the path of the checkpoint.

    Args:
        checkpoint: A run directory, or one of its checkpoints.
        output: Output directory: empty or absent.
        precision: Dtype of the weights; None keeps the run's. fp32 from a bf16 run takes the optimizer's float32 main
            parameters. Decays are always float32 (models.parameters.Placement.float32).
        max_file_bytes: Size above which several files are written.
        report: Called with a line per file.
        hugging_face: Write names and config.json in transformers' layout.

    Raises:
        ConfigError: there is no usable checkpoint, or transformers has no such model.
    """
    stored = open_checkpoint(checkpoint)
    moe, steps = stored.model.moe, read_progress(stored.path).step
    # Before spawning, a checkpoint holds the experts' common ancestor, not the model that its configuration describes.
    if moe.num_experts and not moe.is_spawned(steps - 1):
        raise ConfigError(
            f"checkpoint: {stored.path} has experts that are to be spawned at step {moe.spawn_step}; train on past it"
        )
    dtype = stored.dtype if precision is None else DTYPES[precision]
    model = shapes(stored.model, stored.vocab_size)
    cast_parameters(model, dtype)
    layout = _hub_layout(stored, dtype, report) if hugging_face else {}
    # float32 weights of a bf16 run come from the optimizer's main parameters.
    main = (stored.dtype, dtype) == (torch.bfloat16, torch.float32)
    weights.write(
        output,
        model,
        lambda tensors: stored.read(tensors, main),
        tokenizer=stored.tokenizer,
        max_file_bytes=max_file_bytes,
        report=report,
        **layout,
    )
    return stored.path


def _hub_layout(stored: StoredModel, dtype: torch.dtype, report: Callable[[str], None]) -> dict[str, Any]:
    """Arguments of `weights.write` for transformers' layout. Reports where transformers will behave differently."""
    name, positions = str(dtype).removeprefix("torch."), stored.settings["train"]["seq_len"]
    try:
        config = to_hub(stored.model, stored.vocab_size, name, positions)
    except ValueError as error:
        raise ConfigError(f"{stored.path}: {error}; leave --layout hf out") from error
    beside = hub_files(stored.tokenizer, config["model_type"], stored.vocab_size)
    for note in beside.notes:
        report(note)
    if stored.settings["data"]["document_mask"]:
        report("training masked attention between documents; give transformers one document per row, or a block mask")
    return {"config": config | beside.ids, "name_of": hub_name, "files": beside.files}


def import_weights(
    source: Path,
    output: Path,
    precision: Literal["fp32", "bf16"],
    max_file_bytes: float,
    report: Callable[[str], None],
) -> None:
    """Convert the directory of a Hugging Face model (Llama, Qwen2 or Qwen3) into weights.

    Args:
        source: Directory with config.json and safetensors; its tokenizer is copied.
        output: Output directory: empty or absent.
        precision: Dtype of the weights.
        max_file_bytes: Size above which several files are written.
        report: Called with a line per file.

    Raises:
        ConfigError: the model is of another kind, or tensors are missing, unexpected, of the wrong shape, or stored
            twice with different values.
    """
    config, model_config = _read_config(source)
    # An adapter's deltas are not in the base weights: ignoring it would import a different model.
    if (source / "adapter_config.json").is_file():
        raise ConfigError(f"{source} has an adapter (adapter_config.json), which is not read; merge it first")
    every = weights.read_headers(source)
    stored = _without_copies(every, config, model_config, report)
    model = shapes(model_config, config["vocab_size"])
    weights.require_tensors(source, stored, model, hub_name)
    name = str(DTYPES[precision]).removeprefix("torch.")
    for line in (*weights.conversions(stored.values(), name), *_what_is_left(source, config, every)):
        report(line)
    cast_parameters(model, DTYPES[precision])
    weights.write(
        output,
        model,
        lambda tensors: weights.read_tensors(tensors, stored, hub_name),
        tokenizer=source,
        max_file_bytes=max_file_bytes,
        report=report,
        files=imported_files(source, config),
    )


def _read_config(source: Path) -> tuple[dict[str, Any], ModelConfig]:
    path = source / weights.CONFIG_NAME
    config = weights.read_json(path)
    try:
        return config, from_hub(config)
    except KeyError as error:
        raise ConfigError(f"{path} has no {error.args[0]}; give a whole model") from error
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error


def _what_is_left(source: Path, config: dict[str, Any], stored: dict[str, StoredTensor]) -> list[str]:
    """Lines that describe everything in the source directory that the import ignores."""
    lines = []
    if keys := left_out(config):
        lines.append(f"{weights.CONFIG_NAME}: left out, for models here have nothing of the kind: {', '.join(keys)}")
    read = {tensor.file for tensor in stored.values()}
    if unread := [path.name for path in sorted(source.glob("*.safetensors")) if path not in read]:
        lines.append(f"not read: {', '.join(unread)}")
    if not any((source / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        lines.append(f"{source} has no tokenizer.json or tokenizer.model: name a tokenizer where runs start from this")
    return lines


def _without_copies(
    every: dict[str, StoredTensor], config: dict[str, Any], model: ModelConfig, report: Callable[[str], None]
) -> dict[str, StoredTensor]:
    """Drop redundant tensors that some writers store: a tied head, and rotary frequencies derived from rope_theta.

    Raises:
        ConfigError: a redundant tensor disagrees with its source, so config.json describes another model than the
            tensors.
    """
    head, embedding = every.get("lm_head.weight"), every.get("model.embed_tokens.weight")
    spare = {name for name in every if name.endswith(".inv_freq")}
    for name in sorted(spare):
        _require_frequencies(name, every[name], model)
    # Tied weights: the head must equal the embedding, else one of config.json and the tensors is wrong.
    if model.tie_embeddings and head is not None and embedding is not None:
        if not _same(("lm_head.weight", head), ("model.embed_tokens.weight", embedding)):
            raise ConfigError(
                f"{head.file}: lm_head.weight differs from model.embed_tokens.weight, and config.json says "
                "tie_word_embeddings=true; set it to false, or remove the wrong one"
            )
        spare.add("lm_head.weight")
    if spare:
        report(f"left out, for they follow from others: {weights.listed(spare)}")
    return {name: tensor for name, tensor in every.items() if name not in spare}


def _require_frequencies(name: str, stored: StoredTensor, model: ModelConfig) -> None:
    """Check stored rotary frequencies against those of rope_theta, up to the rounding of their dtype."""
    assert model.attention.rope_theta is not None, "from_hub gives one"
    found = weights.read_tensor(name, stored)
    size = model.attention_head_dim
    exact = model.attention.rope_theta ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    rounding = torch.finfo(found.dtype)
    if found.shape == exact.shape and torch.allclose(
        found.double(), exact, rtol=max(4 * rounding.eps, 1e-5), atol=rounding.tiny
    ):
        return
    raise ConfigError(
        f"{stored.file}: {name} holds other rotary frequencies than rope_theta={model.attention.rope_theta:g} gives; "
        "correct config.json: scaled rotations are not supported"
    )


def _same(*named: tuple[str, StoredTensor]) -> bool:
    """Whether two stored matrices are equal, read a few rows at a time."""
    first, second = (tensor.shape for _, tensor in named)
    if first != second:
        return False
    parts = (weights.read_parts(name, tensor) for name, tensor in named)
    return all(torch.equal(one.double(), other.double()) for one, other in zip(*parts, strict=True))
