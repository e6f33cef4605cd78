"""Activation recomputation: a region of a block keeps what enters it, and runs again in backward (arXiv 1604.06174).

A block has two regions, its mixer and its feed-forward, each with the norm before it: the norm costs next to nothing,
and alone it would save nothing, for what it gives is kept by the projections that follow. Or it is one region as a
whole. Within a mixture of experts there are smaller ones (models.moe.layer). Collectives inside a region run again,
too, and before the collectives of its backward, on every rank alike.

No random state is kept: nothing in a block draws random numbers (there is no dropout), and reading the generators'
state would cost a copy to the host for every region. What a router's noise is drawn from are the tokens themselves.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import TypeVar, TypeVarTuple

import torch
from torch.utils.checkpoint import checkpoint

R = TypeVar("R")
Ts = TypeVarTuple("Ts")
_RECOMPUTING = ContextVar("recomputing", default=False)


def is_recomputing() -> bool:
    """Whether a region runs for the second time: what is counted in the first must not be counted again."""
    return _RECOMPUTING.get()


@contextmanager
def _second_run() -> Iterator[None]:
    token = _RECOMPUTING.set(True)
    try:
        yield
    finally:
        _RECOMPUTING.reset(token)


def _contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return nullcontext(), _second_run()


def run_region(recompute: bool, function: Callable[[*Ts], R], *args: *Ts) -> R:
    """What `function` gives; with `recompute` and gradients asked for, without keeping what it makes on the way.

    The second run ends with the last tensor that backward needs, which enters the last matrix product of the region;
    the sum over tensor-parallel ranks that follows the product is not taken again, on any of them. Where mixers run
    side by side, their sums are, for the norms that follow keep them.
    """
    if not (recompute and torch.is_grad_enabled()):
        return function(*args)
    output: R = checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, context_fn=_contexts)
    return output
