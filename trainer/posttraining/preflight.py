"""Checks the files of a post-training run before a model is built. Imports neither torch nor megatron."""

from contextlib import suppress
from pathlib import Path

from trainer.data.layout import tokenizer_sha256
from trainer.errors import ConfigError
from trainer.posttraining.config import PosttrainConfig, rollout_name
from trainer.posttraining.data.row import Row
from trainer.posttraining.data.rows import read_rows
from trainer.posttraining.rewards import registry
from trainer.preflight import Findings
from trainer.stored.checkpoint_weights import require_whole
from trainer.stored.opening import open_weights
from trainer.stored.teacher import open_teacher


def check(config: PosttrainConfig) -> Findings:
    """Check rows, tokenizer and rewards.

    Raises:
        ConfigError: the run cannot start.
    """
    rows = config.rows
    if config.data.tokenizer is None:
        raise ConfigError(
            "nothing names the tokenizer; start with --init from weights that have one, or set data.tokenizer"
        )
    if config.checkpoint.init is None and config.checkpoint.resume in ("auto", "never"):
        raise ConfigError("post-training begins with weights; name them with --init")
    if config.checkpoint.init is not None and _reads_initial(config):
        require_whole(open_weights(config.checkpoint.init), "checkpoint.init")
    if not rows.train:
        raise ConfigError("rows.train names no file of rows; give one")
    found = read_rows(dict(zip(rows.train, rows.weights, strict=True)) if rows.weights else rows.train, rows.options)
    findings = Findings(notes=[f"rows: {found}"])
    if rows.validation:
        findings.notes.append(f"held out: {read_rows(rows.validation, rows.options)}")
    if config.stage == "rl":
        _check_replay(config)
        _check_rewards(config)
        findings.warnings.extend(other_tokenizer(config))
        if config.gate.kind != "none" and not any(row.demonstrations for row in found):
            raise ConfigError(
                f"gate.kind={config.gate.kind} takes demonstrations, and no row of {', '.join(rows.train)} has one; "
                "give rows with demonstrations, or gate.kind=none"
            )
    elif config.rewards:
        raise ConfigError("rewards are of stage rl; leave them out, or set stage=rl")
    elif config.stage == "dpo":
        missing = next((row.id for row in found if row.chosen is None or row.rejected is None), None)
        if missing is not None:
            raise ConfigError(
                f"rows: {missing} has no chosen and rejected answers; give rows of preferences to stage=dpo"
            )
    elif not any(_can_be_learned(row) for row in found):
        raise ConfigError(
            f"rows: no row of {', '.join(rows.train)} has an answer to learn; use stage=rl, or other rows"
        )
    return findings


def _reads_initial(config: PosttrainConfig) -> bool:
    """Whether a run reads its initial weights also when it goes on: as a reference, or to compare their digest."""
    initial = config.rl.kl or config.rehearsal.is_on or config.prompt_filter.keep == "failed"
    return config.stage == "dpo" or (config.stage == "rl" and bool(initial))


def _check_replay(config: PosttrainConfig) -> None:
    """Check that the rollouts that are to be replayed are there."""
    if config.rl.replay is None:
        return
    for number in range(config.rollouts):
        if not (Path(config.rl.replay) / rollout_name(number)).is_file():
            raise ConfigError(
                f"rl.replay: {config.rl.replay} lacks rollout {number} of {config.rollouts}; take fewer train.steps"
            )


def _check_rewards(config: PosttrainConfig) -> None:
    """Rewards are needed by all that asks whether an answer is right."""
    if config.environment.name is not None:
        registry.check_path(config.environment.name)
        if not config.rewards:
            return
    if config.rewards or config.rl.objective != "distill" or config.prompt_filter.keep != "all":
        registry.check(config.rewards)
    elif config.rows.validation:
        raise ConfigError("rows.validation: answers are validated by rewards, and there is none; give one, or no rows")


def other_tokenizer(config: PosttrainConfig) -> list[str]:
    """A warning if rl.distillation.teacher does not have the run's tokenizer; else nothing.

    Raises:
        ConfigError: there is no teacher at its path.
    """
    if config.rl.distillation.teacher is None:
        return []
    key = "rl.distillation.teacher"
    found = open_teacher(config.rl.distillation.teacher, key)
    require_whole(found, key)
    assert config.data.tokenizer is not None
    with suppress(ConfigError):
        if found.tokenizer and tokenizer_sha256(found.tokenizer) == tokenizer_sha256(config.data.tokenizer):
            return []
    return [
        f"{key}: {found.path} does not have the tokenizer {config.data.tokenizer}; the same numbers must "
        "mean the same tokens to both models"
    ]


def _can_be_learned(row: Row) -> bool:
    return row.conversation is not None or bool(row.demonstrations)
