"""Running kernels for the shapes of what they make: on tensors without memory, as the planner does.

Kernels on a CPU go through their inputs in blocks that fit its cache, and loop over experts or tiles by numbers that
are in tensors. What autograd saves depends on none of it. Within `shapes_only` they take one block, and leave out loops
that only fill what is allocated already.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_SHAPES_ONLY = ContextVar("shapes_only", default=False)


@contextmanager
def shapes_only() -> Iterator[None]:
    """In here tensors have shapes and no values."""
    token = _SHAPES_ONLY.set(True)
    try:
        yield
    finally:
        _SHAPES_ONLY.reset(token)


def has_values() -> bool:
    """Whether tensors have values, so that loops over what they hold can run."""
    return not _SHAPES_ONLY.get()


def block_limit(elements: int) -> int:
    """The elements of a block on the CPU: so many, or no limit where there is nothing to fit into a cache."""
    return elements if has_values() else 1 << 62
