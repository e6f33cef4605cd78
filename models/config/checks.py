"""What configurations say of values that they refuse."""


def require(condition: bool, message: str) -> None:
    """Refuse with one line what does not hold.

    Raises:
        ValueError: with the message.
    """
    if not condition:
        raise ValueError(message)


def require_positive(prefix: str, owner: object, *names: str) -> None:
    """Refuse values of `owner` that are not positive; `prefix` is its key.

    Raises:
        ValueError: one is not.
    """
    for name in names:
        value = getattr(owner, name)
        require(value > 0, f"{prefix}.{name} is {value}: it must be positive")
