"""A rank of a pool that trains one layout after another: python -m tests.parity.worker FOLDER.

It waits for FOLDER/job_N.json, N = 0, 1, …, runs it with the other ranks, and leaves FOLDER/result_N_RANK.pt.
"""

import gc
import hashlib
import json
import math
import os
import sys
import threading
import time
import traceback
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _world

from models.config import ModelConfig
from models.decoder import initialize
from models.parallel import apply_experts, token_dispatcher
from models.parameters import Groups, parameter_rows
from tests.helpers import CountMargin
from trainer.cli import from_mapping
from trainer.communication import SentBytes
from trainer.config import PretrainConfig
from trainer.data.batch import make_batch
from trainer.engines import megatron_cpu, pieces
from trainer.engines.deepspeed import DeepSpeedEngine
from trainer.engines.frozen import FrozenSpec
from trainer.engines.megatron import MegatronEngine, parallel_state
from trainer.objectives.alignment import Alignment
from trainer.objectives.base import NO_MODELS
from trainer.objectives.distillation import Distillation
from trainer.objectives.language_model import LanguageModel
from trainer.objectives.log_probs import WeightedLogProbs
from trainer.pretrain import build_engine

EOD = 0
VOCAB = 64
MOST_ELEMENTS = pieces._MOST_ELEMENTS


def batches(config, step, rank, ranks, vocab=VOCAB):
    """A rank's micro-batches of a step: random tokens in documents of some ten tokens, borders anywhere."""
    train = config.train
    generator = np.random.default_rng((train.seed, step))
    samples = generator.integers(1, vocab, (train.global_batch_size, train.seq_len + 1))
    samples[generator.random(samples.shape) < 0.08] = EOD
    mask = (generator.random((train.global_batch_size, train.seq_len)) < 0.9).astype(np.float32)
    size = train.micro_batch_size
    rows = range(rank * size, train.global_batch_size, ranks * size)
    packed = config.data.document_mask
    made = [make_batch(samples[i : i + size], EOD, packed, mask[i : i + size], step=step, first_sample=i) for i in rows]
    # Some 0 and some below it, as advantages are; of tokens alone, so that every layout has the same.
    return [
        replace(batch, extra={"advantages": (37 * batch.labels % 11 - 3) / 5, "ones": torch.ones_like(batch.loss_mask)})
        for batch in made
    ]


def gradients(engine):
    """The gradients of this rank's stages after a step, whole, where this rank is the one to report them."""
    if isinstance(engine, DeepSpeedEngine):
        return engine.gradients
    tensor, expert = (
        parallel_state.get_tensor_model_parallel_group(),
        parallel_state.get_expert_model_parallel_group(),
    )
    found = {}
    for stage in engine._stages:
        for buffer in stage.buffers + stage.expert_parallel_buffers:
            data = buffer.data_parallel_group
            for bucket in buffer.buckets:
                # The distributed optimizer leaves each rank the sum for its own part of the bucket.
                parts = list(bucket.grad_data.chunk(dist.get_world_size(data)))
                dist.all_gather(parts, parts[dist.get_rank(data)].clone(), group=data)
        decoder = stage.module.part
        own = {name: parameter.main_grad for name, parameter in decoder.named_parameters() if parameter.requires_grad}
        found |= gathered(decoder, own, tensor, expert)
    return found


def gathered(decoder, gradients, tensor, expert=None):
    """Copies of gradients by the parameters' names, of those that are cut with the parts of every rank of the group."""
    groups = Groups(tensor=tensor, expert=expert)
    found = {}
    for name, row in parameter_rows(decoder).items():
        if not row.tensor.requires_grad:
            continue
        gradient, group = gradients[name].contiguous(), row.group(groups)
        if group is not None:
            parts = [torch.empty_like(gradient) for _ in range(dist.get_world_size(group))]
            dist.all_gather(parts, gradient, group=group)
            gradient = torch.cat(parts, row.axis)
        found[name] = gradient.clone()
    return found


def keep_gradients(engine, decoder):
    """Have DeepSpeed's engine leave unclipped gradients in `gradients`, of the first update that finds None there."""
    update, from_zero = engine._update, engine._deepspeed.utils.safe_get_full_grad

    def keep_and_update():
        if engine.gradients is None:
            trained = {name: value for name, value in decoder.named_parameters() if value.requires_grad}
            own = {name: from_zero(parameter) for name, parameter in trained.items()}
            engine.gradients = gathered(decoder, own, decoder.groups.tensor)
        return update()

    engine.gradients, engine._update = None, keep_and_update


def build(job):
    """The engine of a job, and its configuration."""
    config, vocab = from_mapping(PretrainConfig, job["config"]), job.get("vocab", VOCAB)
    engine = build_engine(config, vocab, torch.device("cpu"))
    if isinstance(engine, DeepSpeedEngine):
        keep_gradients(engine, engine._decoder)
    return engine, config


class SomeLogits:
    """The cross entropy and the squared log-sum-exp of every fourth token, from its logits."""

    metrics = ("chosen",)
    models = NO_MODELS

    def count(self, batch):
        return int(batch.loss_mask.count_nonzero())

    def forward(self, outputs, batch):
        chosen = (batch.labels % 4 == 0) & (batch.loss_mask != 0)
        logits = outputs.logits(chosen)
        total = logits.logsumexp(-1)
        picked = logits.gather(1, batch.labels[chosen][:, None])[:, 0]
        return (total - picked + 0.1 * total.square()).sum(), (chosen.sum(),)


def objective_of(job, config, engine):
    """What a job minimises; a teacher's shape is the student's but for what the job says."""
    if "logits" in job:
        return SomeLogits()
    if "log_probs" in job:
        return WeightedLogProbs(**job["log_probs"])
    if "alignment" in job:
        model = from_mapping(ModelConfig, job["config"]["model"] | job["alignment"])
        fill = partial(initialize, seed=config.train.seed + 1)
        spec = FrozenSpec(model, engine.model.vocab_size, fill, stages_as_trained=True)
        return Alignment(engine.freeze(spec), config.model.differing_mixers(model))
    if "distillation" not in job:
        return LanguageModel()
    options = dict(job["distillation"])
    model = from_mapping(ModelConfig, job["config"]["model"] | options.pop("teacher"))
    fill = partial(initialize, seed=config.train.seed + 1)
    spec = FrozenSpec(model, engine.model.vocab_size, fill, options.pop("precision", "fp32"))
    return Distillation(engine.freeze(spec), **options)


def save(engine, path, in_background=False):
    """Write a checkpoint's state; in the background by a thread, which is returned."""
    if engine.rank == 0:
        Path(path).mkdir()
    dist.barrier()
    if not in_background:
        engine.save(Path(path))
        return None
    writer = threading.Thread(target=engine.begin_save(Path(path)).write)
    writer.start()
    return writer


def digest(engine):
    """Of the parameters that this rank has: those that the model reads, under ZeRO 3 its parts of them."""
    decoders = engine._decoders if isinstance(engine, MegatronEngine) else [engine._decoder]
    found = hashlib.sha256()
    for name, parameter in (named for decoder in decoders for named in decoder.named_parameters()):
        values = parameter.detach().flatten()
        if hasattr(parameter, "ds_tensor"):
            # Less what fills it up, which is whatever was there.
            values = parameter.ds_tensor.detach().flatten()[: engine._range(name)[1]]
        found.update(values.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def held(engine):
    """What this rank has for training: elements of Adam's moments, and of buffers for gradients (Megatron's engine)."""
    megatron = isinstance(engine, MegatronEngine)
    parts = [part.optimizer for part in engine._optimizer.chained_optimizers] if megatron else [engine._adam]
    states = [state for part in parts for state in part.state.values()]
    buffers = (
        [buffer for stage in engine._stages for buffer in stage.buffers + stage.expert_parallel_buffers]
        if megatron
        else []
    )
    return {
        "moments": sum(state[name].numel() for state in states for name in ("exp_avg", "exp_avg_sq")),
        "gradients": sum(buffer.grad_data.numel() for buffer in buffers),
    }


def run(job):
    """Losses and gradient norms of every step, the gradients of the first (or another), a validation at the end, and a
    digest of the parameters; asked to count, the bytes sent between the ranks that share experts, by step and
    collective; asked for a margin, that of the neurons' counts.
    """
    if "jobs" in job:
        return {"results": [run(one) for one in job["jobs"]]}
    groups = set(_world.pg_map)
    engine, config = build(job)
    objective = objective_of(job, config, engine)
    second = build(job["second"])[0] if "second" in job else None
    seconds = []
    vocab, writer = job.get("vocab", VOCAB), None
    if job.get("load"):
        engine.load(Path(job["load"]))
    if job.get("save_again"):
        save(engine, job["save_again"])
    steps, metrics, sent, found, margin = [], [], [], None, CountMargin()
    gradients_of = job.get("gradients_of", job.get("first_step", 0))
    for step in range(job.get("first_step", 0), job["steps"]):
        own = batches(config, step, engine.data_parallel_rank, engine.data_parallel_size, vocab)
        if step == gradients_of:
            vars(engine)["gradients"] = None
        if step == job.get("skip"):
            vars(engine)["_grad_norm"] = lambda *_: math.nan
        watched = margin if job.get("margin") else nullcontext()
        with watched, SentBytes() if job.get("count") else nullcontext() as counted:
            result = engine.train_step(own, objective, config.optim.lr, step)
        vars(engine).pop("_grad_norm", None)
        if counted is not None:
            name = parallel_state.get_expert_model_parallel_group().group_name
            sent.append({what: size for (group, what), size in counted.by_group.items() if group == name})
        steps.append((result.loss, result.grad_norm, result.tokens))
        if second is not None:
            other = second.train_step(own, LanguageModel(), config.optim.lr, step)
            seconds.append((other.loss, other.grad_norm, other.tokens))
        metrics.append(result.metrics)
        if step == gradients_of:
            found = gradients(engine)
        if step + 1 == job.get("save_after"):
            writer = save(engine, job["save"], job.get("in_background"))
    if writer is not None:
        writer.join()
    own = batches(config, -1 % 997, engine.data_parallel_rank, engine.data_parallel_size, vocab)
    with margin if job.get("margin") else nullcontext():
        validated_sums = engine.evaluate(own, objective)
    validation, *validated = engine.collectives.sum_over_data(validated_sums)
    final, kept = digest(engine), held(engine)
    parallel_state.destroy_model_parallel()
    if isinstance(engine, MegatronEngine):
        leave(set(_world.pg_map) - groups)
    return {
        "steps": steps,
        "gradients": found,
        "validation": validation,
        "validated": validated,
        "metrics": metrics,
        "sent": sent,
        "digest": final,
        "held": kept,
        "second": seconds,
        "margin": margin.least,
    }


def traffic(job):
    """What a rank writes, reads and sends in two saves and a load, in bytes; and what it updates of the parameters."""
    groups = set(_world.pg_map)
    engine, _ = build(job)
    counts = {"written": [], "sent": [], "read": 0, "largest": 0}
    if "most_elements" in job:
        pieces._MOST_ELEMENTS = job["most_elements"]
    write, read = pieces.Writer._write_pieces, pieces.Reader._read_box

    def counting_write(self, parts, directory):
        counts["written"].append(sum(part.values.nbytes for part in parts.values()))
        return write(self, parts, directory)

    def counting_read(self, index):
        box = read(self, index)
        counts["read"] += box.nbytes
        counts["largest"] = max(counts["largest"], box.nbytes)
        return box

    pieces.Writer._write_pieces, pieces.Reader._read_box = counting_write, counting_read
    try:
        for number in range(job.get("saves", 0)):
            with SentBytes() as sent:
                save(engine, f"{job['folder']}/{number}")
            counts["sent"].append(sent.by_group.total())
        engine.load(Path(job["folder"]) / "0")
    finally:
        pieces.Writer._write_pieces, pieces.Reader._read_box = write, read
        pieces._MOST_ELEMENTS = MOST_ELEMENTS
    counts["owned"] = sum(owned.main.nbytes for owned in engine._owned.values())
    parallel_state.destroy_model_parallel()
    leave(set(_world.pg_map) - groups)
    return counts


def leave(groups):
    """End a job's process groups: gloo's have threads, of which there would be thousands after a hundred jobs.

    DeepSpeed's stay, for it goes on to use those of its first engine.
    """
    dist.barrier()
    for group in groups:
        dist.destroy_process_group(group)


def dispatch(job):
    """Whether tokens of this rank come back from the experts of all, each having been where its map says, and whether
    gradients do: integers, so that sums are exact whatever their order.
    """
    groups, ranks, experts = set(_world.pg_map), dist.get_world_size(), job["experts"]
    parallel_state.initialize_model_parallel(
        expert_model_parallel_size=ranks, expert_tensor_parallel_size=1, create_gloo_process_groups=False
    )
    megatron_cpu.adapt()
    group = parallel_state.get_expert_model_parallel_group()
    dispatcher = token_dispatcher(experts, group)
    own = range(dist.get_rank(group) * experts // ranks, experts)
    random = torch.Generator().manual_seed(job["seed"] + 1000 * dist.get_rank())
    for tokens, share in job["cases"]:
        x = torch.randint(-8, 9, (tokens, 4), generator=random).float().requires_grad_()
        gates = torch.randint(1, 5, (tokens, experts), generator=random).float().requires_grad_()
        routing_map = torch.rand(tokens, experts, generator=random) < share
        routing_map[:, job["empty"]] = False

        def multiply(rows, counts):
            factors = [torch.full((int(count), 1), expert + 1.0) for expert, count in zip(own, counts, strict=False)]
            assert len(rows) == int(counts.sum())
            return rows * torch.cat(factors)

        y = apply_experts(x, gates, routing_map, multiply, dispatcher)
        assert int(dispatcher.num_out_tokens) == int(routing_map.sum()), "mcore allocates by the number of tokens alone"
        weight = gates * routing_map * torch.arange(1.0, experts + 1)
        expected = x * weight.sum(-1, keepdim=True)
        assert torch.equal(y, expected), (y, expected)
        mine, theirs = (torch.autograd.grad(out.square().sum(), (x, gates), retain_graph=True) for out in (y, expected))
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    parallel_state.destroy_model_parallel()
    leave(set(_world.pg_map) - groups)
    return {"exact": len(job["cases"])}


def main(folder):
    """Serve jobs until one says stop."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    number = 0
    while True:
        path = folder / f"job_{number}.json"
        while not path.exists():
            if os.getppid() == 1:
                return
            time.sleep(0.02)
        job = json.loads(path.read_text())
        if job is None:
            return
        try:
            kinds = {"experts": dispatch, "folder": traffic}
            result = next((kind for key, kind in kinds.items() if key in job), run)(job)
        except Exception:
            result = {"error": traceback.format_exc()}
        part = folder / f"part_{number}_{rank}.pt"
        torch.save(result, part)
        part.rename(folder / f"result_{number}_{rank}.pt")
        if "error" in result:
            return
        # Engines are in cycles with their groups, whose threads end with the last reference.
        gc.collect()
        number += 1


if __name__ == "__main__":
    main(Path(sys.argv[1]))
