"""The Megatron engine: mcore's schedules, DDP and distributed optimizer.

Checkpoints use the format of both engines (trainer.engines.pieces). mcore's distributed optimizer gives each
data-parallel rank, context-parallel ranks included, a range of every parameter bucket. A rank writes and reads the
elements that it updates. The first tensor-parallel rank writes tensors that are replicated over tensor-parallel ranks,
and the earliest stage writes those that several stages hold.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models import spiking
from models.config import ModelConfig
from models.decoder import Decoder, build
from models.moe.spawning import expert_weights, spawned
from models.parameters import Declared, Groups, declared, matches, parameter_rows, partial_gradients, set_trainable
from models.statistics import StepStatistics
from trainer.config import ParallelConfig
from trainer.data.batch import EXPERTS, Batch
from trainer.engines import groups, megatron_cpu, pieces
from trainer.engines.base import PendingSave, StepResult
from trainer.engines.common import Collectives, StepSums
from trainer.engines.frozen import AfterStage, FrozenModel, FrozenSpec
from trainer.engines.norms import sum_of_squares
from trainer.engines.pieces import Piece, Shard
from trainer.engines.spec import EngineSpec
from trainer.engines.timing import PhaseTimer
from trainer.objectives.alignment import Alignment, AnyObjective
from trainer.objectives.base import Objective, Outputs

with warnings.catch_warnings(), megatron_cpu.nothing_compiled():
    # At import mcore warns that TransformerEngine and Apex are missing. We want its torch fallbacks.
    warnings.simplefilter("ignore")
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.enums import ModelType
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
    from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.transformer import TransformerConfig


class Stage(nn.Module):
    """Consecutive layers of a decoder, with the attributes and methods that mcore's schedules need of a stage.

    `vp_stage` is the virtual pipeline stage on this rank, or None if the rank has a single stage.
    """

    model_type = ModelType.encoder_or_decoder

    def __init__(self, decoder: Decoder, config: TransformerConfig, vp_stage: int | None) -> None:
        super().__init__()
        self.part = decoder
        self.config = config
        self.vp_stage = vp_stage
        self.pre_process, self.post_process = decoder.is_first, decoder.is_last
        self.share_embeddings_and_output_weights = decoder.model_config.tie_embeddings
        self._entering: Tensor | None = None

    def hidden_states(self, batch: Batch, experts: Tensor | None = None) -> Tensor:
        """Return the hidden states of a micro-batch that the next stage, or the head, reads."""
        return self.part.hidden_states(
            batch.tokens,
            batch.positions,
            batch.documents,
            entering=self._entering,
            origin=batch.origin,
            experts=experts,
            prefix=batch.prefix,
        )

    def forward(
        self, batch: Batch, objective: Objective, frozen: Mapping[str, Outputs]
    ) -> Tensor | tuple[Tensor, Sequence[Tensor]]:
        """Apply the objective on the last stage. On the other stages return the next stage's input."""
        hidden = self.hidden_states(batch, batch.extra.get(EXPERTS))
        if not self.post_process:
            return hidden
        part = self.part
        return objective.forward(Outputs(hidden, part.head_weight, part.groups, frozen, part.value_head), batch)

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Store the previous stage's activations. The first stage has none, because it reads tokens."""
        self._entering = input_tensor[0] if isinstance(input_tensor, list) else input_tensor

    def shared_embedding_or_output_weight(self) -> Tensor:
        """Return the weight that mcore keeps equal on the first and the last stage."""
        assert self.part.embedding is not None, "asked of the first and the last stage, where it is shared"
        return self.part.embedding.weight


class MegatronEngine:
    """See trainer.engines.base.Engine.

    Args:
        spec: The model, its optimizer and its layout.
        device: Device to train on.
    """

    def __init__(self, spec: EngineSpec, device: torch.device) -> None:
        self.device = device
        self._on_cpu = device.type == "cpu"
        if self._on_cpu:
            megatron_cpu.adapt()
        initialize_groups(device, spec.parallel, spec.collective_seconds)
        if not self._on_cpu:
            tensor_parallel.model_parallel_cuda_manual_seed(spec.seed)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.data_parallel_rank = parallel_state.get_data_parallel_rank()
        self.data_parallel_size = parallel_state.get_data_parallel_world_size()
        sharing = parallel_state.get_model_parallel_group(), parallel_state.get_context_parallel_group()
        self.collectives = Collectives(device, all(dist.get_rank(group) == 0 for group in sharing))
        self._clip = spec.optim.clip_grad
        self._parallel, self._model_config, self._seed = spec.parallel, spec.model, spec.seed
        self._groups = layer_groups(spec.parallel)
        dtype = torch.bfloat16 if spec.precision == "bf16" else torch.float32
        transformer_config = _transformer_config(spec, dtype)
        self._stages = [
            self._wrap(Stage(decoder, transformer_config, number if spec.parallel.virtual_pipeline > 1 else None))
            for number, decoder in enumerate(self._build_decoders(spec, dtype))
        ]
        for stage in self._stages:
            # Fill after wrapping: mcore copies parameters into its own buffers, and unwritten memory takes no room.
            spec.fill(stage.module.part)
        no_sync = [stage.no_sync for stage in self._stages]
        transformer_config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
        transformer_config.finalize_model_grads_func = self._finalize_gradients
        self._decoders: list[Decoder] = [stage.module.part for stage in self._stages]
        self.model = self._decoders[0]
        self.model_is_whole = self.model.is_whole
        self._optimizer = self._build_optimizer(spec, dtype)
        # Counted here, because the optimizer's state may be empty: with small parameters a rank may own no range.
        self._updates = 0
        self._statistics = StepStatistics(spec.model, self._decoders, spec.measure_every)
        self._timer = PhaseTimer(device)
        self._owned: dict[Tensor, _Owned] = dict(_owned_parts(self._optimizer.chained_optimizers))
        # Main parameters that the current phase does not train.
        self._resting: list[Tensor] = []
        self._is_float32 = dtype == torch.float32
        self._writer = pieces.Writer(self.rank, self.world_size, groups.saving_group())
        self._forward_backward = get_forward_backward_func()

    def _build_decoders(self, spec: EngineSpec, dtype: torch.dtype) -> Iterator[Decoder]:
        """Build this rank's shards of its pipeline stages, not yet filled."""
        stages = spec.parallel.stage_layers(spec.model.num_layers)
        for layers in stages[parallel_state.get_pipeline_model_parallel_rank() :: spec.parallel.pipeline]:
            decoder = build(
                spec.model,
                spec.vocab_size,
                layers,
                groups=self._groups,
                dtype=dtype,
                device=self.device,
                value_head=spec.value_head is not None,
            )
            decoder.keep(spec.saved_activations)
            set_trainable(decoder, spec.trainable)
            for row in parameter_rows(decoder).values():
                self._describe_to_mcore(row, decoder)
            yield decoder

    def _describe_to_mcore(self, row: Declared, decoder: Decoder) -> None:
        """Set the attributes that tell mcore how to reduce a parameter's gradient and count it in the norm."""
        parameter: Any = row.tensor
        if row.group(self._groups) is not None or row.placement.expert:
            # Counts in the norm on every rank. mcore treats an expert as a distinct parameter, sharded or not.
            tensor_parallel.set_tensor_model_parallel_attributes(parameter, True, row.axis, 1)
        if row.placement.expert:
            # mcore then reduces it over the expert-data-parallel group: the ranks that hold the same experts.
            parameter.allreduce = False
        if row.name in decoder.copies():
            parameter.shared = True
        if self._parallel.pipeline > 1 and row.name in decoder.summed_over_stages():
            # The distributed optimizer must shard it equally on all stages. mcore gives such parameters their own
            # bucket.
            parameter.shared_embedding = True

    def _wrap(self, stage: Stage) -> DistributedDataParallel:
        ddp_config = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=True,
            # gloo has no streams to overlap on.
            overlap_grad_reduce=not self._on_cpu and self.data_parallel_size > 1,
        )
        return DistributedDataParallel(stage.config, ddp_config, stage)

    def _finalize_gradients(self, stages: list[DistributedDataParallel], *args: Any, **kwargs: Any) -> None:
        """Run mcore's gradient reductions, then those that mcore does not know. mcore's schedule ends with this."""
        with self._timer.phase("reduce"):
            finalize_model_grads(stages, *args, **kwargs)
            self._sum_shared_gradients(stages)

    def _sum_shared_gradients(self, stages: list[DistributedDataParallel]) -> None:
        """Sum partial gradients over tensor-parallel ranks, and the lower bounds' gradients over pipeline stages."""
        decoders = [stage.module.part for stage in stages]
        shares: list[Any] = [
            parameter for decoder in decoders for parameter in partial_gradients(decoder, self._groups)
        ]
        if shares:
            _all_reduce_together([parameter.main_grad for parameter in shares], self._groups.tensor)
        model = decoders[0].model_config
        if model.bounded_layers() and len(self._parallel.stage_layers(model.num_layers)) > 1:
            own = [
                decoder.lower_bounds.main_grad
                for decoder in decoders
                if decoder.lower_bounds is not None and decoder.lower_bounds.requires_grad
            ]
            total = torch.zeros(model.num_layers, model.hidden_size, device=self.device)
            for gradient in own:
                total += gradient
            dist.all_reduce(total, group=parallel_state.get_pipeline_model_parallel_group())
            for gradient in own:
                gradient.copy_(total)

    def _build_optimizer(self, spec: EngineSpec, dtype: torch.dtype) -> Any:
        optim = spec.optim
        optimizer_config = OptimizerConfig(
            optimizer="adam",
            lr=optim.lr,
            weight_decay=optim.weight_decay,
            adam_beta1=optim.beta1,
            adam_beta2=optim.beta2,
            adam_eps=optim.eps,
            clip_grad=optim.clip_grad,
            bf16=dtype == torch.bfloat16,
            params_dtype=dtype,
            use_distributed_optimizer=True,
        )
        rows = [row for decoder in self._decoders for row in parameter_rows(decoder).values()]
        decayed = {id(row.tensor) for row in rows if row.placement.decayed}
        undecayed = ParamWithNamePredicate(name="undecayed", fn=lambda param, name: id(param) not in decayed)
        overrides = {ParamKey(with_name_predicate=undecayed): {"wd_mult": 0.0}}
        if spec.value_head is not None:
            of_values = ParamWithNamePredicate(name="value_head", fn=lambda param, name: ".value_head." in name)
            overrides[ParamKey(with_name_predicate=of_values)] = {"lr_mult": spec.value_head}
        with self._accepted_types():
            optimizer = get_megatron_optimizer(
                optimizer_config,
                self._stages,
                config_overrides=overrides,
                use_gloo_process_groups=False,
            )
        for part in optimizer.chained_optimizers:
            for group in part.param_groups:
                group["weight_decay"] = optim.weight_decay * group["wd_mult"]
                if isinstance(part.optimizer, torch.optim.AdamW):
                    # mcore falls back to unfused torch AdamW, which passes over memory ten times instead of once.
                    group["fused"] = True
            _allocate_state(part.optimizer)
        return optimizer

    def _accepted_types(self) -> AbstractContextManager[None]:
        """Return a context in which mcore's type checks accept this device's tensors."""
        return megatron_cpu.cpu_tensors_pass_for_cuda() if self._on_cpu else nullcontext()

    def train_step(self, batches: Sequence[Batch], objective: AnyObjective, lr: float, step: int = 0) -> StepResult:
        """Run forward and backward over this rank's micro-batches, then update number `step` at learning rate `lr`."""
        if self._model_config.moe.spawns_at(step):
            self._spawn_experts()
        self._statistics.begin(step)
        with self._timer.phase("forward_backward"):
            for stage in self._stages:
                stage.zero_grad_buffer()
            self._optimizer.zero_grad()
            totals = self._totals(self._run(batches, objective, forward_only=False), objective)
            counted = self._statistics.collect()
        with self._timer.phase("reduce"):
            loss, count, *rest = self.collectives.sum_over_ranks([*totals, *counted])
        sums = StepSums.of(objective, loss, count, rest)
        with self._timer.phase("optimizer"):
            grad_norm = self._update(lr, sums.is_finite)
        result = sums.finish(grad_norm, self._statistics, self._timer)
        if not result.skipped:
            stage_ranks = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
            spiking.finish_step(self._decoders, stage_ranks)
        return result

    def _update(self, lr: float, loss_is_finite: bool) -> float:
        """Clip and step unless the loss or the gradient is not finite. Return the gradient norm.

        mcore's own step() clips and updates in one call, which leaves no chance to skip in between.
        """
        optimizer = self._optimizer
        optimizer.prepare_grads()
        for main in self._resting:
            # Excludes it from the norm, and Adam skips it: no weight decay, no change of its moments.
            main.grad = None
        if self._resting:
            # In float32 these are views of parameters. torch warns when code reads a missing gradient of a non-leaf.
            warnings.filterwarnings("ignore", message=r"The \.grad attribute of a Tensor that is not a leaf")
        grad_norm = self._grad_norm()
        if not (loss_is_finite and math.isfinite(grad_norm)):
            return grad_norm
        if self._clip > 0:
            with self._accepted_types():
                for part in optimizer.chained_optimizers:
                    clip_grad_by_total_norm_fp32(part.get_parameters(), self._clip, grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_mult"]
        optimizer.step_with_ready_grads()
        self._updates += 1
        return grad_norm

    def _grad_norm(self) -> float:
        """Return the global gradient norm. mcore selects the one rank that counts a replicated gradient."""
        counted = [grad for part in self._optimizer.chained_optimizers for grad in part.get_main_grads_for_grad_norm()]
        (squares,) = self.collectives.sum_over_ranks([float(sum_of_squares(counted, self.device))])
        return math.sqrt(squares)

    def _spawn_experts(self) -> None:
        """Turn all routed experts into masked copies of the first. Adam's moments stay: the others' are zero."""
        moe = self._model_config.moe
        for decoder in self._decoders:
            for name, weight, writes_output in expert_weights(decoder):
                weight.data.copy_(spawned(weight, name, writes_output, moe, self._seed, self._groups))
        for part in self._optimizer.chained_optimizers:
            # mcore keeps experts in separate optimizers, so this rounds no other weight's float32 copy.
            if all(group["is_expert_parallel"] for group in part.param_groups):
                part.reload_model_params()

    def begin_phase(self, model: ModelConfig, trainable: Sequence[str]) -> None:
        """See `Engine.begin_phase`."""
        self._resting = []
        for decoder in self._decoders:
            decoder.rotate_by(model)
            for name, row in parameter_rows(decoder).items():
                if row.tensor in self._owned and not matches(name, trainable):
                    self._resting.append(self._owned[row.tensor].main)
        for part in self._optimizer.chained_optimizers:
            # A parameter that rested has had fewer updates. Its own count would change Adam's bias correction.
            _set_step(part.optimizer, self._updates)

    def evaluate(self, batches: Sequence[Batch], objective: AnyObjective) -> list[float]:
        """Return the objective's sum over this rank's micro-batches, then the sum of each metric, without gradients."""
        with torch.no_grad():
            found = self._run(batches, objective, forward_only=True)
        total, _, *sums = self._totals(found, objective)
        sums = [total, *sums]
        for group in (parallel_state.get_model_parallel_group(), parallel_state.get_context_parallel_group()):
            sums = self.collectives.sum_over_ranks(sums, group)
        return sums

    def _run(self, batches: Sequence[Batch], objective: AnyObjective, forward_only: bool) -> list[dict[str, Any]]:
        """Run the objective over the micro-batches. Return this stage's part of the sums of each micro-batch."""
        taken = list(batches)
        if self._parallel.virtual_pipeline > 1:
            # The interleaved schedule needs a multiple of the pipeline size. Padding micro-batches are dropped below.
            taken += taken[-1:] * (-len(taken) % self._parallel.pipeline)
        context = parallel_state.get_context_parallel_rank(), self._parallel.context
        parts = [batch.part(*context) for batch in taken]
        if isinstance(objective, Alignment):
            return self._align(parts, objective, forward_only)[: len(batches)]
        frozen = {name: model.outputs(parts) for name, model in objective.models.items()}
        given = [
            _Given(part, i, {name: found[i] for name, found in frozen.items() if found}) for i, part in enumerate(parts)
        ]
        step = partial(_forward_step, device=self.device, objective=objective)
        return self._schedule(self._stages, given, step, forward_only, self._model_config.sink_tokens)[: len(batches)]

    def _align(self, parts: Sequence[Batch], objective: Alignment, forward_only: bool) -> list[dict[str, Any]]:
        """Run the teacher, and after each of its stages the mixers to align, forward and backward.

        Layers are independent, so a stage sends nothing but the teacher's activations.
        """
        is_last = parallel_state.is_pipeline_last_stage(ignore_virtual=True)
        counts = [objective.count(part) * is_last for part in parts]
        found = [{"sum": 0.0, "count": count, **dict.fromkeys(objective.metrics, 0.0)} for count in counts]

        def align(number: int, stage: int, batch: Batch) -> None:
            # Gradients are reduced below, once all stages and micro-batches have added to them.
            with torch.set_grad_enabled(not forward_only), self._stages[stage].no_sync():
                total, sums = objective.forward(self._decoders[stage], batch)
                if total.requires_grad:
                    total.backward()  # type: ignore[no-untyped-call]
            for name, value in zip(("sum", *objective.metrics), (total.detach(), *sums), strict=True):
                found[number][name] = found[number][name] + value

        objective.teacher.visit(parts, align)
        if not forward_only:
            for stage in self._stages:
                for group in stage.bucket_groups + stage.expert_parallel_bucket_groups:
                    # With overlapped reductions mcore expects that they have been started, but in its first batch.
                    if group.ddp_config.overlap_grad_reduce and not group.is_first_batch:
                        group.start_grad_sync()
            self._finalize_gradients(self._stages, torch.tensor(sum(counts), dtype=torch.int, device=self.device))
        return found

    def _schedule(
        self, stages: list[Any], given: Sequence[_Given], step: Callable[..., Any], forward_only: bool, sinks: int
    ) -> list[Any]:
        """Run mcore's schedule over micro-batches. Return the last stage's result of each, on its ranks only."""
        iterators = [iter(given) for _ in stages]
        rows, seq_len = given[0].batch.tokens.shape
        found: list[Any] = self._forward_backward(
            forward_step_func=step,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=stages,
            num_microbatches=len(given),
            # Length of the whole row: mcore divides it by the context-parallel size. Each rank sends all sinks.
            seq_length=(seq_len + sinks) * self._parallel.context,
            micro_batch_size=rows,
            forward_only=forward_only,
        )
        return found

    def freeze(self, spec: FrozenSpec) -> FrozenModel:
        """See `Engine.freeze`."""
        parallel = self._parallel if spec.stages_as_trained else replace(self._parallel, pipeline_layers=None)
        spec.require_fit(self.model.vocab_size, parallel)
        config = _transformer_config(EngineSpec(spec.model, spec.vocab_size, parallel=parallel), spec.dtype)
        layers = parallel.stage_layers(spec.model.num_layers)
        own = layers[parallel_state.get_pipeline_model_parallel_rank() :: parallel.pipeline]
        decoders = [spec.build(part, self._groups, self.device) for part in own]
        chunks = range(len(own)) if parallel.virtual_pipeline > 1 else [None]
        stages = [Stage(decoder, config, chunk) for decoder, chunk in zip(decoders, chunks, strict=True)]

        def run(batches: Sequence[Batch], after: AfterStage | None) -> list[Tensor]:
            given = [_Given(batch, number, {}) for number, batch in enumerate(batches)]
            step = partial(_frozen_step, device=self.device, after=after)
            return self._schedule(stages, given, step, True, spec.model.sink_tokens)

        return FrozenModel(decoders, run)

    def _totals(self, found: list[dict[str, Any]], objective: AnyObjective) -> list[float]:
        """Sum, count and metrics of this rank's part of the micro-batches. Only tensor-parallel rank 0 is non-zero."""
        counts = parallel_state.get_tensor_model_parallel_rank() == 0
        names = ("sum", "count", *objective.metrics)
        return [float(sum(float(entry[name]) for entry in found) * counts) for name in names]

    def save(self, directory: Path) -> dict[str, str]:
        """Write parameters, optimizer and RNG state into an existing empty directory. Every rank calls this.

        Returns:
            On rank 0 the SHA-256 of every written file by name, after a flush to disk. Empty on other ranks.
        """
        return self._writer.write(self._written_parts(), self._updates, directory)

    def begin_save(self, directory: Path) -> PendingSave:
        """Snapshot the state that `save` would write. Training may continue at once. Every rank calls this."""
        return self._writer.begin(self._written_parts(), self._updates, directory)

    def _written_parts(self) -> dict[str, Piece]:
        """Return the pieces that this rank writes, by their names in a checkpoint."""
        parts: dict[str, Piece] = {}
        first_of_tensor_ranks = parallel_state.get_tensor_model_parallel_rank() == 0
        for decoder in self._decoders:
            copies = decoder.copies()
            for name, row in declared(decoder).items():
                # The first tensor-parallel rank writes replicated tensors. Experts are an exception: each rank updates
                # another range of them.
                alike = row.group(self._groups) is None and not row.placement.expert
                if name not in copies and (first_of_tensor_ranks or not alike):
                    parts |= self._written(row)
        return parts

    def _written(self, row: Declared) -> dict[str, Piece]:
        """Return this rank's pieces of a parameter or buffer, by their names in a checkpoint."""
        if (owned := self._owned.get(row.tensor)) is not None:
            shard = Shard.of(row.tensor, *row.place(self._groups))
            main, moments = owned.pieces(shard)
            model = main if self._is_float32 else owned.as_the_model_reads_it(row.tensor, shard)
            return pieces.stored(row.name, model, None if self._is_float32 else main, moments)
        if row.tensor.requires_grad:
            # Another data-parallel rank updates it.
            return {}
        replicas = (
            (parallel_state.get_expert_data_parallel_rank(), parallel_state.get_expert_data_parallel_world_size())
            if row.placement.expert
            else (
                parallel_state.get_data_parallel_rank(with_context_parallel=True),
                parallel_state.get_data_parallel_world_size(with_context_parallel=True),
            )
        )
        return {pieces.MODEL + row.name: self._whole_shard(row).share(*replicas)}

    def _whole_shard(self, row: Declared) -> Piece:
        """Return this rank's whole shard of a frozen parameter or a buffer."""
        return Piece(Shard.of(row.tensor, *row.place(self._groups)), 0, row.tensor.detach().view(-1))

    def load(self, directory: Path) -> None:
        """Load a checkpoint of either engine, written under any layout."""
        reader = pieces.Reader(directory)
        for decoder in self._decoders:
            # One stage at a time, because two stages of a rank may have parameters of the same name.
            parts: dict[str, Piece] = {}
            for name, row in declared(decoder).items():
                if (owned := self._owned.get(row.tensor)) is not None:
                    main, moments = owned.pieces(Shard.of(row.tensor, *row.place(self._groups)))
                    parts |= reader.optimizer_state(name, main, moments)
                elif not row.tensor.requires_grad:
                    parts[pieces.MODEL + name] = self._whole_shard(row)
            reader.read(parts)
        self._updates = reader.adam_step
        for part in self._optimizer.chained_optimizers:
            _set_step(part.optimizer, reader.adam_step)
            # As after every update: round the main parameters to the model's dtype, then all-gather them.
            part._copy_main_params_to_model_params()
        for stage in self._stages:
            stage.start_param_sync()
        reader.restore_random_state(self.rank, self.world_size)

    def close(self) -> None:
        """Destroy the process groups and free the optimizer's state."""
        # Parameter shards have a grad_fn that refers, through the hooks of mcore's DDP, back to the optimizer. This
        # cycle runs through C++, where Python's collector does not see it, so the engine would never be freed.
        self._optimizer, self._owned = None, {}
        groups.close()


@dataclass(frozen=True)
class _Given:
    """A stage's input from the schedule: a micro-batch and, on the last stage, the frozen models' outputs for it."""

    batch: Batch
    number: int
    frozen: Mapping[str, Outputs]


def _frozen_step(
    given: Iterator[_Given], stage: Any, *, device: torch.device, after: AfterStage | None
) -> tuple[Tensor, Any]:
    """Mcore's forward_step_func for a frozen model. Without a loss the schedule collects the last stage's outputs."""
    own = next(given)
    batch = own.batch.to(device)
    hidden = stage.hidden_states(batch)
    if after is None:
        return hidden, None
    after(own.number, stage.vp_stage or 0, batch)
    # As the loss: a sum, a count, and what the schedule collects.
    return hidden, lambda hidden: (hidden, torch.zeros((), dtype=torch.int, device=device), None)


def _forward_step(
    given: Iterator[_Given], stage: Any, *, device: torch.device, objective: Objective
) -> tuple[Any, Any]:
    """Mcore's forward_step_func. The loss is a sum with a count, as calculate_per_token_loss expects."""
    own = next(given)
    count = objective.count(own.batch)
    batch = own.batch.to(device)

    def loss(found: tuple[Tensor, Sequence[Tensor]]) -> tuple[Tensor, Tensor, dict[str, Any]]:
        total, sums = found
        named = dict(zip(objective.metrics, sums, strict=True))
        divisor = torch.tensor(count, dtype=torch.int, device=device)
        return total, divisor, {"sum": total.detach(), "count": count, **named}

    return stage(batch, objective, own.frozen), loss


def initialize_groups(device: torch.device, parallel: ParallelConfig, seconds: float) -> None:
    """Create the process groups of a layout, starting with the group of all ranks, unless they exist.

    Collectives time out after `seconds`.
    """
    groups.initialize(device, seconds)
    if not parallel_state.is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor,
            pipeline_model_parallel_size=parallel.pipeline,
            virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
            context_parallel_size=parallel.context,
            expert_model_parallel_size=parallel.expert,
            # Each expert is whole on one rank, so expert parallelism may span all ranks of a pipeline stage.
            expert_tensor_parallel_size=1,
            create_gloo_process_groups=False,
        )


def layer_groups(parallel: ParallelConfig) -> Groups:
    """Return the process groups over which the layers are sharded."""
    return Groups(
        tensor=parallel_state.get_tensor_model_parallel_group() if parallel.tensor > 1 else None,
        context=parallel_state.get_context_parallel_group() if parallel.context > 1 else None,
        sequence=parallel.sequence,
        expert=parallel_state.get_expert_model_parallel_group() if parallel.expert > 1 else None,
    )


def _all_reduce_together(tensors: list[Tensor], group: dist.ProcessGroup | None) -> None:
    """Sum each tensor over the group, in place, with a single all-reduce."""
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat, group=group)
    for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(total.view_as(tensor))


def _transformer_config(spec: EngineSpec, dtype: torch.dtype) -> TransformerConfig:
    """Build the configuration for mcore's schedules and DDP. The layers are ours and read models.config instead."""
    parallel = spec.parallel
    return TransformerConfig(
        # One layer per stage here, because mcore would refuse our uneven splits over stages.
        num_layers=parallel.pipeline * parallel.virtual_pipeline,
        hidden_size=spec.model.hidden_size,
        num_attention_heads=parallel.tensor,
        tensor_model_parallel_size=parallel.tensor,
        sequence_parallel=parallel.sequence,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        context_parallel_size=parallel.context,
        # With two stages each is both the next and the previous stage of the other, and the interleaved schedule sends
        # in both directions at once. A batch matches messages by order alone, and would mix them up.
        batch_p2p_comm=parallel.virtual_pipeline == 1,
        calculate_per_token_loss=True,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        gradient_accumulation_fusion=False,
    )


def _allocate_state(optimizer: Any) -> None:
    """Allocate Adam's moments and step of every parameter now.

    Loading reads into them. torch's AdamW keeps the step with each parameter, unlike TransformerEngine's.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            if "exp_avg" not in state:
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)


def _set_step(optimizer: Any, step: int) -> None:
    """Set the number of updates that Adam has made."""
    if isinstance(optimizer, torch.optim.AdamW):
        for state in optimizer.state.values():
            state["step"].fill_(step)
    else:
        # TransformerEngine's Adam keeps the step with the parameter group.
        for group in optimizer.param_groups:
            group["step"] = step


@dataclass(frozen=True)
class _Owned:
    """The elements start .. start + n of a flattened shard that this rank updates.

    Attributes:
        start: First element.
        main: The main parameter's float32 values [n]. In float32 training, a view of the parameter.
        state: Adam's moments [n], by name.
    """

    start: int
    main: Tensor
    state: dict[str, Tensor]

    def pieces(self, shard: Shard) -> tuple[Piece, dict[str, Piece]]:
        """Return the main values and the moments as pieces."""
        moments = {key: Piece(shard, self.start, self.state[key].detach()) for key in pieces.MOMENTS}
        return Piece(shard, self.start, self.main.detach()), moments

    def as_the_model_reads_it(self, parameter: Tensor, shard: Shard) -> Piece:
        """Return the model's own values for the same elements, in the parameter's dtype."""
        return Piece(shard, self.start, parameter.detach().view(-1)[self.start : self.start + self.main.numel()])


def _owned_parts(optimizers: list[Any]) -> Iterator[tuple[nn.Parameter, _Owned]]:
    """Yield each parameter that this rank updates at least in part, with the elements that it updates."""
    for part in optimizers:
        by_type = (
            (part.model_float16_groups, part.shard_fp32_from_float16_groups),
            (part.model_fp32_groups, part.shard_fp32_groups),
        )
        for parameters, mains in (
            (group, own) for of_type, owns in by_type for group, own in zip(of_type, owns, strict=True)
        ):
            for parameter, main in zip(parameters, mains, strict=True):
                start = part._get_model_param_range_map(parameter)["param"].start
                yield parameter, _Owned(start, main, part.optimizer.state[main])
