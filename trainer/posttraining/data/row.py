"""The row type that all formats of post-training data are read into, and the options of reading. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, get_args

from trainer.data.chat import Message

Format: TypeAlias = Literal[
    "verl",
    "hpt",
    "dph",
    "trl_prompt",
    "trl_messages",
    "trl_text",
    "trl_completion",
    "trl_preference",
    "openrlhf",
    "reasoning_gym",
    "evaluation",
]
FORMATS: tuple[Format, ...] = get_args(Format)


@dataclass(frozen=True)
class Row:
    """One row of post-training data. A row has what its format gives; everything else is empty.

    Attributes:
        prompt: Text, or the messages before the answer. Empty in rows that are a whole text.
        data_source: Where the task comes from; selects the reward function.
        ground_truth: What the reward function compares an answer with: any JSON value, also an object.
        demonstrations: Answers to learn from, without end-of-text token.
        demonstration_log_probs: Log-probability, in nats, of each token of the first demonstration under the model
            that wrote it, that of the end-of-text token included. None if the row has none.
        chosen: The preferred of two answers.
        rejected: The other one.
        conversation: A whole conversation, of which the assistant's turns are learned.
        learned_from: Number of the first message of `conversation` that is learned; assistants' turns before it belong
            to the prompt.
        id: Name of the row: its column `id`, else its file and its number in it, from 0.
        extra: All other columns, for reward functions.
    """

    prompt: str | tuple[Message, ...]
    data_source: str = "default"
    ground_truth: Any = None
    demonstrations: tuple[str, ...] = ()
    demonstration_log_probs: tuple[float, ...] | None = None
    chosen: str | None = None
    rejected: str | None = None
    conversation: tuple[Message, ...] | None = None
    learned_from: int = 0
    id: str = ""
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RowOptions:
    """How files are read. The keys are names of columns, and their defaults those of the formats' own programs.

    Attributes:
        format: The files' format; auto recognises it from the columns.
        data_source: `data_source` of rows that do not name one. None: their file's name without its ending.
        drop_system: Leave out a system message at the beginning of a prompt, as LUFFY's preparation does.
        prompt_key: verl, hpt, dph, trl and evaluation files: the prompt.
        data_source_key: verl, hpt and dph: selects the reward function (verl's reward_fn_key).
        target_key: hpt: the demonstration, a list whose first message has the text.
        targets_key: hpt: further demonstrations, a list of texts.
        target_probs_key: hpt: probability of each token of the demonstration under its author. None: not read.
        input_key: openrlhf: the prompt, text or messages.
        output_key: openrlhf: the answer to learn.
        label_key: openrlhf: the ground truth.
        input_template: openrlhf: text with {} in place of a text prompt. None leaves prompts as they are.
    """

    format: Literal["auto"] | Format = "auto"
    data_source: str | None = None
    drop_system: bool = False
    prompt_key: str = "prompt"
    data_source_key: str = "data_source"
    target_key: str = "target"
    targets_key: str = "target_lst"
    target_probs_key: str | None = "target_ds_qwen_7b_probs"
    input_key: str = "input"
    output_key: str = "output"
    label_key: str = "label"
    input_template: str | None = None
