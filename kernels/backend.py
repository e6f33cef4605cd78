"""Choice of an operation's implementation: by argument, else by the environment, else the first available one."""

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch

ENVIRONMENT_VARIABLE = "SPIKETRAIN_BACKEND"

_logger = logging.getLogger("spiketrain")
_logged: set[tuple[str, str]] = set()


_GENERATING: ContextVar[bool] = ContextVar("generating", default=False)


@contextmanager
def generating() -> Iterator[None]:
    """Context of decoding steps, where kernels take forms for few tokens, in fewer operations and without gradients.

    Their results differ from those of training by rounding. So every other forward pass, such as a validation or a
    frozen teacher's, computes what training computes, to the last bit.
    """
    token = _GENERATING.set(True)
    try:
        yield
    finally:
        _GENERATING.reset(token)


def is_generating() -> bool:
    """Whether forms for few tokens may be taken: within `generating`, without gradients."""
    return _GENERATING.get() and not torch.is_grad_enabled()


def resolve(op: str, backend: str, available: Sequence[str]) -> str:
    """Choose the implementation of `op`.

    Args:
        op: the operation's public name, such as "attention".
        backend: the caller's choice; "auto" leaves it to the environment, then to `available`.
        available: the implementations that support these inputs, the preferred one first.

    Returns:
        One of `available`. Each new (op, choice) is logged once, at INFO, to the logger "spiketrain".

    Raises:
        ValueError: the argument or SPIKETRAIN_BACKEND names an implementation that is not in `available`.

    SPIKETRAIN_BACKEND holds one name for all operations ("reference"), a list by operation
    ("gla=reference,attention=sdpa"), or both. An entry for the operation overrides the general one.
    """
    choice, origin = backend, "argument backend"
    if choice == "auto":
        choice, origin = _from_environment(op), f"environment variable {ENVIRONMENT_VARIABLE}"
    if choice == "auto":
        choice = available[0]
    if choice not in available:
        raise ValueError(
            f"{op}: {origin} asks for {choice!r}, which does not exist for these inputs; choose auto or one of "
            f"{', '.join(available)}"
        )
    if (op, choice) not in _logged:
        _logged.add((op, choice))
        _logger.info("%s: backend %s", op, choice)
    return choice


def _from_environment(op: str) -> str:
    """Return the name in SPIKETRAIN_BACKEND for `op`; "auto" if there is none."""
    general, entries = "auto", os.environ.get(ENVIRONMENT_VARIABLE)
    # A decoding step asks hundreds of times.
    if not entries:
        return general
    for entry in entries.split(","):
        name, equals, value = (part.strip() for part in entry.partition("="))
        if equals and name == op:
            return value
        if name and not equals:
            general = name
    return general
