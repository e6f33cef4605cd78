"""Export, import, upcycle and quantize weights.

spiketrain convert export --checkpoint runs/laptop --output weights/laptop
spiketrain convert export --checkpoint runs/dense --output hub/dense --layout hf
spiketrain convert import --source hub/Qwen2.5-0.5B --output weights/qwen
spiketrain convert import --source hub/SmolLM2-135M.gguf --output weights/smollm
spiketrain convert upcycle --source weights/qwen --output weights/qwen-moe --moe.num_experts 8
spiketrain convert spike --checkpoint runs/laptop --data data/stdlib-bpe4096 --output weights/laptop-w8a
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from launch.evaluate import EvaluateConfig, check_tokenizer, is_indexed, open_stream, read_texts
from models.config import MoEConfig, SpikingConfig
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
        checkpoint: A run directory (its newest complete checkpoint), one checkpoint, of either engine, or weights.
        output: Directory to write; must be absent or empty.
        dtype: fp32 or bf16; null keeps the run's precision. fp32 from a bf16 run takes the optimizer's main parameters.
        layout: spiketrain, which runs start from; or hf, the Hugging Face architecture that computes the model, for
            transformers or flash-linear-attention.
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
        source: Directory of a Hugging Face model with config.json and safetensors, or a GGUF file.
        output: Directory to write; must be absent or empty.
        dtype: fp32 or bf16.
        max_file_gb: Size above which weights are split into several files (10^9 bytes).
    """

    source: str = "hub"
    output: str = "weights"
    dtype: Literal["fp32", "bf16"] = "bf16"
    max_file_gb: float = 5.0

    def __post_init__(self) -> None:
        source = Path(self.source)
        if not source.is_dir() and not (source.suffix == ".gguf" and source.is_file()):
            raise ConfigError(
                f"source: {source} is neither a directory nor a .gguf file; download the model and name it"
            )
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


@dataclass
class SpikeConfig:
    """Settings of a conversion to spikes and int8 weights (W8A-spike).

    Attributes:
        checkpoint: A run directory (its newest complete checkpoint), one checkpoint, or weights.
        data: What to calibrate with: prepared data, a .bin/.idx prefix, or a text file or glob (spiketrain evaluate).
        split: Split of a prepared directory.
        sequences: Number of sequences to calibrate with; the report took 128.
        seq_len: Tokens of a sequence; null takes the run's train.seq_len, for weights its default.
        batch_size: Sequences computed at a time.
        layers: Linear layers that get spikes and int8 weights (model.spiking.layers); null takes those that spike
            already, or all.
        k: Spikes of a channel of mean magnitude; null keeps the model's, 3 where it has none.
        queries: Spikes of rotated queries, too; null keeps what the model does.
        int8_keys_values: Keys and values in int8, too; null keeps what the model does.
        output: Directory to write; must be absent or empty.
        dtype: fp32 or bf16; null keeps the model's precision. The int8 weights are written as numbers of this dtype.
        device: cpu or cuda; auto takes CUDA if available.
        max_file_gb: Size above which weights are split into several files (10^9 bytes).
    """

    checkpoint: str = "runs/laptop"
    data: str = "data/stdlib-bpe4096"
    split: Literal["train", "validation", "test"] = "train"
    sequences: int = 128
    seq_len: int | None = None
    batch_size: int = 8
    layers: list[str] | None = None
    k: float | None = None
    queries: bool | None = None
    int8_keys_values: bool | None = None
    output: str = "weights"
    dtype: Literal["fp32", "bf16"] | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    max_file_gb: float = 5.0

    def __post_init__(self) -> None:
        # Checks the checkpoint, the data and the sizes of windows.
        self.evaluation()
        self.spiking(SpikingConfig())
        if self.sequences < 1:
            raise ConfigError(f"sequences is {self.sequences}: it must be at least 1")
        require_free(self.output)
        require_size(self.max_file_gb)

    def evaluation(self) -> EvaluateConfig:
        """The windows that an evaluation would read."""
        return EvaluateConfig(self.checkpoint, self.data, self.split, self.seq_len, batch_size=self.batch_size)

    def spiking(self, own: SpikingConfig) -> SpikingConfig:
        """What the model is to do, given what it does already."""
        names = ("layers", "k", "queries", "int8_keys_values")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return replace(own, **{"layers": own.layers or ["all"]} | given, weights="int8")


def export_weights(config: ExportConfig) -> None:
    """Export the parameters of a checkpoint or of weights as safetensors."""
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


def spike_model(config: SpikeConfig) -> None:
    """Write weights of a model with spikes and int8 weights, calibrated on data."""
    texts = [] if is_indexed(config.data) else read_texts(config.data)
    from rich.progress import track

    from trainer.device import choose_device, keep_freed_memory
    from trainer.logs import CONSOLE
    from trainer.stored import calibration
    from trainer.stored.inference import load_model

    keep_freed_memory()
    loaded = load_model(config.checkpoint, choose_device(config.device))
    loaded.require_tokenizer()
    check_tokenizer(config.evaluation(), loaded)
    stream = open_stream(config.evaluation(), loaded, texts)
    spiking = config.spiking(loaded.model.model_config.spiking)
    model = calibration.spiking_model(loaded, spiking)
    count = min(-(-config.sequences // config.batch_size), len(stream))
    batches = track(islice(stream, count), total=count, description="calibrating", console=CONSOLE, transient=True)
    done = calibration.round_weights(model, calibration.second_moments(model, batches), show)
    output, size = Path(config.output), config.max_file_gb * 1e9
    calibration.write(output, model, loaded, config.dtype, size, show)
    print(
        f"{config.output}: {loaded.path} with spikes and {done.tensors} int8 weights, whose products are off by "
        f"{done.error**0.5:.3%} ({done.unclipped**0.5:.3%} without clipping)"
    )


# Command name to (function, its configuration, one-line description).
COMMANDS: dict[str, tuple[Callable[[Any], None], type, str]] = {
    "export": (export_weights, ExportConfig, "Write the parameters of a checkpoint or of weights as safetensors."),
    "import": (import_model, ImportConfig, "Write a Hugging Face model's parameters as weights that runs start from."),
    "upcycle": (upcycle_model, UpcycleConfig, "Write weights with experts that are copies of a dense model's."),
    "spike": (spike_model, SpikeConfig, "Write weights with spikes and int8 weights, calibrated on data."),
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
