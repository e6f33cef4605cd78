"""Reward functions of other libraries as rewards of one answer.

The three public signatures, told apart by the names of their parameters:

- verl: compute_score(data_source, solution_str, ground_truth, extra_info=None) -> a number, or a dict with "score".
- TRL: reward(prompts, completions, completion_ids, **columns) -> a list of numbers or None. Every column of the row is
  a list; here `ground_truth`, `data_source` and what `extra` holds. "trl_chat" gives completions as messages.
- OpenRLHF: reward_func(queries, prompts, labels) -> a dict with "rewards" and maybe "scores" and "extra_logs", or
  the rewards alone. A query is prompt and completion, a label the ground truth.

Functions of TRL and OpenRLHF see batches of one: one that compares the answers of a batch with each other cannot be
used.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from trainer.errors import ConfigError
from trainer.posttraining.rewards.base import Answer, Reward

Signature = Literal["auto", "answer", "verl", "trl", "trl_chat", "openrlhf"]
SIGNATURES = ("auto", "answer", "verl", "trl", "trl_chat", "openrlhf")


def choose_signature(function: Callable[..., Any]) -> str:
    """The signature of a function, by the names of its parameters.

    Raises:
        ConfigError: it is none of them.
    """
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError) as error:
        raise ConfigError("the reward's parameters cannot be read; name its signature") from error
    names = set(parameters)
    if {"solution_str", "ground_truth"} <= names:
        return "verl"
    if "completions" in names:
        return "trl"
    if {"queries", "labels"} <= names or {"queries", "prompts"} <= names:
        return "openrlhf"
    needed = [name for name, parameter in parameters.items() if _is_needed(parameter)]
    if len(needed) == 1:
        return "answer"
    raise ConfigError(
        f"the reward's parameters ({', '.join(parameters)}) are of no known signature; name it: "
        f"{', '.join(SIGNATURES[1:])}"
    )


def _is_needed(parameter: inspect.Parameter) -> bool:
    return parameter.default is parameter.empty and parameter.kind in (
        parameter.POSITIONAL_ONLY,
        parameter.POSITIONAL_OR_KEYWORD,
    )


def adapt(function: Callable[..., Any], signature: str = "auto", options: Mapping[str, Any] | None = None) -> Reward:
    """The function as a reward of one answer.

    Args:
        function: The function.
        signature: One of SIGNATURES.
        options: Further keyword arguments of each call.

    Raises:
        ConfigError: the signature is not known.
    """
    signature = choose_signature(function) if signature == "auto" else signature
    options = dict(options or {})
    if signature == "answer":
        return lambda answer: function(answer, **options)
    if signature == "verl":
        return lambda answer: function(
            data_source=answer.data_source,
            solution_str=answer.completion,
            ground_truth=answer.ground_truth,
            extra_info=answer.extra,
            **options,
        )
    if signature in ("trl", "trl_chat"):
        return lambda answer: _call_trl(function, answer, options, signature == "trl_chat")
    if signature == "openrlhf":
        return lambda answer: _call_openrlhf(function, answer, options)
    raise ConfigError(f"there is no signature {signature!r}; choose from {', '.join(SIGNATURES)}")


def _call_trl(function: Callable[..., Any], answer: Answer, options: Mapping[str, Any], chat: bool) -> Any:
    parameters = inspect.signature(function).parameters
    columns = {"ground_truth": answer.ground_truth, "data_source": answer.data_source, **answer.extra}
    messages = answer.extra.get("messages") or [{"role": "user", "content": answer.prompt}]
    said = [{"role": "assistant", "content": answer.completion}]
    arguments = {name: [value] for name, value in columns.items()}
    arguments |= {
        "prompts": [messages if chat else answer.prompt],
        "completions": [said if chat else answer.completion],
    }
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        arguments = {name: value for name, value in arguments.items() if name in parameters}
    return _only(function(**{**arguments, **options}))


def _call_openrlhf(function: Callable[..., Any], answer: Answer, options: Mapping[str, Any]) -> Any:
    returned = function([answer.prompt + answer.completion], [answer.prompt], [answer.ground_truth], **options)
    if not isinstance(returned, Mapping):
        return _only(returned)
    parts = {name: _only(value) for name, value in (returned.get("extra_logs") or {}).items()}
    if returned.get("scores") is not None:
        # "score" is the name of the reward itself.
        parts["scores"] = _only(returned["scores"])
    return parts | {"score": _only(returned.get("rewards"))}


def _only(values: Any) -> Any:
    """The element of a batch of one, which may be a list or a tensor; a number is itself."""
    if isinstance(values, Sequence) and not isinstance(values, str):
        return values[0] if len(values) == 1 else None
    # Tensors and arrays of one element.
    reshape = getattr(values, "reshape", None)
    return reshape(-1)[0] if reshape is not None else values
