"""Numbers, flags and layer lists of a config.json."""

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any


def whole(config: Mapping[str, Any], name: str, default: int | None = None) -> int:
    """A positive integer. A missing key takes the default, if there is one.

    Raises:
        ValueError: it is none.
        KeyError: it is missing, and has no default.
    """
    value = config[name] if default is None else config.get(name, default)
    # bool is a subclass of int.
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ValueError(f"{name}={value!r} is not a positive whole number; correct it")
    return value


def optional_whole(config: Mapping[str, Any], name: str, default: int | None = None) -> int | None:
    """A positive integer, or None where the key is null. A missing key takes the default.

    Raises:
        ValueError: it is neither.
    """
    value = config.get(name, default)
    return None if value is None else whole({name: value}, name)


def positive(name: str, value: Any) -> float:
    """A positive, finite number.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ValueError(f"{name}={value!r} is not a positive number; correct it")
    return float(value)


def flag(config: Mapping[str, Any], name: str, default: bool = False) -> bool:
    """A flag.

    Raises:
        ValueError: it is neither.
    """
    value = config.get(name, default)
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r} is neither true nor false; correct it")
    return value


def indices(name: str, value: Any, layers: int) -> list[int]:
    """Different layer indices, each in [0, layers).

    Raises:
        ValueError: the value is no list of them.
    """
    numbers = value if isinstance(value, list | tuple) else [None]
    if any(not isinstance(i, int) or isinstance(i, bool) or not 0 <= i < layers for i in numbers):
        raise ValueError(f"{name}={value!r} is not a list of layers, 0 to {layers - 1}; correct it")
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"{name}={value!r} names a layer twice; correct it")
    return list(numbers)


def pattern_of(mixers: Sequence[str]) -> str:
    """The shortest `model.mixers.pattern` that assigns these mixers to the layers."""
    period = next(
        size for size in range(1, len(mixers) + 1) if all(mixers[i] == mixers[i % size] for i in range(len(mixers)))
    )
    runs = [(name, len(list(run))) for name, run in groupby(mixers[:period])]
    return ", ".join(name if count == 1 else f"{name}*{count}" for name, count in runs)
