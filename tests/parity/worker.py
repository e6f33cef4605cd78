"""A rank of a pool that trains one layout after another: python -m tests.parity.worker FOLDER.

It waits for FOLDER/job_N.json, N = 0, 1, …, runs it with the other ranks, and leaves FOLDER/result_N_RANK.pt.
"""

import json
import os
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from models.decoder import Decoder, initialize
from models.parallel import sharded_parameters
from trainer.cli import from_mapping
from trainer.config import PretrainConfig
from trainer.data.batch import make_batch
from trainer.engines.deepspeed import DeepSpeedEngine
from trainer.engines.megatron import MegatronEngine, parallel_state

EOD = 0
VOCAB = 64


def batches(config, step, rank, ranks):
    """A rank's micro-batches of a step: random tokens in documents of some ten tokens, borders anywhere."""
    train = config.train
    generator = np.random.default_rng((train.seed, step))
    samples = generator.integers(1, VOCAB, (train.global_batch_size, train.seq_len + 1))
    samples[generator.random(samples.shape) < 0.08] = EOD
    mask = (generator.random((train.global_batch_size, train.seq_len)) < 0.9).astype(np.float32)
    size = train.micro_batch_size
    rows = range(rank * size, train.global_batch_size, ranks * size)
    packed = config.data.document_mask
    return [make_batch(samples[i : i + size], EOD, packed, mask[i : i + size]) for i in rows]


def gradients(engine):
    """The gradients of this rank's stages after a step, whole, where this rank is the one to report them."""
    if isinstance(engine, DeepSpeedEngine):
        return engine.first_gradients
    data, tensor = (
        parallel_state.get_data_parallel_group(with_context_parallel=True),
        parallel_state.get_tensor_model_parallel_group(),
    )
    found = {}
    for stage in engine._stages:
        for buffer in stage.buffers:
            for bucket in buffer.buckets:
                # The distributed optimizer leaves each rank the sum for its own part of the bucket.
                parts = list(bucket.grad_data.chunk(dist.get_world_size(data)))
                dist.all_gather(parts, parts[dist.get_rank(data)].clone(), group=data)
        decoder = stage.module.part
        own = {name: parameter.main_grad for name, parameter in decoder.named_parameters()}
        found |= gathered(decoder, own, tensor)
    return found


def gathered(decoder, gradients, group):
    """Copies of gradients by the parameters' names, of those that are cut with the parts of every rank of the group."""
    axes = {id(parameter): axis for parameter, axis in sharded_parameters(decoder)}
    found = {}
    for name, parameter in decoder.named_parameters():
        gradient = gradients[name].contiguous()
        if group is not None and id(parameter) in axes:
            parts = [torch.empty_like(gradient) for _ in range(dist.get_world_size(group))]
            dist.all_gather(parts, gradient, group=group)
            gradient = torch.cat(parts, axes[id(parameter)])
        found[name] = gradient.clone()
    return found


def keep_first_gradients(engine, decoder):
    """Have DeepSpeed's engine leave the gradients of its first update in `first_gradients`, before they are clipped."""
    update, from_zero = engine._update, engine._deepspeed.utils.safe_get_full_grad

    def keep_and_update():
        if engine.first_gradients is None:
            own = {name: from_zero(parameter) for name, parameter in decoder.named_parameters()}
            engine.first_gradients = gathered(decoder, own, decoder.groups.tensor)
        return update()

    engine.first_gradients, engine._update = None, keep_and_update


def build(job):
    """The engine of a job, and its configuration."""
    config = from_mapping(PretrainConfig, job["config"])
    if config.engine.name == "megatron":
        return MegatronEngine(config, VOCAB, torch.device("cpu")), config
    decoder = Decoder(config.model, VOCAB)
    initialize(decoder, config.train.seed)
    engine = DeepSpeedEngine(config, decoder, torch.device("cpu"))
    keep_first_gradients(engine, decoder)
    return engine, config


def run(job):
    """Losses and gradient norms of every step, the gradients of the first, a validation at the end."""
    engine, config = build(job)
    if job.get("load"):
        engine.load(Path(job["load"]))
    steps, first = [], None
    for step in range(job.get("first_step", 0), job["steps"]):
        own = batches(config, step, engine.data_parallel_rank, engine.data_parallel_size)
        result = engine.train_step(iter(own), len(own), config.optim.lr)
        steps.append((result.loss, result.grad_norm, result.tokens))
        if first is None:
            first = gradients(engine)
        if step + 1 == job.get("save_after"):
            if engine.rank == 0:
                Path(job["save"]).mkdir()
            dist.barrier()
            engine.save(Path(job["save"]))
    own = batches(config, -1 % 997, engine.data_parallel_rank, engine.data_parallel_size)
    (validation,) = engine.all_reduce([engine.loss_sum(iter(own), len(own))])
    parallel_state.destroy_model_parallel()
    return {"steps": steps, "gradients": first, "validation": validation}


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
            result = run(job)
        except Exception:
            result = {"error": traceback.format_exc()}
        part = folder / f"part_{number}_{rank}.pt"
        torch.save(result, part)
        part.rename(folder / f"result_{number}_{rank}.pt")
        if "error" in result:
            return
        number += 1


if __name__ == "__main__":
    main(Path(sys.argv[1]))
