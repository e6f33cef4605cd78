"""Text and tokens of a choice as its tokens arrive."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.generation import Event
from trainer.serving.choices import Choice, Piece

# Tokens of one byte each: those of ASCII are characters, others part of one.
END = 0


def decode(tokens):
    return bytes(tokens).decode(errors="replace")


def events(tokens, finish="length"):
    return [
        Event(0, 0, token, -float(number), 0.0, (), finish if number == len(tokens) - 1 else None)
        for number, token in enumerate(tokens)
    ]


def fed(tokens, stops=(), finish="length", prompt=b"p"):
    """What each token gave, and the choice."""
    choice = Choice(decode, list(prompt), stops)
    return [choice.feed(event) for event in events(tokens, finish)], choice


def joined(pieces):
    whole = Piece()
    for piece in pieces:
        whole.add(piece)
    return whole


def test_each_character_comes_with_its_tokens():
    pieces, choice = fed("aé!".encode())
    assert [piece.text for piece in pieces] == ["a", "", "é", "!"]
    assert [[token.offset for token in piece.tokens] for piece in pieces] == [[0], [], [1, 1], [2]]
    assert [piece.finish for piece in pieces] == [None, None, None, "length"]
    assert choice.drawn == 4 and choice.finish == "length"


def test_the_token_that_ends_a_sample_has_no_text():
    pieces, choice = fed([*b"ab", END], finish="stop")
    assert joined(pieces).text == "ab" and choice.drawn == 3 and choice.finish == "stop"
    assert [token.event.token for token in joined(pieces).tokens] == [*b"ab"]


def test_a_stop_string_and_what_follows_is_cut_with_its_tokens():
    pieces, choice = fed(b"one two three", stops=["two", "xyz"])
    assert joined(pieces).text == "one " and choice.finish == "stop"
    assert [token.event.token for token in joined(pieces).tokens] == [*b"one "]
    # What follows its last letter was never taken.
    assert choice.drawn == len("one two")
    assert pieces[-1] == Piece()


def test_what_may_become_a_stop_string_is_held_with_its_tokens():
    pieces, _ = fed(b"tw! ", stops=["two"])
    assert [piece.text for piece in pieces] == ["", "", "tw!", " "]
    assert [len(piece.tokens) for piece in pieces] == [0, 0, 3, 1]
    pieces, choice = fed(b"a tw", stops=["two"])
    assert joined(pieces).text == "a tw" and choice.finish == "length" and len(joined(pieces).tokens) == 4


def test_a_stop_string_at_the_last_token_is_a_stop():
    _, choice = fed(b"a two", stops=["two"])
    assert choice.finish == "stop"


def test_bytes_that_become_no_character_are_shown_at_the_end():
    pieces, _ = fed(b"a\xe9")
    assert joined(pieces).text == "a\ufffd" and len(joined(pieces).tokens) == 2


@pytest.mark.parametrize("finish", ["stop", "length"])
@settings(deadline=None)
@given(text=st.text("abé", min_size=1, max_size=30), stops=st.lists(st.text("abé", min_size=1, max_size=3), max_size=3))
def test_pieces_add_up_to_the_text_before_the_first_stop_string(finish, text, stops):
    tokens = [*text.encode(), *([END] if finish == "stop" else [])]
    pieces, choice = fed(tokens, stops, finish)
    whole = joined(pieces)
    # The first in time: of those that end at the same character the longest begins first.
    ends = [len(text[:end]) for end in range(len(text) + 1) if any(text[:end].endswith(stop) for stop in stops)]
    cut = text
    if ends:
        cut = min((text[: ends[0] - len(stop)] for stop in stops if text[: ends[0]].endswith(stop)), key=len)
    assert whole.text == cut
    assert choice.finish == ("stop" if ends else finish) == whole.finish
    assert bytes(token.event.token for token in whole.tokens) == cut.encode()
    assert [token.offset for token in whole.tokens] == [
        number for number, character in enumerate(cut) for _ in character.encode()
    ]
