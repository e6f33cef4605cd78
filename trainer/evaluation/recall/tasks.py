"""The tasks of recall by name."""

from trainer.evaluation.recall.common_words import common_words
from trainer.evaluation.recall.draws import Draws
from trainer.evaluation.recall.examples import Example
from trainer.evaluation.recall.frequent_words import frequent_words
from trainer.evaluation.recall.mqar import mqar, mqar_text
from trainer.evaluation.recall.needle import needle, needle_keys, needle_queries, needle_values
from trainer.evaluation.recall.setting import Setting, Task
from trainer.evaluation.recall.variables import variables

TASKS: dict[str, Task] = {
    "needle": needle,
    "needle_keys": needle_keys,
    "needle_values": needle_values,
    "needle_queries": needle_queries,
    "mqar": mqar,
    "mqar_text": mqar_text,
    "variables": variables,
    "common_words": common_words,
    "frequent_words": frequent_words,
}


def example(task: str, setting: Setting, seed: int, number: int, length: int) -> Example:
    """Example `number` of a task, a function of the arguments only.

    Args:
        task: Its name.
        setting: What it is made of.
        seed: Seed of all examples.
        number: Number of the example, from 0.
        length: Most tokens of the example, with its answers. What fills it leaves only what a word would exceed.

    Raises:
        ConfigError: the length is too short for the task, or the task needs a tokenizer.
    """
    return TASKS[task](setting, Draws(seed, task, number), number, length)
