"""Bits per byte of a checkpoint."""

import gzip
import json
import shutil
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import matplotlib.image
import numpy as np
import pytest

from models.config import SpikingConfig
from tests.trainer.conftest import metrics
from trainer.cli import make_parser, parse
from trainer.data.indexed import TokenArray
from trainer.data.layout import tokenizer_sha256
from trainer.data.tokenizer import learn_sentencepiece
from trainer.errors import ConfigError
from trainer.evaluation.config import EvaluateConfig
from trainer.evaluation.data import open_stream
from trainer.spiking_evaluation import choose


def evaluate(launch, tmp_path, *arguments, forked=True):
    code, _, errors, imported = launch("evaluate", *arguments, "--json", str(tmp_path / "out.json"), forked=forked)
    assert code == 0, errors
    return json.loads((tmp_path / "out.json").read_text()), imported


def test_equals_the_run_s_own_validation(launch, trained, tiny_data, tmp_path):
    result, imported = evaluate(launch, tmp_path, "--checkpoint", str(trained), "--data", str(tiny_data), forked=False)
    last = [line for line in metrics(trained) if line.get("split") == "validation"][-1]
    assert result["bits_per_byte"] == pytest.approx(last["bits_per_byte"], rel=1e-6)
    assert result["loss"] == pytest.approx(last["loss"], rel=1e-6)
    assert imported == ["torch"], "reading the files needs no megatron"


def test_text_files_and_their_indexed_dataset_agree(launch, trained, tiny_data, tmp_path):
    text = f"{sysconfig.get_paths()['stdlib']}/json/[st]*.py"
    from_text, _ = evaluate(launch, tmp_path, "--checkpoint", str(trained), "--data", text)
    indexed, _ = evaluate(launch, tmp_path, "--checkpoint", str(trained), "--data", str(tiny_data))
    assert from_text["bytes"] == indexed["bytes"]
    assert from_text["bits_per_byte"] == pytest.approx(indexed["bits_per_byte"], rel=1e-6)
    sources = b"".join(path.read_bytes() for path in sorted(Path(text).parent.glob("[st]*.py")))
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


def test_the_positions_in_the_context_share_out_the_loss(launch, trained, tiny_data, tmp_path):
    found, _ = evaluate(
        launch, tmp_path, "--checkpoint", str(trained), "--data", str(tiny_data), "--by_position", "true"
    )
    rows = found["by_position"]
    assert [(row["first"], row["last"]) for row in rows] == [
        (0, 0),
        (1, 1),
        (2, 3),
        (4, 7),
        (8, 15),
        (16, 31),
        (32, 63),
    ]
    assert rows[0]["tokens"] == 2, "the validation set has two files"
    assert sum(row["tokens"] for row in rows) == found["tokens"]
    assert sum(row["bytes"] for row in rows) == found["bytes"]
    assert sum(row["loss"] * row["tokens"] for row in rows) == pytest.approx(found["loss"] * found["tokens"])
    nats = sum(row["bits_per_byte"] * row["bytes"] for row in rows)
    assert nats == pytest.approx(found["bits_per_byte"] * found["bytes"])


def test_every_byte_of_a_file_counts(launch, trained, tmp_path):
    content = b"\xef\xbb\xbfone\r\ntwo\rthree\x00\xe2\x96\x81\n"
    (tmp_path / "text[1].txt").write_bytes(content)
    result, _ = evaluate(launch, tmp_path, "--checkpoint", str(trained), "--data", "text[1].txt")
    assert result["bytes"] == len(content)
    assert result["gzip -9"] == pytest.approx(8 * len(gzip.compress(content, 9)) / len(content))


def another_tokenizer(tiny_data, folder):
    """A copy of the data that says another tokenizer made it, and that tokenizer."""
    shutil.copytree(tiny_data, folder)
    (folder / "tokenizer.model").write_bytes(learn_sentencepiece([Path(json.__file__).read_text()], "bpe", 512).model)
    info = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps(info | {"tokenizer_sha256": tokenizer_sha256(folder)}))


def test_data_of_another_tokenizer_are_refused_and_an_override_is_said(launch, trained, tiny_data, tmp_path):
    another_tokenizer(tiny_data, tmp_path / "other")
    code, out, errors, _ = launch("evaluate", "--checkpoint", str(trained), "--data", "other", forked=True)
    assert (code, out) == (2, "") and f"was made with another tokenizer than {trained}" in errors
    arguments = ("--checkpoint", str(trained), "--data", str(tiny_data), "--tokenizer", str(tiny_data))
    code, _, errors, _ = launch("evaluate", *arguments, forked=True)
    assert code == 0 and f"tokenizer: {tiny_data}, in place of the checkpoint's\n" in errors
    code, _, errors, _ = launch("evaluate", *arguments[:-1], str(tmp_path / "other"), forked=True)
    assert code == 2 and "in place of the checkpoint's, which is another" in errors


def test_figures_go_to_a_file_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("text")
    arguments = (f"--checkpoint={tmp_path}", f"--data={tmp_path / 'a.txt'}", "--json=~/out.json")
    config, _ = parse(EvaluateConfig, make_parser(EvaluateConfig, ""), arguments)
    assert config.json == str(tmp_path / "out.json")


@pytest.mark.parametrize("token", [-1, 4])
def test_tokens_that_the_model_does_not_have_are_refused(token):
    known = SimpleNamespace(vocab_size=4, eod_id=0)
    settings = {"train": {"seq_len": 4}, "data": {"document_mask": True}}
    loaded = SimpleNamespace(require_tokenizer=lambda: known, model=known, settings=settings)
    data = TokenArray.from_documents([[1, token, 2, 0]], "data")
    config = SimpleNamespace(data=data, seq_len=None, batch_size=1, split="test", stride=None)
    with pytest.raises(ConfigError, match=f"has the token {token}, and the tokenizer and the model know 0 to 3"):
        open_stream(config, loaded, [])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--data", "no/such/data"), "data: no/such/data is neither prepared data, nor a .bin/.idx prefix"),
        (("--data", "latin.txt"), "data: latin.txt is not UTF-8 (byte 0xE9 at offset 3); convert it, as with `iconv"),
        (("--data", "*.empty"), "data: *.empty holds no text; name files that are not empty"),
        (("--json", "no/such/place.json"), "json: the directory of no/such/place.json does not exist"),
        (("--batch_size", "0"), "batch_size is 0"),
        (("--split", "dev"), "split: expected"),
    ],
)
def test_bad_input_is_one_line_before_torch(launch, trained, tiny_data, tmp_path, arguments, message):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "a.empty").touch()
    code, _, errors, imported = launch("evaluate", "--checkpoint", str(trained), "--data", str(tiny_data), *arguments)
    assert code == 2
    assert len(errors.strip().splitlines()) == 1
    assert message in errors
    assert imported == []


def test_spikes_against_the_same_weights_without(launch, trained, tiny_data, tmp_path):
    common = ("--checkpoint", str(trained), "--data", str(tiny_data), "--compare_compressors", "false")
    plain, _ = evaluate(launch, tmp_path, *common)
    assert "spiking" not in plain
    found, _ = evaluate(launch, tmp_path, *common, "--spiking", "true", "--raster", str(tmp_path / "spikes.png"))
    spiking = found["spiking"]
    assert spiking["float_loss"] == pytest.approx(plain["loss"], rel=1e-9)
    assert spiking["float_bits_per_byte"] == pytest.approx(plain["bits_per_byte"], rel=1e-9)
    assert found["loss"] != plain["loss"]
    assert spiking["loss_increase"] == pytest.approx(found["loss"] / plain["loss"] - 1)
    assert (spiking["neurons"]["layers"], spiking["neurons"]["k"]) == (["all"], 3.0)
    total, layers = spiking["total"], spiking["layers"]
    assert list(layers) == [str(layer) for layer in range(len(layers))] and len(layers) > 1
    assert 0.4 < total["sparsity"] < 0.8 and total["sparsity_all_steps"] > total["sparsity"]
    for name in ("picojoules_per_token", "picojoules_per_token_fp16", "operations_per_token"):
        assert total[name] == pytest.approx(sum(layer[name] for layer in layers.values()))
    assert total["energy_saved"] == pytest.approx(
        1 - total["picojoules_per_token"] / total["picojoules_per_token_fp16"]
    )
    assert sum(total["histogram"]) == pytest.approx(sum(sum(one["histogram"]) for one in spiking["inputs"].values()))
    pixels = matplotlib.image.imread(tmp_path / "spikes.png")
    assert min(pixels.shape[:2]) > 300 and len(np.unique(pixels.reshape(-1, pixels.shape[2]).round(2), axis=0)) > 50
    finer, _ = evaluate(launch, tmp_path, *common, "--spiking", "true", "--neurons.k", "64")
    assert finer["spiking"]["total"]["sparsity"] < total["sparsity"]
    assert abs(finer["spiking"]["loss_increase"]) < abs(spiking["loss_increase"])


def test_neurons_are_the_checkpoint_s_unless_others_are_asked_for():
    own = SpikingConfig(layers=["released"], k=2.0, start_step=10, threshold="running")
    assert choose(own, 12, SpikingConfig()) is own
    with pytest.raises(ConfigError, match="ends at step 9, but its spikes start at step 10"):
        choose(own, 9, SpikingConfig())
    other = choose(own, 9, SpikingConfig(k=4.0))
    assert (other.layers, other.k, other.start_step, other.threshold) == (["released"], 4.0, 0, "adaptive")
    assert choose(SpikingConfig(), 9, SpikingConfig()) == SpikingConfig(layers=["all"])
    with pytest.raises(ConfigError, match="threshold=learned"):
        choose(SpikingConfig(), 9, SpikingConfig(threshold="learned"))


def test_a_raster_needs_spikes(trained):
    for options, message in (
        ({"raster": "spikes.png"}, "add --spiking true"),
        ({"neurons": SpikingConfig(k=2.0)}, "add --spiking true"),
        ({"spiking": True, "raster": "spikes.txt"}, "must end in"),
    ):
        with pytest.raises(ConfigError, match=message):
            EvaluateConfig(checkpoint=str(trained), **options)
