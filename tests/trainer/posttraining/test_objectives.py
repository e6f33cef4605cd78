"""Every row of the table against the published loss, written from its formula, through a tiny softmax policy."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.errors import ConfigError
from trainer.posttraining.objectives import (
    OBJECTIVES,
    Correction,
    Estimator,
    KlTerm,
    metric_names,
    policy_loss,
    token_weights,
)
from trainer.posttraining.policy import per_token

LENGTHS = torch.tensor([4, 1, 6, 3])
SEQUENCES = len(LENGTHS)
SEQUENCE = torch.arange(SEQUENCES).repeat_interleave(LENGTHS)
VOCAB = 5


class Policy:
    """Logits for every position; the log-probabilities of fixed tokens."""

    def __init__(self, seed=0, spread=1.0):
        random = torch.Generator().manual_seed(seed)
        self.logits = torch.randn(len(SEQUENCE), VOCAB, dtype=torch.float64, generator=random) * spread
        self.logits.requires_grad_()
        self.tokens = torch.randint(VOCAB, (len(SEQUENCE),), generator=random)

    @property
    def log_p(self):
        return self.logits.log_softmax(-1)

    @property
    def log_probs(self):
        return self.log_p.gather(1, self.tokens[:, None])[:, 0]

    def moved(self, seed, by):
        """log-probabilities of the same tokens under another policy."""
        noise = torch.randn(self.logits.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        log_p = (self.logits.detach() + by * noise).log_softmax(-1)
        return log_p.gather(1, self.tokens[:, None])[:, 0]

    def gradient(self, loss):
        return torch.autograd.grad(loss, self.logits, retain_graph=True)[0]


def sequence_means(values):
    return torch.stack([part.mean() for part in values.split(LENGTHS.tolist())])


def averaged(how, losses, constant=7.0):
    """The mean of a row, written per sequence."""
    parts = losses.split(LENGTHS.tolist())
    match how:
        case "token_mean":
            return losses.sum() / len(losses)
        case "sequence_mean":
            return sum(part.mean() for part in parts) / len(parts)
        case "sequence_sum":
            return sum(part.sum() for part in parts) / (len(parts) * constant)


def clipped(low, high, dual=None):
    def published(log_probs, old, advantages):
        ratio = (log_probs - old).exp()
        value = torch.min(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)
        if dual is not None:
            value = torch.where(advantages < 0, torch.max(value, dual * advantages), value)
        return -value

    return published


def gspo(log_probs, old, advantages):
    ratio = sequence_means(log_probs - old).exp()[SEQUENCE]
    return -torch.min(ratio * advantages, ratio.clamp(1 - 3e-4, 1 + 4e-4) * advantages)


def cispo(log_probs, old, advantages):
    return -(log_probs - old).exp().detach().clamp(max=5.0) * advantages * log_probs


def luffy(log_probs, old, advantages):
    return -log_probs.exp() / (log_probs.exp() + 0.1) * advantages


PUBLISHED = {
    "sft": lambda log_probs, old, advantages: -log_probs * advantages,
    "reinforce": lambda log_probs, old, advantages: -log_probs * advantages,
    "rloo": lambda log_probs, old, advantages: -log_probs * advantages,
    "reinforce++": clipped(0.2, 0.2),
    "ppo": clipped(0.2, 0.2),
    "grpo": clipped(0.2, 0.2),
    "dr_grpo": clipped(0.2, 0.2),
    "dapo": clipped(0.2, 0.28),
    "gspo": gspo,
    "cispo": cispo,
    "luffy": luffy,
    "srft": lambda log_probs, old, advantages: -log_probs.exp() * advantages,
}
# Advantages are constant within a sequence, as for all rows but ppo.
ADVANTAGES = torch.tensor([1.3, -0.7, -1.1, 0.4], dtype=torch.float64)[SEQUENCE]


def test_every_row_has_a_published_loss():
    assert PUBLISHED.keys() == OBJECTIVES.keys()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", OBJECTIVES)
def test_rows_are_the_published_losses(name, seed):
    policy, estimator = Policy(seed), OBJECTIVES[name]
    # GSPO's region is far narrower: some sequences in it, some out.
    old = policy.moved(seed + 10, 1e-3 if name == "gspo" else 0.5)
    advantages = torch.ones_like(ADVANTAGES) if name == "sft" else ADVANTAGES
    weights = token_weights(LENGTHS, estimator.normalization, constant=7.0)[SEQUENCE]
    loss, metrics = policy_loss(estimator, policy.log_probs, old, advantages, SEQUENCE, weights, sequences=SEQUENCES)
    published = averaged(estimator.normalization, PUBLISHED[name](policy.log_probs, old, advantages))
    torch.testing.assert_close(loss, published, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(policy.gradient(loss), policy.gradient(published), rtol=1e-12, atol=1e-14)
    assert metrics["tokens"] == len(SEQUENCE)


def test_the_rows_see_clipping():
    """The comparison above has tokens inside and outside of every region."""
    clips = {}
    for name in ("ppo", "dapo", "gspo"):
        counts = torch.zeros(2)
        for seed in range(3):
            old = Policy(seed).moved(seed + 10, 1e-3 if name == "gspo" else 0.5)
            log_probs = Policy(seed).log_probs
            _, metrics = policy_loss(
                OBJECTIVES[name], log_probs, old, ADVANTAGES, SEQUENCE, torch.ones(14), sequences=SEQUENCES
            )
            counts += torch.stack([metrics["clipped_low"], metrics["clipped_high"]])
        clips[name] = counts
    assert all(0 < count < 3 * len(SEQUENCE) for counts in clips.values() for count in counts)


@pytest.mark.parametrize("name", [name for name, row in OBJECTIVES.items() if row.denominator != "one"])
def test_at_ratio_one_every_row_is_the_plain_policy_gradient(name):
    policy = Policy(1)
    weights = torch.linspace(0.1, 1, len(SEQUENCE), dtype=torch.float64)
    for old in (None, policy.log_probs.detach()):
        loss, metrics = policy_loss(
            OBJECTIVES[name], policy.log_probs, old, ADVANTAGES, SEQUENCE, weights, sequences=SEQUENCES
        )
        plain = -(weights * ADVANTAGES * policy.log_probs).sum()
        torch.testing.assert_close(policy.gradient(loss), policy.gradient(plain), rtol=1e-12, atol=1e-14)
        assert metrics["ratio"] == metrics["ratio_squared"] == len(SEQUENCE)
        assert metrics["k3"] == 0 and metrics["clipped_low"] == metrics["clipped_high"] == 0


def of_ratios(ratios, advantages, estimator, **others):
    """Loss, gradient by log-probability and metrics of single tokens with the given ratios."""
    log_probs = torch.tensor([-1.0] * len(ratios), dtype=torch.float64, requires_grad=True)
    old = log_probs.detach() - torch.tensor(ratios, dtype=torch.float64).log()
    loss, metrics = policy_loss(
        estimator,
        log_probs,
        old,
        torch.tensor(advantages, dtype=torch.float64),
        torch.arange(len(ratios)),
        torch.ones(len(ratios), dtype=torch.float64),
        sequences=len(ratios),
        **others,
    )
    return loss, torch.autograd.grad(loss, log_probs)[0], metrics


def test_clip_regions():
    estimator = Estimator("old", "clip", "group", "token_mean", 0.2, 0.3, dual_clip=3.0)
    ratios = [0.5, 1.2, 1.4, 9.0, 0.5, 1.4, 2.9, 3.1, 0.7]
    advantages = [1.0, 1.0, 1.0, 1.0, -1.0, -1.0, -1.0, -1.0, 0.0]
    loss, gradient, metrics = of_ratios(ratios, advantages, estimator)
    expected = [-0.5, -1.2, 0, 0, 0, 1.4, 2.9, 0, 0]
    torch.testing.assert_close(gradient, torch.tensor(expected, dtype=torch.float64))
    assert float(loss.detach()) == pytest.approx(-0.5 - 1.2 - 1.3 - 1.3 + 0.8 + 1.4 + 2.9 + 3.0)
    assert [metrics[f"clipped_{side}"].item() for side in ("low", "high", "dual")] == [1, 2, 1]


@pytest.mark.parametrize("seed", range(3))
def test_dual_clip_is_the_published_loss(seed):
    policy = Policy(seed)
    old = policy.moved(seed + 10, 1.5)
    estimator = Estimator("old", "clip", "group", "token_mean", 0.2, 0.28, dual_clip=1.5)
    weights = torch.full((14,), 1 / 14, dtype=torch.float64)
    loss, metrics = policy_loss(estimator, policy.log_probs, old, ADVANTAGES, SEQUENCE, weights, sequences=4)
    published = clipped(0.2, 0.28, 1.5)(policy.log_probs, old, ADVANTAGES).mean()
    torch.testing.assert_close(loss, published)
    torch.testing.assert_close(policy.gradient(loss), policy.gradient(published))
    assert metrics["clipped_dual"] > 0


def test_weights_are_clipped_but_no_token_is_dropped():
    estimator = Estimator("old", "weight", "group", "token_mean", 0.2, 0.3)
    _, gradient, metrics = of_ratios([0.5, 1.1, 2.0, 2.0], [1.0, 1.0, 1.0, -2.0], estimator)
    torch.testing.assert_close(gradient, torch.tensor([-0.8, -1.1, -1.3, 2.6], dtype=torch.float64))
    assert [metrics[f"clipped_{side}"].item() for side in ("low", "high", "dual")] == [1, 2, 0]


def test_metrics_of_the_ratio():
    ratios = [0.5, 2.0, 1.0]
    _, _, metrics = of_ratios(ratios, [1.0, 1.0, 1.0], OBJECTIVES["ppo"])
    assert metrics["ratio"].item() == pytest.approx(3.5)
    assert metrics["ratio_squared"].item() == pytest.approx(5.25)
    assert metrics["k1"].item() == pytest.approx(-sum(map(math.log, ratios)))
    assert metrics["k3"].item() == pytest.approx(sum(r - 1 - math.log(r) for r in ratios))


def test_a_ratio_without_bounds_stays_finite():
    log_probs = torch.tensor([-1.0], requires_grad=True)
    for name in ("ppo", "gspo", "cispo"):
        for advantage in (1.0, -1.0):
            arguments = (log_probs, torch.tensor([-301.0]), torch.tensor([advantage]), torch.tensor([0]), torch.ones(1))
            loss, metrics = policy_loss(
                OBJECTIVES[name],
                *arguments,
                sequences=1,
                sampler_log_probs=torch.tensor([-900.0]),
                corrections=[Correction(how="truncate")],
            )
            assert loss.isfinite() and torch.autograd.grad(loss, log_probs)[0].isfinite()
            assert all(value.isfinite() for value in metrics.values())


@pytest.mark.parametrize("name", ["ppo", "gspo", "cispo", "sft", "luffy"])
def test_tokens_of_weight_zero_do_not_count(name):
    policy = Policy(2)
    keep = torch.arange(len(SEQUENCE)) % 3 != 1
    entropies = -(policy.log_p.exp() * policy.log_p).sum(-1)
    given_ = {
        "old_log_probs": policy.moved(1, 0.3),
        "advantages": ADVANTAGES,
        "sequence": SEQUENCE,
        "weights": torch.ones(14, dtype=torch.float64),
        "entropies": entropies,
        "reference_log_probs": policy.moved(2, 0.3),
        "sampler_log_probs": policy.moved(3, 0.3),
    }
    others = {
        "sequences": SEQUENCES,
        "entropy_coefficient": 0.1,
        "kl": KlTerm(coefficient=0.2, importance=True),
        "corrections": [Correction(level="sequence", how="truncate"), Correction(level="token", how="mask", cap=1.5)],
    }
    fewer, fewer_metrics = policy_loss(
        OBJECTIVES[name], policy.log_probs[keep], **{key: x[keep] for key, x in given_.items()}, **others
    )
    for key in given_:
        if key not in ("sequence", "weights", "entropies"):
            given_[key] = torch.where(keep, given_[key], torch.nan)
    given_["weights"] = torch.where(keep, given_["weights"], 0.0)
    log_probs = policy.log_probs.masked_fill(~keep, torch.nan)
    masked, metrics = policy_loss(OBJECTIVES[name], log_probs, **given_, **others)
    torch.testing.assert_close(masked, fewer)
    torch.testing.assert_close(policy.gradient(masked), policy.gradient(fewer))
    assert metrics.keys() == fewer_metrics.keys()
    for key, value in metrics.items():
        torch.testing.assert_close(value, fewer_metrics[key])


def test_optional_terms():
    policy = Policy(3)
    old, reference = policy.moved(4, 0.2), policy.moved(5, 0.6)
    weights = torch.linspace(0.1, 1, 14, dtype=torch.float64)
    entropies = -(policy.log_p.exp() * policy.log_p).sum(-1)
    loss, metrics = policy_loss(
        OBJECTIVES["dapo"],
        policy.log_probs,
        old,
        ADVANTAGES,
        SEQUENCE,
        weights,
        sequences=SEQUENCES,
        entropies=entropies,
        entropy_coefficient=0.3,
        reference_log_probs=reference,
        kl=KlTerm(coefficient=0.7),
    )
    k3 = (reference - policy.log_probs).exp() - 1 - (reference - policy.log_probs)
    losses = clipped(0.2, 0.28)(policy.log_probs, old, ADVANTAGES) - 0.3 * entropies + 0.7 * k3
    torch.testing.assert_close(loss, (weights * losses).sum())
    torch.testing.assert_close(policy.gradient(loss), policy.gradient((weights * losses).sum()))
    torch.testing.assert_close(metrics["kl"], k3.detach().sum())
    torch.testing.assert_close(metrics["entropy"], entropies.detach().sum())


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_weighted_kl_is_unbiased_for_samples_of_another_policy(estimator):
    """Exact over a vocabulary: the mean under π_old of value and gradient is that of KL(π_θ || π_ref)."""
    logits = torch.tensor([0.3, -1.0, 0.8, 0.1], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([0.0, 0.4, -0.2, 1.0], dtype=torch.float64).log_softmax(0)
    reference = torch.tensor([1.0, 0.0, 0.5, -0.5], dtype=torch.float64).log_softmax(0)
    log_p = logits.log_softmax(0)
    # One token of each kind, weighted by how often π_old samples it.
    loss, _ = policy_loss(
        OBJECTIVES["reinforce"],
        log_p,
        old,
        torch.zeros(4, dtype=torch.float64),
        torch.arange(4),
        old.exp(),
        sequences=4,
        reference_log_probs=reference,
        kl=KlTerm(coefficient=2.0, estimator=estimator, importance=True),
    )
    exact = 2.0 * (log_p.exp() * (log_p - reference)).sum()
    torch.testing.assert_close(loss, exact)
    torch.testing.assert_close(*(torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (loss, exact)))


W = [0.5, 1.0, 2.0, 4.0]  # π_old / π_sampler of four tokens in two sequences


@pytest.mark.parametrize(
    ("correction", "expected"),
    [
        (Correction(level="token", how="truncate", cap=3.0), [0.5, 1.0, 2.0, 3.0]),
        (Correction(level="token", how="mask", cap=3.0), [0.5, 1.0, 2.0, 0.0]),
        (Correction(level="token", how="mask", cap=3.0, floor=0.7), [0.0, 1.0, 2.0, 0.0]),
        (Correction(level="token", how="reject", cap=3.0, floor=0.7), [0.0, 1.0, 1.0, 0.0]),
        (Correction(level="sequence", how="truncate", cap=3.0), [0.5, 0.5, 3.0, 3.0]),
        (Correction(level="sequence", how="mask", cap=3.0), [0.5, 0.5, 0.0, 0.0]),
        (Correction(level="sequence", how="reject", cap=3.0), [1.0, 1.0, 0.0, 0.0]),
        (Correction(level="geometric", how="truncate", cap=9.0), [0.5**0.5, 0.5**0.5, 8**0.5, 8**0.5]),
    ],
)
def test_corrections(correction, expected):
    log_probs = torch.tensor([-1.0, -2.0, -1.5, -1.4], dtype=torch.float64, requires_grad=True)
    weights = torch.tensor(W, dtype=torch.float64)
    sampler = log_probs.detach() - weights.log()
    loss, metrics = policy_loss(
        OBJECTIVES["grpo"],
        log_probs,
        None,
        torch.ones(4, dtype=torch.float64),
        torch.tensor([0, 0, 1, 1]),
        torch.ones(4, dtype=torch.float64),
        sequences=2,
        sampler_log_probs=sampler,
        corrections=[correction],
    )
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(-torch.autograd.grad(loss, log_probs)[0], expected)
    torch.testing.assert_close(metrics["correction"], expected.sum())
    torch.testing.assert_close(metrics["correction_squared"], expected.square().sum())
    assert metrics["dropped"] == (expected == 0).sum()
    torch.testing.assert_close(metrics["sampler_ratio"], weights.sum())
    torch.testing.assert_close(metrics["sampler_ratio_squared"], weights.square().sum())
    torch.testing.assert_close(metrics["sampler_k1"], -weights.log().sum())
    torch.testing.assert_close(metrics["sampler_k3"], (weights - 1 - weights.log()).sum())
    torch.testing.assert_close(metrics["sampler_difference"], (log_probs.exp() - sampler.exp()).abs().sum().detach())


def test_corrections_multiply_and_leave_the_kl_alone():
    log_probs = torch.full((4,), -1.0, dtype=torch.float64)
    reference = torch.full((4,), -1.5, dtype=torch.float64)
    loss, _ = policy_loss(
        OBJECTIVES["grpo"],
        log_probs,
        None,
        torch.ones(4, dtype=torch.float64),
        torch.tensor([0, 0, 1, 1]),
        torch.ones(4, dtype=torch.float64),
        sequences=2,
        reference_log_probs=reference,
        kl=KlTerm(coefficient=1.0, estimator="k1"),
        sampler_log_probs=log_probs - torch.tensor(W, dtype=torch.float64).log(),
        corrections=[Correction(level="token", how="truncate", cap=3.0), Correction(how="reject", cap=7.0)],
    )
    assert loss.item() == pytest.approx(-(0.5 + 1.0) + 4 * 0.5)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=6), st.integers(0, 2**31), st.data())
@settings(max_examples=60, deadline=None)
def test_any_split_gives_the_same_total(lengths, seed, data):
    """Micro-batches and ranks may hold the sequences of a batch in any way."""
    lengths = torch.tensor(lengths)
    how = data.draw(st.sampled_from(["token_mean", "group_token_mean", "sequence_mean", "sequence_sum"]))
    name = data.draw(st.sampled_from(sorted(OBJECTIVES)))
    places = torch.tensor(data.draw(st.lists(st.integers(0, 2), min_size=len(lengths), max_size=len(lengths))))
    random = torch.Generator().manual_seed(seed)
    groups = torch.arange(len(lengths)) // 2
    per_sequence = token_weights(lengths, how, constant=5.0, groups=groups)
    sequence = torch.arange(len(lengths)).repeat_interleave(lengths)
    log_probs, old, sampler = -torch.rand(3, len(sequence), dtype=torch.float64, generator=random)
    advantages = torch.randn(len(lengths), dtype=torch.float64, generator=random)[sequence]

    def compute(chosen):
        numbers = chosen.nonzero()[:, 0]
        tokens = chosen[sequence]
        local = torch.searchsorted(numbers, sequence[tokens])
        return policy_loss(
            OBJECTIVES[name],
            log_probs[tokens],
            old[tokens],
            advantages[tokens],
            local,
            per_sequence[sequence[tokens]],
            sequences=len(numbers),
            sampler_log_probs=sampler[tokens],
            corrections=[Correction(how="truncate")],
        )

    whole, whole_metrics = compute(torch.ones(len(lengths), dtype=torch.bool))
    parts = [compute(places == place) for place in range(3)]
    torch.testing.assert_close(sum(loss for loss, _ in parts), whole)
    for key, value in whole_metrics.items():
        torch.testing.assert_close(sum(metrics[key] for _, metrics in parts), value)


@pytest.mark.parametrize("name", ["gspo", "dapo"])
def test_sequences_over_context_ranks(name):
    """Each of two ranks holds some tokens of every sequence. all_sum adds their totals."""
    policy = Policy(5)
    old, sampler, weights = policy.moved(6, 1e-3), policy.moved(7, 0.3), torch.ones(14, dtype=torch.float64)
    tensors = (policy.log_probs.detach(), old, ADVANTAGES, SEQUENCE, weights, sampler)
    corrections = [Correction(how="truncate"), Correction(level="geometric", how="mask", cap=1.01)]

    def compute(own, all_sum):
        log_probs, old, advantages, sequence, weights, sampler = (x[own] for x in tensors)
        loss, _ = policy_loss(
            OBJECTIVES[name],
            log_probs,
            old,
            advantages,
            sequence,
            weights,
            sequences=SEQUENCES,
            sampler_log_probs=sampler,
            corrections=corrections,
            all_sum=all_sum,
        )
        return loss

    first = torch.arange(14) % 2 == 0
    sent = {}
    for rank, own in enumerate((first, ~first)):
        sent[rank] = []
        compute(own, lambda x, rank=rank: (sent[rank].append(x), x)[1])
    totals = [a + b for a, b in zip(sent[0], sent[1])]
    parts = []
    for own in (first, ~first):
        left = iter(totals)
        parts.append(compute(own, lambda x, left=left: next(left)))
    assert len(totals) == 2 + (name == "gspo")
    torch.testing.assert_close(sum(parts), compute(torch.ones(14, dtype=torch.bool), None))


def test_names_of_metrics():
    policy, ones = Policy(0), torch.ones(14, dtype=torch.float64)
    plain = policy_loss(OBJECTIVES["grpo"], policy.log_probs, None, ones, SEQUENCE, ones, sequences=SEQUENCES)[1]
    assert tuple(plain) == metric_names()
    everything = policy_loss(
        OBJECTIVES["grpo"],
        policy.log_probs,
        None,
        ones,
        SEQUENCE,
        ones,
        sequences=SEQUENCES,
        entropies=ones,
        reference_log_probs=-ones,
        kl=KlTerm(coefficient=1.0),
        sampler_log_probs=-ones,
    )[1]
    assert tuple(everything) == metric_names(entropy=True, kl=True, sampler=True)
    assert not any(value.requires_grad for value in everything.values())


def test_an_empty_micro_batch_is_zero():
    none = torch.zeros(0, dtype=torch.float64, requires_grad=True)
    empty = torch.zeros(0, dtype=torch.float64)
    for estimator in OBJECTIVES.values():
        numbers = torch.zeros(0, dtype=torch.int64)
        loss, metrics = policy_loss(estimator, none, empty, empty, numbers, empty, sequences=2)
        assert loss == 0 and loss.requires_grad and not any(metrics.values())


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("token_mean", [1 / 10, 1 / 10, 1 / 10, 0.0]),
        ("group_token_mean", [1 / 18, 1 / 18, 1 / 2, 0.0]),
        ("sequence_mean", [1 / 9, 1 / 18, 1 / 3, 0.0]),
        ("sequence_sum", [1 / 24, 1 / 24, 1 / 24, 0.0]),
    ],
)
def test_token_weights(how, expected):
    weights = token_weights(torch.tensor([3, 6, 1, 0]), how, constant=8.0, groups=torch.tensor([0, 0, 1, 1]))
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float64))


def test_a_given_number_of_sequences_counts_the_empty_ones():
    weights = token_weights(torch.tensor([2, 0]), "sequence_mean", sequences=2)
    torch.testing.assert_close(weights, torch.tensor([0.25, 0.0], dtype=torch.float64))


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"clip_low": -0.1}, "clip_low"),
        ({"dual_clip": 1.0}, "dual_clip"),
        ({"denominator": "policy"}, "denominator"),
        ({"shape": 0.1}, "shape"),
        ({"mask": "none", "dual_clip": 3.0}, "mask"),
    ],
)
def test_rows_that_make_no_sense_are_refused(arguments, word):
    row = {"denominator": "old", "mask": "clip", "advantage": "group", "normalization": "token_mean"}
    with pytest.raises(ConfigError, match=word):
        Estimator(**row | arguments)


def test_other_refusals():
    ones = torch.ones(2)
    arguments = (OBJECTIVES["grpo"], -ones, None, ones, torch.zeros(2, dtype=torch.int64), ones)
    with pytest.raises(ValueError, match="go together"):
        policy_loss(*arguments, sequences=1, kl=KlTerm(coefficient=1.0))
    with pytest.raises(ValueError, match="sampler_log_probs"):
        policy_loss(*arguments, sequences=1, corrections=[Correction()])
    with pytest.raises(ConfigError, match="cap"):
        Correction(cap=0.5)
    with pytest.raises(ConfigError, match="floor"):
        Correction(floor=1.5)
    with pytest.raises(ValueError, match="negative"):
        token_weights(torch.tensor([-1]), "token_mean")
    with pytest.raises(ValueError, match="above 0"):
        token_weights(torch.tensor([1]), "sequence_sum", constant=0.0)
    with pytest.raises(ValueError, match="groups"):
        token_weights(torch.tensor([1]), "group_token_mean")
    with pytest.raises(ConfigError, match="sequence_mean"):
        token_weights(torch.tensor([1]), "mean")


def test_the_metrics_of_a_step_are_means_and_effective_sample_sizes():
    """Of sums over 4 tokens, which the engine has divided by the 8 tokens of the step."""
    ratio = torch.tensor([1.0, 2.0, 0.5, 0.0])
    sums = {"tokens": 4.0, "ratio": ratio.sum().item(), "ratio_squared": ratio.square().sum().item(), "dropped": 1.0}
    found = per_token({f"policy/{name}": value / 8 for name, value in sums.items()} | {"loss": 3.0})
    assert found.keys() == {"loss", "policy/ratio", "policy/ratio_sample_size", "policy/dropped"}
    assert found["loss"] == 3.0 and found["policy/dropped"] == 0.25 and found["policy/ratio"] == 0.875
    assert found["policy/ratio_sample_size"] == pytest.approx((3.5**2 / 5.25) / 4)
    nothing = per_token({"policy/tokens": 0.0, "policy/ratio": 0.0, "policy/ratio_squared": 0.0})
    assert nothing == {"policy/ratio": 0.0, "policy/ratio_sample_size": 0.0}
