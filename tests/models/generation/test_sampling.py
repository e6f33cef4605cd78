"""Drawing tokens: greedy, truncation, penalties, seeds, and what log-probabilities are of."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.generation import Sampling
from models.generation.sampling import draw, uniform

logits_rows = st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=12).map(torch.tensor)


def draws(logits, count, seen=None, **options):
    """Tokens of `count` draws from logits [V], and the last one's record."""
    found = draw(
        logits.expand(count, -1),
        [Sampling(**options)] * count,
        [uniform(options.get("seed", 0), 0, position) for position in range(count)],
        [seen] * count,
        len(logits),
    )
    return [one.token for one in found], found[-1]


def frequencies(logits, count=4_000, **options):
    tokens, _ = draws(logits, count, **options)
    return torch.tensor(tokens).bincount(minlength=len(logits)) / count


@settings(deadline=None)
@given(logits_rows, st.floats(0.01, 1))
def test_temperature_zero_takes_the_most_likely(logits, top_p):
    tokens, last = draws(logits, 2, temperature=0, top_p=top_p)
    assert tokens == [int(logits.argmax())] * 2 and last.tempered_log_prob == 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("row", [[torch.nan, 0.0], [torch.inf, 0.0], [-torch.inf, -torch.inf]])
def test_logits_that_are_not_numbers_are_refused(temperature, row):
    with pytest.raises(FloatingPointError, match="not numbers"):
        draw(torch.tensor([[0.0, 1.0], row]), [Sampling(temperature=temperature)] * 2, [0.5] * 2, [None] * 2, 2)


@pytest.mark.parametrize("temperature", [1e-40, 1e-320])
def test_a_temperature_that_is_too_small_for_the_logits_is_refused(temperature):
    with pytest.raises(FloatingPointError, match="is too small"):
        draws(torch.tensor([0.0, 1.0]), 1, temperature=temperature)


def test_a_token_may_be_ruled_out():
    assert draws(torch.tensor([-torch.inf, 1.0, -torch.inf]), 50)[0] == [1] * 50


def kept(logits, temperature, top_k, top_p, min_p):
    """By the definitions, one after the other; of equally likely tokens any may be kept."""
    probabilities = (logits.double() / temperature).softmax(0)
    ordered = probabilities.sort(descending=True).values
    if top_k:
        ordered = ordered[:top_k]
    total, count = 0.0, 0
    while count < len(ordered) and total < top_p * ordered.sum() - 1e-6:
        total, count = total + ordered[count], count + 1
    least = max(ordered[max(count, 1) - 1], min_p * ordered[0])
    return {i for i, p in enumerate(probabilities.tolist()) if p >= least - 1e-6}


@settings(deadline=None)
@given(
    logits_rows,
    st.floats(0.2, 3),
    st.integers(0, 6),
    st.floats(0.01, 1),
    st.sampled_from([0.0, 0.1, 0.7, 1.0]),
    st.integers(0, 2**40),
)
def test_draws_come_from_what_truncation_leaves(logits, temperature, top_k, top_p, min_p, seed):
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    tokens, _ = draws(logits, 100, seed=seed, **options)
    assert set(tokens) <= kept(logits, **options)


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ({}, [0, 1, 2, 3]),
        ({"top_p": 0.3}, [0]),
        ({"top_p": 0.39}, [0]),
        ({"top_p": 0.6}, [0, 1]),
        ({"top_p": 0.85}, [0, 1, 2]),
        ({"top_k": 2}, [0, 1]),
        ({"top_k": 9}, [0, 1, 2, 3]),
        ({"min_p": 0.4}, [0, 1, 2]),
        ({"min_p": 0.6}, [0, 1]),
        ({"top_k": 2, "top_p": 0.5}, [0]),
        ({"top_k": 3, "min_p": 0.6}, [0, 1]),
    ],
)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_frequencies_are_the_probabilities_of_what_is_left(options, left, temperature):
    probabilities = torch.tensor([0.4, 0.3, 0.2, 0.1])
    counts = frequencies(probabilities.log() * temperature, temperature=temperature, **options)
    expected = torch.zeros(4)
    expected[left] = probabilities[left] / probabilities[left].sum()
    assert counts[expected == 0].sum() == 0
    assert (counts - expected).abs().max() < 5 * 0.5 / 4_000**0.5


@pytest.mark.parametrize("options", [{"top_p": 0.999}, {"min_p": 1e-9}, {"top_k": 900, "top_p": 0.9}])
def test_more_tokens_may_be_left_than_are_sorted_first(options):
    """1000 tokens of almost the same probability, of which the first step sorts 256."""
    logits = torch.linspace(0, 1e-3, 1000)
    tokens, _ = draws(logits, 3000, **options)
    least = round(1000 * (1 - options.get("top_p", 1)) * 0.9) if "top_k" not in options else 190
    assert min(tokens) >= least - 2 and len(set(tokens)) > 700


def test_rows_are_drawn_each_for_itself():
    logits = torch.full((3, 4), -1e9)
    logits[[0, 1, 2], [2, 0, 3]] = 0.0
    samplings = [Sampling(top_p=0.9), Sampling(temperature=0), Sampling(top_k=2, temperature=0.5)]
    assert [one.token for one in draw(logits, samplings, [0.1] * 3, [None] * 3, 4)] == [2, 0, 3]


def test_padding_of_the_vocabulary_is_never_drawn_but_has_probability():
    logits = torch.tensor([[0.0, 1.0, 5.0, 4.0]])
    for options in ({"temperature": 0}, {"top_k": 1}, {}):
        (drawn,) = draw(logits, [Sampling(top_log_probs=3, **options)], [0.9], [None], 2)
        assert drawn.token == 1
        assert drawn.log_prob == pytest.approx(float(logits.log_softmax(-1)[0, 1]))
        assert [token for token, _ in drawn.alternatives] == [1, 0]
    assert drawn.tempered_log_prob == pytest.approx(float(logits[:, :2].log_softmax(-1)[0, 1]))


def test_log_probabilities_are_of_the_model_and_after_the_temperature():
    logits = torch.tensor([1.0, 3.0, 2.0, -1.0])
    _, last = draws(logits, 1, temperature=0.5, top_k=1, top_log_probs=2)
    raw = logits.log_softmax(0)
    assert last.token == 1
    assert last.log_prob == pytest.approx(float(raw[1]))
    assert last.tempered_log_prob == pytest.approx(float((logits / 0.5).log_softmax(0)[1]))
    assert [token for token, _ in last.alternatives] == [1, 2]
    assert [value for _, value in last.alternatives] == pytest.approx([float(raw[1]), float(raw[2])])


def test_the_repetition_penalty_divides_positive_logits_and_multiplies_negative_ones():
    logits, seen = torch.tensor([2.0, 1.5, -1.0, -1.5]), torch.tensor([True, False, True, False])
    tokens, last = draws(logits, 1, seen=seen, temperature=0, repetition_penalty=2.0)
    assert tokens == [1] and last.log_prob == pytest.approx(float(logits.log_softmax(0)[1]))
    expected = torch.tensor([1.0, 1.5, -2.0, -1.5]).softmax(0)
    found = torch.tensor(draws(logits, 4_000, seen=seen, repetition_penalty=2.0)[0]).bincount(minlength=4) / 4_000
    assert (found - expected).abs().max() < 5 * 0.5 / 4_000**0.5


def test_random_numbers_are_uniform_and_differ_in_every_argument():
    numbers = torch.tensor([uniform(1, 0, position) for position in range(50_000)], dtype=torch.float64)
    counts = torch.histc(numbers, 20, 0, 1) / 50_000
    assert (counts - 0.05).abs().max() < 5 * (0.05 * 0.95 / 50_000) ** 0.5
    assert numbers.min() >= 0 and numbers.max() < 1
    neighbours = [uniform(*key) for key in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (2**63, 0, 0), (-1, 0, 0))]
    assert len(set(neighbours)) == len(neighbours)
    # Neighbouring samples are independent: no correlation.
    other = torch.tensor([uniform(1, 1, position) for position in range(50_000)], dtype=torch.float64)
    assert torch.corrcoef(torch.stack([numbers, other]))[0, 1].abs() < 5 / 50_000**0.5


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("repetition_penalty", 0.0),
        ("top_log_probs", -1),
    ],
)
def test_a_field_out_of_range_is_named(field, value):
    with pytest.raises(ValueError, match=f"^{field} is "):
        Sampling(**{field: value})
