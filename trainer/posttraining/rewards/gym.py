"""Tasks of reasoning-gym (github.com/open-thought/reasoning-gym), scored by their own functions."""

from collections.abc import Sequence
from importlib.util import find_spec

from trainer.errors import ConfigError
from trainer.posttraining.rewards import base
from trainer.posttraining.rewards.base import Answer, Reward, ScoringError
from trainer.posttraining.rewards.extraction import Extraction


def reasoning_gym(extract: str | Sequence[str] = ("answer", "boxed", "whole")) -> Reward:
    """What the task's score_answer gives, from 0 to 1.

    The row is one of reasoning-gym: its `metadata` is in `extra` or in the ground truth, and names the task as
    `source_dataset`, else the data source is the task's name. The ground truth is the row's answer, or the whole row.

    Args:
        extract: Ways to find the answer in the completion, see EXTRACTIONS.

    Raises:
        ConfigError: reasoning-gym is not installed, or a way is not known.
    """
    if find_spec("reasoning_gym") is None:
        raise ConfigError("reasoning_gym needs the package reasoning-gym: pip install 'spiketrain[rewards]'")
    find = Extraction(extract)
    if base.IN_WORKER:
        # It takes a second, which is not the first answer's.
        import reasoning_gym as _  # noqa: F401

    def score(answer: Answer) -> float:
        from reasoning_gym import get_score_answer_fn

        row = answer.ground_truth if isinstance(answer.ground_truth, dict) else {"answer": answer.ground_truth}
        metadata = row.get("metadata") or answer.extra.get("metadata") or {}
        entry = {"question": answer.prompt, **row, "metadata": metadata}
        task = metadata.get("source_dataset") or answer.data_source
        try:
            judge = get_score_answer_fn(task)
        except ValueError as error:
            raise ScoringError("truth", f"reasoning-gym has no task {task!r}") from error
        return float(judge(answer=find(answer.completion), entry=entry))

    return score
