"""Every attention backend against the definition, and what no backend may do: leak, or spend T² memory or work."""

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from kernels import attention as module
from kernels.attention import attention, attention_reference
from kernels.documents import Documents
from tests.helpers import documents_of

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2}
SHAPES = [(1, 1, 4, 4), (4, 2, 8, 8), (4, 1, 8, 6), (2, 2, 6, 10)]  # H, Hkv, K, V


def _draw(shape: tuple[int, int, int, int], times: tuple[int, int], batch: int = 1) -> list[Tensor]:
    heads, key_heads, key_dim, value_dim = shape
    return [
        torch.randn(batch, times[0], heads, key_dim, dtype=torch.float64),
        torch.randn(batch, times[1], key_heads, key_dim, dtype=torch.float64),
        torch.randn(batch, times[1], key_heads, value_dim, dtype=torch.float64),
    ]


def _with_sinks(function: Any, inputs: list[Tensor], **options: Any) -> Tensor:
    """Attention over q, k, v and, if there are any, the sinks' keys and values."""
    return function(*inputs[:3], sinks=tuple(inputs[3:]) or None, **options)


def _compare(inputs: list[Tensor], backend: str, dtype: torch.dtype = torch.float64, **options: Any) -> None:
    """Output and gradients in `dtype` against the float64 reference on the same rounded inputs."""
    fast = [x.to(dtype).clone().requires_grad_() for x in inputs]
    exact = [x.detach().double().clone().requires_grad_() for x in fast]
    out, target = (
        _with_sinks(attention, fast, backend=backend, **options),
        _with_sinks(attention_reference, exact, **options),
    )
    grad = torch.randn(target.shape, dtype=torch.float64).to(dtype)
    out.backward(grad)
    target.backward(grad.double())
    assert out.dtype == dtype and out.shape == target.shape
    # A query that sees one key has no gradient; the floor keeps its rounding from being measured against zero.
    floor = 1e-2 * grad.double().norm()
    for result, expected in zip((out, *(x.grad for x in fast)), (target, *(x.grad for x in exact))):
        assert (result.detach().double() - expected).norm() <= TOLERANCE[dtype] * (expected.norm() + floor)


def _backends(window: int | None, longest: int) -> list[str]:
    return ["banded", "auto"] if window is not None and window < longest else ["sdpa", "banded", "auto"]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("window", [None, 1, 7, 64, 150, 299, 300, 1000])
def test_backends_match_reference(shape: tuple[int, int, int, int], window: int | None, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for backend in _backends(window, 300):
        _compare(_draw(shape, (300, 300), batch=2), backend, dtype, window=window)


@pytest.mark.parametrize("lengths", [(100, 100, 100), (1, 130, 40, 130, 1, 30), (332,), (5,)])
@pytest.mark.parametrize("window", [None, 16, 70, 500])
def test_packed_documents_match_reference(lengths: tuple[int, ...], window: int | None) -> None:
    torch.manual_seed(0)
    inputs = _draw((4, 2, 8, 8), (sum(lengths), sum(lengths)))
    for backend in _backends(window, max(lengths)):
        _compare(inputs, backend, window=window, documents=documents_of(lengths))


@pytest.mark.parametrize("queries", [1, 5, 100])
@pytest.mark.parametrize("window", [None, 1, 9, 140, 160])
def test_decoding_and_chunked_prefill_match_reference(queries: int, window: int | None) -> None:
    torch.manual_seed(0)
    _compare(_draw((4, 2, 8, 8), (queries, 160), batch=2), "auto", window=window)
    _compare(_draw((4, 2, 8, 8), (queries, 160), batch=2), "banded", window=window)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 90), min_size=1, max_size=5),
    st.integers(1, 100),
    st.sampled_from(SHAPES),
    st.floats(0.05, 2.0),
)
def test_any_packing(lengths: list[int], window: int, shape: tuple[int, int, int, int], scale: float) -> None:
    torch.manual_seed(0)
    inputs = _draw(shape, (sum(lengths), sum(lengths)))
    for backend in _backends(window, max(lengths)):
        _compare(inputs, backend, window=window, documents=documents_of(lengths), scale=scale)


def _draw_sinks(shape: tuple[int, int, int, int], count: int) -> list[Tensor]:
    _, key_heads, key_dim, value_dim = shape
    return [torch.randn(1, count, key_heads, size, dtype=torch.float64) for size in (key_dim, value_dim)]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("window", [None, 1, 64, 299, 1000])
def test_sinks_match_reference(shape: tuple[int, int, int, int], window: int | None, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    inputs = _draw(shape, (300, 300), batch=2) + _draw_sinks(shape, 7)
    _compare(inputs, "auto", dtype, window=window)
    _compare([inputs[0][:, -5:], *inputs[1:]], "auto", dtype, window=window)
    packed = [x[:1] for x in inputs]
    _compare(packed, "auto", dtype, window=window, documents=documents_of((1, 130, 40, 129)))


def test_sinks_are_the_first_keys_of_every_document_and_reach_beyond_the_window() -> None:
    """By hand: softmax over the sinks and the visible keys, token by token."""
    torch.manual_seed(0)
    q, k, v, sink_k, sink_v = _draw((2, 1, 4, 3), (9, 9)) + _draw_sinks((2, 1, 4, 3), 2)
    documents, window = documents_of((4, 5)), 3
    out = attention(q, k, v, window=window, documents=documents, sinks=(sink_k, sink_v))
    for t in range(9):
        first = max(0 if t < 4 else 4, t - window + 1)
        keys = torch.cat((sink_k[0, :, 0], k[0, first : t + 1, 0]))
        values = torch.cat((sink_v[0, :, 0], v[0, first : t + 1, 0]))
        expected = (q[0, t] @ keys.T / 2).softmax(-1) @ values
        torch.testing.assert_close(out[0, t], expected)


def test_tiles_that_split_the_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_TILE_SCORES", 64 * 64)
    _compare(_draw((6, 3, 8, 8), (150, 150), batch=2), "banded", window=40)
    _compare(_draw((6, 3, 8, 8), (150, 150), batch=2) + _draw_sinks((6, 3, 8, 8), 5), "banded", window=40)


@pytest.mark.parametrize("window", [None, 3])
def test_gradcheck(window: int | None) -> None:
    inputs = [x.requires_grad_() for x in _draw((2, 1, 3, 3), (7, 7))]
    assert torch.autograd.gradcheck(lambda *x: attention(*x, window=window, backend="banded"), inputs)


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("lengths", [(50, 50, 50), (30, 80, 40)])
def test_documents_do_not_leak(lengths: tuple[int, ...], window: int | None) -> None:
    documents = documents_of(lengths)
    inputs = _draw((4, 2, 8, 8), (150, 150))
    first, last = documents.bounds[1:3]
    others = torch.cat((torch.arange(first), torch.arange(last, 150)))
    for backend in (*_backends(window, 50), "reference"):
        before = attention(*inputs, window=window, documents=documents, backend=backend)
        changed = [x.clone() for x in inputs]
        for x in changed:
            x[:, first:last].normal_()
        after = attention(*changed, window=window, documents=documents, backend=backend)
        assert torch.equal(before[:, others], after[:, others])
        assert not torch.equal(before[:, first:last], after[:, first:last])


@pytest.mark.parametrize("backend", ["sdpa", "banded"])
def test_the_future_does_not_leak(backend: str) -> None:
    inputs = _draw((2, 2, 8, 8), (200, 200))
    before = attention(*inputs, backend=backend)
    for x in inputs:
        x[:, 150:].normal_()
    torch.testing.assert_close(attention(*inputs, backend=backend)[:, :150], before[:, :150], rtol=0, atol=1e-14)


class _LargestOutput(TorchDispatchMode):
    """The elements of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for item in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(item, Tensor):
                self.numel = max(self.numel, item.numel())
        return out


def _cost(time: int, window: int | None, backend: str) -> tuple[int, int]:
    """(multiply-adds, largest temporary) of forward and backward on one sequence."""
    inputs = [x.float().requires_grad_() for x in _draw((2, 1, 8, 8), (time, time))]
    with FlopCounterMode(display=False) as flops, _LargestOutput() as largest:
        attention(*inputs, window=window, backend=backend).sum().backward()
    return flops.get_total_flops() // 2, largest.numel


def test_window_makes_the_cost_linear() -> None:
    work, memory = _cost(2048, 100, "banded")
    doubled_work, doubled_memory = _cost(4096, 100, "banded")
    assert doubled_work <= 2.05 * work and doubled_memory <= 2 * memory
    # Seven products of H K multiply-adds for each score; a tile computes its own queries' width of scores in excess.
    assert doubled_work <= 7 * 4096 * (100 + 64) * 2 * 8
    assert doubled_memory <= max(module._TILE_SCORES, 4096 * 2 * 8)


@pytest.mark.parametrize("backend", ["sdpa", "banded"])
@pytest.mark.parametrize("lengths", [None, (1024, 1024), (1500, 548)])
def test_no_backend_holds_all_scores(backend: str, lengths: tuple[int, ...] | None) -> None:
    for value_dim in (8, 4, 16):
        inputs = [x.float().requires_grad_() for x in _draw((2, 1, 8, value_dim), (2048, 2048))]
        with _LargestOutput() as largest:
            documents = None if lengths is None else documents_of(lengths)
            attention(*inputs, documents=documents, backend=backend).sum().backward()
        # A block of queries against all keys: an eighth of the scores of the two query heads that share a key head.
        assert largest.numel <= 2 * 2048 * 2048 // 8


def test_flash_is_not_offered_without_cuda() -> None:
    inputs = [x.bfloat16() for x in _draw((2, 2, 8, 8), (4, 4))]
    with pytest.raises(ValueError, match=r"'flash'.*banded"):
        attention(*inputs, backend="flash")


def test_errors() -> None:
    q, k, v = _draw((4, 2, 8, 8), (6, 6))
    for wrong, message in (
        ((q[0], k, v), r"\[B, Tq, H, K\]"),
        ((q[..., :4], k, v), "share K"),
        ((q, k.float(), v), "dtype"),
        ((q[:, :, :3], k, v), "divide"),
        ((q, k[:, :3], v[:, :3]), "outnumber"),
    ):
        with pytest.raises(ValueError, match=message):
            attention(*wrong)
    with pytest.raises(ValueError, match="at least 1"):
        attention(q, k, v, window=0)
    with pytest.raises(ValueError, match="needs sinks"):
        attention(q, k, v, sinks=(k[:, :2], v[:, :3]))
    for bounds in ([0, 3], [1, 6], [0, 4, 3, 6]):
        with pytest.raises(ValueError, match="cu_seqlens"):
            attention(q, k, v, documents=Documents(tuple(bounds)))
    with pytest.raises(ValueError, match="B = 1"):
        attention(q[:, -1:], k, v, documents=documents_of([6]))
    with pytest.raises(ValueError, match="banded"):
        attention(q, k, v, window=2, backend="sdpa")


# flash-attn, which has no CPU form: what its documentation promises, in place of the library.


def _stand_in_for_flash() -> SimpleNamespace:
    def flash_attn_func(
        q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float, causal: bool, window_size: Any
    ) -> Tensor:
        """Query i sees the keys i + Tk - Tq - left to i + Tk - Tq + right; -1 is no bound."""
        k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
        place = torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1]
        key = torch.arange(k.shape[1])
        left, right = window_size[0], 0 if causal else window_size[1]
        visible = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool)
        if left >= 0:
            visible &= key >= place - left
        if right >= 0:
            visible &= key <= place + right
        scores = torch.einsum("bthk,bshk->bhts", q, k) * softmax_scale
        return torch.einsum("bhts,bshv->bthv", scores.masked_fill(~visible, -torch.inf).softmax(-1), v)

    def flash_attn_varlen_func(
        q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, **options: Any
    ) -> Tensor:
        bounds = cu_seqlens_q.tolist()
        assert cu_seqlens_q.dtype == torch.int32 and cu_seqlens_k.tolist() == bounds
        longest = max(end - start for start, end in itertools.pairwise(bounds))
        assert options.pop("max_seqlen_q") == options.pop("max_seqlen_k") == longest
        documents = [[x[None, start:end] for x in (q, k, v)] for start, end in itertools.pairwise(bounds)]
        return torch.cat([flash_attn_func(*document, **options)[0] for document in documents])

    return SimpleNamespace(flash_attn_func=flash_attn_func, flash_attn_varlen_func=flash_attn_varlen_func)


@pytest.mark.parametrize("window", [None, 1, 2, 5])
@pytest.mark.parametrize("lengths", [None, (4, 1, 7)], ids=["whole", "packed"])
def test_flash_is_asked_for_what_it_calls_it(
    monkeypatch: pytest.MonkeyPatch, lengths: tuple[int, ...] | None, window: int | None
) -> None:
    """Its window counts the keys before the query, ours the query's own as well."""
    monkeypatch.setattr(module, "_flash_attn", _stand_in_for_flash)
    monkeypatch.setattr(module, "_available", lambda *inputs: ["flash"])
    inputs = _draw((4, 2, 8, 8), (12, 12))
    _compare(inputs, "flash", window=window, documents=None if lengths is None else documents_of(lengths))


@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("queries", [1, 4])
def test_flash_over_a_cache(monkeypatch: pytest.MonkeyPatch, queries: int, window: int | None) -> None:
    monkeypatch.setattr(module, "_flash_attn", _stand_in_for_flash)
    monkeypatch.setattr(module, "_available", lambda *inputs: ["flash"])
    _compare(_draw((4, 2, 8, 8), (queries, 9)), "flash", window=window)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_gpu_is_given_has_a_fused_kernel(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    arrange, fused, calls = module._fused_operands, module.F.scaled_dot_product_attention, []

    def attend(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        calls.append((q.shape, k.shape, v.shape, options["enable_gqa"]))
        return fused(q, k, v, **options)

    monkeypatch.setattr(module, "_fused_operands", lambda q, k, v, on_gpu: arrange(q, k, v, True))
    monkeypatch.setattr(module.F, "scaled_dot_product_attention", attend)
    for shape in SHAPES:
        _compare(_draw(shape, (9, 9)), "sdpa", dtype)
        q, k, v, grouped = calls.pop()
        assert q[3] == k[3] == v[3] and q[3] % 8 == 0
        # The kernel that takes groups of queries does not take float32.
        assert grouped == (q[1] != k[1]) and not (grouped and dtype == torch.float32)


def test_no_gpu_has_a_fused_kernel_for_double_precision() -> None:
    for dtype, offered in ((torch.float64, False), (torch.float32, True)):
        q = SimpleNamespace(is_cuda=True, is_cpu=False, dtype=dtype, shape=(1, 9, 2, 8))
        assert ("sdpa" in module._available(q, q, q, None)) == offered
