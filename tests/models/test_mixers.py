"""Each mixer against its equations, token by token; its initialisation, its options, its state, one training step."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from models.config import LINEAR_MIXERS, MIXERS
from models.decoder import Decoder, initialize
from models.mixers.base import LayerCache, SequenceInfo
from models.mixers.hgrn import bounded_log_decay, layer_bounds
from models.parameters import cast_parameters
from tests.helpers import VOCABULARY, draw_tokens, pack, rows, tiny_decoder, tiny_model_config

TIME, WIDTH = 11, 32
EPS = 1e-6


def difference(ours, expected):
    return float((ours - expected).detach().norm() / expected.detach().norm())


# The papers' equations, in float64, for one sequence x [T, D]


def heads_of(x, heads):
    return x.unflatten(-1, (heads, -1))


def norm(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight


def unit(x):
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def convolved(x, weight):
    """SiLU of y_t = sum over w of weight[:, w] x_(t - W + 1 + w), with zeros before the start."""
    width = weight.shape[1]
    padded = torch.cat((x.new_zeros(width - 1, x.shape[1]), x))
    return F.silu(sum(weight[:, w] * padded[w : w + len(x)] for w in range(width)))


def additive(q, k, v, decay):
    """S <- Diag(a) S + k v^T, o = S^T q / sqrt(K); q, k, decay [T, H, K], v [T, H, V]."""
    state, out = q.new_zeros(q.shape[1], q.shape[2], v.shape[2]), []
    for t in range(len(q)):
        state = decay[t, :, :, None] * state + k[t, :, :, None] * v[t, :, None]
        out.append(torch.einsum("hkv,hk->hv", state, q[t]) / math.sqrt(q.shape[2]))
    return torch.stack(out)


def delta(q, k, v, decay, beta):
    """S <- Diag(a) S; S <- S + b k (v - S^T k)^T, o = S^T q / sqrt(K); beta [T, H]."""
    state, out = q.new_zeros(q.shape[1], q.shape[2], v.shape[2]), []
    for t in range(len(q)):
        state = decay[t, :, :, None] * state
        error = v[t] - torch.einsum("hkv,hk->hv", state, k[t])
        state = state + (beta[t, :, None] * k[t])[:, :, None] * error[:, None]
        out.append(torch.einsum("hkv,hk->hv", state, q[t]) / math.sqrt(q.shape[2]))
    return torch.stack(out)


def rotated(x, theta):
    """Channels i and K/2 + i of x [T, H, K] turned by t theta^(-2i/K)."""
    half = x.shape[-1] // 2
    angle = torch.arange(len(x))[:, None] * theta ** (-torch.arange(half, dtype=torch.float64) / half)
    pair = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)[:, None]
    return torch.cat((pair.real, pair.imag), -1)


def retention_expected(p, x, bound):
    q, k, v = (heads_of(x @ p[f"{name}_proj.weight"].T, 2) for name in "qkv")
    decay = torch.tensor([1 - 1 / 32, 1 - 1 / 64], dtype=torch.float64)[:, None].expand(q.shape)
    o = norm(additive(rotated(q, 1e4), rotated(k, 1e4), v, decay), p["g_norm.weight"])
    return (o.flatten(1) * F.silu(x @ p["g_proj.weight"].T)) @ p["o_proj.weight"].T


def hgrn_expected(p, x, bound):
    decay = bound + (1 - bound) * torch.sigmoid(x @ p["f_proj.weight"].T)
    h, out = torch.zeros(WIDTH, dtype=torch.float64), []
    for a, i in zip(decay, F.silu(x @ p["i_proj.weight"].T), strict=True):
        h = a * h + (1 - a) * i
        out.append(h)
    return (norm(torch.stack(out), p["g_norm.weight"]) * F.silu(x @ p["g_proj.weight"].T)) @ p["o_proj.weight"].T


def hgrn2_expected(p, x, bound):
    decay = heads_of(bound + (1 - bound) * torch.sigmoid(x @ p["f_proj.weight"].T), 4)
    q, v = heads_of(F.silu(x @ p["q_proj.weight"].T), 4), heads_of(x @ p["i_proj.weight"].T, 4)
    return norm(additive(q, 1 - decay, v, decay).flatten(1), p["g_norm.weight"]) @ p["o_proj.weight"].T


def delta_inputs(p, x, value_heads):
    q, k, v = (convolved(x @ p[f"{name}_proj.weight"].T, p[f"{name}_conv1d.weight"]) for name in "qkv")
    # Neighbouring value heads share a query and key head.
    q, k = (unit(heads_of(y, 2)).repeat_interleave(value_heads // 2, 1) for y in (q, k))
    return q, k, heads_of(v, value_heads), torch.sigmoid(x @ p["b_proj.weight"].T)


def delta_net_expected(p, x, bound):
    q, k, v, beta = delta_inputs(p, x, 2)
    o = norm(delta(q, k, v, torch.ones_like(q), beta), p["o_norm.weight"]).flatten(1)
    if "g_proj.weight" in p:
        o = o * F.silu(x @ p["g_proj.weight"].T)
    return o @ p["o_proj.weight"].T


def kimi_expected(p, x, bound, log_decay):
    q, k, v, beta = delta_inputs(p, x, 4)
    f = heads_of(x @ p["f_proj.0.weight"].T @ p["f_proj.1.weight"].T + p["dt_bias"], 4)
    o = norm(delta(q, k, v, log_decay(f, p["A_log"].exp()[:, None]).exp(), beta), p["o_norm.weight"])
    gate = torch.sigmoid(x @ p["g_proj.0.weight"].T @ p["g_proj.1.weight"].T + p["g_proj.1.bias"])
    return (o.flatten(1) * gate) @ p["o_proj.weight"].T


def kimi_softplus_expected(p, x, bound):
    return kimi_expected(p, x, bound, lambda f, rate: -rate * torch.log1p(f.exp()))


def kimi_bounded_expected(p, x, bound):
    return kimi_expected(p, x, bound, lambda f, rate: -5 * torch.sigmoid(rate * f))


def attention_inputs(p, x):
    q, k, v = (x @ p[f"{name}_proj.weight"].T + p[f"{name}_proj.bias"] for name in "qkv")
    return heads_of(q, 4), *(heads_of(y, 2).repeat_interleave(2, 1) for y in (k, v))


def spikingbrain_expected(p, x, bound):
    q, k, v = attention_inputs(p, x)
    a = x @ p["gk_proj.0.weight"].T @ p["gk_proj.1.weight"].T + p["gk_proj.1.bias"]
    decay = heads_of(torch.sigmoid(a) ** (1 / 16), 2).repeat_interleave(2, 1)
    o = norm(additive(F.relu(q), F.relu(k), v, decay), p["g_norm.weight"])
    return o.flatten(1) @ p["o_proj.weight"].T


def tied_expected(p, x, bound):
    q, k, v = attention_inputs(p, x)
    k = torch.sigmoid(k)
    return norm(additive(torch.sigmoid(q), k, v, 1 - k), p["g_norm.weight"]).flatten(1) @ p["o_proj.weight"].T


def gated_attention_expected(p, x, bound, channels=4):
    q, k, v = (x @ p[f"{name}_proj.weight"].T for name in "qkv")
    q, k = norm(heads_of(q, 4), 1 + p["q_norm.weight"]), norm(heads_of(k, 2), 1 + p["k_norm.weight"])
    q, k = (torch.cat((rotated(y[..., :channels], 100.0), y[..., channels:]), -1) for y in (q, k))
    k, v = (y.repeat_interleave(2, 1) for y in (k, heads_of(v, 2)))
    scores = torch.einsum("thk,shk->hts", q, k) / math.sqrt(q.shape[-1])
    hidden = torch.ones(len(x), len(x)).triu(1).bool()
    o = torch.einsum("hts,shk->thk", scores.masked_fill(hidden, -math.inf).softmax(-1), v).flatten(1)
    return (o * torch.sigmoid(x @ p["g_proj.weight"].T)) @ p["o_proj.weight"].T


GATED_ATTENTION = {
    "zero_centered_norms": True,
    "attention__qk_norm": True,
    "attention__output_gate": True,
    "attention__partial_rotary_factor": 0.5,
    "attention__rope_theta": 100.0,
}

EXPECTED = [
    ("full_attention", GATED_ATTENTION, gated_attention_expected),
    ("retention", {}, retention_expected),
    ("hgrn", {}, hgrn_expected),
    ("hgrn2", {}, hgrn2_expected),
    ("delta_net", {}, delta_net_expected),
    ("delta_net", {"delta_net__output_gate": True}, delta_net_expected),
    ("kimi_delta_attention", {}, kimi_softplus_expected),
    ("kimi_delta_attention", {"kimi_delta_attention__gate": "bounded"}, kimi_bounded_expected),
    ("spikingbrain_gla", {}, spikingbrain_expected),
    ("spikingbrain_tied_gla", {}, tied_expected),
]


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize(("mixer", "options", "expected"), EXPECTED)
@torch.no_grad()
def test_equations(mixer, options, expected, layer):
    model = tiny_decoder(mixer, num_layers=3, norm_eps=EPS, **options)
    module, generator = model.layers[str(layer)].mixer, torch.Generator().manual_seed(layer)
    for parameter in module.parameters():
        # Norms start at one, where leaving them out would not show.
        parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    x_TBD = torch.randn(TIME, 2, WIDTH, generator=generator)
    positions = torch.arange(TIME).expand(2, TIME)
    ours = module(x_TBD, model._layer_infos(positions, None)[layer])
    parameters = {name: parameter.double() for name, parameter in module.named_parameters()}
    bound = torch.zeros(WIDTH, dtype=torch.float64)
    if model.lower_bounds is not None:
        bound = model.lower_bounds.double().softmax(0).cumsum(0)[layer] - model.lower_bounds.double().softmax(0)[0]
    for row in range(2):
        assert difference(ours[:, row], expected(parameters, x_TBD[:, row].double(), bound)) < 1e-5


# HGRN's lower bounds


def test_lower_bounds_rise_evenly_at_first():
    model = Decoder(tiny_model_config("hgrn, full_attention, hgrn2", num_layers=6), VOCABULARY)
    initialize(model, 0)
    assert model.lower_bounds.shape == (6, WIDTH) and not model.lower_bounds.any()
    first, *others = layer_bounds(model.lower_bounds)
    assert first is None
    for layer, bound in enumerate(others, start=1):
        assert bound.dtype == torch.float32
        torch.testing.assert_close(bound, torch.full((WIDTH,), layer / 6), rtol=1e-6, atol=0)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(0, 2**31), st.integers(2, 12), st.floats(0, 5))
def test_lower_bounds_grow_with_the_layer_and_stay_below_one(seed, layers, spread):
    weights = spread * torch.randn(layers, 8, generator=torch.Generator().manual_seed(seed))
    bounds = layer_bounds(weights)[1:]
    assert all((bound > 0).all() and (bound < 1 + 1e-6).all() for bound in bounds)
    assert all((low <= high).all() for low, high in itertools.pairwise(bounds))
    torch.testing.assert_close(bounds[-1], 1 - weights.softmax(0)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("pattern", "layers", "there"),
    [
        ("hgrn", 2, True),
        ("full_attention, hgrn2", 2, True),
        ("hgrn, full_attention", 3, True),
        ("hgrn", 1, False),
        ("hgrn2, full_attention", 2, False),
        ("gated_delta_net", 2, False),
    ],
)
def test_lower_bounds_exist_where_a_layer_above_the_first_has_one(pattern, layers, there):
    """A parameter that no loss depends on would have no gradient."""
    assert ("lower_bounds" in tiny_decoder(pattern, num_layers=layers).state_dict()) == there


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.floats(-300, 300), st.none() | st.floats(1e-6, 1 - 1e-6))
def test_bounded_decays_keep_their_digits(f, bound):
    """Within 1e-5 of the definition in float64, with finite gradients, where float32 of it would be 0 or 1."""
    f = torch.tensor([f], requires_grad=True)
    lower = None if bound is None else torch.tensor([bound], requires_grad=True)
    ours = bounded_log_decay(f, lower)
    wide = 0.0 if lower is None else lower.detach().double()
    expected = torch.log(wide + (1 - wide) * torch.sigmoid(f.detach().double()))
    assert ours.dtype == torch.float32 and (ours <= 1e-6).all()
    torch.testing.assert_close(ours.detach().double(), expected, rtol=1e-5, atol=2e-7)
    ours.sum().backward()
    assert f.grad.isfinite().all() and (lower is None or lower.grad.isfinite().all())


@pytest.mark.parametrize("mixer", ["hgrn", "hgrn2"])
@torch.no_grad()
def test_a_higher_bound_remembers_for_longer(mixer):
    module = tiny_decoder(mixer, num_layers=1).layers["0"].mixer
    x = torch.randn(40, 1, WIDTH, generator=torch.Generator().manual_seed(0))
    changed = x.clone()
    changed[0] += 1
    reach = []
    for bound in (None, torch.full((WIDTH,), 0.99)):
        before, after = (module(y, SequenceInfo(lower_bound=bound)) for y in (x, changed))
        reach.append(difference(after[-1], before[-1]))
    assert reach[0] < 1e-4 and reach[1] > 1e-3


# Initialisation


def test_decays_of_retention_are_fixed():
    module = tiny_decoder("retention", retention__num_heads=4).layers["0"].mixer
    gammas = module.log_decay(torch.device("cpu")).double().exp()
    torch.testing.assert_close(gammas, 1 - 2.0 ** -torch.arange(5, 9, dtype=torch.float64), rtol=1e-7, atol=0)
    assert not any("decay" in name or "gamma" in name for name in module.state_dict())


@pytest.mark.parametrize("gate", ["softplus", "bounded"])
def test_decays_of_kimi_delta_attention(gate):
    options = {"num_heads": 1000, "num_v_heads": 1000, "head_dim": 2, "expand_v": 1.0, "gate": gate}
    module = (
        tiny_decoder(
            "kimi_delta_attention", num_layers=1, **{f"kimi_delta_attention__{name}": v for name, v in options.items()}
        )
        .layers["0"]
        .mixer
    )
    a, dt = module.A_log.exp(), F.softplus(module.dt_bias)
    assert a.shape == (1000,) and dt.shape == (2000,)
    if gate == "bounded":
        assert (a == 1).all()
    else:
        assert a.min() >= 1 and a.max() <= 16.001
        assert abs(a.mean() - 8.5) < 5 * 15 / math.sqrt(12 * 1000)
    assert dt.min() > 0.999e-3 and dt.max() < 1.001e-1
    assert abs(dt.log10().mean() + 2) < 5 * 2 / math.sqrt(12 * 2000)


def test_the_gate_of_spikingbrain_is_xavier_uniform():
    options = {"head_dim": 64, "gate_low_rank": 32}
    model = tiny_decoder(
        "spikingbrain_gla", hidden_size=256, **{f"spikingbrain_gla__{name}": v for name, v in options.items()}
    )
    for matrix in (layer.weight for block in model.layers.values() for layer in block.mixer.gk_proj):
        bound = 2**-2.5 * math.sqrt(6 / sum(matrix.shape))
        assert 0.98 * bound < matrix.abs().max() <= bound
        # Five standard errors of a uniform's standard deviation.
        assert abs(matrix.std() - bound / math.sqrt(3)) < 5 * bound / math.sqrt(3) * math.sqrt(0.2 / matrix.numel())


# Options


@torch.no_grad()
def test_the_bounded_gate_keeps_its_bound():
    mixer = tiny_decoder("kimi_delta_attention", kimi_delta_attention__gate="bounded").layers["0"].mixer
    x = 1000 * torch.randn(50, 1, WIDTH, generator=torch.Generator().manual_seed(0))
    decays = mixer._log_decay(x)
    assert decays.dtype == torch.float32 and decays.shape == (1, 50, 4, 8)
    assert decays.min() >= -5 and decays.max() <= 0 and decays.min() < -4.9


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("mixer", ["spikingbrain_gla", "spikingbrain_tied_gla"])
def test_biases_of_spikingbrain(mixer, biased):
    module = tiny_decoder(mixer, spikingbrain_gla__qkv_bias=biased).layers["0"].mixer
    found = {name for name, _ in module.named_parameters() if name.endswith("bias")}
    assert found - {"gk_proj.1.bias"} == ({f"{part}_proj.bias" for part in "qkv"} if biased else set())
    assert ("gk_proj.1.bias" in found) == (mixer == "spikingbrain_gla")


@torch.no_grad()
def test_softmax_and_retention_layers_rotate_each_by_their_own_base():
    """Their tables differ in size and in base, and either may change without the other."""
    tokens = rows(draw_tokens(1, 30))
    plain = tiny_decoder("retention, full_attention")
    for change in ({"retention__rope_theta": 10.0}, {"attention__rope_theta": 10.0}, {"attention__rope_theta": None}):
        changed = tiny_decoder("retention, full_attention", **change)
        changed.load_state_dict(plain.state_dict())
        assert difference(changed(*tokens), plain(*tokens)) > 1e-3
    only = tiny_decoder("retention", attention__rope_theta=None)
    assert difference(only(*tokens), tiny_decoder("retention")(*tokens)) == 0


# State


@pytest.mark.parametrize("mixer", LINEAR_MIXERS)
@torch.no_grad()
def test_the_state_has_the_shape_that_the_configuration_tells(mixer):
    model, caches = tiny_decoder(mixer), [LayerCache(), LayerCache()]
    model.hidden_states(*rows(draw_tokens(3, 5)), caches=caches)
    state, shape = caches[1].tensors["state"], model.model_config.state_shape(mixer)
    assert state.dtype == torch.float32
    assert tuple(state.shape) == ((3, shape[2]) if mixer == "hgrn" else (3, *shape))


# One training step

VARIANTS = {
    **{name: (name, {}) for name in MIXERS},
    "delta_net, gated": ("delta_net", {"delta_net__output_gate": True}),
    "kimi_delta_attention, bounded": ("kimi_delta_attention", {"kimi_delta_attention__gate": "bounded"}),
    "hybrid": (", ".join(MIXERS), {"num_layers": len(MIXERS)}),
    "branches": ("spikingbrain_tied_gla + sliding_window_attention, hgrn2 + gated_delta_net", {}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_has_a_finite_gradient_for_every_parameter(variant, dtype):
    pattern, options = VARIANTS[variant]
    model = tiny_decoder(pattern, **options)
    cast_parameters(model, dtype)
    tokens, positions, documents = pack([draw_tokens(length, seed=length) for length in (37, 1, 70)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        total, _ = model(tokens, positions, documents, tokens.roll(-1, 1))
        (total / tokens.numel()).backward()
        losses.append(float(total.detach()))
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, f"{name} has no gradient"
            assert parameter.grad.isfinite().all() and parameter.grad.any(), name
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all() and not torch.equal(parameter, before[name]), name
    assert all(math.isfinite(loss) for loss in losses)
