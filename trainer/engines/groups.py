"""The process groups of a run: creation, timeout, gloo sockets and destruction."""

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

# `initialize` sets these and `close` resets them. Every group created in between uses them.
_timeout: timedelta | None = None
_gloo_devices: list[Any] = []


def backend_of(device: torch.device) -> str:
    """Name the torch.distributed backend for tensors on a device."""
    return "gloo" if device.type == "cpu" else "nccl"


def initialize(device: torch.device, seconds: float) -> None:
    """Create the group of all ranks, unless it exists.

    Every group created afterwards, including those of mcore and DeepSpeed, waits at most `seconds` in a collective. On
    a CPU all groups share one gloo device. Without a launcher this process is the only rank, and an in-process store
    avoids the need for a port.
    """
    global _timeout
    _timeout = timedelta(seconds=seconds)
    if device.type == "cpu" and not _gloo_devices:
        _gloo_devices.extend(_make_devices())
    # mcore and DeepSpeed call torch's constructor themselves, so the timeout is set inside torch.
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
    """Create a CPU group of all ranks for checkpoint writes, which may run in a thread beside training collectives.

    Returns None for a single rank. Every rank calls this.
    """
    return dist.new_group(backend="gloo") if dist.get_world_size() > 1 else None


def close() -> None:
    """Destroy every group of this process, including mcore's. Dropping a group's last reference ends its threads."""
    global _timeout
    mcore: Any = sys.modules.get("megatron.core.parallel_state")
    if mcore is not None:
        mcore.destroy_model_parallel()
        # mcore's own destructor misses this one.
        mcore._INTRA_PARTIAL_DATA_PARALLEL_GROUP_WITH_CP = None
    if dist.is_initialized():
        dist.destroy_process_group()
    _timeout = None
    _gloo_devices.clear()


# Typed as Any, because torch's stubs omit members that this file uses.
_C10D: Any = distributed_c10d


def _make_devices() -> list[Any]:
    gloo = distributed_c10d.ProcessGroupGloo
    # Same rule as torch: the named interfaces, else the interface that the host name resolves to.
    interfaces = os.environ.get("GLOO_SOCKET_IFNAME", "")
    if interfaces:
        return [gloo.create_device(interface=name) for name in interfaces.split(",")]
    return [gloo.create_default_device()]


class _GlooOnSharedDevice(distributed_c10d.ProcessGroupGloo):
    """A gloo process group on the device that all groups of this process share.

    By default torch gives each group its own gloo device, and the thread of each device wakes a hundred times a second.
    A rank of mcore has some twenty groups.
    """

    def __init__(self, store: Any, rank: int, size: int, timeout: timedelta) -> None:
        options = _C10D.ProcessGroupGloo._Options()
        options._devices = _gloo_devices
        options._timeout = timeout
        # torch's default: two threads per device.
        options._threads = 2 * len(_gloo_devices)
        super().__init__(store, rank, size, options)


def _as_one(helper: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap torch's group constructor to apply the timeout and the gloo device of this process."""

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
