"""Counts the bytes that a rank sends, where torch.distributed hands tensors to a process group."""

from collections import Counter
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class SentBytes(TorchDispatchMode):
    """Counts the bytes that this rank sends while the mode is active, as ring algorithms on P ranks would send them.

    all_gather: (P - 1) m for a rank's own m bytes. reduce_scatter: (P - 1) / P m for the whole m bytes. all_reduce:
    twice that. all-to-all: the bytes for other ranks. Point-to-point: m.

    Attributes:
        by_group: Bytes, keyed by (`group.group_name`, collective).
    """

    def __init__(self) -> None:
        super().__init__()
        self.by_group: Counter[tuple[str, str]] = Counter()

    def total(self, group: dist.ProcessGroup) -> int:
        """Return the bytes sent within a group."""
        return sum(size for (name, _), size in self.by_group.items() if name == group.group_name)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count a collective and run it."""
        # Collectives are dispatched as operators of the namespace c10d, whichever function called them.
        if func.namespace == "c10d":
            name = func._schema.name.removeprefix("c10d::").strip("_")
            group = next(dist.ProcessGroup.unbox(arg) for arg in args if _is_group(arg))
            self.by_group[group.group_name, name] += _sent(name, args, group)
        return func(*args, **(kwargs or {}))


def _is_group(value: Any) -> bool:
    return hasattr(value, "_type") and value._type().name() == "ProcessGroup"


def _sent(name: str, args: Any, group: dist.ProcessGroup) -> int:
    # Argument positions follow the schemas of the c10d operators.
    ranks = group.size()
    match name:
        case "allgather":
            return (ranks - 1) * sum(x.nbytes for x in args[1])
        case "allgather_base":
            return int((ranks - 1) * args[1].nbytes)
        case "allgather_into_tensor_coalesced":
            return (ranks - 1) * sum(x.nbytes for x in args[1])
        case "allreduce" | "allreduce_coalesced":
            return 2 * (ranks - 1) * sum(x.nbytes for x in args[0]) // ranks
        case "reduce_scatter_base":
            return int((ranks - 1) * args[1].nbytes // ranks)
        case "reduce_scatter_tensor_coalesced":
            return (ranks - 1) * sum(x.nbytes for x in args[1]) // ranks
        case "reduce_scatter":
            return (ranks - 1) * sum(x.nbytes for parts in args[1] for x in parts) // ranks
        case "reduce":
            return (ranks - 1) * sum(x.nbytes for x in args[0]) // ranks
        case "alltoall_base":
            whole: Tensor = args[1]
            splits = args[4] or [len(whole) // ranks] * ranks
            row = whole.nbytes // max(len(whole), 1)
            return int((sum(splits) - splits[group.rank()]) * row)
        case "send":
            return sum(x.nbytes for x in args[0])
        case "gather":
            return sum(x.nbytes for x in args[1])
        case "scatter":
            return sum(x.nbytes for parts in args[1] for x in parts)
        case "broadcast":
            return (ranks - 1) * sum(x.nbytes for x in args[0]) // ranks
        case "recv" | "barrier":
            return 0
    # An unknown collective must not silently count as 0 bytes.
    raise RuntimeError(f"{name} is not counted")
