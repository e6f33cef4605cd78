"""Command lines: turns a dataclass into options, YAML files and one-line errors. Imports neither torch nor megatron."""

import difflib
import json
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_args, get_type_hints

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace

from trainer import yaml_files
from trainer.errors import ConfigError
from trainer.runtime import EXIT_CONFIG_ERROR, keep_threads_awake, rank

# torchrun ends the other ranks as soon as one fails. They wait this many seconds for rank 0 to report the reason.
_SECONDS_FOR_RANK_0 = 10.0

# Exceptions that jsonargparse, PyYAML and the dataclasses raise on bad input.
_PARSE_ERRORS = (ArgumentError, TypeError, ValueError, KeyError, OSError)

# Keys whose values are paths, by the last part of the dotted key.
_PATHS = frozenset(
    {"dir", "path", "tokenizer", "validation_path", "cache_dir", "resume", "init", "source", "output", "checkpoint"}
    | {"teacher", "data", "prompt_file", "prompts", "validation", "test", "weights", "json", "recipe", "runs", "raster"}
    | {"layers_file", "haystack", "task_dir"}
)

# Parsers cached by `from_mapping`: building one takes a quarter of a second.
_PARSERS: dict[type, ArgumentParser] = {}

C = TypeVar("C")


def dotted_keys(config_class: type, prefix: str = "") -> list[str]:
    """All configuration keys of a nested dataclass, including groups: `train` as well as `train.steps`."""
    keys: list[str] = []
    hints = get_type_hints(config_class)
    for item in fields(config_class):
        keys.append(prefix + item.name)
        if is_dataclass(hints[item.name]):
            keys += dotted_keys(hints[item.name], f"{prefix}{item.name}.")
    return keys


def make_parser(config_class: type, description: str) -> ArgumentParser:
    """Build a parser with `--config FILE`, `--print_config` and one dotted option per field."""
    parser = ArgumentParser(description=description, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file; may be repeated, later ones override")
    parser.add_class_arguments(config_class, None, as_group=False, sub_configs=True)
    return parser


def parse(
    config_class: type[C],
    parser: ArgumentParser,
    arguments: Sequence[str],
    settle: Callable[[Namespace], None] = lambda namespace: None,
) -> tuple[C, Namespace]:
    """Parse files and options into the dataclass. `settle` may change values before.

    Raises:
        ConfigError: an unknown key, a wrong type, a missing file, or a value that the dataclass refuses.
    """
    try:
        _check_files(config_class, arguments)
        namespace = parser.parse_args(_reset_groups(config_class, arguments))
        _expand_home(config_class, namespace)
        settle(namespace)
        return _build(config_class, parser, namespace), namespace
    except _PARSE_ERRORS as error:
        raise ConfigError(_one_line(str(error), dotted_keys(config_class))) from error


def _options(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield the name and value of each option, given as `--name value` or as `--name=value`.

    A leading `~` in a value is expanded, because the parser expands it too when it looks for a file.
    """
    for i, argument in enumerate(arguments):
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            yield name, os.path.expanduser(value if equals else next(iter(arguments[i + 1 : i + 2]), ""))


def _check_files(config_class: type, arguments: Sequence[str]) -> None:
    """Refuse settings files that the parser would misread, or would reject without naming the file."""
    sections = groups(config_class)
    for name, value in _options(arguments):
        if name == "config" and os.path.isfile(value):
            yaml_files.check(Path(value), config_class)
        # A section may also be written inline: `--data {path: books}`.
        elif name in sections and not value.lstrip().startswith("{"):
            yaml_files.check_named(value, sections[name], name)


def _expand_home(config_class: type, namespace: Namespace) -> None:
    """Expand a leading `~` in paths. The shell leaves it alone in `--run.dir=~/runs`, and so does YAML."""
    for key in dotted_keys(config_class):
        value = namespace.get(key)
        if key.rsplit(".", 1)[-1] not in _PATHS:
            continue
        if isinstance(value, str):
            namespace[key] = os.path.expanduser(value)
        elif isinstance(value, list):
            namespace[key] = [os.path.expanduser(path) for path in value]


def _reset_groups(config_class: type, arguments: Sequence[str]) -> list[str]:
    """Reset a group to its defaults before a file that is named for it, as in `--model FILE`.

    Lists of sections are emptied before they are given again.

    Without the reset, keys that the file or entry omits would keep their previous values: a dense model loaded over a
    mixture of experts would keep the experts.
    """
    sections, lists = groups(config_class), _lists_of_sections(config_class)
    files = iter(_options(arguments))
    reset: list[str] = []
    for argument in arguments:
        name, value = next(files) if argument.startswith("--") else ("", "")
        # Not pathlib: the value may be an inline section, which can exceed the length limit of file names.
        if name in sections and os.path.isfile(value):
            reset.append(f"--{name}={json.dumps(asdict(sections[name]()))}")
        given = [name] if name != "config" else [key for key in lists if _lookup(Path(value), key) is not None]
        reset += [f"--{key}=[]" for key in given if key in lists]
        reset.append(argument)
    return reset


def _lists_of_sections(config_class: type) -> list[str]:
    """Configuration keys whose values are lists of dataclasses."""
    hints = get_type_hints(config_class)
    return [item.name for item in fields(config_class) if any(map(is_dataclass, get_args(hints[item.name])))]


def groups(config_class: type, prefix: str = "") -> dict[str, type]:
    """The nested dataclasses by dotted key."""
    hints = get_type_hints(config_class)
    found = {prefix + item.name: hints[item.name] for item in fields(config_class) if is_dataclass(hints[item.name])}
    for name, group in list(found.items()):
        found |= groups(group, f"{name}.")
    return found


def _build(config_class: type[C], parser: ArgumentParser, namespace: Namespace) -> C:
    # Not `config_class(**values)`: jsonargparse adds keys of its own, such as `config`.
    values = vars(parser.instantiate(namespace))
    return config_class(**{item.name: values[item.name] for item in fields(config_class)})  # type: ignore[arg-type]


def from_mapping(config_class: type[C], values: dict[str, Any]) -> C:
    """Build the dataclass from plain values, as a YAML file gives them.

    Raises:
        ConfigError: as in `parse`.
    """
    try:
        parser = _PARSERS.get(config_class) or _PARSERS.setdefault(config_class, make_parser(config_class, ""))
        # A copy, because the parser replaces values in nested lists by its own objects.
        return _build(config_class, parser, parser.parse_object(deepcopy(values)))
    except _PARSE_ERRORS as error:
        raise ConfigError(_one_line(str(error), dotted_keys(config_class))) from error


def dump(parser: ArgumentParser, namespace: Namespace, config_class: type) -> str:
    """Serialise the resolved configuration as YAML that the same parser can read."""
    # The namespace also holds parser entries such as `config`, which are not fields of the dataclass.
    kept = Namespace(**{item.name: namespace[item.name] for item in fields(config_class)})
    return str(parser.dump(kept, skip_unset=False, skip_validation=True))


def guess(arguments: Sequence[str], key: str) -> str | None:
    """Find the last value of a key on the command line or in its YAML files, even if they do not parse as a whole."""
    found: Any = None
    for name, value in _options(arguments):
        if name == key:
            found = value
        elif name == "config" and os.path.isfile(value):
            found = _lookup(Path(value), key) or found
    return os.path.expanduser(str(found)) if found else None


def _lookup(path: Path, key: str) -> Any:
    try:
        node: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None
    for part in key.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    return node


def _one_line(message: str, known: list[str]) -> str:
    # jsonargparse's wording, rewritten into one line that names the key and the accepted values.
    text = " ".join(message.split())
    text = re.sub(r'^Parser key "([^"]+)": ', r"\1: ", text)
    text = re.sub(r"^config: File does not exist: '?([^']*)'?$", r"--config: \1 does not exist; check the path", text)
    text = re.sub(r"Expected an? <class '(\w+)'>\.", r"expected \1.", text)
    text = re.sub(r"Expected an? typing.Literal\[(.*?)\]\.", r"expected one of \1,", text)
    text = re.sub(r"[.,] Got value:", ", got", text)
    text = re.sub(r", got$", ", got nothing", text)
    text = re.sub(
        r"^(\S+): Unable to load config '(.*?)' - .*", r"\1: \2 is not YAML; write keys as in {key: value}", text
    )
    text = re.sub(r"Does not validate .* Union subtypes Subtypes: \[(.*?)\].*Given value: ", _union, text)
    text = re.sub(r"Group '([^']+)' does not accept option '([^']+)'", r"Key '\1.\2'", text)
    unknown = re.search(r"unrecognized arguments: --(\S+)|[Oo]ption '([^']+)' is not accepted|Key '([^']+)'", text)
    if unknown is None:
        return text
    key = next(group for group in unknown.groups() if group).split("=")[0]
    nearest = nearest_key(key, known)
    hint = f"did you mean {nearest!r}?" if nearest else "--help lists the keys"
    return f"unknown key {key!r}; {hint}"


def _union(match: re.Match[str]) -> str:
    names = re.findall(r"<class '(\w+)'>", match.group(1))
    return f"expected {' or '.join('null' if name == 'NoneType' else name for name in names)}, got "


def nearest_key(key: str, known: list[str]) -> str | None:
    """Find the closest known key: by near-identity, by a unique last part, by similar path, by similar last part."""
    typo = difflib.get_close_matches(key, known, n=1, cutoff=0.93)
    if typo:
        return typo[0]
    same_leaf = [name for name in known if name.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
    if len(same_leaf) == 1:
        return same_leaf[0]
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.7)
    if close:
        return close[0]
    by_leaf = {name.rsplit(".", 1)[-1]: name for name in known}
    leaf = difflib.get_close_matches(key.rsplit(".", 1)[-1], list(by_leaf), n=1, cutoff=0.7)
    if leaf:
        return by_leaf[leaf[0]]
    group = difflib.get_close_matches(key.split(".")[0], [name for name in known if "." not in name], n=1)
    return group[0] if group else None


def fail(message: str) -> NoReturn:
    """Print the message as one line and exit with code 2. Other ranks first give rank 0 time to report."""
    line = " ".join(message.split())
    if rank() != 0:
        time.sleep(_SECONDS_FOR_RANK_0)
        line = f"rank {rank()} on {socket.gethostname()}: {line}"
    line = f"error: {line}"
    print(line, file=sys.stderr, flush=True)
    tell_torchrun(line)
    sys.exit(EXIT_CONFIG_ERROR)


def tell_torchrun(line: str) -> None:
    """Put the message at the end of torchrun's own report, in place of its advice on tracebacks."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        details = {"py_callstack": line, "timestamp": str(int(time.time()))}
        Path(path).write_text(json.dumps({"message": {"message": line, "extraInfo": details}}))


def entry(main: Callable[[Any], int | None], config_class: type, description: str) -> NoReturn:
    """Run a command: parse, call `main(config)` and exit with its code (None means 0), or with 2 on a ConfigError."""
    # Before `main` imports torch: OpenMP reads its settings once, at import.
    keep_threads_awake(guess(sys.argv[1:], "device"))
    parser = make_parser(config_class, description)
    try:
        config: Any = parse(config_class, parser, sys.argv[1:])[0]
        sys.exit(main(config) or 0)
    except ConfigError as error:
        fail(str(error))
