"""The commands that README.md and docs/ show, read from the files."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# A line of a code block, or a text in backticks, is a command if it begins with one of these.
PROGRAMS = ("make", "spiketrain", "python", "torchrun", "sbatch", "source", "pytest")
_ANY = "|".join(PROGRAMS)
_BLOCK = re.compile(rf"^ {{4,}}(?=(?:{_ANY})\b)")
_INLINE = re.compile(rf"`((?:{_ANY}) [^`]+)`")


@dataclass(frozen=True)
class Command:
    """A command as it is written.

    Attributes:
        file: Where, relative to the repository.
        line: Its first line, from 1.
        text: All of it, lines that go on included.
        in_block: On lines of its own, to be copied; not in a sentence, where it may have placeholders.
    """

    file: str
    line: int
    text: str
    in_block: bool

    @property
    def words(self) -> list[str]:
        """The words that a shell makes of it."""
        return shlex.split(self.text, comments=True)

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


def documented_commands() -> list[Command]:
    """All of them, file by file, in their order."""
    files = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    return [command for file in files for command in read(file)]


def read(file: Path) -> list[Command]:
    """The commands of one file, in their order."""
    name, found = str(file.relative_to(ROOT)), []
    lines = file.read_text(encoding="utf-8").splitlines()
    number = 0
    while number < len(lines):
        first = number
        if _BLOCK.match(lines[number]):
            while lines[number].endswith("\\"):
                number += 1
            text = " ".join(line.removesuffix("\\").strip() for line in lines[first : number + 1])
            found.append(Command(name, first + 1, text, True))
        number += 1
    # A sentence may be broken within its backticks.
    whole = "\n".join("" if _BLOCK.match(line) else line for line in lines)
    for match in _INLINE.finditer(whole):
        line = whole.count("\n", 0, match.start()) + 1
        found.append(Command(name, line, " ".join(match.group(1).split()), False))
    return sorted(found, key=lambda command: command.line)
