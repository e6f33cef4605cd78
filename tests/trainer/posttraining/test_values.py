"""Values of PPO: the clipped loss, estimates of whole rollouts, and the head itself."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.decoder import build, initialize
from models.parameters import declared
from tests.helpers import tiny_model_config
from trainer.objectives.base import Outputs
from trainer.posttraining.data.sequences import TokenSequence
from trainer.posttraining.values import estimate, value_loss


@given(st.integers(0, 2**32 - 1), st.floats(0.01, 2.0))
@settings(max_examples=30, deadline=None)
def test_the_loss_and_its_gradient_are_those_of_ppo2(seed, clip):
    """openai/baselines, ppo2/model.py: vf_loss = 0.5 mean(maximum(square(v − R), square(v_clipped − R)))."""
    draw = torch.Generator().manual_seed(seed)
    values, old, returns = torch.randn(3, 12, dtype=torch.float64, generator=draw)
    weights = torch.rand(12, dtype=torch.float64, generator=draw)
    weights[::5] = 0
    values.requires_grad_()
    found, sums = value_loss(values, old, returns, weights, clip)
    losses = []
    for value, before, target, weight in zip(values, old, returns, weights, strict=True):
        clipped = before + torch.clamp(value - before, min=-clip, max=clip)
        losses.append(weight * 0.5 * torch.maximum((value - target) ** 2, (clipped - target) ** 2))
    expected = torch.stack(losses).sum()
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    ours, theirs = (torch.autograd.grad(one, values, retain_graph=True)[0] for one in (found, expected))
    assert ours.tolist() == pytest.approx(theirs.tolist(), abs=1e-14)
    assert sums["tokens"] == 9 and 0 <= sums["clipped"] <= 9


def test_tokens_without_weight_do_not_count():
    values = torch.tensor([1.0, torch.nan], requires_grad=True)
    loss, sums = value_loss(values, torch.tensor([0.0, torch.inf]), torch.zeros(2), torch.tensor([1.0, 0.0]), 0.5)
    loss.backward()
    assert loss == 0.5 and values.grad.tolist() == [1.0, 0.0]
    assert {name: float(value) for name, value in sums.items()} == {"tokens": 1, "loss": 0.5, "clipped": 0}


def answer(prompt: int, tokens: int, learned: bool = True) -> TokenSequence:
    return TokenSequence.of([(list(range(prompt)), False), (list(range(tokens)), learned)])


def test_estimates_of_a_rollout_are_those_of_its_answers():
    """Against the definition, A_t = sum_k (γλ)^k δ_{t+k}, over the tokens of every answer by itself."""
    random = np.random.default_rng(0)
    sequences = [answer(2, 3), answer(1, 5), answer(4, 2, learned=False), answer(3, 1)]
    values = [random.normal(size=len(one)).astype(np.float32) for one in sequences]
    penalties = [random.normal(size=len(one)).astype(np.float32) for one in sequences]
    rewards = torch.tensor([1.0, -0.5, 7.0, 2.0], dtype=torch.float64)
    gamma, lam = 0.9, 0.7
    found = estimate(sequences, values, rewards, gamma=gamma, lam=lam, penalties=penalties)
    advantages, returns, kept = [], [], []
    for number, (prompt, tokens) in enumerate(((2, 3), (1, 5), (None, None), (3, 1))):
        if prompt is None:
            continue
        own = np.append(values[number][prompt:].astype(float), 0.0)
        given = -penalties[number][prompt:].astype(float)
        given[-1] += rewards[number].item()
        deltas = given + gamma * own[1:] - own[:-1]
        for t in range(tokens):
            advantages.append(sum((gamma * lam) ** k * deltas[t + k] for k in range(tokens - t)))
            returns.append(advantages[-1] + own[t])
            kept.append(own[t])
    whitened = (np.array(advantages) - np.mean(advantages)) / np.std(advantages)
    places = [(0, 2, 5), (1, 1, 6), (3, 3, 4)]
    ours = np.concatenate([found.advantages[number][start:stop] for number, start, stop in places])
    assert ours == pytest.approx(whitened, abs=1e-5)
    ours = np.concatenate([found.returns[number][start:stop] for number, start, stop in places])
    assert ours == pytest.approx(returns, abs=1e-5)
    assert found.explained == pytest.approx(1 - np.var(np.array(returns) - kept) / np.var(returns), abs=1e-6)
    assert not found.returns[2].any() and not found.advantages[2].any()
    assert not any(found.returns[number][:start].any() for number, start, _ in places)


def test_returns_that_are_all_alike_explain_nothing():
    values = [np.zeros(4, np.float32)] * 2
    found = estimate([answer(1, 3)] * 2, values, torch.ones(2), gamma=1.0, lam=1.0)
    assert found.explained == 0 and found.returns[0].tolist() == [0, 1, 1, 1]


def test_the_head_is_apart_from_the_language_model():
    config = tiny_model_config("full_attention")
    plain, headed = build(config, 64), build(config, 64, value_head=True)
    for model in (plain, headed):
        initialize(model, 0)
    assert set(declared(headed)) - set(declared(plain)) == {"value_head.weight", "value_head.bias"}
    assert all(torch.equal(row.tensor, declared(headed)[name].tensor) for name, row in declared(plain).items())
    tokens = torch.arange(6)[None]
    hidden = headed.hidden_states(tokens, torch.arange(6)[None])
    outputs = Outputs(hidden, headed.head_weight, headed.groups, value_head=headed.value_head)
    assert outputs.values().shape == (1, 6) and not outputs.values().any()
    with torch.no_grad():
        headed.value_head.weight.copy_(torch.arange(config.hidden_size).float())
        headed.value_head.bias.fill_(2.0)
    expected = hidden.transpose(0, 1) @ torch.arange(config.hidden_size).float() + 2
    assert torch.allclose(outputs.values(), expected, rtol=1e-5)
