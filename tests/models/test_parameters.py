"""The table of declared parameters: nothing is left out, and what reads it agrees whatever the layout."""

import re
from typing import ClassVar

import pytest
import torch
from torch import nn

from models import parameters
from models.config import MIXERS, MoEConfig, RouterConfig
from models.decoder import Decoder, build, initialize
from models.parameters import (
    Groups,
    Module,
    Placement,
    check_declarations,
    declared,
    draw,
    normal,
    parameter_rows,
    zeros,
)
from tests.helpers import VOCABULARY, tiny_model_config

MOE = MoEConfig(num_experts=4, shared_experts=1, router=RouterConfig(bias_update_rate=0.1))
EVERYTHING = tiny_model_config(", ".join(MIXERS), num_layers=len(MIXERS), moe=MOE)


class _Rank:
    """One of several ranks, as far as sharding asks."""

    def __init__(self, rank, ranks):
        self.rank, self.ranks = rank, ranks


@pytest.fixture
def as_rank(monkeypatch):
    monkeypatch.setattr("torch.distributed.get_rank", lambda group: group.rank)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda group: group.ranks)
    return lambda rank, ranks: Groups(tensor=_Rank(rank, ranks), sequence=True, expert=_Rank(rank, ranks))


def test_every_tensor_is_declared_and_in_the_order_of_the_model():
    model = Decoder(EVERYTHING, VOCABULARY)
    assert list(parameter_rows(model)) == [name for name, _ in model.named_parameters()]
    assert declared(model).keys() == model.state_dict().keys()
    assert all(row.tensor is model.get_parameter(name) for name, row in parameter_rows(model).items())


class _Forgetful(Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2))


class _Misspelt(_Forgetful):
    placements: ClassVar = {"weight": Placement(zeros), "weihgt": Placement(zeros)}


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (_Forgetful, "0.weight is not declared: give _Forgetful.placements a Placement for weight"),
        (_Misspelt, "_Misspelt.placements names weihgt, which 0 does not have"),
        (lambda: nn.Linear(2, 2), "0.weight is not declared: give Linear.placements"),
        (lambda: nn.BatchNorm1d(2, affine=False), "0.running_mean is not declared"),
    ],
)
def test_what_is_not_declared_is_refused(module, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        check_declarations(nn.Sequential(module()))


def test_a_model_with_an_undeclared_parameter_cannot_be_built(monkeypatch):
    monkeypatch.setattr("models.layers.RMSNorm.placements", {})
    with pytest.raises(TypeError, match=re.escape("layers.0.mixer_norm.weight is not declared")):
        Decoder(tiny_model_config(), VOCABULARY)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("block_elements", [1 << 24, 200])
def test_shards_that_are_drawn_are_those_of_the_whole(as_rank, monkeypatch, ranks, block_elements):
    monkeypatch.setattr(parameters, "_BLOCK_ELEMENTS", block_elements)
    whole = Decoder(EVERYTHING, VOCABULARY)
    initialize(whole, 7)
    shards = []
    for rank in range(ranks):
        shards.append(build(EVERYTHING, VOCABULARY, groups=as_rank(rank, ranks) if ranks > 1 else Groups()))
        initialize(shards[-1], 7)
    for name, row in declared(whole).items():
        parts = [declared(shard)[name].tensor for shard in shards]
        joined = torch.cat(list(parts), row.axis) if row.axis is not None and ranks > 1 else parts[0]
        assert torch.equal(joined, row.tensor), name


def test_a_large_parameter_is_drawn_block_by_block(monkeypatch):
    """So that no more memory than one block is needed beside the shard; and no two blocks are the same."""
    sizes = []

    def drawn(block, drawing):
        sizes.append(block.numel())
        normal(block, drawing)

    class _Rows(Module):
        placements: ClassVar = {"weight": Placement(drawn)}

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.empty(1024, 64))

    module = _Rows()
    monkeypatch.setattr(parameters, "_BLOCK_ELEMENTS", 4096)
    draw(module, EVERYTHING, 1)
    assert sizes == [4096] * 16
    assert len({float(block.sum()) for block in module.weight.detach().split(64)}) == 16


def test_initialisations_are_told_the_whole_shape(as_rank):
    seen = {}

    class _Wide(Module):
        placements: ClassVar = {
            "weight": Placement(lambda block, drawing: seen.update(shape=drawing.shape), shard_axis=1)
        }

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.empty(3, 8))

    draw(_Wide(), EVERYTHING, 0, as_rank(1, 4))
    assert seen == {"shape": torch.Size([3, 32])}


def test_memory_is_of_the_shard_and_in_the_dtype_of_training(as_rank):
    model = build(EVERYTHING, VOCABULARY, groups=as_rank(0, 2), dtype=torch.bfloat16)
    for name, row in parameter_rows(model).items():
        assert row.tensor.dtype == (torch.float32 if row.placement.float32 else torch.bfloat16), name
    assert parameter_rows(model)["embedding.weight"].tensor.shape[0] == VOCABULARY // 2


def test_frozen_parameters_are_those_that_match_no_pattern():
    model = Decoder(EVERYTHING, VOCABULARY)
    parameters.set_trainable(model, ["layers.0.*", "*.router.weight"])
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    everything = {name for name, _ in model.named_parameters()}
    assert trained == {name for name in everything if name.startswith("layers.0.") or name.endswith(".router.weight")}
    parameters.set_trainable(model, ["*"])
    assert all(parameter.requires_grad for parameter in model.parameters())
