"""Documents to token files: learn a tokenizer, tokenize shards in parallel, join them. Imports no torch.

Until it is finished an output directory holds `.partial/`: the settings, the tokenizer, and two files for every
finished shard. A run that was killed continues from them. `dataset.json` is written last, and its presence says that
the output is complete.
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
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from trainer.cli import ConfigError
from trainer.data.corpus import Shard, hash_unit, shards, split_of, valid_text
from trainer.data.indexed import token_dtype, write_atomically, write_index
from trainer.data.layout import INFO_NAME, SPLITS
from trainer.data.prepare_config import PrepareConfig, TokenizerConfig, finished, refuse_other_settings
from trainer.data.tokenizer import Tokenizer, learn_sentencepiece

_SAMPLE_MB = {"bpe": 16.0, "unigram": 2.0}
_SECONDS_BETWEEN_LINES = 30.0
# A tokenizer learns from the beginning of a longer document, so that no single one makes up the sample.
_LONGEST_SAMPLE = 1 << 18


@dataclass(frozen=True, slots=True)
class SplitRule:
    """Which split a document goes to: a fixed one, or the one its name hashes to."""

    fixed: str | None
    validation_share: float
    test_share: float

    def __call__(self, name: str) -> str:
        """The split of the document called `name`."""
        return self.fixed or split_of(name, self.validation_share, self.test_share)


def planned_shards(config: PrepareConfig) -> Iterator[tuple[Shard, SplitRule]]:
    """Every shard of every source, with where its documents go."""
    shares = (
        config.validation_share if config.validation is None else 0.0,
        config.test_share if config.test is None else 0.0,
    )
    for key, source in config.sources():
        taken = 0
        for shard in shards(source, config.text_key):
            if key == "source" and config.max_mb is not None and taken >= config.max_mb * 1e6:
                break
            taken += shard.size
            yield shard, SplitRule(None if key == "source" else key, *shares)


def sample_texts(config: PrepareConfig) -> Iterator[str]:
    """A bounded, reproducible sample of the train split.

    Of large inputs some shards are read, and some documents of those taken, both by hash; of a stream, its beginning.
    """
    budget = (config.tokenizer.sample_mb or _SAMPLE_MB[config.tokenizer.kind]) * 1e6
    plan: Iterable[tuple[Shard, SplitRule]] = planned_shards(config)
    share = 1.0
    if not config.source.startswith("hf:"):
        every = [(shard, rule) for shard, rule in plan if rule.fixed is None]
        total, chosen = 0, []
        for place in sorted(range(len(every)), key=lambda place: hash_unit(f"shard:{place}")):
            if total < 8 * budget:
                chosen.append(place)
                total += every[place][0].size
        plan, share = [every[place] for place in sorted(chosen)], budget / max(total, 1)
    taken = 0
    for shard, rule in plan:
        for document in shard.documents():
            if taken >= 1.25 * budget or rule.fixed is not None:
                return
            if document.text and rule(document.name) == "train" and hash_unit(document.name, "sample") < share:
                taken += len(document.text)
                yield valid_text(document.text[:_LONGEST_SAMPLE])


def tokenize_shard(shard: Shard, rule: SplitRule, tokenizer: Tokenizer, stem: Path) -> dict[str, Any]:
    """Tokenize a shard into `stem.bin` (train, then validation, then test) and `stem.json`, which marks it as done."""
    dtype = token_dtype(tokenizer.vocab_size)
    tokens: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
    sizes = dict.fromkeys(SPLITS, 0)
    for document in shard.documents():
        if document.text:
            split, text = rule(document.name), valid_text(document.text)
            tokens[split].append(np.array([*tokenizer.encode(text), tokenizer.eod_id], dtype))
            sizes[split] += len(text.encode())
    lengths = {split: [len(document) for document in tokens[split]] for split in SPLITS}
    part = {"identity": shard.identity(), "lengths": lengths, "bytes": sizes}
    write_atomically(
        stem.with_suffix(".bin"), b"".join(document.tobytes() for split in SPLITS for document in tokens[split])
    )
    write_atomically(stem.with_suffix(".json"), json.dumps(part).encode())
    return part


_worker_tokenizer: Tokenizer


def _start_worker(tokenizer_path: str, eod: str | None) -> None:
    # Ctrl-C reaches every process of a terminal; the parent decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    global _worker_tokenizer
    _worker_tokenizer = Tokenizer.load(tokenizer_path, eod)


def _end_with_parent() -> None:
    # A pool's workers hold both ends of its queue, so they would outlive a killed parent, waiting.
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _tokenize_in_worker(shard: Shard, rule: SplitRule, stem: Path) -> dict[str, Any]:
    return tokenize_shard(shard, rule, _worker_tokenizer, stem)


def finished_part(stem: Path, shard: Shard) -> dict[str, Any] | None:
    """What `tokenize_shard` returned for this very shard in an earlier run, if it did."""
    try:
        part = json.loads(stem.with_suffix(".json").read_bytes())
    except FileNotFoundError:
        return None
    return part if part["identity"] == shard.identity() else None


def tokenize_all(
    config: PrepareConfig, tokenizer: Tokenizer, tokenizer_path: Path, directory: Path
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Tokenize what is not yet done, in parallel; yields (number, part) of every shard, as they finish."""
    workers = config.workers or os.cpu_count() or 1
    if workers == 1:
        for number, (shard, rule) in enumerate(planned_shards(config)):
            stem = directory / f"{number:08}"
            yield number, finished_part(stem, shard) or tokenize_shard(shard, rule, tokenizer, stem)
        return
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), _start_worker, (str(tokenizer_path), config.tokenizer.eod)
    )
    pending: dict[Future[dict[str, Any]], int] = {}
    try:
        for number, (shard, rule) in enumerate(planned_shards(config)):
            stem = directory / f"{number:08}"
            if part := finished_part(stem, shard):
                yield number, part
                continue
            pending[pool.submit(_tokenize_in_worker, shard, rule, stem)] = number
            # Streams hand over their documents, so only a few shards may wait.
            if len(pending) >= 2 * workers:
                yield from _collect(pending)
        while pending:
            yield from _collect(pending)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _collect(pending: dict[Future[dict[str, Any]], int]) -> Iterator[tuple[int, dict[str, Any]]]:
    done, _ = wait(pending, return_when=FIRST_COMPLETED)
    for future in done:
        yield pending.pop(future), future.result()


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold the directory's lock; the system gives it back when the process ends, however it ends."""
    with (directory / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process that prepares {directory}", file=sys.stderr, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def prepare(config: PrepareConfig) -> Path:
    """Prepare the data unless it is there; several processes may ask at once, and one does it.

    Returns:
        The output directory.

    Raises:
        ConfigError: if the input is wrong, or the output holds something else.
    """
    output, settings = Path(config.output).expanduser(), config.settings()
    if finished(output, settings):
        return output
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output: {output} cannot be created ({error.strerror}); choose another --output") from error
    with locked(output):
        if not finished(output, settings):
            _prepare_locked(config, output, settings)
    return output


def _prepare_locked(config: PrepareConfig, output: Path, settings: dict[str, Any]) -> None:
    started = time.monotonic()
    partial = output / ".partial"
    manifest = partial / "manifest.json"
    if manifest.exists():
        refuse_other_settings(output, json.loads(manifest.read_bytes()), settings)
    elif any((output / f"{split}.bin").exists() for split in SPLITS):
        raise ConfigError(f"{output} holds token files that this command did not write; choose another --output")
    (partial / "parts").mkdir(parents=True, exist_ok=True)
    write_atomically(manifest, json.dumps(settings).encode())
    tokenizer, path = _tokenizer(config, partial)
    parts = _tokenize_with_progress(config, tokenizer, path, partial / "parts")
    seconds = time.monotonic() - started
    splits = {
        split: _join(output, partial / "parts", parts, split, token_dtype(tokenizer.vocab_size)) for split in SPLITS
    }
    splits = {split: facts for split, facts in splits.items() if facts["documents"]}
    if "train" not in splits:
        raise ConfigError(
            f"{config.source} gave no documents for the train split; check the source, text_key and the shares"
        )
    saved = tokenizer.save(output)
    info = {
        "source": config.source,
        "tokenizer": saved.name,
        "tokenizer_sha256": hashlib.sha256(saved.read_bytes()).hexdigest(),
        "vocab_size": tokenizer.vocab_size,
        "eod_id": tokenizer.eod_id,
        "dtype": token_dtype(tokenizer.vocab_size).name,
        "splits": splits,
        "settings": settings,
        "settings_sha256": hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest(),
    }
    if config.source == "stdlib":
        info["python"] = sys.version.split()[0]
    write_atomically(output / INFO_NAME, (json.dumps(info, indent=2) + "\n").encode())
    shutil.rmtree(partial)
    _report(output, splits, seconds)


def _tokenizer(config: PrepareConfig, partial: Path) -> tuple[Tokenizer, Path]:
    """The existing tokenizer, or the one learned here; with the path that workers load it from."""
    settings = config.tokenizer
    if settings.path is not None:
        tokenizer = Tokenizer.load(settings.path, settings.eod)
        return tokenizer, Path(settings.path).expanduser()
    model = partial / "tokenizer.model"
    if not model.exists():
        started = time.monotonic()
        texts = list(sample_texts(config))
        if not texts:
            raise ConfigError(
                f"{config.source} gave no text to learn a tokenizer from; check the source, text_key and the shares"
            )
        learned = learn_sentencepiece(texts, settings.kind, settings.vocab_size)
        temporary = partial / "learned"
        temporary.mkdir(exist_ok=True)
        os.replace(learned.save(temporary), model)
        temporary.rmdir()
        size, seconds = sum(map(len, texts)) / 1e6, time.monotonic() - started
        _say(f"learned {learned.vocab_size:,} {settings.kind} pieces from {size:.1f} MB in {seconds:.1f} s")
    return Tokenizer.load(model), model


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
    # How much a stream holds is only known at its end.
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
            # A batch job's log gets lines in place of the bar.
            if not console.is_terminal and time.monotonic() - said > _SECONDS_BETWEEN_LINES:
                said = time.monotonic()
                _say(f"tokenized {done / 1e6:,.0f} MB" + (f" of about {total / 1e6:,.0f}" if total else ""))
    return [parts[number] for number in sorted(parts)]


def _join(output: Path, directory: Path, parts: list[dict[str, Any]], split: str, dtype: np.dtype) -> dict[str, int]:
    """Write one split's files from the parts, in their order; nothing if it has no documents."""
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
                joined.write(file.read(counts[split]))
        joined.flush()
        os.fsync(joined.fileno())
    os.replace(temporary, output / f"{split}.bin")
    write_index(output / f"{split}.idx", lengths, dtype)
    return facts


def _report(output: Path, splits: dict[str, dict[str, int]], seconds: float) -> None:
    tokens = sum(facts["tokens"] for facts in splits.values())
    for split in SPLITS:
        if split in splits:
            facts = splits[split]
            rate = facts["bytes"] / facts["tokens"]
            _say(f"{split}: {facts['documents']:,} documents, {facts['tokens']:,} tokens, {rate:.3f} bytes/token")
        else:
            _say(f"{split}: no documents, so no files; give --{split} SOURCE, or a larger share")
    _say(f"{output}: {tokens / seconds:,.0f} tokens/s, {seconds:.1f} s with tokenizer")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def prepare_stdlib(
    cache_dir: str | Path, vocab_size: int = 4096, kind: Literal["bpe", "unigram"] = "bpe", workers: int = 0
) -> Path:
    """Prepare the standard library's source for `data.path: stdlib`, once; every rank may call this.

    Args:
        cache_dir: the output is `cache_dir/stdlib-KINDVOCAB`.
        vocab_size: of the SentencePiece model that is learned.
        kind: of the SentencePiece model.
        workers: processes; 0 is one a core.

    Returns:
        The directory with train, validation and test.
    """
    output = Path(cache_dir) / f"stdlib-{kind}{vocab_size}"
    return prepare(
        PrepareConfig(output=str(output), workers=workers, tokenizer=TokenizerConfig(kind=kind, vocab_size=vocab_size))
    )
