"""Checks that configurations share."""


def require(condition: bool, message: str) -> None:
    """Raise a one-line error unless `condition` holds.

    Raises:
        ValueError: with the message.
    """
    if not condition:
        raise ValueError(message)


def require_positive(prefix: str, owner: object, *names: str) -> None:
    """Require that the named attributes of `owner` are positive; `prefix` is the configuration key of `owner`.

    Raises:
        ValueError: one is not positive.
    """
    for name in names:
        value = getattr(owner, name)
        require(value > 0, f"{prefix}.{name} is {value}: it must be positive")
