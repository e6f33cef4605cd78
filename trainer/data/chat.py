"""Chat templates: a conversation as the tokens that a chat model was trained on.

A template is a Jinja program that comes with a tokenizer, in chat_template.jinja or in tokenizer_config.json. It is
other people's code, so it runs in Jinja's sandbox, with the variables and functions that transformers gives it.
"""

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from trainer.data.tokenizer import Tokenizer, named_token, token_config
from trainer.errors import ConfigError

_FILE, _CONFIG_NAME = "chat_template.jinja", "tokenizer_config.json"
# Put into special tokens that a message spells out, which stay text that way. No tokenizer has it.
_BREAK = "\U000fe0de"
# All characters that mean something here, none of which a message may contribute.
_MARKS = dict.fromkeys((0xFE0DE, 0xFE0DF, 0xFE0E0))

Message = Mapping[str, Any]
"""A message of a conversation: at least `role` and `content`."""


class ChatTemplate:
    """The chat template of a tokenizer.

    Args:
        tokenizer: A tokenizer whose files include a template.

    Raises:
        ConfigError: there is no template, or it is no valid Jinja program.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        from jinja2 import TemplateError
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        from trainer.data.generation_marks import GenerationMarks

        self._tokenizer = tokenizer
        config = token_config(tokenizer.files)
        self._named = {key: name for key in _SPECIAL_KEYS if (name := named_token(config, key)) is not None}
        self._special = _special_tokens(tokenizer, config, self._named.values())
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, GenerationMarks]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
        try:
            self._template = environment.from_string(_source(tokenizer.files, config))
        except TemplateError as error:
            raise ConfigError(f"the chat template is not valid ({error}); copy the tokenizer again") from error

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The conversation as text, with special tokens by their names.

        Args:
            messages: The conversation.
            add_generation_prompt: Whether to begin the assistant's next message.
            tools: Descriptions of functions that the model may call, for templates that know of tools.
            variables: Further variables of the template, such as enable_thinking.

        Raises:
            ConfigError: the template refuses the conversation.
        """
        return self._render(messages, add_generation_prompt, tools, variables).translate(_MARKS)

    def encode(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> list[int]:
        """The conversation as tokens; arguments as in `render`. Special tokens that a message spells out stay text."""
        return self._tokens(self._render(messages, add_generation_prompt, tools, variables))

    def encode_turns(
        self,
        messages: Sequence[Message],
        *,
        learned_from: int = 0,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> list[tuple[list[int], bool]]:
        """The conversation as tokens in pieces, each with whether the assistant wrote it.

        Pieces are tokenized by themselves, as a prompt and its answer are in generation. Together they are the text of
        `render` without generation prompt. What the assistant wrote is what the template's generation blocks say. For a
        template without them, it is what rendering a turn adds to the turns before it with a generation prompt.

        Args:
            messages: The conversation.
            learned_from: Turns of the assistant before the message of this number count as written by others.
            tools, variables: As in `render`.

        Raises:
            ConfigError: the template refuses the conversation, or renders a turn differently once others follow.
        """
        whole = self._render(messages, False, tools, variables)
        spans = self._marked_spans(whole, messages, learned_from)
        if spans is None:
            spans = self._spans(whole, messages, learned_from, tools, variables)
        pieces, place = [], 0
        for begin, end in spans:
            pieces += [(whole[place:begin], False), (whole[begin:end], True)]
            place = end
        return [(self._tokens(text), learned) for text, learned in [*pieces, (whole[place:], False)] if text]

    def encode_reply(self, role: str, text: str) -> list[int]:
        """What follows a turn of the assistant, up to the beginning of its next one: a message of another role.

        The turn ends with the token that ends turns, as generation leaves it.

        Raises:
            ConfigError: the template refuses the role, ends no turn by a token, or renders turns differently once
                others follow.
        """
        start: list[Message] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        before = self._render(start, False, None, {})
        after = self._render([*start, {"role": role, "content": text}], True, None, {})
        end = next((token for token in stop_tokens(self._tokenizer) if token in self._tokens(before)), None)
        name = next((name for name, token in self._special.items() if token == end), None)
        if name is None or not after.startswith(before):
            raise ConfigError(
                "the chat template does not end the assistant's turns by a token, or renders them differently once "
                f"a message of {role} follows; give another chat template, or another role"
            )
        return self._tokens(after[before.rindex(name) + len(name) :])

    def _marked_spans(self, whole: str, messages: Sequence[Message], learned_from: int) -> list[tuple[int, int]] | None:
        """Where the generation blocks of a rendering are; None if it has none."""
        from trainer.data.generation_marks import BEGIN, END

        spans = [found.span() for found in re.finditer(f"{BEGIN}[^{END}]*{END}", whole)]
        earlier = _turns_of_assistant(messages[:learned_from])
        if spans and earlier and len(spans) != _turns_of_assistant(messages):
            raise ConfigError(
                "the chat template's generation blocks are not one for each turn of the assistant, so it is not known "
                "which belong to the prompt; give the chat template one block per turn"
            )
        return spans[earlier:] if spans else None

    def _spans(
        self,
        whole: str,
        messages: Sequence[Message],
        learned_from: int,
        tools: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, Any],
    ) -> list[tuple[int, int]]:
        """Where the assistant's turns are, from renderings of the conversation's beginnings."""
        spans = []
        for number, message in enumerate(messages):
            if message.get("role") != "assistant" or number < learned_from:
                continue
            head = self._render(messages[:number], True, tools, variables)
            turn = self._render(messages[: number + 1], False, tools, variables)
            if not (turn.startswith(head) and whole.startswith(turn)):
                raise ConfigError(
                    f"the chat template renders message {number} of the conversation differently once others follow or "
                    "after its generation prompt, so the assistant's part is not known; put {% generation %} blocks "
                    "into the template, or learn the last turn only"
                )
            spans.append((len(head), len(turn)))
        return spans

    def _tokens(self, text: str) -> list[int]:
        ids: list[int] = []
        for piece in re.split(self._pattern, text) if self._special else [text]:
            if piece in self._special:
                ids.append(self._special[piece])
            elif piece:
                ids += self._tokenizer.encode(piece.translate(_MARKS))
        return ids

    @property
    def _pattern(self) -> str:
        longest_first = sorted(self._special, key=len, reverse=True)
        return f"({'|'.join(map(re.escape, longest_first))})"

    def _render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, Any],
    ) -> str:
        from jinja2 import TemplateError

        try:
            return self._template.render(
                **self._named,
                **variables,
                messages=[self._without_special(message) for message in messages],
                tools=tools,
                add_generation_prompt=add_generation_prompt,
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise ConfigError(f"the chat template refuses the conversation: {error}") from error

    def _without_special(self, value: Any) -> Any:
        """The value with a mark in every special token that its texts spell out."""
        if isinstance(value, str):
            text = value.translate(_MARKS)
            return (
                re.sub(self._pattern, lambda found: found[0][0] + _BREAK + found[0][1:], text)
                if self._special
                else text
            )
        if isinstance(value, Mapping):
            return {key: self._without_special(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._without_special(item) for item in value]
        return value


def stop_tokens(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Tokens that end an answer: the end of a document and, of chat models, the end of a turn."""
    name = named_token(token_config(tokenizer.files), "eos_token")
    end_of_turn = None if name is None else tokenizer.token_id(name)
    return tuple({tokenizer.eod_id} if end_of_turn is None else {tokenizer.eod_id, end_of_turn})


_SPECIAL_KEYS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


def _source(files: Mapping[str, bytes], config: Mapping[str, Any]) -> str:
    """The template's text."""
    if _FILE in files:
        return files[_FILE].decode()
    found = config.get("chat_template")
    if isinstance(found, list):
        # Several, by name: the one for conversations without tools.
        found = next((entry["template"] for entry in found if entry.get("name") == "default"), None)
    if not isinstance(found, str):
        raise ConfigError(
            f"the tokenizer has no chat template: put {_FILE} beside it, or give the prompt as text, without chat"
        )
    return found


def _special_tokens(tokenizer: Tokenizer, config: Mapping[str, Any], named: Any) -> dict[str, int]:
    """The special tokens by name."""
    names = set(named) | {tokenizer.eod}
    names |= {token["content"] for token in config.get("added_tokens_decoder", {}).values() if token.get("special")}
    if tokenizer.model_name.endswith(".json"):
        names |= {token["content"] for token in json.loads(tokenizer.model).get("added_tokens", []) if token["special"]}
    return {name: token for name in names if (token := tokenizer.token_id(name)) is not None}


def _to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    # Jinja's own filter escapes characters of HTML.
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)


def _turns_of_assistant(messages: Sequence[Message]) -> int:
    return sum(message.get("role") == "assistant" for message in messages)


def _refuse(message: str) -> NoReturn:
    from jinja2 import TemplateError

    raise TemplateError(message)
