"""The examples of tasks of recall: their answers follow from their contexts, at any length, and never change."""

import hashlib
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from trainer.data.tokenizer import Tokenizer, learn_sentencepiece
from trainer.errors import ConfigError
from trainer.evaluation.recall.draws import Draws
from trainer.evaluation.recall.examples import Blank, Writer
from trainer.evaluation.recall.haystack import Haystack, hide
from trainer.evaluation.recall.setting import Setting
from trainer.evaluation.recall.tasks import TASKS, example

TEXTS = [path.read_text() for path in sorted(Path(json.__file__).parent.glob("*.py"))]


def byte_level(folder):
    """A byte-level BPE like those of GPT-2, Llama 3 and Qwen."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=512, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    backend.save(str(folder / "tokenizer.json"))
    return Tokenizer.load(folder)


def of_bytes(folder):
    """A token for every byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({piece: place for place, piece in enumerate([*alphabet, "<|endoftext|>"])}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.save(str(folder / "tokenizer.json"))
    return Tokenizer.load(folder)


def with_prefixed_space(folder):
    """A tokenizer that writes a space before every text, like Llama 2's."""
    backend = Backend(models.BPE(byte_fallback=False, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(vocab_size=512, special_tokens=["<unk>", "</s>"], show_progress=False)
    backend.train_from_iterator(TEXTS, trainer)
    backend.save(str(folder / "tokenizer.json"))
    return Tokenizer.load(folder)


def learned(folder):
    """A tokenizer as preparation learns it, whose pieces may cross spaces."""
    return learn_sentencepiece(TEXTS, "bpe", 512)


@pytest.fixture(scope="module", params=[learned, byte_level, with_prefixed_space], ids=lambda make: make.__name__)
def tokenizer(request, tmp_path_factory):
    return request.param(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def setting(tokenizer):
    return setting_of(tokenizer)


def setting_of(tokenizer, haystack=None, **changes):
    ids = np.flatnonzero(tokenizer.token_bytes()).tolist()
    return Setting(ids, Writer(tokenizer), Haystack(haystack), **changes)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The setting of one tokenizer, for what does not depend on it."""
    return setting_of(byte_level(tmp_path_factory.mktemp("tokenizer")))


def texts(tokenizer, found):
    """The text before the first answer, and the answers."""
    answers = [tokenizer.decode(found.tokens[answer.start : answer.stop]).strip() for answer in found.answers]
    return tokenizer.decode(found.tokens[: found.answers[0].start]), answers


def decode(setting, found):
    return texts(setting.writer._tokenizer, found)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("length", [900, 4100])
def test_the_length_is_met(setting, task, length):
    for number in range(2):
        found = example(task, setting, 7, number, length)
        # What is left is less than a word, or an entry of a list that is repeated.
        assert length - 24 < len(found.tokens) <= length
        assert len(found.tokens) == length or task != "mqar"


@pytest.mark.parametrize("task", TASKS)
def test_an_example_is_a_function_of_its_arguments(plain, task):
    first = example(task, plain, 7, 3, 900)
    example(task, plain, 7, 4, 1000)
    assert example(task, plain, 7, 3, 900) == first
    assert example(task, plain, 7, 4, 900) != first
    assert example(task, plain, 8, 3, 900) != first


def test_examples_never_change(tmp_path):
    """Figures of other days, machines and versions stay comparable. Whoever changes a task says so here."""
    setting, hashed = setting_of(of_bytes(tmp_path)), hashlib.sha256()
    for task in TASKS:
        hashed.update(repr((task, example(task, setting, 1, 2, 3000))).encode())
    assert hashed.hexdigest()[:16] == "ab3fb3d28b004709"


@pytest.mark.parametrize("task", TASKS)
def test_answers_stand_apart_and_the_wrong_ones_are_wrong(plain, task):
    for number in range(3):
        found = example(task, plain, 7, number, 1200)
        ends = [0]
        for answer in found.answers:
            assert ends[-1] <= answer.start < answer.stop <= len(found.tokens)
            assert len(answer.others) == plain.candidates - 1
            assert found.tokens[answer.start : answer.stop] not in answer.others
            assert 0 <= answer.depth <= 1
            ends.append(answer.stop)
        assert ends[-1] == len(found.tokens) or task == "mqar"


def test_an_answer_continues_the_text_with_a_space(setting):
    tokenizer = setting.writer._tokenizer
    found = setting.writer.encode(["The number is", Blank("17", [], 0.0), Blank("23", [], 0.0)])
    assert tokenizer.decode(found.tokens) == "The number is 17 23"
    assert [tokenizer.decode(found.tokens[each.start : each.stop]).strip() for each in found.answers] == ["17", "23"]


@pytest.mark.parametrize("task", [task for task in TASKS if task.startswith("needle")])
def test_needles_are_found_where_they_were_hidden(plain, task):
    for number in range(4):
        found = example(task, plain, 7, number, 1500)
        text, answers = decode(plain, found)
        hidden = re.findall(r"One of the special magic numbers for (\w+) is: (\d+)\.", text)
        asked = (
            re.search(r"special magic numbers? for ([\w, ]+) mentioned", text)[1].replace(", and ", ", ").split(", ")
        )
        assert [value for name, value in hidden if name in asked] == answers
        assert (len({name for name, _ in hidden}), len(hidden), len(answers)) == {
            "needle": (1, 1, 1),
            "needle_keys": (4, 4, 1),
            "needle_values": (1, 4, 4),
            "needle_queries": (4, 4, 4),
        }[task]
        inside = text[text.index("afterwards.\n") : text.rindex("\nWhat")]
        for answer, value in zip(found.answers, answers, strict=True):
            assert inside.index(value) / len(inside) == pytest.approx(answer.depth, abs=0.12)


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_a_needle_is_hidden_at_the_depth_that_is_chosen(plain, depth):
    chosen = setting_of(plain.writer._tokenizer, depth=depth)
    found = example("needle_keys", chosen, 7, 0, 3000)
    text, (answer,) = decode(plain, found)
    inside = text[text.index("afterwards.\n") : text.rindex("\nWhat")]
    assert inside.index(answer) / len(inside) == pytest.approx(depth, abs=0.05)
    assert found.answers[0].depth == depth


def test_depths_are_spread_evenly(plain):
    depths = sorted(plain.depth_of(number) for number in range(20))
    assert max(np.diff([0, *depths, 1])) < 0.1


def test_mqar_has_the_values_of_its_keys(plain):
    for number in range(4):
        found = example("mqar", plain, 7, number, 256)
        tokens = found.tokens
        pairs = dict(zip(tokens[:32:2], tokens[1:32:2]))
        assert len(pairs) == len(found.answers) == 256 // 16
        assert len({*pairs, *pairs.values()}) == 32
        asked = [tokens[answer.start - 1] for answer in found.answers]
        assert sorted(asked) == sorted(pairs)
        assert [tokens[answer.start] for answer in found.answers] == [pairs[key] for key in asked]
        assert all(tokens.count(key) == 2 for key in pairs)
        assert all(
            {each for other in answer.others for each in other} <= set(pairs.values()) for answer in found.answers
        )


def test_mqar_asks_for_most_keys_soon_and_for_some_late(plain):
    """The gaps follow a power law."""
    places = [answer.start for number in range(40) for answer in example("mqar", plain, 7, number, 1024).answers]
    near, far = sum(place < 128 + 224 for place in places), sum(place >= 800 for place in places)
    assert near > 0.5 * len(places) and 0.02 * len(places) < far < 0.2 * len(places)


def test_mqar_of_a_small_vocabulary():
    found = example("mqar", Setting(range(8), None, Haystack()), 7, 0, 64)
    assert len(found.answers) == 2 and len(found.tokens) == 64
    with pytest.raises(ConfigError, match="mqar needs 16 tokens and 4 ids at least, not 64 and 3"):
        example("mqar", Setting(range(3), None, Haystack()), 7, 0, 64)


def test_mqar_of_text_has_the_values_of_its_keys(plain):
    found = example("mqar_text", plain, 7, 0, 1500)
    whole = plain.writer._tokenizer.decode(found.tokens)
    pairs = re.findall(r"^(\w+): (\w+)$", whole, re.MULTILINE)
    half = len(pairs) // 2
    assert half == 1500 // 64 == len(found.answers)
    assert sorted(pairs[:half]) == sorted(pairs[half:]) and pairs[:half] != pairs[half:]
    assert decode(plain, found)[1] == [value for _, value in pairs[half:]]


def test_variables_of_one_value_are_a_chain(plain):
    found = example("variables", plain, 7, 0, 1500)
    text, answers = decode(plain, found)
    value = re.search(r"assigned the value (\d+)", text)[1]
    known = {}
    for name, assigned in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", text):
        known[name] = known.get(assigned, assigned)
    assert answers == [name for name in known if known[name] == value]
    assert (len(known), len(answers), len(set(known.values()))) == (10, 5, 2)
    others = {plain.writer._tokenizer.decode(other).strip() for answer in found.answers for other in answer.others}
    assert others <= {name for name in known if known[name] != value}


@pytest.mark.parametrize(("length", "often", "seldom"), [(1500, 6, 1), (6000, 30, 3)])
def test_common_words_are_the_most_common_ones(plain, length, often, seldom):
    text, answers = decode(plain, example("common_words", plain, 7, 0, length))
    listed = re.findall(r"\d+\. (\w+)", text)
    counts = Counter(listed)
    assert {word: counts[word] for word in answers} == dict.fromkeys(answers, often)
    assert {count for word, count in counts.items() if word not in answers} == {seldom}
    assert answers == sorted(answers, key=listed.index) and len(answers) == 5


@pytest.mark.parametrize("length", [900, 6000])
def test_frequent_words_are_the_most_frequent_ones(plain, length):
    text, answers = decode(plain, example("frequent_words", plain, 7, 0, length))
    inside = text[text.index("coded words. ") + 13 : text.index("\nQuestion")]
    (dots, most), *rest = Counter(inside.split()).most_common()
    assert (dots, [word for word, _ in rest[:3]]) == ("....", answers)
    counts = [most, *(count for _, count in rest)]
    assert counts[0] > counts[1] > counts[2] > counts[3] > counts[4]
    assert counts[1] / len(inside.split()) == pytest.approx(6 / np.pi**2 / 4, rel=0.1)


def test_too_short_a_length_is_refused_with_what_is_needed(plain):
    with pytest.raises(ConfigError, match=r"lengths: 20 tokens are too few for needle, which needs \d+; give more"):
        example("needle", plain, 7, 0, 20)


def test_text_needs_a_tokenizer():
    with pytest.raises(ConfigError, match="recall: needle is text, and the checkpoint has no tokenizer"):
        example("needle", Setting(range(50), None, Haystack()), 7, 0, 512)


def test_a_text_of_the_user_s_goes_round_and_round(plain):
    own = setting_of(plain.writer._tokenizer, haystack="It was late. Nobody spoke.")
    text, _ = decode(plain, example("needle", own, 7, 0, 900))
    inside = re.sub(r"One of the .*? is: \d+\. ?", "", text[text.index("afterwards.\n") + 12 : text.rindex("\nWhat")])
    assert set(inside.split()) == {"It", "was", "late.", "Nobody", "spoke."} and len(inside.split()) > 100


def test_needles_begin_sentences():
    words = ["One", "two.", "Three", "four.", "Five"]
    assert hide(words, ["N."], [0.0]) == "N. One two. Three four. Five"
    assert hide(words, ["N."], [0.35]) == "One two. N. Three four. Five"
    assert hide(words, ["N.", "M."], [0.75, 1.0]) == "One two. Three four. N. M. Five"
    assert hide([], ["N."], [0.5]) == "N."
    assert hide(["a", "b"], ["N."], [0.9]) == "N. a b"


def test_draws_are_without_repetition_and_uniform():
    draws = Draws("a", 1)
    assert sorted(draws.shuffled(range(30))) == list(range(30))
    assert len(set(draws.some_of(range(10), 10))) == 10
    assert len(set(draws.words(5000))) == 5000 and len(set(draws.numbers(90, 2))) == 90
    firsts = Counter(Draws("b", number).some_of(range(4), 2)[0] for number in range(2000))
    assert all(400 < firsts[value] < 600 for value in range(4))
    assert [Draws("b", 1).below(1000) for _ in range(2)] == [Draws("b", 1).below(1000)] * 2
