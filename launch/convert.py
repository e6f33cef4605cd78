"""Export, import and convert weights: to hybrids, to mixtures of experts, to spikes.

spiketrain convert export --checkpoint runs/laptop --output weights/laptop
spiketrain convert export --checkpoint runs/dense --output hub/dense --layout hf
spiketrain convert import --source hub/Qwen2.5-0.5B --output weights/qwen
spiketrain convert import --source hub/SmolLM2-135M.gguf --output weights/smollm
spiketrain convert layers --source runs/dense --data data/stdlib-bpe4096 --keep 2 --output choice.yaml
spiketrain convert hybrid --source weights/qwen --output weights/qwen-hybrid --preset spikingbrain-7b
spiketrain convert upcycle --source weights/qwen --output weights/qwen-moe --moe.num_experts 8
spiketrain convert run --config configs/convert/laptop.yaml
torchrun --standalone --nproc-per-node 2 launch/convert.py run --config configs/convert/laptop.yaml
spiketrain convert spike --checkpoint runs/laptop --data data/stdlib-bpe4096 --output weights/laptop-w8a
"""

import json
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import yaml

from launch.main import Ranks, free_port
from models.config import (
    DeltaNetConfig,
    GatedDeltaNetConfig,
    GatedLinearAttentionConfig,
    KimiDeltaAttentionConfig,
    MixerLayoutConfig,
    MoEConfig,
    RetentionConfig,
    SpikingBrainGLAConfig,
    SpikingConfig,
    parse_pattern,
)
from models.config.conversion import PRESETS, retention
from trainer import recipe, yaml_files
from trainer.cli import entry, fail
from trainer.config import PretrainConfig, world_size_from_environment
from trainer.errors import ConfigError
from trainer.evaluation.config import EvaluateConfig
from trainer.evaluation.data import check_tokenizer, is_indexed, open_stream, read_texts
from trainer.posttraining.config import PosttrainConfig
from trainer.posttraining.prepare_rows import PrepareRowsConfig
from trainer.run_lock import launch_id
from trainer.runtime import rank


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
        if not Path(self.checkpoint).exists():
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
class LinearMixersConfig:
    """Settings of the linear mixers. Sizes of heads follow from the attention: leave them out.

    Attributes:
        gated_delta_net: Gated delta net; expand_v repeats values, a whole number.
        gated_linear_attention: Gated linear attention.
        retention: Retention.
        delta_net: Delta net.
        kimi_delta_attention: Kimi delta attention.
        spikingbrain_gla: SpikingBrain's linear attention.
    """

    gated_delta_net: GatedDeltaNetConfig = field(default_factory=GatedDeltaNetConfig)
    gated_linear_attention: GatedLinearAttentionConfig = field(default_factory=GatedLinearAttentionConfig)
    retention: RetentionConfig = field(default_factory=retention)
    delta_net: DeltaNetConfig = field(default_factory=DeltaNetConfig)
    kimi_delta_attention: KimiDeltaAttentionConfig = field(default_factory=KimiDeltaAttentionConfig)
    spikingbrain_gla: SpikingBrainGLAConfig = field(default_factory=SpikingBrainGLAConfig)

    def sections(self) -> dict[str, Any]:
        """The settings by section."""
        return {item.name: getattr(self, item.name) for item in fields(LinearMixersConfig)}


@dataclass
class HybridConfig(LinearMixersConfig):
    """Settings of a conversion of softmax attention to a hybrid. One of pattern, preset and layers_file is needed.

    Attributes:
        source: The model: a weights directory, a run directory (its newest complete checkpoint), or one checkpoint.
        output: Directory to write; must be absent or empty.
        pattern: Mixers of the layers, such as "gated_delta_net*3, full_attention", repeated over all of them.
        preset: The layers of a published hybrid, and its window.
        layers_file: A choice of layers that spiketrain convert layers has written.
        window: Keys that a sliding-window layer sees, including the query's own; null takes the preset's, or else
            keeps the model's.
        sink_tokens: Learned tokens in front of every sequence that softmax layers see; null takes the preset's, or else
            keeps the model's.
        drop_biases: Leave out biases of queries, keys and values that the linear mixer cannot have.
        seed: Seed of the new parameters.
        dtype: fp32 or bf16; decays are always float32.
        max_file_gb: Size above which weights are split into several files (10^9 bytes).
    """

    source: str = "weights"
    output: str = "hybrid"
    pattern: str | None = None
    preset: Literal["spikingbrain-7b", "spikingbrain-76b"] | None = None
    layers_file: str | None = None
    window: int | None = None
    sink_tokens: int | None = None
    drop_biases: bool = False
    seed: int = 0
    dtype: Literal["fp32", "bf16"] = "fp32"
    max_file_gb: float = 5.0

    def __post_init__(self) -> None:
        if not Path(self.source).exists():
            raise ConfigError(f"source: {self.source} does not exist; give weights or a run directory")
        require_free(self.output)
        require_size(self.max_file_gb)
        given = [name for name in ("pattern", "preset", "layers_file") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ConfigError(f"give one of pattern, preset and layers_file, not {len(given)} of them")
        for name, least in (("window", 1), ("sink_tokens", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name} is {value}: it must be at least {least}")
        parse_pattern(self.layers(), "pattern")

    def layers(self) -> str:
        """The pattern of the hybrid's layers."""
        if self.layers_file is not None:
            file = Path(self.layers_file)
            if not file.is_file():
                raise ConfigError(f"layers_file: {file} does not exist; spiketrain convert layers writes one")
            yaml_files.check(file, MixerLayoutConfig)
            pattern = yaml.safe_load(file.read_text(encoding="utf-8")).get("pattern")
            if not isinstance(pattern, str):
                raise ConfigError(f"layers_file: {file} has no pattern; spiketrain convert layers writes one")
            return pattern
        return self.pattern or PRESETS[self.preset or ""].pattern

    def keys_and_sinks(self) -> tuple[int | None, int | None]:
        """The window of sliding-window layers and the number of sink tokens; None keeps the model's."""
        preset = None if self.preset is None else PRESETS[self.preset]
        window = preset.window if self.window is None and preset is not None else self.window
        sinks = preset.sink_tokens if self.sink_tokens is None and preset is not None else self.sink_tokens
        return window, sinks


@dataclass
class LayersConfig(LinearMixersConfig):
    """Settings of a choice of the layers that stay softmax attention.

    Attributes:
        source: The model: a weights directory, a run directory (its newest complete checkpoint), or one checkpoint.
        data: What to measure on: prepared data, a .bin/.idx prefix, or a text file or glob (spiketrain evaluate).
        split: Split of a prepared directory to measure on.
        align_data: What to align on; null takes the train split of a prepared directory.
        keep: Number of softmax layers that stay.
        linear: The mixer that replaces the others, or parallel branches of mixers, NAME + NAME.
        method: greedy replaces the least harmful layer and measures the others again; one_shot measures once.
        align_steps: Steps in which every replacing mixer learns its layer's output; 0 for none.
        align_lr: Peak learning rate of these steps.
        align_batch_size: Sequences in such a step.
        sequences: Number of sequences to measure on.
        seq_len: Tokens of a sequence; null takes the run's train.seq_len, for weights its default.
        batch_size: Sequences measured at a time.
        window: Keys that a sliding-window layer sees, where linear has one; null keeps the model's.
        drop_biases: Leave out biases of queries, keys and values that the linear mixer cannot have.
        seed: Seed of the new parameters and of the order of the sequences to align on.
        output: YAML file to write, the layers_file of spiketrain convert hybrid.
        json: Write all measurements to this file.
        device: cpu or cuda; auto takes CUDA if available.
    """

    source: str = "runs/dense"
    data: str = "data/stdlib-bpe4096"
    split: Literal["train", "validation", "test"] = "validation"
    align_data: str | None = None
    keep: int = 1
    linear: str = "gated_delta_net"
    method: Literal["greedy", "one_shot"] = "greedy"
    align_steps: int = 100
    align_lr: float = 3e-3
    align_batch_size: int = 8
    sequences: int = 64
    seq_len: int | None = None
    batch_size: int = 8
    window: int | None = None
    drop_biases: bool = False
    seed: int = 0
    output: str = "layers.yaml"
    json: str | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def __post_init__(self) -> None:
        if not Path(self.source).exists():
            raise ConfigError(f"source: {self.source} does not exist; give weights or a run directory")
        self.measured()
        if self.align_steps > 0:
            if self.align_data is None and not Path(self.data).is_dir():
                raise ConfigError(
                    f"align_data: {self.data} has no train split; name data to align on, or align_steps=0"
                )
            self.aligned()
        for name, least in (("keep", 0), ("align_steps", 0), ("sequences", 2), ("align_batch_size", 1), ("window", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name} is {value}: it must be at least {least}")
        if self.align_lr <= 0:
            raise ConfigError(f"align_lr is {self.align_lr}: it must be positive")
        if len(parse_pattern(self.linear, "linear")) != 1:
            raise ConfigError(f"linear: {self.linear!r} names several layers; name one mixer, or NAME + NAME")
        for name in ("output", "json"):
            path = getattr(self, name)
            if path is not None and not Path(path).absolute().parent.is_dir():
                raise ConfigError(f"{name}: the directory of {path} does not exist; make it first")
        if Path(self.output).exists():
            raise ConfigError(f"output: {self.output} exists; name another file, or remove it")

    def measured(self) -> EvaluateConfig:
        """The windows to measure on, as an evaluation reads them."""
        return EvaluateConfig(self.source, self.data, self.split, self.seq_len, batch_size=self.batch_size)

    def aligned(self) -> EvaluateConfig:
        """The windows to align on."""
        data = self.data if self.align_data is None else self.align_data
        return EvaluateConfig(self.source, data, "train", self.seq_len, batch_size=self.align_batch_size)


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
        if not Path(self.source).exists():
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


@dataclass
class RecipeConfig:
    """A staged recipe (trainer.recipe). Its steps are commands with their options.

    Attributes:
        dir: Directory of the record of what has been run.
        base: Options of all training steps, which a step's own options override.
        steps: The steps in order, each a command (a command of convert, train or evaluate) with its options.
        check: Check the recipe and print its commands, and run nothing.
    """

    dir: str = "runs/convert"
    base: dict[str, Any] = field(default_factory=dict)
    steps: list[dict[str, Any]] = field(default_factory=list)
    check: bool = False

    def __post_init__(self) -> None:
        if not self.steps:
            raise ConfigError("steps: there are none; give a recipe with --config, such as configs/convert/laptop.yaml")


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


def hybrid_model(config: HybridConfig) -> None:
    """Write weights of a hybrid with the matrices of a model of softmax attention."""
    from trainer.stored.hybrid import convert

    window, sink_tokens = config.keys_and_sinks()
    hybrid = convert(
        Path(config.source),
        Path(config.output),
        config.layers(),
        config.sections(),
        window=window,
        sink_tokens=sink_tokens,
        drop_biases=config.drop_biases,
        seed=config.seed,
        precision=config.dtype,
        max_file_bytes=config.max_file_gb * 1e9,
        report=show,
    )
    print(f"{config.output}: {hybrid.source} with the layers {hybrid.model.mixers.pattern}")


def choose_layers(config: LayersConfig) -> None:
    """Measure what replacing each layer of softmax attention costs, and write which of them stay."""
    texts = {data: [] if is_indexed(data) else read_texts(data) for data in {config.data, config.aligned().data}}
    from rich.progress import Progress

    from trainer import layer_choice
    from trainer.device import choose_device, keep_freed_memory
    from trainer.logs import CONSOLE
    from trainer.stored.inference import load_model

    keep_freed_memory()
    loaded = load_model(config.source, choose_device(config.device))
    replacer = layer_choice.open_replacer(
        loaded,
        config.linear,
        config.sections(),
        keep=config.keep,
        window=config.window,
        drop_biases=config.drop_biases,
        seed=config.seed,
    )
    check_tokenizer(config.measured(), loaded)
    measured = open_stream(config.measured(), loaded, texts[config.data], config.sequences)
    with Progress(console=CONSOLE, transient=True) as progress:
        errors: list[dict[int, float]] = []
        if config.align_steps:
            check_tokenizer(config.aligned(), loaded)
            sequences = config.align_steps * config.align_batch_size
            aligned = list(open_stream(config.aligned(), loaded, texts[config.aligned().data], sequences))
            steps = replacer.align(aligned, config.align_steps, config.align_lr)
            errors = list(progress.track(steps, total=config.align_steps, description="aligning"))
        count = layer_choice.measurements(len(replacer.layers), config.keep, config.method)
        task = progress.add_task("measuring", total=count + bool(config.keep))
        meter = layer_choice.Meter(replacer, list(measured), measured.seq_len, lambda: progress.advance(task))
        choice = layer_choice.choose(meter.damage, replacer.layers, config.keep, config.method)
        even = meter.damage(layer_choice.evenly_spaced(replacer.layers, config.keep)) if config.keep else None
    final = layer_choice.final_errors(errors)
    print(layer_choice.describe(choice, final, even))
    if config.json is not None:
        Path(config.json).write_text(json.dumps(layer_choice.as_values(choice, final, even), indent=1) + "\n")
    Path(config.output).write_text(
        yaml.safe_dump({"pattern": replacer.pattern(frozenset(choice.replaced))}, width=1000)
    )
    print(f"written: {config.output}; use it with spiketrain convert hybrid --layers_file {config.output}")


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


def run_recipe(config: RecipeConfig) -> int:
    """Run or resume the steps of a recipe, as one of the ranks that run it; returns the exit code."""
    known = {name: kind for name, (_, kind, _) in COMMANDS.items() if kind is not RecipeConfig}
    known |= {"train": PretrainConfig, "posttrain": PosttrainConfig, "evaluate": EvaluateConfig}
    steps = recipe.read_steps(config.base, config.steps, known | {"prepare_rows": PrepareRowsConfig})
    record = recipe.Record(Path(config.dir))
    if rank() == 0:
        # On other ranks, rank 0 may be further already.
        record.check(steps)
    for step in steps:
        if config.check:
            print(shlex.join(["spiketrain", *_command(step)]))
        elif code := (_lead if rank() == 0 else _follow)(step, len(steps), record):
            return code
    return 0


def _lead(step: recipe.Step, steps: int, record: recipe.Record) -> int:
    """Run a step on rank 0, unless it has ended; returns its exit code."""
    if record.is_done(step):
        show(f"{step} (of {steps}): has ended")
        return 0
    show(f"{step} (of {steps})")
    began, port = time.monotonic(), free_port()
    step.output.absolute().parent.mkdir(parents=True, exist_ok=True)
    record.write(step, state="begun", settings=step.settings(), launch=launch_id(), port=port, exit_code=None)
    code = _run(step, port)
    record.write(step, state="ended" if code else "done", exit_code=code, seconds=round(time.monotonic() - began, 1))
    return code


def _follow(step: recipe.Step, steps: int, record: recipe.Record) -> int:
    """Take part in a step on another rank: run a training step, wait for any other; returns its exit code."""
    entry = recipe.wait_for(record, step, launch_id())
    return _run(step, entry["port"]) if entry["state"] == "begun" else entry["exit_code"]


def _command(step: recipe.Step) -> list[str]:
    """The words after `spiketrain` of a step's command."""
    alone = {"train": "pretrain"} | {name: name for name in ("posttrain", "evaluate", "prepare_rows")}
    words = [alone[step.command]] if step.command in alone else ["convert", step.command]
    return [*words, *step.arguments()]


def _run(step: recipe.Step, port: int) -> int:
    is_one_of_several = step.is_training and world_size_from_environment() > 1
    script, *words = _command(step)
    command = [sys.executable, str(Path(__file__).resolve().parent / f"{script}.py"), *words]
    return Ranks(command, [recipe.of_ranks(port) if is_one_of_several else recipe.single_process()]).wait()


# Command name to (function, its configuration, one-line description).
COMMANDS: dict[str, tuple[Callable[[Any], int | None], type, str]] = {
    "export": (export_weights, ExportConfig, "Write the parameters of a checkpoint or of weights as safetensors."),
    "import": (import_model, ImportConfig, "Write a Hugging Face model's parameters as weights that runs start from."),
    "layers": (choose_layers, LayersConfig, "Choose the layers that stay softmax attention, by measured damage."),
    "hybrid": (hybrid_model, HybridConfig, "Write weights of a hybrid with the matrices of softmax attention."),
    "upcycle": (upcycle_model, UpcycleConfig, "Write weights with experts that are copies of a dense model's."),
    "spike": (spike_model, SpikeConfig, "Write weights with spikes and int8 weights, calibrated on data."),
    "run": (run_recipe, RecipeConfig, "Run or resume the steps of a recipe."),
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
