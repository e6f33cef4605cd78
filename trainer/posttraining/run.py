"""Builds a post-training run from rows, model, engine and callbacks, and runs it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from trainer import pretrain, run_directory
from trainer.callbacks.base import Callback
from trainer.config import PretrainConfig
from trainer.data.chat import ChatTemplate, stop_tokens
from trainer.data.tokenizer import Tokenizer
from trainer.engines.frozen import FrozenSpec
from trainer.errors import ConfigError
from trainer.events import EventLog
from trainer.loop import Outcome, Source, Trainer
from trainer.objectives.alignment import AnyObjective
from trainer.objectives.language_model import LanguageModel
from trainer.posttraining import initial, rehearsal
from trainer.posttraining.answer_figures import vote_of
from trainer.posttraining.config import PosttrainConfig, RowsConfig
from trainer.posttraining.data.encode import (
    EncodeOptions,
    Encoder,
    encode_pools,
    encode_prompts,
    encode_supervised,
    fit,
)
from trainer.posttraining.data.packing import Packing
from trainer.posttraining.data.row import Row
from trainer.posttraining.data.rows import Rows, read_rows
from trainer.posttraining.data.sampler import PromptSampler, SupervisedSampler
from trainer.posttraining.data.sequences import TokenSequence
from trainer.posttraining.dialogues import Dialogues
from trainer.posttraining.pairs import PairAccuracy, Pairs, encode_pairs
from trainer.posttraining.policy import PreferenceObjective
from trainer.posttraining.preference import Preference
from trainer.posttraining.preflight import other_tokenizer
from trainer.posttraining.rehearsal import KeepRate, Stored
from trainer.posttraining.reinforcement import Reinforcement, RolloutState
from trainer.posttraining.rewards.workers import RewardPool
from trainer.posttraining.rollouts import Policy, Sampler, replica_of
from trainer.posttraining.scoring import Scorer
from trainer.posttraining.strict import Redraw
from trainer.posttraining.validation import PassAtK, SupervisedLoss
from trainer.preflight import Findings
from trainer.runtime import rank
from trainer.stored import weights
from trainer.stored.opening import open_weights
from trainer.stored.teacher import digest
from trainer.watchdog import Watchdog

if TYPE_CHECKING:
    from trainer.engines.base import Engine


@dataclass(frozen=True)
class Inputs:
    """What a run reads beside the model.

    Attributes:
        tokenizer: The tokenizer.
        encoder: Turns rows into tokens.
        train: The rows to learn from.
        validation: The held-out rows; None if there are none.
    """

    tokenizer: Tokenizer
    encoder: Encoder
    train: Rows
    validation: Rows | None


def open_inputs(config: PosttrainConfig) -> Inputs:
    """Read tokenizer and rows, which trainer.posttraining.preflight has checked.

    Raises:
        ConfigError: they have been damaged since.
    """
    rows = config.rows
    assert config.data.tokenizer is not None and rows.train
    tokenizer = Tokenizer.load(Path(config.data.tokenizer))
    paths = dict(zip(rows.train, rows.weights, strict=True)) if rows.weights else rows.train
    train = read_rows(paths, rows.options)
    validation = read_rows(rows.validation, rows.options) if rows.validation else None
    has_messages = rows.chat or any(
        row.conversation is not None or not isinstance(row.prompt, str) for row in (*train, *(validation or ()))
    )
    template = ChatTemplate(tokenizer) if has_messages else None
    return Inputs(tokenizer, Encoder(tokenizer, template, encode_options(config)), train, validation)


def encode_options(config: PosttrainConfig) -> EncodeOptions:
    """How rows become tokens."""
    rows: RowsConfig = config.rows
    longest = config.train.seq_len - config.rl.max_new_tokens if config.stage == "rl" else None
    return EncodeOptions(
        max_length=config.train.seq_len,
        max_prompt_length=rows.max_prompt_tokens or longest,
        overlong=rows.overlong,
        wrap_text=rows.chat,
        turns=rows.turns,
    )


def train(config: PosttrainConfig, config_yaml: str, watchdog: Watchdog) -> Outcome:
    """Train in a run directory that this process owns.

    Raises:
        ConfigError: an input is unusable.
    """
    config, config_yaml, device, threads = pretrain.prepare(config, config_yaml)
    inputs = open_inputs(config)
    vocab_size = config.model.padded_vocab_size(inputs.tokenizer.vocab_size)
    weights.check_vocabulary(config, vocab_size)
    resumes = not run_directory.starts_anew(config)
    engine = pretrain.build_engine(config, vocab_size, device)
    with ExitStack() as stack:
        builders = {"sft": _supervised, "dpo": _preference, "rl": _reinforcement}
        stage = builders[config.stage](config, inputs, engine, stack)
        callbacks = [*stage.states, *pretrain.build_callbacks(config, stage.validations)]
        events = EventLog(config.run.dir)
        progress = pretrain.resume(config, engine, callbacks, events, resumes)
        if rank() == 0:
            pretrain.write_configuration(config, config_yaml, progress)
        findings = Findings([f"rows: {inputs.train}", *stage.notes], other_tokenizer(config))
        pretrain.describe(config, engine, threads, findings)
        trainer = Trainer(
            config,
            config_yaml,
            engine,
            stage.source,
            inputs.tokenizer,
            callbacks,
            progress,
            pretrain.total_peak_flops(config, engine),
            watchdog,
            events,
            stage.objective_of,
        )
        return pretrain.finish(trainer)


@dataclass(frozen=True)
class _Stage:
    """What a stage trains with.

    Attributes:
        source: Its steps.
        objective_of: What a step minimises.
        states: Callbacks that keep its state, and come first.
        validations: Callbacks that validate, and come last.
        notes: Lines for the log at the start.
    """

    source: Source
    objective_of: Callable[[PretrainConfig], AnyObjective]
    states: tuple[Callback, ...]
    validations: tuple[Callback, ...]
    notes: tuple[str, ...]


def _packing(config: PosttrainConfig, tokenizer: Tokenizer) -> Packing:
    parallel = config.parallel
    pieces = parallel.context * (parallel.tensor if parallel.sequence else 1)
    return Packing(config.train.seq_len, multiple=pieces, pad_id=tokenizer.eod_id, share=config.shared_tokens)


def _supervised(config: PosttrainConfig, inputs: Inputs, engine: Engine, stack: ExitStack) -> _Stage:
    train = config.train
    pools, shares, counts = encode_pools(inputs.train, lambda rows: encode_supervised(rows, inputs.encoder))
    packing = _packing(config, inputs.tokenizer)
    sampler = SupervisedSampler(
        pools,
        shares,
        seed=train.seed,
        seq_len=train.seq_len,
        global_batch_size=train.global_batch_size,
        packing=packing,
        fixed_count=config.engine.name == "deepspeed",
    )
    validations: list[Callback] = []
    if inputs.validation is not None:
        held_out, _ = encode_supervised(inputs.validation, inputs.encoder)
        validations.append(SupervisedLoss(held_out, packing, config))
    return _Stage(sampler, lambda _: LanguageModel(), (), tuple(validations), (str(counts),))


def _preference(config: PosttrainConfig, inputs: Inputs, engine: Engine, stack: ExitStack) -> _Stage:
    pools, shares, counts = encode_pairs(inputs.train, inputs.encoder)
    packing = _packing(config, inputs.tokenizer)
    reference = engine.freeze(_initial(config))
    objective = PreferenceObjective(Preference(**asdict(config.dpo)), reference)
    source = Pairs(pools, shares, config, packing)
    validations: list[Callback] = []
    if inputs.validation is not None:
        (held_out, *_), _, _ = encode_pairs(Rows(inputs.validation.files), inputs.encoder)
        validations.append(PairAccuracy(held_out, objective, packing, config))
    return _Stage(source, lambda _: objective, (), tuple(validations), (str(counts),))


def _reinforcement(config: PosttrainConfig, inputs: Inputs, engine: Engine, stack: ExitStack) -> _Stage:
    rl, train, seed = config.rl, config.train, config.train.seed
    pools, shares = inputs.train.pools()
    found = [encode_prompts(rows, inputs.encoder) for rows in pools]
    encoded, counts = [own for own, _ in found], sum((counts for _, counts in found[1:]), found[0][1])
    _, _, leads = replica_of(engine)
    pool = stack.enter_context(RewardPool(config.rewards)) if leads and config.rewards else None
    dialogues = None
    if config.environment.name is not None:
        replies = stack.enter_context(RewardPool([config.environment.worker])) if leads else None
        dialogues = Dialogues(config.environment, inputs.encoder, inputs.tokenizer, replies, engine.collectives)
    sampler = Sampler(engine, inputs.tokenizer, pool, rl.slots, dialogues)
    policy = Policy(rl.samples, rl.max_new_tokens, rl.temperature, seed, tuple(stop_tokens(inputs.tokenizer)))
    init = _initial(config) if rl.kl else None
    scorer = Scorer(engine, None if init is None else engine.freeze(init), rl.temperature, seed)
    path = rl.distillation.teacher
    key = "rl.distillation.teacher"
    teacher = None if path is None else engine.freeze(FrozenSpec.of_weights(path, train.precision, key=key))
    packing = _packing(config, inputs.tokenizer)
    notes = [
        str(counts),
        f"rollouts of {config.prompts} prompts, {rl.samples} answers each, {config.updates} updates each; "
        f"{rl.objective}",
    ]
    stored: Stored | None = None
    validations: list[Callback] = []
    every_row = [row for pool in encoded for row in pool]
    removed: set[int] = set()
    if config.prompt_filter.keep == "failed":
        removed = _solved(config, every_row, sampler, policy)
        notes.append(
            f"prompt_filter: the initial model fails {len(every_row) - len(removed)} of {len(every_row)} prompts, and "
            "others are not trained on"
        )
    if config.rehearsal.is_on:
        stored = _stored(config, every_row, sampler, scorer, policy, packing)
        notes.append(
            f"rehearsal: {len(stored.mastered)} of {len(every_row)} prompts mastered, {len(stored.answered)} stored"
        )
        removed = removed | set(stored.mastered)
        check = config.pass_at_k
        validations.append(KeepRate(stored, every_row, sampler, policy, check.right, check.every, check.prompts))
    encoded, shares = _without(encoded, shares, removed)
    answering = sampler
    if rl.strict:
        packing = replace(packing, alone=True)
        redraw = Redraw(engine, packing, inputs.tokenizer.vocab_size)
        answering = Sampler(engine, inputs.tokenizer, pool, rl.slots, redraw=redraw)
    elif rl.routing_replay != "none":
        answering = Sampler(engine, inputs.tokenizer, pool, rl.slots, dialogues, record_experts=True)
    source = Reinforcement(
        config,
        PromptSampler(encoded, shares, seed=seed, prompts_per_step=config.prompts),
        answering,
        scorer,
        policy,
        packing,
        lambda row: _demonstration(inputs.encoder, row),
        stored,
        teacher,
    )
    if inputs.validation is not None:
        held_out, _ = encode_prompts(inputs.validation, inputs.encoder)
        validations.append(PassAtK(held_out, sampler, policy, config.pass_at_k, vote_of(config.rewards)))
    return _Stage(source, source.objective, (RolloutState(source, rl.max_mismatch),), tuple(validations), tuple(notes))


def _initial(config: PosttrainConfig) -> FrozenSpec:
    """The initial model, in the precision of training."""
    return FrozenSpec.of_weights(config.checkpoint.init or "", config.train.precision, key="checkpoint.init")


def _demonstration(encoder: Encoder, row: Row) -> TokenSequence | None:
    """The row's demonstration, if it has one that is short enough."""
    return fit(encoder.demonstration(row), encoder.options, row.id) if row.demonstrations else None


def _solved(config: PosttrainConfig, rows: list[tuple[Row, list[int]]], sampler: Sampler, policy: Policy) -> set[int]:
    """Read which prompts the initial model has solved, or find it out before the first step.

    Raises:
        ConfigError: it has solved all, or the run has begun, and its file is gone.
    """
    path = Path(config.run.dir) / "prompt_filter.json"
    samples, right = config.prompt_filter.samples, config.pass_at_k.right
    settings = {"model": _digest(config), "samples": samples, "right": right, "prompts": len(rows)}
    known = initial.read_known(path, settings)
    if known is not None:
        return initial.solved_prompts(known["right_answers"], samples)
    _must_begin(config, path)
    counts = initial.count_right(initial.numbered(rows), sampler, policy, samples, right, "prompt_filter")
    if sampler.rank == 0:
        initial.write_known(path, settings, right_answers=counts)
    return initial.solved_prompts(counts, samples)


def _digest(config: PosttrainConfig) -> str:
    return digest(open_weights(config.checkpoint.init)) if config.checkpoint.init else ""


def _must_begin(config: PosttrainConfig, path: Path) -> None:
    """Refuse to go on without a file of the initial model's answers, which the weights no longer give."""
    if not run_directory.starts_anew(config):
        raise ConfigError(f"{path} is gone, without which the run cannot go on; restore it, or choose another run.dir")


def _stored(
    config: PosttrainConfig,
    rows: list[tuple[Row, list[int]]],
    sampler: Sampler,
    scorer: Scorer,
    policy: Policy,
    packing: Packing,
) -> Stored:
    """Read what the initial model has mastered, or find it out before the first step.

    Raises:
        ConfigError: the run has begun, and its files are gone.
    """
    folder, own = Path(config.run.dir) / "rehearsal", config.rehearsal
    settings = {
        "model": _digest(config),
        "samples": own.samples,
        "threshold": own.threshold or own.samples,
        "prompts": len(rows),
    }
    stored = rehearsal.load(folder, settings)
    if stored is not None:
        return stored
    _must_begin(config, folder)
    packing = replace(packing, tokens=config.train.seq_len * config.train.micro_batch_size)
    stored = rehearsal.collect(folder, settings, rows, own, config.pass_at_k.right, sampler, scorer, policy, packing)
    if len(stored.mastered) == len(rows):
        raise ConfigError(
            "rehearsal: the initial model has mastered every prompt; give harder rows, or rehearsal.threshold"
        )
    return stored


def _without(
    pools: list[list[tuple[Row, list[int]]]], shares: tuple[float, ...], numbers: set[int]
) -> tuple[list[list[tuple[Row, list[int]]]], tuple[float, ...]]:
    """The pools without rows of these numbers, counted over all pools, and the shares of those that are not empty."""
    left, first = [], 0
    for pool in pools:
        left.append([row for number, row in enumerate(pool, first) if number not in numbers])
        first += len(pool)
    kept = [(pool, share) for pool, share in zip(left, shares, strict=True) if pool]
    return [pool for pool, _ in kept], tuple(share for _, share in kept)
