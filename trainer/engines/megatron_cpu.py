"""megatron-core on a machine without an accelerator, over gloo.

The only place that adapts the library. Where there is a GPU only plans use it, and every adaptation is bound to the
version it was written for: another version is refused rather than half adapted. What is adapted, and why:

- `device="cuda"` literals, `torch.cuda.current_device()`, streams and synchronisation: mcore's modules get a view of
  torch in which those mean the CPU (`_TorchOnCpu`). torch itself is not changed, so the program's other modules, and
  the hot path, never see it.
- The optimizers and the clipping of gradients accept tensors by `Tensor.type()`, a string that names CUDA: in those
  calls CPU tensors give the CUDA names (`cpu_tensors_pass_for_cuda`).
- The exchange of tokens between experts copies what it counts to the host, as numpy arrays, where it is on a GPU, and
  hands it to collectives that want plain numbers: here, where it is on the host already, it becomes them, too.
- `torch.compile` decorates mcore's fused functions, none of which runs here. Only to be applied it imports dynamo and
  inductor, a third of a start: while mcore is imported it returns what it is given (`nothing_compiled`).
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
    """Refuse a megatron-core that this file was not written for.

    Raises:
        RuntimeError: with the version to install.
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
    """A stream of a device that has none: everything has always finished."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.device = torch.device("cpu")

    def wait_stream(self, stream: Any) -> None:
        """Return at once."""

    def synchronize(self) -> None:
        """Return at once."""

    def record_event(self) -> "_Stream":
        """An event to wait for, which has happened."""
        return self


class _CudaOnCpu(ModuleType):
    """`torch.cuda` as mcore's modules see it."""

    Stream = _Stream

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)

    def current_device(self) -> torch.device:
        """The device that mcore allocates on."""
        return torch.device("cpu")

    def current_stream(self, *args: Any) -> _Stream:
        """The stream that mcore waits for."""
        return _Stream()

    default_stream = current_stream

    def stream(self, stream: Any) -> Any:
        """Enter a stream."""
        return nullcontext()

    def synchronize(self, *args: Any) -> None:
        """Wait for the device."""

    def empty_cache(self) -> None:
        """Free cached device memory."""


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
    """Point every loaded megatron.core module at the CPU. Idempotent; call after importing what is used of mcore.

    Raises:
        RuntimeError: megatron-core's version is another than SUPPORTED_VERSION.
    """
    check_version()
    dispatcher: Any = importlib.import_module("megatron.core.transformer.moe.token_dispatcher")
    dispatcher.maybe_move_tensor_to_cpu = _as_plain_numbers
    _point_at_cpu()
    _skip_collectives_of_one_rank()


def _point_at_cpu() -> list[Any]:
    """The loaded modules of mcore that have been given the view."""
    view, found = _TorchOnCpu(), []
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core") and getattr(module, "torch", None) is torch:
            module.torch = view  # type: ignore[attr-defined]
            found.append(module)
    return found


@contextmanager
def on_cpu() -> Iterator[None]:
    """In here the loaded modules of mcore work on the CPU, also where there is a GPU: for plans, which compute nothing.

    Raises:
        RuntimeError: megatron-core's version is another than SUPPORTED_VERSION.
    """
    check_version()
    # What layers exchange by, which they import at its first use: now, for only loaded modules are adapted.
    importlib.import_module("megatron.core.tensor_parallel.mappings")
    modules = _point_at_cpu()
    try:
        yield
    finally:
        for module in modules:
            module.torch = torch


def _as_plain_numbers(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """Mcore's `maybe_move_tensor_to_cpu` for tensors that are there."""
    return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor


class _SkippedWhereAlone:
    """A collective that sums or joins the ranks' parts, left out where one rank's part is all there is."""

    def __init__(self, collective: Callable[..., Any]) -> None:
        self.collective = collective

    def __call__(self, output: torch.Tensor, part: torch.Tensor, *args: Any, group: Any = None, **kwargs: Any) -> Any:
        if torch.distributed.get_world_size(group) > 1:
            return self.collective(output, part, *args, group=group, **kwargs)
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
    """In here `torch.compile` gives functions back as they are, unless there is a GPU. For imports."""
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
    """In here `Tensor.type()` names CPU tensors as CUDA ones."""
    original_type = torch.Tensor.type

    def type_name(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = original_type(self, *args, **kwargs)
        return result.replace("torch.", "torch.cuda.", 1) if isinstance(result, str) else result

    torch.Tensor.type = type_name  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        torch.Tensor.type = original_type  # type: ignore[method-assign]
