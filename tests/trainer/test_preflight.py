"""What a run would say is said before it: of its tokenizers, its ids, its files and how much of them it reads."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.trainer.conftest import ROOT, finish, in_process_config
from trainer import preflight
from trainer.config import DataConfig
from trainer.data import indexed
from trainer.data.indexed import write_index
from trainer.data.layout import tokenizer_sha256
from trainer.data.sources import find_sources
from trainer.data.tokenizer import learn_sentencepiece
from trainer.errors import ConfigError


@pytest.fixture
def data(tiny_data, tmp_path) -> Path:
    """Prepared data of which a test may change files."""
    return Path(shutil.copytree(tiny_data, tmp_path / "data"))


@pytest.fixture
def configure(data, tmp_path):
    base = in_process_config(data, tmp_path / "run")
    return lambda **changes: replace(base, data=DataConfig(**{"path": str(data)} | changes))


@pytest.fixture(scope="module")
def other_tokenizer(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("other")
    learn_sentencepiece(["some text of few words"], "bpe", 270).save(directory)
    return directory


@pytest.fixture
def bare(tmp_path):
    """A Megatron pair with nothing beside it: four documents of 100 tokens up to 399, each ended by 0."""
    folder = tmp_path / "bare"
    folder.mkdir()
    tokens = np.arange(400, dtype=np.uint16)
    tokens[99::100] = 0
    tokens.tofile(folder / "text_document.bin")
    write_index(folder / "text_document.idx", np.array([100] * 4), tokens.dtype)
    return folder / "text_document"


def sized(config, vocab_size: int):
    return replace(config, model=replace(config.model, vocab_size=vocab_size))


def change_info(directory: Path, **changes) -> None:
    path = directory / "dataset.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(config, message: str) -> None:
    """Before a run and at its start, by the same line."""
    with pytest.raises(ConfigError, match=message) as before:
        preflight.check(config)
    with pytest.raises(ConfigError) as at_start:
        preflight.check(config, [find_sources(config)])
    assert str(before.value) == str(at_start.value)
    assert "\n" not in str(before.value)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize(("suffix", "message"), [(".bin", "cut short"), (".idx", "cannot be read as the index")])
def test_cut_files_are_refused(configure, data, split, suffix, message):
    cut(data / f"{split}{suffix}")
    refused(configure(), rf"{split}.*{message}")


@pytest.mark.parametrize("split", ["train", "validation"])
def test_documents_with_another_end_are_refused(configure, data, split):
    tokens = np.fromfile(data / f"{split}.bin", np.uint16)
    tokens[-1] = 5
    tokens.tofile(data / f"{split}.bin")
    refused(configure(), rf"{split}: document \d+ ends with token 5, not with the end-of-document token 0")
    preflight.check(configure(document_mask=False))


def test_data_that_says_too_little_is_refused(configure, bare):
    refused(configure(path=str(bare)), r"set data\.tokenizer, or model\.vocab_size")
    refused(sized(configure(path=str(bare)), 512), r"document masks need .* set data\.tokenizer or data\.eod_id")
    validated = configure(path=str(bare), validation_path=str(bare), document_mask=False)
    refused(sized(validated, 512), r"validation needs the end-of-document token")


def test_ids_beyond_the_vocabulary_are_refused(configure, bare, data, monkeypatch):
    config = configure(path=str(bare), document_mask=False)
    refused(sized(config, 398), r"text_document holds the token id 398, and model\.vocab_size has 0 to 397")
    preflight.check(sized(config, 399))
    refused(sized(configure(), 300), r"model\.vocab_size=300 is smaller than the tokenizer's 512")
    change_info(data, max_id=600)
    refused(configure(), r"train holds the token id 600, and the tokenizer .* has 0 to 511")
    change_info(data, max_id=511)
    monkeypatch.setattr(indexed, "CHECKED_BYTES", 100)
    monkeypatch.setattr(preflight, "CHECKED_BYTES", 100)
    assert any("were checked in a sample" in note for note in preflight.check(sized(config, 399)).notes)


def test_negative_ids_are_refused(configure, tmp_path):
    tokens = np.array([1, -2, 3, 0], np.int32)
    tokens.tofile(tmp_path / "negative.bin")
    write_index(tmp_path / "negative.idx", np.array([4]), tokens.dtype)
    refused(sized(configure(path=str(tmp_path / "negative"), eod_id=0), 512), "token id -2")


def test_data_and_tokenizer_that_do_not_belong_together_are_refused(configure, data, other_tokenizer):
    """Ids of one tokenizer mean other text to another: the figures would mean nothing."""
    ours, theirs = tokenizer_sha256(data)[:12], tokenizer_sha256(other_tokenizer)[:12]
    both = rf"the training data .*data and data\.tokenizer .*other.* \(SHA-256 {ours} and {theirs}\)"
    refused(configure(tokenizer=str(other_tokenizer)), both)
    preflight.check(configure(tokenizer=str(data / "tokenizer.model")))
    shutil.copy(other_tokenizer / "tokenizer.model", data / "tokenizer.model")
    refused(configure(), r"the training data .* and the tokenizer .*tokenizer\.model are of different tokenizers")


def test_validation_data_of_another_tokenizer_is_refused(configure, data, tmp_path):
    other = Path(shutil.copytree(data, tmp_path / "validation"))
    preflight.check(configure(validation_path=str(other)))
    change_info(other, tokenizer_sha256="0" * 64)
    refused(configure(validation_path=str(other)), r"training data .*data and the validation data .*validation are of")
    blend = {str(data): 1.0, str(other): 1.0}
    refused(configure(blend=blend), "differ in tokenizer_sha256")


@pytest.mark.parametrize("way", ["going on", "resume", "init"])
def test_a_checkpoint_of_another_tokenizer_is_refused(configure, data, other_tokenizer, tmp_path, way, monkeypatch):
    config = configure()
    run_dir = tmp_path / ("run" if way == "going on" else "elsewhere")
    checkpoint = run_dir / "checkpoints" / "step_00000003"
    tokenizer = checkpoint if way == "init" else checkpoint / "tokenizer"
    shutil.copytree(data, tokenizer)
    if way == "init":
        monkeypatch.setattr("trainer.stored.weights.check_vocabulary", lambda config, rows: None)
        config = replace(config, checkpoint=replace(config.checkpoint, init=str(checkpoint)))
    elif way == "resume":
        config = replace(config, checkpoint=replace(config.checkpoint, resume=str(checkpoint)))
    preflight.check(config)
    shutil.copy(other_tokenizer / "tokenizer.model", tokenizer / "tokenizer.model")
    refused(config, r"and the checkpoint's .*step_00000003\S* are of different tokenizers")


def test_an_end_of_document_token_of_ones_own(configure, data, bare):
    config = sized(configure(path=str(bare), validation_path=str(bare), eod_id=0), 512)
    preflight.check(config)
    batch = find_sources(config).open_training(config).micro_batches(0, 2)[0]
    assert batch.documents is not None and batch.documents.tokens == 64
    refused(replace(config, data=replace(config.data, eod_id=7)), r"document 0 ends with token 0, not with .* 7")
    refused(replace(config, data=replace(config.data, eod_id=512, document_mask=False)), "outside the vocabulary")
    refused(configure(eod_id=3), r"given differently: 3 by data\.eod_id, 0 by dataset\.json")
    refused(configure(path=str(bare), tokenizer=str(data), eod_id=3), r"3 by data\.eod_id, 0 by the tokenizer")
    with pytest.raises(ValueError, match=r"data\.eod_id is -1"):
        DataConfig(path=str(bare), eod_id=-1)


def test_how_much_of_the_data_a_run_reads(configure, bare):
    """400 tokens in 4 documents; a step reads 4 samples of 32."""
    config = sized(configure(path=str(bare), eod_id=0), 512)
    findings = preflight.check(replace(config, train=replace(config.train, steps=10)))
    assert f"data: {bare}: 400 tokens in 4 documents; the run reads 1,280 tokens, 3.20 epochs" in findings.notes
    assert any(note.startswith("validation: none") for note in findings.notes)
    assert any(note.startswith("no tokenizer is known") for note in findings.notes)
    assert findings.warnings == []
    (warning,) = preflight.check(replace(config, train=replace(config.train, steps=20))).warnings
    assert "6.4 times" in warning and "4 epochs are 12" in warning
    (warning,) = preflight.check(replace(config, train=replace(config.train, seq_len=512))).warnings
    assert "400 tokens, fewer than train.seq_len=512: each sample repeats it" in warning


def test_how_much_of_each_source_a_run_reads(configure, data, tmp_path):
    other = Path(shutil.copytree(data, tmp_path / "other"))
    config = configure(blend={str(data): 3.0, str(other): 1.0})
    notes = preflight.check(config).notes
    tokens = json.loads((data / "dataset.json").read_text())["splits"]["train"]["tokens"]
    read = 6 * 4 * 32
    for source, share in ((data, 0.75), (other, 0.25)):
        (line,) = [note for note in notes if note.startswith(f"data: {source} (share {share})")]
        assert f"the run reads {read * share:,.0f} tokens, {read * share / tokens:.2f} epochs" in line
    assert any(note.startswith(f"validation: {data}/validation: ") for note in notes)


def test_the_standard_library_is_not_prepared_to_check(configure, tmp_path):
    config = configure(path="stdlib", cache_dir=str(tmp_path / "cache"), vocab_size=512)
    (note,) = preflight.check(config).notes
    assert "stdlib-bpe512 is prepared from the standard library's source when the run starts" in note
    assert not (tmp_path / "cache").exists()
    with pytest.raises(ConfigError, match=r"model\.vocab_size=300 is smaller"):
        preflight.check(sized(config, 300))


def test_a_prefix_into_prepared_data_brings_its_tokenizer(configure, data):
    sources = find_sources(configure(path=str(data / "train")))
    assert sources.tokenizer is not None and sources.tokenizer_path == data / "tokenizer.model"


def test_a_source_named_twice_is_refused(configure, data, monkeypatch):
    monkeypatch.setenv("HOME", str(data.parent))
    with pytest.raises(ConfigError, match="names one source twice"):
        find_sources(configure(blend={str(data): 1.0, "~/data": 2.0}))
    assert find_sources(configure(path="~/data")).tokenizer is not None


def test_the_command_says_it_before_torch_is_imported(tiny_run, data, tmp_path):
    code, output = finish(tiny_run(tmp_path / "run", "--check", f"--data.path={data}"))
    assert code == 0
    assert "tokens in" in output and "epochs" in output and output.count("\nvalidation: ") == 1
    cut(data / "validation.bin")
    for arguments in (["--check"], []):
        code, output = finish(tiny_run(tmp_path / "run", *arguments, f"--data.path={data}"))
        assert (code, output.count("\n")) == (2, 1) and "validation.bin is cut short" in output
    assert not (tmp_path / "run" / "run.log").exists()


def test_checking_imports_no_torch():
    code = "import sys, trainer.preflight; print(sorted({'torch', 'megatron', 'pyarrow'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
