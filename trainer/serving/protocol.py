"""Requests of OpenAI's interface: reads and checks the JSON of completions and chat completions.

Source: the OpenAPI description of OpenAI's interface, https://github.com/openai/openai-openapi. top_k, min_p and
repetition_penalty are extensions, with the names that vLLM gives them.
"""

import difflib
import json
import secrets
from dataclasses import dataclass
from typing import Any, NoReturn

from models.generation import Sampling
from trainer.serving.errors import ApiError, bad_field, shortened

# Fields that do not change the answer.
_IGNORED = frozenset(
    (
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "parallel_tool_calls",
        "prediction",
    )
)
# Fields that are not supported, with the values that ask for nothing. null always does.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "logit_bias": ({},),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
}
_REFUSED_IN_COMPLETIONS = _REFUSED | {"echo": (False,), "suffix": ("",)}
_REFUSED_IN_CHAT = _REFUSED | {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none",),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
    "reasoning_effort": (),
    "verbosity": (),
    "moderation": (),
}
# The interface's own limits.
_STOPS, _ALTERNATIVES_OF_COMPLETIONS, _ALTERNATIVES_OF_CHAT, _TEMPERATURE = 4, 5, 20, 2.0
# Below, logits divided by a temperature may overflow; the draw is greedy by then (vLLM has the same bound).
_GREEDY = 1e-5
_COMPLETION_TOKENS = 16
_LARGEST_SEED = 2**63 - 1

Prompt = str | tuple[int, ...]


@dataclass(frozen=True)
class Limits:
    """What a request may ask for.

    Attributes:
        prompt_tokens: Tokens of a prompt.
        new_tokens: Tokens of a choice.
        choices: Choices of a request, over all its prompts.
    """

    prompt_tokens: int
    new_tokens: int
    choices: int


@dataclass(frozen=True)
class Asked:
    """What both kinds of requests have in common.

    Attributes:
        model: The model's name.
        sampling: How to draw, but for the stop tokens.
        samples: Choices for each prompt.
        stops: Strings that end a choice; they are not part of it.
        stream: Send pieces as they arrive.
        include_usage: Send the token counts at the end of a stream.
        log_probs: Whether to report log-probabilities.
    """

    model: str
    sampling: Sampling
    samples: int
    stops: tuple[str, ...]
    stream: bool
    include_usage: bool
    log_probs: bool


@dataclass(frozen=True)
class CompletionsAsked(Asked):
    """A request of /v1/completions.

    Attributes:
        prompts: Texts, or token ids; at least one.
    """

    prompts: tuple[Prompt, ...]


@dataclass(frozen=True)
class ChatAsked(Asked):
    """A request of /v1/chat/completions.

    Attributes:
        messages: The conversation; each has role and content, both text.
    """

    messages: tuple[dict[str, str], ...]


def parse_json(content: bytes) -> dict[str, Any]:
    """Parse the body of a request.

    Raises:
        ApiError: it is not a JSON object.
    """
    try:
        values = json.loads(content, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON ({error})", code="invalid_json") from error
    if not isinstance(values, dict):
        raise ApiError(400, "the body is not a JSON object", code="invalid_json")
    return values


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number of JSON")


def read_completions(values: dict[str, Any], limits: Limits) -> CompletionsAsked:
    """Read a request of /v1/completions.

    Raises:
        ApiError: a field is missing, wrong, unknown or not supported.
    """
    fields = _Fields(values)
    prompts = _prompts(fields.take("prompt"))
    alternatives = fields.integer("logprobs", None, 0, _ALTERNATIVES_OF_COMPLETIONS)
    samples = fields.integer("n", 1, 1, limits.choices)
    if samples * len(prompts) > limits.choices:
        raise bad_field("prompt", f"{len(prompts)} prompts x n {samples} exceed this server's {limits.choices} choices")
    if fields.integer("best_of", samples, 1, limits.choices) != samples:
        raise bad_field("best_of", "not supported; leave it out, or make it equal to n")
    return CompletionsAsked(
        **_common(fields, samples, alternatives, _COMPLETION_TOKENS, limits, _REFUSED_IN_COMPLETIONS), prompts=prompts
    )


def read_chat(values: dict[str, Any], limits: Limits) -> ChatAsked:
    """Read a request of /v1/chat/completions.

    Raises:
        ApiError: a field is missing, wrong, unknown or not supported.
    """
    fields = _Fields(values)
    messages = _messages(fields.take("messages"))
    wanted = fields.flag("logprobs")
    alternatives = fields.integer("top_logprobs", None, 0, _ALTERNATIVES_OF_CHAT)
    if alternatives is not None and not wanted:
        raise bad_field("top_logprobs", "needs logprobs to be true")
    samples = fields.integer("n", 1, 1, limits.choices)
    common = _common(
        fields, samples, (alternatives or 0) if wanted else None, limits.new_tokens, limits, _REFUSED_IN_CHAT
    )
    return ChatAsked(**common, messages=messages)


def _common(
    fields: "_Fields",
    samples: int,
    alternatives: int | None,
    new_tokens: int,
    limits: Limits,
    refused: dict[str, tuple[Any, ...]],
) -> dict[str, Any]:
    """The fields of Asked; `new_tokens` is the default. All fields but these have been taken."""
    stream = fields.flag("stream")
    include_usage = _include_usage(fields.take("stream_options"), stream)
    temperature = fields.number("temperature", 1.0, 0.0, _TEMPERATURE)
    top_p = fields.number("top_p", 1.0, 0.0, 1.0)
    if top_p == 0:
        raise bad_field("top_p", "must be more than 0")
    penalty = fields.number("repetition_penalty", 1.0, 0.01, 100.0)
    sampling = Sampling(
        max_new_tokens=_new_tokens(fields, min(new_tokens, limits.new_tokens), limits),
        temperature=temperature if temperature >= _GREEDY else 0.0,
        top_k=max(fields.integer("top_k", 0, -1, 1 << 31), 0),
        top_p=top_p,
        min_p=fields.number("min_p", 0.0, 0.0, 1.0),
        repetition_penalty=penalty,
        seed=fields.integer("seed", secrets.randbelow(_LARGEST_SEED), -_LARGEST_SEED - 1, _LARGEST_SEED),
        top_log_probs=alternatives or 0,
    )
    model = fields.take("model")
    if not isinstance(model, str):
        raise bad_field("model", "missing; /v1/models lists the one that is served")
    stops = _stops(fields.take("stop"))
    fields.finish(refused)
    return {
        "model": model,
        "sampling": sampling,
        "samples": samples,
        "stops": stops,
        "stream": stream,
        "include_usage": include_usage,
        "log_probs": alternatives is not None,
    }


def _new_tokens(fields: "_Fields", default: int, limits: Limits) -> int:
    newer = fields.integer("max_completion_tokens", None, 1, limits.new_tokens)
    older = fields.integer("max_tokens", None, 1, limits.new_tokens)
    if newer is not None and older is not None and newer != older:
        raise bad_field("max_tokens", "differs from max_completion_tokens; give one of them")
    return next(value for value in (newer, older, default) if value is not None)


def _include_usage(options: Any, stream: bool) -> bool:
    if options is None:
        return False
    if not stream:
        raise bad_field("stream_options", "needs stream to be true")
    if not isinstance(options, dict):
        raise bad_field("stream_options", "must be an object")
    inner = _Fields(options, "stream_options.")
    usage = inner.flag("include_usage")
    # Padding against traffic analysis, which changes no answer.
    inner.flag("include_obfuscation")
    inner.finish({})
    return usage


def _stops(value: Any) -> tuple[str, ...]:
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > _STOPS or not all(isinstance(stop, str) and stop for stop in stops):
        raise bad_field("stop", f"must be a text or a list of at most {_STOPS} texts, none of them empty")
    return tuple(stops)


def _prompts(value: Any) -> tuple[Prompt, ...]:
    if isinstance(value, str) or _is_ids(value):
        value = [value]
    if isinstance(value, list) and value and all(isinstance(prompt, str) or _is_ids(prompt) for prompt in value):
        prompts: tuple[Prompt, ...] = tuple(
            _utf8("prompt", prompt) if isinstance(prompt, str) else tuple(prompt) for prompt in value
        )
        return prompts
    raise bad_field("prompt", "must be a text, a list of token ids, or a list of those")


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(token) is int for token in value)


def _messages(value: Any) -> tuple[dict[str, str], ...]:
    if not isinstance(value, list) or not value:
        raise bad_field("messages", "must be a list of messages, at least one")
    return tuple(_message(f"messages[{number}]", message) for number, message in enumerate(value))


def _message(place: str, message: Any) -> dict[str, str]:
    if not isinstance(message, dict):
        raise bad_field(place, "must be an object with role and content")
    left = {name: value for name, value in message.items() if value is not None}
    role, content = left.pop("role", None), left.pop("content", None)
    if not isinstance(role, str):
        raise bad_field(f"{place}.role", "must be a text such as user")
    found = {"role": role, "content": _utf8(f"{place}.content", _content(f"{place}.content", content))}
    if isinstance(left.get("name"), str):
        found["name"] = _utf8(f"{place}.name", left.pop("name"))
    if left:
        raise bad_field(f"{place}.{shortened(next(iter(left)))}", "not supported")
    return found


def _content(place: str, content: Any) -> str:
    """Text, or parts that are all text."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise bad_field(place, "must be a text, or a list of parts of type text")
    texts = []
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else None
            raise bad_field(place, f"parts must be of type text, not {shortened(str(kind))}")
        texts.append(part["text"])
    return "".join(texts)


def _utf8(name: str, text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise bad_field(name, "has half of a surrogate pair, which is no character") from error
    return text


class _Fields:
    """The fields of a JSON object, taken one by one. null is the same as a missing field.

    Args:
        values: The object.
        prefix: Goes before the names in messages.
    """

    def __init__(self, values: dict[str, Any], prefix: str = "") -> None:
        self._left = {name: value for name, value in values.items() if value is not None}
        self._taken: list[str] = []
        self._prefix = prefix

    def take(self, name: str) -> Any:
        """The value; None if there is none."""
        self._taken.append(name)
        return self._left.pop(name, None)

    def flag(self, name: str) -> bool:
        """A boolean, false by default."""
        value = self.take(name)
        if value is not None and not isinstance(value, bool):
            raise bad_field(self._prefix + name, "must be true or false")
        return bool(value)

    def integer(self, name: str, default: Any, low: int, high: int) -> Any:
        """An integer from low to high."""
        value = self.take(name)
        if value is None:
            return default
        if type(value) is not int or not low <= value <= high:
            raise bad_field(self._prefix + name, f"must be an integer from {low} to {high}")
        return value

    def number(self, name: str, default: float, low: float, high: float) -> float:
        """A number from low to high."""
        value = self.take(name)
        if value is None:
            return default
        if type(value) not in (int, float) or not low <= value <= high:
            raise bad_field(self._prefix + name, f"must be a number from {low:g} to {high:g}")
        return float(value)

    def finish(self, refused: dict[str, tuple[Any, ...]]) -> None:
        """Refuse what is left, by name: a field that is ignored would give an answer to another question."""
        for name, value in self._left.items():
            if name in _IGNORED or (name in refused and value in refused[name]):
                continue
            if name in refused:
                raise bad_field(self._prefix + name, "not supported by this server; leave it out")
            name = shortened(name)
            near = difflib.get_close_matches(name, self._taken, n=1)
            hint = f"; did you mean {near[0]}?" if near else "; leave it out"
            raise ApiError(
                400, f"unknown field {self._prefix}{name}{hint}", param=self._prefix + name, code="unknown_parameter"
            )
