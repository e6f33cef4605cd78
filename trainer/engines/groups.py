"""The process groups of a run: those of all ranks, their timeout, the sockets of gloo, and their end."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

# What every group of this process is made with, from `initialize` to `close`.
_timeout: timedelta | None = None
_gloo_devices: list[Any] = []


def backend_of(device: torch.device) -> str:
    """The backend that speaks for tensors on a device."""
    return "gloo" if device.type == "cpu" else "nccl"


def initialize(device: torch.device, seconds: float) -> None:
    """Make the group of all ranks, unless it is there.

    Every group made from now on, by mcore and DeepSpeed too, waits at most `seconds` in a collective; on a CPU they
    share one gloo device. Without a launcher this is the only rank: a store in the process needs no port.
    """
    global _timeout
    _timeout = timedelta(seconds=seconds)
    if device.type == "cpu" and not _gloo_devices:
        _gloo_devices.extend(_make_devices())
    if not hasattr(distributed_c10d._new_process_group_helper, "__wrapped__"):
        distributed_c10d._new_process_group_helper = _as_one(distributed_c10d._new_process_group_helper)
    if dist.is_initialized():
        return
    if "MASTER_ADDR" in os.environ:
        dist.init_process_group(backend_of(device))
    else:
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend_of(device), store=store, rank=0, world_size=1)


def saving_group() -> dist.ProcessGroup | None:
    """A group of all ranks for CPU tensors, for saves alone: a thread may write one while training uses the others.

    None where there is one rank. Every rank calls it.
    """
    return dist.new_group(backend="gloo") if dist.get_world_size() > 1 else None


def close() -> None:
    """Destroy every group of this process, mcore's too. The last reference to each ends the threads that serve it."""
    global _timeout
    mcore: Any = sys.modules.get("megatron.core.parallel_state")
    if mcore is not None:
        mcore.destroy_model_parallel()
        # Which mcore forgets.
        mcore._INTRA_PARTIAL_DATA_PARALLEL_GROUP_WITH_CP = None
    if dist.is_initialized():
        dist.destroy_process_group()
    _timeout = None
    _gloo_devices.clear()


# The module, whose types do not tell all that it has.
_C10D: Any = distributed_c10d


def _make_devices() -> list[Any]:
    gloo = distributed_c10d.ProcessGroupGloo
    # As torch reads it: interfaces by name, else the one that the host's name resolves to.
    interfaces = os.environ.get("GLOO_SOCKET_IFNAME", "")
    if interfaces:
        return [gloo.create_device(interface=name) for name in interfaces.split(",")]
    return [gloo.create_default_device()]


class _GlooOnSharedDevice(distributed_c10d.ProcessGroupGloo):
    """gloo's group on the device that all groups of this process share.

    Each device has a thread that wakes a hundred times a second, and torch gives each group a device of its own: a
    rank of mcore's has some twenty groups.
    """

    def __init__(self, store: Any, rank: int, size: int, timeout: timedelta) -> None:
        options = _C10D.ProcessGroupGloo._Options()
        options._devices = _gloo_devices
        options._timeout = timeout
        # As torch has it.
        options._threads = 2 * len(_gloo_devices)
        super().__init__(store, rank, size, options)


def _as_one(helper: Callable[..., Any]) -> Callable[..., Any]:
    """Torch's maker of groups, with the timeout and the gloo device of this process."""

    @wraps(helper)
    def make(*args: Any, **kwargs: Any) -> Any:
        if _timeout is None:
            return helper(*args, **kwargs)
        with _shared_gloo_device():
            return helper(*args, **kwargs | {"timeout": _timeout})

    return make


@contextmanager
def _shared_gloo_device() -> Iterator[None]:
    own = distributed_c10d.ProcessGroupGloo
    if _gloo_devices:
        _C10D.ProcessGroupGloo = _GlooOnSharedDevice
    try:
        yield
    finally:
        _C10D.ProcessGroupGloo = own
