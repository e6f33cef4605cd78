"""The DeepSpeed engine: ZeRO stages 0 to 3 (arXiv 1910.02054), CPU offloading, and Megatron's tensor parallelism.

DeepSpeed averages gradients over ranks and accumulated micro-batches. The loss here is a mean over all tokens of the
global batch. The engine therefore scales each micro-batch's loss l_i, a sum over its tokens (nats), before backward:

    dL/dw = (1/N) sum_i dl_i/dw = mean over R ranks and A micro-batches of d(l_i R A / N)/dw

N is the number of tokens in the global batch, counted before the first forward pass. The result is exact for any token
counts of the micro-batches.

Under tensor parallelism the model is sharded before DeepSpeed sees it. ZeRO then shards each rank's tensors over its
data-parallel group. DeepSpeed learns the groups from an `mpu` object with Megatron's method names. It also sums norms
and overflow flags over tensor-parallel ranks, where parameters marked `tensor_model_parallel` count on every rank.

Checkpoints use the format of both engines (trainer.engines.pieces). Every rank writes the state that it updates, or an
even share of it without ZeRO. Any ZeRO stage and any number of ranks can read the result.
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

from models import spiking
from models.config import ModelConfig
from models.decoder import Decoder, build
from models.moe.spawning import expert_weights, spawned
from models.parameters import WHOLE, Groups, declared, parameter_rows, partial_gradients, set_trainable
from models.statistics import StepStatistics
from trainer.config import OptimConfig, ParallelConfig
from trainer.data.batch import EXPERTS, Batch
from trainer.engines import groups as process_groups
from trainer.engines import megatron_cpu, pieces
from trainer.engines.base import PendingSave, StepResult
from trainer.engines.common import Collectives, StepSums
from trainer.engines.frozen import AfterStage, FrozenModel, FrozenSpec
from trainer.engines.norms import sum_of_squares
from trainer.engines.pieces import MOMENTS, Piece, Shard
from trainer.engines.spec import EngineSpec
from trainer.engines.timing import PhaseTimer
from trainer.objectives.alignment import Alignment, AnyObjective
from trainer.objectives.base import Outputs

_MAIN = "main"
# Size of ZeRO's communication bucket, in elements. DeepSpeed's default of 5e8 would take 2 GB on every rank.
_BUCKET_ELEMENTS = 50_000_000


class LossModel(nn.Module):
    """A decoder whose forward ends in the objective. DeepSpeed installs its hooks on this module."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(
        self, batch: Batch, objective: AnyObjective, frozen: Mapping[str, Outputs]
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """Apply the objective to a micro-batch, given the frozen models' outputs for it."""
        if isinstance(objective, Alignment):
            return objective.forward(self.decoder, batch)
        decoder = self.decoder
        experts = batch.extra.get(EXPERTS)
        hidden = decoder.hidden_states(
            batch.tokens, batch.positions, batch.documents, origin=batch.origin, experts=experts
        )
        outputs = Outputs(hidden, decoder.head_weight, decoder.groups, frozen, decoder.value_head)
        return objective.forward(outputs, batch)


class DeepSpeedEngine:
    """See trainer.engines.base.Engine.

    Under ZeRO 3 no rank holds whole parameters, so `model` holds their shapes only, on the meta device.

    Args:
        spec: The model, its optimizer and its layout.
        device: Device to train on.
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
        has_values = spec.value_head is not None
        decoder = build(spec.model, spec.vocab_size, groups=self._groups, dtype=dtype, value_head=has_values)
        spec.fill(decoder)
        set_trainable(decoder, spec.trainable)
        self._decoder, self._model_config, self._seed = decoder, spec.model, spec.seed
        self._rows = declared(decoder)
        self._parameters: dict[str, Any] = {name: row.tensor for name, row in parameter_rows(decoder).items()}
        self._trained = {name: value for name, value in self._parameters.items() if value.requires_grad}
        # ZeRO 3 replaces the parameters by empty tensors, so record the shapes now.
        self._shards = {name: Shard.of(row.tensor, *row.place(self._groups)) for name, row in self._rows.items()}
        for name, parameter in self._parameters.items():
            if self._rows[name].group(self._groups) is not None:
                # Marks a sharded parameter: DeepSpeed's gradient norm then counts it on every rank.
                parameter.tensor_model_parallel = True
        self.model = _shapes_alone(decoder) if self._stage == 3 else decoder
        self.model_is_whole = self._stage < 3 and decoder.is_whole
        decoder.keep(spec.saved_activations)
        self._micro_batches = spec.micro_batches(self.data_parallel_size)
        # ZeRO 3 keeps all parameters in one buffer of one dtype, so there only the main parameters are float32.
        float32 = {
            name: parameter.detach().to(device, copy=True)
            for name, parameter in self._parameters.items()
            if self._stage < 3 and self._rows[name].placement.float32
        }
        buffers = {name: buffer.detach().clone() for name, buffer in decoder.named_buffers()}
        # DeepSpeed keeps the mpu in a module global. A second engine in this process would reuse the first one's.
        groups: Any = importlib.import_module("deepspeed.utils.groups")
        groups.mpu = None
        self._engine = self._deepspeed.initialize(
            model=LossModel(decoder),
            mpu=unit,
            # DeepSpeed calls this after it has cast the parameters and before it shards them.
            optimizer=lambda _: self._build_adam(spec.optim, spec.value_head or 1.0, float32),
            model_parameters=list(self._trained.values()),
            config=_deepspeed_config(spec, decoder, self._micro_batches, device),
        )[0]
        _allocate_state(self._adam, self._flat_parameters())
        self._statistics = StepStatistics(spec.model, [self._decoder], spec.measure_every)
        self._timer = PhaseTimer(device)
        # Times only the reduction after backward. Under ZeRO the hooks reduce most gradients during backward.
        self._engine.allreduce_gradients = self._timer.timed("reduce", self._engine.allreduce_gradients)
        # Partial gradients are summed in hooks during backward, because afterwards DeepSpeed has sharded them.
        for parameter in partial_gradients(decoder, self._groups):
            parameter.register_hook(partial(_sum_shares, group=self._groups.tensor))
        for name, values in buffers.items():
            # DeepSpeed casts buffers along with the parameters. Restore their dtype and values.
            self._rows[name].tensor.data = values.to(device)

    def _build_adam(self, optim: OptimConfig, of_values: float, float32: dict[str, Tensor]) -> torch.optim.AdamW:
        groups: dict[tuple[bool, bool, float], list[nn.Parameter]] = {}
        for name, parameter in self._parameters.items():
            if name in float32:
                parameter.data = float32[name]
            # Each group becomes one flat tensor, so it needs one dtype. DeepSpeed takes the first group's dtype for
            # the model's, hence the sorting: bf16 groups come first.
            if name in self._trained:
                factor = of_values if name.startswith("value_head.") else 1.0
                key = (parameter.dtype == torch.float32, not self._rows[name].placement.decayed, factor)
                groups.setdefault(key, []).append(parameter)
        self._adam = torch.optim.AdamW(
            [
                {"params": groups[key], "weight_decay": 0.0 if key[1] else optim.weight_decay, "lr_mult": key[2]}
                for key in sorted(groups)
            ],
            lr=optim.lr,
            betas=(optim.beta1, optim.beta2),
            eps=optim.eps,
            fused=True,
        )
        return self._adam

    def _flat_parameters(self) -> list[Tensor]:
        """Return the tensors that Adam updates: whole parameters, or this rank's flat float32 shard of each group."""
        optimizer = self._engine.optimizer
        if self._stage == 0:
            return list(self._trained.values())
        # The attribute's name differs between DeepSpeed's optimizer classes.
        for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
            if hasattr(optimizer, name):
                return list(getattr(optimizer, name))
        raise RuntimeError(f"{type(optimizer).__name__} of DeepSpeed {self._deepspeed.__version__} is not known here")

    def train_step(self, batches: Sequence[Batch], objective: AnyObjective, lr: float, step: int = 0) -> StepResult:
        """Run forward and backward over this rank's micro-batches, then update number `step` at learning rate `lr`."""
        assert len(batches) == self._micro_batches, "DeepSpeed was told at the start how many there are"
        for group in self._adam.param_groups:
            group["lr"] = lr * group["lr_mult"]
        if self._model_config.moe.spawns_at(step):
            self._spawn_experts()
        with self._timer.phase("forward_backward"):
            sums = self._forward_backward(batches, objective, step)
        with self._timer.phase("optimizer"):
            grad_norm = self._update()
        result = sums.finish(grad_norm, self._statistics, self._timer)
        if not result.skipped:
            spiking.finish_step([self._decoder], group=None)
        return result

    def _forward_backward(self, batches: Sequence[Batch], objective: AnyObjective, step: int) -> StepSums:
        """Run the micro-batches. On return the gradients are reduced over ranks."""
        with self._timer.phase("reduce"):
            (count,) = self.collectives.sum_over_data([float(sum(map(objective.count, batches)))])
        scale = len(batches) * self.data_parallel_size / max(count, 1.0)
        # DeepSpeed divides each loss by the number of micro-batches. Auxiliary losses bypass that division.
        self._statistics.begin(step, scale / len(batches))
        totals = torch.zeros(1 + len(objective.metrics), dtype=torch.float64, device=self.device)
        *earlier, last = batches
        for batch in earlier:
            self._engine.backward(self._forward(batch, objective, totals) * scale)
            self._engine.step()
        loss = self._forward(last, objective, totals)
        counted = self._statistics.collect()
        with self._timer.phase("reduce"):
            own = self.collectives.once_per_data_rank(totals.tolist())
            total, *rest = self.collectives.sum_over_ranks([*own, *counted])
        sums = StepSums.of(objective, total, count, rest)
        if not sums.is_finite:
            # Makes the gradient non-finite on all ranks, so that DeepSpeed skips the update on all of them.
            loss = loss * math.nan
        self._engine.backward(loss * scale)
        return sums

    def _forward(self, batch: Batch, objective: AnyObjective, totals: Tensor) -> Tensor:
        """Return the objective's sum over a micro-batch, and add it and the metrics' sums to `totals`."""
        batch = batch.to(self.device)
        frozen: dict[str, Outputs] = {}
        if isinstance(objective, Alignment):
            objective.teacher.visit([batch], lambda number, stage, batch: None)
        else:
            frozen = {name: model.outputs([batch])[0] for name, model in objective.models.items()}
        total: Tensor
        total, sums = self._engine(batch, objective, frozen)
        totals += torch.stack([total.detach(), *sums])
        return total

    def freeze(self, spec: FrozenSpec) -> FrozenModel:
        """See `Engine.freeze`. ZeRO does not shard a frozen model: each rank holds its whole tensor-parallel shard."""
        spec.require_fit(self._decoder.vocab_size, ParallelConfig(tensor=self._tensor_ranks))
        decoder = spec.build(range(spec.model.num_layers), self._groups, self.device)

        def run(batches: Sequence[Batch], after: AfterStage | None) -> list[Tensor]:
            found = []
            for number, batch in enumerate(batches):
                hidden = decoder.hidden_states(batch.tokens, batch.positions, batch.documents)
                if after is None:
                    found.append(hidden)
                else:
                    after(number, 0, batch)
            return found

        return FrozenModel([decoder], run)

    def _update(self) -> float:
        """Clip and step unless the gradient is not finite. Return the gradient norm."""
        if self._stage > 0:
            self._engine.step()
            return float(self._engine.get_global_grad_norm())
        parameters = list(self._trained.values())
        norm = self._grad_norm(parameters)
        if not math.isfinite(norm):
            # AdamW skips parameters without a gradient, so engine.step() then changes nothing.
            self._engine.zero_grad()
        elif self._clip > 0:
            nn.utils.clip_grads_with_norm_(parameters, self._clip, torch.tensor(norm, device=self.device))
        self._engine.step()
        return norm

    def _grad_norm(self, parameters: list[Any]) -> float:
        """Return the gradient norm for stage 0. Tensor-parallel replicas count on the first tensor-parallel rank."""
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
        """Turn all routed experts into masked copies of the first. Adam's moments stay: the others' are zero."""
        for name, weight, writes_output in expert_weights(self._decoder):
            with self._deepspeed.zero.GatheredParameters([weight], enabled=self._stage == 3):
                experts = spawned(weight, name, writes_output, self._model_config.moe, self._seed, self._groups)
            piece = self._owned(name, _MAIN)
            piece.values.copy_(experts.flatten()[piece.start : piece.start + piece.values.numel()])
            if self._stage == 3:
                self._give_back(name, _MAIN, piece.values)
        self._publish()

    def begin_phase(self, model: ModelConfig, trainable: Sequence[str]) -> None:
        """See `Engine.begin_phase`. All phases train the same parameters here, which the configuration has checked."""
        self._decoder.rotate_by(model)

    def evaluate(self, batches: Sequence[Batch], objective: AnyObjective) -> list[float]:
        """Return the objective's sum over this rank's micro-batches, then the sum of each metric, without gradients."""
        self._engine.eval()
        totals = torch.zeros(1 + len(objective.metrics), dtype=torch.float64, device=self.device)
        with torch.no_grad():
            for batch in batches:
                self._forward(batch, objective, totals)
        self._engine.train()
        found: list[float] = totals.tolist()
        return found

    def save(self, directory: Path) -> dict[str, str]:
        """Write parameters, optimizer and RNG state into an existing empty directory. Every rank calls this.

        Returns:
            On rank 0 the SHA-256 of every written file by name, after a flush to disk. Empty on other ranks.
        """
        return self._writer.write(self._written_parts(), self._adam_step(), directory)

    def begin_save(self, directory: Path) -> PendingSave:
        """Snapshot the state that `save` would write. Training may continue at once. Every rank calls this."""
        return self._writer.begin(self._written_parts(), self._adam_step(), directory)

    def _written_parts(self) -> dict[str, Piece]:
        """Return the pieces that this rank writes, by their names in a checkpoint."""
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
        """Return a ZeRO-sharded piece as it is, and an even share of a piece that all data-parallel ranks hold."""
        return piece if sharded else piece.share(self.data_parallel_rank, self.data_parallel_size)

    def load(self, directory: Path) -> None:
        """Load a checkpoint of either engine, written under any layout, ZeRO stage and offloading."""
        reader = pieces.Reader(directory)
        owned = {name: {key: self._owned(name, key) for key in (_MAIN, *MOMENTS)} for name in self._trained}
        frozen = {name: self._frozen(name) for name in self._rows if name not in self._trained}
        parts = {pieces.MODEL + name: piece for name, piece in frozen.items()}
        for name, by_key in owned.items():
            parts |= reader.optimizer_state(name, by_key[_MAIN], by_key)
        reader.read(parts)
        # Under ZeRO 3 the pieces may be copies, so the values have to be written back.
        if self._stage == 3:
            for name, by_key in owned.items():
                for key, piece in by_key.items():
                    self._give_back(name, key, piece.values)
        for state in self._adam.state.values():
            state["step"].fill_(reader.adam_step)
        self._publish()
        reader.restore_random_state(self.rank, self.world_size)

    def _is_partitioned(self, name: str) -> bool:
        """Whether ZeRO shards the tensor that the model computes with. True for parameters, not buffers, in stage 3."""
        return self._stage == 3 and name in self._parameters

    def _frozen(self, name: str) -> Piece:
        """Return a view of this rank's elements of a frozen parameter or a buffer."""
        shard, tensor = self._shards[name], self._rows[name].tensor
        if self._is_partitioned(name):
            start, count = self._range(name)
            return Piece(shard, start, self._parameters[name].ds_tensor.data.view(-1)[:count])
        return Piece(shard, 0, tensor.data.view(-1))

    def _as_the_model_reads_it(self, name: str, owned: Piece) -> Piece:
        """Return the model's own values for the elements of a piece, in the parameter's dtype."""
        if self._stage == 3:
            values = self._parameters[name].ds_tensor.data.flatten()[: owned.values.numel()]
        else:
            values = self._parameters[name].data.flatten()[owned.start : owned.start + owned.values.numel()]
        return Piece(owned.shard, owned.start, values)

    def _range(self, name: str) -> tuple[int, int]:
        """Return the start of this rank's ZeRO 3 shard in the flattened parameter, and its length without padding."""
        part = self._parameters[name].ds_tensor.ds_numel
        total = self._shards[name].shape.numel()
        start = min(self.data_parallel_rank * part, total)
        return start, min(part, total - start)

    def _owned(self, name: str, key: str) -> Piece:
        """Return the elements of a main parameter or moment that this rank updates. A view, except under ZeRO 3."""
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
        """Write back values from `_owned` under ZeRO 3, where it may have returned a copy on another device."""
        parameter = self._parameters[name]
        utils = self._deepspeed.utils
        padded = nn.functional.pad(values, (0, parameter.ds_tensor.ds_numel - values.numel()))
        if key == _MAIN:
            utils.safe_set_local_fp32_param(parameter, padded)
            parameter.ds_tensor.data.copy_(padded)
        else:
            utils.safe_set_local_optimizer_state(parameter, padded, key)

    def _publish(self) -> None:
        """Copy the main parameters into the parameters that the model reads."""
        optimizer = self._engine.optimizer
        if self._stage in (1, 2):
            optimizer.update_lp_params()
        elif self._stage == 3:
            # Small parameters are kept whole on every rank. Drop and gather them again.
            optimizer.checkpoint_event_prologue()
            optimizer.checkpoint_event_epilogue()

    def _adam_step(self) -> int:
        """Number of updates, without skipped steps."""
        return int(next(iter(self._adam.state.values()))["step"])

    def close(self) -> None:
        """Destroy the process groups."""
        self._engine.destroy()
        self._deepspeed.comm.destroy_process_group()
        process_groups.close()


def _import_deepspeed(device: torch.device) -> Any:
    """Import DeepSpeed quietly and for this device. DeepSpeed would otherwise detect a device itself at import."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu" if device.type == "cpu" else "cuda")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        deepspeed = importlib.import_module("deepspeed")
    # It would collect garbage and print a table of memory eight times, which takes seconds in total.
    bf16_optimizer: Any = importlib.import_module("deepspeed.runtime.bf16_optimizer")
    bf16_optimizer.see_memory_usage = lambda *_, **__: None
    # Errors reach the log as exceptions. Below that level DeepSpeed logs buckets and groups on every rank.
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # DeepSpeed calls collectives by names that torch deprecates, which would warn once per bucket.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed", message=".*is deprecated")
    if device.type == "cpu":
        # A C++ operator for inference only. Every rank would compile it at its first use.
        communication: Any = importlib.import_module("deepspeed.comm.torch")
        communication.build_shm_op = lambda: None
        # DeepSpeed only checks for this optimizer's type. Compiling its functions would import inductor, for seconds.
        with megatron_cpu.nothing_compiled():
            importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    return deepspeed


def _model_parallel_groups(device: torch.device, spec: EngineSpec) -> tuple[Groups, Any]:
    """Return the layers' process groups and DeepSpeed's `mpu`. The latter is None without tensor parallelism."""
    parallel = spec.parallel
    if parallel.tensor == 1:
        return WHOLE, None
    from megatron.core import parallel_state

    from trainer.engines import megatron

    if device.type == "cpu":
        megatron_cpu.adapt()
    megatron.initialize_groups(device, parallel, spec.collective_seconds)
    unit = SimpleNamespace()
    # DeepSpeed uses both the names of early Megatron-LM versions and those of later ones.
    for theirs, ours in (("model", "tensor_model"), ("tensor_model", "tensor_model"), ("data", "data")):
        for fact in ("world_size", "rank", "group"):
            function = getattr(parallel_state, f"get_{ours}_parallel_{fact}")
            setattr(unit, f"get_{theirs}_parallel_{fact}", function)
    return megatron.layer_groups(parallel), unit


def _sum_shares(grad: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Sum a gradient over ranks in float32, into a copy: the argument belongs to autograd."""
    total = grad.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total.to(grad.dtype)


def _deepspeed_config(spec: EngineSpec, decoder: Decoder, micro_batches: int, device: torch.device) -> dict[str, Any]:
    sharding, on_gpu = spec.sharding, device.type != "cpu"
    numel = sum(parameter.numel() for parameter in decoder.parameters())
    # An even number, because ZeRO aligns the shards that it gathers.
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
        # Without ZeRO the engine clips itself: DeepSpeed would neither report the norm nor skip a step.
        "gradient_clipping": spec.optim.clip_grad if sharding.zero_stage else 0.0,
        "bf16": {"enabled": spec.precision == "bf16", "check_grad_overflow": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
    }


def _allocate_state(adam: torch.optim.AdamW, parameters: list[Tensor]) -> None:
    """Allocate Adam's moments and step of every parameter now, so that a checkpoint can be read into them."""
    for parameter in parameters:
        adam.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }


def _shapes_alone(decoder: Decoder) -> Decoder:
    with torch.device("meta"):
        return Decoder(decoder.model_config, decoder.vocab_size)
