"""README.md's and docs/' commands are accepted as they are written; tests/test_all_documented.py runs them."""

import gzip
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path

import pytest
import yaml

from launch.main import COMMANDS as COMMANDS_OF_LAUNCH
from launch.main import take_ranks
from tests.documented import ROOT, documented_commands
from tests.models.hub.test_gguf import write_gguf
from trainer import cli, start

COMMANDS = documented_commands()


class Accepted(Exception):
    """The command line was understood."""


def parse_alone(monkeypatch):
    """Have commands end when their options have been read and checked."""
    whole = cli.parse

    def parse(*arguments):
        whole(*arguments)
        raise Accepted

    for module in (cli, start):
        monkeypatch.setattr(module, "parse", parse)


@pytest.fixture(scope="module")
def desk_with_results(tmp_path_factory):
    """As if the commands that make runs and weights had been run."""
    folder = lay_out(tmp_path_factory.mktemp("desk") / "spiketrain")
    for name in (
        "runs/laptop",
        "runs/laptop-spiking",
        "runs/dense",
        "runs/sft",
        "runs/grpo",
        "runs/sft-lora",
        "runs/full-attention",
        "weights/laptop",
        "weights/laptop-w8a",
        "weights/qwen",
        "weights/hybrid",
        "runs/convert/softmax-weights",
    ):
        (folder / name).mkdir(parents=True)
    (folder / "data/stdlib-bpe4096").mkdir(parents=True)
    for suffix in ("bin", "idx"):
        (folder / f"data/stdlib-bpe4096/test.{suffix}").touch()
    (folder / "data/sums").mkdir()
    for name in ("train", "validation", "sft", "sft-validation", "demonstrations", "preferences"):
        (folder / f"data/sums/{name}.jsonl").write_text('{"prompt": "4=", "answer": "2+2"}\n')
    (folder / "runs/mixed.yaml").write_text("bits: 8\n")
    (folder / "runs/convert/layers.yaml").write_text("pattern: gated_delta_net\n")
    return folder


def lay_out(folder: Path) -> Path:
    """A copy of what is tracked, its recipes made tiny, with the reader's own files beside them."""
    folder.mkdir()
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, check=True, text=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file() and not name.startswith("tests/"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    (folder / ".venv").symlink_to(Path(sys.prefix))
    make_recipes_tiny(folder / "configs")
    lay_out_inputs(folder)
    return folder


def make_recipes_tiny(configs: Path) -> None:
    """Same keys, smaller numbers. The recipes keep more steps than the documented `spawn_step`."""
    small = {
        "hidden_size": 32, "ffn_hidden_size": 32, "expert_hidden_size": 32, "head_dim": 8, "seq_len": 16, "steps": 310,
        "warmup_steps": 2, "plateau_steps": 1, "decay_steps": 2, "sample_tokens": 4, "batches": 1, "every": 300,
    }  # fmt: skip

    def shrink(node):
        if isinstance(node, list):
            return [shrink(item) for item in node]
        if isinstance(node, dict):
            # Phases of a recipe begin as late in a shorter run.
            begin = {"from_step": node["from_step"] * 3 // 8} if "from_step" in node else {}
            # The steps of a recipe are a list.
            numbers = {key: small[key] for key, value in node.items() if key in small and not isinstance(value, list)}
            return {key: numbers.get(key, shrink(value)) for key, value in node.items()} | begin
        return node

    for file in [*configs.glob("*/laptop*.yaml")]:
        if file.parent.name != "cluster":
            values = shrink(yaml.safe_load(file.read_text()))
            if "evaluation" in values:
                values["evaluation"]["seq_len"] = 1024
            file.write_text(yaml.safe_dump(values))


def lay_out_inputs(folder: Path) -> None:
    """The texts, tokenizer and models that documented commands read."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sources = sorted(Path(os.__file__).parent.glob("*.py"))[:150]
    texts = [source.read_text(encoding="utf-8") for source in sources]
    for name in ("books", "text/deep", "crawl"):
        (folder / name).mkdir(parents=True)
    for number, text in enumerate(texts):
        (folder / f"books/{number}.txt").write_text(text)
        (folder / f"text/deep/{number}.md").write_text(text)
    rows = [json.dumps({"text": text, "content": text}) + "\n" for text in texts]
    (folder / "crawl/rows.jsonl").write_text("".join(rows))
    (folder / "held.jsonl").write_text("".join(rows[:3]))
    with gzip.open(folder / "train.jsonl.gz", "wt") as file:
        file.write("".join(rows))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"], show_progress=False
    )
    tokenizer.train_from_iterator(texts[:3], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = Qwen2Config(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=128, bos_token_id=None, eos_token_id=0,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder / "hub/Qwen2.5-0.5B")
    tokenizer.save(str(folder / "hub/Qwen2.5-0.5B/tokenizer.json"))
    write_gguf(folder / "hub/SmolLM2-135M.gguf")
    write_task_of_harness(folder)
    (folder / "prompts.jsonl").write_text('{"prompt": "import"}\n')


def write_task_of_harness(folder: Path) -> None:
    """The task that docs/evaluation.md shows, and its data."""
    page = (ROOT / "docs/evaluation.md").read_text()
    (folder / "my_tasks").mkdir()
    shown = re.search(r"^    task: opposites\n(?:    .+\n)+", page, re.MULTILINE)
    line = re.search(r"`(\{\"word\".*?\})`", page)
    assert shown is not None and line is not None
    (folder / "my_tasks/opposites.yaml").write_text(textwrap.dedent(shown[0]))
    (folder / "my_tasks/opposites.jsonl").write_text(f"{line[1]}\n")


def launched(words: list[str]) -> tuple[str, list[str], int] | None:
    """The script of launch/ that a command runs, its options, and on how many ranks; None where it is another."""
    if words[0] == "spiketrain":
        if len(words) == 1 or words[1].startswith("-"):
            return None
        ranks, options = take_ranks(words[2:])
        return words[1], options, ranks
    scripts = [place for place, word in enumerate(words) if re.fullmatch(r"launch/\w+\.py", word)]
    if words[0] in ("python", "torchrun") and scripts:
        ranks = int(words[words.index("--nproc-per-node") + 1]) if "--nproc-per-node" in words else 1
        return Path(words[scripts[0]]).stem, words[scripts[0] + 1 :], ranks
    if words[0] == "sbatch":
        script, stage = next(
            (place, found[1])
            for place, word in enumerate(words)
            if (found := re.fullmatch(r"launch/slurm/(pretrain|posttrain)\.sbatch", word))
        )
        devices = re.search(r"--nodes=(\d+) --gpus-per-node=(\d+)", " ".join(words))
        assert devices is not None
        ranks = int(devices.group(1)) * int(devices.group(2))
        return stage, ["--config", *words[script + 1 :]], ranks
    return None


def without(options: list[str], names: Iterable[str]) -> list[str]:
    """The options without those of these names and their values."""
    for name in names:
        while name in options:
            place = options.index(name)
            options = options[:place] + options[place + 2 :]
    return options


def accept(name: str, options: list[str], ranks: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """Have a script of launch/ read and check its options; its exit code."""
    if name == "pretrain":
        # Weights and data that the commands before this one make are not there yet.
        made = ("--checkpoint.init", "--init", "--data.path", "--train.objective.teacher", "--train.objective.name")
        # A teacher's settings are refused without it.
        options = without(options, (*made, "--train.objective.temperature"))
        options = [*options, *([] if "--check" in options else ["--check"])]
        options += [] if "--world-size" in options else ["--world-size", str(ranks)]
    else:
        if name == "posttrain":
            options = without(options, ["--init"])
        parse_alone(monkeypatch)
    script = ROOT / "launch" / f"{name}.py"
    monkeypatch.setattr(sys, "argv", [str(script), *options])
    try:
        runpy.run_path(str(script), run_name="__main__")
    except Accepted:
        return 0
    except SystemExit as leaving:
        return int(leaving.code or 0)
    return 0


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_a_documented_command_is_accepted(command, desk_with_results, monkeypatch, capsys):
    monkeypatch.chdir(desk_with_results)
    for variable in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(variable, raising=False)
    words = command.words
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(words[1:]) <= set(targets)
    elif words[0] == "source":
        assert Path(words[1]).is_file()
    elif words[0] == "pytest":
        assert words[1:] == ["-m", "gpu"]
    elif words[:2] == ["python", "-m"]:
        place = ROOT / words[2].replace(".", "/")
        files = place.glob("*.py") if place.is_dir() else [place.with_suffix(".py")]
        source = "".join(file.read_text() for file in files)
        assert source and all(f'"{word}"' in source for word in words[3:] if word.startswith("--"))
    elif not command.in_block and words[0] == "spiketrain":
        # Mentioned in a sentence, with what is left out or stands for something of the reader's.
        assert words[1] in ("COMMAND", *COMMANDS_OF_LAUNCH)
    elif not command.in_block and words[0] == "sbatch":
        assert (ROOT / "launch/slurm/pretrain.sbatch").is_file()
    elif launch := launched(words):
        code = accept(*launch, monkeypatch)
        assert code == 0, capsys.readouterr().err
    else:
        assert words in (["spiketrain"], ["spiketrain", "--help"]), f"{command}: unknown kind of command"
