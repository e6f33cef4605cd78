"""Formats of post-training data, recognised from the columns, and their adapters to one row type.

verl 0.9, and the rows that HPT and LUFFY (arXiv 2509.04419, 2504.14945) and DPH-RL (arXiv 2509.07430) add columns to;
TRL 1.x; OpenRLHF 0.11; reasoning-gym; and evaluation files of a prompt and its answer. Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.data.chat import Message
from trainer.errors import ConfigError
from trainer.posttraining.data.row import FORMATS, Format, Row, RowOptions

# A probability that a file stores as 0 has underflowed; its logarithm is that of the least normal float32.
_LEAST_PROBABILITY = 2.0**-126
_OTHER_MEDIA = ("image", "images", "video", "videos", "audio", "audios")


def recognise(columns: set[str], options: RowOptions, name: str) -> Format:
    """The format of a file with these columns.

    Args:
        columns: Names of the columns that have a value in some row.
        options: Names of columns; `format` other than auto is returned as it is.
        name: The file, for messages.

    Raises:
        ConfigError: no format has such columns, or `format` is none.
    """
    if options.format != "auto":
        if options.format not in FORMATS:
            raise ConfigError(f"rows: format {options.format} is none of auto, {', '.join(FORMATS)}")
        return options.format
    prompt, targets = options.prompt_key, {options.target_key, options.targets_key} & columns
    # More columns first: the rows of hpt and dph are verl's with some added.
    rules: tuple[tuple[bool, Format], ...] = (
        (prompt in columns and bool(targets), "hpt"),
        ({prompt, "reward_model"} <= columns and not columns.isdisjoint({"id", "acc"}), "dph"),
        ({prompt, "reward_model"} <= columns, "verl"),
        ({"chosen", "rejected"} <= columns, "trl_preference"),
        ("messages" in columns, "trl_messages"),
        ({prompt, "completion"} <= columns, "trl_completion"),
        ({prompt, "answer"} <= columns, "evaluation"),
        ({"question", "answer"} <= columns, "reasoning_gym"),
        (options.input_key in columns, "openrlhf"),
        (prompt in columns, "trl_prompt"),
        ("text" in columns, "trl_text"),
    )
    found = next((format for fits, format in rules if fits), None)
    if found is None:
        raise ConfigError(
            f"rows: the columns of {name} ({', '.join(sorted(columns)) or 'none'}) are of no known format; rename "
            "them, or name the columns in the options (prompt_key, input_key)"
        )
    return found


def adapt(record: Mapping[str, Any], format: Format, options: RowOptions, where: str, name: str) -> Row:
    """The row of a record.

    Args:
        record: The record's columns.
        format: Its format.
        options: Names of columns.
        where: The record's place and file, for messages.
        name: `Row.id` of a row without one.

    Raises:
        ConfigError: a column is missing or of another kind. Names the record.
    """
    columns = _Columns(record, options, where)
    columns.refuse_media()
    identity = columns.take("id")
    row = _ADAPTERS[format](columns)
    row["data_source"] = row.get("data_source") or options.data_source or Path(name.rpartition(":")[0]).stem
    if options.drop_system and _role(row["prompt"], 0) == "system":
        row["prompt"] = row["prompt"][1:]
    return Row(**row, id=name if identity is None else str(identity), extra=columns.rest)


class _Columns:
    """A record whose columns are taken one by one; `rest` is what nobody took."""

    def __init__(self, record: Mapping[str, Any], options: RowOptions, where: str) -> None:
        self.rest, self.options, self._where = dict(record), options, where

    def fault(self, message: str) -> ConfigError:
        return ConfigError(f"rows: {self._where}: {message}")

    def refuse_media(self) -> None:
        """Refuse images and the like, without which the task is another one."""
        for key in _OTHER_MEDIA:
            if self.rest.get(key):
                raise self.fault(f"has {key}, and models here read text only; leave such rows out")

    def take(self, key: str) -> Any:
        """The column's value; None if it is missing."""
        return self.rest.pop(key, None)

    def text(self, key: str) -> str:
        value = self.take(key)
        if not isinstance(value, str):
            raise self.fault(f'"{key}" must be a text, and is {_kind(value)}')
        return value

    def prompt(self, key: str) -> str | tuple[Message, ...]:
        """A text, or messages."""
        value = self.take(key)
        return value if isinstance(value, str) else self.as_messages(value, key)

    def messages(self, key: str) -> tuple[Message, ...]:
        return self.as_messages(self.take(key), key)

    def as_messages(self, value: Any, key: str) -> tuple[Message, ...]:
        """The value, if it is a conversation. Keys without a value are left out: parquet adds them to all messages."""
        valid = isinstance(value, list) and bool(value)
        if not valid or not all(isinstance(item, dict) and isinstance(item.get("role"), str) for item in value):
            raise self.fault(f'"{key}" must be a text or a list of messages with a role, and is {_kind(value)}')
        return tuple({name: entry for name, entry in item.items() if entry is not None} for item in value)

    def object(self, key: str) -> dict[str, Any]:
        value = self.take(key)
        if not isinstance(value, dict):
            raise self.fault(f'"{key}" must be an object, and is {_kind(value)}')
        return dict(value)

    def present(self, key: str) -> Any:
        """The value of a column that no row may lack."""
        value = self.take(key)
        if value is None:
            raise self.fault(f'has no "{key}"')
        return value

    def optional_text(self, key: str) -> str | None:
        return None if self.rest.get(key) is None else self.text(key)


def _kind(value: Any) -> str:
    if isinstance(value, list):
        return f"a list of {_kind(value[0])}" if value else "an empty list"
    names = {type(None): "missing", str: "a text", dict: "an object", bool: "true or false"}
    return names.get(type(value), f"a value of type {type(value).__name__}")


def _role(prompt: str | Sequence[Message], place: int) -> str | None:
    return None if isinstance(prompt, str) or not prompt else prompt[place]["role"]


def _verl(columns: _Columns) -> dict[str, Any]:
    """Rows of verl and DPH-RL: prompt, data_source, reward_model.ground_truth. `extra_info` stays an extra column."""
    reward = columns.object("reward_model")
    if "ground_truth" not in reward:
        raise columns.fault('"reward_model" has no "ground_truth"')
    truth = reward.pop("ground_truth")
    if reward:
        columns.rest["reward_model"] = reward
    return {
        "prompt": columns.prompt(columns.options.prompt_key),
        "data_source": columns.optional_text(columns.options.data_source_key),
        "ground_truth": truth,
    }


def _hpt(columns: _Columns) -> dict[str, Any]:
    """HPT and LUFFY: verl's row with demonstrations; rows without reward_model serve supervised learning only."""
    options = columns.options
    if columns.rest.get("reward_model") is not None:
        row = _verl(columns)
    else:
        prompt = columns.prompt(options.prompt_key)
        row = {"prompt": prompt, "data_source": columns.optional_text(options.data_source_key)}
    found: list[str] = []
    if (target := columns.take(options.target_key)) is not None:
        # The role is not read. Some files have the text itself.
        first = target[0] if isinstance(target, list) and target else target
        text = first.get("content") if isinstance(first, dict) else first
        if not isinstance(text, str):
            raise columns.fault(f'"{options.target_key}" must begin with a message that has a content')
        found.append(text)
    others = columns.take(options.targets_key) or []
    if not isinstance(others, list) or not all(isinstance(text, str) for text in others):
        raise columns.fault(f'"{options.targets_key}" must be a list of texts, and is {_kind(others)}')
    found += [text for text in others if text not in found]
    return row | {"demonstrations": tuple(found), "demonstration_log_probs": _log_probs(columns)}


def _log_probs(columns: _Columns) -> tuple[float, ...] | None:
    key = columns.options.target_probs_key
    values = None if key is None else columns.take(key)
    if values is None:
        return None
    # float32 files may round a probability to slightly above 1.
    if not isinstance(values, list) or not all(isinstance(p, int | float) and 0 <= p <= 1 + 1e-6 for p in values):
        raise columns.fault(f'"{key}" must be a list of probabilities, from 0 to 1')
    return tuple(math.log(min(max(p, _LEAST_PROBABILITY), 1.0)) for p in values)


def _trl_prompt(columns: _Columns) -> dict[str, Any]:
    """TRL's prompt-only rows. All other columns go to the reward functions."""
    options = columns.options
    source = columns.rest.get(options.data_source_key)
    return {"prompt": columns.prompt(options.prompt_key), "data_source": source if isinstance(source, str) else None}


def _conversation(messages: tuple[Message, ...]) -> dict[str, Any]:
    """A conversation to learn, with the messages before the last answer as the prompt."""
    end = len(messages) - (_role(messages, -1) == "assistant")
    return {"prompt": messages[:end], "conversation": messages}


def _trl_messages(columns: _Columns) -> dict[str, Any]:
    messages = columns.messages("messages")
    if all(message["role"] != "assistant" for message in messages):
        raise columns.fault('"messages" has no turn of the assistant to learn')
    return _conversation(messages)


def _trl_text(columns: _Columns) -> dict[str, Any]:
    return {"prompt": "", "demonstrations": (columns.text("text"),)}


def _trl_completion(columns: _Columns) -> dict[str, Any]:
    """A prompt with its completion, both texts or both messages. In messages, only the completion's are learned."""
    prompt, completion = columns.prompt(columns.options.prompt_key), columns.prompt("completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        return {"prompt": prompt, "demonstrations": (completion,)}
    if isinstance(prompt, str) or isinstance(completion, str):
        raise columns.fault("prompt and completion must both be texts, or both be messages")
    if all(message["role"] != "assistant" for message in completion):
        raise columns.fault('"completion" has no turn of the assistant to learn')
    return {"prompt": prompt, "conversation": prompt + completion, "learned_from": len(prompt)}


def _trl_preference(columns: _Columns) -> dict[str, Any]:
    """Two answers to a prompt, which has a column of its own, or is what both begin with."""
    chosen, rejected = columns.prompt("chosen"), columns.prompt("rejected")
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise columns.fault("chosen and rejected must both be texts, or both be messages")
    prompt: str | tuple[Message, ...]
    if columns.rest.get(columns.options.prompt_key) is not None:
        prompt = columns.prompt(columns.options.prompt_key)
        # UltraFeedback and others repeat the prompt in both conversations.
        if isinstance(prompt, tuple) and chosen[: len(prompt)] == rejected[: len(prompt)] == prompt:
            chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    else:
        length = next((i for i, (a, b) in enumerate(zip(chosen, rejected)) if a != b), min(len(chosen), len(rejected)))
        # As in TRL, the space before a word belongs to the answer.
        length -= length > 0 and chosen[length - 1] == " "
        prompt, chosen, rejected = chosen[:length], chosen[length:], rejected[length:]
    row = {"prompt": prompt, "chosen": _answer(chosen, columns), "rejected": _answer(rejected, columns)}
    if row["chosen"] == row["rejected"]:
        raise columns.fault("chosen and rejected are the same answer; leave such rows out")
    return row


def _answer(answer: str | tuple[Message, ...], columns: _Columns) -> str:
    if isinstance(answer, str):
        return answer
    if len(answer) != 1 or answer[0]["role"] != "assistant" or not isinstance(answer[0].get("content"), str):
        raise columns.fault("chosen and rejected must differ in one answer of the assistant, which is a text")
    return str(answer[0]["content"])


def _openrlhf(columns: _Columns) -> dict[str, Any]:
    options = columns.options
    prompt = columns.prompt(options.input_key)
    if isinstance(prompt, str) and options.input_template is not None:
        # Not str.format, which would read braces in the template's own text.
        prompt = options.input_template.replace("{}", prompt)
    row: dict[str, Any] = {"prompt": prompt, "data_source": columns.optional_text("datasource") or "default"}
    row["ground_truth"] = columns.take(options.label_key)
    if columns.rest.get(options.output_key) is not None:
        answer = columns.prompt(options.output_key)
        if isinstance(answer, str):
            return row | {"demonstrations": (answer,)}
        if isinstance(prompt, str):
            raise columns.fault("input and output must both be texts, or both be messages")
        return row | {"conversation": prompt + answer, "learned_from": len(prompt)}
    if not isinstance(prompt, str) and _role(prompt, -1) == "assistant":
        return row | _conversation(prompt)
    return row


def _reasoning_gym(columns: _Columns) -> dict[str, Any]:
    """question, answer, and metadata, which stay in `extra` because reasoning-gym's scorers read them."""
    metadata = columns.rest.get("metadata")
    source = metadata.get("source_dataset") if isinstance(metadata, dict) else None
    return {"prompt": columns.text("question"), "data_source": source, "ground_truth": columns.present("answer")}


def _evaluation(columns: _Columns) -> dict[str, Any]:
    prompt = columns.prompt(columns.options.prompt_key)
    return {"prompt": prompt, "data_source": columns.optional_text("source"), "ground_truth": columns.present("answer")}


_ADAPTERS: dict[Format, Callable[[_Columns], dict[str, Any]]] = {
    "verl": _verl,
    "hpt": _hpt,
    "dph": _verl,
    "trl_prompt": _trl_prompt,
    "trl_messages": _trl_messages,
    "trl_text": _trl_text,
    "trl_completion": _trl_completion,
    "trl_preference": _trl_preference,
    "openrlhf": _openrlhf,
    "reasoning_gym": _reasoning_gym,
    "evaluation": _evaluation,
}
