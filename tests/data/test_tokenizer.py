"""Tokenizers: exact round trips, bytes per token, and the files that others made."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from trainer.data.prepare_config import TokenizerConfig
from trainer.data.tokenizer import (
    EOD_PIECE,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    learn_sentencepiece,
)
from trainer.errors import ConfigError

SOURCE = [
    Path(json.__file__).parent.joinpath(name).read_text()
    for name in ("decoder.py", "encoder.py", "scanner.py", "__init__.py")
]
AWKWARD = (
    "\ttab\r lone\r\n\n\n    indent \u2581\u2581x \U0001f600 e\u0301 \x00 \ufeff \u2585 <0x41> <unk> </s> "
    + EOD_PIECE
    + "  "
)


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def learned(request) -> SentencePieceTokenizer:
    return learn_sentencepiece(SOURCE, request.param, 600)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory) -> HuggingFaceTokenizer:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        SOURCE, trainers.BpeTrainer(vocab_size=500, special_tokens=[EOD_PIECE], initial_alphabet=alphabet)
    )
    path = tmp_path_factory.mktemp("hf") / "tokenizer.json"
    backend.save(str(path))
    return HuggingFaceTokenizer(path)


@settings(max_examples=200, deadline=None)
@given(text=st.text())
@example(text=AWKWARD)
@example(text="\u2581")
@example(text=" \u2581 ")
@example(text="")
def test_learned_models_are_lossless(learned, text):
    ids = learned.encode(text)
    assert learned.decode(ids) == text
    assert learned.token_bytes()[ids].sum() == len(text.encode())
    assert learned.eod_id not in ids


@settings(max_examples=100, deadline=None)
@given(text=st.text())
@example(text=AWKWARD)
def test_byte_level_bpe_is_lossless(byte_level, text):
    ids = byte_level.encode(text)
    assert byte_level.decode(ids) == text
    assert byte_level.token_bytes()[ids].sum() == len(text.encode())
    assert byte_level.eod_id not in ids


def test_eod_stands_for_no_bytes(learned, byte_level):
    for tokenizer in (learned, byte_level):
        sizes = tokenizer.token_bytes()
        assert sizes.shape == (tokenizer.vocab_size,) and sizes.dtype == np.int64
        assert sizes[tokenizer.eod_id] == 0
        assert tokenizer.decode([tokenizer.eod_id]) == ""


def test_pieces_cross_newlines_and_indentation():
    tokenizer = learn_sentencepiece(SOURCE, "bpe", 1000)
    pieces = [tokenizer.decode([token]) for token in range(tokenizer.vocab_size)]
    assert any("\n  " in piece for piece in pieces)
    assert len(tokenizer.encode(SOURCE[0])) < len(SOURCE[0]) / 2.5


def test_the_same_texts_give_the_same_model(tmp_path):
    models = [learn_sentencepiece(SOURCE, "bpe", 600).save(tmp_path).read_bytes() for _ in range(2)]
    assert models[0] == models[1]


def test_save_and_load(learned, byte_level, tmp_path):
    for number, tokenizer in enumerate((learned, byte_level)):
        directory = tmp_path / str(number)
        directory.mkdir()
        path = tokenizer.save(directory)
        for again in (Tokenizer.load(directory), Tokenizer.load(path)):
            assert again.encode(AWKWARD) == tokenizer.encode(AWKWARD)
            assert (again.vocab_size, again.eod_id) == (tokenizer.vocab_size, tokenizer.eod_id)


def test_a_named_eod_survives_saving(byte_level, tmp_path):
    Tokenizer.load(byte_level._file, eod="!").save(tmp_path)
    assert Tokenizer.load(tmp_path).eod_id == byte_level._vocab["!"]


def test_sentencepiece_models_of_others_keep_their_own_rules(tmp_path):
    import sentencepiece

    prefix = tmp_path / "llama"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SOURCE[0].splitlines()),
        model_prefix=str(prefix),
        vocab_size=500,
        byte_fallback=True,
        minloglevel=2,
    )
    tokenizer = Tokenizer.load(f"{prefix}.model")
    library = sentencepiece.SentencePieceProcessor(model_file=f"{prefix}.model")
    assert tokenizer.encode("return value") == library.encode("return value")
    assert tokenizer.decode([*tokenizer.encode("return value"), tokenizer.eod_id]) == "return value"
    assert tokenizer.eod_id == library.eos_id()
    assert Tokenizer.load(f"{prefix}.model", eod="<s>").eod_id == library.bos_id()


@pytest.mark.parametrize(
    ("name", "content", "eod", "message"),
    [
        ("tokenizer.json", "{}", None, "not a tokenizer that can be read"),
        ("spm.model", "nonsense", None, "not a tokenizer that can be read"),
    ],
)
def test_broken_files_are_refused(tmp_path, name, content, eod, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=message):
        Tokenizer.load(tmp_path / name, eod)


def test_a_broken_file_beside_a_tokenizer_is_named(learned, tmp_path):
    learned.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"tokenizer\.model: tokenizer_config\.json cannot be read .*copy the"):
        Tokenizer.load(tmp_path)


def test_missing_tokens_and_files_are_refused(byte_level, tmp_path):
    with pytest.raises(ConfigError, match="no tokenizer at"):
        Tokenizer.load(tmp_path)
    with pytest.raises(ConfigError, match="no token <none>"):
        Tokenizer.load(byte_level._file, eod="<none>")


def test_a_vocabulary_of_another_size_is_refused_with_one_that_works():
    """A suggestion that is refused in turn is worse than none."""
    for size, message in ((4096, r"choose at most (\d+)"), (258, r"choose at least (\d+)")):
        with pytest.raises(ConfigError, match=message) as caught:
            learn_sentencepiece(["some text of few words"], "bpe", size)
        suggested = int(re.search(message, str(caught.value))[1])
        assert learn_sentencepiece(["some text of few words"], "bpe", suggested).vocab_size == suggested
        assert TokenizerConfig(vocab_size=suggested).vocab_size == suggested
