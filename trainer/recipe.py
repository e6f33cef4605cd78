"""Staged recipes: the steps of a conversion, each a command with its options, run or resumed by one command.

    dir: runs/convert
    base: {config: configs/pretrain/laptop.yaml}
    steps:
      - train: {run: {dir: runs/convert/softmax}, model: configs/models/laptop-dense.yaml}
      - hybrid: {source: runs/convert/softmax, output: runs/convert/hybrid, pattern: "gated_delta_net, full_attention"}
      - train: {init: runs/convert/hybrid, run: {dir: runs/convert/trained}, tokens: 1.0e+6}

A step is what its command would be on the command line, so every step can be repeated by hand, and paths are relative
to the working directory. `train` is spiketrain pretrain, with `base` before its own options; `posttrain` and
`prepare_rows` are the commands of these names.

A step that has ended is skipped. One that was under way goes on: a training run from its newest checkpoint, all others
from the beginning, because their outputs appear only when they are complete. `DIR/recipe.json` records the options of
every step, with the contents of the files that they name. A step whose options have changed is refused, and so are
later steps that were made from an earlier output that is gone.

On several ranks, all of them run the training steps, each as one rank of it. Rank 0 runs all others. The ranks learn
from the record what is to be done, so it must lie where all of them can read it, as the checkpoints must.

Imports neither torch nor megatron.
"""

import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from trainer.cli import dotted_keys, groups, nearest_key
from trainer.config import TrainConfig
from trainer.durable import write_atomically
from trainer.errors import ConfigError
from trainer.json_files import read_object
from trainer.peers import WRAPPER
from trainer.run_directory import differences, flatten
from trainer.runtime import EXIT_CONFIG_ERROR

# Options that a training step has besides its configuration; `tokens` sets train.steps.
_OF_TRAINING = {"train": ("config", "init", "tokens"), "posttrain": ("config", "init")}
# Where the command of a step writes; a step with this output is complete.
_OUTPUTS = {"train": "run.dir", "posttrain": "run.dir", "evaluate": "json"}


@dataclass(frozen=True)
class Step:
    """A step of a recipe.

    Attributes:
        number: Its number, from 1.
        command: The name of its command.
        options: Its options by dotted key, those of `base` included, in order.
    """

    number: int
    command: str
    options: dict[str, Any]

    @property
    def output(self) -> Path:
        """What it writes."""
        return Path(str(self.options[_OUTPUTS.get(self.command, "output")])).expanduser()

    @property
    def is_training(self) -> bool:
        """Whether all ranks run it."""
        return self.command in _OF_TRAINING

    def __str__(self) -> str:
        return f"step {self.number}, {self.command} to {self.output}"

    def arguments(self) -> list[str]:
        """The options as words of a command line."""
        words = []
        for key, value in self.options.items():
            if key == "tokens":
                words += ["--train.steps", str(_steps_for(self, float(value)))]
            else:
                words += [f"--{key}", value if isinstance(value, str) else json.dumps(value)]
        return words

    def settings(self) -> dict[str, Any]:
        """The options with the contents of the YAML files that they name and that the step reads, by dotted key."""
        found: dict[str, Any] = {}
        for key, value in self.options.items():
            found |= {key: value} | ({} if Path(str(value)) == self.output else flatten(_contents(value), f"{key}."))
        # As JSON gives them back.
        return dict(json.loads(json.dumps(found)))


def read_steps(base: Mapping[str, Any], steps: Sequence[Any], commands: Mapping[str, type]) -> list[Step]:
    """Read the steps of a recipe.

    Args:
        base: Options of all training steps.
        steps: The steps, each a mapping of its command to its options.
        commands: The configuration class of each command.

    Raises:
        ConfigError: a step is not of this form, has an unknown command or option, or no output of its own.
    """
    read: list[Step] = []
    for number, step in enumerate(steps, 1):
        if not isinstance(step, dict) or len(step) != 1 or not isinstance(next(iter(step.values())), dict):
            raise ConfigError(f"steps: step {number} must name one command with its options, as in `- hybrid: {{…}}`")
        (command, own), where = next(iter(step.items())), f"steps: step {number}"
        if command not in commands:
            raise ConfigError(f"{where}: no command {command!r}; choose from {', '.join(commands)}")
        options = dict(_flat(own, commands[command]))
        if command == "train":
            options = dict(_flat(base, commands[command])) | options
        known = dotted_keys(commands[command])
        for key in options:
            if key not in known and key not in _OF_TRAINING.get(command, ()):
                nearest = nearest_key(key, known)
                hint = f"did you mean {nearest!r}?" if nearest else f"spiketrain {command} --help lists them"
                raise ConfigError(f"{where}: unknown option {key!r} of {command}; {hint}")
        output = _OUTPUTS.get(command, "output")
        if not isinstance(options.get(output), str):
            raise ConfigError(f"{where}: {command} needs {output}, by which it is known whether it has ended")
        read.append(Step(number, command, options))
        if "tokens" in options:
            _steps_for(read[-1], options["tokens"])
    outputs = [step.output for step in read]
    for step in read:
        if outputs.count(step.output) > 1:
            raise ConfigError(f"steps: two steps write to {step.output}; give each an output of its own")
    return read


def _flat(values: Mapping[str, Any], config_class: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield options by dotted key. Only sections are flattened: a blend, say, is a value."""
    sections = groups(config_class)
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and key in sections:
            yield from _flat(value, config_class, f"{key}.")
        else:
            yield key, value


def _contents(value: Any) -> dict[str, Any]:
    """The settings in a YAML file and in the files that it names; nothing for any other value."""
    if not isinstance(value, str) or not value.endswith((".yaml", ".yml")):
        return {}
    path = Path(value).expanduser()
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read ({' '.join(str(error).split())}); correct it") from error
    if not isinstance(values, dict):
        return {}
    # Files that a file names are relative to it.
    inner = {key: _contents(str(path.parent / item)) if isinstance(item, str) else item for key, item in values.items()}
    return {key: inner[key] or item for key, item in values.items()}


def _steps_for(step: Step, tokens: Any) -> int:
    """Optimizer steps that read so many tokens.

    Raises:
        ConfigError: tokens is not a positive number, or the number of steps is not determined by it alone.
    """
    if not isinstance(tokens, int | float) or not 0 < tokens < math.inf:
        raise ConfigError(
            f"steps: step {step.number}: tokens is {tokens!r}: it must be a positive number, as in 1.0e+9"
        )
    settings = step.settings()
    if "train.steps" in step.options or any(settings.get(key) for key in ("phases", "config.phases")):
        raise ConfigError(f"steps: step {step.number}: tokens sets train.steps, and is not for phases; leave one out")
    sizes = asdict(TrainConfig())
    for name in sizes:
        # Options override the files that `config` names, as they do on the command line.
        for key in (f"config.train.{name}", f"train.{name}"):
            sizes[name] = settings.get(key, sizes[name])
    return math.ceil(tokens / (sizes["global_batch_size"] * sizes["seq_len"]))


class Record:
    """What has been run of a recipe: DIR/recipe.json.

    Args:
        folder: The recipe's directory.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "recipe.json"

    def read(self) -> dict[str, dict[str, Any]]:
        """Read the entries of all steps by output."""
        try:
            return read_object(self._path, "remove it to run every step again")
        except FileNotFoundError:
            return {}

    def of(self, step: Step) -> dict[str, Any] | None:
        """The entry of a step; None where it has none, or where there is no output that it could speak of.

        The same if the step was refused: its options have to change, and a run checks them against its checkpoints.
        """
        entry = self.read().get(str(step.output))
        if entry is None or not step.output.exists() or entry.get("exit_code") == EXIT_CONFIG_ERROR:
            return None
        # Outputs of conversions appear when they are complete, a moment before the record says so.
        return entry if step.is_training else entry | {"state": "done"}

    def is_done(self, step: Step) -> bool:
        """Whether a step has ended."""
        entry = self.of(step)
        return entry is not None and entry["state"] == "done"

    def write(self, step: Step, **values: Any) -> None:
        """Replace values of a step's entry."""
        entries = self.read()
        key = str(step.output)
        entries[key] = entries.get(key, {}) | {"command": step.command} | values
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self._path, (json.dumps(entries, indent=1) + "\n").encode())

    def check(self, steps: Sequence[Step]) -> None:
        """Compare the steps with what has been run of them.

        Raises:
            ConfigError: the options of a step have changed, or a later one was made before it.
        """
        pending: Step | None = None
        for step in steps:
            entry = self.of(step)
            if entry is None:
                pending = pending or step
                continue
            if pending is not None:
                raise ConfigError(
                    f"{step}: it was made from an earlier {pending.output}, which is to be made again; remove "
                    f"{step.output}, too"
                )
            if changed := differences(entry["settings"], step.settings()):
                raise ConfigError(
                    f"{step}: it was run with other options ({'; '.join(changed)}); restore them, or remove "
                    f"{step.output} to run it again"
                )
            if entry["state"] != "done":
                pending = step


def wait_for(record: Record, step: Step, launch: str, seconds: float = 1.0) -> dict[str, Any]:
    """Wait until rank 0 of this launch has ended a step, has given it up, or has begun it as a training step.

    Returns:
        The step's entry.
    """
    while True:
        if record.is_done(step):
            return {"state": "done", "exit_code": 0}
        entry = record.read().get(str(step.output), {})
        if entry.get("launch") == launch and (step.is_training or entry["state"] == "ended"):
            return entry
        time.sleep(seconds)


def single_process(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment without the variables that make a process one of several ranks."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
    return {
        name: value
        for name, value in environment.items()
        if name not in (*names, "SPIKETRAIN_LAUNCH") and not name.startswith("TORCHELASTIC_")
    }


def of_ranks(port: int, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment of a training step as one of this launch's ranks.

    Every training step is a launch of its own, which meets at a port of its own: torchrun's store would still hold what
    the ranks of the step before told each other.
    """
    own = {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "False", WRAPPER: str(os.getpid())}
    return {**environment, **own}
