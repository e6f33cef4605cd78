"""Routers: what reaches the gradient, what the noise is drawn from, capacity, balancing by bias."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models import parameters
from models.config import DenseToSparseConfig, ModelConfig, MoEConfig, RouterConfig, RouterLossConfig
from models.moe.router import Router, busiest, fit_capacity, gumbel, gumbel_noise, token_keys
from models.parameters import Groups

EXPERTS, WIDTH, T, B = 8, 16, 6, 3


def build(seed=0, **changes):
    """A router of 8 experts, as at a step of training."""
    router = Router(MoEConfig(num_experts=EXPERTS, **changes), WIDTH)
    parameters.draw(router, ModelConfig(moe=router.config), seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        router.weight.normal_(generator=generator)
    router.step = 0
    return router


def draw(seed=0, t=T):
    return torch.randn(t, B, WIDTH, generator=torch.Generator().manual_seed(seed))


def sparse(**changes):
    return RouterConfig(gate="dense_to_sparse", dense_to_sparse=DenseToSparseConfig(**changes))


def gradient(router, x, weights):
    """Of the router, when the loss is the sum of the gates times weights."""
    router.weight.grad = None
    (router(x).gates * weights).sum().backward()
    return router.weight.grad.clone()


@pytest.mark.parametrize("scope", ["micro_batch", "sequence", "global"])
@pytest.mark.parametrize("router", [RouterConfig(), RouterConfig(score="sigmoid"), sparse(threshold=0.1)], ids=repr)
def test_the_losses_reach_the_gradient_as_their_formulas(router, scope):
    """E sum_e p_e f_e and lse^2, summed over tokens and scaled; the gates themselves are as without them."""
    losses = RouterLossConfig(balance=0.3, scope=scope, z=0.2)
    ours, plain = build(router=router, losses=losses), build(router=router, losses=RouterLossConfig(balance=0.0))
    load = torch.linspace(1, 2, EXPERTS)
    if scope == "global":
        ours.load.copy_(load / load.sum())
    ours.loss_scale = 0.5
    x, weights = draw(), torch.randn(T * B, EXPERTS)
    routing = ours(x)
    assert torch.equal(routing.gates, plain(x).gates) and torch.equal(routing.routing_map, plain(x).routing_map)
    logits = torch.nn.functional.linear(x.flatten(0, 1), plain.weight)
    if router.gate == "dense_to_sparse":
        p = logits.tanh().softmax(-1)
    else:
        scores = logits.softmax(-1) if router.score == "softmax" else logits.sigmoid()
        p = scores / scores.sum(-1, keepdim=True)
    counts = routing.routing_map.float().view(T, B, EXPERTS)
    counts = {"micro_batch": counts.sum((0, 1), keepdim=True), "sequence": counts.sum(0, keepdim=True)}.get(scope, load)
    share = (counts / counts.sum(-1, keepdim=True)).expand(T, B, EXPERTS).reshape(T * B, EXPERTS)
    extra = 0.3 * EXPERTS * (p * share).sum() + 0.2 * logits.logsumexp(-1).square().sum()
    expected = gradient(plain, x, weights) + 0.5 * torch.autograd.grad(extra, plain.weight)[0]
    torch.testing.assert_close(gradient(ours, x, weights), expected, rtol=1e-4, atol=1e-5)


def test_an_even_load_asks_for_nothing():
    """Of the global balance loss: probabilities add up to one, so that its gradient vanishes at the start."""
    x = draw()
    plain, ours = (build(losses=RouterLossConfig(balance=balance)) for balance in (0.0, 10.0))
    torch.testing.assert_close(gradient(ours, x, 1.0), gradient(plain, x, 1.0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("scope", "same"), [("global", True), ("sequence", True), ("micro_batch", False)])
def test_accumulated_balance_is_that_of_the_batch(scope, same):
    """Cut into micro-batches of a sequence each; the load of a micro-batch alone is another one."""
    router = build(router=sparse(threshold=0.1), losses=RouterLossConfig(balance=1.0, scope=scope, z=0.1))
    if router.load is not None:
        router.load.copy_(torch.arange(EXPERTS) / 28)
    x, zero = draw(), torch.zeros(())
    whole = gradient(router, x, zero)
    parts = sum(gradient(router, x[:, i : i + 1], zero) for i in range(B))
    assert torch.allclose(whole, parts, rtol=1e-4, atol=1e-5) == same


def test_evaluation_has_no_noise_drops_nothing_and_counts_nothing():
    router = build(router=sparse(gumbel_noise=True, threshold=0.1), capacity_factor=0.2)
    router.statistics = torch.zeros(EXPERTS + 7, dtype=torch.float64)
    x = draw()
    keys = token_keys(torch.arange(T * B).view(T, B), torch.zeros(T, B, dtype=torch.int64))
    trained = router(x, keys)
    counted = router.statistics.clone()
    assert counted[-1] == T * B and counted[EXPERTS] > 0
    with torch.no_grad():
        frozen = router(x, keys)
    evaluated = router.eval()(x, keys)
    assert torch.equal(frozen.gates, evaluated.gates)
    assert not torch.equal(frozen.routing_map, trained.routing_map)
    assert frozen.routing_map.sum() == router.eval()(x).routing_map.sum()
    assert torch.equal(router.statistics, counted)


def test_temperature_sharpens_with_the_step_and_stays_when_training_is_over():
    router = build(router=sparse(temperature_start=2.0, temperature_end=0.1, decay_steps=10, threshold=0.02)).eval()
    kept = {}
    for router.step in (0, 5, 10, 99, None):
        kept[router.step] = router(draw()).routing_map
    assert kept[0].sum() > kept[10].sum()
    assert torch.equal(kept[10], kept[99]) and torch.equal(kept[10], kept[None])


def test_a_learned_temperature_learns():
    router = build(router=sparse(schedule="learned", temperature_start=1.5))
    assert router.log_temperature.exp().item() == pytest.approx(1.5)
    router(draw()).gates.square().sum().backward()
    assert router.log_temperature.grad.abs() > 0


def test_noise_is_a_function_of_seed_step_and_token():
    keys = token_keys(torch.arange(50), torch.arange(50) % 7)
    noise = gumbel_noise(keys, EXPERTS, seed=3, step=4)
    assert torch.equal(noise, gumbel_noise(keys, EXPERTS, 3, 4))
    assert torch.equal(noise[10:20], gumbel_noise(keys[10:20], EXPERTS, 3, 4)), "whatever the tokens beside it"
    for other in (gumbel_noise(keys, EXPERTS, 3, 5), gumbel_noise(keys, EXPERTS, 4, 4)):
        assert not (noise == other).any()
    assert len(token_keys(torch.arange(50)[:, None], torch.arange(50)[None]).unique()) == 2500


def test_noise_is_gumbels():
    """Mean Euler's constant, variance pi^2 / 6, and uncorrelated between experts, tokens and steps."""
    keys = token_keys(torch.arange(4000), torch.arange(4000) % 512)
    noise = gumbel_noise(keys, 16, seed=1, step=2)
    assert float(noise.mean()) == pytest.approx(0.5772, abs=0.02)
    assert float(noise.var()) == pytest.approx(math.pi**2 / 6, rel=0.03)
    later = gumbel_noise(keys, 16, seed=1, step=3)
    for a, b in ((noise[:, :-1], noise[:, 1:]), (noise[:-1], noise[1:]), (noise, later)):
        pair = torch.stack([a.flatten(), b.flatten()])
        assert abs(float(torch.corrcoef(pair)[0, 1])) < 0.02


def test_noise_is_finite_at_both_ends():
    ends = gumbel(torch.tensor([0, -1]))
    assert ends.isfinite().all() and ends[0] < -2 and ends[1] > 15


def test_of_equal_gates_the_first_fit():
    gates, keep = torch.full((1000, 2), 0.5), torch.ones(1000, 2, dtype=torch.bool)
    gates[700:, 1] = 0.7
    keep[:20, 0] = False
    within = fit_capacity(gates, keep, 400)
    assert within[:, 0].nonzero()[:, 0].tolist() == list(range(20, 420))
    assert within[:, 1].nonzero()[:, 0].tolist() == [*range(100), *range(700, 1000)]
    # Where too few are kept, the first of the others fill the rest.
    keep[:, 0] = False
    keep[900:, 0] = True
    assert fit_capacity(gates, keep, 150)[:, 0].nonzero()[:, 0].tolist() == [*range(50), *range(900, 1000)]


def test_nan_gates_fit_first():
    gates, keep = torch.full((5, 1), 0.5), torch.ones(5, 1, dtype=torch.bool)
    gates[3:] = torch.nan
    assert fit_capacity(gates, keep, 3)[:, 0].tolist() == [True, False, False, True, True]


@settings(deadline=None, derandomize=True, max_examples=30)
@given(st.integers(1, 30), st.integers(1, 6), st.integers(1, 30), st.floats(0, 1), st.integers(0, 99))
def test_capacity(tokens, experts, capacity, share, seed):
    """Every expert takes exactly `capacity` tokens, what it keeps first, of that the largest gates."""
    capacity = min(capacity, tokens)
    generator = torch.Generator().manual_seed(seed)
    gates = torch.rand(tokens, experts, generator=generator)
    keep = torch.rand(tokens, experts, generator=generator) < share
    within = fit_capacity(gates * keep, keep, capacity)
    assert (within.sum(0) == capacity).all()
    for e in range(experts):
        taken, wanted = within[:, e] & keep[:, e], keep[:, e]
        assert taken.sum() == min(capacity, int(wanted.sum()))
        if (wanted & ~taken).any():
            assert gates[taken, e].min() >= gates[wanted & ~taken, e].max()


@pytest.mark.parametrize(
    ("load", "number", "above", "expected"),
    [
        ([0.1, 0.5, 0.1, 0.3], 4, 1.0, (1, 3)),
        ([0.1, 0.5, 0.1, 0.3], 1, 1.0, (1,)),
        ([0.1, 0.5, 0.1, 0.3], 4, 1.5, (1,)),
        ([0.1, 0.5, 0.1, 0.3], 4, 2.0, ()),
        ([5.0, 1.0, 5.0, 5.0], 2, 1.0, (0, 2)),
        ([0.25] * 4, 4, 1.0, ()),
    ],
)
def test_the_busiest_experts(load, number, above, expected):
    assert busiest(load, number, above) == expected


def test_experts_are_copied_while_they_are_busy_and_where_ranks_share_them():
    router = build(replicated_experts=2, replicate_above=2.0, losses=RouterLossConfig(balance=0.0))
    router.load.copy_(torch.tensor([0.3, 0.0, 0.1, 0.0, 0.0, 0.4, 0.1, 0.1]))
    router.choose_replicated()
    assert router.replicated == (), "one rank has them all"
    router.groups = Groups(expert=object())
    router.choose_replicated()
    assert router.replicated == (0, 5)
    router.load.fill_(1 / EXPERTS)
    router.choose_replicated()
    assert router.replicated == ()


def test_a_full_expert_drops_and_an_emptier_one_is_filled_up():
    x = draw()
    whole, dropped, padded = (
        build(capacity_factor=factor, pad_to_capacity=pad)
        for factor, pad in ((None, False), (0.75, False), (0.75, True))
    )
    for router in (dropped, padded):
        router.statistics = torch.zeros(EXPERTS + 7, dtype=torch.float64)
    free, held, filled = (router(x) for router in (whole, dropped, padded))
    capacity = math.ceil(0.75 * T * B * 2 / EXPERTS)
    assert held.routing_map.sum(0).max() == capacity < free.routing_map.sum(0).max()
    assert (filled.routing_map.sum(0) == capacity).all()
    assert torch.equal(held.gates, filled.gates) and not held.gates[~held.routing_map].any()
    lost = int((free.routing_map & ~held.routing_map).sum())
    assert not (held.routing_map & ~free.routing_map).any() and lost > 0
    assert dropped.statistics[EXPERTS] == padded.statistics[EXPERTS] == lost
    assert torch.equal(dropped.statistics[:EXPERTS], free.routing_map.sum(0).double()), "load is what is asked for"
