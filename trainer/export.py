"""Between checkpoints, plain weights and Hugging Face layouts. Imports neither megatron nor deepspeed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

from models.decoder import shapes
from models.hub.dense import from_hub, hub_name, to_hub
from models.parallel import cast_parameters
from trainer import weights
from trainer.checkpoint import read_progress
from trainer.cli import ConfigError
from trainer.inference import open_checkpoint

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def export(
    checkpoint: str | Path,
    output: Path,
    precision: Literal["fp32", "bf16"] | None,
    max_file_bytes: float,
    report: Callable[[str], None],
    hugging_face: bool = False,
) -> Path:
    """Write the parameters of a checkpoint as a directory of weights; returns the checkpoint.

    Args:
        checkpoint: A run directory, or one of its checkpoints.
        output: Where they go: an empty directory, or a name that is free.
        precision: Of the weights; that of the run where it is None. From a bf16 run fp32 takes the float32 copies that
            the optimizer updates. Decays are float32 always (models.parallel.keep_float32).
        max_file_bytes: More are put into several files.
        report: Told of every file.
        hugging_face: Write names and config.json as transformers reads them.

    Raises:
        ConfigError: no usable checkpoint there, or transformers has no such model.
    """
    stored = open_checkpoint(checkpoint)
    moe, steps = stored.model.moe, read_progress(stored.path).step
    if moe.num_experts and not moe.is_spawned(steps - 1):
        raise ConfigError(
            f"checkpoint: {stored.path} has experts that are to be spawned at step {moe.spawn_step}; train on past it"
        )
    dtype = stored.dtype if precision is None else DTYPES[precision]
    model = shapes(stored.model, stored.vocab_size)
    cast_parameters(model, dtype)
    layout: dict[str, Any] = {}
    if hugging_face:
        name, positions = str(dtype).removeprefix("torch."), stored.settings["train"]["seq_len"]
        try:
            layout["config"] = to_hub(stored.model, stored.vocab_size, name, positions)
        except ValueError as error:
            raise ConfigError(f"{stored.path}: {error}; leave --layout hf out") from error
        layout["name_of"] = hub_name
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


def import_weights(
    source: Path,
    output: Path,
    precision: Literal["fp32", "bf16"],
    max_file_bytes: float,
    report: Callable[[str], None],
) -> None:
    """Write plain weights from a directory of a Hugging Face model, Llama, Qwen2 or Qwen3.

    Args:
        source: The directory, with config.json and safetensors; its tokenizer is copied.
        output: Where they go: an empty directory, or a name that is free.
        precision: Of the weights.
        max_file_bytes: More are put into several files.
        report: Told of every file.

    Raises:
        ConfigError: it is not such a model, or tensors are missing, too many or of another shape.
    """
    config = weights.read_json(source / weights.CONFIG_NAME)
    try:
        model_config = from_hub(config)
    except KeyError as error:
        raise ConfigError(f"{source / weights.CONFIG_NAME} has no {error.args[0]}; give a whole model") from error
    except ValueError as error:
        raise ConfigError(f"{source / weights.CONFIG_NAME}: {error}") from error
    # Some writers store a tied embedding twice, and the frequencies that follow from rope_theta.
    spare = ("lm_head.weight", ".inv_freq") if model_config.tie_embeddings else (".inv_freq",)
    stored = {name: tensor for name, tensor in weights.read_headers(source).items() if not name.endswith(spare)}
    model = shapes(model_config, config["vocab_size"])
    weights.require_tensors(source, stored, model, hub_name)
    cast_parameters(model, DTYPES[precision])
    weights.write(
        output,
        model,
        lambda tensors: weights.read_tensors(tensors, stored, hub_name),
        tokenizer=source,
        max_file_bytes=max_file_bytes,
        report=report,
    )
