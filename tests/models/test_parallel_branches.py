"""Mixers side by side in one layer: the sum by hand, its gradients, rotations, caches, bounds, initialisation."""

import pytest
import torch
from torch import nn

from kernels.rotary import rotary_tables
from models.config import ModelConfig, branches
from models.decoder import Decoder, initialize
from models.mixers import build_mixer
from models.mixers.base import LayerCache, SequenceInfo
from models.mixers.parallel_branches import ParallelBranches
from models.parameters import parameter_rows, partial_gradients
from tests.helpers import VOCABULARY, draw_tokens, rows, tiny_decoder, tiny_model_config

PATTERNS = (
    "spikingbrain_tied_gla + sliding_window_attention",
    "full_attention + gated_delta_net",
    "retention + full_attention",
    "hgrn + hgrn2",
    "hgrn2 + full_attention + delta_net",
)
WIDTH = 32


def module_and_input(pattern, **options):
    """A layer's mixer in float64 with every parameter off its start, an input, and what the layer is told."""
    # Retention's heads as large as softmax attention's.
    model = tiny_decoder(pattern, retention__num_heads=4, **options).double()
    module, generator = model.layers["1"].mixer, torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    x = torch.randn(11, 2, WIDTH, generator=generator, dtype=torch.float64).requires_grad_()
    cos, sin = (None, None)
    if module.rotary is not None:
        cos, sin = rotary_tables(torch.arange(11).expand(2, 11), *module.rotary)
    return module, x, SequenceInfo(cos, sin, lower_bound=torch.full((WIDTH,), 0.3)), model.model_config


def by_hand(module, pattern, x, info, config):
    """w_1 norm(o_1) + w_2 norm(o_2) + ..., the branches as layers of their own that hold the same weights."""
    total = 0
    for i, name in enumerate(branches(pattern)):
        alone = build_mixer(name, config).double()
        alone.load_state_dict(module.branches[i].state_dict())
        told = info if alone.rotary is not None else SequenceInfo(lower_bound=info.lower_bound)
        o = alone(x, told)
        normed = o / (o.square().mean(-1, keepdim=True) + config.norm_eps).sqrt() * module.merge.norms[i].weight
        total = total + module.merge.weight[i] * normed
    return total


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_output_is_the_weighted_sum_of_normalised_outputs(pattern):
    module, x, info, config = module_and_input(pattern)
    ours, expected = module(x, info), by_hand(module, pattern, x, info, config)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)
    inputs = (x, module.merge.weight, *(norm.weight for norm in module.merge.norms))
    pull = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    theirs = torch.autograd.grad(expected, inputs, pull)
    for mine, other in zip(torch.autograd.grad(ours, inputs, pull), theirs, strict=True):
        assert other.norm() > 0
        torch.testing.assert_close(mine, other, rtol=1e-8, atol=1e-8)


def test_every_parameter_has_a_gradient():
    module, x, info, _ = module_and_input(PATTERNS[0])
    module(x, info).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in module.parameters())


@torch.no_grad()
def test_a_branch_without_positions_stays_so_beside_one_that_rotates():
    """Softmax attention without a rotary embedding, beside retention, which has one."""
    pattern = "retention + full_attention"
    module, x, info, config = module_and_input(pattern, attention__rope_theta=None)
    assert info.cos is not None and module.branches[1].rotary is None
    expected = by_hand(module, pattern, x, info, config)
    torch.testing.assert_close(module(x, info), expected, rtol=1e-9, atol=1e-9)


def test_branches_share_nothing_and_start_as_their_mean():
    model = Decoder(tiny_model_config("hgrn2 + hgrn2 + hgrn2"), VOCABULARY)
    initialize(model, 0)
    module = model.layers["0"].mixer
    assert isinstance(module, ParallelBranches)
    torch.testing.assert_close(module.merge.weight, torch.full((3,), 1 / 3))
    projections = [branch.q_proj.weight for branch in module.branches]
    assert not torch.equal(projections[0], projections[1]) and not torch.equal(projections[1], projections[2])
    assert not any(row.placement.decayed for row in parameter_rows(module.merge).values())


def test_decays_of_branches_are_drawn():
    """By the branch itself, as in a layer of its own."""
    model = Decoder(tiny_model_config("full_attention + gated_delta_net, spikingbrain_gla + hgrn2"), VOCABULARY)
    nn.init.zeros_(model.layers["0"].mixer.branches[1].A_log)
    initialize(model, 0)
    assert model.layers["0"].mixer.branches[1].A_log.all()
    assert model.layers["1"].mixer.branches[0].gk_proj[0].weight.abs().max() > 0.2 * WIDTH**-0.5


@torch.no_grad()
def test_each_branch_has_a_cache_of_its_own():
    model, caches = tiny_decoder("hgrn2 + delta_net"), [LayerCache(), LayerCache()]
    model.hidden_states(*rows(draw_tokens(2, 6)), caches=caches)
    for cache in caches:
        assert not cache.tensors
        for i, mixer in enumerate(("hgrn2", "delta_net")):
            shape = (2, *model.model_config.state_shape(mixer))
            assert tuple(cache.branches[i].tensors["state"].shape) == shape


def test_lower_bounds_reach_a_branch():
    config = tiny_model_config("full_attention + hgrn", num_layers=3)
    assert config.bounded_layers() == [1, 2]
    assert Decoder(config, VOCABULARY).lower_bounds is not None


@pytest.mark.parametrize("sequence", [False, True])
def test_which_gradients_tensor_parallel_ranks_have_a_share_of(sequence):
    """What is behind the branches' regions sees the whole, unless the sequence is cut there."""

    class TwoRanks:
        tensor = object()

    TwoRanks.sequence = sequence
    model = tiny_decoder("spikingbrain_tied_gla + full_attention", attention__qk_norm=True)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    partial = {names[id(parameter)] for parameter in partial_gradients(model, TwoRanks())}
    inside = {"layers.0.mixer.branches.0.g_norm.weight", "layers.0.mixer.branches.1.q_norm.weight"}
    behind = {"layers.0.mixer.merge.weight", "layers.0.mixer.merge.norms.1.weight", "layers.0.mixer_norm.weight"}
    assert inside <= partial
    assert behind & partial == (behind if sequence else set())


def test_sizes_of_all_branches_are_cut():
    config = ModelConfig(mixers=tiny_model_config("hgrn + sliding_window_attention").mixers)
    sizes = config.tensor_parallel_sizes()
    assert {"model.hidden_size", "model.attention.num_heads", "model.attention.num_kv_heads"} <= set(sizes)
