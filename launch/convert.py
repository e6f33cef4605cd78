"""Export, import and upcycle weights.

spiketrain convert export --checkpoint runs/laptop --output weights/laptop
spiketrain convert export --checkpoint runs/dense --output hub/dense --layout hf
spiketrain convert import --source hub/Qwen2.5-0.5B --output weights/qwen
spiketrain convert upcycle --source weights/qwen --output weights/qwen-moe --moe.num_experts 8
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from models.config import MoEConfig
from trainer.cli import entry, fail
from trainer.errors import ConfigError


def require_free(output: str) -> None:
    """Refuse to overwrite existing output.

    Raises:
        ConfigError: `output` is a file or a non-empty directory.
    """
    path = Path(output)
    # An empty directory is acceptable: `trainer.stored.weights.write` renames over it.
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ConfigError(f"output: {path} exists and is not an empty directory; name another")


def require_size(max_file_gb: float) -> None:
    """Refuse an invalid file size.

    Raises:
        ConfigError: it is not positive.
    """
    if max_file_gb <= 0:
        raise ConfigError(f"max_file_gb is {max_file_gb}: it must be positive")


def show(line: str) -> None:
    """Print a progress line to stderr."""
    print(line, file=sys.stderr, flush=True)


@dataclass
class ExportConfig:
    """Settings of an export.

    Attributes:
        checkpoint: A run directory (its newest complete checkpoint), or one checkpoint, of either engine.
        output: Directory to write; must be absent or empty.
        dtype: fp32 or bf16; null keeps the run's precision. fp32 from a bf16 run takes the optimizer's main parameters.
        layout: spiketrain, which runs start from; or hf, which transformers reads as Llama, Qwen2 or Qwen3, for models
            that have only full_attention.
        max_file_gb: Size above which weights are split into several files (10^9 bytes).
    """

    checkpoint: str = "runs/laptop"
    output: str = "weights"
    dtype: Literal["fp32", "bf16"] | None = None
    layout: Literal["spiketrain", "hf"] = "spiketrain"
    max_file_gb: float = 5.0

    def __post_init__(self) -> None:
        if not Path(self.checkpoint).is_dir():
            raise ConfigError(f"checkpoint: {self.checkpoint} does not exist; give a run directory")
        require_free(self.output)
        require_size(self.max_file_gb)


@dataclass
class ImportConfig:
    """Settings of an import.

    Attributes:
        source: Directory of a Hugging Face model (Llama, Qwen2 or Qwen3) with config.json and safetensors.
        output: Directory to write; must be absent or empty.
        dtype: fp32 or bf16.
        max_file_gb: Size above which weights are split into several files (10^9 bytes).
    """

    source: str = "hub"
    output: str = "weights"
    dtype: Literal["fp32", "bf16"] = "bf16"
    max_file_gb: float = 5.0

    def __post_init__(self) -> None:
        if not Path(self.source).is_dir():
            raise ConfigError(f"source: {self.source} is not a directory; download the model and name its directory")
        require_free(self.output)
        require_size(self.max_file_gb)


@dataclass
class UpcycleConfig:
    """Settings of sparse upcycling.

    Attributes:
        source: The dense model: a weights directory, a run directory (its newest complete checkpoint), or one
            checkpoint.
        output: Directory to write; must be absent or empty.
        moe: The experts, as in a run's model.moe.
        router_std: Standard deviation of the router weights; small, so that no expert starts as the favourite.
        diversify: Fraction of each routed expert's weights that is set to zero, drawn for each expert (0 for none).
        seed: Seed of the router weights and the masks.
        dtype: fp32 or bf16; routers and decays are always float32.
        max_file_gb: Size above which weights are split into several files (10^9 bytes).
    """

    source: str = "weights"
    output: str = "upcycled"
    moe: MoEConfig = field(default_factory=MoEConfig)
    router_std: float = 1e-3
    diversify: float = 0.0
    seed: int = 0
    dtype: Literal["fp32", "bf16"] = "fp32"
    max_file_gb: float = 5.0

    def __post_init__(self) -> None:
        if not Path(self.source).is_dir():
            raise ConfigError(f"source: {self.source} does not exist; give weights or a run directory")
        require_free(self.output)
        if self.moe.num_experts == 0:
            raise ConfigError("moe.num_experts is 0: say how many experts each layer gets")
        if self.moe.spawn_step is not None:
            raise ConfigError(
                f"moe.spawn_step is {self.moe.spawn_step}: upcycling spawns them all; leave it out, and set diversify"
            )
        if self.moe.activation != "swiglu":
            raise ConfigError(
                f"moe.activation is {self.moe.activation}: the dense feed-forward is swiglu; leave it out"
            )
        if self.router_std <= 0:
            raise ConfigError(f"router_std is {self.router_std}: it must be positive, or all experts stay alike")
        if not 0 <= self.diversify < 1:
            raise ConfigError(f"diversify is {self.diversify}: it must be in [0, 1)")
        require_size(self.max_file_gb)


def export_weights(config: ExportConfig) -> None:
    """Export the parameters of a checkpoint as safetensors."""
    # Imported here, because it loads torch, for which invalid settings need not wait.
    from trainer.stored.export import export

    checkpoint = export(
        config.checkpoint,
        Path(config.output),
        config.dtype,
        config.max_file_gb * 1e9,
        show,
        config.layout == "hf",
    )
    print(f"{config.output}: the parameters of {checkpoint}")


def import_model(config: ImportConfig) -> None:
    """Import a Hugging Face model as weights that runs start from."""
    from trainer.stored.export import import_weights

    import_weights(Path(config.source), Path(config.output), config.dtype, config.max_file_gb * 1e9, show)
    print(f"{config.output}: the parameters of {config.source}")


def upcycle_model(config: UpcycleConfig) -> None:
    """Write weights of a mixture of experts whose experts are copies of a dense model's feed-forwards."""
    from trainer.stored.upcycle import upcycle

    dense = upcycle(
        Path(config.source),
        Path(config.output),
        config.moe,
        router_std=config.router_std,
        diversify=config.diversify,
        seed=config.seed,
        precision=config.dtype,
        max_file_bytes=config.max_file_gb * 1e9,
        report=show,
    )
    print(f"{config.output}: {dense} with {config.moe.num_experts} + {config.moe.shared_experts} experts a layer")


# Command name to (function, its configuration, one-line description).
COMMANDS: dict[str, tuple[Callable[[Any], None], type, str]] = {
    "export": (export_weights, ExportConfig, "Write the parameters of a checkpoint as safetensors."),
    "import": (import_model, ImportConfig, "Write a Hugging Face model's parameters as weights that runs start from."),
    "upcycle": (upcycle_model, UpcycleConfig, "Write weights with experts that are copies of a dense model's."),
}


def main() -> None:
    """Run the command named by the first argument with the remaining options."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print("usage: spiketrain convert COMMAND [options; COMMAND --help lists them]\n")
        for known, (_, _, description) in COMMANDS.items():
            print(f"  {known:<10} {description}")
        return
    if name not in COMMANDS:
        fail(f"no command {name!r}; choose from {', '.join(COMMANDS)}")
    # Options follow the command's name, and usage messages show both.
    sys.argv[:2] = [f"{sys.argv[0]} {name}"]
    entry(*COMMANDS[name])


if __name__ == "__main__":
    main()
