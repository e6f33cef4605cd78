"""Tokens and loss masks: only what the assistant says is learned, and the token that ends it."""

import numpy as np
import pytest

from trainer.data.chat import ChatTemplate
from trainer.errors import ConfigError
from trainer.posttraining.data.encode import (
    DEMONSTRATOR,
    EncodeCounts,
    EncodeOptions,
    Encoder,
    encode_pools,
    encode_prompts,
    encode_supervised,
)
from trainer.posttraining.data.row import Row
from trainer.posttraining.data.rows import RowFile, Rows


def message(role, content):
    return {"role": role, "content": content}


TALK = (message("user", "Hi"), message("assistant", "Hello"), message("user", "1+1?"), message("assistant", "2"))
# One that marks what the assistant writes, without the turn's end, and renders earlier turns otherwise.
MARKED = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "A:{% generation %}{{ message['content'] ~ ('' if loop.last else '!') }}{% endgeneration %};"
    "{% else %}U:{{ message['content'] }};{% endif %}{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
)


@pytest.fixture
def make(make_tokenizer):
    """An encoder with these options, and the function that reads tokens, special ones included."""

    def encoder(*template, **options):
        tokenizer = make_tokenizer(*template)
        names = {tokenizer.token_id(name): name for name in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")}

        def read(ids):
            return "".join(names.get(int(token)) or tokenizer.decode([int(token)]) for token in ids)

        return Encoder(tokenizer, ChatTemplate(tokenizer), EncodeOptions(**options)), read

    return encoder


def learned(sequence, read):
    """The learned stretches of a sequence, as texts."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], sequence.loss_mask, [0]])))
    return [read(sequence.tokens[start:stop]) for start, stop in edges.reshape(-1, 2)]


def test_only_the_assistants_turns_are_learned_with_their_end(make):
    encoder, read = make()
    sequence = encoder.supervised(Row(TALK[:3], conversation=TALK))
    whole = (
        "<|im_start|>system\nBe helpful.<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
        "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n2<|im_end|>\n"
    )
    assert read(sequence.tokens) == whole
    assert learned(sequence, read) == ["Hello<|im_end|>", "2<|im_end|>"]
    assert sequence.tokens.dtype == np.int32 and sequence.loss_mask.dtype == np.float32


@pytest.mark.parametrize(
    ("row", "turns"), [(Row("", conversation=TALK, learned_from=3), "all"), (Row("", conversation=TALK), "last")]
)
def test_a_prompts_turns_and_earlier_turns_may_be_left_unlearned(make, row, turns):
    encoder, read = make(turns=turns)
    assert learned(encoder.supervised(row), read) == ["2<|im_end|>"]


def test_a_templates_own_marks_come_first(make):
    encoder, read = make(MARKED)
    sequence = encoder.supervised(Row("", conversation=TALK))
    # The template ends no turn with a token, so one is appended.
    assert read(sequence.tokens) == "U:Hi;A:Hello!;U:1+1?;A:2;<|im_end|>"
    assert learned(sequence, read) == ["Hello!", "2", "<|im_end|>"]
    assert learned(encoder.supervised(Row("", conversation=TALK, learned_from=2)), read) == ["2", "<|im_end|>"]
    assert encoder.prompt(Row(TALK[:1])) == encoder.supervised(Row("", conversation=TALK)).tokens[:7].tolist()


def test_a_template_that_changes_earlier_turns_is_refused_but_for_the_last(make):
    without = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    encoder, read = make(without)
    with pytest.raises(ConfigError, match="renders message 1 of the conversation differently"):
        encoder.supervised(Row("", conversation=TALK))
    encoder, read = make(without, turns="last")
    assert learned(encoder.supervised(Row("", conversation=TALK)), read) == ["2;<|im_end|>"]


def test_marks_and_special_tokens_in_messages_are_text(make):
    encoder, read = make()
    spelled = (message("user", "a\U000fe0df<|im_end|>\U000fe0e0"), message("assistant", "b<|im_end|>c"))
    sequence = encoder.supervised(Row("", conversation=spelled))
    assert learned(sequence, read) == ["b<|im_end|>c<|im_end|>"]
    assert sequence.tokens.tolist().count(encoder.end(Row(spelled))) == 3


def test_a_prompt_with_an_answer_ends_with_a_learned_end_of_text(make):
    encoder, read = make()
    plain = encoder.demonstration(Row("1+1=", demonstrations=("2",)))
    assert read(plain.tokens) == "1+1=2<|endoftext|>" and learned(plain, read) == ["2<|endoftext|>"]
    chat = encoder.demonstration(Row(TALK[:1], demonstrations=("no", "Hello")), 1)
    assert read(chat.tokens).endswith("<|im_start|>assistant\nHello<|im_end|>")
    assert learned(chat, read) == ["Hello<|im_end|>"]
    wrapped, _ = make(wrap_text=True)
    assert wrapped.prompt(Row("Hi")) == encoder.prompt(Row(TALK[:1]))
    text = encoder.supervised(Row("", demonstrations=("once",)))
    assert learned(text, read) == ["once<|endoftext|>"]
    first, second = encoder.preference(Row("a", chosen="b", rejected="c"))
    assert (learned(first, read), learned(second, read)) == (["b<|endoftext|>"], ["c<|endoftext|>"])


def test_a_thought_is_opened_once(make):
    encoder, read = make()
    sequence = encoder.answer(Row("Q\n<think>\n"), "<think>\nso</think>2")
    assert read(sequence.tokens) == "Q\n<think>\nso</think>2<|endoftext|>"
    assert read(encoder.answer(Row("Q\n"), "<think>\nso").tokens) == "Q\n<think>\nso<|endoftext|>"


def test_log_probs_of_the_demonstrator_stand_with_its_tokens(make):
    encoder, _ = make()
    row = Row("Q:", demonstrations=("ab", "c"), demonstration_log_probs=(-1.0, -2.0, -3.0), id="r")
    sequence = encoder.demonstration(row, log_probs=True)
    assert sequence.extra[DEMONSTRATOR].tolist() == [0, 0, -1, -2, -3]
    with pytest.raises(ConfigError, match="r has log-probabilities of 3 tokens, and its demonstration has 2"):
        encoder.demonstration(
            Row("Q:", demonstrations=("a",), demonstration_log_probs=(-1, -2, -3), id="r"), log_probs=True
        )
    with pytest.raises(ConfigError, match="no log-probabilities of demonstration 1"):
        encoder.demonstration(row, 1, log_probs=True)


def test_long_rows_are_left_out_cut_or_refused_and_counted(make):
    # 8, 4 and 9 tokens with the end; the third answer is too long by itself.
    rows = [
        Row("123456", demonstrations=("7",), id="a"),
        Row("1", demonstrations=("23",)),
        Row("1", demonstrations=("2345678",)),
    ]
    encoder, read = make(max_length=6)
    kept, counts = encode_supervised(rows, encoder)
    assert [read(sequence.tokens) for sequence in kept] == ["123<|endoftext|>"]
    assert counts == EncodeCounts(rows=3, overlong=2, tokens=4, learned=3)
    encoder, read = make(max_length=6, overlong="left")
    kept, counts = encode_supervised(rows, encoder)
    assert [read(sequence.tokens) for sequence in kept] == [
        "34567<|endoftext|>",
        "123<|endoftext|>",
    ]
    assert counts == EncodeCounts(rows=3, cut=1, overlong=1, tokens=10, learned=5)
    encoder, read = make(max_length=6, overlong="right")
    kept, counts = encode_supervised(rows, encoder)
    assert [read(sequence.tokens) for sequence in kept] == ["123<|endoftext|>", "123456"]
    assert counts == EncodeCounts(rows=3, cut=1, empty=1, tokens=10, learned=8)
    encoder, _ = make(max_length=6, overlong="error")
    with pytest.raises(ConfigError, match="a has 8 tokens, and max_length is 6"):
        encode_supervised(rows, encoder)
    assert "1 of 3 rows kept, 0 of them cut; 2 too long and 0 empty" in str(EncodeCounts(rows=3, overlong=2))


def test_long_prompts(make):
    rows = [Row("12345", id="a"), Row("12"), Row("")]
    for overlong, expected in (("drop", ["12"]), ("left", ["345", "12"]), ("right", ["123", "12"])):
        encoder, read = make(max_prompt_length=3, overlong=overlong)
        kept, counts = encode_prompts(rows, encoder)
        assert [read(ids) for _, ids in kept] == expected
        dropped = overlong == "drop"
        assert counts == EncodeCounts(3, cut=not dropped, overlong=dropped, empty=1, tokens=sum(map(len, expected)))
    encoder, _ = make(max_prompt_length=3, overlong="error")
    with pytest.raises(ConfigError, match="a has 5 tokens, and max_prompt_length is 3"):
        encode_prompts(rows, encoder)


def test_the_last_answer_may_touch_the_cut_only_from_behind(make):
    """The first token of a sequence has no prediction, so a cut leaves one token before the first learned one."""
    row = Row("12", demonstrations=("345",))
    encoder, read = make(max_length=5, overlong="left")
    (sequence,), _ = encode_supervised([row], encoder)
    assert read(sequence.tokens) == "2345<|endoftext|>" and sequence.learned == 4
    encoder, _ = make(max_length=4, overlong="left")
    assert encode_supervised([row], encoder) == ([], EncodeCounts(1, overlong=1))


def test_tools_reach_the_template(make):
    encoder, read = make("{% if tools %}T:{{ tools[0].name }};{% endif %}" + MARKED)
    row = Row("", conversation=TALK[:2], extra={"tools": [{"name": "add"}]})
    assert read(encoder.supervised(row).tokens).startswith("T:add;U:Hi")


def test_rows_that_cannot_be_encoded(make, make_tokenizer):
    encoder, _ = make()
    with pytest.raises(ConfigError, match="x has no demonstration 0"):
        encoder.supervised(Row("a", id="x"))
    with pytest.raises(ConfigError, match="x has no chosen and rejected"):
        encoder.preference(Row("a", id="x"))
    with pytest.raises(ConfigError, match="x has messages, and there is no chat template"):
        Encoder(make_tokenizer()).prompt(Row(TALK[:1], id="x"))


def test_pools_are_encoded_apart(make, tmp_path):
    encoder, read = make(max_length=4)
    files = [
        RowFile(tmp_path / name, "trl_text", tuple(Row("", demonstrations=(text,), id=text) for text in texts), weight)
        for name, texts, weight in (("a", ("a", "bb"), 2.0), ("b", ("c", "ddddd"), 1.0))
    ]
    pools, weights, counts = encode_pools(Rows(tuple(files)), lambda pool: encode_supervised(pool, encoder))
    assert [[read(sequence.tokens[:-1]) for sequence in pool] for pool in pools] == [["a", "bb"], ["c"]]
    assert weights == (2.0, 1.0) and (counts.rows, counts.overlong) == (4, 1)
    short, _ = make(max_length=1)
    with pytest.raises(ConfigError, match="none of the rows from a on is left"):
        encode_pools(Rows(tuple(files)), lambda pool: encode_supervised(pool, short))


def test_marks_are_read_as_transformers_reads_them(make, tmp_path):
    from transformers import PreTrainedTokenizerFast

    encoder, _ = make(MARKED)
    peer = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer" / "tokenizer.json"))
    found = peer.apply_chat_template(
        list(TALK), chat_template=MARKED, return_dict=True, return_assistant_tokens_mask=True
    )
    sequence = encoder.supervised(Row("", conversation=TALK))
    # Without the end of the turn, which this template leaves out.
    assert sequence.tokens[:-1].tolist() == found["input_ids"]
    assert sequence.loss_mask[:-1].tolist() == found["assistant_masks"]
