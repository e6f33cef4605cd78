"""Rows as token sequences with loss masks.

A conversation is rendered by the tokenizer's chat template, and the assistant's turns are learned, up to the token that
ends them. A prompt with an answer is the prompt's tokens, the answer's, and the token that ends an answer, which is
learned too: otherwise the model would not learn to stop. The answer is tokenized by itself, as generation produces it.

Log-probabilities of a demonstration's author need the author's tokenizer; `Encoder.demonstration` refuses others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import numpy as np

from trainer.data.chat import ChatTemplate, Message, stop_tokens
from trainer.data.tokenizer import Tokenizer, named_token, token_config
from trainer.errors import ConfigError
from trainer.posttraining.data.row import Row
from trainer.posttraining.data.rows import Rows
from trainer.posttraining.data.sequences import TokenSequence

Overlong: TypeAlias = Literal["drop", "left", "right", "error"]

# A prompt that ends with it opens the thinking of a demonstration that begins with it (LUFFY's and HPT's data).
_THINK = "<think>\n"
DEMONSTRATOR = "demonstrator_log_probs"
"""Name of the extra tensor with a demonstration's log-probabilities under its author, 0 for the prompt."""


@dataclass(frozen=True)
class EncodeOptions:
    """How rows become tokens.

    Attributes:
        max_length: Most tokens of a sequence; at most what packing takes. None: no limit.
        max_prompt_length: Most tokens of a prompt that is to be answered. None: no limit.
        overlong: What happens to longer ones. drop leaves the row out; left and right cut its beginning or its end;
            error refuses the data. With left, tokens of an answer are never cut: rows whose answer is too long by
            itself are left out.
        wrap_text: Render a text prompt as a message of the user. By default text is continued as it stands.
        turns: Which turns of a conversation are learned: all of the assistant's, or the last.
    """

    max_length: int | None = None
    max_prompt_length: int | None = None
    overlong: Overlong = "drop"
    wrap_text: bool = False
    turns: Literal["all", "last"] = "all"


@dataclass(frozen=True)
class EncodeCounts:
    """What encoding did with the rows.

    Attributes:
        rows: Rows given.
        cut: Rows that lost tokens because they were too long.
        overlong: Rows left out because they were too long.
        empty: Rows left out because they have no token to learn, or no prompt.
        tokens: Tokens of what was kept.
        learned: Tokens of these that the loss counts.
    """

    rows: int = 0
    cut: int = 0
    overlong: int = 0
    empty: int = 0
    tokens: int = 0
    learned: int = 0

    def __add__(self, other: EncodeCounts) -> EncodeCounts:
        return EncodeCounts(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    def __str__(self) -> str:
        kept = self.rows - self.overlong - self.empty
        return (
            f"{kept} of {self.rows} rows kept, {self.cut} of them cut; {self.overlong} too long and {self.empty} empty "
            f"ones left out; {self.tokens} tokens, {self.learned} learned"
        )


class Encoder:
    """Turns rows into tokens.

    Args:
        tokenizer: The tokenizer.
        template: Its chat template. None: rows of messages are refused.
        options: Lengths, and what is learned.
        variables: Further variables of the template, such as enable_thinking.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate | None = None,
        options: EncodeOptions | None = None,
        **variables: Any,
    ) -> None:
        self._tokenizer, self._template, self._variables = tokenizer, template, variables
        self.options = options or EncodeOptions()
        self._stops = frozenset(stop_tokens(tokenizer))
        name = named_token(token_config(tokenizer.files), "eos_token")
        end_of_turn = None if name is None else tokenizer.token_id(name)
        # Chat models end an answer as their template ends a turn; text without template ends like a document.
        self._end_of_turn = tokenizer.eod_id if end_of_turn is None else end_of_turn

    def prompt(self, row: Row) -> list[int]:
        """Tokens of the row's prompt, at any length; messages with the beginning of the assistant's answer."""
        messages = self._messages(row)
        if messages is None:
            return self._tokenizer.encode(str(row.prompt))
        return self._with_template(row).encode(messages, tools=_tools(row), **self._variables)

    def end(self, row: Row) -> int:
        """The token that ends an answer to the row's prompt."""
        return self._tokenizer.eod_id if self._messages(row) is None else self._end_of_turn

    def reply(self, row: Row, text: str, role: str) -> list[int]:
        """What a model reads between two turns of its answer to the row's prompt.

        Raises:
            ConfigError: the chat template has no such role.
        """
        if self._messages(row) is None:
            return self._tokenizer.encode(text)
        return self._with_template(row).encode_reply(role, text)

    def answer(self, row: Row, text: str) -> TokenSequence:
        """The row's prompt and an answer to it, at any length. The answer and the token that ends it are learned."""
        if text.startswith(_THINK) and self._prompt_text(row).endswith(_THINK):
            text = text.removeprefix(_THINK)
        return TokenSequence.of([(self.prompt(row), False), ([*self._tokenizer.encode(text), self.end(row)], True)])

    def demonstration(self, row: Row, number: int = 0, *, log_probs: bool = False) -> TokenSequence:
        """The row's prompt and one of its demonstrations, at any length.

        Args:
            row: The row.
            number: Number of the demonstration.
            log_probs: Add its author's log-probabilities as `extra[DEMONSTRATOR]`. Only of demonstration 0.

        Raises:
            ConfigError: the row has no such demonstration, or no log-probabilities for it, or for other tokens.
        """
        if number >= len(row.demonstrations):
            raise ConfigError(f"rows: {row.id} has no demonstration {number}; leave such rows out")
        sequence = self.answer(row, row.demonstrations[number])
        if not log_probs:
            return sequence
        given = row.demonstration_log_probs if number == 0 else None
        if given is None:
            raise ConfigError(f"rows: {row.id} has no log-probabilities of demonstration {number}; go without them")
        size = int(np.count_nonzero(sequence.loss_mask))
        if len(given) != size:
            raise ConfigError(
                f"rows: {row.id} has log-probabilities of {len(given)} tokens, and its demonstration has {size}: they "
                "are of another tokenizer; go without them"
            )
        values = np.zeros(len(sequence), np.float32)
        values[len(sequence) - size :] = given
        return replace(sequence, extra={DEMONSTRATOR: values})

    def preference(self, row: Row) -> tuple[TokenSequence, TokenSequence]:
        """The row's prompt with its chosen and with its rejected answer, at any length.

        Raises:
            ConfigError: the row has no two answers.
        """
        if row.chosen is None or row.rejected is None:
            raise ConfigError(f"rows: {row.id} has no chosen and rejected answers; give rows of preferences")
        return self.answer(row, row.chosen), self.answer(row, row.rejected)

    def supervised(self, row: Row) -> TokenSequence:
        """The row's conversation, or else its first demonstration, at any length.

        Raises:
            ConfigError: the row has neither.
        """
        if row.conversation is None:
            return self.demonstration(row)
        first = row.learned_from
        if self.options.turns == "last":
            answers = [place for place, message in enumerate(row.conversation) if message["role"] == "assistant"]
            first = max([first, *answers[-1:]])
        template = self._with_template(row)
        pieces = template.encode_turns(row.conversation, learned_from=first, tools=_tools(row), **self._variables)
        pieces = [piece for turn in pieces for piece in self._up_to_end(*turn)]
        if row.conversation[-1]["role"] == "assistant" and not any(self._stops & {*ids} for ids, _ in pieces):
            # The template ends no turn.
            pieces.append(([self._end_of_turn], True))
        return TokenSequence.of(pieces)

    def _up_to_end(self, ids: list[int], learned: bool) -> list[tuple[list[int], bool]]:
        """A turn with what follows its end apart: generation stops there, so nothing after it is learned."""
        ends = [place for place, token in enumerate(ids, 1) if token in self._stops] if learned else []
        return [(ids[: ends[-1]], True), (ids[ends[-1] :], False)] if ends else [(ids, learned)]

    def _messages(self, row: Row) -> tuple[Message, ...] | None:
        """The prompt's messages; None for text that is continued as it stands."""
        if not isinstance(row.prompt, str):
            return row.prompt
        return ({"role": "user", "content": row.prompt},) if self.options.wrap_text else None

    def _prompt_text(self, row: Row) -> str:
        messages = self._messages(row)
        return (
            str(row.prompt)
            if messages is None
            else self._with_template(row).render(messages, tools=_tools(row), **self._variables)
        )

    def _with_template(self, row: Row) -> ChatTemplate:
        if self._template is None:
            raise ConfigError(
                f"rows: {row.id} has messages, and there is no chat template; give one with the tokenizer"
            )
        return self._template


def _tools(row: Row) -> list[Mapping[str, Any]] | None:
    """Descriptions of functions from TRL's column `tools`; None if there are none."""
    tools = row.extra.get("tools")
    return tools if isinstance(tools, list) and tools else None


def encode_supervised(rows: Iterable[Row], encoder: Encoder) -> tuple[list[TokenSequence], EncodeCounts]:
    """The sequences of supervised fine-tuning, in the rows' order.

    Raises:
        ConfigError: a row has nothing to learn from, or is too long and `overlong` is error.
    """
    kept, counts = [], EncodeCounts()
    for row in rows:
        sequence = encoder.supervised(row)
        fitted = fit(sequence, encoder.options, row.id)
        if fitted is not None and fitted.learned:
            kept.append(fitted)
            cut = len(fitted) < len(sequence)
            counts += EncodeCounts(1, cut=cut, tokens=len(fitted), learned=fitted.learned)
        else:
            counts += EncodeCounts(1, overlong=fitted is None, empty=fitted is not None)
    return kept, counts


def encode_prompts(rows: Iterable[Row], encoder: Encoder) -> tuple[list[tuple[Row, list[int]]], EncodeCounts]:
    """Each row with the tokens of its prompt, in the rows' order, without those that are too long or empty.

    Raises:
        ConfigError: a prompt is too long and `overlong` is error.
    """
    kept, counts = [], EncodeCounts()
    limit, overlong = encoder.options.max_prompt_length, encoder.options.overlong
    for row in rows:
        ids = encoder.prompt(row)
        is_long = limit is not None and len(ids) > limit
        if not ids or (is_long and _leaves_out(overlong, row.id, len(ids), "max_prompt_length", limit)):
            counts += EncodeCounts(1, overlong=is_long, empty=not ids)
            continue
        if is_long:
            ids = ids[-limit:] if overlong == "left" else ids[:limit]  # type: ignore[operator]
        kept.append((row, ids))
        counts += EncodeCounts(1, cut=is_long, tokens=len(ids))
    return kept, counts


def encode_pools(
    rows: Rows, encode: Callable[[Sequence[Row]], tuple[list[TokenSequence], EncodeCounts]]
) -> tuple[list[list[TokenSequence]], tuple[float, ...], EncodeCounts]:
    """Encode each pool of rows by itself.

    Returns:
        The pools' sequences, their weights, and what encoding did with all rows.

    Raises:
        ConfigError: nothing of a pool is left.
    """
    (pools, weights), found, counts = rows.pools(), [], EncodeCounts()
    for pool in pools:
        sequences, own = encode(pool)
        if not sequences:
            raise ConfigError(f"rows: none of the rows from {pool[0].id} on is left ({own}); raise max_length")
        found.append(sequences)
        counts += own
    return found, weights, counts


def fit(sequence: TokenSequence, options: EncodeOptions, name: str) -> TokenSequence | None:
    """The sequence within `options.max_length`; None if it is to be left out.

    Args:
        sequence: The sequence.
        options: `max_length` and `overlong`.
        name: The row's id, for messages.

    Raises:
        ConfigError: it is too long and `overlong` is error.
    """
    limit = options.max_length
    if limit is None or len(sequence) <= limit:
        return sequence
    if _leaves_out(options.overlong, name, len(sequence), "max_length", limit):
        return None
    if options.overlong == "right":
        return sequence.part(0, limit)
    start = len(sequence) - limit
    # One token before the first learned one has to stay: it predicts that one.
    return None if sequence.loss_mask[: start + 1].any() else sequence.part(start, len(sequence))


def _leaves_out(overlong: Overlong, name: str, length: int, key: str, limit: int | None) -> bool:
    if overlong == "error":
        raise ConfigError(f"rows: {name} has {length} tokens, and {key} is {limit}; raise it, or set overlong to drop")
    return overlong == "drop"
