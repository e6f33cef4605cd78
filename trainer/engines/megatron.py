"""The Megatron engine: mcore's schedules, DDP, distributed optimizer and dist_checkpointing."""

import itertools
import math
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.decoder import Decoder, no_weight_decay
from models.moe import statistics
from models.moe.spawning import expert_weights, spawned
from models.parallel import (
    Groups,
    cast_parameters,
    cut,
    expert_parameters,
    keep_float32,
    partial_gradients,
    sharded_parameters,
    sharded_state_dict,
)
from trainer import weights
from trainer.config import ParallelConfig, PretrainConfig
from trainer.data.batch import Batch
from trainer.engines import groups, megatron_cpu
from trainer.engines.base import PendingSave, StepResult
from trainer.engines.random_state import random_state, set_random_state

with warnings.catch_warnings(), megatron_cpu.nothing_compiled():
    # mcore says at import that TransformerEngine and Apex are missing; the torch fallbacks are what we want.
    warnings.simplefilter("ignore")
    from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
    from megatron.core.dist_checkpointing.mapping import ShardedObject
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

# The one format of 0.16.1 that loads under another layout; see DistributedOptimizer.sharded_state_dict.
_CHECKPOINT_METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


class Stage(nn.Module):
    """Consecutive layers of a decoder with what mcore's schedules ask of a pipeline stage.

    `vp_stage` counts the stages of one rank, None where it has one.
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

    def forward(self, batch: Batch) -> Tensor:
        """Loss of a micro-batch, summed over its tokens (nats); what the next stage takes, if there is one."""
        output = self.part(
            batch.tokens, batch.positions, batch.cu_seqlens, batch.labels, batch.loss_mask, self._entering
        )
        return output[0] if self.post_process else output

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Take the activations of the previous stage; the first stage reads tokens and has none."""
        self._entering = input_tensor[0] if isinstance(input_tensor, list) else input_tensor

    def shared_embedding_or_output_weight(self) -> Tensor:
        """The weight that mcore keeps equal on the first and the last stage."""
        assert self.part.embedding is not None, "asked of the first and the last stage, where it is shared"
        return self.part.embedding.weight

    def sharded_state_dict(self) -> dict[str, Any]:
        """The parameters, for dist_checkpointing."""
        return sharded_state_dict(self.part, "model.", self.part.copies())


class MegatronEngine:
    """See trainer.engines.base.Engine.

    Args:
        config: The run.
        vocab_size: Rows of the embedding, padding included.
        device: Where to train.
    """

    def __init__(self, config: PretrainConfig, vocab_size: int, device: torch.device) -> None:
        self.device = device
        self._on_cpu = device.type == "cpu"
        if self._on_cpu:
            megatron_cpu.adapt()
        initialize_groups(device, config.parallel, config.run.collective_seconds)
        if not self._on_cpu:
            tensor_parallel.model_parallel_cuda_manual_seed(config.train.seed)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.data_parallel_rank = parallel_state.get_data_parallel_rank()
        self.data_parallel_size = parallel_state.get_data_parallel_world_size()
        self._clip = config.optim.clip_grad
        self._parallel, self._model_config, self._seed = config.parallel, config.model, config.train.seed
        self._groups = layer_groups(config.parallel)
        dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
        transformer_config = _transformer_config(config, dtype)
        self._stages = [
            self._wrap(Stage(decoder, transformer_config, number if config.parallel.virtual_pipeline > 1 else None))
            for number, decoder in enumerate(self._build_decoders(config, vocab_size, dtype))
        ]
        no_sync = [stage.no_sync for stage in self._stages]
        transformer_config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
        transformer_config.finalize_model_grads_func = self._finalize_gradients
        self._decoders: list[Decoder] = [stage.module.part for stage in self._stages]
        self.model = self._decoders[0]
        self.model_is_whole = self.model.is_whole
        self._optimizer = self._build_optimizer(config, dtype)
        self._forward_backward = get_forward_backward_func()

    def _build_decoders(self, config: PretrainConfig, vocab_size: int, dtype: torch.dtype) -> Iterator[Decoder]:
        """The stages of the model that this rank has, begun as the whole is, and of them its part."""
        stages = config.parallel.stage_layers(config.model.num_layers)
        for layers in stages[parallel_state.get_pipeline_model_parallel_rank() :: config.parallel.pipeline]:
            decoder = Decoder(config.model, vocab_size, layers)
            weights.start(decoder, config)
            cut(decoder, self._groups)
            decoder.recompute(config.train.recomputed_parts)
            cast_parameters(decoder, dtype)
            decoder.to(self.device)
            # What mcore's norm of the gradient must not count twice.
            for parameter, axis in sharded_parameters(decoder) if self._groups.tensor is not None else ():
                tensor_parallel.set_tensor_model_parallel_attributes(parameter, True, axis, 1)
            for parameter in expert_parameters(decoder):
                # Summed over the ranks that have the same experts. To mcore's norm each is a parameter of its own.
                vars(parameter)["allreduce"] = False
                tensor_parallel.set_tensor_model_parallel_attributes(parameter, True, 0, 1)
            parameters: dict[str, Any] = dict(decoder.named_parameters())
            for name in decoder.copies():
                parameters[name].shared = True
            # Summed over stages, so these are to be cut over data-parallel ranks alike: mcore gives them a bucket each.
            for name, parameter in parameters.items():
                tied = config.model.tie_embeddings and name == "embedding.weight"
                if config.parallel.pipeline > 1 and (tied or name == "lower_bounds"):
                    parameter.shared_embedding = True
            yield decoder

    def _wrap(self, stage: Stage) -> DistributedDataParallel:
        ddp_config = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=True,
            # gloo has no stream to overlap on.
            overlap_grad_reduce=not self._on_cpu and self.data_parallel_size > 1,
        )
        return DistributedDataParallel(stage.config, ddp_config, stage)

    def _finalize_gradients(self, stages: list[DistributedDataParallel], *args: Any, **kwargs: Any) -> None:
        """Mcore's sums over ranks, then those it does not know: over shares of what tensor-parallel ranks share, and
        of the lower bounds over pipeline stages.
        """
        finalize_model_grads(stages, *args, **kwargs)
        decoders = [stage.module.part for stage in stages]
        shares: list[Any] = [
            parameter for decoder in decoders for parameter in partial_gradients(decoder, self._groups)
        ]
        if shares:
            _all_reduce_together([parameter.main_grad for parameter in shares], self._groups.tensor)
        model = decoders[0].model_config
        if model.bounded_layers() and len(self._parallel.stage_layers(model.num_layers)) > 1:
            own = [decoder.lower_bounds.main_grad for decoder in decoders if decoder.lower_bounds is not None]
            total = torch.zeros(model.num_layers, model.hidden_size, device=self.device)
            for gradient in own:
                total += gradient
            dist.all_reduce(total, group=parallel_state.get_pipeline_model_parallel_group())
            for gradient in own:
                gradient.copy_(total)

    def _build_optimizer(self, config: PretrainConfig, dtype: torch.dtype) -> Any:
        optim = config.optim
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
        undecayed = ParamWithNamePredicate(name="no_weight_decay", fn=lambda param, name: no_weight_decay(name, param))
        # DistributedOptimizer mixes up the states of a group that holds two dtypes: float32 parameters get their own.
        float32 = ParamWithNamePredicate(name="keep_float32", fn=lambda _, name: keep_float32(name))
        overrides = {
            ParamKey(with_name_predicate=undecayed): {"wd_mult": 0.0},
            ParamKey(with_name_predicate=float32): {"group": "float32"},
        }
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
                    # mcore falls back to torch's AdamW unfused: ten passes over memory in place of one.
                    group["fused"] = True
            _allocate_state(part.optimizer)
            _carry_step(part)
        return optimizer

    def _accepted_types(self) -> AbstractContextManager[None]:
        """Where mcore insists on CUDA tensors."""
        return megatron_cpu.cpu_tensors_pass_for_cuda() if self._on_cpu else nullcontext()

    def train_step(self, batches: Iterator[Batch], micro_batches: int, lr: float, step: int = 0) -> StepResult:
        """Forward and backward over this rank's micro-batches, one update at learning rate `lr`, the `step`-th."""
        if self._model_config.moe.spawns_at(step):
            self._spawn_experts()
        statistics.begin_step(self._decoders, step)
        for stage in self._stages:
            stage.zero_grad_buffer()
        self._optimizer.zero_grad()
        losses = self._run(batches, micro_batches, forward_only=False)
        counted = statistics.collect(self._decoders, self._model_config)
        loss_sum, tokens, *counted = self._sum_over_ranks(*self._totals(losses), *counted)
        grad_norm = self._update(lr, math.isfinite(loss_sum))
        skipped = not (math.isfinite(loss_sum) and math.isfinite(grad_norm))
        if not skipped:
            statistics.finish_step(self._decoders, self._model_config, counted)
        metrics = statistics.metrics(self._model_config, counted)
        return StepResult(loss_sum / max(tokens, 1.0), grad_norm, int(tokens), skipped, metrics)

    def _update(self, lr: float, loss_is_finite: bool) -> float:
        """Clip and step, unless the loss or the gradient is not finite; return the norm of the gradient.

        mcore's own step() clips and updates in one call, with no chance to skip in between.
        """
        optimizer = self._optimizer
        optimizer.prepare_grads()
        grad_norm = float(optimizer.get_grad_norm())
        if not (loss_is_finite and math.isfinite(grad_norm)):
            return grad_norm
        if self._clip > 0:
            with self._accepted_types():
                for part in optimizer.chained_optimizers:
                    clip_grad_by_total_norm_fp32(part.get_parameters(), self._clip, grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step_with_ready_grads()
        return grad_norm

    def _spawn_experts(self) -> None:
        """Make all routed experts masked copies of the first. Adam's moments stay, those of the others zero."""
        moe = self._model_config.moe
        for decoder in self._decoders:
            for name, weight, writes_output in expert_weights(decoder):
                weight.data.copy_(spawned(weight, name, writes_output, moe, self._seed, self._groups))
        for part in self._optimizer.chained_optimizers:
            # mcore keeps experts apart, so that no other weight's float32 copy is rounded.
            if all(group["is_expert_parallel"] for group in part.param_groups):
                part.reload_model_params()

    def loss_sum(self, batches: Iterator[Batch], micro_batches: int) -> float:
        """Negative log-likelihood of this rank's micro-batches, summed (nats), without gradients."""
        with torch.no_grad():
            losses = self._run(batches, micro_batches, forward_only=True)
        loss_sum, _ = self._totals(losses)
        for group in (parallel_state.get_model_parallel_group(), parallel_state.get_context_parallel_group()):
            (loss_sum,) = self._sum_over_ranks(loss_sum, group=group)
        return loss_sum

    def _run(self, batches: Iterator[Batch], micro_batches: int, forward_only: bool) -> list[dict[str, Tensor]]:
        """Mcore's schedule over the micro-batches; their losses, on the last stage only."""
        taken = list(itertools.islice(batches, micro_batches))
        if self._parallel.virtual_pipeline > 1:
            # The interleaved schedule takes as many micro-batches as there are stages, or a multiple.
            taken += taken[-1:] * (-len(taken) % self._parallel.pipeline)
        rows, seq_len = taken[0].tokens.shape
        context = parallel_state.get_context_parallel_rank(), self._parallel.context
        parts = [batch.part(*context) for batch in taken]
        iterators = [iter(parts) for _ in self._stages]
        losses: list[dict[str, Tensor]] = self._forward_backward(
            forward_step_func=partial(_forward_step, device=self.device),
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self._stages,
            num_microbatches=len(parts),
            seq_length=seq_len,
            micro_batch_size=rows,
            forward_only=forward_only,
        )
        return losses[:micro_batches]

    def _totals(self, losses: list[dict[str, Tensor]]) -> list[float]:
        """Loss and tokens of this rank's part of the micro-batches; one of its tensor-parallel ranks counts it."""
        counts = parallel_state.get_tensor_model_parallel_rank() == 0
        return [float(sum(float(entry[name]) for entry in losses) * counts) for name in ("loss_sum", "tokens")]

    def _sum_over_ranks(self, *values: float, group: dist.ProcessGroup | None = None) -> list[float]:
        """Sum over a group, by default all ranks, in float64."""
        if dist.get_world_size(group) == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total, group=group)
        sums: list[float] = total.tolist()
        return sums

    def all_reduce(self, values: list[float]) -> list[float]:
        """Sum over the data-parallel ranks, in float64."""
        # Over all ranks, each data-parallel one as often as it has ranks: what one alone knows, a signal, must come
        # to all.
        share = self.data_parallel_size / self.world_size
        return [total * share for total in self._sum_over_ranks(*values)]

    def broadcast(self, value: Any) -> Any:
        """Rank 0's picklable object, on every rank."""
        holder = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(holder, src=0)
        return holder[0]

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.world_size > 1:
            dist.barrier()

    def save(self, directory: Path) -> None:
        """Write parameters, optimizer and RNG state into an existing empty directory; every rank calls it."""
        dist_checkpointing.save(self._checkpoint_state(is_loading=False), str(directory))

    def begin_save(self, directory: Path) -> PendingSave:
        """Copy what `save` would write; training may go on at once. Every rank calls it."""
        request: Any = dist_checkpointing.save(
            self._checkpoint_state(is_loading=False), str(directory), async_sharded_save=True
        )
        model = [tensor for decoder in self._decoders for tensor in (*decoder.parameters(), *decoder.buffers())]
        optimizers = [part.optimizer for part in self._optimizer.chained_optimizers]
        state = [tensor for adam in optimizers for values in adam.state.values() for tensor in values.values()]
        main = [tensor for adam in optimizers for group in adam.param_groups for tensor in group["params"]]
        _copy_what_is_trained(request, {t.untyped_storage().data_ptr() for t in (*model, *state, *main)})

        def write() -> None:
            if request.async_fn is not None:
                request.async_fn(*request.async_fn_args)

        def finish() -> None:
            for complete in request.finalize_fns:
                complete()

        return PendingSave(write, finish)

    def load(self, directory: Path) -> None:
        """Read what `save` wrote, under this layout or another."""
        template = self._checkpoint_state(is_loading=True)
        saved_ranks = dist_checkpointing.load_common_state_dict(str(directory))["world_size"]
        if saved_ranks != self.world_size:
            # The state of a random generator belongs to a rank; another layout starts from its own seed.
            del template["rng"]
        state = dist_checkpointing.load(template, str(directory))
        for number, stage in enumerate(self._stages):
            stage.module.part.load_state_dict(_strip_prefix(state[f"model{number}"]))
        self._optimizer.load_state_dict(state["optimizer"])
        for part in self._optimizer.chained_optimizers:
            _unshare_steps(part.optimizer)
        if "rng" in state:
            set_random_state(state["rng"])

    def _checkpoint_state(self, is_loading: bool) -> dict[str, Any]:
        model_state = {f"model{i}": stage.module.sharded_state_dict() for i, stage in enumerate(self._stages)}
        with self._accepted_types():
            optimizer_state = self._optimizer.sharded_state_dict(
                model_state, is_loading=is_loading, metadata=_CHECKPOINT_METADATA
            )
        rng = ShardedObject("rng", random_state(), (self.world_size,), (self.rank,))
        return {**model_state, "optimizer": optimizer_state, "rng": rng, "world_size": self.world_size}

    def close(self) -> None:
        """Leave the process groups."""
        parallel_state.destroy_model_parallel()
        groups.close()


def _forward_step(batches: Iterator[Batch], stage: Any, *, device: torch.device) -> tuple[Tensor, Any]:
    """Mcore's forward_step_func: run a micro-batch; its loss is a sum with a token count (calculate_per_token_loss)."""
    batch = next(batches).to(device)

    def loss(loss_sum: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        tokens = batch.loss_mask.sum().to(torch.int)
        return loss_sum, tokens, {"loss_sum": loss_sum.detach(), "tokens": tokens}

    return stage(batch), loss


def initialize_groups(device: torch.device, parallel: ParallelConfig, seconds: float) -> None:
    """Make the process groups of a layout, those of all ranks first, unless they are there.

    Collectives wait at most `seconds`.
    """
    groups.initialize(device, seconds)
    if not parallel_state.is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor,
            pipeline_model_parallel_size=parallel.pipeline,
            virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
            context_parallel_size=parallel.context,
            expert_model_parallel_size=parallel.expert,
            # An expert is whole on a rank: the ranks that share experts are any of a pipeline stage.
            expert_tensor_parallel_size=1,
            create_gloo_process_groups=False,
        )


def layer_groups(parallel: ParallelConfig) -> Groups:
    """What the layers are told of the ranks that share them."""
    return Groups(
        tensor=parallel_state.get_tensor_model_parallel_group() if parallel.tensor > 1 else None,
        context=parallel_state.get_context_parallel_group() if parallel.context > 1 else None,
        sequence=parallel.sequence,
        expert=parallel_state.get_expert_model_parallel_group() if parallel.expert > 1 else None,
    )


def _all_reduce_together(tensors: list[Tensor], group: dist.ProcessGroup | None) -> None:
    """Sum each tensor over the group, in place, in one message."""
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat, group=group)
    for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(total.view_as(tensor))


def _transformer_config(config: PretrainConfig, dtype: torch.dtype) -> TransformerConfig:
    """What mcore's schedules and DDP read of a model; the layers are ours and read models.config."""
    parallel = config.parallel
    return TransformerConfig(
        # Ours may be split unevenly over the stages, which mcore would refuse: a layer a stage.
        num_layers=parallel.pipeline * parallel.virtual_pipeline,
        hidden_size=config.model.hidden_size,
        num_attention_heads=parallel.tensor,
        tensor_model_parallel_size=parallel.tensor,
        sequence_parallel=parallel.sequence,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        context_parallel_size=parallel.context,
        # Of two stages each is the other's next and previous one, and interleaved both send at once: in a batch,
        # messages are matched by their order alone, and mixed up.
        batch_p2p_comm=parallel.virtual_pipeline == 1,
        calculate_per_token_loss=True,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        gradient_accumulation_fusion=False,
    )


def _allocate_state(optimizer: Any) -> None:
    """Give every parameter its Adam moments and step now.

    Loading reads into them, and torch's AdamW, unlike TransformerEngine's, keeps the step with each parameter.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            if "exp_avg" not in state:
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)


def _carry_step(part: Any) -> None:
    """Adam's step is saved with the groups, yet 0.16.1 looks for it among the tensors it loads for each parameter."""
    set_states = part._set_main_param_and_optimizer_states

    def set_states_with_step(model_param: Tensor, tensors: dict[str, Tensor]) -> None:
        current = part._get_main_param_and_optimizer_states(model_param)
        set_states(model_param, {"step": current["step"], **tensors} if "step" in current else tensors)

    part._set_main_param_and_optimizer_states = set_states_with_step


def _unshare_steps(optimizer: Any) -> None:
    """DistributedOptimizer.load_state_dict hands all parameters one step tensor, which AdamW counts up in place."""
    for state in optimizer.state.values():
        state["step"] = state["step"].clone()


def _copy_what_is_trained(request: Any, trained: set[int]) -> None:
    """Have mcore's AsyncRequest write copies of the tensors in `trained` memory (addresses of storages).

    mcore's own staging copies from the GPU. On the host it copies views alone, for it counts on writing from a forked
    process: a parameter that fills its buffer, as the lower bounds can, would be written as training leaves it.
    """
    if request.async_fn is None:
        return
    _, buckets, _ = request.async_fn_args
    for i, (file, key, (data, tensors)) in enumerate(request.preload_fn()):
        copies = [
            (item, tensor.clone() if tensor.untyped_storage().data_ptr() in trained else tensor)
            for item, tensor in tensors
        ]
        # In place, for mcore's writer holds the same list, and would keep what it was made of alive.
        buckets[i] = (file, key, (data, copies))


def _strip_prefix(state: dict[str, Any]) -> dict[str, Any]:
    return {name.removeprefix("model."): value for name, value in state.items()}
