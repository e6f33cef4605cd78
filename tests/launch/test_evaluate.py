"""Bits per byte of a checkpoint."""

import gzip
import json
import sysconfig
from pathlib import Path

import pytest

from tests.trainer.conftest import metrics


def evaluate(launch, tmp_path, *arguments):
    code, _, errors, imported = launch("evaluate", *arguments, "--json", str(tmp_path / "out.json"))
    assert code == 0, errors
    return json.loads((tmp_path / "out.json").read_text()), imported


def test_equals_the_run_s_own_validation(launch, trained, tiny_data, tmp_path):
    result, imported = evaluate(launch, tmp_path, "--checkpoint", str(trained), "--data", str(tiny_data))
    last = [line for line in metrics(trained) if line.get("split") == "validation"][-1]
    assert result["bits_per_byte"] == pytest.approx(last["bits_per_byte"], rel=1e-6)
    assert result["loss"] == pytest.approx(last["loss"], rel=1e-6)
    assert imported == ["torch"], "reading the files needs no megatron"


def test_text_files_and_their_indexed_dataset_agree(launch, trained, tiny_data, tmp_path):
    text = f"{sysconfig.get_paths()['stdlib']}/json/*.py"
    from_text, _ = evaluate(launch, tmp_path, "--checkpoint", str(trained), "--data", text)
    indexed, _ = evaluate(launch, tmp_path, "--checkpoint", str(trained), "--data", str(tiny_data))
    assert from_text["bytes"] == indexed["bytes"]
    assert from_text["bits_per_byte"] == pytest.approx(indexed["bits_per_byte"], rel=1e-6)
    sources = b"".join(path.read_bytes() for path in sorted(Path(text).parent.glob("*.py")))
    assert from_text["bytes"] == len(sources)
    assert from_text["gzip -9"] == pytest.approx(8 * len(gzip.compress(sources, 9)) / len(sources))


def test_overlapping_windows_count_the_same_text(launch, trained, tiny_data, tmp_path):
    common = ("--checkpoint", str(trained), "--data", str(tiny_data), "--compare_compressors", "false")
    plain, _ = evaluate(launch, tmp_path, *common)
    overlapping, _ = evaluate(launch, tmp_path, *common, "--seq_len", "64", "--stride", "16")
    assert overlapping["bytes"] == plain["bytes"]
    assert overlapping["tokens"] == plain["tokens"]
    assert overlapping["bits_per_byte"] != plain["bits_per_byte"]
    assert "gzip -9" not in plain


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--data", "no/such/data"), "data: no/such/data is neither prepared data, nor a .bin/.idx prefix"),
        (("--batch_size", "0"), "batch_size is 0"),
        (("--split", "dev"), "split: expected"),
    ],
)
def test_bad_input_is_one_line_before_torch(launch, trained, tiny_data, arguments, message):
    code, _, errors, imported = launch("evaluate", "--checkpoint", str(trained), "--data", str(tiny_data), *arguments)
    assert code == 2
    assert len(errors.strip().splitlines()) == 1
    assert message in errors
    assert imported == []
