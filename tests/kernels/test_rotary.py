"""Rotary embedding against its definition and against transformers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.rotary import apply_rotary, apply_rotary_reference, frequencies, rotary_tables
from kernels.rotary_scaling import RotaryScaling, yarn_attention_factor

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2}


def _compare(x: Tensor, cos: Tensor, sin: Tensor, tolerance: float) -> None:
    grad = torch.randn(x.shape, dtype=torch.float64).to(x.dtype)
    fast, exact = x.detach().clone().requires_grad_(), x.detach().double().requires_grad_()
    out, target = apply_rotary(fast, cos, sin), apply_rotary_reference(exact, cos, sin)
    out.backward(grad)
    target.backward(grad.double())
    assert out.dtype == x.dtype and out.is_contiguous()
    for result, expected in ((out, target), (fast.grad, exact.grad)):
        assert (result.double() - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_matches_reference_over_several_blocks(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    cos, sin = rotary_tables(torch.arange(200), 64, 1e4)
    _compare(torch.randn(2, 200, 12, 64).to(dtype), cos, sin, TOLERANCE[dtype])


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 4), st.integers(1, 5), st.booleans())
def test_any_shape_and_positions_per_example(batch: int, time: int, heads: int, half: int, shared: bool) -> None:
    torch.manual_seed(0)
    positions = torch.randint(0, 1000, (time,) if shared else (batch, time))
    cos, sin = rotary_tables(positions, 2 * half, 1e4)
    assert cos.shape == sin.shape == (*positions.shape, half) and cos.dtype == torch.float32
    # The transpose stands for heads cut from a fused projection.
    x = torch.randn(batch, heads, time, 2 * half, dtype=torch.float64).transpose(1, 2)
    _compare(x, cos, sin, 1e-10)


def test_gradcheck() -> None:
    cos, sin = rotary_tables(torch.arange(3), 4, 1e4)
    x = torch.randn(2, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: apply_rotary(x, cos, sin), (x,))


def test_scores_depend_on_the_distance_only() -> None:
    q, k = torch.randn(2, 1, 1, 1, 32, dtype=torch.float64)
    scores = []
    for shift in (0, 700):
        tables = [rotary_tables(torch.tensor([position + shift]), 32, 1e4) for position in (9, 4)]
        scores.append((apply_rotary(q, *tables[0]) * apply_rotary(k, *tables[1])).sum())
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-4, atol=1e-4)


def test_same_as_transformers_llama() -> None:
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    config = llama.LlamaConfig(hidden_size=64, num_attention_heads=4, rope_theta=5e5)
    positions = torch.randint(0, 4000, (2, 11))
    cos_hf, sin_hf = llama.LlamaRotaryEmbedding(config)(torch.zeros(1), positions)
    q = torch.randn(2, 11, 4, 16)
    theirs, _ = llama.apply_rotary_pos_emb(q.transpose(1, 2), q.transpose(1, 2), cos_hf, sin_hf)
    ours = apply_rotary(q, *rotary_tables(positions, 16, 5e5))
    torch.testing.assert_close(ours, theirs.transpose(1, 2), rtol=1e-5, atol=1e-5)


SCALINGS = {
    "linear": RotaryScaling("linear", 4.0),
    "llama3": RotaryScaling("llama3", 8.0, 8192, 1.0, 4.0),
    "yarn": RotaryScaling("yarn", 4.0, 4096, 1.0, 32.0, yarn_attention_factor(4.0)),
}


@pytest.mark.parametrize("theta", [1e4, 5e5])
@pytest.mark.parametrize("dim", [16, 64, 128])
@pytest.mark.parametrize("kind", SCALINGS)
def test_scaled_frequencies_are_those_of_transformers(kind: str, dim: int, theta: float) -> None:
    rope = pytest.importorskip("transformers.modeling_rope_utils")
    from transformers import LlamaConfig

    scaling = SCALINGS[kind]
    numbers = {"factor": scaling.factor, "rope_theta": theta, "rope_type": kind}
    numbers["original_max_position_embeddings"] = scaling.original_length
    if kind == "llama3":
        numbers |= {"low_freq_factor": scaling.low, "high_freq_factor": scaling.high}
    config = LlamaConfig(hidden_size=2 * dim, num_attention_heads=2, rope_parameters=numbers)
    theirs, factor = rope.ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    assert torch.equal(frequencies(dim, theta, scaling), theirs)
    assert factor == scaling.attention_factor
    cos, sin = rotary_tables(torch.tensor([0, 30000]), dim, theta, scaling)
    assert torch.equal(cos[1], (30000 * theirs).cos() * factor) and torch.equal(sin[1], (30000 * theirs).sin() * factor)


@pytest.mark.parametrize("kind", SCALINGS)
def test_scaling_slows_pairs_down_by_its_factor_at_most(kind: str) -> None:
    plain = frequencies(64, 1e4)
    scaled = frequencies(64, 1e4, SCALINGS[kind])
    ratios = plain / scaled
    assert (ratios >= 1 - 1e-6).all() and (ratios <= SCALINGS[kind].factor * (1 + 1e-6)).all()
    # The slowest pair by the whole factor, and the fastest one not at all, but for position interpolation.
    assert ratios[-1] == pytest.approx(SCALINGS[kind].factor)
    assert ratios[0] == pytest.approx(4.0 if kind == "linear" else 1.0)
    none = SCALINGS[kind]._replace(factor=1.0)
    torch.testing.assert_close(frequencies(64, 1e4, none), plain, rtol=1e-6, atol=0)


def test_errors() -> None:
    with pytest.raises(ValueError, match="even"):
        rotary_tables(torch.arange(3), 5, 1e4)
    cos, sin = rotary_tables(torch.arange(3), 4, 1e4)
    for shape in ((2, 4, 1, 4), (2, 3, 1, 6), (3, 1, 4), (2, 3, 0, 4)):
        with pytest.raises(ValueError, match="apply_rotary"):
            apply_rotary(torch.zeros(shape), cos, sin)
    with pytest.raises(ValueError, match="apply_rotary"):
        apply_rotary(torch.zeros(2, 3, 1, 0), cos[:, :0], sin[:, :0])
