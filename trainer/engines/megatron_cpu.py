"""Adapts megatron-core to a machine without an accelerator, over gloo.

No other file adapts the library. On a GPU machine only planning uses this one. Each adaptation is bound to the mcore
version it was written for, and any other version is refused. The adaptations and their reasons:

- mcore has `device="cuda"` literals and calls `torch.cuda.current_device()`, streams and synchronisation. Its modules
  get a view of torch in which these mean the CPU (`_TorchOnCpu`). torch itself stays unchanged, so neither other
  modules nor the hot path are affected.
- The optimizers and the gradient clipping check tensors by `Tensor.type()`, a string that names CUDA. During those
  calls CPU tensors report the CUDA names (`cpu_tensors_pass_for_cuda`).
- On a GPU the token dispatcher copies its counts to the host as numpy arrays and passes them to collectives that expect
  plain numbers. On a CPU the counts are on the host already, and this file converts them to numpy as well.
- `torch.compile` decorates mcore's fused functions, none of which runs here. Applying it imports dynamo and inductor,
  a third of the start-up time. While mcore is imported it returns functions unchanged (`nothing_compiled`).
"""

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import ModuleType
from typing import Any

import torch

SUPPORTED_VERSION = "0.16.1"

_FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "rand", "randn", "arange", "empty_like", "zeros_like")


def check_version() -> None:
    """Refuse a megatron-core version that this file was not written for.

    Raises:
        RuntimeError: the version differs; the message names the version to install.
    """
    from megatron.core import __version__

    if __version__ != SUPPORTED_VERSION:
        raise RuntimeError(
            f"megatron-core {__version__} on CPU is not supported: the adaptation was written for {SUPPORTED_VERSION}; "
            f"pip install megatron-core=={SUPPORTED_VERSION}"
        )


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        if str(kwargs.get("device", "cpu")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return factory(*args, **kwargs)

    return call


class _Stream:
    """A stream on a device without streams: all work has always finished."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.device = torch.device("cpu")

    def wait_stream(self, stream: Any) -> None:
        """Return at once."""

    def synchronize(self) -> None:
        """Return at once."""

    def record_event(self) -> "_Stream":
        """Return an event that has already happened."""
        return self


class _CudaOnCpu(ModuleType):
    """`torch.cuda` as mcore's modules see it."""

    Stream = _Stream

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)

    def current_device(self) -> torch.device:
        """Return the device that mcore allocates on."""
        return torch.device("cpu")

    def current_stream(self, *args: Any) -> _Stream:
        """Return the stream that mcore waits for."""
        return _Stream()

    default_stream = current_stream

    def stream(self, stream: Any) -> Any:
        """Enter a stream."""
        return nullcontext()

    def synchronize(self, *args: Any) -> None:
        """Wait for the device: nothing to do."""

    def empty_cache(self) -> None:
        """Free cached device memory: nothing to do."""


class _TorchOnCpu(ModuleType):
    """`torch` as mcore's modules see it."""

    def __init__(self) -> None:
        super().__init__("torch")
        self.cuda = _CudaOnCpu("torch.cuda")
        for name in _FACTORIES:
            setattr(self, name, _on_cpu(getattr(torch, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def adapt() -> None:
    """Redirect every loaded megatron.core module to the CPU. Idempotent. Call it after importing mcore's modules.

    Raises:
        RuntimeError: the megatron-core version is not SUPPORTED_VERSION.
    """
    check_version()
    dispatcher: Any = importlib.import_module("megatron.core.transformer.moe.token_dispatcher")
    dispatcher.maybe_move_tensor_to_cpu = _as_plain_numbers
    _point_at_cpu()
    _skip_collectives_of_one_rank()


def _point_at_cpu() -> list[Any]:
    """Give mcore's loaded modules the CPU view of torch, and return these modules."""
    view, found = _TorchOnCpu(), []
    for name, module in list(sys.modules.items()):
        # Modules that already hold a view are left alone, which makes `adapt` idempotent.
        if name.startswith("megatron.core") and getattr(module, "torch", None) is torch:
            module.torch = view  # type: ignore[attr-defined]
            found.append(module)
    return found


@contextmanager
def on_cpu() -> Iterator[None]:
    """Run mcore's loaded modules on the CPU inside this context, even on a GPU machine. Planning needs it.

    Raises:
        RuntimeError: the megatron-core version is not SUPPORTED_VERSION.
    """
    check_version()
    # Layers import this module at their first collective. Import it now, since only loaded modules are adapted.
    importlib.import_module("megatron.core.tensor_parallel.mappings")
    modules = _point_at_cpu()
    try:
        yield
    finally:
        for module in modules:
            module.torch = torch


def _as_plain_numbers(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """Replace mcore's `maybe_move_tensor_to_cpu` for tensors that are on the host already."""
    return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor


class _SkippedWhereAlone:
    """A reduce-scatter or all-gather that is skipped in a group of one rank, where output and input are equal."""

    def __init__(self, collective: Callable[..., Any]) -> None:
        self.collective = collective

    def __call__(self, output: torch.Tensor, part: torch.Tensor, *args: Any, group: Any = None, **kwargs: Any) -> Any:
        if torch.distributed.get_world_size(group) > 1:
            return self.collective(output, part, *args, group=group, **kwargs)
        # mcore may pass the same view of its buffer twice, which then needs no copy.
        if output.data_ptr() != part.data_ptr():
            output.copy_(part)
        return None


def _skip_collectives_of_one_rank() -> None:
    from megatron.core.distributed import param_and_grad_buffer as buffers

    for name in ("dist_reduce_scatter_func", "dist_all_gather_func"):
        collective = getattr(buffers, name)
        if not isinstance(collective, _SkippedWhereAlone):
            setattr(buffers, name, _SkippedWhereAlone(collective))


@contextmanager
def nothing_compiled() -> Iterator[None]:
    """Inside this context `torch.compile` returns functions unchanged, unless there is a GPU. Meant for imports."""
    if torch.cuda.is_available():
        yield
        return
    original = torch.compile

    def as_it_is(model: Any = None, **options: Any) -> Any:
        return as_it_is if model is None else model

    torch.compile = as_it_is
    try:
        yield
    finally:
        torch.compile = original


@contextmanager
def cpu_tensors_pass_for_cuda() -> Iterator[None]:
    """Inside this context `Tensor.type()` names CPU tensors as CUDA tensors."""
    original_type = torch.Tensor.type

    def type_name(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = original_type(self, *args, **kwargs)
        return result.replace("torch.", "torch.cuda.", 1) if isinstance(result, str) else result

    torch.Tensor.type = type_name  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        torch.Tensor.type = original_type  # type: ignore[method-assign]
