"""Environments: what answers a model's turns, so that an answer to a prompt becomes a dialogue.

An environment is a class of the user's, or Calculator. An episode begins with `reset`, and each of the model's turns is
one `step`. Like rewards, environments run in processes that are killed when they hang or crash, so nothing of an
episode is kept there: a reply is computed by a fresh environment that is led through the turns so far. The same turns
must therefore have the same replies.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from trainer.errors import ConfigError
from trainer.posttraining.rewards.base import Answer
from trainer.posttraining.rewards.registry import RewardConfig, imported

TURNS = "environment_turns"
"""Column of the row that carries the model's turns to a worker."""


@dataclass(frozen=True)
class Reply:
    """What an environment says to a turn.

    Attributes:
        text: What the model reads before its next turn.
        done: Whether the episode is over; the text is then not read.
        reward: Added to the rewards of the whole answer.
    """

    text: str = ""
    done: bool = False
    reward: float = 0.0


class Environment(Protocol):
    """One episode."""

    def reset(self, row: Answer) -> None:
        """Begin: the row's prompt, ground truth and further columns; its completion is empty."""

    def step(self, turn: str) -> Reply:
        """Answer a turn of the model, given as text without the token that ends it."""


@dataclass
class EnvironmentConfig:
    """An environment that answers the model's turns (docs/posttraining.md).

    Attributes:
        name: Import path of a class, package.module:Class or path/to/file.py:Class; null for answers of one turn.
        options: Keyword arguments of the class.
        turns: Most turns of the model in an answer.
        role: Role of the replies in the chat template; text without template is continued with the reply as it stands.
        max_reply_tokens: Longer replies are cut at their end.
        seconds: A reply that takes longer ends the episode, as an error.
        memory_bytes: Memory that a reply may take; null sets no limit.
    """

    name: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    turns: int = 4
    role: str = "tool"
    max_reply_tokens: int = 256
    seconds: float = 10.0
    memory_bytes: int | None = 2 << 30

    def __post_init__(self) -> None:
        for name in ("turns", "max_reply_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"environment.{name} is {getattr(self, name)}: it must be at least 1")
        if self.name is not None and ":" not in self.name:
            raise ConfigError(
                f"environment.name is {self.name!r}: give package.module:Class or path/to/file.py:Class, for example "
                f"{__name__}:Calculator"
            )

    @property
    def worker(self) -> RewardConfig:
        """What a pool of rewards computes replies with."""
        return RewardConfig(
            f"{__name__}:reply",
            label="environment",
            options={"name": self.name, "options": self.options},
            signature="answer",
            seconds=self.seconds,
            memory_bytes=self.memory_bytes,
        )


def reply(answer: Answer, name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The reply of an environment to the last of a row's TURNS, as a reward's value, parts and text."""
    *earlier, last = answer.extra[TURNS]
    environment: Environment = imported(name)(**options)
    environment.reset(answer)
    for turn in earlier:
        environment.step(turn)
    said = environment.step(last)
    return {"score": said.reward, "done": float(said.done), "text": said.text}


class Calculator:
    """Computes what the model writes between <calc> and </calc>; a turn without it is the last.

    It knows numbers, + - * / // % ** and brackets. The reply is the value, or what is wrong.
    """

    def reset(self, row: Answer) -> None:
        """Begin; nothing depends on the row."""

    def step(self, turn: str) -> Reply:
        """Compute the last expression of the turn."""
        found = re.findall(r"<calc>(.*?)</calc>", turn, re.DOTALL)
        return Reply(calculate(found[-1])) if found else Reply(done=True)


_MOST_OPERAND = 10**12
_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_UNARY: dict[type[ast.unaryop], Callable[[Any], Any]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}


def calculate(text: str) -> str:
    """The value of an arithmetic expression as text, or `error: ` and what is wrong with it."""
    try:
        value = _value(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError) as error:
        return f"error: {error}" if type(error) in (ValueError, ZeroDivisionError) else "error: no expression"
    return f"{value:.10g}" if isinstance(value, float) else str(value)


def _value(node: ast.expr) -> int | float:
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            return number
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _UNARY:
            return _UNARY[type(op)](_value(operand))  # type: ignore[no-any-return]
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            a, b = _value(left), _value(right)
            # Otherwise a short expression computes for hours.
            if max(abs(a), abs(b)) > _MOST_OPERAND or (isinstance(op, ast.Pow) and abs(b) > 32):
                raise ValueError("a number is too large")
            value = _BINARY[type(op)](a, b)
            if isinstance(value, complex):
                raise ValueError("no real number")
            return value  # type: ignore[no-any-return]
    raise ValueError("only numbers, + - * / // % ** and brackets")
