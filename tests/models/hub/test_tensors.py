"""Blocks of stored tensors: every part of every parameter, from any architecture, and runs that start from them."""

from dataclasses import asdict, replace

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("transformers")

from models.decoder import shapes
from models.hub.tensors import Copy, everything, overlap, stored_shapes
from models.parameters import declared
from tests.models.hub.test_fla import config_of, stored_model
from tests.models.hub.test_llama_family import loaded, shape, theirs_of
from tests.trainer.conftest import in_process_config
from trainer import pretrain
from trainer.config import CheckpointConfig
from trainer.stored import tensor_files
from trainer.stored.inference import load_model
from trainer.stored.on_disk import Part, kept_tensors
from trainer.stored.opening import open_weights
from trainer.stored.weights import arguments_from

FLA = ("gla", "hgrn2", "gated_deltanet", "kda", "gla_swa")


def write_hub(folder, kind, **options):
    if kind in FLA:
        stored_model(config_of(kind), folder)
    else:
        theirs_of(kind).save_pretrained(folder, max_shard_size="20KB", **options)


@pytest.mark.parametrize(
    ("kind", "options"),
    [*((kind, {}) for kind in ("qwen3", "mixtral", "qwen3_moe", *FLA)), ("mixtral", {"save_original_format": False})],
)
def test_ranks_read_their_shards(tmp_path, kind, options):
    """Along the axis that tensor- or expert-parallel ranks share, and along the other one."""
    write_hub(tmp_path, kind, **options)
    opened = open_weights(tmp_path)
    model = shapes(opened.model, opened.vocab_size)
    opened.require(model)
    whole = {name: torch.empty(tensor.shape) for name, tensor in kept_tensors(model).items()}
    opened.read(whole)
    for name, row in declared(model).items():
        for axis in {0, row.axis or 0, row.tensor.dim() - 1}:
            size, full = row.tensor.shape[axis], tuple(row.tensor.shape)
            bounds = [0, size // 3, size // 2, size]
            for first, last in zip(bounds, bounds[1:], strict=False):
                index = (*[slice(None)] * axis, slice(first, last))
                into = torch.full(whole[name][index].shape, torch.nan)
                opened.read({name: into}, {name: Part(full, index)})
                assert torch.equal(into, whole[name][index]), (name, axis, first, last)


def test_a_shard_reads_no_other_bytes(tmp_path, monkeypatch):
    theirs_of("mixtral").save_pretrained(tmp_path)
    opened, read = open_weights(tmp_path), []
    plain = tensor_files.StoredTensor.read
    monkeypatch.setattr(
        tensor_files.StoredTensor, "read", lambda self, index=(): read.append((self.start, index)) or plain(self, index)
    )
    name = "layers.1.ffn.experts.down_proj.weight"
    full = (4, 32, 48)
    opened.read({name: torch.empty(2, 32, 48)}, {name: Part(full, (slice(2, 4),))})
    own = [opened.tensors[f"model.layers.1.block_sparse_moe.experts.{e}.w2.weight"].start for e in (2, 3)]
    assert [start for start, _ in read] == own


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.data())
def test_parts_put_together_are_the_whole(data):
    """A parameter [3, 4, 5] in three stored tensors: an interleaved one with an extra dimension, and two plain ones."""
    copies = [
        Copy((0, slice(0, 4), slice(0, 5)), "a", (slice(2, 6), 1, slice(1, 6))),
        Copy((slice(1, 3), slice(0, 2), slice(0, 5)), "b", everything((2, 2, 5))),
        Copy((slice(1, 3), slice(2, 4), slice(0, 5)), "c", everything((2, 2, 5))),
    ]
    stored = {name: torch.rand(size) for name, size in stored_shapes(copies).items()}
    assert {name: tuple(tensor.shape) for name, tensor in stored.items()}["a"] == (6, 2, 6)
    whole = torch.empty(3, 4, 5)
    for copy in copies:
        whole[copy.index] = stored[copy.stored][copy.stored_index]
    cuts = [sorted(data.draw(st.lists(st.integers(0, size), min_size=2, max_size=2))) for size in (3, 4, 5)]
    part = tuple(slice(low, high) for low, high in cuts)
    into = torch.full(whole[part].shape, torch.nan)
    for copy in copies:
        if (blocks := overlap(copy, part)) is not None:
            into[blocks[0]] = stored[copy.stored][blocks[1]]
    assert torch.equal(into, whole[part])


@pytest.mark.parametrize("kind", ["qwen3_moe", "llama"])
def test_a_run_starts_from_a_hugging_face_directory(tiny_data, tmp_path, kind):
    model = shape(kind, norm_eps=1e-6)
    config = replace(in_process_config(tiny_data, tmp_path / "first", steps=1), model=model)
    assert pretrain.run(config, yaml.safe_dump(asdict(config))) == 0
    from trainer.stored.export import export

    export(tmp_path / "first", tmp_path / "hub", None, 20_000, print, hugging_face=True)
    (option, *rest) = arguments_from(tmp_path / "hub")
    assert option.startswith("--model=") and rest[-1] == f"--checkpoint.init={tmp_path / 'hub'}"
    init = CheckpointConfig(init=str(tmp_path / "hub"), every=1)
    again = in_process_config(tiny_data, tmp_path / "again", steps=1)
    again = replace(again, model=replace(open_weights(tmp_path / "hub").model), checkpoint=init)
    assert pretrain.run(again, yaml.safe_dump(asdict(again))) == 0
    started, own = loaded(tmp_path / "hub"), load_model(tmp_path / "first", torch.device("cpu")).model
    mine = dict(own.named_parameters())
    assert all(torch.equal(tensor, mine[name]) for name, tensor in started.named_parameters())
    trained = dict(load_model(tmp_path / "again", torch.device("cpu")).model.named_parameters())
    difference = max(float((trained[name] - tensor).abs().max()) for name, tensor in mine.items())
    assert 0 < difference < 0.1, "a step away from what it started with"
