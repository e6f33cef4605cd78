"""What holds for the tree as a whole: names, directions of imports, configurations that run, pages that are true."""

import ast
import functools
import math
import re
import shlex
import sys
from pathlib import Path

import pytest

from trainer.cli import dotted_keys, make_parser, parse
from trainer.config import PretrainConfig
from trainer.data.prepare_config import PrepareConfig
from trainer.planning.config import PlanConfig

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("kernels", "models", "trainer", "launch")
# Each imports only from itself and from what stands before it.
ALLOWED = {package: set(PACKAGES[: i + 1]) for i, package in enumerate(PACKAGES)}
MEGATRON_AT_THE_TOP = {"trainer/engines/megatron.py"}
MEGATRON_WHEN_CALLED = {
    "trainer/engines/megatron_cpu.py",
    "trainer/engines/deepspeed.py",
    "trainer/data/indexed.py",
    "models/parallel.py",
    "trainer/planning/experts.py",
}

SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def top_names(node: ast.AST) -> set[str]:
    """The top-level packages that one statement imports; a dotted name given to import_module counts."""
    if isinstance(node, ast.Import):
        return {alias.name.split(".")[0] for alias in node.names}
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports are absolute"
        return {(node.module or "").split(".")[0]}
    if isinstance(node, ast.Call) and "import_module" in ast.unparse(node.func):
        text = ast.unparse(node.args[0])
        return {match[1]} if (match := re.match(r"f?['\"](\w+)", text)) else set()
    return set()


@functools.cache
def imports(path: Path) -> tuple[set[str], set[str]]:
    """Top-level packages that a file imports: when it is imported itself, and at any time."""
    tree = ast.parse(path.read_text())
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for node in ast.walk(function)
    }
    every = [(id(node) in inside, top_names(node)) for node in ast.walk(tree)]
    at_once = set().union(*(names for lazy, names in every if not lazy))
    return at_once, set().union(*(names for _, names in every))


def test_the_walk_sees_imports(tmp_path):
    lazy = "    from models.x import y\n    importlib.import_module(f'megatron.{z}')\n"
    (tmp_path / "code.py").write_text(f"with a:\n    import torch.nn\ndef f():\n{lazy}")
    assert imports(tmp_path / "code.py") == ({"torch"}, {"torch", "models", "megatron"})
    assert len(SOURCES) > 40 and {path.relative_to(ROOT).parts[0] for path in SOURCES} == set(PACKAGES)


def test_no_script_hides_a_module():
    """`python launch/x.py` puts launch/ first on sys.path: launch/profile.py would be everyone's `profile`."""
    scripts = {path.stem for path in (ROOT / "launch").iterdir() if path.suffix == ".py" or path.is_dir()}
    imported = set().union(*(imports(path)[1] for path in SOURCES))
    assert scripts & (sys.stdlib_module_names | imported) == set()


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_imports_point_one_way(path):
    package = path.relative_to(ROOT).parts[0]
    ours = imports(path)[1] & {*PACKAGES, "tests"}
    assert ours <= ALLOWED[package], f"{name_of(path)} imports {', '.join(sorted(ours - ALLOWED[package]))}"


def test_who_imports_megatron():
    at_once = {name_of(path) for path in SOURCES if "megatron" in imports(path)[0]}
    ever = {name_of(path) for path in SOURCES if "megatron" in imports(path)[1]}
    assert at_once == MEGATRON_AT_THE_TOP
    assert ever == MEGATRON_AT_THE_TOP | MEGATRON_WHEN_CALLED


def test_who_imports_deepspeed():
    assert [path.name for path in SOURCES if "deepspeed" in imports(path)[1]] == ["deepspeed.py"]


# Configurations

parser_of = functools.cache(lambda config: make_parser(config, ""))


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "pretrain").rglob("*.yaml")), ids=name_of)
def test_pretraining_configurations_are_valid(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    config, _ = parse(PretrainConfig, parser_of(PretrainConfig), ["--config", str(path)])
    parallel = config.parallel
    ranks = math.lcm(parallel.tensor * parallel.context, parallel.expert) * parallel.pipeline
    config.validate_layout(ranks)
    assert path.read_text().startswith("#"), "a comment says what it is and how to run it"


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "cluster").rglob("*.yaml")), ids=name_of)
def test_clusters_are_valid(path):
    parse(PlanConfig, parser_of(PlanConfig), ["--cluster", str(path)])
    assert path.read_text().startswith("#"), "a comment says what it is and how to run it"


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "data").rglob("*.yaml")), ids=name_of)
def test_data_configurations_are_valid(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    parse(PrepareConfig, parser_of(PrepareConfig), ["--config", str(path)])
    assert path.read_text().startswith("#"), "a comment says what it is and how to run it"


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "experts").rglob("*.yaml")), ids=name_of)
def test_experts_are_valid(path):
    parse(PretrainConfig, parser_of(PretrainConfig), ["--model.moe", str(path)])
    assert path.read_text().startswith("#"), "a comment says what it is and how to run it"


def test_there_is_a_laptop_recipe():
    assert (ROOT / "configs" / "pretrain" / "laptop.yaml").is_file()


# Pages


def commands(page: str) -> list[list[str]]:
    """The commands of a page's code, indented or fenced, as words; continued lines joined, comments left out."""
    page = re.sub(r"\\\n\s*", " ", page)
    fence = re.compile(r"^```\w*\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)
    fenced, rest = fence.findall(page), fence.sub("", page)
    found = []
    for line in "".join([*fenced, *re.findall(r"^ {4}.*\n", rest, flags=re.MULTILINE)]).splitlines():
        first = line.strip().removeprefix("$ ")
        if re.match(r"(make|python3?|torchrun|\.venv/bin/\w+|srun|sbatch|--[a-z]+\.)\b", first):
            found.append(shlex.split(first, comments=True))
    return found


def complaints(page: str) -> list[str]:
    """Files, targets and keys that a page names and that do not exist."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    keys = {*dotted_keys(PlanConfig), "config", "print_config", "help", "check", "world-size", "init", "search", "json"}
    wrong = []
    for words in commands(page):
        if words[0] == "make":
            wrong += [
                word for word in words[1:] if "=" not in word and not word.startswith("-") and word not in targets
            ]
        ours = re.compile(rf"({'|'.join(PACKAGES)}|configs|tests|docs)/.*\.\w+")
        wrong += [word for word in words if ours.fullmatch(word) and not (ROOT / word).exists()]
        if "launch/pretrain.py" in words:
            words = words[words.index("launch/pretrain.py") :]
        if words[0] == "launch/pretrain.py" or words[0].startswith("--"):
            options = (word[2:].split("=")[0] for word in words if word.startswith("--"))
            wrong += [f"--{option}" for option in options if option not in keys]
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)[^)]*\)", page)
    return wrong + [link for link in links if not (ROOT / link).exists() and not (ROOT / "docs" / link).exists()]


def test_the_reading_of_pages_sees_mistakes():
    page = """
    make nonsense PYTHON=python3  # build
    python launch/missing.py --config configs/pretrain/laptop.yaml
```bash
$ torchrun --standalone launch/pretrain.py \\
    --train.stepz 3
```
    --model.mixers.period 'a, b'
[a](missing.md) [b](https://example.org) [c](README.md#there)
"""
    assert sorted(complaints(page)) == sorted(
        ["nonsense", "launch/missing.py", "--train.stepz", "--model.mixers.period", "missing.md"]
    )


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_pages_name_what_exists(path):
    assert complaints(path.read_text()) == []


def test_messages_name_commands_as_users_give_them():
    """`spiketrain convert`, and not the script behind it, which an installation does not have in its directory."""
    allowed = {
        "launch/main.py": r"launch/main\.py is behind that name|script launch/COMMAND\.py",
        "launch/convert.py": r"torchrun .* launch/convert\.py",
        "launch/pretrain.py": r"torchrun .* launch/pretrain\.py",
        "launch/posttrain.py": r"torchrun .* launch/posttrain\.py",
        "trainer/peers.py": r"torchrun, or launch/main\.py",
        "trainer/studies/runs.py": r"^launch/pretrain\.py$",
        "trainer/studies/conversion.py": r"^launch/convert\.py$",
    }
    wrong = []
    for path in SOURCES:
        texts = (node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant))
        for text in (text for text in texts if isinstance(text, str)):
            left = re.sub(allowed.get(name_of(path), "$^"), "", text)
            wrong += [f"{name_of(path)}: {named}" for named in re.findall(r"launch/\w+\.py", left)]
    assert not wrong


def test_the_readme_shows_the_two_commands():
    shown = commands((ROOT / "README.md").read_text())
    assert ["make", "pretrain"] in shown and ["make", "test"] in shown


def test_scripts_show_how_they_are_called():
    for path in (ROOT / "launch").glob("*.py"):
        docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
        called = "spiketrain " if path.name == "main.py" else f"spiketrain {path.stem} "
        assert called in docstring, f"{name_of(path)} shows no command"
