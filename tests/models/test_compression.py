"""Compressed activations: recipes to the last bit, unbiased gradients, noise that no layout changes, fewer bytes."""

import math
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd.graph import saved_tensors_hooks

from kernels.documents import Documents
from kernels.matmul import linear
from kernels.quantization import quantize
from models import compression
from models.compression import Compression, Origin, Rule, Site, TokenRows, _group_within, running, sharded_modules
from models.config import LINEAR_MIXERS, MoEConfig, RouterConfig, SpikingConfig
from models.decoder import Decoder, initialize
from models.parameters import cast_parameters
from models.saved_activations import COMPRESS, EVERYTHING, RECOMPUTE, BlockPolicy, Policy, compressing
from models.spiking import begin_step
from tests.helpers import VOCABULARY, draw_tokens, tiny_model_config
from trainer.cli import from_mapping
from trainer.config import PretrainConfig

ROOT = Path(__file__).resolve().parents[2]
T = 24
EIGHT = Compression(bits=8, group=16, min_bytes=0)
EXPERTS = MoEConfig(num_experts=4, shared_experts=1, expert_hidden_size=32, router=RouterConfig(top_k=2))


class Count:
    """Bytes of the storages that autograd saves, each once; but for those that are known."""

    def __init__(self, known):
        self.sizes, self.alive = {x.untyped_storage()._cdata: 0 for x in known}, []

    @contextmanager
    def counting(self):
        with saved_tensors_hooks(self._pack, lambda x: x):
            yield

    def _pack(self, x):
        self.alive.append(x)
        self.sizes.setdefault(x.untyped_storage()._cdata, x.untyped_storage().nbytes())
        return x

    @property
    def bytes(self):
        return sum(self.sizes.values())


def model_of(pattern, **changes):
    model = Decoder(tiny_model_config(pattern, **changes), VOCABULARY)
    initialize(model, 1)
    return model


def policy_of(compression, **parts):
    return Policy(BlockPolicy(**{"block": COMPRESS} | parts, compression=compression))


def gradients(model, policy, step=0, rows=1, documents=None):
    """The loss, the gradients of all parameters, and the bytes kept."""
    model.keep(policy)
    model.zero_grad()
    tokens = draw_tokens(rows, T)
    positions = torch.arange(T).expand(rows, -1).contiguous()
    count = Count(model.parameters())
    with count.counting():
        hidden = model.hidden_states(tokens, positions, documents, origin=Origin(step))
    hidden.sin().sum().backward()
    return hidden.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None], count.bytes


def equal(ours, theirs):
    return len(ours) == len(theirs) and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


MIXERS = (*LINEAR_MIXERS, "full_attention", "sliding_window_attention")


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("mixer", MIXERS)
def test_recipes_give_what_was_there(mixer, rows):
    """Nothing is rounded at 16 bits: what is made again is what was not stored, to the last bit."""
    model = model_of(mixer, moe=EXPERTS, attention__qk_norm=True)
    hidden, expected, whole = gradients(model, Policy(), rows=rows)
    again, found, kept = gradients(model, policy_of(replace(EIGHT, bits=16)), rows=rows)
    assert torch.equal(hidden, again)
    names = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    for name, ours, theirs in zip(names, found, expected, strict=True):
        # A bias's gradient sums rows in the order of the gradient's strides: its last bits may differ.
        last_bits = 4 * torch.finfo(torch.float32).eps * theirs.abs().max() if name.endswith(".bias") else 0
        assert (ours - theirs).abs().max() <= last_bits, name
    assert kept < 0.85 * whole


@pytest.mark.parametrize("mixer", MIXERS)
def test_gradients_are_close_and_forward_is_exact(mixer):
    model = model_of(mixer, moe=EXPERTS)
    documents = Documents((0, 1, 8, T))
    hidden, expected, whole = gradients(model, Policy(), documents=documents)
    for bits, least in ((8, 0.999), (4, 0.7)):
        again, found, kept = gradients(model, policy_of(replace(EIGHT, bits=bits)), documents=documents)
        assert torch.equal(hidden, again) and kept < whole
        ours, theirs = (torch.cat([x.flatten() for x in grads]) for grads in (found, expected))
        assert least < torch.cosine_similarity(ours, theirs, dim=0) < 1 - 1e-9, bits


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("mixer", MIXERS)
def test_rounding_is_stochastic_wherever_rows_are_tokens(mixer, rows, monkeypatch):
    """Also where an operation puts heads before tokens; rounding to nearest is biased.

    What enters a convolution before each document, [3, D], is of no token of the micro-batch.
    """
    nearest = []

    def spy(x, *, noise=None, **options):
        if noise is None and len(x) > 9:
            nearest.append(x.shape)
        return quantize(x, noise=noise, **options)

    monkeypatch.setattr(compression, "quantize", spy)
    model = model_of(mixer, moe=EXPERTS)
    for documents in (None, Documents((0, 1, 8, T))) if rows == 1 else (None,):
        gradients(model, policy_of(EIGHT), rows=rows, documents=documents)
    assert not nearest


@pytest.mark.parametrize("heads", [1, 3, T])
def test_heads_before_tokens_are_stored_as_after_them(heads):
    """In the same groups and with the same noise."""
    x_BTHK = torch.randn(2, T, heads, 8, generator=torch.Generator().manual_seed(heads))
    site = Site(0, frozenset(), rows=TokenRows(Origin(step=3), 2, T))
    with running(site):
        codec = EIGHT.codec()
        after, before = codec(x_BTHK, "p"), codec(x_BTHK.transpose(1, 2).contiguous(), "p")
    ours, theirs = (kept.restore(*kept.tensors) for kept in (before, after))
    ours, theirs = ours.view(2, heads, T, 8), theirs.view(2, T, heads, 8)
    # As many heads as tokens cannot be told from tokens and heads.
    assert torch.equal(ours.transpose(1, 2), theirs) == (heads != T)
    assert (ours.transpose(1, 2) - x_BTHK).abs().max() < 0.05


def test_steps_and_seeds_draw_anew_and_nothing_else_does():
    model = model_of("gated_delta_net, full_attention", moe=EXPERTS)
    first = gradients(model, policy_of(EIGHT))[1]
    assert equal(gradients(model, policy_of(EIGHT))[1], first)
    assert not equal(gradients(model, policy_of(EIGHT), step=1)[1], first)
    assert not equal(gradients(model, policy_of(replace(EIGHT, seed=1)))[1], first)
    # What no longer compresses leaves nothing behind.
    assert equal(
        gradients(model, Policy())[1], gradients(model_of("gated_delta_net, full_attention", moe=EXPERTS), Policy())[1]
    )


def test_micro_batches_in_flight_do_not_meet():
    """Two forwards before either backward, as in a pipeline, give what one after the other gives."""
    model = model_of("gated_delta_net, full_attention")
    model.keep(policy_of(EIGHT))

    def run(order, first):
        model.zero_grad()
        tokens, positions = draw_tokens(2, T), torch.arange(T)[None]
        losses = {}
        for number in range(2):
            losses[number] = (
                model.hidden_states(tokens[number : number + 1], positions, origin=Origin(first=number * T)).sin().sum()
            )
            if not first:
                losses.pop(number).backward()
        for number in order if first else ():
            losses[number].backward()
        return [p.grad.clone() for p in model.parameters()]

    assert equal(run((0, 1), first=True), run((), first=False))


def test_gradients_of_linear_operators_are_unbiased():
    """Over 1,000 steps the mean gradient lies within its standard error of the exact one, and a wrong one would not."""
    generator = torch.Generator().manual_seed(0)
    shapes = (T, 1, 16), (8, 16)
    x, weight = (torch.randn(shape, generator=generator).requires_grad_() for shape in shapes)
    grad, draws = torch.randn(T, 1, 8, generator=generator), []
    exact = (grad.flatten(0, 1).T @ x.flatten(0, 1)).detach()
    compression = Compression(bits=4, group=16, min_bytes=0)
    for step in range(1000):
        with running(Site(0, frozenset(), rows=TokenRows(Origin(step), 1, T))), compressing(compression.codec()):
            y = linear((1 * x).requires_grad_(), weight)
        draws.append(torch.autograd.grad(y, weight, grad)[0])
    draws = torch.stack(draws)
    error = (draws.mean(0) - exact) / (draws.std(0) / math.sqrt(len(draws)))
    assert error.square().mean().sqrt() < 1.3 and draws.std(0).mean() > 0.1
    assert (draws[0] - exact).abs().mean() > 10 * (draws.mean(0) - exact).abs().mean()


@pytest.mark.parametrize(("count_range", "share"), [((-7, 7), 0.5), ((-31, 31), 1.0)], ids=["4 bits", "8 bits"])
@pytest.mark.parametrize("threshold", ["adaptive", "per_channel"])
def test_spikes_are_stored_as_counts(count_range, share, threshold):
    """Of x̂ = s V the counts and thresholds, exactly: a linear layer's gradient is to the last bit."""
    spiking = SpikingConfig(layers=["*.down_proj"], k=2.0, threshold=threshold, count_range=list(count_range))
    model = model_of("full_attention", spiking=spiking)
    begin_step([model], 1)
    hidden, expected, _ = gradients(model, Policy())
    again, found, kept = gradients(model, policy_of(replace(EIGHT, bits=16)))
    assert torch.equal(hidden, again) and equal(found, expected)
    # Without neurons the product of gate and up is derived: the counts are all there is to it, and each token's V.
    plain = model_of("full_attention")
    without = gradients(plain, policy_of(replace(EIGHT, bits=16)))[2]
    tokens = 4 * T if threshold == "adaptive" else 0
    assert kept - without <= 2 * (48 * T * share + tokens + 48 * 4) and kept > without


def test_what_enters_a_region_is_compressed_unless_it_routes():
    for experts, compressed in ((EXPERTS, False), (MoEConfig(), True)):
        model = model_of("full_attention", moe=experts)
        whole = gradients(model, Policy(BlockPolicy(block=RECOMPUTE)))[2]
        kept = gradients(model, policy_of(EIGHT, block=RECOMPUTE))[2]
        assert (kept < whole) is compressed


def test_rules_by_place():
    model = model_of("full_attention", num_layers=2)
    eight = gradients(model, policy_of(EIGHT))[2]
    four = gradients(model, policy_of(replace(EIGHT, rules=(Rule("layers.*.ffn.*", 4),))))[2]
    one = gradients(model, policy_of(replace(EIGHT, rules=(Rule("layers.1.ffn.*", bits=4),))))[2]
    coarse = gradients(model, policy_of(replace(EIGHT, rules=(Rule("*", group=32),))))[2]
    assert four == eight - 2 * T * 48 and one == eight - T * 48 and coarse < eight
    every = gradients(model, policy_of(replace(EIGHT, rules=(Rule("*", 16),))))[1]
    assert equal(every, gradients(model, Policy())[1])


def test_small_tensors_are_left_alone():
    model = model_of("full_attention")
    assert equal(gradients(model, policy_of(replace(EIGHT, min_bytes=1 << 20)))[1], gradients(model, Policy())[1])


def test_ranks_number_their_tokens_alike():
    """Context-parallel parts, and rows that are the whole's: their numbers, side by side, are the whole's."""
    whole = TokenRows(Origin(first=100), 2, 8)
    parts = [TokenRows(Origin(first=100).part(4, 8, rank), 2, 4) for rank in range(2)]
    by_time = [part.of(torch.Size((4, 2, 3)))[0].view(4, 2) for part in parts]
    assert torch.equal(torch.cat(by_time), whole.of(torch.Size((8, 2, 3)))[0].view(8, 2))
    by_row = [part.of(torch.Size((2, 4, 5)))[0].view(2, 4) for part in parts]
    assert torch.equal(torch.cat(by_row, 1), whole.of(torch.Size((2, 8, 5)))[0].view(2, 8))
    assert whole.of(torch.Size((2, 8, 5)))[0].tolist() == list(range(100, 116))
    one = TokenRows(Origin(first=100, offset=4, length=8), 1, 4)
    assert one.of(torch.Size((4, 1, 7))) == (104, 4) and one.of(torch.Size((1, 4, 2, 7))) == (104, 4)
    assert one.of(torch.Size((3, 9))) is None and one.own.tolist() == [104, 105, 106, 107]


@given(st.integers(1, 64), st.integers(1, 16), st.integers(1, 200))
def test_groups_lie_within_ranks(per_rank, ranks, most):
    channels = per_rank * ranks
    group = _group_within(channels, ranks, most)
    assert group <= most and per_rank % group == 0
    # The same, however many ranks there are.
    assert all(channels // fewer % group == 0 for fewer in range(1, ranks + 1) if ranks % fewer == 0)


def test_what_is_sharded():
    block = model_of("gated_delta_net", moe=EXPERTS).layers["0"]
    sharded = sharded_modules(block)
    assert {"mixer", "mixer.o_norm", "mixer.o_proj", "ffn.shared_experts", "ffn.shared_experts.down_proj"} <= sharded
    assert not sharded & {"", "mixer_norm", "mixer.q_proj", "ffn", "ffn.router", "ffn.experts", "ffn.experts.down_proj"}


@pytest.mark.parametrize(
    ("dtype", "eight", "four"), [(torch.float32, 0.70, 0.78), (torch.bfloat16, 0.50, 0.70)], ids=["fp32", "bf16"]
)
@pytest.mark.parametrize("name", ["laptop", "laptop-dense"])
def test_bytes_of_the_laptop_models(name, dtype, eight, four):
    """The shares of what the blocks keep that 8 and 4 bits save, at least."""
    config = yaml.safe_load((ROOT / f"configs/models/{name}.yaml").read_text())
    model_config = from_mapping(PretrainConfig, {"model": config}).model
    model = Decoder(model_config, 64)
    initialize(model, 0)
    cast_parameters(model, dtype)
    shards = math.gcd(*model_config.tensor_parallel_sizes().values())
    kept = {}
    for bits in (0, 8, 4):
        compression = Compression(bits=bits, shards=shards) if bits else None
        model.keep(Policy(EVERYTHING if compression is None else BlockPolicy(block=COMPRESS, compression=compression)))
        count = Count(model.parameters())
        with count.counting():
            model.hidden_states(draw_tokens(1, 128), torch.arange(128)[None])
        kept[bits] = count.bytes
    assert kept[8] <= (1 - eight) * kept[0]
    assert kept[4] <= (1 - four) * kept[0]


def test_what_is_not_finite_is_named_if_asked():
    model = model_of("full_attention")
    with torch.no_grad():
        model.embedding.weight[:] = torch.inf
    model.keep(policy_of(EIGHT))
    model.hidden_states(draw_tokens(1, T), torch.arange(T)[None])
    model.keep(policy_of(replace(EIGHT, check=True)))
    with pytest.raises(ValueError, match=r"layers\.0\.mixer_norm\.0 has an infinity or a NaN"):
        model.hidden_states(draw_tokens(1, T), torch.arange(T)[None])


def test_experts_without_tokens_and_a_row_of_one_token():
    """One token goes to two of four experts: the others have no rows to store."""
    model = model_of("full_attention", moe=EXPERTS)
    tokens, positions = draw_tokens(1, 1), torch.zeros(1, 1, dtype=torch.int64)

    def gradient(policy):
        model.keep(policy)
        model.zero_grad()
        model.hidden_states(tokens, positions).sin().sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    ours, exact = gradient(policy_of(EIGHT)), gradient(Policy())
    assert torch.cosine_similarity(ours, exact, dim=0) > 0.999 and not torch.equal(ours, exact)
