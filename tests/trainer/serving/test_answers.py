"""The JSON of answers, where the whole server's tests cannot see it."""

import json

from models.generation import Event
from trainer.serving.answers import Chat, Completions, TokenTexts, event
from trainer.serving.choices import Piece, Token


class Words:
    """A tokenizer whose words bring a space that the first one of a text drops; 3 and 4 are halves of é, 0 ends."""

    eod_id, eod = 0, "<end>"
    pieces = (b"", b" a", b" b", b"\xc3", b"\xa9", b" b")

    def decode(self, tokens):
        return b"".join(self.pieces[token] for token in tokens).decode(errors="replace").removeprefix(" ")


TEXTS = TokenTexts(Words())
PIECE = Piece("a", [Token(Event(0, 0, 1, -0.5, 0.0, ((2, -0.25), (5, -0.375), (0, -0.4)), None), 7)], "stop")


def test_a_token_s_text_is_that_within_a_text():
    assert [TEXTS[token] for token in (0, 1, 2, 3, 4)] == ["<end>", " a", " b", "\ufffd", "\ufffd"]


def test_log_probabilities_of_completions():
    (choice,) = Completions("m", TEXTS, 3, True).whole([PIECE], 1)["choices"]
    # Two tokens have the same text: the likelier one counts. The drawn token is always there.
    assert choice["logprobs"] == {
        "tokens": [" a"],
        "token_logprobs": [-0.5],
        "top_logprobs": [{" b": -0.25, "<end>": -0.4, " a": -0.5}],
        "text_offset": [7],
    }


def test_log_probabilities_of_chat():
    answer = Chat("m", TEXTS, 3, True)
    (choice,) = answer.whole([PIECE], 1)["choices"]
    (token,) = choice["logprobs"]["content"]
    alternatives = token.pop("top_logprobs")
    assert token == {"token": " a", "logprob": -0.5, "bytes": [32, 97]}
    assert [(other["token"], other["logprob"]) for other in alternatives] == [
        (" b", -0.25),
        (" b", -0.375),
        ("<end>", -0.4),
    ]
    half = Piece("", [Token(Event(0, 0, 3, -0.5, 0.0, (), None), 0)])
    assert answer.chunk(0, half)["choices"][0]["logprobs"]["content"][0]["bytes"] is None
    (choice,) = Chat("m", TEXTS, 3, False).whole([PIECE], 1)["choices"]
    assert choice["logprobs"] is None and choice["message"]["content"] == "a" and choice["finish_reason"] == "stop"


def test_a_stream_of_chat_begins_with_the_role_of_every_choice():
    answer = Chat("m", TEXTS, 3, False)
    first = answer.first_chunks(2)
    assert [chunk["choices"][0]["index"] for chunk in first] == [0, 1]
    assert all(chunk["choices"][0]["delta"]["role"] == "assistant" for chunk in first)
    later = answer.chunk(1, Piece("x"))["choices"][0]
    assert later["delta"] == {"content": "x"} and later["finish_reason"] is None
    assert answer.chunk(0, Piece("", [], "length"))["choices"][0]["delta"] == {}
    usage = answer.usage_chunk(4)
    assert usage["choices"] == [] and usage["usage"]["total_tokens"] == 7
    assert {chunk["id"] for chunk in (*first, usage)} == {usage["id"]} and usage["object"] == "chat.completion.chunk"


def test_an_event_is_one_line_whatever_the_text():
    line = event({"text": "a\n\r\u2028é"})
    assert line.endswith(b"\n\n") and len(line.decode().splitlines()) == 2
    assert json.loads(line.removeprefix(b"data: ")) == {"text": "a\n\r\u2028é"}
