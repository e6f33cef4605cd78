"""The memory and messages of every pipeline stage of a layout, and the time of a step."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch

from models.parameters import matches
from models.saved_activations import EVERYTHING, RECENT, RECOMPUTE, BlockPolicy
from trainer.compression import block_policy, compression
from trainer.config import CompressionConfig, PretrainConfig
from trainer.planning.config import ClusterConfig, PlanConfig
from trainer.planning.dry_run import Cut, DryRun, ParameterSpec
from trainer.planning.teacher import TeacherPlan
from trainer.trainable import trained

# The values of train.recompute and train.recompute_modules that a plan compares, the least recomputation first.
_CHOICES: tuple[tuple[str, list[str] | None], ...] = (
    ("none", None),
    ("selective", ["moe_activation"]),
    ("selective", ["moe_experts"]),
    ("selective", ["mixer"]),
    ("selective", ["ffn"]),
    ("selective", ["mixer", "ffn"]),
    ("full", None),
)
_MODULES = ("mixer", "ffn", "moe_activation", "moe_experts")
# Bucket size that trainer.engines.deepspeed sets.
ZERO_BUCKET_ELEMENTS = 50_000_000
# ZeRO 3 keeps a gathered parameter that is used again within this many elements (stage3_max_reuse_distance). Between a
# parameter's forward and backward every later element is used twice, so half as many elements, the last ones, are kept.
ZERO_REUSE_ELEMENTS = 1_000_000_000
MAIN = 4  # bytes of an element of main parameters, their gradients and Adam's moments: float32


def choices(config: PretrainConfig) -> dict[str, BlockPolicy]:
    """Return the recomputation policies that a plan compares, including the configuration's own.

    Keys are written as `none`, `full` or `selective [mixer, ffn]`.
    """
    above = config.model.moe.recompute_above
    stored = compression(config)
    compared = [BlockPolicy.of_config(recompute, modules, above, stored) for recompute, modules in _CHOICES]
    if not config.model.moe.num_experts:
        compared = [choice for choice in compared if RECOMPUTE not in (choice.moe_activation, choice.moe_experts)]
    own = block_policy(config)
    # Insert it before `full`, which saves the most memory and stays last.
    compared[-1:] = [*([] if own in compared else [own]), compared[-1]]
    return {_written(choice): choice for choice in compared}


def _written(choice: BlockPolicy) -> str:
    modules = [module for module in _MODULES if getattr(choice, module) is RECOMPUTE]
    if choice.block is RECOMPUTE or not modules:
        return "full" if choice.block is RECOMPUTE else "none"
    return f"selective [{', '.join(modules)}]"


@dataclass(frozen=True)
class States:
    """Bytes that a rank holds between steps, or from the first backward pass to the update.

    Attributes:
        parameters: The model's parameters.
        gradients: The accumulated gradients.
        optimizer: Adam's two moments, and the main parameters if they are separate.
        buffers: The engine's message buffers.
        host: The part of the above that is in host memory.
        teacher: The parameters of the objective's teacher, and what is kept of its outputs.
    """

    parameters: float
    gradients: float
    optimizer: float
    buffers: float = 0.0
    host: float = 0.0
    teacher: float = 0.0

    @property
    def on_device(self) -> float:
        """Bytes of device memory."""
        return self.parameters + self.gradients + self.optimizer + self.buffers + self.teacher - self.host


@dataclass(frozen=True)
class Stage:
    """A rank of one pipeline stage. All ranks of the stage have the same numbers.

    Attributes:
        layers: Its layers, by chunk.
        states: Its parameters, gradients and optimizer states.
        activations: Bytes kept by the micro-batches in flight, by recomputation policy.
        again: Bytes that the largest recomputed part keeps while its backward runs, by recomputation policy.
        sent: Bytes sent in a step, by kind.
        seconds: Time of a step's micro-batches, without waiting.
    """

    layers: list[range]
    states: States
    activations: dict[str, float]
    again: dict[str, float]
    sent: dict[str, float]
    seconds: float

    def memory(self, choice: str) -> float:
        """Bytes of device memory under a recomputation policy."""
        return self.states.on_device + self.activations[choice] + self.again[choice]


@dataclass(frozen=True)
class Plan:
    """The plan of one layout on a cluster.

    Attributes:
        config: The run.
        cluster: The cluster.
        data_parallel: Data-parallel size.
        micro_batches: Micro-batches per data-parallel rank in a step.
        stages: The pipeline stages.
        bubble: Share of the step in which a stage waits for other stages.
        seconds: Time of a step.
        utilization: Model FLOPs utilization: the model's operations over the peak of all devices in that time.
        tokens_per_second: Throughput of one device.
        by_layer: Bytes of a micro-batch that each layer keeps on a rank without train.compression, and with it. Empty
            without it.
    """

    config: PretrainConfig
    cluster: ClusterConfig
    data_parallel: int
    micro_batches: int
    stages: list[Stage]
    bubble: float
    seconds: float
    utilization: float
    tokens_per_second: float
    by_layer: list[tuple[float, float]]

    @property
    def recompute(self) -> str:
        """The configuration's own policy, as a key of `choices`."""
        return _written(block_policy(self.config))

    def memory(self, choice: str | None = None) -> float:
        """Bytes on the fullest device under a recomputation policy; None takes the configuration's."""
        return max(stage.memory(choice or self.recompute) for stage in self.stages)

    @property
    def host_memory(self) -> float:
        """Bytes on the fullest host."""
        return self.cluster.devices * max(stage.states.host for stage in self.stages)

    @property
    def fits(self) -> bool:
        """Whether device and host memory suffice."""
        return self.memory() <= self.cluster.budget and self.host_memory <= self.cluster.host_memory * 1e9


def in_flight(chunk_bytes: Sequence[float], stage: int, stages: int, micro_batches: int) -> float:
    """Return the peak bytes a stage keeps under mcore's schedules: 1F1B, or interleaved 1F1B with several chunks.

    Args:
        chunk_bytes: Bytes that a micro-batch keeps in each of the stage's chunks.
        stage: Number of the stage.
        stages: Number of stages.
        micro_batches: Micro-batches per step.
    """
    chunks = len(chunk_bytes)
    total = micro_batches * chunks
    warm_up = stages - stage - 1 if chunks == 1 else 2 * (stages - stage - 1) + (chunks - 1) * stages
    # Forward pass k runs chunk (k div stages) mod chunks. Backward passes take the chunks in reverse.
    order = [k // stages % chunks for k in range(total)]
    kept = peak = 0.0
    for k in range(total):
        kept += chunk_bytes[order[k]]
        peak = max(peak, kept)
        if k >= warm_up:
            kept -= chunk_bytes[chunks - 1 - order[k - warm_up]]
    return peak


def states(parameters: Sequence[ParameterSpec], config: PretrainConfig, replicas: int, experts: int) -> States:
    """Return the bytes that an engine holds for a shard.

    The sizes were checked against the engines (tests/trainer/test_plan.py). Megatron holds DDP's buffers of parameters
    and of float32 gradients, and the distributed optimizer's shard of main parameters and moments. float32 parameters
    are their own main parameters. Frozen parameters have no gradients and no optimizer states.

    Args:
        parameters: The rank's shard.
        config: The run.
        replicas: Ranks over which the optimizer states of a parameter are sharded.
        experts: The same for a routed expert's parameter.
    """
    trained = _trained(parameters, config)
    if config.engine.name == "deepspeed":
        return _zero_states(parameters, trained, config, replicas)
    optimizer = 0.0
    for parameter in trained:
        copies = 2 if parameter.itemsize == MAIN else 3
        optimizer += parameter.numel * MAIN * copies / (experts if parameter.expert else replicas)
    return States(_weights(parameters), MAIN * _elements(trained), optimizer)


def _trained(parameters: Sequence[ParameterSpec], config: PretrainConfig) -> list[ParameterSpec]:
    return [parameter for parameter in parameters if matches(parameter.name, trained(config))]


def _elements(parameters: Sequence[ParameterSpec]) -> int:
    return sum(parameter.numel for parameter in parameters)


def _weights(parameters: Sequence[ParameterSpec]) -> int:
    return sum(parameter.numel * parameter.itemsize for parameter in parameters)


def _zero_states(
    parameters: Sequence[ParameterSpec], trained: Sequence[ParameterSpec], config: PretrainConfig, ranks: int
) -> States:
    """`states` under DeepSpeed, which keeps separate main parameters even in float32, and from ZeRO 1 on a bucket."""
    stage, offload, bf16 = config.engine.zero_stage, config.engine.offload, config.train.precision == "bf16"
    weights, main, gradients_of = _weights(parameters), MAIN * _elements(trained), _weights(trained)
    if stage == 0:
        return States(weights, main, 2 * main)
    optimizer = 3 * main / ranks
    # In bf16, ZeRO 1 accumulates in float32 beside the gradients of backward. ZeRO 2 in float32, and ZeRO 3 always,
    # pass Adam a copy of the rank's shard of the gradients.
    gradients = {1: main + gradients_of * bf16, 2: main / ranks * (1 if bf16 else 2), 3: 2 * main / ranks}[stage]
    held = weights / ranks if stage == 3 else weights
    host = (optimizer if offload != "none" else 0.0) + (held if offload == "parameters" else 0.0)
    bucket = float(MAIN * min(ZERO_BUCKET_ELEMENTS, _elements(parameters)))
    return States(held, gradients, optimizer, bucket + weights * _stays(parameters) * (stage == 3), host)


def _stays(parameters: Sequence[ParameterSpec]) -> float:
    """Return the share of the parameters that ZeRO 3 keeps from forward to backward, once it has traced the order."""
    return min(1.0, ZERO_REUSE_ELEMENTS / 2 / _elements(parameters))


class Planner:
    """Plans layouts of one model.

    Args:
        config: The run and the cluster. `plan` accepts other layouts of the same model.
        vocab_size: Rows of the embedding, padding included.
    """

    def __init__(self, config: PlanConfig, vocab_size: int) -> None:
        self._cluster, self._vocab_size = config.cluster, vocab_size
        self._bf16 = config.train.precision == "bf16"
        self._model = config.model
        self._dtype = torch.bfloat16 if self._bf16 else torch.float32
        self._run = DryRun(config.model, vocab_size, self._dtype)
        # Cached on the instance, so that its caches are freed with it.
        self._teacher = cache(lambda path: TeacherPlan(path, self._dtype))

    def plan(self, config: PretrainConfig) -> Plan:
        """Plan a configuration. Its layout must have been validated for the cluster's ranks."""
        cluster, parallel, train = self._cluster, config.parallel, config.train
        replicas = parallel.data_parallel(cluster.ranks)
        micro_batches = train.accumulation(replicas)
        chunks = parallel.stage_layers(config.model.num_layers)
        stages = [
            self._stage(config, number, chunks[number :: parallel.pipeline], micro_batches, replicas)
            for number in range(parallel.pipeline)
        ]
        waits = (parallel.pipeline - 1) / (parallel.virtual_pipeline * micro_batches)
        busy = max(stage.seconds for stage in stages)
        exchange = max(self._data_seconds(config, stage.sent, replicas) for stage in stages)
        seconds = busy * (1 + waits) + exchange
        tokens = train.global_batch_size * train.seq_len
        flops = tokens * (self._layer_flops(range(config.model.num_layers), train.seq_len) + self._head_flops())
        return Plan(
            config=config,
            cluster=cluster,
            data_parallel=replicas,
            micro_batches=micro_batches,
            stages=stages,
            bubble=busy * waits / seconds,
            seconds=seconds,
            utilization=flops / (seconds * cluster.ranks * cluster.peak(train.precision)),
            tokens_per_second=tokens / (seconds * cluster.ranks),
            by_layer=self._by_layer(config),
        )

    def _by_layer(self, config: PretrainConfig) -> list[tuple[float, float]]:
        own = block_policy(config)
        if own.compression is None:
            return []
        train = replace(config.train, compression=CompressionConfig())
        plain, rows = block_policy(replace(config, train=train)), train.micro_batch_size
        cut_to, tokens = _cut(config), _tokens(config)
        return [
            (
                rows * self._run.kept(self._run.kinds[layer], cut_to, tokens, plain),
                rows * self._run.kept(self._like(config, layer), cut_to, tokens, own),
            )
            for layer in range(config.model.num_layers)
        ]

    def _layer_flops(self, layers: range, seq_len: int) -> float:
        return sum(sum(self._run.flops(self._run.kinds[layer], seq_len)) for layer in layers)

    def _head_flops(self) -> float:
        return 6.0 * self._vocab_size * self._model.hidden_size

    def _stage(
        self, config: PretrainConfig, number: int, chunks: list[range], micro_batches: int, replicas: int
    ) -> Stage:
        parallel, train = config.parallel, config.train
        parameters = [spec for layers in chunks for spec in self._run.parameters(layers, _cut(config))]
        shared = replicas * parallel.context
        held = states(parameters, config, shared, shared * parallel.tensor // parallel.expert)
        taught_by = train.objective.needed_teacher
        if taught_by is not None:
            size = self._teacher(taught_by).memory(config, number, _cut(config), _tokens(config), micro_batches)
            held = replace(held, teacher=size)
        activations, again = {}, {}
        for name, choice in choices(config).items():
            kept = [self._chunk_kept(config, layers, choice) for layers in chunks]
            activations[name] = in_flight(kept, number, parallel.pipeline, micro_batches)
            again[name] = train.micro_batch_size * max(self._again(config, layers, choice) for layers in chunks)
        passes = micro_batches * train.micro_batch_size
        sent = {
            **{kind: size * passes for kind, size in self._sent_by_layers(config, chunks).items()},
            "pipeline": self._boundaries(chunks) * self._run.residual(_tokens(config), _cut(config)) * passes,
            **self._sent_by_data_parallel(config, parameters, chunks, shared, micro_batches),
        }
        operations = sum(self._operations(config, layers) for layers in chunks)
        if taught_by is not None:
            operations += self._teacher(taught_by).operations(config, number)
        compute = operations * passes / self._speed(config)
        messages = sum(
            sent[kind] / self._bandwidth(config, kind, replicas) for kind in ("tensor", "context", "expert", "pipeline")
        )
        return Stage(chunks, held, activations, again, sent, compute + messages)

    def _chunk_kept(self, config: PretrainConfig, layers: range, choice: BlockPolicy) -> float:
        """Bytes that a chunk keeps per micro-batch. Its output to the next stage is kept until the gradient arrives."""
        cut_to, tokens, rows = _cut(config), _tokens(config), config.train.micro_batch_size
        before, after = self._run.ends(cut_to, rows * tokens)
        kept = self._run.tables(layers, tokens) + sum(
            self._run.kept(self._like(config, layer), cut_to, tokens, choice) for layer in layers
        )
        kept = rows * kept + (before.kept if layers.start == 0 else 0)
        is_last = layers.stop == self._model.num_layers
        return kept + (after.kept if is_last else rows * self._run.residual(tokens, cut_to))

    def _sent_by_layers(self, config: PretrainConfig, chunks: list[range]) -> dict[str, float]:
        """Bytes that the layers send per row of a micro-batch, by group."""
        cut_to, tokens, own = _cut(config), _tokens(config), block_policy(config)
        before, after = self._run.ends(cut_to, tokens)
        sent = [self._run.sent(self._run.kinds[layer], cut_to, tokens, own) for layers in chunks for layer in layers]
        sent += [before.sent] if chunks[0].start == 0 else []
        sent += [after.sent] if chunks[-1].stop == self._model.num_layers else []
        return dict(zip(("tensor", "context", "expert"), map(sum, zip(*sent, strict=True)), strict=True))

    def _again(self, config: PretrainConfig, layers: range, choice: BlockPolicy) -> float:
        """Bytes, per row, that the largest recomputed part keeps while its backward runs, or that backward restores."""
        cut_to, tokens = _cut(config), _tokens(config)
        if _written(choice) == "none":
            widest = max(self._model.hidden_size, self._model.ffn_hidden_size // cut_to.tensor)
            item = 2 if self._bf16 else 4
            return 0.0 if choice.compression is None else float(RECENT * tokens * widest * item)
        kinds = {self._like(config, layer) for layer in layers}
        whole, left = (
            {kind: self._run.kept(kind, cut_to, tokens, policy) for kind in kinds} for policy in (EVERYTHING, choice)
        )
        return max(whole[kind] - left[kind] for kind in kinds)

    def _like(self, config: PretrainConfig, layer: int) -> int:
        """The first layer that keeps the same: with rules by layer each is its own."""
        compression = config.train.compression
        return layer if compression.modules or compression.by_stage else self._run.kinds[layer]

    def _boundaries(self, chunks: list[range]) -> int:
        """Number of times per row that a stage sends the residual stream, or its gradient, to another stage."""
        first = sum(layers.start == 0 for layers in chunks)
        last = sum(layers.stop == self._model.num_layers for layers in chunks)
        return 2 * len(chunks) - first - last

    def _operations(self, config: PretrainConfig, layers: range) -> float:
        """Operations per row on one rank, including recomputation."""
        train, parallel = config.train, config.parallel
        choice, total = block_policy(config), 0.0
        if train.objective.name == "align":
            aligned = self._teacher(train.objective.teacher).aligned(config)
            mixers = [
                self._run.flops(self._run.kinds[layer], train.seq_len)[0] for layer in aligned.intersection(layers)
            ]
            again = 4 / 3 if RECOMPUTE in (choice.mixer, choice.block) else 1.0
            return again * sum(mixers) * train.seq_len / (parallel.tensor * parallel.context)
        # The plan assumes balanced experts, so with a limit below the mean all of them are recomputed.
        experts = choice.recompute_above is not None and choice.recompute_above < 1
        for layer in layers:
            mixer, ffn = self._run.flops(self._run.kinds[layer], train.seq_len)
            again = mixer * (RECOMPUTE in (choice.mixer, choice.block))
            again += ffn * (experts or RECOMPUTE in (choice.ffn, choice.moe_experts, choice.block))
            # Forward is a third of the operations of both passes.
            total += mixer + ffn + again / 3
        if layers.stop == self._model.num_layers:
            total += self._head_flops()
        return total * train.seq_len / (parallel.tensor * parallel.context)

    def _sent_by_data_parallel(
        self,
        config: PretrainConfig,
        parameters: list[ParameterSpec],
        chunks: list[range],
        ranks: int,
        micro_batches: int,
    ) -> dict[str, float]:
        """Bytes of gradients and parameters sent in a step, by ring algorithms (trainer.communication)."""
        # ZeRO 0 to 2 all-reduce gradients; Megatron and ZeRO 3 reduce-scatter. ZeRO 2 and 3 do so per micro-batch.
        zero = config.engine.zero_stage if config.engine.name == "deepspeed" else None
        sums = 1.0 if zero in (None, 3) else 2.0
        sums *= micro_batches if zero in (2, 3) else 1
        # mcore 0.16.1 has a separate optimizer for experts, and each of the two optimizers gathers all parameters.
        optimizers = 1 + any(parameter.expert for parameter in parameters)
        gathers = {None: optimizers, 0: 0, 1: 1, 2: 1, 3: micro_batches * (2 - _stays(parameters))}[zero]
        sent = dict.fromkeys(("gradients", "parameters", "shares", "tied embedding"), 0.0)
        parallel = config.parallel
        for parameter in _trained(parameters, config):
            others = ranks * parallel.tensor // parallel.expert if parameter.expert else ranks
            share = (others - 1) / others
            sent["gradients"] += sums * share * parameter.numel * MAIN
            sent["parameters"] += gathers * share * parameter.numel * parameter.itemsize
            sent["shares"] += parameter.partial * 2 * (parallel.tensor - 1) / parallel.tensor * parameter.numel * MAIN
        ends = {layers.start == 0 for layers in chunks} | {layers.stop == self._model.num_layers for layers in chunks}
        if parallel.pipeline > 1 and self._model.tie_embeddings and True in ends:
            embedding = next(parameter for parameter in parameters if parameter.name == "embedding.weight")
            sent["tied embedding"] = float(embedding.numel * MAIN)
        return sent

    def _speed(self, config: PretrainConfig) -> float:
        return self._cluster.peak(config.train.precision) * self._cluster.efficiency

    def _data_seconds(self, config: PretrainConfig, sent: dict[str, float], replicas: int) -> float:
        kinds = [kind for kind in sent if kind not in ("tensor", "context", "expert", "pipeline")]
        return sum(sent[kind] / self._bandwidth(config, kind, replicas) for kind in kinds)

    def _bandwidth(self, config: PretrainConfig, kind: str, replicas: int) -> float:
        """Bytes per second. Ranks are numbered in mcore's order: tensor (fastest), context, data, pipeline."""
        parallel = config.parallel
        tensor, context = parallel.tensor, parallel.tensor * parallel.context
        data, pipeline = context * replicas, context * replicas * parallel.pipeline
        span = {
            "tensor": tensor,
            "expert": parallel.expert,
            "shares": tensor,
            "context": context,
            "gradients": data,
            "parameters": data,
        }
        within = span.get(kind, pipeline) <= self._cluster.devices
        return (self._cluster.intra_node if within else self._cluster.inter_node) * 1e9


def _cut(config: PretrainConfig) -> Cut:
    parallel = config.parallel
    return Cut(parallel.tensor, parallel.context, parallel.expert, parallel.sequence)


def _tokens(config: PretrainConfig) -> int:
    """Tokens of a row on one rank."""
    return config.train.seq_len // config.parallel.context
