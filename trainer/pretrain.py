"""Builds a pretraining run from data, model, engine and callbacks, and runs it."""

import logging
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import torch

from models.decoder import shapes
from models.parameters import matches
from trainer import logs, precision, preflight, run_directory, run_lock, trainable
from trainer.callbacks.base import Callback
from trainer.callbacks.checkpointer import Checkpointer
from trainer.callbacks.evaluator import Evaluator
from trainer.callbacks.health import NonFiniteGuard, TrainingDiverged
from trainer.callbacks.metrics import MetricsFile, TensorBoard
from trainer.callbacks.profiler import Profiler
from trainer.callbacks.progress import ProgressLine
from trainer.callbacks.ranges import RunningRanges
from trainer.callbacks.signals import StopOnSignal
from trainer.callbacks.teachers import TeacherRecord
from trainer.compression import check_compression
from trainer.config import PretrainConfig
from trainer.data.sources import find_sources
from trainer.device import choose_device, configure_threads, keep_freed_memory, peak_flops
from trainer.durable import write_atomically
from trainer.engines.base import Engine
from trainer.engines.spec import EngineSpec
from trainer.errors import ConfigError, describe_failure
from trainer.events import EventLog
from trainer.loop import Outcome, Trainer
from trainer.objectives.of_phase import PhaseObjectives
from trainer.peers import STOPS, PeerWatch
from trainer.phases import PhasedSampler, expand
from trainer.runtime import EXIT_STOPPED, rank, write_status
from trainer.stored import checkpoint, teacher, weights
from trainer.stored.checkpoint import Progress, Retention
from trainer.stored.named_models import named
from trainer.stored.on_disk import listed
from trainer.watchdog import Watchdog

_LOGGER = logging.getLogger("spiketrain")

C = TypeVar("C", bound=PretrainConfig)


def run(
    config: C,
    config_yaml: str,
    peers: PeerWatch | None = None,
    train: Callable[[C, str, Watchdog], Outcome] | None = None,
) -> int:
    """Train and return the exit code: 0 done, 75 stopped on request.

    Args:
        config: The run's configuration.
        config_yaml: The same as YAML text.
        peers: The process's watch over its peers, if it already exists.
        train: Trains in the run directory, which this process owns; default: pretraining.

    Raises:
        ConfigError: an input is unusable, or another process holds the run directory.
    """
    run_dir = Path(config.run.dir)
    # Ignored until there is something to save. Its default action would end the process.
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    with _signals_given_back(), run_lock.owned(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
        logs.configure(run_dir, rank())
        peers = peers or PeerWatch(run_dir)
        watchdog = Watchdog(config.run, peers)
        try:
            outcome = (train or _train)(config, config_yaml, watchdog)
        except (ConfigError, SystemExit):
            raise
        except TrainingDiverged as error:
            _ignore_stops()
            write_status(run_dir, "failed", 1, str(error))
            _LOGGER.error("%s", error)
            if rank() == 0:
                # All ranks diverge together, so rank 0 reports for all of them.
                peers.record_failure(list(range(int(os.environ.get("WORLD_SIZE", "1")))), str(error))
            return 1
        except BaseException as error:
            _ignore_stops()
            peers.report_own_failure(describe_failure(error))
            raise
        finally:
            watchdog.close()
    return _exit_code(outcome)


@contextmanager
def _signals_given_back() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in STOPS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _ignore_stops() -> None:
    """Ignore further stop requests. The run has ended, and a stop must not change or hide its recorded outcome."""
    for number in STOPS:
        # Uses an empty handler, not SIG_IGN: the peer watch would not receive an ignored signal either.
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda number, frame: None)


def _exit_code(outcome: Outcome) -> int:
    return 0 if outcome is Outcome.DONE else EXIT_STOPPED


def _train(config: PretrainConfig, config_yaml: str, watchdog: Watchdog) -> Outcome:
    config, config_yaml, device, threads = prepare(config, config_yaml)
    phases = expand(config)
    # Every phase is checked before a model is built, so that a late phase cannot fail after days.
    all_sources = [find_sources(phase.config) for phase in phases]
    findings, sources = preflight.check(config, all_sources), all_sources[0]
    vocab_size = config.model.padded_vocab_size(sources.vocab_size)
    resumes = not run_directory.starts_anew(config)
    engine = build_engine(config, vocab_size, device)
    callbacks = build_callbacks(config, [] if sources.validation is None else [Evaluator(sources)])
    events = EventLog(config.run.dir)
    progress = resume(config, engine, callbacks, events, resumes)
    if rank() == 0:
        write_configuration(config, config_yaml, progress)
    describe(config, engine, threads, findings)
    trainer = Trainer(
        config,
        config_yaml,
        engine,
        PhasedSampler(
            phases, [own.open_training(phase.config) for own, phase in zip(all_sources, phases, strict=True)]
        ),
        sources.tokenizer,
        callbacks,
        progress,
        total_peak_flops(config, engine),
        watchdog,
        events,
        PhaseObjectives(engine),
    )
    return finish(trainer)


def prepare(config: C, config_yaml: str) -> tuple[C, str, torch.device, int]:
    """Check the parameters' names and shapes, and set this process up.

    Returns:
        The configuration and its YAML text with the precision settled, the device, and the threads of this process.

    Raises:
        ConfigError: the initial weights, a pattern of names or the teacher do not fit the model.
    """
    weights.check_layers(config)
    weights.check_tensors(config)
    trainable.check(config)
    teacher.check_tensors(config)
    check_compression(config)
    keep_freed_memory()
    device = choose_device(config.run.device)
    # Resolves `train.precision: auto` from the continued run, or from the device.
    config, config_yaml = precision.settle(config, config_yaml, device)
    threads = configure_threads(config.run.threads)
    if config.run.deterministic:
        torch.use_deterministic_algorithms(True)
    return config, config_yaml, device, threads


def finish(trainer: Trainer) -> Outcome:
    """Train to the end or a stop, record the outcome, and close the engine."""
    config, engine = trainer.config, trainer.engine
    outcome = trainer.fit()
    _ignore_stops()
    if outcome is Outcome.DONE:
        trainer.record("done")
    # Write before any rank exits: after a stop the launcher takes an exit for a failure and kills the other ranks.
    write_status(config.run.dir, outcome.value, _exit_code(outcome))
    engine.collectives.barrier()
    engine.close()
    return outcome


def write_configuration(config: PretrainConfig, config_yaml: str, progress: Progress) -> None:
    """Write config.yaml, and warn if the schedule differs from that of the steps taken so far."""
    run_dir = Path(config.run.dir)
    # The checkpoint has the settings of the steps taken; the directory's file may be from a later start.
    saved = checkpoint.checkpoint_path(run_dir, progress.step)
    change = run_directory.change_of_schedule(saved if saved.is_dir() else run_dir, config, progress.step)
    if change is not None:
        _LOGGER.warning("%s", change)
    write_atomically(run_dir / "config.yaml", config_yaml.encode())


def build_engine(config: PretrainConfig, vocab_size: int, device: torch.device) -> Engine:
    """Build the engine that engine.name selects. The import is local, so the other engine need not be installed."""
    spec = EngineSpec.of(config, vocab_size)
    if config.engine.name == "deepspeed":
        from trainer.engines.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(spec, device)
    from trainer.engines.megatron import MegatronEngine

    return MegatronEngine(spec, device)


def build_callbacks(config: PretrainConfig, validations: Sequence[Callback] = ()) -> list[Callback]:
    """Build the callbacks in calling order.

    Callbacks that report a step, or may end the run, precede the one that saves it. Validations come last: they take
    long, so the step is saved first.
    """
    run_dir, reporting = Path(config.run.dir), config.logging
    callbacks: list[Callback] = [StopOnSignal(), MetricsFile(run_dir / "metrics.jsonl", reporting.every)]
    if reporting.tensorboard:
        callbacks.append(TensorBoard(run_dir / "tensorboard", reporting.every))
    if reporting.progress:
        callbacks.append(ProgressLine())
    if reporting.profile_step:
        callbacks.append(Profiler(run_dir / "profile", reporting.profile_step))
    callbacks.append(NonFiniteGuard(config.train.max_skipped_steps))
    if config.train.compression.has_running_ranges:
        callbacks.append(RunningRanges())
    if digests := teacher.digests(config):
        callbacks.append(TeacherRecord(digests))
    saving = config.checkpoint
    callbacks.append(Checkpointer(saving.every, Retention.of(saving), saving.asynchronous))
    return [*callbacks, *validations]


def resume(
    config: PretrainConfig, engine: Engine, callbacks: Sequence[Callback], events: EventLog, resumes: bool
) -> Progress:
    """Load the checkpoint that checkpoint.resume selects, and log the skipped ones.

    If the engine `resumes`, its parameters are uninitialised, so there must be a checkpoint.

    Raises:
            ConfigError: no checkpoint is readable, or the named one is damaged, of another model or of a later version.
                Nothing has been changed then.
    """
    _require_same_models(config, engine)
    path = _checkpoint_to_load(config, engine)
    if path is None and resumes:
        raise ConfigError(
            f"{config.run.dir}: its checkpoints disappeared during the start; restore them and start again"
        )
    if engine.rank == 0:
        # Before the first event of this start is appended.
        events.cut_torn_line()
    if path is None:
        if engine.rank == 0:
            events.record("start", 0, ranks=engine.world_size, init=config.checkpoint.init)
            if config.checkpoint.init is not None:
                _LOGGER.info("started from %s", config.checkpoint.init)
        return Progress()
    # Read first, because it may refuse the checkpoint, and nothing may have changed by then.
    states = checkpoint.read_callbacks(path, callbacks)
    engine.load(path / "state")
    for callback, state, version in states:
        callback.load_state_dict(state, version)
    progress = checkpoint.read_progress(path)
    if engine.rank == 0:
        events.record("resume", progress.step, ranks=engine.world_size, path=str(path))
        _LOGGER.info("resumed from %s", path)
    return progress


def _require_same_models(config: PretrainConfig, engine: Engine) -> None:
    """Refuse ranks that have found different checkpoints of a run that is still under way."""
    own = dict(named(asdict(config)))
    first = engine.collectives.broadcast(own)
    for keys, path in own.items():
        if path != first.get(keys):
            raise ConfigError(
                f"{'.'.join(map(str, keys))}: rank {engine.rank} reads {path}, and rank 0 {first.get(keys)}; name one "
                "of the checkpoints"
            )


def _checkpoint_to_load(config: PretrainConfig, engine: Engine) -> Path | None:
    run_dir, resume = Path(config.run.dir), config.checkpoint.resume
    if resume == "never":
        if engine.rank == 0 and (moved := run_directory.set_aside(run_dir)):
            _LOGGER.info("checkpoint.resume=never: what was there is now %s", ", ".join(map(str, moved)))
        # No rank may write into the directory before its old files have been renamed.
        engine.collectives.barrier()
        return None
    if resume != "auto":
        checkpoint.require_whole(engine, Path(resume))
        return Path(resume)
    path, complaints = checkpoint.find_latest_over_ranks(engine, run_dir)
    for complaint in complaints if engine.rank == 0 else ():
        _LOGGER.warning("%s", complaint)
    # Decide from the broadcast result: each rank may see the directory differently.
    if path is None and (damaged := checkpoint.damaged_ones(complaints)):
        raise run_directory.nothing_whole(run_dir, damaged[0])
    if path is not None and engine.rank == 0:
        for aside in checkpoint.set_damaged_aside(run_dir, path):
            _LOGGER.warning("the damaged checkpoint is now %s, which may be removed", aside)
    return path


def describe(config: PretrainConfig, engine: Engine, threads: int, findings: preflight.Findings) -> None:
    """Log model, batch and findings, on rank 0."""
    if engine.rank != 0:
        return
    train = config.train
    sizes = {name: value.numel() for name, value in shapes(config.model, engine.model.vocab_size).named_parameters()}
    patterns = trainable.trained_in_any(config)
    trained = sum(size for name, size in sizes.items() if matches(name, patterns))
    accumulation = train.accumulation(engine.data_parallel_size)
    _LOGGER.info(
        "model: %.2f M parameters, %d layers (%s), vocabulary %d",
        sum(sizes.values()) / 1e6,
        config.model.num_layers,
        ", ".join(config.model.layer_mixers()),
        engine.model.vocab_size,
    )
    if trained < sum(sizes.values()):
        _LOGGER.info("training %.2f M of them, %s; the others are frozen", trained / 1e6, listed(patterns))
    for line in (*_about_experts(config), *findings.notes):
        _LOGGER.info("%s", line)
    for line in findings.warnings:
        _LOGGER.warning("%s", line)
    _LOGGER.info(
        "batch: %d sequences of %d tokens = %d data-parallel x %d micro x %d accumulated; %s on %s, %d threads a rank",
        train.global_batch_size,
        train.seq_len,
        engine.data_parallel_size,
        train.micro_batch_size,
        accumulation,
        train.precision,
        engine.device,
        threads,
    )


def _about_experts(config: PretrainConfig) -> list[str]:
    """Describe a mixture of experts, for the log at the start."""
    moe, parallel = config.model.moe, config.parallel
    if not moe.num_experts:
        return []
    lines = [
        f"experts: {moe.num_experts} routed, {moe.shared_experts} shared in {len(config.model.moe_layers())} layers, "
        f"over {parallel.expert} ranks; a token goes to at most {moe.experts_at(0)} at first, {moe.experts_at(None)} "
        "in the end"
    ]
    if moe.spawn_step is not None:
        lines.append(
            f"up to step {moe.spawn_step} all tokens go to the first expert; then the others become copies of it"
        )
    if parallel.tensor > 1:
        lines.append("parallel.sequence=true: with experts each tensor-parallel rank routes tokens of its own")
    warning = moe.router.dense_to_sparse.warning()
    return lines if warning is None or moe.router.gate == "top_k" else [*lines, warning]


def total_peak_flops(config: PretrainConfig, engine: Engine) -> float | None:
    """Return the peak matrix-multiplication FLOP/s of all ranks. Where it is measured, all measure at once."""
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    # Ranks of one machine share its cores, so a rank alone would measure too much.
    engine.collectives.barrier()
    peak = peak_flops(engine.device, dtype)
    (total,) = engine.collectives.sum_over_ranks([peak or 0.0])
    if engine.rank == 0 and total:
        _LOGGER.info("peak of matrix multiplication: %.0f GFLOP/s", total / 1e9)
    return total or None
