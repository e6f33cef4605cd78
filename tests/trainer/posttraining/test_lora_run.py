"""Runs that train low-rank adapters: resumed to the bit, sampled from, and merged by whatever reads them."""

import json
from dataclasses import asdict, replace

import pytest
import torch

from models.config import LoraConfig
from models.decoder import Decoder, shapes
from models.lora import merged
from models.parameters import declared
from tests.helpers import tiny_model_config
from tests.trainer.conftest import metrics
from tests.trainer.posttraining.conftest import run, steps
from trainer.config import CheckpointConfig, PretrainConfig
from trainer.engines.pieces import MODEL, Piece, Reader, Shard
from trainer.stored import weights
from trainer.stored.export import export
from trainer.stored.inference import load_model, open_checkpoint
from trainer.stored.opening import open_weights

LORA = ("--model.lora.rank=3", "--model.lora.alpha=6", "--optim.lr=0.02")


@pytest.fixture(scope="module")
def trained(model, rows, tmp_path_factory):
    """A run of fine-tuning, and what it said."""
    run_dir = tmp_path_factory.mktemp("trained")
    return run_dir, run(model, rows, run_dir, "sft", *LORA)


def adapted(run_dir):
    """The model of a run's newest checkpoint as it trains: with its adapters."""
    stored = open_checkpoint(run_dir)
    decoder = Decoder(replace(stored.model, lora=stored.lora), stored.vocab_size)
    pieces = {MODEL + name: Piece.of(parameter.data) for name, parameter in decoder.named_parameters()}
    Reader(stored.path / "state").read(pieces)
    return decoder.eval()


def logits(decoder):
    tokens = torch.randint(0, 400, (2, 24), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return decoder(tokens, torch.arange(24).expand(2, 24))


def distance(ours, theirs):
    return float((ours - theirs).norm() / theirs.norm())


def test_only_adapters_are_trained(model, trained):
    run_dir, output = trained
    decoder, start = adapted(run_dir), open_weights(model)
    names = [name for name, _ in decoder.named_parameters()]
    adapters = [name for name in names if ".lora." in name]
    count = sum(parameter.numel() for name, parameter in decoder.named_parameters() if ".lora." in name)
    assert f"training {count / 1e6:.2f} M of them, *.lora.*; the others are frozen" in output
    stored = Reader(open_checkpoint(run_dir).path / "state").stored
    assert {name for name in names if f"optimizer.exp_avg.{name}" in stored} == set(adapters)
    for name, parameter in decoder.named_parameters():
        if name in adapters:
            assert parameter.any(), name
        else:
            before = torch.empty_like(parameter.data)
            start.read({name: before})
            assert torch.equal(parameter, before), name
    lines = [line for line in metrics(run_dir) if "split" in line]
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.1


@pytest.mark.parametrize("stage", ["sft", "rl"])
def test_a_resumed_run_is_the_uninterrupted_one(model, rows, tmp_path, stage):
    run(model, rows, tmp_path / "whole", stage, *LORA)
    run(model, rows, tmp_path / "cut", stage, *LORA, "--train.steps=3")
    run(model, rows, tmp_path / "cut", stage, *LORA)
    assert steps(tmp_path / "cut") == steps(tmp_path / "whole")
    if stage == "rl":
        lines = [line for line in metrics(tmp_path / "whole") if "grad_norm" in line]
        # The sampler draws from the adapted weights: after updates of them, too, it computes what training does.
        assert all(line["policy/sampler_k3"] < 1e-5 for line in lines[::2])
        assert lines[1]["policy/k3"] > 1e-4, "the policy has moved"


def test_readers_merge_adapters(trained, tmp_path):
    run_dir, _ = trained
    expected = logits(adapted(run_dir))
    base = logits(load_model(open_weights_of(run_dir), torch.device("cpu")).model)
    assert distance(base, expected) > 1e-3, "the adapters do something"
    loaded = load_model(run_dir, torch.device("cpu")).model
    assert loaded.model_config.lora == LoraConfig() and distance(logits(loaded), expected) < 1e-5
    export(run_dir, tmp_path / "merged", None, 1e9, lambda line: None)
    found = load_model(tmp_path / "merged", torch.device("cpu")).model
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found.parameters(), loaded.parameters(), strict=True))


def open_weights_of(run_dir):
    """The weights that a run began from."""
    return open_checkpoint(run_dir).settings["checkpoint"]["init"]


def test_shards_are_merged_as_the_whole_is(trained):
    """By outputs and by inputs, as ranks read them."""
    stored = open_checkpoint(trained[0])
    decoder = shapes(stored.model, stored.vocab_size)
    checked = set()
    for name, row in declared(decoder).items():
        if row.axis is None or not (".q_proj." in name or ".down_proj." in name):
            continue
        whole = torch.empty(row.tensor.shape)
        stored.read({name: whole})
        for rank in range(2):
            part = torch.empty_like(whole.chunk(2, row.axis)[rank]).contiguous()
            stored._read({name: (part, Shard.of(part, row.axis, rank, 2))})
            torch.testing.assert_close(part, whole.chunk(2, row.axis)[rank])
        checked.add(row.axis)
    assert checked == {0, 1}


def test_bfloat16_is_merged_in_float32(model, rows, tmp_path):
    """With the adapters' float32 values, where the export is in float32."""
    run(model, rows, tmp_path / "run", "sft", *LORA, "--train.precision=bf16", "--train.steps=3")
    export(tmp_path / "run", tmp_path / "merged", "fp32", 1e9, lambda line: None)
    reader = Reader(open_checkpoint(tmp_path / "run").path / "state")
    layer = "layers.1.mixer.q_proj"
    names = {"weight": f"model.{layer}.weight"} | {key: f"optimizer.main.{layer}.lora.{key}.weight" for key in "ab"}
    values = {key: torch.empty(reader.stored[name].size) for key, name in names.items()}
    reader.read({name: Piece.of(values[key]) for key, name in names.items()})
    found = torch.empty_like(values["weight"])
    open_weights(tmp_path / "merged").read({f"{layer}.weight": found})
    torch.testing.assert_close(found, merged(**values, scale=2.0))


@pytest.mark.parametrize("layout", ["spiketrain", "hf"])
def test_adapters_are_drawn_beside_weights_that_lack_them(tmp_path, layout):
    config = tiny_model_config("full_attention", init_std=0.1)
    plain = Decoder(config, 64)
    weights.start(plain, None, seed=1)
    values = dict(plain.named_parameters())

    def read(tensors):
        for name, tensor in tensors.items():
            tensor.copy_(values[name].detach())

    folder = tmp_path / "weights"
    weights.write(folder, plain, read, tokenizer=None, max_file_bytes=1e9, report=print)
    if layout == "hf":
        export(folder, tmp_path / "hub", None, 1e9, lambda line: None, hugging_face=True)
        folder = tmp_path / "hub"
    own = replace(config, lora=LoraConfig(rank=2))
    run = PretrainConfig(model=replace(own, vocab_size=64), checkpoint=CheckpointConfig(init=str(folder)))
    run.data.path = "stdlib"
    weights.check_tensors(run)
    started, drawn = Decoder(own, 64), Decoder(own, 64)
    weights.start(started, str(folder), seed=5)
    weights.start(drawn, None, seed=5)
    for name, parameter in started.named_parameters():
        assert torch.equal(parameter, (dict(drawn.named_parameters()) if ".lora." in name else values)[name]), name
    tokens, positions = torch.arange(8)[None], torch.arange(8)[None]
    assert torch.equal(started(tokens, positions), plain(tokens, positions))


def test_weights_leave_the_settings_of_adapters_alone(model, rows, tmp_path):
    (tmp_path / "lora.yaml").write_text(json.dumps({"model": {"lora": {"rank": 5}}}))
    expanded = weights.expand_init(["--config", str(tmp_path / "lora.yaml"), "--init", str(model)])
    given = json.loads(next(word for word in expanded if word.startswith("--model=")).removeprefix("--model="))
    assert "lora" not in given and given.keys() | {"lora"} == asdict(open_weights(model).model).keys()
    run(model, rows, tmp_path / "run", "sft", "--config", tmp_path / "lora.yaml", "--train.steps=1")
    assert open_checkpoint(tmp_path / "run").lora.rank == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--model.lora.rank=2", '--model.lora.targets=["*.q_prj"]'), "'*.q_prj' matches no linear layer; the closest"),
        (('--model.lora.targets=["*"]',), "with model.lora.rank=0 would add no adapters"),
        (("--model.lora.rank=-2",), "model.lora.rank is -2"),
        (("--model.lora.rank=2", '--train.trainable=["*norm*"]'), "train.trainable trains no adapter of model.lora"),
    ],
)
def test_what_is_refused(model, rows, tmp_path, options, message):
    output = run(model, rows, tmp_path / "run", "sft", *options, imported="megatron", code=2)
    assert message in output.splitlines()[-1] and not (tmp_path / "run/checkpoints").exists()


LAYOUTS = {
    "data": ("megatron", ()),
    "tensor, sequence": ("megatron", ("--parallel.tensor=2", "--parallel.sequence=true")),
    "ZeRO 2": ("deepspeed", ("--engine.name=deepspeed", "--engine.zero_stage=2")),
}


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_take_the_same_steps(model, rows, tmp_path, layout):
    engine, options = LAYOUTS[layout]
    run(model, rows, tmp_path / "one", "rl", *LORA, "--train.steps=4")
    run(model, rows, tmp_path / "two", "rl", *LORA, "--train.steps=4", *options, ranks=2, imported=engine)
    for ours, theirs in zip(steps(tmp_path / "two"), steps(tmp_path / "one"), strict=True):
        assert ours[1] == pytest.approx(theirs[1], abs=2e-5) and ours[2] == pytest.approx(theirs[2], rel=1e-3)
