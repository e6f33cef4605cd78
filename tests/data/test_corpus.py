"""Sources: every kind gives its documents, splits stay where they are, and shards lose nothing."""

import gzip
import json
import os
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import example, given, settings
from hypothesis import strategies as st

from trainer.data import corpus, files
from trainer.data.files import LeftOut
from trainer.errors import ConfigError

TEXTS = ["one\n", "two \u2581 \U0001f600", "three\r\n\tthree", "x" * 5000, ""]


def texts_of(source: str, key: str = "text") -> list[str]:
    return [document.text for shard in corpus.shards(source, key) for document in shard.documents()]


def write_lines(path: Path, key: str = "text") -> Path:
    lines = "".join(json.dumps({key: text, "id": number}) + "\n" for number, text in enumerate(TEXTS)).encode()
    path.write_bytes(PACK.get(path.suffix, bytes)(lines))
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
        for document in corpus.JsonlShard(str(path), start, min(start + size, end), size, "text", "").documents()
    ]
    whole = list(corpus.JsonlShard(str(path), 0, end, end, "text", "").documents())
    assert documents == whole
    assert [document.text for document in documents] == texts


@pytest.mark.parametrize("line", ["{", "[" * 100_000, '{"text": "a\0"}'], ids=["cut", "nested", "control"])
def test_lines_that_are_no_json_are_named(tmp_path, line):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + line.encode("latin-1") + b"\n")
    with pytest.raises(ConfigError, match=r"data\.jsonl, byte 17: not a JSON object a line .*remove the line"):
        texts_of(str(path))


@pytest.mark.parametrize("kind", ["jsonl", "strings", "bytes"])
def test_rows_that_are_not_utf8_are_left_out_alike(tmp_path, kind):
    rows = [b"first", b"caf\xe9", b"", b"last \xf0\x9f\x98\x80"]
    path = tmp_path / ("data.jsonl" if kind == "jsonl" else "data.parquet")
    if kind == "jsonl":
        path.write_bytes(b"".join(b'\xef\xbb\xbf{"text": "%b"}\n' % row for row in rows))
    else:
        column = pyarrow.array(rows)
        column = column.view(pyarrow.string()) if kind == "strings" else column
        pyarrow.parquet.write_table(pyarrow.table({"text": column}), path)
    assert texts_of(str(path)) == ["first", "", "last \U0001f600"]
    assert [reason for _, reason in left_out_of(str(path))] == [corpus.ROW_NOT_UTF8]


UNFIT_ROWS = [{"text": None}, {"body": "x"}, {"text": 3}, {"text": ["a"]}]
UNFIT_REASONS = [corpus.NULL, corpus.MISSING, corpus.NOT_TEXT, corpus.NOT_TEXT]


def left_out_of(source: str) -> list[tuple[str, str]]:
    shards = corpus.shards(source, "text")
    return [(r.name, r.reason) for shard in shards for r in shard.records() if isinstance(r, LeftOut)]


@pytest.mark.parametrize("kind", ["jsonl", "json", "hf:"])
def test_rows_without_text_are_left_out_alike(tmp_path, monkeypatch, kind):
    rows = [{"text": "first"}, *UNFIT_ROWS, {"text": "last"}]
    path = tmp_path / f"data.{kind}"
    if kind == "hf:":
        monkeypatch.setattr(corpus, "open_hub", lambda name: rows)
    else:
        path.write_text(json.dumps(rows) if kind == "json" else "\n".join(map(json.dumps, rows)))
    source = "hf:any" if kind == "hf:" else str(path)
    assert texts_of(source) == ["first", "last"]
    assert [reason for _, reason in left_out_of(source)] == UNFIT_REASONS


def test_null_in_parquet_is_left_out_as_elsewhere(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"text": ["first", None, "last"]}), tmp_path / "data.parquet")
    assert texts_of(str(tmp_path)) == ["first", "last"]
    assert left_out_of(str(tmp_path)) == [("data.parquet:1", corpus.NULL)]


@pytest.mark.parametrize("kind", ["jsonl", "json", "json lines", "hf:"])
@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"body": "x", "id": 1}, "no text under 'text'; set text_key to one of its keys: body, id"),
        ({"text": 3}, "int and not text under"),
        (3, "it is not an object"),
    ],
)
def test_a_wrong_text_key_is_refused(tmp_path, monkeypatch, kind, row, message):
    """Not left out row by row, until there is nothing left; rows that are null do not hide it."""
    rows = [{"text": None}, row, row]
    if kind in ("json", "json lines") and isinstance(row, dict):
        rows = [row, row, {"text": None}]
    content = json.dumps(rows) if kind == "json" else "\n".join(map(json.dumps, rows))
    (tmp_path / f"data.{kind.removesuffix(' lines')}").write_text(content)
    monkeypatch.setattr(corpus, "open_hub", lambda name: rows)
    with pytest.raises(ConfigError, match=message):
        texts_of("hf:any" if kind == "hf:" else str(tmp_path))


def test_json_files_are_rows_or_a_text(tmp_path):
    row = {"text": "a\r\nb", "id": 1}
    contents = {
        "array.json": json.dumps([row, row], indent=1),
        "lines.json": json.dumps(row) + "\n" + json.dumps(row),
        "one.json": json.dumps(row, indent=1),
        "package.json": '{"name": "x"}',
        "package_on_lines.json": '{\n "name": "x"\n}\n',
        "numbers.json": "[1, 2]",
        "empty.json": "[]",
    }
    for name, content in contents.items():
        (tmp_path / name).write_text(content)
        rows = {"array.json": 2, "lines.json": 2, "one.json": 1}
        wanted = [row["text"]] * rows[name] if name in rows else [content]
        assert texts_of(str(tmp_path / name)) == wanted, name
    (tmp_path / "array.json").write_text(contents["array.json"][:-3])
    with pytest.raises(ConfigError, match=r"array\.json is not whole JSON"):
        texts_of(str(tmp_path))


PACK = {".gz": gzip.compress, ".zst": zstandard.compress, "": bytes}


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".GZ", ".Zst"])
@pytest.mark.parametrize("name", ["data.jsonl", "data.json", "data.txt", "DATA.JSONL"])
def test_compressed_files_are_read_whole_or_refused(tmp_path, name, suffix):
    kind = name.lower()
    content = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode() if "json" in kind else b"a\r\nb"
    path = tmp_path / (name + suffix)
    # Two members, or frames: what tools that append to a log or compress in parallel write.
    packed = PACK[suffix.lower()](content) * 2
    path.write_bytes(packed)
    assert texts_of(str(path)) == (TEXTS * 2 if "json" in kind else ["a\r\nba\r\nb"])
    for broken in (packed[:-3], content):
        path.write_bytes(broken)
        if "jsonl" in kind:
            with pytest.raises(ConfigError, match=rf"{name}.*cannot be decompressed .*rename it without \{suffix}"):
                texts_of(str(path))
        else:
            # Among texts, a file that cannot be read is counted, as one that is not UTF-8 is.
            assert left_out_of(str(path)) == [(path.name, corpus.NOT_COMPRESSED)]


@settings(max_examples=25, deadline=None)
@given(texts=st.lists(st.text(max_size=30), min_size=1, max_size=5))
@example(texts=["\ufeffa\r\n\rb\n", "\x00", "\u2028\x85\x0c\x1c", " \t ", "\n", "", "\U0010ffff\u2581"])
def test_every_reader_gives_the_bytes_of_the_text(tmp_path_factory, texts):
    """Line ends, byte-order marks, NUL, separators, spaces at ends: what was written is what is read."""
    directory = tmp_path_factory.mktemp("readers")
    column = {"text": texts, "bytes": [text.encode() for text in texts]}
    pyarrow.parquet.write_table(pyarrow.table(column), directory / "data.parquet")
    rows = [{"text": text} for text in texts]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in rows).encode()
    for suffix, pack in PACK.items():
        (directory / f"data.jsonl{suffix}").write_bytes(pack(lines))
        (directory / f"data.json{suffix}").write_bytes(pack(json.dumps(rows, ensure_ascii=False).encode()))
        assert texts_of(str(directory / f"data.jsonl{suffix}")) == texts
        assert texts_of(str(directory / f"data.json{suffix}")) == texts
        (directory / f"one.txt{suffix}").write_bytes(pack(texts[0].encode()))
        assert "".join(texts_of(str(directory / f"one.txt{suffix}"))) == texts[0]
    assert texts_of(str(directory / "data.parquet")) == texts_of(str(directory / "data.parquet"), "bytes") == texts


def test_what_is_left_out_of_a_directory_is_said(tmp_path):
    tree = tmp_path / "tree"
    (tree / ".git").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    for name, content in {
        "a.txt": b"a",
        "latin.txt": b"caf\xe9",
        ".hidden": b"x",
        ".git/config": b"x",
        "b.tar.gz": b"x",
        "empty.txt": b"",
        "../elsewhere/c.txt": b"c",
    }.items():
        (tree / name).write_bytes(content)
    (tree / "link").symlink_to(tmp_path / "elsewhere")
    (tree / "broken").symlink_to(tmp_path / "none")
    assert texts_of(str(tree)) == ["a"]
    assert {(Path(name).name, reason) for name, reason in left_out_of(str(tree))} == {
        ("latin.txt", corpus.FILE_NOT_UTF8),
        (".hidden", files.HIDDEN),
        (".git", files.HIDDEN),
        ("b.tar.gz", files.ARCHIVES),
        ("empty.txt", files.EMPTY_FILES),
        ("link", files.LINKED),
        ("broken", files.NOT_REGULAR),
    }
    (tree / "a.txt").unlink()
    (tree / "latin.txt").unlink()
    (tree / "empty.txt").unlink()
    with pytest.raises(ConfigError, match=r"holds no files that can be read \(archives; broken links"):
        texts_of(str(tree))


def test_a_shard_is_another_when_its_input_has_changed(tmp_path):
    """Also where names and sizes stayed: else a preparation that goes on would mix two inputs."""
    for name in ("data.jsonl", "data.txt"):
        path = tmp_path / name
        path.write_text('{"text": "one"}\n')
        os.utime(path, (1, 1))
        (before,) = corpus.shards(str(path), "text")
        path.write_text('{"text": "two"}\n')
        (after,) = corpus.shards(str(path), "text")
        assert before.identity() != after.identity()
    streams = [corpus.MemoryShard((corpus.Document("row:0", text),), 3) for text in ("one", "two")]
    assert streams[0].identity() != streams[1].identity()


def write_parquet(path: Path, key: str = "text") -> Path:
    pyarrow.parquet.write_table(pyarrow.table({"id": range(len(TEXTS)), key: TEXTS}), path, row_group_size=2)
    return path


def test_parquet(tmp_path):
    assert texts_of(str(write_parquet(tmp_path / "DATA.PARQUET"))) == TEXTS
    path = str(write_parquet(tmp_path / "data.parquet"))
    shards = list(corpus.shards(path, "text"))
    assert len(shards) == 3
    documents = [document for shard in shards for document in shard.documents()]
    assert [document.text for document in documents] == TEXTS
    assert [document.name for document in documents] == [f"data.parquet:{row}" for row in range(5)]
    with pytest.raises(ConfigError, match="no column 'body' that holds text; set text_key to one of: text"):
        texts_of(path, "body")
    with pytest.raises(ConfigError, match=r"data\.parquet: column 'id' is int64 and holds no text; .* one of: text"):
        texts_of(path, "id")
    Path(path).write_text("nonsense")
    with pytest.raises(ConfigError, match="not a parquet file"):
        texts_of(path)


def test_parquet_columns_without_text(tmp_path):
    path = tmp_path / "data.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"meta": [{"text": "a"}], "text": pyarrow.nulls(1)}), path)
    with pytest.raises(ConfigError, match="column 'meta' is struct<text: string> and holds no text; none of its"):
        texts_of(str(path), "meta")
    assert left_out_of(str(path)) == [("data.parquet:0", corpus.NULL)]
    pyarrow.parquet.write_table(pyarrow.table({"meta": [{"text": "a"}]}), path)
    with pytest.raises(ConfigError, match="no column 'text' that holds text"):
        texts_of(str(path))
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([b"caf\xe9", b"a"])}), path)
    assert texts_of(str(path)) == ["a"] and left_out_of(str(path)) == [("data.parquet:0", corpus.ROW_NOT_UTF8)]
    # A file whose pages are damaged while its footer is whole.
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a" * 5000]}), path, compression="zstd")
    content = bytearray(path.read_bytes())
    content[8:40] = bytes(32)
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"data\.parquet, row group 0 cannot be read"):
        texts_of(str(path))


def test_hugging_face_datasets_on_this_disk(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    directory = tmp_path / "dataset"
    directory.mkdir()
    write_parquet(directory / "train-00000-of-00001.parquet")
    write_lines(tmp_path / "data.jsonl")
    write_lines(tmp_path / "data.jsonl.gz")
    write_lines(tmp_path / "data.jsonl.zst")
    write_lines(tmp_path / "CAPITALS.JSONL")
    write_parquet(tmp_path / "data.parquet")
    table = datasets.Dataset.from_dict({"text": TEXTS})
    table.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"validation": table}).save_to_disk(str(tmp_path / "saved_dict"))
    arrow = next((tmp_path / "saved").glob("*.arrow"))
    for name in (
        "dataset",
        "data.jsonl",
        "data.jsonl.gz",
        "data.jsonl.zst",
        "CAPITALS.JSONL",
        "data.parquet",
        "saved",
        "saved_dict@validation",
        arrow,
    ):
        assert texts_of(f"hf:{tmp_path / name}") == TEXTS, name
    with pytest.raises(ConfigError, match="row:0 has no text under 'body'; set text_key to one of its keys: text, id"):
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
