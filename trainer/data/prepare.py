"""From documents to token files: learns a tokenizer, tokenizes shards in parallel, joins them. Imports no torch.

An unfinished output directory contains `.partial/`: the settings, the tokenizer, and two files per finished shard. A
run that was killed continues from them. `dataset.json` is written last, so its presence marks the output as complete.
It also records how many documents were left out, and why.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from trainer.data.corpus import Document, MemoryShard, Shard, hash_unit, shards, split_of, valid_text
from trainer.data.files import LeftOut
from trainer.data.indexed import token_dtype, write_index
from trainer.data.layout import INFO_NAME, SPLITS, tokenizer_sha256
from trainer.data.prepare_config import PrepareConfig, finished, refuse_other_settings, stdlib_config
from trainer.data.tokenizer import Tokenizer, learn_sentencepiece, tokenizer_files
from trainer.durable import flush_to_disk, write_atomically
from trainer.errors import ConfigError
from trainer.json_files import read_object

# Default size of the sample that a tokenizer is learned from, in megabytes. unigram takes longer per byte.
_SAMPLE_MB = {"bpe": 16.0, "unigram": 2.0}
_SECONDS_BETWEEN_LINES = 30.0
# A tokenizer learns only from the beginning of longer documents, so that none of them dominates the sample.
_LONGEST_SAMPLE = 1 << 18

EMPTY = "empty documents"
_SURROGATES = "documents with lone surrogates, which became question marks"


@dataclass(frozen=True, slots=True)
class SplitRule:
    """Maps a document to its split: a fixed one, or the one that its name hashes to."""

    fixed: str | None
    validation_share: float
    test_share: float

    def __call__(self, name: str) -> str:
        """The split of the document called `name`."""
        return self.fixed or split_of(name, self.validation_share, self.test_share)


def planned_shards(config: PrepareConfig) -> Iterator[tuple[Shard, SplitRule]]:
    """Yield every shard of every source with its split rule."""
    shares = (
        config.validation_share if config.validation is None else 0.0,
        config.test_share if config.test is None else 0.0,
    )
    for key, source in config.sources():
        taken = 0
        for shard in shards(source, config.text_key):
            # max_mb is for quick trials and limits the source only, never explicit validation or test sources.
            if key == "source" and config.max_mb is not None and taken >= config.max_mb * 1e6:
                break
            taken += shard.size
            yield shard, SplitRule(None if key == "source" else key, *shares)


def sample_texts(config: PrepareConfig) -> Iterator[str]:
    """Yield a bounded, reproducible sample of the train split.

    For large inputs, hashes select some of the shards and some of their documents. For a stream it is the beginning.
    """
    budget = (config.tokenizer.sample_mb or _SAMPLE_MB[config.tokenizer.kind]) * 1e6
    plan: Iterable[tuple[Shard, SplitRule]] = planned_shards(config)
    share = 1.0
    if not config.source.startswith("hf:"):
        every = [(shard, rule) for shard, rule in plan if rule.fixed is None]
        total, chosen = 0, []
        for place in sorted(range(len(every)), key=lambda place: hash_unit(f"shard:{place}")):
            # Reading 8 times the budget spreads the sample over many shards without reading the whole input.
            if total < 8 * budget:
                chosen.append(place)
                total += every[place][0].size
        plan, share = [every[place] for place in sorted(chosen)], budget / max(total, 1)
    taken = 0
    for shard, rule in plan:
        for document in shard.documents():
            # A quarter of slack: sampling by hash hits the budget only on average.
            if taken >= 1.25 * budget or rule.fixed is not None:
                return
            if document.text and rule(document.name) == "train" and hash_unit(document.name, "sample") < share:
                taken += len(document.text)
                yield valid_text(document.text[:_LONGEST_SAMPLE])


class Tally:
    """Counts by reason, with the name of the first item; stored in the parts and in `dataset.json`."""

    def __init__(self) -> None:
        self.counts: dict[str, dict[str, Any]] = {}

    def count(self, reason: str, name: str) -> None:
        """Count one item."""
        self.add({reason: {"count": 1, "first": name}})

    def add(self, counts: dict[str, dict[str, Any]]) -> None:
        """Add the counts of another tally, whose items come later."""
        for reason, facts in counts.items():
            mine = self.counts.setdefault(reason, {"count": 0, "first": facts["first"]})
            mine["count"] += facts["count"]


def tokenize_shard(shard: Shard, rule: SplitRule, tokenizer: Tokenizer, stem: Path) -> dict[str, Any]:
    """Tokenize a shard into `stem.bin` (train, validation, test in turn), then `stem.json`, which marks it as done."""
    dtype = token_dtype(tokenizer.vocab_size)
    tokens: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
    sizes = dict.fromkeys(SPLITS, 0)
    left_out, changed = Tally(), Tally()
    for record in shard.records():
        if isinstance(record, LeftOut):
            left_out.count(record.reason, record.name)
        elif not record.text:
            left_out.count(EMPTY, record.name)
        else:
            split, text = rule(record.name), valid_text(record.text)
            if text is not record.text:
                changed.count(_SURROGATES, record.name)
            tokens[split].append(np.array([*tokenizer.encode(text), tokenizer.eod_id], dtype))
            sizes[split] += len(text.encode())
    documents = [document for split in SPLITS for document in tokens[split]]
    part = {
        "identity": shard.identity(),
        "lengths": {split: [len(document) for document in tokens[split]] for split in SPLITS},
        "bytes": sizes,
        "max_id": max((int(document.max()) for document in documents), default=0),
        "left_out": left_out.counts,
        "changed": changed.counts,
    }
    write_atomically(stem.with_suffix(".bin"), b"".join(document.tobytes() for document in documents))
    write_atomically(stem.with_suffix(".json"), json.dumps(part).encode())
    return part


_worker_tokenizer: Tokenizer


def _start_worker(tokenizer_path: str, eod: str | None) -> None:
    # Ctrl-C reaches every process of the terminal; only the parent handles it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    global _worker_tokenizer
    _worker_tokenizer = Tokenizer.load(tokenizer_path, eod)


def _end_with_parent() -> None:
    # A pool's workers hold both ends of its queue, so they would wait forever after the parent is killed.
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _tokenize_in_worker(shard: Shard, rule: SplitRule, stem: Path) -> dict[str, Any]:
    return tokenize_shard(shard, rule, _worker_tokenizer, stem)


def finished_part(stem: Path, shard: Shard, dtype: np.dtype) -> dict[str, Any] | None:
    """The result of `tokenize_shard` for this shard in an earlier run, if it finished and its file is complete."""
    try:
        part = json.loads(stem.with_suffix(".json").read_bytes())
        size = stem.with_suffix(".bin").stat().st_size
    except (FileNotFoundError, ValueError):
        return None
    # Earlier versions wrote fewer keys.
    known = {"identity", "lengths", "bytes", "max_id", "left_out", "changed"}
    if not isinstance(part, dict) or not known <= part.keys():
        return None
    whole = size == sum(sum(lengths) for lengths in part["lengths"].values()) * dtype.itemsize
    return part if whole and part["identity"] == shard.identity() else None


def tokenize_all(
    config: PrepareConfig, tokenizer: Tokenizer, tokenizer_path: Path, directory: Path
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Tokenize unfinished shards in parallel; yields (number, part) for all shards in order of completion."""
    workers, dtype = config.workers or os.cpu_count() or 1, token_dtype(tokenizer.vocab_size)
    if workers == 1:
        for number, (shard, rule) in enumerate(planned_shards(config)):
            stem = directory / f"{number:08}"
            yield number, finished_part(stem, shard, dtype) or tokenize_shard(shard, rule, tokenizer, stem)
        return
    # "spawn": forking a process that has threads (rich, SentencePiece) may deadlock.
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), _start_worker, (str(tokenizer_path), config.tokenizer.eod)
    )
    pending: dict[Future[dict[str, Any]], int] = {}
    try:
        for number, (shard, rule) in enumerate(planned_shards(config)):
            stem = directory / f"{number:08}"
            if part := finished_part(stem, shard, dtype):
                yield number, part
                continue
            pending[pool.submit(_tokenize_in_worker, shard, rule, stem)] = number
            # Queued shards of a stream carry their documents, so the queue is short.
            if len(pending) >= 2 * workers:
                yield from _collect(pending)
        while pending:
            yield from _collect(pending)
    except BrokenProcessPool as error:
        raise ConfigError(
            f"a process that tokenized was ended from outside, as when memory runs out: use fewer --workers than "
            f"{workers}; the same command continues"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _collect(pending: dict[Future[dict[str, Any]], int]) -> Iterator[tuple[int, dict[str, Any]]]:
    done, _ = wait(pending, return_when=FIRST_COMPLETED)
    for future in done:
        yield pending.pop(future), future.result()


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold the directory's lock. The kernel releases it when the process ends, in whatever way."""
    with (directory / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process that prepares {directory}", file=sys.stderr, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def prepare(config: PrepareConfig) -> Path:
    """Prepare the data unless it is complete. If several processes call this at once, one does the work.

    Returns:
        The output directory.

    Raises:
        ConfigError: if the input is invalid, the output contains other data, or files cannot be read or written.
    """
    output, settings = Path(config.output).expanduser(), config.settings()
    if finished(output, settings):
        return output
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output: {output} cannot be created ({error.strerror}); choose another --output") from error
    try:
        with locked(output):
            # Another process may have finished while this one waited for the lock.
            if not finished(output, settings):
                _prepare_locked(config, output, settings)
    except OSError as error:
        # A full disk, a vanished file, a broken mount: a traceback would not help.
        where = f"{error.filename}: " if error.filename is not None else ""
        raise ConfigError(
            f"preparing {output} stopped ({where}{error.strerror or error}); correct it, and the same command continues"
        ) from error
    return output


def _prepare_locked(config: PrepareConfig, output: Path, settings: dict[str, Any]) -> None:
    started = time.monotonic()
    partial = _open_partial(output, settings)
    tokenizer, path = _tokenizer(config, partial)
    parts = _tokenize_with_progress(config, tokenizer, path, partial / "parts")
    seconds = time.monotonic() - started
    dtype = token_dtype(tokenizer.vocab_size)
    splits = {split: _join(output, partial / "parts", parts, split, dtype) for split in SPLITS}
    splits = {split: facts for split, facts in splits.items() if facts["documents"]}
    left_out, changed = Tally(), Tally()
    for part in parts:
        left_out.add(part["left_out"])
        changed.add(part["changed"])
    if "train" not in splits:
        if not splits:
            # No finished document is lost, and shards made with a wrong text_key must not block the corrected one.
            shutil.rmtree(partial)
        raise ConfigError(
            f"{config.source} gave no documents for the train split{_because(left_out)}; check the source, text_key "
            "and the shares"
        )
    saved = tokenizer.save(output)
    info = {
        "source": config.source,
        "tokenizer": saved.name,
        "tokenizer_sha256": tokenizer_sha256(saved),
        "vocab_size": tokenizer.vocab_size,
        "eod_id": tokenizer.eod_id,
        "max_id": max(part["max_id"] for part in parts),
        "dtype": dtype.name,
        "splits": splits,
        "left_out": left_out.counts,
        "changed": changed.counts,
        "settings": settings,
        "settings_sha256": hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest(),
    }
    if config.source == "stdlib":
        info["python"] = sys.version.split()[0]
    for path in tokenizer_files(output):
        flush_to_disk(path)
        flush_to_disk(path.parent)
    write_atomically(output / INFO_NAME, (json.dumps(info, indent=2) + "\n").encode())
    # The parts are needed until the new directory entry is durable.
    flush_to_disk(output)
    shutil.rmtree(partial)
    _report(output, info, seconds)


def _open_partial(output: Path, settings: dict[str, Any]) -> Path:
    """Open the directory of unfinished work, or start a new one if no shard was finished with other settings.

    Raises:
        ConfigError: if the output contains foreign token files, or shards made with other settings.
    """
    partial = output / ".partial"
    manifest = partial / "manifest.json"
    if any((partial / "parts").glob("*.json")):
        refuse_other_settings(output, read_object(manifest, f"delete {partial} and start again"), settings)
    elif not manifest.exists() and any((output / f"{split}.bin").exists() for split in SPLITS):
        raise ConfigError(f"{output} holds token files that this command did not write; choose another --output")
    elif manifest.exists() and manifest.read_bytes() != json.dumps(settings).encode():
        # An earlier attempt finished no shard, for example because of a too large vocabulary: nothing is worth keeping.
        shutil.rmtree(partial)
    (partial / "parts").mkdir(parents=True, exist_ok=True)
    write_atomically(manifest, json.dumps(settings).encode())
    return partial


def _tokenizer(config: PrepareConfig, partial: Path) -> tuple[Tokenizer, Path]:
    """The existing tokenizer, or the one learned here, with the path from which workers load it."""
    settings = config.tokenizer
    if settings.path is not None:
        tokenizer = Tokenizer.load(settings.path, settings.eod)
        return tokenizer, Path(settings.path).expanduser()
    model, learned_from = partial / "tokenizer.model", partial / "learned_from"
    text = _training_text(config)
    if not model.exists() or not learned_from.exists() or learned_from.read_text() != text:
        # Delete the shards first: without the model, nothing would show that another one made them.
        shutil.rmtree(partial / "parts")
        (partial / "parts").mkdir()
        model.unlink(missing_ok=True)
        started = time.monotonic()
        texts = list(sample_texts(config))
        if not texts:
            raise ConfigError(
                f"{config.source} gave no text to learn a tokenizer from{_because(_without_text(config))}; check the "
                "source, text_key and the shares"
            )
        learned = learn_sentencepiece(texts, settings.kind, settings.vocab_size)
        temporary = partial / "learned"
        temporary.mkdir(exist_ok=True)
        write_atomically(learned_from, text.encode())
        os.replace(learned.save(temporary), model)
        temporary.rmdir()
        size, seconds = sum(map(len, texts)) / 1e6, time.monotonic() - started
        _say(f"learned {learned.vocab_size:,} {settings.kind} pieces from {size:.1f} MB in {seconds:.1f} s")
    return Tokenizer.load(model), model


def _training_text(config: PrepareConfig) -> str:
    """A fingerprint of the text that the tokenizer is learned from: a hash of its shards; for a stream, its name."""
    if config.source.startswith("hf:"):
        return config.source
    digest = hashlib.sha256()
    for shard, rule in planned_shards(config):
        if rule.fixed is not None:
            break
        # Among files, in-memory shards contain only left-out items.
        if not isinstance(shard, MemoryShard):
            digest.update(f"{shard.identity()}\n".encode())
    return digest.hexdigest()


def _tokenize_with_progress(
    config: PrepareConfig, tokenizer: Tokenizer, path: Path, directory: Path
) -> list[dict[str, Any]]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    # The size of a stream is unknown until its end.
    streamed = any(source.startswith("hf:") for _, source in config.sources())
    total = None if streamed else sum(shard.size for shard, _ in planned_shards(config))
    parts: dict[int, dict[str, Any]] = {}
    console = Console(stderr=True)
    done, said = 0, time.monotonic()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("tokenizing", total=total)
        for number, part in tokenize_all(config, tokenizer, path, directory):
            parts[number] = part
            done += sum(part["bytes"].values())
            progress.update(bar, completed=done)
            # In a batch job's log, lines replace the progress bar.
            if not console.is_terminal and time.monotonic() - said > _SECONDS_BETWEEN_LINES:
                said = time.monotonic()
                _say(f"tokenized {done / 1e6:,.0f} MB" + (f" of about {total / 1e6:,.0f}" if total else ""))
    return [parts[number] for number in sorted(parts)]


def _join(output: Path, directory: Path, parts: list[dict[str, Any]], split: str, dtype: np.dtype) -> dict[str, int]:
    """Write one split's files from the parts, in order; writes nothing if the split has no documents."""
    lengths = np.array([length for part in parts for length in part["lengths"][split]], np.int64)
    facts = {
        "documents": len(lengths),
        "tokens": int(lengths.sum()),
        "bytes": sum(part["bytes"][split] for part in parts),
    }
    if not len(lengths):
        return facts
    temporary = output / f"{split}.bin.tmp"
    with temporary.open("wb") as joined:
        for number, part in enumerate(parts):
            counts = {name: sum(part["lengths"][name]) * dtype.itemsize for name in SPLITS}
            with (directory / f"{number:08}.bin").open("rb") as file:
                file.seek(sum(counts[name] for name in SPLITS[: SPLITS.index(split)]))
                if joined.write(file.read(counts[split])) != counts[split]:
                    raise ConfigError(
                        f"{file.name} became shorter meanwhile; remove it, and the same command continues"
                    )
        joined.flush()
        os.fsync(joined.fileno())
    os.replace(temporary, output / f"{split}.bin")
    write_index(output / f"{split}.idx", lengths, dtype)
    return facts


def _without_text(config: PrepareConfig) -> Tally:
    """Why a source has no text. Called only if it has none, so reading it is fast."""
    tally = Tally()
    for shard, _ in planned_shards(config):
        for record in shard.records():
            tally.count(*(EMPTY, record.name) if isinstance(record, Document) else (record.reason, record.name))
    return tally


def _because(left_out: Tally) -> str:
    return f" ({_listed(left_out.counts)})" if left_out.counts else ""


def _listed(counts: dict[str, dict[str, Any]]) -> str:
    """Format counts as `rows whose text is null: 3 (first data.jsonl:120)`."""
    return "; ".join(f"{reason}: {facts['count']:,} (first {facts['first']})" for reason, facts in counts.items())


def _report(output: Path, info: dict[str, Any], seconds: float) -> None:
    splits = info["splits"]
    tokens = sum(facts["tokens"] for facts in splits.values())
    for split in SPLITS:
        if split in splits:
            facts = splits[split]
            rate = facts["bytes"] / facts["tokens"]
            _say(f"{split}: {facts['documents']:,} documents, {facts['tokens']:,} tokens, {rate:.3f} bytes/token")
        else:
            _say(f"{split}: no documents, so no files; give --{split} SOURCE, or a larger share")
    documents, size = (sum(facts[key] for facts in splits.values()) for key in ("documents", "bytes"))
    _say(f"read: {documents:,} documents, {size:,} bytes; left out: {_listed(info['left_out']) or 'nothing'}")
    if info["changed"]:
        _say(f"changed: {_listed(info['changed'])}")
    _say(f"{output}: {tokens / seconds:,.0f} tokens/s, {seconds:.1f} s with tokenizer")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def prepare_stdlib(
    cache_dir: str | Path, vocab_size: int = 4096, kind: Literal["bpe", "unigram"] = "bpe", workers: int = 0
) -> Path:
    """Prepare the standard library's source code for `data.path: stdlib`, once; every rank may call this.

    Args:
        cache_dir: the output is `cache_dir/stdlib-KINDVOCAB`.
        vocab_size: vocabulary size of the SentencePiece model to learn.
        kind: kind of the SentencePiece model.
        workers: number of processes; 0 means one per core.

    Returns:
        The directory with train, validation and test.
    """
    return prepare(stdlib_config(cache_dir, vocab_size, kind, workers))
