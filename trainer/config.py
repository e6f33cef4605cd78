"""Configuration of a pre-training run. Imports neither torch nor megatron."""

import itertools
import math
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from models.config import ModelConfig
from models.config.checks import require
from trainer.combinations import refuse_unsupported
from trainer.data.layout import resolve_prefix
from trainer.phases import PhaseConfig, expand


@dataclass
class RunConfig:
    """Run directory, device and time limits.

    Attributes:
        dir: Run directory: config.yaml, metrics.jsonl, events.jsonl, tensorboard/, checkpoints/, run.log, status.json.
        device: cpu or cuda; auto takes CUDA if available.
        threads: CPU threads per process; 0 takes OMP_NUM_THREADS if the user has set it (the 1 that torchrun sets for
            several processes does not count), else divides the cores evenly among the processes of this machine.
        deterministic: Request deterministic algorithms from torch (on CPU, equal inputs always give equal numbers).
        timeout_seconds: Time limit of a step or a part of a validation. A run of several ranks that exceeds it names
            the hanging rank and ends. Starting (up to the first step), saving and ending may take six times as long.
    """

    dir: str = "runs/pretrain"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = 0
    deterministic: bool = False
    timeout_seconds: float = 600.0

    def __post_init__(self) -> None:
        require(bool(self.dir), "run.dir is empty; name a directory")
        require(
            0 < self.timeout_seconds < math.inf,
            f"run.timeout_seconds is {self.timeout_seconds}: it must be a positive number of seconds",
        )
        require(self.threads >= 0, f"run.threads={self.threads} must be 0 (automatic) or more")

    def phase_seconds(self, phase: str) -> float:
        """Seconds that a phase of the run (see trainer.loop.Trainer.enter) may take without progress."""
        # Starting compiles kernels and reads checkpoints; saving may write terabytes.
        return self.timeout_seconds * (6 if phase in ("start", "save", "end") else 1)

    @property
    def collective_seconds(self) -> float:
        """Timeout of collectives: 1.5 times the longest phase limit, so that the watchdog fires first."""
        return 1.5 * self.phase_seconds("start")


@dataclass
class DataConfig:
    """Training and validation data.

    Attributes:
        path: stdlib (the Python standard library's source code, prepared on first use), a directory made by spiketrain
            prepare_data, or the prefix of a Megatron .bin/.idx pair.
        blend: Several sources with their weights, instead of path.
        tokenizer: tokenizer.json, SentencePiece .model or a directory with one; null takes the prepared directory's.
        validation_path: A .bin/.idx prefix for validation; null takes the prepared directory's validation split.
        eod_id: End-of-document token of Megatron data without a tokenizer; null takes the tokenizer's.
        document_mask: Keep documents that are packed into one sample from seeing each other.
        cache_dir: Directory in which data.path=stdlib is prepared.
        vocab_size: Size of the SentencePiece vocabulary that data.path=stdlib learns.
    """

    path: str = "stdlib"
    blend: dict[str, float] = field(default_factory=dict)
    tokenizer: str | None = None
    validation_path: str | None = None
    eod_id: int | None = None
    document_mask: bool = True
    cache_dir: str = "data"
    vocab_size: int = 4096

    def __post_init__(self) -> None:
        for source, weight in self.blend.items():
            require(
                0 < weight < math.inf, f"data.blend: the weight of {source} is {weight}; it must be a positive number"
            )
        for source in self.shares():
            # stdlib is prepared when the run starts, so there is nothing to check yet.
            if source != "stdlib":
                resolve_prefix(source)
        for name in ("tokenizer", "validation_path"):
            value = getattr(self, name)
            if value is not None:
                path = Path(value).expanduser()
                # Validation data may also be the prefix of a .bin/.idx pair, which is no file itself.
                exists = path.exists() or Path(f"{path}.idx").exists()
                require(exists, f"data.{name}: {value} does not exist")
        require(
            self.vocab_size >= 512, f"data.vocab_size={self.vocab_size} must be at least 512 (256 bytes and pieces)"
        )
        require(self.eod_id is None or self.eod_id >= 0, f"data.eod_id is {self.eod_id}: it must not be negative")

    def shares(self) -> dict[str, float]:
        """Every source with its weight: `blend`, or `path` alone."""
        return self.blend or {self.path: 1.0}


@dataclass
class ModuleCompression:
    """How the tensors of some modules are stored. null takes the setting of train.compression.

    Attributes:
        bits: Bits per element; 0 and 16 store tensors unchanged.
        group: Largest number of channels of a token that share a scale and an offset.
        range: exact or running.
    """

    bits: Literal[0, 4, 8, 16] | None = None
    group: int | None = None
    range: Literal["exact", "running"] | None = None

    def __post_init__(self) -> None:
        require(self.group is None or self.group > 0, f"train.compression.modules: group={self.group} must be positive")


@dataclass
class CompressionConfig:
    """How the activations that backward reads are stored (docs/memory.md). Forward is exact.

    Attributes:
        bits: Bits per element. 8 and 4 round stochastically. 16 rounds nothing, but tensors that can be recomputed from
            stored ones are not stored. 0 turns compression off.
        group: Largest number of channels of a token that share a scale and an offset. Groups are smaller where the
            channels of a tensor-parallel rank are not a multiple of this number.
        min_bytes: Tensors smaller than this, per rank and micro-batch, are stored unchanged.
        range: Range of a group's codes. exact: the range of the group's own elements. running: a moving average over
            steps of the range over all tokens (Mesa, arXiv 2111.11124); elements outside it are clamped.
        decay: Decay of the moving averages: the share of the old range that a step keeps.
        check: End the run with an error that names the tensor if one that is stored has an infinity or a NaN, to find
            where it comes from. Without it the step is skipped. On a GPU every check waits for the device.
        by_stage: Bits for the layers of single pipeline stages, by stage number. Early stages hold more micro-batches
            and may need fewer bits.
        modules: Settings for tensors whose place matches a name pattern, such as "layers.*.ffn.*"; * matches any
            characters. Later patterns override earlier ones, and all override by_stage.
    """

    bits: Literal[0, 4, 8, 16] = 0
    group: int = 64
    min_bytes: int = 4096
    range: Literal["exact", "running"] = "exact"
    decay: float = 0.9
    check: bool = False
    by_stage: dict[int, Literal[0, 4, 8, 16]] = field(default_factory=dict)
    modules: dict[str, ModuleCompression] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require(self.group > 0, f"train.compression.group={self.group} must be positive")
        require(self.min_bytes >= 0, f"train.compression.min_bytes={self.min_bytes} must not be negative")
        require(0 <= self.decay < 1, f"train.compression.decay={self.decay} must be in [0, 1)")
        for name in ("modules", "by_stage"):
            require(
                self.bits > 0 or not getattr(self, name),
                f"train.compression.{name} is set, but train.compression.bits=0 turns compression off; set bits to 4 "
                f"or 8, or to 16 to round only the tensors that {name} selects",
            )

    @property
    def has_running_ranges(self) -> bool:
        """Whether any tensor may have a running range."""
        return bool(self.bits) and "running" in (self.range, *(rule.range for rule in self.modules.values()))


@dataclass
class ObjectiveConfig:
    """What a training step minimises (docs/objectives.md). Validations report the next-token loss in any case.

    Attributes:
        name: next_token; distill: the divergence of the model's next-token distributions from a teacher's; or align:
            every mixer that differs from the teacher's learns what the teacher's mixer of that layer does.
        teacher: Weights, a Hugging Face directory, a run or one of its checkpoints, for distill and align.
        temperature: distill: divides the logits of both models.
        kl_weight: distill: weight of temperature^2 times KL(teacher || model).
        next_token_weight: distill: weight of the next-token loss.
    """

    name: Literal["next_token", "align", "distill"] = "next_token"
    teacher: str | None = None
    temperature: float = 1.0
    kl_weight: float = 1.0
    next_token_weight: float = 0.0

    def __post_init__(self) -> None:
        require(
            self.name == "next_token" or self.teacher is not None,
            f"train.objective.name={self.name} needs train.objective.teacher, the weights directory of the teacher",
        )
        require(
            0 < self.temperature < math.inf,
            f"train.objective.temperature is {self.temperature}: it must be a positive number",
        )
        for name in ("kl_weight", "next_token_weight"):
            value = getattr(self, name)
            require(0 <= value < math.inf, f"train.objective.{name} is {value}: it must be 0 or a positive number")
        require(
            self.kl_weight > 0,
            "train.objective.kl_weight=0 leaves nothing to learn from the teacher; use train.objective.name=next_token",
        )

    @property
    def needed_teacher(self) -> str | None:
        """The teacher's path; None if the objective has none."""
        return None if self.name == "next_token" else self.teacher


@dataclass
class TrainConfig:
    """Objective, length, batch size, precision and recomputation.

    Attributes:
        objective: What a step minimises.
        steps: Optimizer steps. Raising it later continues the run; earlier batches stay the same.
        seed: Seed of the initialisation and of the data order.
        precision: fp32; bf16 (bfloat16 parameters and activations, float32 main parameters and gradients); or auto: the
            precision of the resumed run, else bf16 on GPUs and on processors that multiply bfloat16 faster, else fp32.
            The run's config.yaml records the choice.
        seq_len: Tokens in a sample.
        micro_batch_size: Samples that one rank computes at a time.
        global_batch_size: Samples in an optimizer step; determines gradient accumulation.
        max_skipped_steps: Stop after this many consecutive steps were skipped for a non-finite loss or gradient.
        recompute: Activations that backward recomputes instead of keeping them: none; selective, those of
            recompute_modules; full, all but the input of each block. Results do not change. Utilisation counts the
            model's own operations, without recomputation.
        recompute_modules: Modules that selective recomputes in every block: mixer or ffn, each with the norm before it.
            In a mixture of experts also parts of ffn: moe_activation (router, and activation between the experts'
            products) or moe_experts (routed and shared experts). null takes mixer, which saves the most memory per
            operation.
        compression: How the activations that backward reads are stored.
        trainable: Patterns of the names of trained parameters, such as "layers.*.mixer.*", where * matches anything.
            All others are frozen: they have no gradient and no optimizer state. Names are those of exported weights.
            null trains everything; with model.lora, the adapters; with objective.name=align, the mixers that are
            aligned.
    """

    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    steps: int = 1000
    seed: int = 1234
    precision: Literal["fp32", "bf16", "auto"] = "fp32"
    seq_len: int = 512
    micro_batch_size: int = 8
    global_batch_size: int = 8
    max_skipped_steps: int = 10
    recompute: Literal["none", "selective", "full"] = "none"
    recompute_modules: list[Literal["mixer", "ffn", "moe_activation", "moe_experts"]] | None = None
    compression: CompressionConfig = field(default_factory=CompressionConfig)
    trainable: list[str] | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "seq_len", "micro_batch_size", "global_batch_size", "max_skipped_steps"):
            value = getattr(self, name)
            require(value > 0, f"train.{name} is {value}: it must be positive")
        require(self.seed >= 0, f"train.seed is {self.seed}: it must not be negative")
        require(
            self.recompute_modules is None or self.recompute == "selective",
            f"train.recompute_modules={self.recompute_modules} has no effect with train.recompute="
            f"{self.recompute}; use train.recompute=selective, or leave it out",
        )
        require(
            self.recompute_modules != [],
            "train.recompute_modules is empty; name mixer or ffn, or use train.recompute=none",
        )
        require(
            self.trainable != [], "train.trainable is empty: nothing would be trained; name a pattern, or leave it out"
        )
        of_experts = [name for name in self.recompute_modules or [] if name.startswith("moe_")]
        require(
            not of_experts or "ffn" not in (self.recompute_modules or []),
            f"train.recompute_modules has {', '.join(of_experts)} beside ffn, which contains it; name one of them",
        )

    def accumulation(self, data_parallel: int) -> int:
        """Micro-batches per rank and step.

        Raises:
            ValueError: the global batch does not divide over ranks and micro-batches.
        """
        per_pass = self.micro_batch_size * data_parallel
        require(
            self.global_batch_size % per_pass == 0,
            f"train.global_batch_size={self.global_batch_size} does not divide by train.micro_batch_size="
            f"{self.micro_batch_size} times {data_parallel} data-parallel ranks; use a multiple of {per_pass}",
        )
        return self.global_batch_size // per_pass


@dataclass
class OptimConfig:
    """AdamW and its learning-rate schedule.

    Attributes:
        lr: Peak learning rate.
        min_lr_ratio: Final learning rate as a fraction of lr.
        schedule: cosine, or wsd: warm-up, stable, then linear decay over the last decay_fraction of the steps.
        warmup_steps: Steps of linear warm-up; a shorter run ends during the warm-up.
        decay_fraction: Fraction of the steps in which wsd decays.
        weight_decay: Decoupled weight decay of matrices; norms, biases, A_log and dt_bias have none.
        beta1: Decay of the first moment.
        beta2: Decay of the second moment.
        eps: Epsilon of Adam.
        clip_grad: Maximum gradient norm; 0 turns clipping off.
    """

    lr: float = 3e-4
    min_lr_ratio: float = 0.1
    schedule: Literal["cosine", "wsd"] = "cosine"
    warmup_steps: int = 100
    decay_fraction: float = 0.2
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip_grad: float = 1.0

    def __post_init__(self) -> None:
        require(0 < self.lr < math.inf, f"optim.lr is {self.lr}: it must be a positive number")
        require(self.eps > 0, f"optim.eps is {self.eps}: it must be positive")
        for name in ("warmup_steps", "weight_decay", "clip_grad"):
            require(getattr(self, name) >= 0, f"optim.{name} is {getattr(self, name)}: it must not be negative")
        for name in ("beta1", "beta2"):
            require(0 <= getattr(self, name) < 1, f"optim.{name} is {getattr(self, name)}: it must be in [0, 1)")
        for name in ("min_lr_ratio", "decay_fraction"):
            require(0 <= getattr(self, name) <= 1, f"optim.{name} is {getattr(self, name)}: it must be in [0, 1]")


@dataclass
class EngineConfig:
    """Distributed engine and its sharding of state.

    Attributes:
        name: megatron (mcore's schedules, DDP and distributed optimizer) or deepspeed (ZeRO).
        zero_stage: State sharded over data-parallel ranks: 0 none, 1 optimizer state, 2 also gradients, 3 also
            parameters. megatron supports 1.
        offload: Keep the optimizer state (ZeRO 1 and up), or also the parameters (ZeRO 3), in host memory; deepspeed
            only.
    """

    name: Literal["megatron", "deepspeed"] = "megatron"
    zero_stage: Literal[0, 1, 2, 3] = 1
    offload: Literal["none", "optimizer", "parameters"] = "none"


@dataclass
class ParallelConfig:
    """Ranks along each parallel dimension; the rest of the world size is data parallel.

    Attributes:
        tensor: Tensor-parallel ranks.
        sequence: Shard the activations between tensor-parallel regions along the sequence.
        pipeline: Pipeline stages.
        virtual_pipeline: Model chunks per pipeline stage (interleaved schedule).
        pipeline_layers: Layers of each stage in order (with chunks, of each of the pipeline * virtual_pipeline chunks);
            null distributes them evenly, and earlier stages take the remainder.
        expert: Ranks that share the routed experts; the same ranks are also tensor-, context- and data-parallel.
        context: Context-parallel ranks (contiguous shards of the sequence).
    """

    tensor: int = 1
    sequence: bool = False
    pipeline: int = 1
    virtual_pipeline: int = 1
    pipeline_layers: list[int] | None = None
    expert: int = 1
    context: int = 1

    def __post_init__(self) -> None:
        for name in ("tensor", "pipeline", "virtual_pipeline", "expert", "context"):
            value = getattr(self, name)
            require(value >= 1, f"parallel.{name} is {value}: it must be at least 1")

    def stage_layers(self, num_layers: int) -> list[range]:
        """The layers of each stage; with interleaving those of each chunk, where chunk i belongs to rank i mod
        `pipeline`.

        Raises:
            ValueError: there are fewer layers than stages, or `pipeline_layers` does not add up.
        """
        stages = self.pipeline * self.virtual_pipeline
        require(
            num_layers >= stages,
            f"parallel.pipeline={self.pipeline} times parallel.virtual_pipeline={self.virtual_pipeline} makes {stages} "
            f"stages of {num_layers} layers; use at most {num_layers} stages",
        )
        sizes = self.pipeline_layers
        if sizes is None:
            sizes = [num_layers // stages + (stage < num_layers % stages) for stage in range(stages)]
        require(
            len(sizes) == stages and sum(sizes) == num_layers and min(sizes) >= 1,
            f"parallel.pipeline_layers={sizes} must be {stages} positive numbers that add up to {num_layers} layers",
        )
        return [range(end - size, end) for size, end in zip(sizes, itertools.accumulate(sizes), strict=True)]

    def require_divisible(self, model: ModelConfig) -> None:
        """Check that the sizes of a model divide over the ranks that share them.

        Raises:
            ValueError: heads, channels, vocabulary rows or experts do not divide.
        """
        for name, size in model.tensor_parallel_sizes().items() if self.tensor > 1 else ():
            require(
                size % self.tensor == 0,
                f"{name}={size} does not divide by parallel.tensor={self.tensor}; use a divisor of {size}",
            )
        experts = model.moe.num_experts
        require(
            experts % self.expert == 0,
            f"model.moe.num_experts={experts} does not divide by parallel.expert={self.expert}; use a divisor of "
            f"{experts}",
        )

    def data_parallel(self, world_size: int) -> int:
        """Number of data-parallel ranks.

        Raises:
            ValueError: the world size does not divide.
        """
        # Expert-parallel ranks are not a factor: they are the ranks of the other dimensions, grouped differently.
        used = self.tensor * self.pipeline * self.context
        require(
            world_size % used == 0,
            f"world size {world_size} does not divide by tensor*pipeline*context={used}; start a multiple of {used}",
        )
        return world_size // used


@dataclass
class CheckpointConfig:
    """Saving and resuming.

    Attributes:
        every: Steps between checkpoints; 0 saves only after the last step and on a stop signal, which always save.
        keep: Number of newest checkpoints to keep; 0 keeps all.
        keep_every: Also keep every n-th checkpoint, that is, those at multiples of every * keep_every steps; 0 keeps
            none.
        resume: auto continues from the newest complete checkpoint of run.dir. never starts anew and renames an earlier
            run's files to checkpoints.1 and so on; a restart by SLURM or torchrun still acts like auto. A path
            continues from that checkpoint.
        init: Weights, a Hugging Face directory, a run or one of its checkpoints, to start a new run from; null draws
            the weights from train.seed. Ignored when the run continues from a checkpoint.
        asynchronous: Continue training while a copy of the state is written. Off by default: the copy takes as much
            host memory as the checkpoint, and without a GPU the writer competes with training for cores.
    """

    every: int = 500
    keep: int = 3
    keep_every: int = 0
    resume: str = "auto"
    init: str | None = None
    asynchronous: bool = False

    def __post_init__(self) -> None:
        require(self.every >= 0, f"checkpoint.every is {self.every}: it must not be negative")
        require(self.keep >= 0, f"checkpoint.keep is {self.keep}: it must not be negative (0 keeps all)")
        require(
            self.keep_every >= 0, f"checkpoint.keep_every is {self.keep_every}: it must not be negative (0 keeps none)"
        )
        require(
            not self.keep_every or self.every > 0,
            f"checkpoint.keep_every={self.keep_every} counts the checkpoints of checkpoint.every=0, of which there are "
            "none; set checkpoint.every, or checkpoint.keep_every=0",
        )
        # Otherwise a path, which is checked here so that a typo is reported before the run starts.
        if self.resume not in ("auto", "never"):
            require(
                Path(self.resume).is_dir(),
                f"checkpoint.resume: {self.resume} is neither auto, never, nor the directory of a checkpoint",
            )


@dataclass
class EvaluationConfig:
    """Validation in bits per byte.

    Attributes:
        every: Steps between validations; 0 validates only after the last step.
        batches: Micro-batches of an intermediate validation; 0 takes the whole split.
        seq_len: Tokens in a window; null takes train.seq_len.
        stride: New tokens in each window, the rest being context; null takes evaluation.seq_len (no overlap).
        samples: Text samples written to TensorBoard at each validation.
        sample_tokens: Tokens per text sample.
        prompt: Prompt of the text samples.
        compare_compressors: After the last step, print the bits per byte of gzip -9 and xz -9 on the validation files.
    """

    every: int = 250
    batches: int = 16
    seq_len: int | None = None
    stride: int | None = None
    samples: int = 1
    sample_tokens: int = 128
    prompt: str = "def"
    compare_compressors: bool = False

    def __post_init__(self) -> None:
        for name in ("every", "batches", "samples", "sample_tokens"):
            require(getattr(self, name) >= 0, f"evaluation.{name} is {getattr(self, name)}: it must not be negative")
        for name in ("seq_len", "stride"):
            value = getattr(self, name)
            require(value is None or value > 0, f"evaluation.{name} is {value}: it must be positive")
        if self.seq_len is not None and self.stride is not None:
            require(
                self.stride <= self.seq_len,
                f"evaluation.stride={self.stride} exceeds evaluation.seq_len={self.seq_len}",
            )


@dataclass
class LoggingConfig:
    """Metrics, progress and profiling.

    Attributes:
        every: Steps between lines of metrics.jsonl and TensorBoard points.
        measure_every: Least number of steps between lines with measures of spikes (docs/spiking.md) and of compressed
            activations (docs/memory.md), which take some time; 0 for none.
        progress: Show a live progress line on a terminal, plain lines elsewhere.
        tensorboard: Write TensorBoard events.
        profile_step: Trace three steps, starting at this one, with torch's profiler into run.dir/profile; 0 never.
    """

    every: int = 1
    measure_every: int = 10
    progress: bool = True
    tensorboard: bool = True
    profile_step: int = 0

    def __post_init__(self) -> None:
        require(self.every >= 1, f"logging.every is {self.every}: it must be at least 1")
        require(self.measure_every >= 0, f"logging.measure_every is {self.measure_every}: it must not be negative")
        require(self.profile_step >= 0, f"logging.profile_step is {self.profile_step}: it must not be negative")

    @property
    def steps_between_measures(self) -> int:
        """`measure_every`, as a multiple of `every`, so that every measure is written."""
        return math.ceil(self.measure_every / self.every) * self.every


@dataclass
class PretrainConfig:
    """The complete configuration of a pre-training run.

    Attributes:
        run: Run directory, device and time limits.
        model: Shape of the model.
        data: Training and validation data.
        train: Objective, length, batch size, precision and recomputation.
        optim: Optimizer and schedule.
        engine: Distributed engine.
        parallel: Ranks along each parallel dimension.
        checkpoint: Saving and resuming.
        evaluation: Validation.
        logging: Metrics, progress and profiling.
        phases: Settings that change during the run, and when (trainer.phases).
    """

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    phases: list[PhaseConfig] = field(default_factory=list)

    def __post_init__(self) -> None:
        window = self.evaluation.seq_len or self.train.seq_len
        require(
            self.evaluation.stride is None or self.evaluation.stride <= window,
            f"evaluation.stride={self.evaluation.stride} exceeds the evaluation window of {window} tokens",
        )
        of_experts = sorted(part for part in self.train.recompute_modules or [] if part.startswith("moe_"))
        require(
            not of_experts or self.model.moe.num_experts > 0,
            f"train.recompute_modules has {', '.join(of_experts)}, but the model has no experts; set "
            "model.moe.num_experts, or name ffn",
        )
        # A dense model ignores spawn_step.
        spawn_step = self.model.moe.spawn_step if self.model.moe.num_experts else None
        require(
            spawn_step is None or spawn_step < self.train.steps,
            f"model.moe.spawn_step={spawn_step} lies past the end of the run, train.steps={self.train.steps}; spawn "
            "earlier, or leave it out",
        )
        require(
            spawn_step is None or self.checkpoint.init is None,
            f"model.moe.spawn_step={spawn_step} would overwrite the experts of checkpoint.init={self.checkpoint.init} "
            "with the first of each layer; leave one of them out",
        )
        if self.model.moe.num_experts and self.parallel.tensor > 1:
            # With experts, each tensor-parallel rank routes its own tokens, so activations are sequence-sharded.
            self.parallel = replace(self.parallel, sequence=True)
        if self.phases:
            # Builds, and so validates, the configuration of every phase.
            expand(self)

    @property
    def value_head(self) -> float | None:
        """The factor of the learning rate of a head for values; None without, as in pretraining."""
        return None

    def validate_layout(self, world_size: int) -> None:
        """Check everything that depends on the number of ranks.

        Raises:
            ValueError: the layout is unsupported, or does not fit the world size.
        """
        refuse_unsupported(self)
        parallel = self.parallel
        accumulation = self.train.accumulation(parallel.data_parallel(world_size))
        self._check_phases(world_size, accumulation)
        require(
            parallel.tensor > 1 or not parallel.sequence,
            "parallel.sequence cuts over the tensor-parallel ranks, of which there is one; use parallel.tensor=2 or "
            "more, or parallel.sequence=false",
        )
        parallel.stage_layers(self.model.num_layers)
        unknown = sorted(set(self.train.compression.by_stage) - set(range(parallel.pipeline)))
        require(
            not unknown,
            f"train.compression.by_stage has stage {', '.join(map(str, unknown))}, but parallel.pipeline="
            f"{parallel.pipeline} has only stages 0 to {parallel.pipeline - 1}",
        )
        parallel.require_divisible(self.model)
        self._check_experts(world_size)
        require(
            parallel.pipeline > 1 or parallel.virtual_pipeline == 1,
            "parallel.virtual_pipeline interleaves pipeline stages, of which there is one; use parallel.pipeline=2 or "
            "more, or parallel.virtual_pipeline=1",
        )
        require(
            # A multiple: mcore's interleaved schedule passes micro-batches through the stages in groups of `pipeline`.
            parallel.virtual_pipeline == 1 or accumulation % parallel.pipeline == 0,
            f"parallel.virtual_pipeline={parallel.virtual_pipeline} needs a multiple of parallel.pipeline="
            f"{parallel.pipeline} micro-batches a step, not {accumulation}; change train.global_batch_size",
        )
        # Context ranks shard the sequence, and sequence parallelism shards each of these shards again.
        pieces = parallel.context * (parallel.tensor if parallel.sequence else 1)
        for name, seq_len in (("train", self.train.seq_len), ("evaluation", self.evaluation.seq_len)):
            require(
                (seq_len or 0) % pieces == 0,
                f"{name}.seq_len={seq_len} does not divide over {pieces} ranks that share a sequence (parallel.context"
                f"={parallel.context}, parallel.sequence={str(parallel.sequence).lower()}); use a multiple of {pieces}",
            )

        require(
            not parallel.sequence or self.model.sink_tokens % parallel.tensor == 0,
            f"model.sink_tokens={self.model.sink_tokens} does not divide over parallel.tensor={parallel.tensor} ranks "
            "with parallel.sequence=true; use a multiple, or parallel.sequence=false",
        )

    def _check_phases(self, world_size: int, accumulation: int) -> None:
        for phase in expand(self)[1:]:
            try:
                phase.config.validate_layout(world_size)
            except ValueError as error:
                raise ValueError(f"phases: in phase {phase.number} {error}") from error
            own = phase.config.train.accumulation(self.parallel.data_parallel(world_size))
            require(
                self.engine.name == "megatron" or own == accumulation,
                f"phases: phase {phase.number} has {own} micro-batches of a rank in a step, and the run begins with "
                f"{accumulation}: DeepSpeed cannot change this number; change train.micro_batch_size along "
                "with train.global_batch_size, or use engine.name=megatron",
            )

    def _check_experts(self, world_size: int) -> None:
        experts, expert, pipeline = self.model.moe.num_experts, self.parallel.expert, self.parallel.pipeline
        require(
            expert == 1 or experts > 0,
            f"parallel.expert={expert} shares experts, of which the model has none; set model.moe.num_experts, or "
            "parallel.expert=1",
        )
        # Experts are shared within a pipeline stage, over all of its ranks.
        require(
            world_size // pipeline % expert == 0,
            f"parallel.expert={expert} does not divide the tensor*context*data={world_size // pipeline} ranks of a "
            "pipeline stage; use a divisor of it",
        )


def world_size_from_environment() -> int:
    """Number of ranks that torchrun started; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))
