"""Text of tokens as they arrive, and stop strings."""

import io

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from models.generation import StopStrings, stream_text
from trainer.data.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer

PHRASES = ["the quick brown fox", "jumps over  the lazy dog", "caf\u00e9 \U0001f600 \u65e5\u672c", "a,  b\tc"]


@pytest.fixture(scope="module")
def prefixing():
    """A tokenizer that writes a space before the first word, and drops the first one of what it decodes."""
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(PHRASES * 20),
        model_writer=model,
        model_type="bpe",
        vocab_size=300,
        byte_fallback=True,
        character_coverage=0.98,
        minloglevel=2,
    )
    return SentencePieceTokenizer(model.getvalue())


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    """A tokenizer whose tokens are bytes, and pieces of several."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        PHRASES, trainers.BpeTrainer(vocab_size=280, special_tokens=["<eos>"], initial_alphabet=alphabet)
    )
    path = tmp_path_factory.mktemp("byte_level") / "tokenizer.json"
    backend.save(str(path))
    return HuggingFaceTokenizer(path)


@pytest.fixture(scope="module", params=["prefixing", "byte_level"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from([*PHRASES, "", " ", "x \ufffd"]), st.sampled_from(PHRASES), st.sampled_from(["", " ", "\n"]))
def test_streamed_text_is_what_the_tokens_decode_to(tokenizer, prompt, continuation, between):
    whole = tokenizer.encode(prompt + between + continuation)
    for count in range(1, len(whole)):
        shown = "".join(stream_text(tokenizer.decode, whole[:count], whole[count:]))
        before = tokenizer.decode(whole[:count])
        if not before.endswith("\ufffd"):
            assert before + shown == tokenizer.decode(whole)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 279), max_size=20))
def test_bytes_that_are_no_character_are_shown_at_the_end(byte_level, tokens):
    """Random tokens, whose bytes are seldom text."""
    prompt = byte_level.encode("the")
    pieces = list(stream_text(byte_level.decode, prompt, tokens))
    assert "the" + "".join(pieces) == byte_level.decode([*prompt, *tokens])
    assert all(not piece.endswith("\ufffd") for piece in pieces[:-1])


def fed(stops, pieces):
    """What is shown of the pieces, one by one, and at the end."""
    matcher = StopStrings(stops)
    shown = [matcher.feed(piece) for piece in pieces]
    return matcher, shown, matcher.finish()


letters = st.text("ab", max_size=8)


@example(["a", "baaa"], ["baa", "a"])
@example(["a", "baaa"], ["baaa"])
@given(st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.lists(letters, max_size=6))
def test_text_ends_before_the_first_stop_string(stops, pieces):
    matcher, shown, rest = fed(stops, pieces)
    text = "".join(pieces)
    # The one that is complete first; of several that end there, the one that began first.
    places = [(text.index(stop) + len(stop), text.index(stop)) for stop in stops if stop in text]
    assert "".join(shown) + rest == (text[: min(places)[1]] if places else text)
    assert (matcher.stopped is not None) == bool(places)


@given(st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3), st.lists(letters, max_size=6))
def test_what_is_held_back_may_begin_a_stop_string(stops, pieces):
    matcher = StopStrings(stops)
    text = shown = ""
    for piece in pieces:
        text, shown = text + piece, shown + matcher.feed(piece)
        if matcher.stopped is None:
            assert any(stop.startswith(text[len(shown) :]) for stop in stops)


def test_only_what_may_begin_a_stop_string_is_held_back():
    matcher, shown, rest = fed(["\n\n", "END"], ["one", "\n", "two E", "N", "TER", "\n"])
    assert shown == ["one", "", "\ntwo ", "", "ENTER", ""] and rest == "\n" and matcher.stopped is None
    matcher, shown, rest = fed(["\n\n", "END"], ["x\n", "\nEND", "more"])
    assert shown == ["x", "", ""] and rest == "" and matcher.stopped == "\n\n"


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="a stop string is empty"):
        StopStrings(["x", ""])
