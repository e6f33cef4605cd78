"""Starts a training command: parses its settings, refuses an invalid run, and trains.

Everything before training imports neither torch nor megatron.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from trainer import preflight, run_directory, run_lock, trainable
from trainer.cli import dump, fail, guess, make_parser, parse, tell_torchrun
from trainer.config import PretrainConfig, world_size_from_environment
from trainer.errors import ConfigError
from trainer.peers import PeerWatch
from trainer.runtime import EXIT_CONFIG_ERROR, keep_threads_awake, rank, write_status
from trainer.stored import named_models, teacher, weights
from trainer.watchdog import dump_stacks_on_request

C = TypeVar("C", bound=PretrainConfig)


def start(
    config_class: type[C],
    description: str,
    check: Callable[[C], preflight.Findings],
    run: Callable[[C, str, PeerWatch], int],
) -> int:
    """Run the command on the process's arguments and return the exit code.

    Args:
        config_class: The command's settings.
        description: What it does, for --help.
        check: Checks a run's files against each other, and raises ConfigError.
        run: Trains, given the configuration, its YAML text, and the process's watch over its peers.
    """
    keep_threads_awake(guess(sys.argv[1:], "run.device"))
    parser = make_parser(config_class, description)
    parser.add_argument("--check", action="store_true", help="validate configuration, layout and inputs, then exit")
    parser.add_argument("--world-size", type=int, default=None, help="with --check: the ranks that would be started")
    parser.add_argument("--init", metavar="DIR", help="start from weights or a run: model, tokenizer and tensors")
    check_only = "--check" in sys.argv[1:]
    try:
        arguments = weights.expand_init(sys.argv[1:], config_class().run.dir)
        config, namespace = parse(config_class, parser, arguments, named_models.settle)
        config, restart = run_directory.settle_restart(config)
        if restart is not None and rank() == 0:
            print(restart, flush=True)
        world_size = world_size_from_environment() if namespace.world_size is None else namespace.world_size
        if world_size < 1:
            raise ConfigError(f"--world-size is {world_size}: it must be at least 1")
        config.validate_layout(world_size)
        finished = run_directory.check(config)
        weights.check(config)
        findings = check(config) if check_only or not finished else preflight.Findings()
        if check_only:
            weights.check_layers(config)
            weights.check_tensors(config)
            trainable.check(config)
            teacher.check_tensors(config)
    except ValueError as error:
        run_dir = guess(sys.argv[1:], "run.dir") or config_class().run.dir
        # If another run trains there, its status must not be overwritten.
        if not check_only and run_lock.other_owner(run_dir) is None:
            write_status(run_dir, "config_error", EXIT_CONFIG_ERROR, str(error))
        fail(str(error))
    if check_only:
        for line in (*findings.notes, *(f"warning: {line}" for line in findings.warnings)):
            print(line)
        print(f"the configuration is valid for {world_size} {'rank' if world_size == 1 else 'ranks'}")
        return 0
    if finished:
        print(f"{config.run.dir} has already reached step {config.train.steps}; raise train.steps to go on")
        return 0
    try:
        with run_lock.owned(config.run.dir):
            return train(config, dump(parser, namespace, config_class), run)
    except ConfigError as error:
        fail(str(error))


def train(config: C, config_yaml: str, run: Callable[[C, str, PeerWatch], int]) -> int:
    """Train in a run directory that this launch owns, and return the exit code.

    Raises:
        ConfigError: an input turned out to be unusable; recorded in run.dir/status.json as well.
    """
    dump_stacks_on_request()
    # Before the slow imports: a rank may die while the others import.
    peers = PeerWatch(config.run.dir)
    try:
        # Check again now that this launch owns the directory and nobody else writes there.
        run_directory.check(config)
        return run(config, config_yaml, peers)
    except ConfigError as error:
        if rank() == 0:
            write_status(Path(config.run.dir), "config_error", EXIT_CONFIG_ERROR, str(error))
            raise
        # Reports nothing if rank 0 already did. rank 0 may not have met the error, and would then wait for this rank.
        peers.report_own_failure(str(error), "config_error", EXIT_CONFIG_ERROR)
        tell_torchrun(f"error: {error}")
        sys.exit(EXIT_CONFIG_ERROR)
