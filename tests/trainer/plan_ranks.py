"""A rank that trains one step of each job, and measures what it holds, keeps and sends.

python -m tests.trainer.plan_ranks JOBS.json RESULTS

A job is a configuration as plain values; results are RESULTS.RANK.json.
"""

import gc
import json
import sys
import weakref
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
from torch.autograd.graph import saved_tensors_hooks

from tests.parity.worker import VOCAB, batches
from trainer.cli import from_mapping
from trainer.communication import SentBytes
from trainer.config import PretrainConfig
from trainer.engines.spec import EngineSpec
from trainer.objectives.language_model import LanguageModel


class Keeping:
    """The bytes that autograd keeps of forward passes, each storage once, and their peak."""

    def __init__(self, parameters):
        self.known = {tensor.untyped_storage().data_ptr() for tensor in parameters}
        self.users = Counter()
        self.now = self.peak = 0

    def hold(self, holder, tensor):
        """Count a storage while `holder` lives."""
        storage = tensor.untyped_storage()
        key, size = storage.data_ptr(), storage.nbytes()
        if key in self.known:
            return
        self.now += size * (self.users[key] == 0)
        self.users[key] += 1
        self.peak = max(self.peak, self.now)
        weakref.finalize(holder, self._release, key, size)

    def _release(self, key, size):
        self.users[key] -= 1
        self.now -= size * (self.users[key] == 0)

    def watch(self, module, sends_on):
        """Have the forward passes of a stage counted, and what they give to the next one."""
        run = module.forward
        tell = module.part._layer_infos

        def layer_infos(*args):
            # What is recomputed holds on to them, where autograd does not see it.
            infos = tell(*args)
            for info in infos:
                for table in (info.cos, info.sin):
                    if table is not None:
                        self.hold(info, table)
            return infos

        def forward(*args, **kwargs):
            with saved_tensors_hooks(self.pack, lambda held: held.tensor):
                output = run(*args, **kwargs)
            if sends_on:
                self.hold(output, output)
            return output

        module.forward = forward
        module.part._layer_infos = layer_infos

    def pack(self, tensor):
        held = Held(tensor)
        self.hold(held, tensor)
        return held


class Held:
    def __init__(self, tensor):
        self.tensor = tensor


def storages(tensors):
    """Bytes by address."""
    return {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}


def megatron(config):
    from trainer.engines.megatron import MegatronEngine, parallel_state

    engine = MegatronEngine(EngineSpec.of(config, VOCAB), torch.device("cpu"))
    parameters = storages(parameter for stage in engine._stages for parameter in stage.parameters())
    buffers = (buffer for stage in engine._stages for buffer in stage.buffers + stage.expert_parallel_buffers)
    gradients = storages(buffer.grad_data for buffer in buffers)
    own = [part.optimizer for part in engine._optimizer.chained_optimizers]
    main = [parameter for optimizer in own for group in optimizer.param_groups for parameter in group["params"]]
    moments = [value for optimizer in own for state in optimizer.state.values() for value in state.values()]
    optimizer = {key: size for key, size in storages(main + moments).items() if key not in parameters}
    held = {"parameters": parameters, "gradients": gradients, "optimizer": optimizer}
    result = {name: sum(sizes.values()) for name, sizes in held.items()}
    keeping = Keeping(parameter for stage in engine._stages for parameter in stage.parameters())
    for stage in engine._stages:
        keeping.watch(stage.module, sends_on=not stage.module.post_process)
    sent = step(engine, config)
    groups = {
        "tensor": parallel_state.get_tensor_model_parallel_group(),
        "context": parallel_state.get_context_parallel_group(),
        "expert": parallel_state.get_expert_model_parallel_group(),
        "data": parallel_state.get_data_parallel_group(with_context_parallel=True),
        "tied": parallel_state.get_embedding_group(),
    }
    result |= {"activations": keeping.peak, "sent": {name: sent.total(group) for name, group in groups.items()}}
    # Of two stages one sends over the group of all ranks.
    result["sent"]["pipeline"] = by_collective(sent, "send")
    parallel_state.destroy_model_parallel()
    return result


def alive():
    """All storages of this process that its objects lead to."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter) and x.device.type == "cpu"]
    return {x.untyped_storage().data_ptr(): x.untyped_storage() for x in tensors}


def deepspeed(config):
    from trainer.engines.deepspeed import DeepSpeedEngine

    # Kept, so that none of its addresses comes again.
    before = alive()
    engine = DeepSpeedEngine(EngineSpec.of(config, VOCAB), torch.device("cpu"))
    held = {}
    update = engine._adam.step

    def measured_update(*args, **kwargs):
        held.update({key: storage.nbytes() for key, storage in alive().items() if key not in before})
        return update(*args, **kwargs)

    # In the first step ZeRO 3 finds out in which order parameters are used.
    step(engine, config)
    engine._adam.step = measured_update
    sent = step(engine, config)
    engine._engine.destroy()
    gathered = by_collective(sent, "allgather_base")
    return {
        "held": sum(held.values()),
        "sent": {"parameters": gathered, "gradients": sum(sent.by_group.values()) - gathered},
    }


def by_collective(sent, wanted):
    return sum(size for (_, name), size in sent.by_group.items() if name == wanted)


def step(engine, config):
    own = batches(config, 0, engine.data_parallel_rank, engine.data_parallel_size)
    with SentBytes() as sent:
        engine.train_step(own, LanguageModel(), 1e-3)
    return sent


def main():
    torch.set_num_threads(1)
    jobs, results = sys.argv[1:]
    dist.init_process_group("gloo")
    measured = {}
    for name, values in json.loads(Path(jobs).read_text()).items():
        config = from_mapping(PretrainConfig, values)
        measured[name] = {"megatron": megatron, "deepspeed": deepspeed}[config.engine.name](config)
    Path(f"{results}.{dist.get_rank()}.json").write_text(json.dumps(measured))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
