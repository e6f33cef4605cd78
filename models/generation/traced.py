"""Decoding steps without the work of Python: blocks as traces, or compiled.

A decoding step of one row is hundreds of small operations, and Python takes longer to call them than the processor to
compute them. A trace (torch.jit) is the list of a block's operations for a number of rows; it runs them alone, on the
same weights and states, with the same results to the last bit. Measured, it takes a third of the time of the block.

Compiled (torch.compile's backend, inductor), the operations between two products become one loop. A step takes half to
nine tenths of the time that it takes with traces, but rounds differently, and needs a C++ compiler, half a minute the
first time, and seconds for each number of rows.

Softmax layers look up pages between two traces: one up to the attention, and one after it.
"""

import os
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kernels.attention import KeysValues
from models.decoder import Block, Decoder, RunBlock
from models.mixers.base import LayerCache, SequenceInfo
from models.mixers.parallel_branches import ParallelBranches
from models.mixers.softmax import FullAttention
from models.moe.layer import MoELayer
from models.spiking import Scheduled

# Steps with a number of rows before their blocks are traced: a trace takes as long as this many steps.
_STEPS_BEFORE = 64

Trace = Callable[..., Any]
# Makes the trace of a function that uses a block, from example inputs.
Make = Callable[[nn.Module, Callable[..., Any], tuple[Tensor, ...]], Trace]


class Tracer:
    """Runs blocks of a model, by traces where these exist and are allowed.

    A block is run as a module if it exchanges messages with other ranks, has experts, whose rows are counted in Python,
    neurons, whose thresholds depend on the training step, or branches with attention.

    Args:
        model: The decoder.
        compile: Compile the blocks instead of tracing them.
        at_once: Do so from the first step on.

    Raises:
        ValueError: there is no C++ compiler to compile with.
    """

    def __init__(self, model: Decoder, compile: bool = False, at_once: bool = False) -> None:
        self._make: Make = _Compiler(model.head_weight.device) if compile else _traced
        self._at_once = at_once
        self._may_trace = {block for block in model.layers.values() if _may_trace(block)}
        self._steps: Counter[int] = Counter()
        # By number of rows, then by block.
        self._traces: dict[int, dict[nn.Module, tuple[Trace, Trace | None]]] = {}

    @contextmanager
    def step(self, rows: int) -> Iterator[RunBlock | None]:
        """A decoding step with so many rows: what runs its blocks; None for the blocks themselves."""
        self._steps[rows] += 1
        if self._steps[rows] <= _STEPS_BEFORE and not self._at_once:
            yield None
            return
        # The optimizing executor would specialize every trace once more, and gain nothing without a compiler.
        with torch.jit.optimized_execution(False):  # type: ignore[attr-defined]
            yield partial(self._run, self._traces.setdefault(rows, {}))

    def _run(
        self,
        traces: dict[nn.Module, tuple[Trace, Trace | None]],
        block: nn.Module,
        x: Tensor,
        info: SequenceInfo,
        cache: LayerCache | None,
    ) -> Tensor:
        """Run a block on x [1, n, D], by its trace if it has one or may have one."""
        assert cache is not None, "decoding has caches"
        known = traces.get(block)
        if known is None:
            if block not in self._may_trace:
                result: Tensor = block(x, info, cache)
                return result
            known = traces[block] = _trace(self._make, block, x, info, cache)
        before, after = known
        inputs = _inputs(info, cache)
        found = before(x, *inputs)
        if after is None:
            return found
        assert cache.store is not None
        q, k, v = found
        sinks = None if info.sinks is None else info.sinks.by_mixer.get(block.get_submodule("mixer"))
        return after(x, cache.store.attend(q, {"k": k, "v": v}, sinks), *inputs)


def _may_trace(block: nn.Module) -> bool:
    assert isinstance(block, Block)
    if block.groups.tensor is not None or isinstance(block.ffn, MoELayer):
        return False
    if any(isinstance(module, Scheduled) for module in block.modules()):
        return False
    branches = block.mixer.branches if isinstance(block.mixer, ParallelBranches) else ()
    return not any(isinstance(branch, FullAttention) for branch in branches)


def _inputs(info: SequenceInfo, cache: LayerCache) -> list[Tensor]:
    """The tensors that a block reads besides x and its weights."""
    tensors = [x for x in (info.cos, info.sin, info.lower_bound) if x is not None]
    tensors += cache.tensors.values()
    for branch in cache.branches.values():
        tensors += branch.tensors.values()
    return tensors


def _with_inputs(info: SequenceInfo, cache: LayerCache, given: Sequence[Tensor]) -> tuple[SequenceInfo, LayerCache]:
    """The same with other tensors, in the order of `_inputs`."""
    left = iter(given)
    fields: dict[str, Any] = {
        name: next(left) for name in ("cos", "sin", "lower_bound") if getattr(info, name) is not None
    }
    own = {name: next(left) for name in cache.tensors}
    branches = {
        number: LayerCache({name: next(left) for name in branch.tensors}) for number, branch in cache.branches.items()
    }
    return replace(info, rows=None, token_keys=None, **fields), LayerCache(own, branches)


class _Reached(Exception):
    """A block has reached its attention."""

    def __init__(self, q: Tensor, entries: dict[str, Tensor]) -> None:
        super().__init__()
        self.tensors = (q, entries["k"], entries["v"])


class _Interrupt:
    """A store that ends the block where it attends."""

    def attend(self, q: Tensor, entries: dict[str, Tensor], sinks: KeysValues | None) -> Tensor:
        raise _Reached(q, entries)


class _Part(nn.Module):
    """A function that uses a block: tracing takes parameters from modules alone."""

    def __init__(self, block: nn.Module, function: Callable[..., Any]) -> None:
        super().__init__()
        self.block = block
        self._function = function

    def forward(self, *tensors: Tensor) -> Any:
        return self._function(*tensors)


def _trace(
    make: Make, block: nn.Module, x: Tensor, info: SequenceInfo, cache: LayerCache
) -> tuple[Trace, Trace | None]:
    """The trace of a block, or those of its two parts around an attention."""
    # Tracing runs the block once: on copies, or states would advance twice.
    copies = [_copy(tensor) for tensor in _inputs(info, cache)]

    def whole(x: Tensor, *tensors: Tensor) -> Tensor:
        own_info, own_cache = _with_inputs(info, cache, tensors)
        result: Tensor = block(x, own_info, own_cache)
        _check_states(own_cache, tensors)
        return result

    def before(x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        own_info, own_cache = _with_inputs(info, cache, tensors)
        own_cache.store = _Interrupt()
        try:
            block(x, own_info, own_cache)
        except _Reached as reached:
            return reached.tensors
        raise AssertionError("a softmax layer attends")

    def after(x: Tensor, o: Tensor, *tensors: Tensor) -> Tensor:
        own_info, own_cache = _with_inputs(info, cache, tensors)
        assert isinstance(block, Block) and isinstance(block.mixer, FullAttention), "only attention has a store"
        # Not by running the block again: a trace keeps products that nothing reads, such as the queries.
        x = x + block.mixer.project(o, x if block.mixer.g_proj is None else block.mixer_norm(x))
        return x + block.feed_forward(x, own_info, own_cache)

    if cache.store is None:
        return make(block, whole, (x, *copies)), None
    first = make(block, before, (x, *copies))
    q = first(x, *copies)[0]
    return first, make(block, after, (x, torch.empty_like(q), *copies))


def _copy(x: Tensor) -> Tensor:
    """A copy with the same strides, which a compiled block insists on: rows of states have gaps between them."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x)


def _check_states(cache: LayerCache, given: Sequence[Tensor]) -> None:
    """Every state was advanced in its memory: a trace cannot put a new tensor in its place."""
    known = {tensor.data_ptr() for tensor in given}
    for own in (cache, *cache.branches.values()):
        assert all(tensor.data_ptr() in known for tensor in own.tensors.values()), "kernels advance states in place"


def _traced(block: nn.Module, function: Callable[..., Any], inputs: tuple[Tensor, ...]) -> Trace:
    with warnings.catch_warnings():
        # Tracing warns of every shape that Python reads. Shapes are fixed here: a trace is for a number of rows.
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
        warnings.simplefilter("ignore", DeprecationWarning)
        traced: Trace = torch.jit.trace(_Part(block, function), inputs, check_trace=False)
    return traced


class _Compiler:
    """Makes compiled functions. Blocks with the same operations share one, for it takes parameters as inputs."""

    def __init__(self, device: torch.device) -> None:
        self._known: dict[Any, Trace] = {}
        if device.type == "cpu" and not any(map(shutil.which, (os.environ.get("CXX") or "g++", "clang++"))):
            raise ValueError("compile needs a C++ compiler: install g++, or leave compile out")

    def __call__(self, block: nn.Module, function: Callable[..., Any], inputs: tuple[Tensor, ...]) -> Trace:
        # Slow to import, and rarely needed.
        import torch._inductor
        from torch.fx.experimental.proxy_tensor import make_fx

        part = _Part(block, function)
        state = dict(part.named_parameters()) | dict(part.named_buffers())
        # The parameters themselves: whoever trains may give them other memory.
        own: list[Tensor] = list(state.values())

        def call(*tensors: Tensor) -> Any:
            values = dict(zip(state, tensors, strict=False))
            return torch.func.functional_call(part, values, tensors[len(own) :])

        examples = [*own, *inputs]
        graph = make_fx(call)(*examples)
        key = (graph.code, *((x.dtype, x.shape, x.stride()) for x in examples))
        if any(node.op == "get_attr" for node in graph.graph.nodes) or key not in self._known:
            self._known[key] = torch._inductor.compile(graph, list(examples))
        compiled = self._known[key]
        return lambda *tensors: compiled(*own, *tensors)
