"""Scores of many sequences at once against those of each sequence by itself."""

import numpy as np
import pytest
import torch

from models.config import MIXERS
from tests.helpers import VOCABULARY, draw_tokens, greedy, rows, tiny_decoder
from trainer.evaluation.scoring import Query, Scorer

EOD = 0


def alone(model, query, vocab_size=VOCABULARY):
    """Log-probabilities and greedy flags by the plain forward pass of one sequence."""
    tokens = torch.tensor([query.tokens])
    with torch.no_grad():
        logits = model(*rows(tokens))[0, query.start - 1 : -1]
    labels = tokens[0, query.start :]
    return logits.log_softmax(-1).gather(1, labels[:, None])[:, 0], logits[:, :vocab_size].argmax(-1) == labels


def draw_queries(count=9):
    tokens = [
        draw_tokens(length, seed=length).add(1).clamp(max=VOCABULARY - 1).tolist()
        for length in range(2, 2 + 7 * count, 7)
    ]
    return [Query(each, max(1, len(each) // 2)) for each in tokens]


@pytest.mark.parametrize("pattern", [*MIXERS, "gated_delta_net*1, sliding_window_attention + hgrn2"])
def test_packed_sequences_have_their_own_scores(pattern):
    model = tiny_decoder(pattern).eval()
    queries = draw_queries()
    for query, score in zip(queries, Scorer(model, VOCABULARY, EOD, row_tokens=100).score(queries, ""), strict=True):
        log_probs, likely = alone(model, query)
        np.testing.assert_allclose(score.log_probs, log_probs, atol=2e-5)
        assert score.greedy.tolist() == likely.tolist()
        assert score.total == pytest.approx(float(log_probs.sum()), abs=1e-4)


def test_what_begins_alike_is_computed_once(monkeypatch):
    model = tiny_decoder("gated_delta_net, full_attention").eval()
    context = draw_tokens(20, seed=1).clamp(min=1).tolist()
    choices = [[3], [4], [5, 6], [3], [5, 7, 8]]
    queries = [Query([*context, *choice], len(context)) for choice in choices]
    computed, whole = [], model.hidden_states
    monkeypatch.setattr(
        model, "hidden_states", lambda tokens, *rest: computed.append(tokens.shape[1]) or whole(tokens, *rest)
    )
    scores = Scorer(model, VOCABULARY, EOD, row_tokens=1000).score(queries, "")
    # Choices of one token, and [5, 6], need the context and at most one token more: [5, 7, 8] holds them.
    assert computed == [len(context) + 2]
    monkeypatch.undo()
    for query, score in zip(queries, scores, strict=True):
        log_probs, likely = alone(model, query)
        np.testing.assert_allclose(score.log_probs, log_probs, atol=2e-5)
        assert score.greedy.tolist() == likely.tolist()


def test_padding_is_never_the_most_likely_token():
    model = tiny_decoder("full_attention").eval()
    queries = [Query([1, 2, token], 2) for token in range(VOCABULARY)]
    for size in (VOCABULARY, 7):
        likely = [score.is_greedy for score in Scorer(model, size, EOD, 64).score(queries, "")]
        assert sum(likely) == 1 and likely.index(True) < size
        assert likely[int(torch.stack([alone(model, query)[0][0] for query in queries[:size]]).argmax())]


def test_documents_end_after_their_last_token_as_in_training():
    model = tiny_decoder("gated_delta_net, full_attention").eval()
    text = [5, 6, 7, 8]
    masked, seen = (Scorer(model, VOCABULARY, eod, 64).score([Query([EOD, *text], 1)], "")[0] for eod in (EOD, None))
    first, rest = alone(model, Query([EOD, 5], 1))[0], alone(model, Query(text, 1))[0]
    np.testing.assert_allclose(masked.log_probs, torch.cat((first, rest)), atol=2e-5)
    np.testing.assert_allclose(seen.log_probs, alone(model, Query([EOD, *text], 1))[0], atol=2e-5)


@pytest.mark.parametrize("pattern", ["gated_delta_net, full_attention", "hgrn2"])
def test_what_is_greedy_throughout_is_what_greedy_decoding_gives(pattern):
    model = tiny_decoder(pattern).eval()
    prompt = draw_tokens(12, seed=3).tolist()
    drawn = [*prompt, *greedy(model, torch.tensor([prompt]), 6)[0].tolist()]
    other = [*drawn[:-1], (drawn[-1] + 1) % VOCABULARY]
    scores = Scorer(model, VOCABULARY, None, 64).score([Query(drawn, 12), Query(other, 12)], "")
    assert [score.is_greedy for score in scores] == [True, False]
    assert scores[1].greedy.tolist() == [True] * 5 + [False]


@pytest.mark.parametrize("pattern", [*MIXERS, "gated_delta_net*1, sliding_window_attention + hgrn2"])
def test_candidates_continue_the_state_of_their_context(pattern):
    model = tiny_decoder(pattern).eval()
    tokens = draw_tokens(90, seed=1).tolist()
    places = [(1, [[3], [4, 5]]), (30, [[1, 2, 3], [7], [8, 9]]), (31, [[5, 5]]), (88, [[1, 2, 3, 4], [6, 7]])]
    found = Scorer(model, VOCABULARY, None, 64).compare(tokens, places)
    for (start, candidates), totals in zip(places, found, strict=True):
        wanted = [float(alone(model, Query([*tokens[:start], *each], start))[0].sum()) for each in candidates]
        assert totals == pytest.approx(wanted, abs=5e-5)


def test_nothing_to_score():
    model = tiny_decoder("full_attention").eval()
    (score,) = Scorer(model, VOCABULARY, EOD, 64).score([Query([1, 2, 3], 3)], "")
    assert (len(score.log_probs), score.total, score.is_greedy) == (0, 0.0, True)
    assert Scorer(model, VOCABULARY, EOD, 64).score([], "") == []
