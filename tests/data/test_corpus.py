"""Sources: every kind gives its documents, splits stay where they are, and shards lose nothing."""

import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.cli import ConfigError
from trainer.data import corpus

TEXTS = ["one\n", "two \u2581 \U0001f600", "three\r\n\tthree", "x" * 5000, ""]


def texts_of(source: str, key: str = "text") -> list[str]:
    return [document.text for shard in corpus.shards(source, key) for document in shard.documents()]


def write_lines(path: Path, key: str = "text") -> Path:
    lines = "".join(json.dumps({key: text, "id": number}) + "\n" for number, text in enumerate(TEXTS)).encode()
    path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
    return path


@pytest.fixture
def tree(tmp_path) -> Path:
    (tmp_path / "tree" / "deep").mkdir(parents=True)
    for name, text in zip(("a.txt", "b.md", "deep/c.py", "deep/d.txt"), TEXTS, strict=False):
        (tmp_path / "tree" / name).write_text(text, newline="")
    (tmp_path / "tree" / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "tree" / ".hidden").write_text("hidden")
    return tmp_path / "tree"


def test_directories_files_and_globs(tree):
    assert texts_of(str(tree)) == TEXTS[:4]
    assert texts_of(str(tree / "a.txt")) == TEXTS[:1]
    assert texts_of(f"{tree}/**/*.txt") == [TEXTS[0], TEXTS[3]]
    names = [document.name for shard in corpus.shards(str(tree), "text") for document in shard.documents()]
    assert names == ["a.txt", "b.md", "deep/c.py", "deep/d.txt"], (
        "names are relative, so that splits do not depend on the place"
    )


def test_an_empty_directory_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="holds no files"):
        texts_of(str(tmp_path))


@pytest.mark.parametrize("name", ["data.jsonl", "data.jsonl.gz"])
def test_jsonl(tmp_path, name):
    assert texts_of(str(write_lines(tmp_path / name, "body")), "body") == TEXTS


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(st.text(max_size=40), max_size=20), size=st.integers(1, 200))
def test_jsonl_shards_cut_anywhere_lose_nothing(tmp_path_factory, texts, size):
    path = tmp_path_factory.mktemp("jsonl") / "data.jsonl"
    path.write_text(
        "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), newline="", encoding="utf-8"
    )
    end = path.stat().st_size
    documents = [
        document
        for start in range(0, end, size)
        for document in corpus.JsonlShard(str(path), start, min(start + size, end), size, "text").documents()
    ]
    whole = list(corpus.JsonlShard(str(path), 0, end, end, "text").documents())
    assert documents == whole
    assert [document.text for document in documents] == texts


@pytest.mark.parametrize(
    ("line", "message"), [("{", "not a JSON object"), ('{"body": "x"}', "keys: body"), ("3", "not an object")]
)
def test_bad_lines_are_named(tmp_path, line, message):
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(ConfigError, match=f"byte 17: .*{message}"):
        texts_of(str(path))


def write_parquet(path: Path, key: str = "text") -> Path:
    pyarrow.parquet.write_table(pyarrow.table({"id": range(len(TEXTS)), key: TEXTS}), path, row_group_size=2)
    return path


def test_parquet(tmp_path):
    path = str(write_parquet(tmp_path / "data.parquet"))
    shards = list(corpus.shards(path, "text"))
    assert len(shards) == 3
    documents = [document for shard in shards for document in shard.documents()]
    assert [document.text for document in documents] == TEXTS
    assert [document.name for document in documents] == [f"data.parquet:{row}" for row in range(5)]
    with pytest.raises(ConfigError, match="no column 'body'; set text_key to one of: id, text"):
        texts_of(path, "body")
    Path(path).write_text("nonsense")
    with pytest.raises(ConfigError, match="not a parquet file"):
        texts_of(path)


def test_hugging_face_datasets_on_this_disk(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    directory = tmp_path / "dataset"
    directory.mkdir()
    write_parquet(directory / "train-00000-of-00001.parquet")
    write_lines(tmp_path / "data.jsonl")
    write_lines(tmp_path / "data.jsonl.gz")
    write_parquet(tmp_path / "data.parquet")
    table = datasets.Dataset.from_dict({"text": TEXTS})
    table.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"validation": table}).save_to_disk(str(tmp_path / "saved_dict"))
    arrow = next((tmp_path / "saved").glob("*.arrow"))
    for name in ("dataset", "data.jsonl", "data.jsonl.gz", "data.parquet", "saved", "saved_dict@validation", arrow):
        assert texts_of(f"hf:{tmp_path / name}") == TEXTS, name
    with pytest.raises(ConfigError, match="row 0: no text under 'body'; set text_key to one of: text, id"):
        texts_of(f"hf:{tmp_path}/data.jsonl", "body")
    with pytest.raises(ConfigError, match="check the name"):
        texts_of(f"hf:{tmp_path}/saved_dict@test")


def test_an_unreachable_hub_is_one_clear_error(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"hf:nobody/nothing cannot be opened .* check the name") as caught:
        texts_of("hf:nobody/nothing")
    assert "\n" not in str(caught.value)


def test_streams_are_cut_into_shards(monkeypatch):
    monkeypatch.setattr(corpus, "_STREAM_SHARD", 10)
    monkeypatch.setattr(corpus, "open_hub", lambda name: [{"text": f"text {row}"} for row in range(5)])
    shards = list(corpus.shards("hf:any", "text"))
    assert [[document.name for document in shard.documents()] for shard in shards] == [
        ["row:0", "row:1"],
        ["row:2", "row:3"],
        ["row:4"],
    ]


def test_splits_are_pinned_and_near_their_shares():
    names = [f"file{number}.py" for number in range(20_000)]
    splits = [corpus.split_of(name, 0.02, 0.02) for name in names]
    assert splits.count("validation") == pytest.approx(400, abs=80)
    assert splits.count("test") == pytest.approx(400, abs=80)
    # On every machine and in every version: a document that moved from test to train would spoil comparisons silently.
    assert [name for name, split in zip(names, splits, strict=True) if split == "validation"][:3] == [
        "file10.py",
        "file22.py",
        "file66.py",
    ]
    wider = [corpus.split_of(name, 0.04, 0.02) for name in names]
    assert all(after == "validation" for before, after in zip(splits, wider, strict=True) if before == "validation")


def test_the_standard_library():
    root = corpus.stdlib_root()
    paths = corpus.stdlib_paths(root)
    assert paths == sorted(paths) and "json/decoder.py" in paths and len(paths) > 500
    assert not any("site-packages" in path or "__pycache__" in path for path in paths)
    assert {corpus.split_of(path, 0.02, 0.02) for path in paths} == {"train", "validation", "test"}


def test_shards_follow_from_the_input_and_grow_with_it(tmp_path):
    for number in range(40):
        (tmp_path / f"{number:02}.txt").write_text("x" * 100_000)
    shards = list(corpus.shards(str(tmp_path), "text"))
    assert [len(shard.paths) for shard in shards] == [11, 11, 11, 7]
    assert corpus.shard_bytes(10**12) == 1 << 26
    assert 10**12 / corpus.shard_bytes(10**12) < 20_000


def test_lone_surrogates_become_question_marks():
    assert corpus.valid_text("a\ud800b") == "a?b"
