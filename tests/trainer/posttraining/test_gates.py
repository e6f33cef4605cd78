"""Gates: which losses each question takes part in."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.errors import ConfigError
from trainer.posttraining.gates import SOFT_TABLE, Gate, gate

COUNTS = np.arange(9)


def names(coefficients):
    """r, o, d or m (rehearsal) for each question, which takes part in one loss only."""
    rows = np.stack(
        [coefficients.reinforcement, coefficients.off_policy, coefficients.demonstration, coefficients.rehearsal]
    )
    assert set(np.unique(rows)) <= {0.0, 1.0} and (rows.sum(0) == 1).all()
    return "".join("rodm"[i] for i in rows.argmax(0))


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (Gate(kind="none"), "rrrrrrrrr"),
        (Gate(), "drrrrrrrr"),
        (Gate(failed=2 / 8), "dddrrrrrr"),
        (Gate(failed=0.24), "ddrrrrrrr"),
        (Gate(failed=0.0, off_policy=3 / 8), "dooorrrrr"),
        (Gate(mastered=1.0), "drrrrrrrm"),
        (Gate(failed=1 / 8, off_policy=2 / 8, mastered=6 / 8), "ddorrrmmm"),
        (Gate(kind="none", mastered=7 / 8), "rrrrrrrmm"),
    ],
)
def test_switches(choice, expected):
    assert names(gate(choice, COUNTS, 8)) == expected


@given(st.integers(1, 40), st.data())
def test_shares_of_counts_are_exact(samples, data):
    """The share c/n includes the question with c of n, and not one more, however c/n rounds."""
    failed = data.draw(st.integers(0, samples - 1))
    mastered = data.draw(st.integers(failed + 1, samples))
    choice = Gate(failed=failed / samples, mastered=mastered / samples)
    found = names(gate(choice, np.arange(samples + 1), samples))
    assert found == "d" * (failed + 1) + "r" * (mastered - failed - 1) + "m" * (samples + 1 - mastered)


def test_the_number_of_answers_may_differ():
    assert names(gate(Gate(failed=0.5), np.array([1, 1, 2]), np.array([1, 2, 3]))) == "rdr"


def test_a_demonstration_beside_the_answers():
    shown = np.array([True, True, False])
    found = gate(Gate(kind="mixed"), np.array([0, 8, 0]), 8, has_demonstration=shown)
    assert found.reinforcement.tolist() == [1, 1, 1] and found.off_policy.tolist() == [1, 1, 0]
    assert not found.demonstration.any() and not found.rehearsal.any()


def test_the_soft_table():
    found = gate(Gate(kind="soft"), COUNTS, 8)
    assert found.reinforcement.tolist() == [0, 0, 0.125, 0.25, 0.5, 1, 1, 1, 1]
    assert found.demonstration.tolist() == [1, 1, 0.5, 0.25, 0.125, 0, 0, 0, 0]
    assert not found.off_policy.any() and not found.rehearsal.any()
    # Of other numbers of answers, by the share of right ones: 1 and 3 of 4 are 2 and 6 of 8, and 3 of 16 is between.
    found = gate(Gate(kind="soft"), np.array([0, 1, 3, 4, 3]), np.array([4, 4, 4, 4, 16]))
    assert found.reinforcement.tolist() == [0, 0.125, 1, 1, 0.0625]
    assert found.demonstration.tolist() == [1, 0.5, 0, 0, 0.75]
    own = gate(Gate(kind="soft", table=((0, 1, 0), (1, 0, 0)), mastered=1.0), np.array([0, 1]), 1)
    assert (own.off_policy.tolist(), own.rehearsal.tolist(), own.reinforcement.tolist()) == ([1, 0], [0, 1], [0, 0])


def test_questions_without_a_demonstration_are_left_to_reinforcement():
    has = np.array([True, False] * 4 + [True])
    assert names(gate(Gate(failed=3 / 8, mastered=1.0), COUNTS, 8, has_demonstration=has)) == "drdrrrrrm"
    soft = gate(Gate(kind="soft"), COUNTS, 8, has_demonstration=np.zeros(9, dtype=bool))
    assert soft.reinforcement.tolist() == [1] * 9 and len(SOFT_TABLE) == 9
    half = Gate(kind="soft", table=((0.0, 0.0, 1.0), (0.5, 0.0, 0.0)))
    assert gate(half, np.arange(2), 1, has_demonstration=np.zeros(2, dtype=bool)).reinforcement.tolist() == [1, 0.5]


def test_what_the_reference_mastered_is_rehearsed_even_if_it_fails_now():
    mastered = np.array([True, False, False, False, True, False, False, False, False])
    assert names(gate(Gate(mastered=1.0), COUNTS, 8, mastered=mastered)) == "mrrrmrrrr"


def test_refusals():
    for arguments, word in (
        ({"kind": "hard"}, "kind"),
        ({"failed": 1.0}, "failed"),
        ({"failed": 0.5, "off_policy": 0.2}, "off_policy"),
        ({"failed": 0.5, "mastered": 0.5}, "mastered"),
        ({"mastered": 1.1}, "mastered"),
    ):
        with pytest.raises(ConfigError, match=word):
            Gate(**arguments)
    for correct, samples in ((3, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match="correct <= samples"):
            gate(Gate(), np.array([correct]), samples)
