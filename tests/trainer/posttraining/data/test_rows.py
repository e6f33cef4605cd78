"""Rows: a file of every public format is recognised and read, and faults name their line."""

import json
import math
import pickle

import pyarrow
import pyarrow.parquet as parquet
import pytest

from trainer.errors import ConfigError
from trainer.posttraining.data.rows import FORMATS, Row, RowOptions, read_rows

USER = {"role": "user", "content": "1+1?"}
ANSWER = {"role": "assistant", "content": "2"}
SQL = {"db_id": "a/a.sqlite", "gold_sql": "SELECT 1", "cmp_method": "spider"}
# Of each format a record, and the row that it becomes.
CASES = {
    "verl": (
        {
            "data_source": "math",
            "prompt": [USER],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": "2"},
            "extra_info": {"split": "train", "index": 7},
        },
        Row(
            (USER,),
            "math",
            "2",
            extra={
                "ability": "math",
                "reward_model": {"style": "rule"},
                "extra_info": {"split": "train", "index": 7},
            },
        ),
    ),
    "hpt": (
        {
            "data_source": "openr1",
            "prompt": [USER],
            "reward_model": {"style": "rule", "ground_truth": "2"},
            "target": [ANSWER],
            "target_lst": ["2", "two"],
            "target_ds_qwen_7b_probs": [0.5, 1.0],
        },
        Row(
            (USER,),
            "openr1",
            "2",
            ("2", "two"),
            (math.log(0.5), 0.0),
            extra={"reward_model": {"style": "rule"}},
        ),
    ),
    "dph": (
        {
            "data_source": "sql",
            "prompt": [USER],
            "reward_model": {"ground_truth": SQL},
            "id": 12,
            "acc": 1.0,
        },
        Row((USER,), "sql", SQL, id="12", extra={"acc": 1.0}),
    ),
    "trl_prompt": (
        {"prompt": "1+1?", "solution": "2", "level": 3},
        Row("1+1?", "file", extra={"solution": "2", "level": 3}),
    ),
    "trl_messages": ({"messages": [USER, ANSWER]}, Row((USER,), "file", conversation=(USER, ANSWER))),
    "trl_text": ({"text": "once"}, Row("", "file", demonstrations=("once",))),
    "trl_completion": (
        {"prompt": "1+1?", "completion": " 2", "label": True},
        Row("1+1?", "file", demonstrations=(" 2",), extra={"label": True}),
    ),
    "trl_preference": (
        {"prompt": [USER], "chosen": [ANSWER], "rejected": [{**ANSWER, "content": "3"}]},
        Row((USER,), "file", chosen="2", rejected="3"),
    ),
    "openrlhf": (
        {"input": "1+1?", "label": "2", "output": "It is 2", "datasource": "sums"},
        Row("1+1?", "sums", "2", ("It is 2",)),
    ),
    "reasoning_gym": (
        {"question": "1+1?", "answer": "2", "metadata": {"source_dataset": "chain_sum", "source_index": 3}},
        Row("1+1?", "chain_sum", "2", extra={"metadata": {"source_dataset": "chain_sum", "source_index": 3}}),
    ),
    "evaluation": ({"prompt": "1+1?", "answer": "2", "source": "aime"}, Row("1+1?", "aime", "2")),
}


def write(path, records):
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(records), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(records, indent=1))
    else:
        path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    return path


def test_every_format_has_a_case():
    assert set(CASES) == set(FORMATS)


@pytest.mark.parametrize("ending", ["jsonl", "json", "parquet"])
@pytest.mark.parametrize("format", FORMATS)
def test_a_file_of_each_format_is_recognised_and_read(tmp_path, format, ending):
    record, expected = CASES[format]
    rows = read_rows(write(tmp_path / f"file.{ending}", [record, record]))
    assert str(rows) == f"{tmp_path}/file.{ending}: 2 rows, format {format}"
    first, second = rows
    assert first == Row(**{**vars(expected), "id": expected.id or f"file.{ending}:0"})
    assert second.id == (expected.id or f"file.{ending}:1")


def read_one(tmp_path, record, **options):
    (row,) = read_rows(write(tmp_path / "file.jsonl", [record]), RowOptions(**options))
    return row


def test_rows_may_lack_optional_columns_and_differ(tmp_path):
    record = {"data_source": "math", "prompt": "1+1?", "reward_model": {"ground_truth": ["2", 2]}}
    path = write(tmp_path / "file.jsonl", [record, record | {"extra_info": {"index": 1}}])
    first, second = read_rows(path)
    assert (first.prompt, first.ground_truth, first.extra) == ("1+1?", ["2", 2], {})
    assert second.extra == {"extra_info": {"index": 1}}


def test_parquet_fills_structs_and_its_empty_keys_leave_messages(tmp_path):
    called = {"role": "assistant", "tool_calls": [{"name": "f"}]}
    index = {"__index_level_0__": 4}
    (row,) = read_rows(write(tmp_path / "file.parquet", [{"messages": [USER, called, ANSWER], **index}]))
    assert row.conversation == (USER, called, ANSWER) and row.extra == {}


def test_a_ground_truth_that_is_an_object_survives_parquet(tmp_path):
    records = [CASES["dph"][0], CASES["dph"][0] | {"reward_model": {"ground_truth": SQL | {"gold_sql": "SELECT 2"}}}]
    rows = list(read_rows(write(tmp_path / "train_correct.parquet", records)))
    assert [row.ground_truth["gold_sql"] for row in rows] == ["SELECT 1", "SELECT 2"]


def test_a_completion_of_messages_is_learned_alone(tmp_path):
    row = read_one(tmp_path, {"prompt": [USER, ANSWER, USER], "completion": [ANSWER]})
    assert row.conversation == (USER, ANSWER, USER, ANSWER) and row.learned_from == 3
    assert row.prompt == (USER, ANSWER, USER)
    answered = read_one(tmp_path, {"input": [USER], "output": [ANSWER]})
    assert answered.conversation == (USER, ANSWER) and answered.learned_from == 1


@pytest.mark.parametrize(
    ("record", "prompt", "chosen", "rejected"),
    [
        ({"chosen": "The sky is blue", "rejected": "The sky is red"}, "The sky is", " blue", " red"),
        ({"chosen": "xyz", "rejected": "xyw"}, "xy", "z", "w"),
        ({"chosen": "ab", "rejected": "a"}, "a", "b", ""),
        ({"prompt": "1+1?", "chosen": "2", "rejected": "3"}, "1+1?", "2", "3"),
        ({"chosen": [USER, ANSWER], "rejected": [USER, {**ANSWER, "content": "3"}]}, (USER,), "2", "3"),
        (
            {"prompt": [USER], "chosen": [USER, ANSWER], "rejected": [USER, {**ANSWER, "content": "3"}]},
            (USER,),
            "2",
            "3",
        ),
    ],
)
def test_preferences_with_and_without_a_prompt(tmp_path, record, prompt, chosen, rejected):
    row = read_one(tmp_path, record)
    assert (row.prompt, row.chosen, row.rejected) == (prompt, chosen, rejected)


def test_options(tmp_path):
    record = {"q": "1+1?", "a": "2", "c": "4"}
    row = read_one(tmp_path, record, input_key="q", label_key="a", input_template="Q: {} {x}", format="openrlhf")
    assert (row.prompt, row.ground_truth, row.data_source, row.extra) == ("Q: 1+1? {x}", "2", "default", {"c": "4"})
    system = {"role": "system", "content": "Be brief."}
    assert read_one(tmp_path, {"prompt": [system, USER]}, drop_system=True).prompt == (USER,)
    assert read_one(tmp_path, {"prompt": [system, USER]}).prompt == (system, USER)
    assert read_one(tmp_path, {"question": "a", "answer": "b"}, data_source="gsm8k").data_source == "gsm8k"
    demonstrated = CASES["hpt"][0] | {"target_ds_qwen_7b_probs": [0.0, 1.0]}
    assert read_one(tmp_path, demonstrated).demonstration_log_probs == (-126 * math.log(2), 0.0)
    unread = read_one(tmp_path, demonstrated, target_probs_key=None)
    assert unread.demonstration_log_probs is None and "target_ds_qwen_7b_probs" in unread.extra


def test_csv(tmp_path):
    path = tmp_path / "file.csv"
    path.write_text('question,answer\n"a, ""b""\nc",1\n' + "x" * 200_000 + ",2\n")
    rows = list(read_rows(path))
    assert [row.ground_truth for row in rows] == ["1", "2"] and rows[0].prompt == 'a, "b"\nc'
    path.write_text("question,answer\na,b,c\n")
    with pytest.raises(ConfigError, match=r"line 2 of .*file.csv has not the 2 fields"):
        read_rows(path)


def test_files_with_weights_are_pools(tmp_path):
    a = write(tmp_path / "a.jsonl", [{"text": "x"}, {"text": "y"}])
    b = write(tmp_path / "b.json", [CASES["verl"][0]])
    rows = read_rows([a, b])
    assert len(rows) == 3 and [file.format for file in rows.files] == ["trl_text", "verl"]
    assert rows.pools() == ((tuple(rows),), (1.0,))
    pools, weights = read_rows({str(a): 3, str(b): 0.5}).pools()
    assert [len(pool) for pool in pools] == [2, 1] and weights == (3, 0.5)
    with pytest.raises(ConfigError, match="must be above 0"):
        read_rows({str(a): 0.0})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "a"}\n\n{"text": \n', r"line 3 of \S*a.jsonl is no JSON"),
        ("a.jsonl", '{"text": "a"}\n3\n', r"line 2 of \S*a.jsonl is not an object but 3"),
        ("a.json", '[{"text": "a"}, ["b"]]', r"row 2 of \S*a.json is not an object"),
        ("a.json", '[{"text": "a"}', r"a.json is no JSON"),
        ("a.jsonl", "\n", r"a.jsonl has no rows"),
        ("a.txt", "text", r"a.txt is none of .jsonl, .json, .parquet and .csv"),
        ("a.parquet", "text", r"a.parquet cannot be read"),
        ("a.jsonl", '{"text": "a"}\n{"text": 1}\n', r'line 2 of \S*a.jsonl: "text" must be a text, and is a value of'),
        ("a.jsonl", '{"foo": 1, "bar": 2}', r"the columns of \S*a.jsonl \(bar, foo\) are of no known format"),
        (
            "a.jsonl",
            '{"prompt": [{"content": "a"}], "answer": 1}',
            r'line 1 of \S*: "prompt" must be a text or a list of',
        ),
        ("a.jsonl", '{"prompt": "a", "reward_model": {}}', r'line 1 of \S*: "reward_model" has no "ground_truth"'),
        ("a.jsonl", '{"prompt": "a", "images": ["b"]}', r"line 1 of \S*: has images, and models here read text only"),
        ("a.jsonl", '{"prompt": "a", "answer": 1}\n{"prompt": "a"}', r'line 2 of \S*: has no "answer"'),
        ("a.jsonl", '{"messages": [{"role": "user"}]}', r"line 1 of \S*: .messages. has no turn of the assistant"),
        ("a.jsonl", '{"chosen": "a", "rejected": "a"}', r"line 1 of \S*: chosen and rejected are the same answer"),
        ("a.jsonl", '{"prompt": "a", "target": []}', r'line 1 of \S*: "target" must begin with a message'),
        (
            "a.jsonl",
            '{"prompt": "a", "target": "b", "target_ds_qwen_7b_probs": [2.0]}',
            r"line 1 of \S*: .target_ds_qwen_7b_probs. must be a list of probabilities",
        ),
    ],
)
def test_faults_name_file_and_line_in_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=message) as raised:
        read_rows(tmp_path / name)
    assert "\n" not in str(raised.value)


def test_other_faults(tmp_path):
    for path, message in ((tmp_path / "no.jsonl", "cannot be read"), (tmp_path, "is a directory")):
        with pytest.raises(ConfigError, match=message):
            read_rows(path)
    with pytest.raises(ConfigError, match="no file is named"):
        read_rows([])
    with pytest.raises(ConfigError, match="format nonsense is none of auto, verl"):
        read_one(tmp_path, {"text": "a"}, format="nonsense")


def test_pickles_are_refused_unopened(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    (tmp_path / "a.pt").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ConfigError, match="convert_buffer"):
        read_rows(tmp_path / "a.pt")
    assert not (tmp_path / "sprung").exists()
