"""Caches of tensors that every layer of a step asks for, and every kind of run shares."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar, cast

import torch
from torch.utils._python_dispatch import _disable_current_modes

P = ParamSpec("P")
R = TypeVar("R")


def cache_tensors(function: Callable[P, R]) -> Callable[P, R]:
    """`lru_cache` for a function that makes tensors from its arguments alone.

    What is kept is plain, whoever asked first: within `torch.inference_mode` it would be tensors that no later graph
    may save, and in a run on shapes alone tensors without memory.
    """

    @functools.lru_cache(maxsize=32)
    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.inference_mode(False), torch.no_grad(), _disable_current_modes():
            return function(*args, **kwargs)

    return cast(Callable[P, R], call)
