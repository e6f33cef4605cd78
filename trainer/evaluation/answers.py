"""pass@k, maj@k and rewards of a checkpoint's answers to prompts. Imports torch only when it computes.

The answers are kept in a file if one is named: an evaluation that is started again goes on where it ended.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.errors import ConfigError

if TYPE_CHECKING:
    from models.decoder import Decoder
    from trainer.evaluation.config import EvaluateConfig
    from trainer.evaluation.pass_at_k import Estimate
    from trainer.posttraining.answer_figures import Vote
    from trainer.posttraining.data.row import Row
    from trainer.posttraining.rollouts import Group, Policy, Prompt, Sampler
    from trainer.stored.inference import LoadedModel

_SECONDS_BETWEEN_LINES = 5.0


class _Alone:
    """Collectives of a single process."""

    def gather(self, value: Any) -> list[Any]:
        return [value]


@dataclass(frozen=True)
class _Host:
    """A process by itself, which holds the whole model."""

    model: Decoder
    rank: int = 0
    collectives: _Alone = _Alone()  # noqa: RUF009


def evaluate_answers(config: EvaluateConfig) -> dict[str, Any]:
    """Answer all prompts, print a table, and return the figures as plain values.

    Raises:
        ConfigError: an input is unusable, or the file of answers is of another evaluation.
    """
    from trainer.data.chat import stop_tokens
    from trainer.device import choose_device, keep_freed_memory
    from trainer.posttraining.answer_figures import vote_of
    from trainer.posttraining.rewards.workers import RewardPool
    from trainer.posttraining.rollouts import Policy, Sampler
    from trainer.stored.inference import load_model

    logging.basicConfig(format="%(message)s")
    keep_freed_memory()
    loaded = load_model(config.checkpoint, choose_device(config.device), config.tokenizer)
    own, tokenizer = config.pass_at_k, loaded.require_tokenizer()
    prompts, files = _prompts(config, loaded)
    policy = Policy(own.samples, own.max_new_tokens, own.temperature, config.seed, tuple(stop_tokens(tokenizer)))
    kept = _Kept(None if own.output is None else Path(own.output), _about(config, loaded))
    with RewardPool(config.rewards) as pool:
        sampler = Sampler(_Host(loaded.model), tokenizer, pool, own.slots)
        groups = _answered(prompts, sampler, policy, kept, max(own.slots // own.samples, 1))
    vote = vote_of(config.rewards)
    found = {"all": _figures(groups, own.right, vote)}
    if len(files) > 1:
        found |= {
            name: _figures([groups[place] for place in places], own.right, vote) for name, places in files.items()
        }
    _print_table(found)
    return {"checkpoint": str(loaded.path), **_settings(config), "answers": found}


def _settings(config: EvaluateConfig) -> dict[str, Any]:
    """What the answers depend on, beside the model."""
    answers = {name: value for name, value in asdict(config.pass_at_k).items() if name not in ("output", "slots")}
    rows = asdict(config.rows)
    return {"rows": rows, "rewards": [asdict(reward) for reward in config.rewards], "seed": config.seed, **answers}


def _about(config: EvaluateConfig, loaded: LoadedModel) -> dict[str, Any]:
    # The newest checkpoint of a run may have changed between two starts; its path tells.
    path = str(loaded.path.resolve())
    return json.loads(json.dumps({"checkpoint": path, "tokenizer": config.tokenizer, **_settings(config)}))


def _prompts(config: EvaluateConfig, loaded: LoadedModel) -> tuple[list[Prompt], dict[str, list[int]]]:
    """The prompts, and the numbers of those of each file."""
    from trainer.data.chat import ChatTemplate
    from trainer.posttraining.data.encode import EncodeOptions, Encoder, encode_prompts
    from trainer.posttraining.data.rows import read_rows
    from trainer.posttraining.initial import numbered

    rows, tokenizer = config.rows, loaded.require_tokenizer()
    read = read_rows(rows.validation, rows.options)
    has_messages = rows.chat or any(not isinstance(row.prompt, str) for row in read)
    options = EncodeOptions(
        max_prompt_length=rows.max_prompt_tokens, overlong=rows.overlong, wrap_text=rows.chat, turns=rows.turns
    )
    encoder = Encoder(tokenizer, ChatTemplate(tokenizer) if has_messages else None, options)
    every: list[tuple[Row, list[int]]] = []
    files = {}
    for file in read.files:
        encoded, counts = encode_prompts(file.rows, encoder)
        print(f"{file.path}: {counts}", file=sys.stderr)
        chosen = encoded[: config.pass_at_k.prompts] if config.pass_at_k.prompts else encoded
        files[str(file.path)] = list(range(len(every), len(every) + len(chosen)))
        every += chosen
    empty = next((name for name, numbers in files.items() if not numbers), None)
    if empty is not None:
        raise ConfigError(f"rows: {empty} has no prompt that can be answered; leave it out, or raise max_prompt_tokens")
    return numbered(every), files


class _Kept:
    """Answers that are known already, and the file that they are written to: a line about them, and one a group.

    Args:
        path: The file; None keeps nothing.
        about: What the answers depend on.

    Raises:
        ConfigError: the file is of another evaluation.
    """

    def __init__(self, path: Path | None, about: dict[str, Any]) -> None:
        self._path = path
        self.groups: dict[int, Group] = {}
        if path is None:
            return
        if path.is_file() and path.stat().st_size:
            self._read(path, about)
        else:
            path.write_text(json.dumps(about) + "\n")

    def _read(self, path: Path, about: dict[str, Any]) -> None:
        from trainer.posttraining.rollouts import group_of

        text = path.read_text(encoding="utf-8")
        first, *lines = text[: text.rfind("\n") + 1].splitlines() or [""]
        try:
            is_ours = json.loads(first) == about
            groups = [group_of(json.loads(line)) for line in lines]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"pass_at_k.output: {path} is damaged ({error}); remove it") from error
        if not is_ours:
            raise ConfigError(
                f"pass_at_k.output: {path} has the answers of another evaluation; name another file, or remove it"
            )
        # A line that an interruption has cut is written anew.
        path.write_text("".join(line + "\n" for line in (first, *lines)), encoding="utf-8")
        self.groups = {group.number: group for group in groups}

    def add(self, groups: Sequence[Group]) -> None:
        """Keep further answers."""
        self.groups |= {group.number: group for group in groups}
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(asdict(group)) + "\n" for group in groups)


def _answered(prompts: Sequence[Prompt], sampler: Sampler, policy: Policy, kept: _Kept, at_once: int) -> list[Group]:
    """Answer the prompts that are not answered yet, and return all groups in order."""
    missing = [prompt for prompt in prompts if prompt.number not in kept.groups]
    told = start = time.monotonic()
    for first in range(0, len(missing), at_once):
        kept.add(sampler.answer(missing[first : first + at_once], policy))
        now, done = time.monotonic(), min(first + at_once, len(missing))
        if now - told > _SECONDS_BETWEEN_LINES:
            told, left = now, (now - start) / done * (len(missing) - done)
            print(f"{len(kept.groups)} of {len(prompts)} prompts answered, {left:.0f} s left", file=sys.stderr)
    return [kept.groups[prompt.number] for prompt in prompts]


def _figures(groups: Sequence[Group], right: float, vote: Vote) -> dict[str, Any]:
    """Figures of some prompts, with intervals over them."""
    import numpy as np

    from trainer.evaluation.pass_at_k import majority_at_k, over_problems, pass_curve
    from trainer.posttraining.answer_figures import ballots, powers_of_two
    from trainer.posttraining.rollouts import mean_parts

    samples = [sample for group in groups for sample in group.samples]
    count = len(groups[0].samples)
    solved = np.array([sum(reward >= right for reward in group.rewards) for group in groups])
    votes = [ballots(group, right, vote) for group in groups]
    lengths = [len(sample.tokens) for sample in samples]
    ks = powers_of_two(count)
    majority = {k: over_problems(np.array([majority_at_k(*own, k) for own in votes])) for k in ks}
    return {
        "prompts": len(groups),
        "reward": asdict(over_problems(np.array([np.mean(group.rewards) for group in groups]))),
        "parts": mean_parts(samples),
        "errors": dict(Counter(sample.error for sample in samples if sample.error is not None)),
        "pass_at_k": _by_k(pass_curve(count, solved, ks)),
        "majority_at_k": _by_k(majority),
        "tokens": {"mean": float(np.mean(lengths)), "median": float(np.median(lengths)), "most": max(lengths)},
        "finished": float(np.mean([sample.finished for sample in samples])),
    }


def _by_k(found: dict[int, Estimate]) -> dict[str, dict[str, float]]:
    return {str(k): asdict(estimate) for k, estimate in found.items()}


def _print_table(found: dict[str, dict[str, Any]]) -> None:
    """Print a line for each k and file, with 95 % intervals over prompts."""
    from rich.console import Console
    from rich.table import Table

    table = Table("rows", "k")
    for title in ("pass@k", "maj@k"):
        table.add_column(title, justify="right")
    for name, figures in found.items():
        for k in figures["pass_at_k"]:
            table.add_row(name, k, _cell(figures["pass_at_k"][k]), _cell(figures["majority_at_k"][k]))
    # rich assumes 80 columns for files and pipes.
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    for name, figures in found.items():
        parts = "".join(f", {part} {value:.4g}" for part, value in figures["parts"].items())
        errors = "".join(f", {count} x {error}" for error, count in figures["errors"].items())
        print(
            f"{name}: {figures['prompts']} prompts, reward {_cell(figures['reward'])}{parts}{errors}; "
            f"{figures['tokens']['mean']:.1f} tokens, {figures['finished']:.0%} of the answers ended"
        )


def _cell(estimate: dict[str, float]) -> str:
    return f"{estimate['mean']:.3f} ({estimate['low']:.3f}-{estimate['high']:.3f})"
