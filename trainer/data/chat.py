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

        self._tokenizer = tokenizer
        config = token_config(tokenizer.files)
        self._named = {key: name for key in _SPECIAL_KEYS if (name := named_token(config, key)) is not None}
        self._special = _special_tokens(tokenizer, config, self._named.values())
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
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
        return self._render(messages, add_generation_prompt, tools, variables).replace(_BREAK, "")

    def encode(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> list[int]:
        """The conversation as tokens; arguments as in `render`. Special tokens that a message spells out stay text."""
        text = self._render(messages, add_generation_prompt, tools, variables)
        ids: list[int] = []
        for piece in re.split(self._pattern, text) if self._special else [text]:
            if piece in self._special:
                ids.append(self._special[piece])
            elif piece:
                ids += self._tokenizer.encode(piece.replace(_BREAK, ""))
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
            return (
                re.sub(self._pattern, lambda found: found[0][0] + _BREAK + found[0][1:], value)
                if self._special
                else value
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


def _refuse(message: str) -> NoReturn:
    from jinja2 import TemplateError

    raise TemplateError(message)
