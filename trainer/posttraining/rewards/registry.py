"""Rewards by name or import path, and their settings. Imports no reward before it is used."""

import ast
import difflib
import functools
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from trainer.errors import ConfigError
from trainer.posttraining.rewards.adapters import SIGNATURES, Signature, adapt
from trainer.posttraining.rewards.base import Reward

_HERE = "trainer.posttraining.rewards"
BUILT_IN = {
    "exact": f"{_HERE}.exact:exact",
    "numeric": f"{_HERE}.numeric:numeric",
    "math_verify": f"{_HERE}.math_verification:math_verify",
    "pattern": f"{_HERE}.pattern:pattern",
    "tags": f"{_HERE}.tags:tags",
    "sql": f"{_HERE}.sql:sql",
    "python_tests": f"{_HERE}.python_tests:python_tests",
    "reasoning_gym": f"{_HERE}.gym:reasoning_gym",
}
"""What makes each reward: a function of its options."""


@dataclass
class RewardConfig:
    """One reward.

    Attributes:
        name: One of BUILT_IN, or a function of yours: package.module:function or path/to/file.py:function.
        weight: Its factor in the sum of several.
        label: Its name in figures; null takes the name.
        options: Of a built-in reward what its function takes (docs/rewards.md), of yours further keyword arguments.
        signature: How yours is called: verl, trl, trl_chat, openrlhf, or answer, with one trainer.posttraining.rewards.
            base.Answer; auto goes by the names of its parameters.
        seconds: An answer that takes longer to score is worth 0, and its worker is replaced.
        memory_bytes: Memory that scoring may take beyond what the worker has after loading; null sets no limit.
    """

    name: str = "exact"
    weight: float = 1.0
    label: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    signature: Signature = "auto"
    seconds: float = 10.0
    memory_bytes: int | None = 2 << 30

    def __post_init__(self) -> None:
        if not self.seconds > 0:
            raise ConfigError(f"seconds is {self.seconds}: it must be more than 0")
        if self.memory_bytes is not None and self.memory_bytes < 1 << 24:
            raise ConfigError(f"memory_bytes is {self.memory_bytes}: it must be at least {1 << 24}, or null")
        if not abs(self.weight) < float("inf"):
            raise ConfigError(f"weight is {self.weight}: it must be a finite number")
        if self.signature not in SIGNATURES:
            raise ConfigError(f"signature is {self.signature!r}: choose from {', '.join(SIGNATURES)}")

    @property
    def shown(self) -> str:
        """Its name in figures."""
        return self.label or self.name


def check(configs: Sequence[RewardConfig]) -> None:
    """Check names, paths and options without running anything of the user's.

    Raises:
        ConfigError: a reward cannot be made, or two have the same label.
    """
    if not configs:
        raise ConfigError(f"rewards: there is none; name one of {', '.join(BUILT_IN)}, or a function")
    labels = [config.shown for config in configs]
    for label in labels:
        if labels.count(label) > 1:
            raise ConfigError(f"rewards: two are called {label}; give each a label of its own")
    for config in configs:
        if ":" in config.name:
            check_path(config.name)
        else:
            build(config)


def build(config: RewardConfig) -> Reward:
    """Make a reward. Functions of users are imported, so this belongs into a worker.

    Raises:
        ConfigError: there is no such reward, or it does not take these options.
    """
    if ":" in config.name:
        return adapt(imported(config.name), config.signature, config.options)
    make = maker(config)
    _check_options(config, make)
    try:
        return make(**config.options)
    except ConfigError as error:
        raise ConfigError(f"rewards: {config.shown}: {error}") from error
    except TypeError as error:
        raise ConfigError(f"rewards: {config.shown}: an option has a value of the wrong type ({error})") from error


def maker(config: RewardConfig) -> Callable[..., Reward]:
    """What makes a built-in reward from its options.

    Raises:
        ConfigError: there is no such reward.
    """
    if config.name not in BUILT_IN:
        near = difflib.get_close_matches(config.name, BUILT_IN, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(BUILT_IN)}, or MODULE:FUNCTION"
        raise ConfigError(f"rewards: there is no reward {config.name!r}; {hint}")
    module, _, name = BUILT_IN[config.name].partition(":")
    make: Callable[..., Reward] = getattr(importlib.import_module(module), name)
    return make


def _check_options(config: RewardConfig, make: Callable[..., Reward]) -> None:
    parameters = inspect.signature(make).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    for option in config.options:
        if option not in parameters:
            near = difflib.get_close_matches(option, parameters, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(parameters)}"
            raise ConfigError(f"rewards: {config.shown} has no option {option!r}; {hint}")


def _split(path: str) -> tuple[str, str]:
    place, _, name = path.rpartition(":")
    if not place or not name.isidentifier():
        raise ConfigError(f"rewards: {path!r} is no package.module:function, nor path/to/file.py:function")
    return place, name


def check_path(path: str) -> None:
    """Find a module or file, and the function or class in it, without running it.

    Raises:
        ConfigError: there is none.
    """
    place, name = _split(path)
    source = Path(place) if place.endswith(".py") else _source_of(place)
    if source is None:
        raise ConfigError(f"rewards: there is no module {place!r}; check its name, and that it is on PYTHONPATH")
    if not source.is_file():
        raise ConfigError(f"rewards: there is no file {place}; check the path")
    if source.suffix != ".py":
        return
    try:
        tree = ast.parse(source.read_bytes())
    except (SyntaxError, ValueError) as error:
        raise ConfigError(f"rewards: {source} is not valid Python ({error}); mend it") from error
    names = set(_names(tree))
    # `from x import *` may bring any.
    if name not in names and "*" not in names:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "; name one that is defined at its top level"
        raise ConfigError(f"rewards: {place} has no {name!r}{hint}")


def _source_of(module: str) -> Path | None:
    """The file of a module; its packages are not imported."""
    parts = module.split(".")
    # By all finders: an editable installation has one of its own.
    found = importlib.util.find_spec(parts[0])
    for end in range(2, len(parts) + 1):
        if found is None:
            return None
        found = PathFinder.find_spec(".".join(parts[:end]), list(found.submodule_search_locations or []))
    return Path(found.origin) if found is not None and found.origin is not None else None


def _names(tree: ast.AST) -> list[str]:
    """Names that a module binds, wherever outside of functions and classes."""
    found = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            found.append(node.name)
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            found += [alias.asname or alias.name.split(".")[0] for alias in node.names]
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.append(node.id)
        found += _names(node)
    return found


@functools.cache
def _module(place: str) -> Any:
    if not place.endswith(".py"):
        return importlib.import_module(place)
    # As a script's, its directory comes first, so that it can import its neighbours.
    path = Path(place).resolve()
    sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(f"reward_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def imported(path: str) -> Callable[..., Any]:
    """The function or class at a path; its module runs.

    Raises:
        ConfigError: it cannot be imported.
    """
    place, name = _split(path)
    try:
        function = getattr(_module(place), name)
    # A module of the user's may raise anything.
    except Exception as error:
        raise ConfigError(f"rewards: {path} cannot be imported ({type(error).__name__}: {error}); mend it") from error
    if not callable(function):
        raise ConfigError(f"rewards: {path} is no function; name one")
    return function
