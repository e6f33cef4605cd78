"""Two ranks that share a model draw the tokens of one rank.

python -m tests.models.generation.engine_ranks
"""

import torch
import torch.distributed as dist

from models.config import MIXERS, MoEConfig, RouterConfig
from models.decoder import Decoder, build, initialize
from models.generation import Engine, Request, Sampling
from models.parameters import WHOLE, Groups
from tests.helpers import VOCABULARY, draw_tokens, tiny_model_config
from trainer.engines import groups, megatron_cpu
from trainer.engines.megatron import parallel_state

EXPERTS = MoEConfig(num_experts=4, shared_experts=1, expert_hidden_size=16, router=RouterConfig(top_k=2))


def model_of(pattern: str, shared: Groups, **changes: object) -> Decoder:
    """Build the part that this rank has of the same model."""
    model = build(tiny_model_config(pattern, **changes), VOCABULARY, groups=shared)
    initialize(model, 0)
    return model


def check(pattern: str, shared: Groups, **changes: object) -> None:
    """The ranks' tokens and log-probabilities are those of the whole model."""
    requests = [
        Request(draw_tokens(length, seed=length).tolist(), Sampling(4 + i, seed=i, top_p=0.9), samples=1 + i % 2)
        for i, length in enumerate((3, 20, 9))
    ]
    options = {"slots": 3, "chunk": 8, "page": 4, "prefixes": 1}
    expected = Engine(model_of(pattern, WHOLE, **changes), **options).generate(requests)
    engine = Engine(model_of(pattern, shared, **changes), **options)
    found = engine.generate(requests)
    for ours, theirs in zip(found, expected, strict=True):
        for own, whole in zip(ours, theirs, strict=True):
            assert own.tokens == whole.tokens, (pattern, shared, own, whole)
            torch.testing.assert_close(torch.tensor(own.log_probs), torch.tensor(whole.log_probs), rtol=0, atol=1e-4)
    everyone: list[object] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, found)
    assert all(other == found for other in everyone), "every rank has the same, to the last bit"
    snapshot = engine.snapshot(requests[1].prompt)
    other = Engine(engine.model, slots=2)
    other.restore(snapshot)
    resumed = other.generate(requests[1:2])
    assert [sample.tokens for sample in resumed[0]] == [sample.tokens for sample in expected[1]]


if __name__ == "__main__":
    groups.initialize(torch.device("cpu"), 60.0)
    megatron_cpu.adapt()
    world = dist.group.WORLD
    check(", ".join(MIXERS), Groups(tensor=world), num_layers=len(MIXERS))
    for sequence in (False, True):
        check("full_attention + gated_delta_net, hgrn", Groups(tensor=world, sequence=sequence))
    parallel_state.initialize_model_parallel(
        expert_model_parallel_size=2, expert_tensor_parallel_size=1, create_gloo_process_groups=False
    )
    check("gated_delta_net, full_attention", Groups(expert=world), moe=EXPERTS)
    check("gated_delta_net, full_attention", Groups(tensor=world, sequence=True, expert=world), moe=EXPERTS)
    dist.destroy_process_group()
