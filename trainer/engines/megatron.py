"""The Megatron engine: mcore's schedules, DDP, distributed optimizer and dist_checkpointing."""

import datetime
import math
import os
import random
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.decoder import Decoder, no_weight_decay
from models.parallel import cast_parameters, keep_float32, sharded_state_dict
from trainer.config import PretrainConfig
from trainer.data.batch import Batch
from trainer.engines import megatron_cpu
from trainer.engines.base import StepResult

with warnings.catch_warnings():
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
    """A decoder with what mcore's schedules ask of a pipeline stage. Here the stage is the whole model."""

    pre_process = True
    post_process = True
    vp_stage = None
    model_type = ModelType.encoder_or_decoder

    def __init__(self, decoder: Decoder, config: TransformerConfig) -> None:
        super().__init__()
        self.decoder = decoder
        self.config = config
        self.share_embeddings_and_output_weights = decoder.lm_head is None

    def forward(self, batch: Batch) -> Tensor:
        """Loss of a micro-batch, summed over its tokens (nats)."""
        loss_sum, _ = self.decoder(batch.tokens, batch.positions, batch.cu_seqlens, batch.labels, batch.loss_mask)
        return loss_sum

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Take the activations of the previous stage; the first stage reads tokens and has none."""

    def shared_embedding_or_output_weight(self) -> Tensor:
        """The weight that mcore keeps equal on the first and the last stage."""
        return self.decoder.embedding.weight

    def sharded_state_dict(self) -> dict[str, Any]:
        """The parameters, for dist_checkpointing."""
        return sharded_state_dict(self.decoder, prefix="model.")


class MegatronEngine:
    """See trainer.engines.base.Engine.

    Args:
        config: The run.
        decoder: Initialised parameters, float32, on the CPU.
        device: Where to train.
    """

    def __init__(self, config: PretrainConfig, decoder: Decoder, device: torch.device) -> None:
        self.device = device
        self._on_cpu = device.type == "cpu"
        if self._on_cpu:
            megatron_cpu.adapt()
        _initialize_groups(device)
        if not self._on_cpu:
            tensor_parallel.model_parallel_cuda_manual_seed(config.train.seed)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.data_parallel_rank = parallel_state.get_data_parallel_rank()
        self.data_parallel_size = parallel_state.get_data_parallel_world_size()
        self._clip = config.optim.clip_grad
        dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
        cast_parameters(decoder, dtype)
        self.model = decoder.to(device)
        self._stage = self._wrap(Stage(self.model, _transformer_config(config, dtype)))
        self._optimizer = self._build_optimizer(config, dtype)
        self._forward_backward = get_forward_backward_func()
        self._seq_len, self._micro_batch_size = config.train.seq_len, config.train.micro_batch_size

    def _wrap(self, stage: Stage) -> DistributedDataParallel:
        ddp_config = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=True,
            # gloo has no stream to overlap on.
            overlap_grad_reduce=not self._on_cpu and self.data_parallel_size > 1,
        )
        ddp = DistributedDataParallel(stage.config, ddp_config, stage)
        stage.config.no_sync_func = ddp.no_sync
        stage.config.finalize_model_grads_func = finalize_model_grads
        return ddp

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
                [self._stage],
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

    def train_step(self, batches: Iterator[Batch], micro_batches: int, lr: float) -> StepResult:
        """Forward and backward over this rank's micro-batches, one update at learning rate `lr`."""
        self._stage.zero_grad_buffer()
        self._optimizer.zero_grad()
        losses = self._run(batches, micro_batches, forward_only=False)
        local = [
            sum(float(entry["loss_sum"]) for entry in losses),
            float(sum(int(entry["tokens"]) for entry in losses)),
        ]
        loss_sum, tokens = self.all_reduce(local)
        grad_norm = self._update(lr, math.isfinite(loss_sum))
        skipped = not (math.isfinite(loss_sum) and math.isfinite(grad_norm))
        return StepResult(loss_sum / max(tokens, 1.0), grad_norm, int(tokens), skipped)

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

    def loss_sum(self, batches: Iterator[Batch], micro_batches: int) -> float:
        """Negative log-likelihood of this rank's micro-batches, summed (nats), without gradients."""
        with torch.no_grad():
            losses = self._run(batches, micro_batches, forward_only=True)
        return sum(float(entry["loss_sum"]) for entry in losses)

    def _run(self, batches: Iterator[Batch], micro_batches: int, forward_only: bool) -> list[dict[str, Tensor]]:
        return self._forward_backward(  # type: ignore[no-any-return]
            forward_step_func=partial(_forward_step, device=self.device),
            data_iterator=batches,
            model=[self._stage],
            num_microbatches=micro_batches,
            seq_length=self._seq_len,
            micro_batch_size=self._micro_batch_size,
            forward_only=forward_only,
        )

    def all_reduce(self, values: list[float]) -> list[float]:
        """Sum over the data-parallel ranks, in float64."""
        if self.data_parallel_size == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
        return total.tolist()  # type: ignore[no-any-return]

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

    def load(self, directory: Path) -> None:
        """Read what `save` wrote, under this layout or another."""
        template = self._checkpoint_state(is_loading=True)
        saved_ranks = dist_checkpointing.load_common_state_dict(str(directory))["world_size"]
        if saved_ranks != self.world_size:
            # The state of a random generator belongs to a rank; another layout starts from its own seed.
            del template["rng"]
        state = dist_checkpointing.load(template, str(directory))
        self._stage.module.decoder.load_state_dict(_strip_prefix(state["model"]))
        self._optimizer.load_state_dict(state["optimizer"])
        for part in self._optimizer.chained_optimizers:
            _unshare_steps(part.optimizer)
        if "rng" in state:
            _set_rng_state(state["rng"])

    def _checkpoint_state(self, is_loading: bool) -> dict[str, Any]:
        model_state = self._stage.module.sharded_state_dict()
        with self._accepted_types():
            optimizer_state = self._optimizer.sharded_state_dict(
                model_state, is_loading=is_loading, metadata=_CHECKPOINT_METADATA
            )
        rng = ShardedObject("rng", _rng_state(), (self.world_size,), (self.rank,))
        return {"model": model_state, "optimizer": optimizer_state, "rng": rng, "world_size": self.world_size}

    def close(self) -> None:
        """Leave the process groups."""
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def _forward_step(batches: Iterator[Batch], stage: Any, *, device: torch.device) -> tuple[Tensor, Any]:
    """Mcore's forward_step_func: run a micro-batch; its loss is a sum with a token count (calculate_per_token_loss)."""
    batch = next(batches).to(device)

    def loss(loss_sum: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        tokens = batch.loss_mask.sum().to(torch.int)
        return loss_sum, tokens, {"loss_sum": loss_sum.detach(), "tokens": tokens}

    return stage(batch), loss


def _initialize_groups(device: torch.device) -> None:
    if not dist.is_initialized():
        if "MASTER_ADDR" not in os.environ:
            # Without torchrun this is the only rank: a store in the process needs no port.
            store = dist.HashStore()  # type: ignore[attr-defined]
            dist.init_process_group("gloo" if device.type == "cpu" else "nccl", store=store, rank=0, world_size=1)
        else:
            timeout = datetime.timedelta(minutes=10)
            dist.init_process_group("gloo" if device.type == "cpu" else "nccl", timeout=timeout)
    if not parallel_state.is_initialized():
        parallel_state.initialize_model_parallel(create_gloo_process_groups=False)


def _transformer_config(config: PretrainConfig, dtype: torch.dtype) -> TransformerConfig:
    """What mcore's schedules and DDP read of a model; the layers are ours and read models.config."""
    return TransformerConfig(
        num_layers=config.model.num_layers,
        hidden_size=config.model.hidden_size,
        num_attention_heads=config.model.attention.num_heads,
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


def _strip_prefix(state: dict[str, Any]) -> dict[str, Any]:
    return {name.removeprefix("model."): value for name, value in state.items()}


def _rng_state() -> dict[str, Any]:
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_rng_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
