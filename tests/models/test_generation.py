"""Sampling: greedy, nucleus, seeds, the padding of the vocabulary, and where a row ends."""

import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.generation import generate, sample_token, stream_text, stream_tokens
from tests.helpers import VOCABULARY, draw_tokens, tiny_decoder
from trainer.data.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer

logits_rows = st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=12).map(lambda row: torch.tensor([row]))


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def stream(prompt, count, **options):
    return torch.stack(list(stream_tokens(tiny_decoder(), prompt, count, **options)), 1)


@settings(deadline=None)
@given(logits_rows, st.floats(0.01, 1))
def test_temperature_zero_takes_the_most_likely(logits, top_p):
    assert sample_token(logits, 0, top_p, None).tolist() == logits.argmax(-1).tolist()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("row", [[torch.nan, 0.0], [torch.inf, 0.0], [-torch.inf, -torch.inf]])
def test_logits_that_are_not_numbers_are_refused(temperature, row):
    with pytest.raises(FloatingPointError, match="not numbers"):
        sample_token(torch.tensor([[0.0, 1.0], row]), temperature, 1.0, seeded(0))


@pytest.mark.parametrize("temperature", [1e-40, 1e-320])
def test_a_temperature_that_is_too_small_for_the_logits_is_refused(temperature):
    with pytest.raises(FloatingPointError, match="is too small"):
        sample_token(torch.tensor([[0.0, 1.0]]), temperature, 1.0, seeded(0))


def test_a_token_may_be_ruled_out():
    assert sample_token(torch.tensor([[-torch.inf, 1.0]]), 1.0, 1.0, seeded(0)).tolist() == [1]


def nucleus(logits, temperature, top_p):
    """By the definition: the fewest most likely tokens whose probabilities add up to top_p, ties all let in."""
    probabilities = (logits[0].double() / temperature).softmax(0)
    ordered = sorted(probabilities.tolist(), reverse=True)
    total, count = 0.0, 0
    while count < len(ordered) and total < top_p - 1e-6:
        total, count = total + ordered[count], count + 1
    return {i for i, p in enumerate(probabilities.tolist()) if p >= ordered[count - 1] - 1e-6}


@settings(deadline=None)
@given(logits_rows, st.floats(0.01, 1), st.floats(0.2, 3), st.integers(0, 2**31))
def test_draws_come_from_the_nucleus(logits, top_p, temperature, seed):
    drawn = sample_token(logits.expand(200, -1), temperature, top_p, seeded(seed))
    assert drawn.shape == (200,) and drawn.dtype == torch.int64
    assert set(drawn.tolist()) <= nucleus(logits, temperature, top_p)


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.3, [0]), (0.4, [0]), (0.6, [0, 1]), (0.85, [0, 1, 2]), (1.0, [0, 1, 2, 3])]
)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_frequencies_are_the_probabilities_within_the_nucleus(top_p, kept, temperature):
    probabilities = torch.tensor([0.4, 0.3, 0.2, 0.1])
    logits = (probabilities.log() * temperature).expand(20_000, -1)
    counts = sample_token(logits, temperature, top_p, seeded(0)).bincount(minlength=4) / 20_000
    expected = torch.zeros(4)
    expected[kept] = probabilities[kept] / probabilities[kept].sum()
    assert counts[expected == 0].sum() == 0
    assert (counts - expected).abs().max() < 5 * 0.5 / 20_000**0.5


def test_the_most_likely_token_stays_at_any_top_p():
    assert sample_token(torch.tensor([[0.0, 5.0, 0.0]]), 1.0, 1e-9, None).tolist() == [1]


def test_rows_are_drawn_each_for_itself():
    logits = torch.full((3, 4), -1e9)
    logits[[0, 1, 2], [2, 0, 3]] = 0.0
    assert sample_token(logits, 1.0, 0.9, None).tolist() == [2, 0, 3]


def test_a_seed_gives_the_same_text():
    prompt = draw_tokens(2, 3)
    first, same, other = (stream(prompt, 20, generator=seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, same) and not torch.equal(first, other)
    assert first.shape == (2, 20)


def test_drawing_with_a_generator_leaves_the_global_one_alone():
    model, before = tiny_decoder(), torch.get_rng_state()
    generate(model, draw_tokens(1, 3), 3, generator=seeded(1))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_padding_of_the_vocabulary_is_never_drawn(temperature):
    prompt, bound = draw_tokens(4, 3) % 7, 7
    free = stream(prompt, 40, temperature=temperature, generator=seeded(0))
    bounded = stream(prompt, 40, temperature=temperature, generator=seeded(0), vocab_size=bound)
    assert free.max() >= bound > bounded.max()


def test_rows_end_before_their_end_of_document():
    model, prompt = tiny_decoder(), draw_tokens(3, 4)
    drawn = torch.stack(list(stream_tokens(model, prompt, 15, generator=seeded(3))), 1).tolist()
    eod = drawn[1][6]
    expected = [
        row + (new[: new.index(eod)] if eod in new else new) for row, new in zip(prompt.tolist(), drawn, strict=True)
    ]
    assert generate(model, prompt, 15, eod_id=eod, generator=seeded(3)) == expected
    assert generate(model, prompt, 15, generator=seeded(3)) == [
        row + new for row, new in zip(prompt.tolist(), drawn, strict=True)
    ]


def test_generation_stops_when_every_row_has_ended(monkeypatch):
    model, prompt = tiny_decoder(), draw_tokens(2, 3)
    steps = []
    forward = model.hidden_states
    monkeypatch.setattr(model, "hidden_states", lambda *a, **k: steps.append(1) or forward(*a, **k))
    (first,) = stream_tokens(model, prompt[:1], 1, temperature=0)
    steps.clear()
    rows = generate(model, prompt[:1].repeat(2, 1), 50, eod_id=int(first), temperature=0)
    assert rows == prompt[:1].repeat(2, 1).tolist() and len(steps) == 1


def test_generating_records_no_gradient_and_draws_known_tokens():
    drawn = stream(draw_tokens(2, 3), 5)
    assert not drawn.requires_grad and drawn.dtype == torch.int64 and drawn.max() < VOCABULARY


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
