"""Preparation: the files it writes, that it resumes, runs once, refuses what does not fit, and says so in one line."""

import errno
import gzip
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from megatron.core.datasets.indexed_dataset import IndexedDataset

from tests.helpers import WAIT
from trainer.cli import make_parser, parse
from trainer.data import corpus
from trainer.data.dataset import EvaluationStream, open_training_data
from trainer.data.indexed import TokenFile
from trainer.data.layout import find_corpora, resolve_prefix
from trainer.data.prepare import finished_part, prepare, prepare_stdlib, sample_texts
from trainer.data.prepare_config import PrepareConfig, TokenizerConfig
from trainer.data.tokenizer import Tokenizer
from trainer.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
WORDS = [
    "def",
    "return",
    "self",
    "import",
    "class",
    "for",
    "while",
    "lambda",
    "yield",
    "None",
    "True",
    "\n\t",
    "",
    "",
    "",
    "▁",
    "😀",
]


@pytest.fixture(scope="module")
def lines(tmp_path_factory) -> Path:
    """About 5 MB of jsonl: five shards."""
    path = tmp_path_factory.mktemp("input") / "data.jsonl"
    rng = np.random.default_rng(0)
    with path.open("w") as file:
        for _ in range(5000):
            file.write(json.dumps({"text": " ".join(rng.choice(WORDS, 150))}) + "\n")
    return path


def configure(source: Path | str, output: Path, **changes) -> PrepareConfig:
    tokenizer = TokenizerConfig(vocab_size=512, sample_mb=0.2)
    return PrepareConfig(
        **{"source": str(source), "output": str(output), "workers": 1, "tokenizer": tokenizer} | changes
    )


@pytest.fixture(scope="module")
def prepared(lines, tmp_path_factory) -> Path:
    return prepare(configure(lines, tmp_path_factory.mktemp("prepared") / "out"))


def digests(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.iterdir())}


def command(*arguments: object) -> list[str]:
    return [sys.executable, str(ROOT / "launch" / "prepare_data.py"), *map(str, arguments)]


def arguments_for(lines: Path, output: Path, workers: int = 1) -> list[str]:
    sizes = ("--tokenizer.vocab_size", 512, "--tokenizer.sample_mb", 0.2, "--workers", workers)
    return command("--source", lines, "--output", output, *sizes)


def test_the_files_hold_every_document(lines, prepared):
    tokenizer = Tokenizer.load(prepared)
    info = json.loads((prepared / "dataset.json").read_text())
    (shards,) = ([document for shard in corpus.shards(str(lines), "text") for document in shard.documents()],)
    for split, facts in info["splits"].items():
        dataset = IndexedDataset(str(prepared / split))
        wanted = [document.text for document in shards if corpus.split_of(document.name, 0.04, 0.04) == split]
        documents = [dataset[place] for place in range(len(dataset))]
        assert [tokenizer.decode(document[:-1]) for document in documents] == wanted
        assert all(document[-1] == info["eod_id"] == tokenizer.eod_id for document in documents)
        assert dataset.document_indices.tolist() == list(range(len(wanted) + 1))
        assert facts["documents"] == len(wanted)
        assert facts["tokens"] == sum(map(len, documents))
        assert facts["bytes"] == sum(len(text.encode()) for text in wanted)
        assert tokenizer.token_bytes()[np.concatenate(documents)].sum() == facts["bytes"]
    assert set(info["splits"]) == {"train", "validation", "test"} and info["dtype"] == "uint16"
    assert sorted(path.name for path in prepared.iterdir() if not path.name.startswith(".")) == sorted(
        [
            "dataset.json",
            "tokenizer.model",
            *(f"{split}{suffix}" for split in info["splits"] for suffix in (".bin", ".idx")),
        ]
    )


def test_prepared_data_trains_and_evaluates(prepared):
    info = json.loads((prepared / "dataset.json").read_text())
    corpora = find_corpora(prepared)
    assert (corpora.eod_id, corpora.vocab_size) == (info["eod_id"], 512)
    batch = open_training_data(prepared, seed=0, seq_len=64, global_batch_size=2).micro_batches(0, 2)[0]
    assert batch.tokens.shape == (1, 128) and int(batch.tokens.max()) < 512
    sizes = Tokenizer.load(prepared).token_bytes()
    counted = sum(sizes[batch.labels[batch.loss_mask > 0]].sum() for batch in EvaluationStream(prepared, 64, stride=48))
    assert counted == info["splits"]["validation"]["bytes"]


def test_worker_count_does_not_change_a_byte(lines, prepared, tmp_path):
    other = prepare(configure(lines, tmp_path / "out", workers=2))
    assert digests(other) == digests(prepared)


def is_alive(process: str) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().split()[2] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_run_continues_and_gives_the_same_bytes(lines, prepared, tmp_path, workers):
    output = tmp_path / "out"
    process = subprocess.Popen(arguments_for(lines, output, workers), stderr=subprocess.DEVNULL)
    parts = output / ".partial" / "parts"
    while not list(parts.glob("*.json")):
        assert process.poll() is None, "the run ended before it could be killed: give it more to do"
        time.sleep(0.002)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (output / "dataset.json").exists()
    assert len(children) >= workers if workers > 1 else not children
    deadline = time.monotonic() + 60
    while any(map(is_alive, children)):
        assert time.monotonic() < deadline, "workers outlive their killed parent"
        time.sleep(0.02)
    subprocess.run(arguments_for(lines, output, workers), check=True, capture_output=True)
    assert digests(output) == digests(prepared)


def test_finished_shards_are_not_tokenized_again(lines, tmp_path, monkeypatch):
    from trainer.data import prepare as module

    real, seen = module.tokenize_shard, []

    def stopping(shard, rule, tokenizer, stem):
        seen.append(stem.name)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return real(shard, rule, tokenizer, stem)

    monkeypatch.setattr(module, "tokenize_shard", stopping)
    with pytest.raises(KeyboardInterrupt):
        prepare(configure(lines, tmp_path / "out"))
    prepare(configure(lines, tmp_path / "out"))
    assert seen[:4] == ["00000000", "00000001", "00000002", "00000002"]
    assert len(seen) == len(set(seen)) + 1


def test_sigterm_stops_resumably(lines, tmp_path):
    process = subprocess.Popen(arguments_for(lines, tmp_path / "out"), stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.glob("out/.partial/parts/*.json")):
        time.sleep(0.002)
    process.terminate()
    _, errors = process.communicate(timeout=WAIT)
    assert process.returncode == 75
    assert "the same command continues" in errors and "Traceback" not in errors


def test_two_processes_prepare_once(lines, prepared, tmp_path):
    output = tmp_path / "out"
    processes = [subprocess.Popen(arguments_for(lines, output), stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [process.communicate(timeout=WAIT)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sorted("learned" in error for error in errors) == [False, True]
    assert digests(output) == digests(prepared)


def test_finished_output_returns_at_once(lines, prepared):
    before = digests(prepared)
    result = subprocess.run(arguments_for(lines, prepared), capture_output=True, text=True)
    assert result.returncode == 0 and "is complete" in result.stderr
    assert digests(prepared) == before


def test_other_settings_are_refused(lines, prepared, tmp_path):
    config = configure(lines, prepared)
    with pytest.raises(ConfigError, match=r"test_share \(there 0.04, now 0.1\), validation_share"):
        prepare(replace(config, test_share=0.1, validation_share=0.1))
    with pytest.raises(ConfigError, match=r"tokenizer.vocab_size \(there 512, now 600\)"):
        prepare(replace(config, tokenizer=TokenizerConfig(vocab_size=600, sample_mb=0.2)))
    assert prepare(replace(config, workers=2)) == prepared
    unfinished = tmp_path / "out" / ".partial"
    (unfinished / "parts").mkdir(parents=True)
    (unfinished / "parts" / "00000000.json").write_text("{}")
    (unfinished / "manifest.json").write_text(json.dumps(config.settings() | {"text_key": "body"}))
    with pytest.raises(ConfigError, match=r"text_key \(there body, now text\)"):
        prepare(configure(lines, tmp_path / "out"))


def test_files_of_others_are_not_overwritten(lines, tmp_path):
    (tmp_path / "train.bin").write_bytes(b"precious")
    with pytest.raises(ConfigError, match="did not write"):
        prepare(configure(lines, tmp_path))
    assert (tmp_path / "train.bin").read_bytes() == b"precious"


def test_missing_files_of_a_finished_output_are_noticed(lines, tmp_path):
    output = prepare(configure(lines, tmp_path / "out", max_mb=1))
    (output / "test.idx").unlink()
    with pytest.raises(ConfigError, match=r"test\.idx is missing"):
        prepare(configure(lines, output, max_mb=1))


def test_explicit_splits_and_an_existing_tokenizer(lines, prepared, tmp_path):
    (tmp_path / "held.txt").write_text("held out text\n")
    tokenizer = TokenizerConfig(path=str(prepared))
    output = prepare(
        configure(lines, tmp_path / "out", validation=str(tmp_path / "held.txt"), test_share=0, tokenizer=tokenizer)
    )
    info = json.loads((output / "dataset.json").read_text())
    assert info["splits"]["validation"]["documents"] == 1 and "test" not in info["splits"]
    assert info["splits"]["train"]["documents"] == 5000
    assert (output / "tokenizer.model").read_bytes() == (prepared / "tokenizer.model").read_bytes()
    with pytest.raises(ConfigError, match=r"test\.bin does not exist"):
        resolve_prefix(output, "test")


def test_streams_resume_and_agree_with_files(lines, prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "_STREAM_SHARD", 1 << 19)
    tokenizer = TokenizerConfig(path=str(prepared))
    streamed = prepare(
        configure(f"hf:{lines}", tmp_path / "stream", tokenizer=tokenizer, validation_share=0, test_share=0)
    )
    read = prepare(configure(lines, tmp_path / "file", tokenizer=tokenizer, validation_share=0, test_share=0))
    for suffix in (".bin", ".idx"):
        assert (streamed / f"train{suffix}").read_bytes() == (read / f"train{suffix}").read_bytes()


def test_sources_of_different_tokenizers_do_not_blend(lines, prepared, tmp_path):
    other = prepare(
        configure(lines, tmp_path / "out", max_mb=1, tokenizer=TokenizerConfig(vocab_size=600, sample_mb=0.2))
    )
    with pytest.raises(ConfigError, match="differ in vocab_size"):
        find_corpora({str(prepared): 1, str(other): 1})


def test_the_sample_is_bounded_and_from_the_train_split(lines):
    config = configure(lines, Path("unused"))
    texts = list(sample_texts(config))
    assert 0.1e6 < sum(map(len, texts)) < 0.3e6
    assert texts == list(sample_texts(config))
    held = {
        document.text
        for shard in corpus.shards(str(lines), "text")
        for document in shard.documents()
        if corpus.split_of(document.name, 0.04, 0.04) != "train"
    }
    assert not held & set(texts)


def test_the_standard_library(tmp_path, monkeypatch):
    """On its json and email packages alone, to be quick."""
    paths = [
        path
        for path in corpus.stdlib_paths(corpus.stdlib_root())
        if path.startswith(("json/", "email/", "test/test_json/"))
    ]
    monkeypatch.setattr(corpus, "stdlib_paths", lambda root: paths)
    output = prepare_stdlib(tmp_path, 1024, workers=1)
    assert output == tmp_path / "stdlib-bpe1024"
    info = json.loads((output / "dataset.json").read_text())
    assert info["source"] == "stdlib" and info["vocab_size"] == 1024
    assert sum(facts["documents"] for facts in info["splits"].values()) == len(
        [p for p in paths if Path(corpus.stdlib_root(), p).stat().st_size]
    )
    assert prepare_stdlib(tmp_path, 1024) == output


def test_the_report_says_what_was_read_and_left_out(prepared, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    texts = [f"row {n} of text\r\n" for n in range(20)]
    rows = [{"text": text} for text in (*texts, None, "", "a\ud800b")]
    (source / "rows.jsonl.zst").write_bytes(zstandard.compress("\n".join(map(json.dumps, rows)).encode()))
    (source / "latin.txt").write_bytes(b"caf\xe9")
    arguments = ("--source", source, "--output", tmp_path / "out", "--tokenizer.path", prepared, "--workers", 1)
    result = subprocess.run(command(*arguments), capture_output=True, text=True, check=True)
    info = json.loads((tmp_path / "out" / "dataset.json").read_text())
    counts = {reason: facts["count"] for reason, facts in info["left_out"].items()}
    assert counts == {corpus.NULL: 1, "empty documents": 1, corpus.FILE_NOT_UTF8: 1}
    assert info["left_out"][corpus.FILE_NOT_UTF8]["first"] == "latin.txt"
    assert [facts["count"] for facts in info["changed"].values()] == [1]
    size = sum(map(len, texts)) + 3
    assert f"read: 21 documents, {size} bytes; left out: " in result.stderr
    assert "files that are not UTF-8: 1 (first latin.txt)" in result.stderr
    assert "changed: documents with lone surrogates" in result.stderr
    assert info["max_id"] == max(TokenFile(tmp_path / "out" / split).tokens.max() for split in info["splits"])


def test_all_readers_lose_no_byte_on_the_way_to_tokens(prepared, tmp_path):
    """The bytes of the text that goes in are those of the decoded tokens that come out."""
    texts = ["\ufeffa\r\n\rb", "\x00", "\u2028 \x85 \x0c", "  ends in spaces  ", "\n\n", "\u2581\U0001f600", "</s>\t"]
    source = tmp_path / "source"
    source.mkdir()
    rows = [{"text": text} for text in texts]
    lines = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()
    contents = {"a.jsonl": lines, "b.jsonl.gz": gzip.compress(lines), "c.jsonl.zst": zstandard.compress(lines)}
    contents |= {"d.json": json.dumps(rows).encode()}
    contents |= {f"e{number}.txt": text.encode() for number, text in enumerate(texts)}
    for name, content in contents.items():
        (source / name).write_bytes(content)
    column = {"text": texts}
    pyarrow.parquet.write_table(pyarrow.table(column), source / "f.parquet")
    tokenizer = TokenizerConfig(path=str(prepared))
    output = prepare(configure(source, tmp_path / "out", tokenizer=tokenizer, validation_share=0, test_share=0))
    loaded, dataset = Tokenizer.load(output), IndexedDataset(str(output / "train"))
    found = [loaded.decode(dataset[place][:-1]) for place in range(len(dataset))]
    assert sorted(text.encode() for text in found) == sorted(text.encode() for text in texts * 6)


def test_a_full_disk_is_one_line_and_leaves_no_pieces(lines, prepared, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "part.bin")

    config = configure(lines, tmp_path / "out", tokenizer=TokenizerConfig(path=str(prepared)))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(ConfigError, match=r"out stopped \(part\.bin: No space left .*the same command continues"):
            prepare(config)
    assert not list((tmp_path / "out").rglob("*.tmp"))
    assert (prepare(config) / "dataset.json").exists()


def test_parts_that_are_not_whole_are_made_again(lines, prepared, tmp_path, monkeypatch):
    """A killed machine can leave a name without content; joined, it would shorten the data without a word."""
    from trainer.data import prepare as module

    config = configure(lines, tmp_path / "out", tokenizer=TokenizerConfig(path=str(prepared)))
    with monkeypatch.context() as patch:
        patch.setattr(module, "_join", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare(config)
    parts = tmp_path / "out" / ".partial" / "parts"
    (parts / "00000000.bin").write_bytes((parts / "00000000.bin").read_bytes()[:-2])
    (parts / "00000001.bin").unlink()
    (parts / "00000002.json").write_text("")
    earlier = json.loads((parts / "00000003.json").read_text())
    (parts / "00000003.json").write_text(json.dumps({key: earlier[key] for key in ("identity", "lengths", "bytes")}))
    seen, real = [], module.tokenize_shard
    monkeypatch.setattr(module, "tokenize_shard", lambda *given: seen.append(given[3].name) or real(*given))
    prepare(config)
    assert seen == [f"{number:08}" for number in range(4)]
    for name in ("train.bin", "train.idx"):
        assert (tmp_path / "out" / name).read_bytes() == (prepared / name).read_bytes()


def test_a_part_that_is_no_object_is_made_again(tmp_path):
    (tmp_path / "00000000.bin").touch()
    (tmp_path / "00000000.json").write_text("[]")
    assert finished_part(tmp_path / "00000000", corpus.MemoryShard((), 0), np.dtype(np.uint16)) is None


@pytest.fixture
def stopped(monkeypatch):
    """Prepare all shards, and be stopped before they are joined."""
    from trainer.data import prepare as module

    def run(config: PrepareConfig) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(module, "_join", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                prepare(config)

    return run


def test_another_end_of_documents_is_another_setting(prepared, tmp_path, stopped):
    """Also where a file beside the tokenizer's model names it: parts with two ends would make one data set."""
    folder, source = tmp_path / "tokenizer", tmp_path / "a.txt"
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes((prepared / "tokenizer.model").read_bytes())
    source.write_text("some text")
    shares = {"validation_share": 0, "test_share": 0}
    config = configure(source, tmp_path / "out", tokenizer=TokenizerConfig(path=str(folder)), **shares)
    stopped(config)
    named = json.dumps({"spiketrain_eod": Tokenizer.load(folder)._processor.id_to_piece(300)})
    (folder / "tokenizer_config.json").write_text(named)
    for _ in ("unfinished", "finished"):
        with pytest.raises(ConfigError, match=r"other settings: tokenizer\.eod_id \(there 0, now 300\)"):
            prepare(config)
        (folder / "tokenizer_config.json").unlink()
        output = prepare(config)
        (folder / "tokenizer_config.json").write_text(named)
    info = json.loads((output / "dataset.json").read_text())
    # As earlier versions wrote it.
    del info["settings"]["tokenizer.eod_id"]
    (output / "dataset.json").write_text(json.dumps(info))
    with pytest.raises(ConfigError, match=r"tokenizer\.eod_id \(there 0, now 300\)"):
        prepare(config)
    (folder / "tokenizer_config.json").unlink()
    assert prepare(config) == output


@pytest.mark.parametrize("changed", ["text", "held"])
def test_a_tokenizer_is_learned_anew_where_its_text_has_changed(tmp_path, stopped, capsys, changed):
    def learned():
        return capsys.readouterr().err.count("learned ")

    for name, word in (("text", "first"), ("held", "second")):
        (tmp_path / f"{name}.txt").write_text(f"{word} {' '.join(WORDS)}\n" * 50)
    tokenizer = TokenizerConfig(vocab_size=300)
    held = {"validation": str(tmp_path / "held.txt"), "test_share": 0, "tokenizer": tokenizer}
    config = configure(tmp_path / "text.txt", tmp_path / "out", **held)
    stopped(config)
    stopped(config)
    assert learned() == 1
    (tmp_path / f"{changed}.txt").write_text("others, and more of them\n" * 70)
    prepare(config)
    assert learned() == (changed == "text")
    fresh = prepare(replace(config, output=str(tmp_path / "fresh")))
    assert digests(tmp_path / "out") == digests(fresh)


def test_nothing_is_thrown_away_before_what_it_became_is_on_the_disk(prepared, tmp_path, monkeypatch):
    from trainer.data import prepare as module

    (tmp_path / "a.txt").write_text("some text")
    flushed: list[tuple[str, bool]] = []
    output = tmp_path / "out"

    def note(path: Path) -> None:
        assert (output / ".partial").exists()
        flushed.append((path.name, (output / "dataset.json").exists()))

    monkeypatch.setattr(module, "flush_to_disk", note)
    tokenizer = TokenizerConfig(path=str(prepared))
    prepare(configure(tmp_path / "a.txt", output, tokenizer=tokenizer, validation_share=0, test_share=0))
    assert ("tokenizer.model", False) in flushed and flushed[-1] == ("out", True)


def test_a_source_may_have_brackets_in_its_name(tmp_path):
    (tmp_path / "a[1].txt").write_text("some text")
    config = configure(tmp_path / "a[1].txt", tmp_path / "out")
    (shard,) = corpus.shards(config.source, "text")
    assert [document.text for document in shard.documents()] == ["some text"]


def test_a_first_try_that_came_to_nothing_is_in_nobodys_way(tmp_path):
    """What its message suggests must work in the same output."""
    (tmp_path / "few.txt").write_text("some text of few words, of which there are not many")
    config = configure(tmp_path / "few.txt", tmp_path / "out", validation_share=0, test_share=0)
    with pytest.raises(ConfigError, match=r"choose at most (\d+) \(--tokenizer.vocab_size") as caught:
        prepare(config)
    size = int(re.search(r"at most (\d+)", str(caught.value))[1])
    assert size < 512
    output = prepare(replace(config, tokenizer=TokenizerConfig(vocab_size=size)))
    assert json.loads((output / "dataset.json").read_text())["vocab_size"] == size


def test_a_source_without_text_says_why(prepared, tmp_path):
    (tmp_path / "null.jsonl").write_text('{"text": null}\n' * 3)
    for tokenizer in (TokenizerConfig(path=str(prepared)), TokenizerConfig()):
        config = configure(tmp_path / "null.jsonl", tmp_path / "out", tokenizer=tokenizer)
        with pytest.raises(ConfigError, match=r"rows whose text is null: 3 \(first null\.jsonl:0\)"):
            prepare(config)


def test_a_worker_that_is_killed_is_one_line(lines, prepared, tmp_path, monkeypatch):
    from trainer.data import prepare as module

    def broken(*arguments, **named):
        raise module.BrokenProcessPool("terminated abruptly")

    monkeypatch.setattr(module, "_collect", broken)
    config = configure(lines, tmp_path / "out", workers=2, tokenizer=TokenizerConfig(path=str(prepared)))
    with pytest.raises(ConfigError, match="use fewer --workers than 2; the same command continues"):
        prepare(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--source", "none.jsonl"], "no file matches none.jsonl"),
        (["--tokenizer.vocab_size", "100"], "tokenizer.vocab_size is 100"),
        (["--tokenizer.path", "none.json"], "none.json does not exist"),
        (["--tokenizer.knd", "bpe"], "did you mean 'tokenizer.kind'"),
        (["--validation_share", "1"], "must leave a train split"),
        (["--text_key", "body"], "set text_key to one of its keys: text"),
        (["--test_share", "0.3", "--output", "PREPARED"], "test_share (there 0.04, now 0.3)"),
        (["--output", "/proc/none"], "cannot be created"),
        (["--tokenizer.vocab_size", "100000"], "choose at most"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(lines, prepared, tmp_path, changes, message):
    changes = [str(prepared) if change == "PREPARED" else change for change in changes]
    environment = os.environ | {"PYTHONWARNINGS": "error::DeprecationWarning:trainer"}
    result = subprocess.run(
        [*arguments_for(lines, tmp_path / "out"), *changes],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
    )
    assert result.returncode == 2, result.stderr
    assert result.stderr.count("\n") == 1 and message in result.stderr


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "data").glob("*.yaml")), ids=lambda path: path.name)
def test_configurations_are_valid(path):
    config, _ = parse(PrepareConfig, make_parser(PrepareConfig, ""), ["--config", str(path)])
    assert config.source != PrepareConfig().source


def test_an_error_in_a_worker_is_one_line_too(lines, prepared, tmp_path):
    broken = tmp_path / "broken.jsonl"
    broken.write_bytes(lines.read_bytes() + b"{\n")
    arguments = ("--source", broken, "--output", tmp_path / "out", "--tokenizer.path", prepared, "--workers", 2)
    result = subprocess.run(command(*arguments), capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1 and "correct or remove the line" in result.stderr
    assert list((tmp_path / "out" / ".partial" / "parts").glob("*.json")), "what is done stays for the corrected input"


def test_checking_imports_nothing_heavy():
    code = (
        "import sys, trainer.data.prepare_config; print(sorted({'torch', 'numpy', 'sentencepiece'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_workers_import_no_torch():
    code = "import sys, trainer.data.prepare; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
