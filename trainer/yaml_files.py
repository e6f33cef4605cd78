"""Checks of the structure of YAML or JSON settings files. Imports neither torch nor megatron.

The parser used by trainer.cli silently takes the later of two equal keys, and names neither key nor file when a section
is empty. Files are therefore first checked here, as trees of nodes with line numbers.
"""

import difflib
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

import yaml

_NULL = "tag:yaml.org,2002:null"


class FileError(ValueError):
    """An invalid settings file. The message is one line: file, line, key, and what to do."""


def check(path: Path, config_class: type, prefix: str = "") -> None:
    """Raise FileError if a file's structure does not fit `config_class`. The parser later checks keys and types.

    Args:
        path: The file.
        config_class: The dataclass that the file fills.
        prefix: Dotted key of the section that the file fills, including the last dot; empty for a whole configuration.

    Raises:
        FileError: the file is not UTF-8 or not YAML, repeats a key, or has a section or value that is null or of the
            wrong kind.
    """
    root = _compose(path)
    if not isinstance(root, yaml.MappingNode):
        what = "is empty" if root is None else "holds no keys"
        raise FileError(f"{path} {what}; write keys such as {_example(config_class, prefix)}")
    _check_duplicates(path, root)
    _check_section(path, root, config_class, prefix)


def _compose(path: Path) -> yaml.Node | None:
    try:
        node: yaml.Node | None = yaml.compose(path.read_text(encoding="utf-8"), yaml.SafeLoader)
    except UnicodeDecodeError as error:
        raise FileError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8") from error
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        tab = "'\\t'" in str(error.problem)
        problem = "a tab; YAML is indented with spaces" if tab else f"not YAML: {error.problem or error.context}"
        raise FileError(f"{path}{line}: {problem}") from error
    except yaml.YAMLError as error:
        raise FileError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    return node


def _check_duplicates(path: Path, node: yaml.Node) -> None:
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _check_duplicates(path, item)
    if not isinstance(node, yaml.MappingNode):
        return
    seen: dict[Any, int] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise FileError(f"{path}:{_line(key)}: a key must be a plain word, not a list or a section")
        if key.value in seen:
            raise FileError(
                f"{path}:{_line(key)}: {key.value!r} was given on line {seen[key.value]} already; keep one of the two"
            )
        seen[key.value] = _line(key)
        _check_duplicates(path, value)


def _check_section(path: Path, section: yaml.MappingNode, config_class: type, prefix: str) -> None:
    hints = get_type_hints(config_class)
    for key, value in section.value:
        hint = hints.get(key.value)
        if hint is None:
            continue
        where, name = f"{path}:{_line(key)}", f"{prefix}{key.value}"
        if is_dataclass(hint):
            _check_group(path, value, hint, name, where)
        elif value.tag == _NULL and NoneType not in get_args(hint):
            raise FileError(f"{where}: {name} is null; give it a value, or leave the line out")


def _check_group(path: Path, value: yaml.Node, config_class: Any, name: str, where: str) -> None:
    """Check a section: a mapping, or the name of a file that holds one."""
    if isinstance(value, yaml.MappingNode):
        _check_section(path, value, config_class, f"{name}.")
    elif value.tag == _NULL:
        raise FileError(f"{where}: {name} is empty; give its keys, or leave the line out")
    elif isinstance(value, yaml.ScalarNode) and value.tag.endswith(":str"):
        # Relative to the file that contains the name, as in the parser.
        file = path.parent / Path(value.value).expanduser()
        if not file.is_file():
            raise FileError(f"{where}: {name} names the file {file}, which does not exist{_near(file)}")
        check(file, config_class, f"{name}.")
    else:
        raise FileError(
            f"{where}: {name} must be a section with keys such as {_example(config_class, f'{name}.')}, or name a file"
        )


def check_named(value: str, config_class: type, name: str) -> None:
    """Check the file given for a section by an option `--NAME FILE`.

    Raises:
        FileError: the file does not exist, or `check` rejects it.
    """
    file = Path(value).expanduser()
    if not file.is_file():
        raise FileError(f"--{name}: the file {value} does not exist{_near(file)}; single keys are set by --{name}.KEY")
    check(file, config_class, f"{name}.")


def _near(file: Path) -> str:
    """Return a hint at an existing file with a similar name, or an empty string."""
    siblings = list(_files_of(file.parent))
    close = difflib.get_close_matches(file.name, siblings, n=1)
    return f" (did you mean {file.parent / close[0]}?)" if close else ""


def _files_of(folder: Path) -> Iterator[str]:
    return (path.name for path in folder.iterdir()) if folder.is_dir() else iter(())


def _example(config_class: Any, prefix: str) -> str:
    """Return the first key of a section that takes a plain value."""
    name, hint = next(iter(get_type_hints(config_class).items()))
    return _example(hint, f"{prefix}{name}.") if is_dataclass(hint) else f"{prefix}{name}"


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1
