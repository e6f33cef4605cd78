"""Recorded choices of routers: what generation records, and what a forward does with it."""

import pytest
import torch

from kernels.moe.routing import NORMALIZATIONS, SCORES, gates_of, top_k_gate
from models.config import MoEConfig, RouterConfig, RouterLossConfig
from models.generation import Engine, Request, Sampling
from models.moe.router import Router, recorded_experts
from tests.helpers import rows, tiny_decoder
from tests.models.generation.test_engine import prompt_of
from tests.models.moe.test_router import B, T, build, draw


def model_of(**changes):
    """Three layers, of which two have experts, with a router that is nearly undecided."""
    moe = MoEConfig(num_experts=4, expert_hidden_size=16, router=RouterConfig(top_k=2), dense_layers=[1])
    model = tiny_decoder("gated_delta_net, full_attention", num_layers=3, moe=moe, **changes)
    with torch.no_grad():
        for router in routers(model):
            router.weight.mul_(1e-3)
    return model


def routers(model):
    return [module for module in model.modules() if isinstance(module, Router)]


def recorded(model, tokens, experts=None):
    """Log-probabilities [T, V] of the parallel forward, and its choices [T, layers, k]."""
    for router in routers(model):
        router.recorded = []
    row, positions = rows(torch.tensor([tokens]))
    experts = None if experts is None else experts[None]
    hidden = model.hidden_states(row, positions, experts=experts)
    found = torch.stack([router.recorded.pop() for router in routers(model)], 1)
    for router in routers(model):
        router.recorded = None
    return (hidden[:, 0] @ model.head_weight.T).float().log_softmax(-1), found


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_the_gates_of_a_choice_are_the_gates(score, normalize):
    """And have their gradients, which reach chosen experts' logits only where the others do not enter."""
    logits = torch.randn(20, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    weights = torch.randn(20, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    _, expected, chosen = top_k_gate(logits, 3, score=score, normalize=normalize, scale=1.5)
    gates = gates_of(logits, chosen, score=score, normalize=normalize, scale=1.5)
    torch.testing.assert_close(gates, expected, rtol=1e-12, atol=1e-12)
    own, theirs = (torch.autograd.grad((found * weights).sum(), logits)[0] for found in (gates, expected))
    torch.testing.assert_close(own, theirs, rtol=1e-9, atol=1e-12)
    assert own[chosen].abs().min() > 0
    if normalize == "after" or (normalize, score) == ("none", "sigmoid"):
        assert not own[~chosen].any()


def test_a_router_takes_recorded_experts_with_its_own_gates():
    config, losses = RouterConfig(top_k=2, normalize="after"), RouterLossConfig(balance=0.0)
    router, x = build(router=config, losses=losses), draw()
    own = router(x)
    again = router(x, None, False, recorded_experts(own.routing_map, 2).view(T, B, 2))
    assert torch.equal(again.routing_map, own.routing_map) and again.rows == own.rows
    torch.testing.assert_close(again.gates, own.gates)
    others = torch.tensor([7, 8], dtype=torch.int16).expand(T, B, 2).clone()
    others[3:] = 0
    routing = router(x, None, False, others)
    assert routing.routing_map[: 3 * B].nonzero()[:, 1].tolist() == [6, 7] * 3 * B
    torch.testing.assert_close(routing.gates[: 3 * B].sum(-1), torch.ones(3 * B))
    assert torch.equal(routing.routing_map[3 * B :], own.routing_map[3 * B :]), "0 leaves the choice to the router"
    (gradient,) = torch.autograd.grad((routing.gates[: 3 * B, 6]).sum(), router.weight)
    assert gradient[6:].abs().sum() > 0 and not gradient[:6].any()


@pytest.mark.parametrize("prefixes", [0, 2])
@torch.no_grad()
def test_generation_records_the_choices_of_the_parallel_forward(prefixes):
    """Of the prompt, in chunks, and of the answers, in more samples than slots, also after a shared beginning."""
    model = model_of().double().eval()
    engine = Engine(model, slots=2, chunk=7, prefixes=prefixes, record_experts=True)
    prompts = prompt_of(18), prompt_of(18)[:9], (*prompt_of(18)[:9], 1, 2, 3), (4,)
    requests = [Request(prompt, Sampling(3 + i, seed=i), 1 + i % 3) for i, prompt in enumerate(prompts)]
    for request, group in zip(requests, engine.generate(requests), strict=True):
        for answer in group:
            tokens = [*request.prompt, *answer.tokens]
            assert answer.experts.dtype == torch.int16 and answer.experts.shape == (len(tokens) - 1, 2, 2)
            assert torch.equal(answer.experts, recorded(model, tokens)[1][:-1])
    assert all(router.recorded is None for router in routers(model))
    assert Engine(model).generate(requests[:1])[0][0].experts is None
    with pytest.raises(ValueError, match="no record of experts"):
        engine.restore(engine.snapshot(prompts[0]))
    with pytest.raises(ValueError, match="routers that choose a fixed number"):
        Engine(tiny_decoder("hgrn"), record_experts=True)


def test_replay_takes_away_what_another_choice_adds_to_the_mismatch():
    """The routers are nearly undecided, and the sampler's off by as little: some choose other experts."""
    model, sampler = model_of(), model_of()
    with torch.no_grad():
        for router in routers(sampler):
            noise = torch.randn(router.weight.shape, generator=torch.Generator().manual_seed(0))
            router.weight += 0.3 * router.weight.std() * noise
    (request,) = (Request(prompt_of(24), Sampling(24, seed=1)),)
    ((answer,),) = Engine(sampler.eval(), record_experts=True).generate([request])
    tokens = [*request.prompt, *answer.tokens]
    experts = torch.cat([answer.experts, torch.zeros(1, 2, 2, dtype=torch.int16)])
    places = torch.arange(len(request.prompt) - 1, len(tokens) - 1)

    def mismatch(choice):
        log_probs, chosen = recorded(model, tokens, choice)
        own = log_probs[places].gather(1, torch.tensor(answer.tokens)[:, None])[:, 0]
        return (own - torch.tensor(answer.log_probs)).abs().mean(), chosen, own

    without, chosen, _ = mismatch(None)
    replayed, taken, own = mismatch(experts)
    assert not torch.equal(chosen[:-1], answer.experts), "the test needs routers that differ"
    assert torch.equal(taken[:-1], answer.experts)
    assert replayed < without / 50 and without > 1e-3
    own.sum().backward()
    assert all(router.weight.grad.abs().sum() > 0 for router in routers(model))
