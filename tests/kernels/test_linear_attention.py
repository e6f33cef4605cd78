"""The chunked linear attentions against their token-by-token references, and the properties both must have."""

import functools
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.documents import Documents
from kernels.linear_attention import _chunks, delta_rule, gated_delta_rule, gla, hgrn, hgrn2, retention
from kernels.linear_attention._chunks import chunk_layout
from tests.helpers import documents_of, examples

Op = Callable[..., tuple[Tensor, Tensor | None]]
OPS: dict[str, Op] = {
    "retention": retention,
    "gla": gla,
    "hgrn": hgrn,
    "hgrn2": hgrn2,
    "delta_rule": delta_rule,
    "gated_delta_rule": gated_delta_rule,
    "kimi_delta_rule": gated_delta_rule,
}
DELTA_RULES = ("delta_rule", "gated_delta_rule", "kimi_delta_rule")
# Which of an op's inputs is v, and which log_decay where every token has one.
VALUE = {"hgrn": 0, "hgrn2": 1}
DECAY = {"gla": 3, "hgrn": 1, "hgrn2": 2, "gated_delta_rule": 3, "kimi_delta_rule": 3}
SETTINGS = settings(max_examples=examples(20), deadline=None, derandomize=True)
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_inputs(
    name: str,
    batch: int,
    time: int,
    *,
    heads: tuple[int, int, int] = (2, 2, 2),
    dims: tuple[int, int] = (16, 8),
    strongest: float = 1.0,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> list[Tensor]:
    """The op's inputs: log_decay between 0 and -strongest, a third of it 0, and k of unit norm."""
    generator = torch.Generator().manual_seed(seed)
    (q_heads, k_heads, v_heads), (key_dim, value_dim) = heads, dims

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    def decay(*shape: int) -> Tensor:
        return -strongest * (1.5 * uniform(*shape) - 0.5).clamp_min(0)

    q, v = normal(batch, time, q_heads, key_dim), normal(batch, time, v_heads, value_dim)
    k = F.normalize(normal(batch, time, k_heads, key_dim), dim=-1)
    per_channel, beta = decay(batch, time, v_heads, key_dim), uniform(batch, time, v_heads)
    tensors = {
        "retention": [q, k, v, decay(v_heads)],
        "gla": [q, k, v, per_channel],
        "hgrn": [normal(batch, time, key_dim), decay(batch, time, key_dim)],
        "hgrn2": [q, v, per_channel],
        "delta_rule": [q, k, v, beta],
        "gated_delta_rule": [q, k, v, decay(batch, time, v_heads), beta],
        "kimi_delta_rule": [q, k, v, per_channel, beta],
    }[name]
    return [x.to(dtype).requires_grad_() for x in tensors]


def make_state(
    name: str, sequences: int, heads: int, dims: tuple[int, int] = (16, 8), dtype: torch.dtype = torch.float64
) -> Tensor:
    generator = torch.Generator().manual_seed(sequences)
    shape = (sequences, dims[0]) if name == "hgrn" else (sequences, heads, *dims)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def cut(inputs: list[Tensor], tokens: slice) -> list[Tensor]:
    """The inputs of some tokens; what is not per token stays whole."""
    return [x if x.dim() == 1 else x[:, tokens] for x in inputs]


def error(actual: Tensor, expected: Tensor) -> float:
    """‖a - b‖ / ‖b‖, in float64."""
    actual, expected = actual.double(), expected.double()
    return ((actual - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def results(op: Op, inputs: list[Tensor], state: Tensor | None, **kwargs: object) -> list[Tensor]:
    """o, the final state and the gradients of all inputs under a loss that uses both."""
    o, final = op(*inputs, initial_state=state, output_final_state=True, **kwargs)
    generator = torch.Generator().manual_seed(7)
    loss = sum((x.double() * torch.randn(x.shape, generator=generator, dtype=torch.float64)).sum() for x in (o, final))
    wanted = inputs if state is None else [*inputs, state]
    return [o, final, *torch.autograd.grad(loss, wanted)]


def assert_same(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for index, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        # A few numbers may all be small differences of large ones; many are not, and their norm is a fair scale.
        allowed = tolerance if b.numel() >= 32 else 100 * tolerance
        assert error(a, b) <= allowed, f"tensor {index}: {error(a, b):.2e} > {allowed:.0e}"


HEADS = [(2, 2, 2), (4, 2, 2), (2, 2, 4), (3, 1, 1), (1, 1, 3), (1, 1, 1)]
STRONGEST = [0.0, 0.1, 2.0, 20.0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", OPS)
@SETTINGS
@given(
    batch=st.integers(1, 3),
    time=st.integers(1, 150),
    heads=st.sampled_from(HEADS),
    dims=st.sampled_from([(16, 8), (8, 16), (12, 5)]),
    strongest=st.sampled_from(STRONGEST),
    with_state=st.booleans(),
    seed=st.integers(0, 99),
)
def test_chunked_equals_reference(
    name: str,
    dtype: torch.dtype,
    batch: int,
    time: int,
    heads: tuple[int, int, int],
    dims: tuple[int, int],
    strongest: float,
    with_state: bool,
    seed: int,
) -> None:
    inputs = make_inputs(name, batch, time, heads=heads, dims=dims, strongest=strongest, dtype=dtype, seed=seed)
    state = make_state(name, batch, max(heads), dims, dtype) if with_state else None
    chunked = results(OPS[name], inputs, state, backend="torch")
    assert_same(chunked, results(OPS[name], inputs, state, backend="reference"), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", OPS)
@SETTINGS
@given(
    lengths=st.lists(st.one_of(st.integers(1, 8), st.sampled_from([16, 63, 64, 65, 128])), min_size=1, max_size=6),
    heads=st.sampled_from(HEADS),
    strongest=st.sampled_from(STRONGEST),
    with_state=st.booleans(),
)
def test_packed_equals_reference(
    name: str, dtype: torch.dtype, lengths: list[int], heads: tuple[int, int, int], strongest: float, with_state: bool
) -> None:
    inputs = make_inputs(name, 1, sum(lengths), heads=heads, strongest=strongest, dtype=dtype)
    state = make_state(name, len(lengths), max(heads), dtype=dtype) if with_state else None
    documents = documents_of(lengths)
    chunked = results(OPS[name], inputs, state, documents=documents, backend="torch")
    assert_same(chunked, results(OPS[name], inputs, state, documents=documents, backend="reference"), TOLERANCE[dtype])


@pytest.mark.parametrize("lengths", [None, [70, 300, 1, 130, 64]])
@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("name", OPS)
def test_segments_equal_one(name: str, chunks: int, lengths: list[int] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, time = (2, 300) if lengths is None else (1, sum(lengths))
    inputs = make_inputs(name, batch, time)
    state = make_state(name, batch if lengths is None else len(lengths), 2)
    packing = {} if lengths is None else {"documents": documents_of(lengths)}
    expected = results(OPS[name], inputs, state, backend="torch", **packing)
    counts, segments = [], _chunks.ChunkLayout.segments

    def counted(layout: _chunks.ChunkLayout, elements: int, on_cpu: bool) -> list[_chunks.ChunkLayout]:
        monkeypatch.setattr(_chunks, "_SEGMENT_ELEMENTS", chunks * elements)
        found = segments(layout, elements, on_cpu)
        counts.append(len(found))
        return found

    monkeypatch.setattr(_chunks.ChunkLayout, "segments", counted)
    assert_same(results(OPS[name], inputs, state, backend="torch", **packing), expected, 1e-12)
    assert len(counts) == 1 and 1 < counts[0] <= 5


@pytest.mark.parametrize("lengths", [[64, 64, 64], [70, 1, 130, 64], [5, 9, 2]])
@pytest.mark.parametrize("name", OPS)
def test_packed_equals_separate(name: str, lengths: list[int]) -> None:
    inputs = make_inputs(name, 1, sum(lengths))
    state = make_state(name, len(lengths), 2)
    o, final = OPS[name](*inputs, initial_state=state, output_final_state=True, documents=documents_of(lengths))
    bounds = documents_of(lengths).bounds
    for n, o_n in enumerate(o.split(lengths, dim=1)):
        piece = cut(inputs, slice(bounds[n], bounds[n + 1]))
        expected = OPS[name](*piece, initial_state=state[n : n + 1], output_final_state=True)
        assert_same([o_n, final[n : n + 1]], list(expected), 1e-12)


@pytest.mark.parametrize("name", OPS)
@SETTINGS
@given(time=st.integers(2, 140), fraction=st.floats(0, 1))
def test_cutting_a_sequence_and_carrying_the_state_changes_nothing(name: str, time: int, fraction: float) -> None:
    border = min(max(int(fraction * time), 1), time - 1)
    inputs, state = make_inputs(name, 2, time), make_state(name, 2, 2)
    whole = results(OPS[name], inputs, state)

    def in_two(*tensors: Tensor, initial_state: Tensor, output_final_state: bool) -> tuple[Tensor, Tensor | None]:
        inputs = list(tensors)
        first, middle = OPS[name](*cut(inputs, slice(0, border)), initial_state=initial_state, output_final_state=True)
        second, final = OPS[name](*cut(inputs, slice(border, time)), initial_state=middle, output_final_state=True)
        return torch.cat((first, second), dim=1), final

    assert_same(results(in_two, inputs, state), whole, 1e-10)


@pytest.mark.parametrize("name", OPS)
def test_decoding_token_by_token_equals_the_whole(name: str) -> None:
    inputs = [x.detach() for x in make_inputs(name, 3, 20, dtype=torch.float32)]
    whole, final = OPS[name](*inputs, output_final_state=True)
    state, outputs = None, []
    for t in range(20):
        o, state = OPS[name](*cut(inputs, slice(t, t + 1)), initial_state=state, output_final_state=True)
        outputs.append(o)
    assert_same([torch.cat(outputs, dim=1), state], [whole, final], 1e-5)


@pytest.mark.parametrize("lengths", [[64, 64, 64], [70, 3, 40]])
@pytest.mark.parametrize("name", OPS)
def test_a_document_never_influences_another(name: str, lengths: list[int]) -> None:
    documents = documents_of(lengths)
    inputs = [x.detach() for x in make_inputs(name, 1, sum(lengths), dtype=torch.float32)]
    inside = slice(lengths[0], lengths[0] + lengths[1])
    changed = [x.clone() for x in inputs]
    changed[VALUE.get(name, 2)][:, inside] = torch.inf  # nothing short of complete separation keeps this out
    outputs = []
    for values in (inputs, changed):
        tensors = [x.requires_grad_() for x in values]
        o, final = OPS[name](*tensors, output_final_state=True, documents=documents)
        kept = torch.cat((o[:, : inside.start], o[:, inside.stop :]), dim=1)
        grads = torch.autograd.grad(kept.square().sum(), tensors)
        grads = [torch.cat((g[:, : inside.start], g[:, inside.stop :]), dim=1) for g in grads if g.dim() > 1]
        outputs.append([kept, final[0], final[2], *grads])
    for a, b in zip(*outputs, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", [*DECAY, "retention"])
def test_strong_decay_in_every_position_stays_finite_and_exact(name: str) -> None:
    inputs = make_inputs(name, 1, 130, dtype=torch.float32)
    index = DECAY.get(name, 3)
    inputs[index] = torch.full_like(inputs[index], -20.0).requires_grad_()
    state = make_state(name, 1, 2, dtype=torch.float32)
    chunked = results(OPS[name], inputs, state, backend="torch")
    assert_same(chunked, results(OPS[name], inputs, state, backend="reference"), 1e-5)
    inputs[index] = torch.full_like(inputs[index], -torch.inf)
    o, final = OPS[name](*inputs, initial_state=state, output_final_state=True)
    assert o.isfinite().all()
    assert final.isfinite().all()


@pytest.mark.parametrize("name", DECAY)
def test_weak_decay_keeps_its_precision_behind_a_strong_one(name: str) -> None:
    inputs = make_inputs(name, 1, 64, dtype=torch.float32)
    log_decay = -0.01 * torch.rand_like(inputs[DECAY[name]])
    log_decay[:, :48] = -20.0
    inputs[DECAY[name]] = log_decay.requires_grad_()
    expected = results(OPS[name], [x.detach().double().requires_grad_() for x in inputs], None, backend="reference")
    actual = results(OPS[name], inputs, None, backend="torch")
    assert_same([x.double() for x in actual], expected, 2e-6)


@pytest.mark.parametrize("name", ["gated_delta_rule", "kimi_delta_rule"])
def test_delta_rule_with_one_repeated_key_keeps_its_precision(name: str) -> None:
    inputs = make_inputs(name, 1, 256, dtype=torch.float32)
    inputs[1] = inputs[1][:, :1].expand_as(inputs[1]).detach().clone().requires_grad_()
    inputs[3:] = (torch.full_like(x, value).requires_grad_() for x, value in zip(inputs[3:], (0.0, 1.0)))
    expected = results(gated_delta_rule, [x.detach().double().requires_grad_() for x in inputs], None)
    actual = results(gated_delta_rule, inputs, None)
    del actual[5], expected[5]  # with beta = 1 the outputs do not depend on the decay: its gradient is rounding
    assert_same([x.double() for x in actual], expected, 1e-5)


@pytest.mark.parametrize("lengths", [None, [70, 3, 60]])
@pytest.mark.parametrize("name", OPS)
def test_bfloat16_is_near_float32(name: str, lengths: list[int] | None) -> None:
    documents = None if lengths is None else documents_of(lengths)
    inputs = make_inputs(name, 1, 133, dims=(32, 32), strongest=0.2, dtype=torch.float32)
    narrowed = range(VALUE.get(name, 2) + 1)
    narrow = [x.detach().bfloat16().requires_grad_() if i in narrowed else x for i, x in enumerate(inputs)]
    wide = [x.detach().float().requires_grad_() if i in narrowed else x for i, x in enumerate(narrow)]
    actual = results(OPS[name], narrow, None, documents=documents)
    assert (actual[0].dtype, actual[1].dtype) == (torch.bfloat16, torch.float32)
    expected = results(OPS[name], wide, None, documents=documents)
    assert_same([x.float() for x in actual], expected, 1e-2)


@pytest.mark.parametrize("lengths", [None, [16, 3, 1, 20]])
@pytest.mark.parametrize("name", OPS)
def test_gradcheck(name: str, lengths: list[int] | None) -> None:
    batch, time, sequences = (2, 18, 2) if lengths is None else (1, sum(lengths), len(lengths))
    documents = None if lengths is None else documents_of(lengths)
    inputs = make_inputs(name, batch, time, heads=(2, 1, 1), dims=(3, 2))
    # Decays of exactly 0 sit on the edge of the domain; the formulas do not mind positive ones this small.
    state = make_state(name, sequences, 2, (3, 2))

    op = hgrn if name == "hgrn" else functools.partial(OPS[name], scale=0.7)

    def run(*tensors: Tensor) -> tuple[Tensor, Tensor | None]:
        *inputs, state = tensors
        return op(*inputs, initial_state=state, output_final_state=True, documents=documents, backend="torch")

    assert torch.autograd.gradcheck(run, (*inputs, state), fast_mode=True)


@pytest.mark.parametrize("name", OPS)
def test_inputs_are_left_alone_and_may_be_views(name: str) -> None:
    inputs, state = make_inputs(name, 2, 64), make_state(name, 2, 2)
    expected = results(OPS[name], inputs, state)
    views = [x.detach().transpose(0, -1).contiguous().transpose(0, -1).requires_grad_() for x in inputs]
    before = [x.detach().clone() for x in (*views, state)]
    assert_same(results(OPS[name], views, state), expected, 1e-12)
    assert all(torch.equal(a, b) for a, b in zip((*views, state), before, strict=True))


@pytest.mark.parametrize("name", [name for name in OPS if name != "hgrn"])
def test_final_state_only_on_request_and_scale_default(name: str) -> None:
    inputs = make_inputs(name, 1, 30)
    o, final = OPS[name](*inputs)
    assert final is None
    assert error(o, OPS[name](*inputs, scale=0.25)[0]) < 1e-12


def test_layout_of_equal_whole_chunks_needs_no_index() -> None:
    assert chunk_layout((0, 128, 256), torch.device("cpu")).index is None
    assert chunk_layout((0, 128, 257), torch.device("cpu")).index is not None
    assert chunk_layout(tuple(range(0, 3001, 3)), torch.device("cpu")).spans == ((0, 1000),)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": (2, 8, 16)}, r"q must be \[B, T, H, D\]"),
        ({"k": (2, 8, 2, 15)}, "same key dimension"),
        ({"v": (2, 9, 2, 8)}, "v must begin with q's"),
        ({"k": (2, 8, 3, 16), "log_decay": (2, 8, 4, 16)}, "k has 3 heads"),
        ({"log_decay": (2, 8, 2, 5)}, "log_decay must be"),
        ({"initial_state": (1, 2, 16, 8)}, "initial_state must be"),
        ({"documents": Documents((0, 8))}, "batch size must be 1"),
        ({"backend": "fast"}, "choose auto or one of torch, reference"),
    ],
)
def test_bad_inputs_are_refused(change: dict[str, object], message: str) -> None:
    shapes = {"q": (2, 8, 2, 16), "k": (2, 8, 2, 16), "v": (2, 8, 2, 8), "log_decay": (2, 8, 2, 16)}
    arguments = {name: torch.zeros(shape) for name, shape in shapes.items()}
    for name, value in change.items():
        arguments[name] = torch.zeros(value) if isinstance(value, tuple) else value
    with pytest.raises(ValueError, match=message):
        gla(**arguments)


@pytest.mark.parametrize("bounds", [[0, 4], [1, 8], [0, 4, 4, 8], [0, 6, 5, 8], [8]])
def test_bad_bounds_are_refused(bounds: list[int]) -> None:
    inputs = make_inputs("gla", 1, 8)
    with pytest.raises(ValueError, match="cu_seqlens must"):
        gla(*inputs, documents=Documents(tuple(bounds)))


def test_a_decay_of_another_width_than_the_keys_is_refused() -> None:
    q, k, v, log_decay, beta = make_inputs("kimi_delta_rule", 1, 8)
    with pytest.raises(ValueError, match=r"log_decay must be \[B, T, H, 16\]"):
        gated_delta_rule(q, k, v, log_decay[..., :15], beta)


@pytest.mark.parametrize("lengths", [[150], [70, 1, 79]])
def test_a_decay_constant_over_channels_is_one_per_head(lengths: list[int]) -> None:
    inputs, documents = make_inputs("gated_delta_rule", 1, 150), documents_of(lengths)
    state = make_state("gated_delta_rule", len(lengths), 2)

    def per_channel(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, *rest: Tensor, **kwargs: object):
        return gated_delta_rule(q, k, v, log_decay[..., None].expand(-1, -1, -1, 16), *rest, **kwargs)

    expected = results(gated_delta_rule, inputs, state, documents=documents)
    assert_same(results(per_channel, inputs, state, documents=documents), expected, 1e-10)


def test_without_decay_kimi_delta_attention_is_the_delta_rule() -> None:
    q, k, v, log_decay, beta = make_inputs("kimi_delta_rule", 2, 100, strongest=0.0)
    actual = gated_delta_rule(q, k, v, log_decay, beta, output_final_state=True)
    assert_same(list(actual), list(delta_rule(q, k, v, beta, output_final_state=True)), 1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_delta_rule_is_bit_by_bit_the_gated_one_with_decays_of_1(dtype: torch.dtype) -> None:
    q, k, v, beta = make_inputs("delta_rule", 1, 150, heads=(4, 2, 2), dtype=dtype)
    state = make_state("delta_rule", 3, 4, dtype=torch.float32).to(torch.promote_types(dtype, torch.float32)).detach()
    packing = {"documents": documents_of([70, 1, 79]), "backend": "torch"}
    state.requires_grad_()
    without = results(delta_rule, [q, k, v, beta], state, **packing)
    ones = results(gated_delta_rule, [q, k, v, torch.zeros_like(beta).requires_grad_(), beta], state, **packing)
    del ones[5]  # the gradient of the decay
    for a, b in zip(without, ones, strict=True):
        assert torch.equal(a, b)


def test_retention_is_gated_linear_attention_with_a_fixed_decay() -> None:
    q, k, v, log_decay = make_inputs("retention", 2, 100)
    actual = retention(q, k, v, log_decay, output_final_state=True)
    every = log_decay[None, None, :, None].expand(2, 100, -1, 16)
    assert_same(list(actual), list(gla(q, k, v, every, output_final_state=True)), 1e-12)


def test_retention_refuses_a_decay_per_token() -> None:
    q, k, v, log_decay = make_inputs("retention", 1, 8)
    with pytest.raises(ValueError, match=r"log_decay must be \[H\]"):
        retention(q, k, v, log_decay.expand(1, 8, -1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": (2, 8)}, r"x must be a floating-point tensor \[B, T, D\]"),
        ({"log_decay": (2, 8, 4)}, "log_decay must be a floating-point tensor of x's shape"),
        ({"initial_state": (2, 4)}, r"initial_state must be \[N, D\]"),
    ],
)
def test_hgrn_refuses_what_does_not_fit(change: dict[str, tuple[int, ...]], message: str) -> None:
    shapes = {"x": (2, 8, 3), "log_decay": (2, 8, 3)} | change
    with pytest.raises(ValueError, match=message):
        hgrn(**{name: torch.zeros(shape) for name, shape in shapes.items()})


@pytest.mark.parametrize("name", ["gla", "hgrn", "kimi_delta_rule"])
def test_a_very_long_sequence_stays_exact(name: str) -> None:
    time = 1 << 16
    inputs = [x.detach() for x in make_inputs(name, 1, time, heads=(1, 1, 1), dims=(4, 4), dtype=torch.float32)]
    inputs[DECAY[name]] = inputs[DECAY[name]] * 1e-3
    o, final = OPS[name](*inputs, output_final_state=True)
    expected, expected_final = OPS[name](*(x.double() for x in inputs), output_final_state=True)
    assert error(o[:, -64:], expected[:, -64:]) < 2e-5
    assert error(final, expected_final) < 2e-5
