"""Running kernels on shapes alone: on tensors without memory, as the planner does.

CPU kernels process their inputs in cache-sized blocks, and loop over experts or tiles by numbers read from tensors. The
tensors that autograd saves depend on neither. Within `shapes_only` kernels use one block, and skip loops that only fill
allocated memory.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_SHAPES_ONLY = ContextVar("shapes_only", default=False)


@contextmanager
def shapes_only() -> Iterator[None]:
    """Context in which tensors have shapes but no values."""
    token = _SHAPES_ONLY.set(True)
    try:
        yield
    finally:
        _SHAPES_ONLY.reset(token)


def has_values() -> bool:
    """Whether tensors have values, so that loops over their values can run."""
    return not _SHAPES_ONLY.get()


def block_limit(elements: int) -> int:
    """Return the elements per block on the CPU: `elements`, or no limit on shapes alone."""
    return elements if has_values() else 1 << 62
