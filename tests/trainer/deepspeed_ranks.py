"""What test_deepspeed_engine.py runs on several ranks: a list of jobs, one engine after another in the same processes.

python -m tests.trainer.deepspeed_ranks DATA JOBS.json RESULTS.json

A job is a dictionary: engine, stage, offload, precision, tensor, sequence, whether the model has experts; first and
last step; a checkpoint to `load` before, and those to `save` by step; `poison`, what of step 1 is no number on rank 0
(loss or gradient); `validate`. Runs beside this one may wait for its checkpoints.
"""

import json
import math
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from models.config import MoEConfig
from tests.helpers import WAIT
from tests.trainer.conftest import in_process_config
from trainer.cli import from_mapping
from trainer.config import EngineConfig, ParallelConfig
from trainer.data.sources import find_sources
from trainer.engines.megatron import parallel_state
from trainer.objectives.language_model import LanguageModel
from trainer.pretrain import build_engine

LR = 0.003
# All that a router can keep from step to step, or draw.
EXPERTS = from_mapping(
    MoEConfig,
    {
        "num_experts": 4,
        "shared_experts": 1,
        "expert_hidden_size": 32,
        "router": {
            "gate": "dense_to_sparse",
            "dense_to_sparse": {"schedule": "learned", "gumbel_noise": True, "threshold": 0.2, "decay_steps": 3},
        },
        "losses": {"balance": 0.1, "z": 0.01},
    },
)


def no_gradient(module, inputs, output):
    output.register_hook(lambda gradient: gradient * math.inf)


# Forward hooks of the final norm.
POISONS = {"loss": lambda module, inputs, output: output * math.nan, "gradient": no_gradient}


def uneven(batch):
    """A batch of which a share of the tokens that differs from sample to sample counts."""
    threshold = batch.labels.float().mean(dim=1, keepdim=True)
    return replace(batch, loss_mask=batch.loss_mask * (batch.labels > threshold))


def build(data, job):
    config = in_process_config(
        data, "unused", precision=job.get("precision", "fp32"), micro_batch_size=1, global_batch_size=4
    )
    engine = EngineConfig(job.get("engine", "deepspeed"), job.get("stage", 1), job.get("offload", "none"))
    parallel = ParallelConfig(tensor=job.get("tensor", 1), sequence=job.get("sequence", False))
    # Heads that two tensor-parallel ranks can share.
    attention = replace(config.model.attention, num_kv_heads=2)
    config = replace(config, engine=engine, parallel=parallel, model=replace(config.model, attention=attention))
    if job.get("experts"):
        config = replace(config, model=replace(config.model, moe=EXPERTS))
    sources = find_sources(config)
    vocab_size = config.model.padded_vocab_size(sources.vocab_size)
    built = build_engine(config, vocab_size, torch.device("cpu"))
    decoder = built.model if config.engine.name == "megatron" else built._decoder
    return built, sources.open_training(config), decoder


def wait_for(path):
    end = time.monotonic() + WAIT
    while not path.exists():
        assert time.monotonic() < end, f"{path} was not written"
        time.sleep(0.05)


def save(engine, directory):
    """Write a checkpoint; the numbers drawn after it."""
    directory.mkdir(parents=True, exist_ok=True)
    engine.collectives.barrier()
    torch.manual_seed(7)
    engine.save(directory)
    engine.collectives.barrier()
    Path(f"{directory}.done").touch()
    return torch.rand(4).tolist()


def run(data, job):
    engine, sampler, decoder = build(data, job)

    def batches(step):
        own = sampler.micro_batches(step, 1, rank=engine.data_parallel_rank, world=engine.data_parallel_size)
        return [uneven(batch) for batch in own]

    def validate():
        own = batches(1000)
        return engine.collectives.sum_over_data(engine.evaluate(own, LanguageModel()))[0]

    result = {"steps": [], "counted": sum(parameter.numel() for parameter in engine.model.parameters())}
    if "load" in job:
        wait_for(Path(f"{job['load']}.done"))
        torch.manual_seed(99)
        engine.load(Path(job["load"]))
        result["random"] = torch.rand(4).tolist()
    for step in range(job.get("first", 0), job["last"]):
        own = batches(step)
        hook = None
        if "poison" in job and step == 1:
            result["before"] = validate()
            if engine.rank == 0:
                hook = decoder.final_norm.register_forward_hook(POISONS[job["poison"]])
        outcome = engine.train_step(own, LanguageModel(), LR, step)
        if hook is not None:
            hook.remove()
        if "poison" in job and step == 1:
            result["after"] = validate()
        result["steps"].append([outcome.loss, outcome.grad_norm, outcome.tokens, outcome.skipped])
        if str(step + 1) in job.get("save", {}):
            result["random"] = save(engine, Path(job["save"][str(step + 1)]))
    result["metrics"] = outcome.metrics
    result["types"] = {name: str(parameter.dtype) for name, parameter in decoder.named_parameters()}
    result["held"] = {name: parameter.data.numel() for name, parameter in decoder.named_parameters()}
    if job.get("validate"):
        result["validation"] = validate()
    parallel_state.destroy_model_parallel()
    return result


def main():
    torch.set_num_threads(1)
    data, jobs, results = sys.argv[1:]
    outcomes = {name: run(data, job) for name, job in json.loads(Path(jobs).read_text()).items()}
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        Path(results).write_text(json.dumps(outcomes))


if __name__ == "__main__":
    main()
