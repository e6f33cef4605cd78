"""Which implementation of an operation runs: the argument, then the environment, then the first that is available."""

import logging
import os
from collections.abc import Sequence

ENVIRONMENT_VARIABLE = "SPIKETRAIN_BACKEND"

_logger = logging.getLogger("spiketrain")
_logged: set[tuple[str, str]] = set()


def resolve(op: str, backend: str, available: Sequence[str]) -> str:
    """Choose the implementation of `op`.

    Args:
        op: the operation's public name, such as "attention".
        backend: the caller's wish; "auto" leaves the choice to the environment and then to `available`.
        available: the implementations that can run on these inputs, the preferred one first.

    Returns:
        One of `available`. Each new (op, choice) is logged once, at INFO, to the logger "spiketrain".

    Raises:
        ValueError: the argument or SPIKETRAIN_BACKEND asks for something that is not in `available`.

    SPIKETRAIN_BACKEND holds one name for every operation ("reference") or a list by operation
    ("gla=reference,attention=sdpa"); the two mix, and an entry for the operation beats the general one.
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
    """The name that SPIKETRAIN_BACKEND gives `op`, "auto" where it gives none."""
    general = "auto"
    for entry in os.environ.get(ENVIRONMENT_VARIABLE, "").split(","):
        name, equals, value = (part.strip() for part in entry.partition("="))
        if equals and name == op:
            return value
        if name and not equals:
            general = name
    return general
