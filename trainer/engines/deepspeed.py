"""The DeepSpeed engine: ZeRO (arXiv 1910.02054), stages 0 to 3, offloading to host memory, Megatron's tensor parallel.

DeepSpeed averages gradients over ranks and accumulated micro-batches. The loss here is a mean over all tokens of the
global batch, so every micro-batch's loss l_i, a sum over its tokens (nats), is scaled before its backward pass:

    dL/dw = (1/N) sum_i dl_i/dw = mean over R ranks and A micro-batches of d(l_i R A / N)/dw

with N the tokens of the whole batch, counted before the first pass: exact, whatever the token counts of the parts.

Under tensor parallelism the model is cut before DeepSpeed sees it, which shards what each rank has over the ranks that
have the same, its data-parallel group. It is told of the groups by an object of Megatron's names, its `mpu`, and sums
norms and overflows over the others, too, counting parameters marked `tensor_model_parallel` on every rank.

A checkpoint is in the format of both engines (trainer.engines.pieces): every rank writes what it updates, without ZeRO
an even share, so any stage and any number of ranks reads what any other wrote.
"""

import importlib
import logging
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.config import ModelConfig
from models.decoder import Decoder, build
from models.moe import statistics
from models.moe.spawning import expert_weights, spawned
from models.parameters import WHOLE, Groups, declared, parameter_rows, partial_gradients, set_trainable
from trainer.config import OptimConfig, ParallelConfig
from trainer.data.batch import Batch
from trainer.engines import groups as process_groups
from trainer.engines import megatron_cpu, pieces
from trainer.engines.base import PendingSave, StepResult
from trainer.engines.common import Collectives, StepSums
from trainer.engines.frozen import FrozenModel, FrozenSpec
from trainer.engines.norms import sum_of_squares
from trainer.engines.pieces import MOMENTS, Piece, Shard
from trainer.engines.spec import EngineSpec
from trainer.engines.timing import PhaseTimer
from trainer.objectives.base import Objective, Outputs

_MAIN = "main"
# ZeRO allocates a bucket of this many elements for communication; DeepSpeed's own 5e8 would be 2 GB on every rank.
_BUCKET_ELEMENTS = 50_000_000


class LossModel(nn.Module):
    """A decoder whose forward ends in the objective: what DeepSpeed's hooks wrap."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(
        self, batch: Batch, objective: Objective, frozen: Mapping[str, Outputs]
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """What the objective makes of a micro-batch, given what its frozen models make of it."""
        hidden = self.decoder.hidden_states(batch.tokens, batch.positions, batch.documents)
        return objective.forward(Outputs(hidden, self.decoder.head_weight, self.decoder.groups, frozen), batch)


class DeepSpeedEngine:
    """See trainer.engines.base.Engine.

    Under ZeRO 3 no rank holds the parameters, and `model` has their shapes only (on the meta device).

    Args:
        spec: What to train and how.
        device: Where to train.
    """

    def __init__(self, spec: EngineSpec, device: torch.device) -> None:
        self.device = device
        self._stage, self._clip = spec.sharding.zero_stage, spec.optim.clip_grad
        self._bf16 = spec.precision == "bf16"
        self._deepspeed = _import_deepspeed(device)
        os.environ.setdefault("LOCAL_RANK", "0")
        process_groups.initialize(device, spec.collective_seconds)
        self._deepspeed.init_distributed(process_groups.backend_of(device), auto_mpi_discovery=False, verbose=False)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self._writer = pieces.Writer(self.rank, self.world_size, process_groups.saving_group())
        self._groups, unit = _model_parallel_groups(device, spec)
        self.data_parallel_rank = self.rank if unit is None else unit.get_data_parallel_rank()
        self._tensor_ranks = spec.parallel.tensor
        self.data_parallel_size = self.world_size // self._tensor_ranks
        tensor = self._groups.tensor
        self.collectives = Collectives(device, tensor is None or dist.get_rank(tensor) == 0)
        dtype = torch.bfloat16 if self._bf16 else torch.float32
        decoder = build(spec.model, spec.vocab_size, groups=self._groups, dtype=dtype)
        spec.fill(decoder)
        set_trainable(decoder, spec.trainable)
        self._decoder, self._model_config, self._seed = decoder, spec.model, spec.seed
        self._rows = declared(decoder)
        self._parameters: dict[str, Any] = {name: row.tensor for name, row in parameter_rows(decoder).items()}
        self._trained = {name: value for name, value in self._parameters.items() if value.requires_grad}
        # Before ZeRO 3 takes the shapes away.
        self._shards = {name: Shard.of(row.tensor, *row.place(self._groups)) for name, row in self._rows.items()}
        for name, parameter in self._parameters.items():
            if self._rows[name].group(self._groups) is not None:
                # In DeepSpeed's norm of the gradient it counts on every rank.
                parameter.tensor_model_parallel = True
        self.model = _shapes_alone(decoder) if self._stage == 3 else decoder
        self.model_is_whole = self._stage < 3 and decoder.is_whole
        decoder.recompute(spec.recompute)
        self._micro_batches = spec.micro_batches(self.data_parallel_size)
        # ZeRO 3 keeps all parameters in one buffer of one type: there only their main copies are float32.
        float32 = {
            name: parameter.detach().to(device, copy=True)
            for name, parameter in self._parameters.items()
            if self._stage < 3 and self._rows[name].placement.float32
        }
        buffers = {name: buffer.detach().clone() for name, buffer in decoder.named_buffers()}
        # DeepSpeed would remember the last engine's.
        groups: Any = importlib.import_module("deepspeed.utils.groups")
        groups.mpu = None
        self._engine = self._deepspeed.initialize(
            model=LossModel(decoder),
            mpu=unit,
            # Called when the parameters have been cast and have not yet been cut.
            optimizer=lambda _: self._build_adam(spec.optim, float32),
            model_parameters=list(self._trained.values()),
            config=_deepspeed_config(spec, decoder, self._micro_batches, device),
        )[0]
        _allocate_state(self._adam, self._flat_parameters())
        self._timer = PhaseTimer(device)
        # What is left of it when backward has ended: with ZeRO gradients are reduced as they come.
        self._engine.allreduce_gradients = self._timer.timed("reduce", self._engine.allreduce_gradients)
        # Summed as they come, for afterwards DeepSpeed has them sharded.
        for parameter in partial_gradients(decoder, self._groups):
            parameter.register_hook(partial(_sum_shares, group=self._groups.tensor))
        for name, values in buffers.items():
            # DeepSpeed casts them along with the parameters.
            self._rows[name].tensor.data = values.to(device)

    def _build_adam(self, optim: OptimConfig, float32: dict[str, Tensor]) -> torch.optim.AdamW:
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for name, parameter in self._parameters.items():
            if name in float32:
                parameter.data = float32[name]
            # A group is one flat tensor, so one type; DeepSpeed takes the first group's for that of the model.
            if name in self._trained:
                key = (parameter.dtype == torch.float32, not self._rows[name].placement.decayed)
                groups.setdefault(key, []).append(parameter)
        self._adam = torch.optim.AdamW(
            [{"params": groups[key], "weight_decay": 0.0 if key[1] else optim.weight_decay} for key in sorted(groups)],
            lr=optim.lr,
            betas=(optim.beta1, optim.beta2),
            eps=optim.eps,
            fused=True,
        )
        return self._adam

    def _flat_parameters(self) -> list[Tensor]:
        """The tensors that Adam updates: whole parameters, or this rank's part of each group, flat and in float32."""
        optimizer = self._engine.optimizer
        if self._stage == 0:
            return list(self._trained.values())
        for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
            if hasattr(optimizer, name):
                return list(getattr(optimizer, name))
        raise RuntimeError(f"{type(optimizer).__name__} of DeepSpeed {self._deepspeed.__version__} is not known here")

    def train_step(self, batches: Sequence[Batch], objective: Objective, lr: float, step: int = 0) -> StepResult:
        """Forward and backward over this rank's micro-batches, one update at learning rate `lr`, the `step`-th."""
        assert len(batches) == self._micro_batches, "DeepSpeed was told at the start how many there are"
        for group in self._adam.param_groups:
            group["lr"] = lr
        if self._model_config.moe.spawns_at(step):
            self._spawn_experts()
        with self._timer.phase("forward_backward"):
            sums = self._forward_backward(batches, objective, step)
        with self._timer.phase("optimizer"):
            grad_norm = self._update()
        return sums.finish(grad_norm, [self._decoder], self._model_config, self._timer)

    def _forward_backward(self, batches: Sequence[Batch], objective: Objective, step: int) -> StepSums:
        """Run the micro-batches; the gradients are then summed over ranks."""
        with self._timer.phase("reduce"):
            (count,) = self.collectives.sum_over_data([float(sum(map(objective.count, batches)))])
        scale = len(batches) * self.data_parallel_size / max(count, 1.0)
        # DeepSpeed divides what it is given by the micro-batches.
        statistics.begin_step([self._decoder], step, scale / len(batches))
        totals = torch.zeros(1 + len(objective.metrics), dtype=torch.float64, device=self.device)
        *earlier, last = batches
        for batch in earlier:
            self._engine.backward(self._forward(batch, objective, totals) * scale)
            self._engine.step()
        loss = self._forward(last, objective, totals)
        own = [*totals.tolist(), *statistics.collect([self._decoder], self._model_config)]
        with self._timer.phase("reduce"):
            total, *rest = self.collectives.sum_over_data(own)
        sums = StepSums.of(objective, total, count, rest)
        if not sums.is_finite:
            # So that the gradient is not finite on any rank, and DeepSpeed skips the update on all of them.
            loss = loss * math.nan
        self._engine.backward(loss * scale)
        return sums

    def _forward(self, batch: Batch, objective: Objective, totals: Tensor) -> Tensor:
        """The objective's sum over a micro-batch; it and each of the metrics are added to `totals`."""
        batch = batch.to(self.device)
        frozen = {name: model.outputs([batch])[0] for name, model in objective.models.items()}
        total: Tensor
        total, sums = self._engine(batch, objective, frozen)
        totals += torch.stack([total.detach(), *sums])
        return total

    def freeze(self, spec: FrozenSpec) -> FrozenModel:
        """See `Engine.freeze`. Of a frozen model ZeRO shards nothing: a rank has what tensor parallelism leaves it."""
        spec.require_fit(self._decoder.vocab_size, ParallelConfig(tensor=self._tensor_ranks))
        decoder = spec.build(range(spec.model.num_layers), self._groups, self.device)

        def hidden_states(batches: Sequence[Batch]) -> list[Tensor]:
            return [decoder.hidden_states(batch.tokens, batch.positions, batch.documents) for batch in batches]

        return FrozenModel([decoder], hidden_states)

    def _update(self) -> float:
        """Clip and step, unless the gradient is not finite; return its norm."""
        if self._stage > 0:
            self._engine.step()
            return float(self._engine.get_global_grad_norm())
        parameters = list(self._trained.values())
        norm = self._grad_norm(parameters)
        if not math.isfinite(norm):
            # AdamW passes parameters without a gradient over.
            self._engine.zero_grad()
        elif self._clip > 0:
            nn.utils.clip_grads_with_norm_(parameters, self._clip, torch.tensor(norm, device=self.device))
        self._engine.step()
        return norm

    def _grad_norm(self, parameters: list[Any]) -> float:
        """The norm without ZeRO; what tensor-parallel ranks share is counted on the first of them."""
        group = self._groups.tensor
        counted = [
            parameter.grad
            for parameter in parameters
            if parameter.grad is not None
            and (group is None or dist.get_rank(group) == 0 or hasattr(parameter, "tensor_model_parallel"))
        ]
        squares = float(sum_of_squares(counted, self.device))
        return math.sqrt(squares if group is None else self.collectives.sum_over_ranks([squares], group)[0])

    def _spawn_experts(self) -> None:
        """Make all routed experts masked copies of the first. Adam's moments stay, those of the others zero."""
        for name, weight, writes_output in expert_weights(self._decoder):
            with self._deepspeed.zero.GatheredParameters([weight], enabled=self._stage == 3):
                experts = spawned(weight, name, writes_output, self._model_config.moe, self._seed, self._groups)
            piece = self._owned(name, _MAIN)
            piece.values.copy_(experts.flatten()[piece.start : piece.start + piece.values.numel()])
            if self._stage == 3:
                self._give_back(name, _MAIN, piece.values)
        self._publish()

    def begin_phase(self, model: ModelConfig, trainable: Sequence[str]) -> None:
        """See `Engine.begin_phase`; all phases train the same parameters, as the configuration has checked."""
        self._decoder.rotate_by(model)

    def evaluate(self, batches: Sequence[Batch], objective: Objective) -> list[float]:
        """Without gradients: the objective's sum over this rank's micro-batches, then that of each of its metrics."""
        self._engine.eval()
        totals = torch.zeros(1 + len(objective.metrics), dtype=torch.float64, device=self.device)
        with torch.no_grad():
            for batch in batches:
                self._forward(batch, objective, totals)
        self._engine.train()
        found: list[float] = totals.tolist()
        return found

    def save(self, directory: Path) -> dict[str, str]:
        """Write parameters, optimizer and RNG state into an existing empty directory; every rank calls it.

        Returns:
            On rank 0 the SHA-256 of every file that was written, flushed to the disk, by its name.
        """
        return self._writer.write(self._written_parts(), self._adam_step(), directory)

    def begin_save(self, directory: Path) -> PendingSave:
        """Copy what `save` would write; training may go on at once. Every rank calls it."""
        return self._writer.begin(self._written_parts(), self._adam_step(), directory)

    def _written_parts(self) -> dict[str, Piece]:
        """What this rank writes, by the names in a checkpoint."""
        parts: dict[str, Piece] = {}
        first_of_tensor_ranks = self._groups.tensor is None or dist.get_rank(self._groups.tensor) == 0
        for name, row in self._rows.items():
            if not (first_of_tensor_ranks or row.group(self._groups) is not None):
                continue
            if name not in self._trained:
                parts[pieces.MODEL + name] = self._to_write(self._frozen(name), self._is_partitioned(name))
                continue
            main, *moments = (self._to_write(self._owned(name, key), self._stage > 0) for key in (_MAIN, *MOMENTS))
            model = self._as_the_model_reads_it(name, main) if self._bf16 else main
            named = dict(zip(MOMENTS, moments, strict=True))
            parts |= pieces.stored(name, model, main if self._bf16 else None, named)
        return parts

    def _to_write(self, piece: Piece, sharded: bool) -> Piece:
        """What ZeRO has sharded, as it is; of what every data-parallel rank has, an even share."""
        return piece if sharded else piece.share(self.data_parallel_rank, self.data_parallel_size)

    def load(self, directory: Path) -> None:
        """Read what `save` wrote, of either engine, under this layout, ZeRO stage and offloading or another."""
        reader = pieces.Reader(directory)
        owned = {name: {key: self._owned(name, key) for key in (_MAIN, *MOMENTS)} for name in self._trained}
        frozen = {name: self._frozen(name) for name in self._rows if name not in self._trained}
        parts = {pieces.MODEL + name: piece for name, piece in frozen.items()}
        for name, by_key in owned.items():
            parts |= reader.optimizer_state(name, by_key[_MAIN], by_key)
        reader.read(parts)
        if self._stage == 3:
            for name, by_key in owned.items():
                for key, piece in by_key.items():
                    self._give_back(name, key, piece.values)
        for state in self._adam.state.values():
            state["step"].fill_(reader.adam_step)
        self._publish()
        reader.restore_random_state(self.rank, self.world_size)

    def _is_partitioned(self, name: str) -> bool:
        """Whether ZeRO has sharded the tensor that the model computes with: parameters, not buffers, in stage 3."""
        return self._stage == 3 and name in self._parameters

    def _frozen(self, name: str) -> Piece:
        """What a rank has of a frozen parameter, or of a buffer: a view of it."""
        shard, tensor = self._shards[name], self._rows[name].tensor
        if self._is_partitioned(name):
            start, count = self._range(name)
            return Piece(shard, start, self._parameters[name].ds_tensor.data.view(-1)[:count])
        return Piece(shard, 0, tensor.data.view(-1))

    def _as_the_model_reads_it(self, name: str, owned: Piece) -> Piece:
        """The elements of a piece as they are in the parameter itself."""
        if self._stage == 3:
            values = self._parameters[name].ds_tensor.data.flatten()[: owned.values.numel()]
        else:
            values = self._parameters[name].data.flatten()[owned.start : owned.start + owned.values.numel()]
        return Piece(owned.shard, owned.start, values)

    def _range(self, name: str) -> tuple[int, int]:
        """Where this rank's part of a parameter that ZeRO 3 cut starts, and its length less the padding."""
        part = self._parameters[name].ds_tensor.ds_numel
        total = self._shards[name].shape.numel()
        start = min(self.data_parallel_rank * part, total)
        return start, min(part, total - start)

    def _owned(self, name: str, key: str) -> Piece:
        """What this rank updates of a main parameter or a moment; a view but under ZeRO 3."""
        parameter, shard = self._parameters[name], self._shards[name]
        if self._stage == 0:
            source = parameter.data if key == _MAIN else self._adam.state[parameter][key]
            return Piece(shard, 0, source.view(-1))
        if self._stage == 3:
            utils = self._deepspeed.utils
            if key == _MAIN:
                values = utils.safe_get_local_fp32_param(parameter)
            else:
                values = utils.safe_get_local_optimizer_state(parameter, key)
            start, count = self._range(name)
            return Piece(shard, start, values.detach()[:count])
        part = parameter._hp_mapping
        if part is None:
            return Piece(shard, 0, torch.empty(0))
        flat = self._flat_parameters()[part.param_group_index]
        source = flat.data if key == _MAIN else self._adam.state[flat][key]
        address = part.hp_fragment_address
        return Piece(shard, part.lp_fragment_address.start, source.narrow(0, address.start, address.numel))

    def _give_back(self, name: str, key: str, values: Tensor) -> None:
        """Set what `_owned` lent under ZeRO 3, where it may be a copy on another device."""
        parameter = self._parameters[name]
        utils = self._deepspeed.utils
        padded = nn.functional.pad(values, (0, parameter.ds_tensor.ds_numel - values.numel()))
        if key == _MAIN:
            utils.safe_set_local_fp32_param(parameter, padded)
            parameter.ds_tensor.data.copy_(padded)
        else:
            utils.safe_set_local_optimizer_state(parameter, padded, key)

    def _publish(self) -> None:
        """Bring what the model reads up to date with the main parameters."""
        optimizer = self._engine.optimizer
        if self._stage in (1, 2):
            optimizer.update_lp_params()
        elif self._stage == 3:
            # Small parameters are whole on every rank: drop them, and gather them anew.
            optimizer.checkpoint_event_prologue()
            optimizer.checkpoint_event_epilogue()

    def _adam_step(self) -> int:
        """Updates taken; skipped steps do not count."""
        return int(next(iter(self._adam.state.values()))["step"])

    def close(self) -> None:
        """Leave the process groups."""
        self._engine.destroy()
        self._deepspeed.comm.destroy_process_group()
        process_groups.close()


def _import_deepspeed(device: torch.device) -> Any:
    """DeepSpeed, set to the device (it would look for one itself at import) and quiet."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu" if device.type == "cpu" else "cuda")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        deepspeed = importlib.import_module("deepspeed")
    # It collects garbage and prints a table of memory eight times, seconds in all.
    bf16_optimizer: Any = importlib.import_module("deepspeed.runtime.bf16_optimizer")
    bf16_optimizer.see_memory_usage = lambda *_, **__: None
    # Errors reach the log as exceptions; below them DeepSpeed reports buckets and groups on every rank.
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # It calls collectives by names that torch is about to change, once for every bucket.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed", message=".*is deprecated")
    if device.type == "cpu":
        # A C++ operator for inference only, which every rank would compile at its first use.
        communication: Any = importlib.import_module("deepspeed.comm.torch")
        communication.build_shm_op = lambda: None
        # An optimizer that is only asked for its type. To compile its functions would import inductor, for seconds.
        with megatron_cpu.nothing_compiled():
            importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    return deepspeed


def _model_parallel_groups(device: torch.device, spec: EngineSpec) -> tuple[Groups, Any]:
    """What the layers are told of the ranks that share them, and DeepSpeed's `mpu`; None where no ranks do."""
    parallel = spec.parallel
    if parallel.tensor == 1:
        return WHOLE, None
    from megatron.core import parallel_state

    from trainer.engines import megatron

    if device.type == "cpu":
        megatron_cpu.adapt()
    megatron.initialize_groups(device, parallel, spec.collective_seconds)
    unit = SimpleNamespace()
    # By the names of Megatron-LM's first versions and of later ones: DeepSpeed uses both.
    for theirs, ours in (("model", "tensor_model"), ("tensor_model", "tensor_model"), ("data", "data")):
        for fact in ("world_size", "rank", "group"):
            function = getattr(parallel_state, f"get_{ours}_parallel_{fact}")
            setattr(unit, f"get_{theirs}_parallel_{fact}", function)
    return megatron.layer_groups(parallel), unit


def _sum_shares(grad: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The sum over ranks, in float32; what is given belongs to autograd."""
    total = grad.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total.to(grad.dtype)


def _deepspeed_config(spec: EngineSpec, decoder: Decoder, micro_batches: int, device: torch.device) -> dict[str, Any]:
    sharding, on_gpu = spec.sharding, device.type != "cpu"
    numel = sum(parameter.numel() for parameter in decoder.parameters())
    # Even, for ZeRO aligns the parts that are gathered.
    bucket = min(_BUCKET_ELEMENTS, numel + numel % 2)
    zero: dict[str, Any] = {
        "stage": sharding.zero_stage,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        # gloo has no stream to overlap on.
        "overlap_comm": on_gpu,
        "stage3_prefetch_bucket_size": bucket,
        # Norms and biases stay whole on every rank.
        "stage3_param_persistence_threshold": 10 * spec.model.hidden_size,
    }
    host = {"device": "cpu", "pin_memory": on_gpu}
    if sharding.offload != "none":
        zero["offload_optimizer"] = host
    if sharding.offload == "parameters":
        zero["offload_param"] = host
    return {
        "train_micro_batch_size_per_gpu": spec.micro_batch_size,
        "gradient_accumulation_steps": micro_batches,
        "steps_per_print": None,
        # Without ZeRO the engine clips, since DeepSpeed would neither tell the norm nor skip a step.
        "gradient_clipping": spec.optim.clip_grad if sharding.zero_stage else 0.0,
        "bf16": {"enabled": spec.precision == "bf16", "check_grad_overflow": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
    }


def _allocate_state(adam: torch.optim.AdamW, parameters: list[Tensor]) -> None:
    """Give every parameter its Adam moments and step now, so that a checkpoint can be read into them."""
    for parameter in parameters:
        adam.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }


def _shapes_alone(decoder: Decoder) -> Decoder:
    with torch.device("meta"):
        return Decoder(decoder.model_config, decoder.vocab_size)
