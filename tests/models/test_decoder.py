"""The decoder with every mixer and a hybrid of all: isolation, caches, initialisation, loss, FLOP count."""

import functools
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from models.config import LINEAR_MIXERS, MIXERS
from models.decoder import Decoder, flops_per_token, initialize
from models.layers import RMSNorm, ShortConvolution
from models.mixers.base import LayerCache
from models.parallel import RowLinear
from models.parameters import cast_parameters, parameter_rows
from tests.helpers import VOCABULARY, draw_tokens, examples, greedy, pack, rows, tiny_decoder, tiny_model_config

HYBRID = ", ".join(MIXERS)
# Branches that are both linear, that both rotate, and of which one does.
BRANCHES = "hgrn2 + delta_net, full_attention + sliding_window_attention, spikingbrain_tied_gla + full_attention"
LAYOUTS = {**{name: (name, 2) for name in MIXERS}, "hybrid": (HYBRID, len(MIXERS)), "branches": (BRANCHES, 3)}
# Longer and shorter than a chunk of linear attention, a window and a convolution.
LENGTHS = (70, 1, 3, 130, 20)


@functools.cache
def decoder_of(layout):
    """The same for all tests, which leave it as it is."""
    pattern, layers = LAYOUTS[layout]
    return tiny_decoder(pattern, num_layers=layers).eval()


@pytest.fixture(params=LAYOUTS)
def model(request):
    return decoder_of(request.param)


def documents(seed=0):
    return [draw_tokens(length, seed=seed + i) for i, length in enumerate(LENGTHS)]


def close(ours, expected):
    return (ours - expected).norm() <= 1e-5 * expected.norm()


# Isolation


@pytest.mark.parametrize("changed", range(len(LENGTHS)))
@torch.no_grad()
def test_a_packed_document_is_alone(model, changed):
    originals = documents()
    before = model(*pack(originals))[0].split(LENGTHS)
    others = list(originals)
    others[changed] = (others[changed] + 1) % VOCABULARY
    after = model(*pack(others))[0].split(LENGTHS)
    for i, (old, new) in enumerate(zip(before, after, strict=True)):
        assert torch.equal(old, new) == (i != changed)


@torch.no_grad()
def test_packed_documents_are_as_run_alone(model):
    packed = model(*pack(documents()))[0].split(LENGTHS)
    for ours, document in zip(packed, documents(), strict=True):
        assert close(ours, model(*rows(document[None]))[0])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("chosen", [0, 2])
def test_gradients_of_a_packed_document_are_as_run_alone(layout, chosen):
    """The loss of one of several documents gives every parameter the gradient that the document gives on its own."""
    pattern, layers = LAYOUTS[layout]
    model, parts = tiny_decoder(pattern, num_layers=layers, tie_embeddings=False), documents()[:4]
    labels = [draw_tokens(len(part), seed=7) for part in parts]
    mask = torch.cat([torch.full((len(part),), float(i == chosen)) for i, part in enumerate(parts)])[None]
    packed, _ = model(*pack(parts), torch.cat(labels)[None], mask)
    alone, _ = model(*rows(parts[chosen][None]), labels=labels[chosen][None])
    assert close(packed.detach(), alone.detach())
    names, parameters = zip(*model.named_parameters(), strict=True)
    for name, ours, expected in zip(
        names, torch.autograd.grad(packed, parameters), torch.autograd.grad(alone, parameters), strict=True
    ):
        assert (ours - expected).norm() <= 1e-4 * expected.norm() + 1e-7, name


@torch.no_grad()
def test_rows_of_a_batch_are_alone(model):
    tokens = draw_tokens(3, 90)
    batch = model(*rows(tokens))
    for i in range(3):
        assert close(batch[i], model(*rows(tokens[i : i + 1]))[0])


@pytest.mark.parametrize("place", [0, 1, 40, 64, 99])
@torch.no_grad()
def test_a_token_changes_nothing_before_it(model, place):
    tokens = draw_tokens(2, 100)
    changed = tokens.clone()
    changed[:, place] = (changed[:, place] + 1) % VOCABULARY
    before, after = model(*rows(tokens)), model(*rows(changed))
    assert torch.equal(before[:, :place], after[:, :place])
    assert not torch.isclose(before[:, place], after[:, place]).all()


@torch.no_grad()
def test_a_window_ends():
    """One layer, so that nothing reaches further than its window of 5."""
    model = tiny_decoder("sliding_window_attention", num_layers=1)
    tokens = draw_tokens(1, 40)
    changed = tokens.clone()
    changed[0, 10] = (changed[0, 10] + 1) % VOCABULARY
    differs = (model(*rows(tokens)) != model(*rows(changed)))[0].any(-1)
    assert differs.nonzero().flatten().tolist() == [10, 11, 12, 13, 14]


@torch.no_grad()
def test_a_window_wider_than_the_sequence_is_full_attention():
    full, sliding = (tiny_decoder(f"{kind}_attention", attention__window=60) for kind in ("full", "sliding_window"))
    sliding.load_state_dict(full.state_dict())
    tokens = draw_tokens(2, 60)
    assert close(sliding(*rows(tokens)), full(*rows(tokens)))


# Caches


@torch.no_grad()
def in_pieces(model, tokens, cuts):
    """Logits of tokens [B, T] fed piece by piece through caches."""
    caches = [LayerCache() for _ in model.layers]
    borders = [0, *sorted(cuts), tokens.shape[1]]
    pieces = []
    for first, last in itertools.pairwise(borders):
        positions = torch.arange(first, last).expand(tokens.shape[0], -1)
        pieces.append(model.hidden_states(tokens[:, first:last], positions, caches=caches))
    return F.linear(torch.cat(pieces).transpose(0, 1), model.head_weight)


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=examples(12), deadline=None)
@given(cuts=st.sets(st.integers(1, 89), max_size=6))
@torch.no_grad()
def test_a_sequence_can_be_cut_anywhere(layout, cuts):
    model = decoder_of(layout)
    tokens = draw_tokens(2, 90, seed=len(cuts))
    assert close(in_pieces(model, tokens, cuts), model(*rows(tokens)))


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_gradients_the_forward_is_that_of_training_to_the_last_bit(mixer, dtype):
    """A validation, or a teacher: also of few tokens, for which generation has other forms."""
    model, tokens = tiny_decoder(mixer), rows(draw_tokens(1, 7))
    cast_parameters(model, dtype)
    expected = model(*tokens).detach()
    with torch.no_grad():
        assert torch.equal(model(*tokens), expected)


def test_a_sequence_token_by_token(model):
    tokens = draw_tokens(1, 24)
    assert close(in_pieces(model, tokens, range(1, 24)), model(*rows(tokens)))


@torch.no_grad()
def test_generated_tokens_are_those_of_the_full_forward(model):
    tokens = draw_tokens(2, 9)
    for drawn in greedy(model, tokens, 12).unbind(1):
        assert torch.equal(drawn, model(*rows(tokens))[:, -1].argmax(-1))
        tokens = torch.cat((tokens, drawn[:, None]), 1)
    assert tokens.shape == (2, 21)


@pytest.mark.parametrize("window", [1, 2, 5])
@torch.no_grad()
def test_the_cache_of_a_window_is_bounded(window):
    model = tiny_decoder("sliding_window_attention", attention__window=window)
    tokens = draw_tokens(1, 30)
    assert close(in_pieces(model, tokens, range(1, 30)), model(*rows(tokens)))
    caches = [LayerCache() for _ in model.layers]
    for first, last in ((0, 20), (20, 21), (21, 22)):
        model.hidden_states(tokens[:, first:last], torch.arange(first, last)[None], caches=caches)
        assert all(cache.tensors[name].shape[1] == window - 1 for cache in caches for name in ("k", "v"))
    bytes_of_window = 4 * window * 2 * 8  # float32, two heads of eight channels
    assert all(cache.tensors["k"].untyped_storage().nbytes() <= bytes_of_window for cache in caches)


@pytest.mark.parametrize("mixer", LINEAR_MIXERS)
@torch.no_grad()
def test_the_state_of_a_linear_layer_does_not_grow(mixer):
    model = tiny_decoder(mixer)
    sizes = []
    for length in (8, 80):
        caches = [LayerCache() for _ in model.layers]
        model.hidden_states(*rows(draw_tokens(1, length)), caches=caches)
        sizes.append([{name: state.shape for name, state in cache.tensors.items()} for cache in caches])
    assert sizes[0] == sizes[1]


# Parameters


def initialized(pattern, seed=0, **changes):
    model = Decoder(tiny_model_config(pattern, **changes), VOCABULARY)
    initialize(model, seed)
    return model


def test_a_seed_gives_the_same_parameters():
    first, same, other = (initialized(HYBRID, seed, num_layers=len(MIXERS)).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[name], same[name]) for name in first)
    drawn = {name for name, value in first.items() if value.dim() > 1 or name.endswith(("A_log", "dt_bias"))}
    drawn -= {"lower_bounds"}
    assert {name for name in first if not torch.equal(first[name], other[name])} == drawn
    assert len({tuple(first[name].flatten()[:2].tolist()) for name in drawn}) == len(drawn)


def test_initialization_does_not_depend_on_what_was_there_before():
    pattern = f"{HYBRID}, {BRANCHES}"
    expected = initialized(pattern, num_layers=len(MIXERS) + 3, attention__qkv_bias=True, attention__qk_norm=True)
    model = Decoder(expected.model_config, VOCABULARY)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    initialize(model, 0)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in expected.state_dict().items())


@pytest.mark.parametrize("mixer", MIXERS)
def test_parameters_do_not_depend_on_other_layers(mixer):
    alone = initialized(mixer, num_layers=3).state_dict()
    for other in set(MIXERS) - {mixer}:
        mixed = initialized(f"{other}, {mixer}, {other}", num_layers=3).state_dict()
        for name in (name for name in alone if name.startswith("layers.1.") or not name.startswith("layers.")):
            assert torch.equal(mixed[name], alone[name])


@pytest.mark.parametrize("scaled", [True, False])
def test_standard_deviations(scaled):
    depth = len(MIXERS)
    changes = {"num_layers": depth, "hidden_size": 256, "ffn_hidden_size": 192, "init_std": 0.05}
    gdn = {"gated_delta_net__num_heads": 16, "gated_delta_net__num_v_heads": 16, "gated_delta_net__head_dim": 16}
    model = initialized(
        HYBRID, scale_residual_init=scaled, tie_embeddings=False, attention__head_dim=32, **changes, **gdn
    )
    seen = 0
    # SpikingBrain's gate has a start of its own, see test_mixers.py.
    own = {*model.layers[str(list(MIXERS).index("spikingbrain_gla"))].mixer.gk_proj}
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.Linear | nn.Embedding) and module not in own:
            expected = 0.05 / math.sqrt(2 * depth) if scaled and isinstance(module, RowLinear) else 0.05
            # Five standard errors of a standard deviation.
            assert abs(weight.std() - expected) < 5 * expected / math.sqrt(2 * weight.numel())
            assert abs(weight.mean()) < 5 * expected / math.sqrt(weight.numel())
            seen += 1
    linear = {"gated_delta_net": 7, "gated_linear_attention": 7, "retention": 5, "hgrn": 4, "hgrn2": 4, "delta_net": 5}
    linear |= {"kimi_delta_attention": 9, "spikingbrain_gla": 4, "spikingbrain_tied_gla": 4}
    assert seen == 2 + depth * 3 + 2 * 4 + sum(linear[name] for name in LINEAR_MIXERS)


def test_norms_are_one_biases_zero_and_convolutions_uniform():
    model = initialized(HYBRID, num_layers=len(MIXERS), attention__qkv_bias=True, attention__qk_norm=True)
    norms = [module for module in model.modules() if isinstance(module, RMSNorm)]
    biases = [value for name, value in model.named_parameters() if name.endswith(".bias")]
    convolutions = [module.weight for module in model.modules() if isinstance(module, ShortConvolution)]
    # A block has two norms, the decoder one; softmax layers normalise q and k, linear ones their output. The gates of
    # GLA, of KDA's output and of SpikingBrain have a bias, as have four layers' q, k and v; three convolve them.
    found = len(norms), len(biases), len(convolutions)
    assert found == (1 + 2 * len(MIXERS) + 4 + len(LINEAR_MIXERS), 3 + 4 * 3, 3 * 3)
    assert all((module.weight == 1).all() for module in norms)
    assert all((bias == 0).all() for bias in biases)
    for weight in convolutions:
        assert 0.9 * 0.5 < weight.abs().max() <= 0.5  # width 4: 4^-0.5


def test_decays_of_a_gated_delta_net():
    model = initialized("gated_delta_net", gated_delta_net__num_heads=1, gated_delta_net__num_v_heads=2000)
    for layer in model.layers.values():
        a, dt = layer.mixer.A_log.exp(), F.softplus(layer.mixer.dt_bias)
        assert a.min() > 0 and a.max() < 16
        assert abs(a.mean() - 8) < 5 * 16 / math.sqrt(12 * 2000)
        assert dt.min() > 0.999e-3 and dt.max() < 1.001e-1
        assert abs(dt.log10().mean() + 2) < 5 * 2 / math.sqrt(12 * 2000)


def all_options(tied=False):
    options = {"attention__qkv_bias": True, "attention__qk_norm": True}
    return tiny_decoder(HYBRID, num_layers=len(MIXERS), tie_embeddings=tied, **options)


def test_what_weight_decay_leaves_out():
    undecayed, decayed = set(), set()
    for name, row in parameter_rows(all_options()).items():
        (decayed if row.placement.decayed else undecayed).add(name)
    leaves = {name.split(".")[-1] for name in undecayed}
    assert leaves == {"weight", "bias", "A_log", "dt_bias", "lower_bounds"}
    assert all("norm" in name for name in undecayed if name.endswith(".weight"))
    assert not any("norm" in name or name.endswith((".bias", "A_log", "dt_bias", "lower_bounds")) for name in decayed)
    assert {"embedding.weight", "lm_head.weight", "layers.2.mixer.q_conv1d.weight"} <= decayed


def test_decays_stay_float32():
    model = all_options()
    cast_parameters(model, torch.bfloat16)
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    kept = {name for name, dtype in dtypes.items() if dtype == torch.float32}
    layers = [list(MIXERS).index(name) for name in ("gated_delta_net", "kimi_delta_attention")]
    decays = {f"layers.{i}.mixer.{name}" for i in layers for name in ("A_log", "dt_bias")}
    assert kept == decays | {"lower_bounds"}
    assert {dtype for name, dtype in dtypes.items() if name not in kept} == {torch.bfloat16}


def test_bfloat16_is_near_float32():
    model, half = all_options(), all_options()
    cast_parameters(half, torch.bfloat16)
    packed = pack(documents())
    with torch.no_grad():
        exact, rounded = model(*packed), half(*packed)
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).norm() < 0.1 * exact.norm()


# Heads and losses


@pytest.mark.parametrize("tied", [True, False])
def test_the_loss_is_the_cross_entropy_of_the_logits(tied):
    model = all_options(tied)
    assert (model.lm_head is None) == tied
    assert ("lm_head.weight" in dict(model.named_parameters())) != tied
    tokens, positions, packed = pack(documents())
    labels = draw_tokens(*tokens.shape, seed=9)
    mask = (torch.rand(tokens.shape, generator=torch.Generator().manual_seed(0)) < 0.7).float()
    expected = F.cross_entropy(model(tokens, positions, packed)[0], labels[0], reduction="none")
    total, each = model(tokens, positions, packed, labels)
    assert close(each, expected.detach()) and close(total, expected.sum())
    masked, each_masked = model(tokens, positions, packed, labels, mask)
    assert close(masked, (expected * mask[0]).sum()) and close(each_masked * mask[0], (expected * mask[0]).detach())
    assert not each.requires_grad

    gradients = torch.autograd.grad(masked, list(model.parameters()))
    wanted = torch.autograd.grad((expected * mask[0]).sum(), list(model.parameters()))
    for (name, _), ours, theirs in zip(model.named_parameters(), gradients, wanted, strict=True):
        assert theirs.abs().max() > 0, f"{name} has no gradient"
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm(), name


def test_losses_of_rows_come_in_the_order_of_the_labels():
    model = all_options()
    tokens, labels = draw_tokens(3, 11), draw_tokens(3, 11, seed=1)
    _, each = model(*rows(tokens), labels=labels)
    expected = F.cross_entropy(model(*rows(tokens)).flatten(0, 1), labels.flatten(), reduction="none")
    assert close(each, expected.detach())


def test_the_embedding_is_the_head_only_when_tied():
    tied, untied = all_options(True), all_options(False)
    assert tied.head_weight is tied.embedding.weight
    assert untied.head_weight is untied.lm_head.weight
    assert not torch.equal(untied.head_weight, untied.embedding.weight)


# Options


@torch.no_grad()
def scaled_queries(**options):
    """Logits before and after the queries' and keys' projections grow threefold."""
    model = tiny_decoder("full_attention", **options)
    tokens = rows(draw_tokens(1, 30))
    before = model(*tokens)
    for layer in model.layers.values():
        layer.mixer.q_proj.weight.mul_(3)
        layer.mixer.k_proj.weight.mul_(3)
    return before, model(*tokens)


def test_qk_norm_takes_the_size_of_queries_away():
    before, after = scaled_queries(attention__qk_norm=True, norm_eps=1e-12)
    assert close(after, before)
    before, after = scaled_queries()
    assert (after - before).norm() > 1e-2 * before.norm()


@pytest.mark.parametrize("biased", [True, False])
def test_biases_are_on_queries_keys_and_values(biased):
    names = dict(
        tiny_decoder("full_attention, sliding_window_attention", attention__qkv_bias=biased).named_parameters()
    )
    found = {name for name in names if name.endswith("bias")}
    expected = {f"layers.{i}.mixer.{part}_proj.bias" for i in range(2) for part in "qkv"}
    assert found == (expected if biased else set())


@pytest.mark.parametrize("theta", [10000.0, None])
@torch.no_grad()
def test_rotary_positions_are_relative(theta):
    model = tiny_decoder("full_attention", attention__rope_theta=theta)
    tokens, positions = rows(draw_tokens(1, 30))
    logits = model(tokens, positions)
    assert (model(tokens, positions + 7) - logits).norm() < 1e-4 * logits.norm()
    stretched = (model(tokens, positions * 3) - logits).norm() / logits.norm()
    assert stretched > 1e-3 if theta else stretched == 0


@pytest.mark.parametrize(
    ("mixer", "change"),
    [
        ("gated_delta_net", {"gated_delta_net__allow_negative_eigenvalues": True}),
        ("gated_linear_attention", {"gated_linear_attention__gate_normalizer": 2.0}),
        ("retention", {"retention__rope_theta": 10.0}),
        ("delta_net", {"delta_net__allow_negative_eigenvalues": True}),
        ("kimi_delta_attention", {"kimi_delta_attention__gate": "bounded"}),
        ("kimi_delta_attention", {"kimi_delta_attention__allow_negative_eigenvalues": True}),
        ("spikingbrain_gla", {"spikingbrain_gla__gate_normalizer": 2.0}),
        ("sliding_window_attention", {"attention__window": 9}),
        ("full_attention", {"attention__rope_theta": 100.0}),
        ("full_attention", {"attention__partial_rotary_factor": 0.5}),
        ("full_attention", {"norm_eps": 0.1}),
    ],
)
@torch.no_grad()
def test_options_change_the_model(mixer, change):
    plain, changed = tiny_decoder(mixer), tiny_decoder(mixer, **change)
    changed.load_state_dict(plain.state_dict())
    tokens = rows(draw_tokens(1, 30))
    assert (plain(*tokens) - changed(*tokens)).norm() > 1e-3 * plain(*tokens).norm()


# FLOP


def counted_forward(model, length):
    """FLOP per token of a forward pass as torch counts them: matrices, and softmax attention over all T x T scores."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(*rows(draw_tokens(1, length)))
    counts = {str(operation): count for operation, count in counter.get_flop_counts()["Global"].items()}
    matrices = sum(count for name, count in counts.items() if name in ("aten.mm", "aten.addmm"))
    return matrices / length, (sum(counts.values()) - matrices) / length


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("length", [16, 64])
def test_flops_of_a_dense_model(monkeypatch, tied, length):
    monkeypatch.setenv("SPIKETRAIN_BACKEND", "reference")
    model = tiny_decoder("full_attention", hidden_size=64, tie_embeddings=tied)
    matrices, scores = counted_forward(model, length)
    assert scores > 0
    causal = scores * (length + 1) / (2 * length)
    assert flops_per_token(model, length) == pytest.approx(3 * (matrices + causal), rel=1e-6)


@pytest.mark.parametrize("window", [1, 7, 32, 100])
def test_flops_of_a_window_count_the_keys_that_are_seen(window):
    length, heads, head_dim = 32, 4, 8
    full = tiny_decoder("full_attention")
    sliding = tiny_decoder("sliding_window_attention", attention__window=window)
    seen = [sum(min(t + 1, width) for t in range(length)) / length for width in (length, window)]
    per_key = 2 * 2 * 3 * heads * head_dim  # two products, multiply and add, forward and twice backward
    difference = len(full.layers) * per_key * (seen[0] - seen[1])
    assert flops_per_token(full, length) - flops_per_token(sliding, length) == pytest.approx(difference)


PRODUCTS = {"hgrn": 1, "delta_net": 3, "gated_delta_net": 3, "kimi_delta_attention": 3}


def test_flops_of_branches_add_up():
    """Two layers of one mixer each have one feed-forward more, 3 matrices of 32 x 48, than one layer of both."""
    pattern, length = "gated_delta_net + sliding_window_attention", 32
    apart = flops_per_token(tiny_decoder(pattern.replace(" +", ",")), length)
    assert apart - flops_per_token(tiny_decoder(pattern, num_layers=1), length) == 6 * 3 * 32 * 48


@pytest.mark.parametrize("mixer", LINEAR_MIXERS)
def test_flops_of_linear_attention(monkeypatch, mixer):
    """The matrices as torch counts them, and the state: read for q, written, and for the delta rule read for k."""
    products = PRODUCTS.get(mixer, 2)
    monkeypatch.setenv("SPIKETRAIN_BACKEND", "reference")
    model, length = tiny_decoder(mixer), 16
    caches = [LayerCache() for _ in model.layers]
    model.hidden_states(*rows(draw_tokens(1, length)), caches=caches)
    elements = sum(cache.tensors["state"].numel() for cache in caches)
    widths = sum(weight.numel() for weight in (m.weight for m in model.modules() if isinstance(m, ShortConvolution)))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(*rows(draw_tokens(1, length)))
    counts = {str(operation): count for operation, count in counter.get_flop_counts()["Global"].items()}
    matrices = sum(counts.get(name, 0) for name in ("aten.mm", "aten.addmm")) / length
    expected = 3 * (matrices + 2 * widths + 2 * products * elements)
    assert flops_per_token(model, length) == pytest.approx(expected, rel=1e-6)
