"""Measures of models whose answers are known, and intervals against numbers of others."""

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from tests.helpers import VOCABULARY, greedy, tiny_decoder
from tests.trainer.evaluation.recall.test_tasks import learned, setting_of
from trainer.evaluation.recall.examples import Answer, Example
from trainer.evaluation.recall.haystack import Haystack
from trainer.evaluation.recall.intervals import effective_count, wilson
from trainer.evaluation.recall.measures import measure, summary
from trainer.evaluation.recall.setting import Setting
from trainer.evaluation.recall.tasks import example
from trainer.evaluation.scoring import Query, Scorer


class Copier:
    """Expects what followed the longest earlier part that ends like the text so far; `surely` of it."""

    def __init__(self, vocab_size, surely=20.0):
        self.vocab_size, self.layers = vocab_size, {"0": None}
        self.head_weight = surely * torch.eye(vocab_size)

    def hidden_states(self, tokens, positions, documents=None, caches=None):
        before = torch.zeros(len(tokens), 0, dtype=torch.int64)
        if caches is not None:
            before = caches[0].tensors.get("read", before)
            caches[0].keep("read", torch.cat((before, tokens), 1))
        whole = torch.cat((before, tokens), 1).numpy()
        bounds = (0, whole.shape[1]) if documents is None else documents.bounds
        rows = [np.concatenate([self.next(row[a:b]) for a, b in zip(bounds, bounds[1:])]) for row in whole]
        expected = torch.from_numpy(np.stack(rows))[:, before.shape[1] :]
        return torch.nn.functional.one_hot(expected, self.vocab_size).float().transpose(0, 1)

    def next(self, tokens):
        expected, matched = np.zeros(len(tokens), np.int64), np.zeros(len(tokens), np.int64)
        for place in range(1, len(tokens)):
            # matched[j]: how many tokens before j and before `place` agree.
            matched[1:] = np.where(tokens[:-1] == tokens[place], matched[:-1] + 1, 0)
            found = matched[: place + 1]
            if found.any():
                expected[place] = tokens[len(found) - 1 - found[::-1].argmax()]
        return expected


@pytest.fixture(scope="module")
def tokenizer():
    return learned(None)


@pytest.mark.parametrize("task", ["mqar", "mqar_text"])
def test_a_model_that_copies_recalls_everything(tokenizer, task):
    setting = setting_of(tokenizer)
    examples = [example(task, setting, 7, number, 400) for number in range(3)]
    found = summary(measure(Scorer(Copier(512), 512, 0, 1000), examples, ""))
    assert (found["exact"], found["tokens"], found["first"], found["rank"]) == (1.0, 1.0, 1.0, 1.0)
    assert found["nats"] < 1e-4 and found["candidates"] == 4
    assert (found["examples"], found["answers"]) == (3, 3 * len(examples[0].answers))
    assert found["exact_interval"] == pytest.approx([3 / (3 + 1.96**2), 1.0], abs=1e-3)


def test_a_model_that_tells_nothing_apart_recalls_nothing(tokenizer):
    examples = [example("mqar", setting_of(tokenizer), 7, 0, 400)]
    found = summary(measure(Scorer(Copier(512, surely=0.0), 512, 0, 1000), examples, ""))
    assert (found["exact"], found["first"], found["rank"]) == (0.0, 0.0, 4.0)
    assert found["nats"] == pytest.approx(np.log(512))


def test_a_few_wrong_tokens_are_counted():
    """Of a model that expects 3 4 after 9, as it has read, 1 after 8, and 6 after 5."""
    tokens = (9, 3, 4, 8, 1, 5, 6, 9, 3, 4, 8, 5, 6)
    answers = (Answer(8, 10, ((7, 7),), 0.1), Answer(11, 13, ((1, 1), (7, 7)), 0.2))
    one, two = measure(Scorer(Copier(10), 10, None, 100), [Example(tokens, answers)], "")
    assert (one.right, one.tokens, one.exact, one.rank, one.candidates) == (2, 2, True, 1, 2)
    # [1, 1] is as likely as the right [5, 6]: of both, one token is expected.
    assert (two.right, two.tokens, two.exact, two.rank, two.candidates) == (1, 2, False, 2, 3)
    assert (one.depth, two.depth, two.example) == (0.1, 0.2, 0)
    found = summary([one, two])
    assert (found["exact"], found["tokens"], found["first"], found["rank"]) == (0.5, 3 / 4, 0.5, 1.5)


@pytest.mark.parametrize("pattern", ["gated_delta_net, full_attention", "hgrn2, sliding_window_attention"])
def test_measures_are_those_of_each_example_by_itself(pattern):
    model = tiny_decoder(pattern).eval()
    setting = Setting(range(1, VOCABULARY), None, Haystack())
    examples = [example("mqar", setting, 7, number, 96) for number in range(3)]
    outcomes = iter(measure(Scorer(model, VOCABULARY, 0, 150), examples, ""))
    for each in examples:
        for answer in each.answers:
            outcome, context = next(outcomes), each.tokens[: answer.start]
            right = each.tokens[answer.start : answer.stop]
            assert outcome.exact == (tuple(greedy(model, torch.tensor([context]), 1)[0].tolist()) == right)
            queries = [Query((*context, *choice), len(context)) for choice in (right, *answer.others)]
            own, *others = (Scorer(model, VOCABULARY, 0, 1).score([query], "")[0].total for query in queries)
            assert outcome.log_prob == pytest.approx(own, abs=1e-4)
            assert outcome.rank == 1 + sum(other >= own for other in others)


def test_wilson_s_interval():
    for hits, count in ((5, 10), (0, 10), (45, 50), (7, 7)):
        known = binomtest(hits, count).proportion_ci(method="wilson")
        assert wilson(hits / count, count) == pytest.approx((known.low, known.high), abs=1e-9)


def test_answers_that_depend_on_each_other_count_less():
    rng = np.random.default_rng(0)
    apart = rng.random((400, 8)) < 0.3
    assert effective_count(apart.tolist()) == pytest.approx(3200, rel=0.15)
    together = np.repeat(apart[:, :1], 8, axis=1)
    assert effective_count(together.tolist()) == pytest.approx(400, rel=0.01)
    assert effective_count([[True, True], [True, True]]) == 2
    assert effective_count([[True, False], [False, True]]) == 4
    assert effective_count([[True, False, True]]) == 3


def test_the_interval_holds_what_it_says():
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(300):
        # Examples of different difficulty, with a mean of 0.5.
        groups = rng.random((40, 6)) < rng.beta(1, 1, (40, 1))
        low, high = wilson(float(groups.mean()), effective_count(groups.tolist()))
        covered += low <= 0.5 <= high
    assert 0.9 < covered / 300 < 0.98
