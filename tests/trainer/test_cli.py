"""The command line of launch/pretrain.py: one line for every mistake, at once, before torch is imported."""

import copy
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from models.config import ModelConfig, MoEConfig, RouterConfig
from tests.helpers import WAIT
from trainer import cli, run_directory, runtime, start
from trainer.cli import dotted_keys, dump, fail, from_mapping, guess, make_parser, parse
from trainer.config import PretrainConfig, RunConfig, TrainConfig
from trainer.errors import ConfigError
from trainer.peers import STOPS
from trainer.runtime import write_status

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = str(ROOT / "launch" / "pretrain.py")
PARSERS = {}


@pytest.fixture(scope="module")
def tripwire(tmp_path_factory):
    """A folder whose torch and megatron leave a file behind when they are imported, and then fail."""
    folder = tmp_path_factory.mktemp("tripwire")
    for name in ("torch", "megatron"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(
            f"import pathlib\npathlib.Path({str(folder)!r}, 'imported').touch()\nraise SystemExit('tripwire: {name}')\n"
        )
    return folder


@pytest.fixture
def command(tripwire, tmp_path):
    """Run pretrain.py in tmp_path beside the tripwire; give the process and whether the wire was touched."""

    def run(*arguments, **environment):
        (tripwire / "imported").unlink(missing_ok=True)
        inherited = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
        search = os.pathsep.join((str(tripwire), str(ROOT)))
        result = subprocess.run(
            [sys.executable, SCRIPT, *arguments],
            cwd=tmp_path,
            env=inherited | {"PYTHONPATH": search, "COLUMNS": "200"} | environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=WAIT,
        )
        return result, (tripwire / "imported").exists()

    return run


def write(folder, name, values):
    (folder / name).write_text(values if isinstance(values, str) else yaml.safe_dump(values))


MISTAKES = {
    "unknown option": (["--train.stepz=3"], "unknown key 'train.stepz'; did you mean 'train.steps'?"),
    "unknown option with a space": (["--optim.leaning_rate", "3"], "unknown key 'optim.leaning_rate'; did you mean"),
    "option in the wrong group": (["--optim.steps=3"], "unknown key 'optim.steps'; did you mean 'train.steps'?"),
    "option without its group": (["--global_batch_size=3"], "did you mean 'train.global_batch_size'?"),
    "shortened option": (["--optim.warmup=3"], "unknown key 'optim.warmup'; did you mean 'optim.warmup_steps'?"),
    "unknown key in YAML": (
        ["--config=unknown_key.yaml"],
        "unknown key 'train.micro_batchsize'; did you mean 'train.micro_batch_size'?",
    ),
    "unknown key deep in YAML": (
        ["--config=unknown_deep.yaml"],
        "unknown key 'model.attention.num_kvheads'; did you mean 'model.attention.num_kv_heads'?",
    ),
    "unknown group in YAML": (["--config=unknown_group.yaml"], "unknown key 'optimizer.lr'; did you mean 'optim.lr'?"),
    "wrong type": (["--train.steps=many"], "train.steps: expected int, got many"),
    "fraction for a number of steps": (["--train.steps=3.5"], "train.steps: expected int, got 3.5"),
    "wrong type in YAML": (["--config=wrong_type.yaml"], "train.steps: expected int, got many"),
    "wrong type where null may be": (["--model.vocab_size=many"], "model.vocab_size: expected int or null, got many"),
    "wrong choice": (["--train.precision=fp8"], "train.precision: expected one of 'fp32', 'bf16', 'auto', got fp8"),
    "YAML that is none": (["--config=broken.yaml"], "broken.yaml:2: not YAML: "),
    "bad value": (["--optim.lr=-1"], "optim.lr is -1.0: it must be a positive number"),
    "infinite value": (["--optim.lr=.inf"], "optim.lr is inf: it must be a positive number"),
    "bad value in YAML": (["--config=bad_value.yaml"], "train.micro_batch_size is 0: it must be positive"),
    "bad combination": (
        ["--evaluation.stride=200", "--train.seq_len=100"],
        "evaluation.stride=200 exceeds the evaluation window of 100 tokens",
    ),
    "bad combination in the model": (
        ["--model.hidden_size=260"],
        "model.hidden_size=260 gives no even head size over model.attention.num_heads=4; set model.attention.head_dim",
    ),
    "no such mixer": (["--model.mixers.pattern=mamba"], "model.mixers.pattern: no mixer 'mamba'; choose from"),
    "missing configuration": (["--config=nowhere.yaml"], "nowhere.yaml does not exist; check the path"),
    "missing data": (["--data.path=missing"], "no token data at missing: missing.bin does not exist; prepare it with"),
    "missing tokenizer": (["--data.tokenizer=missing.model"], "data.tokenizer: missing.model does not exist"),
    "missing checkpoint": (["--checkpoint.resume=missing"], "checkpoint.resume: missing is neither auto, never, nor"),
    "missing weights": (["--checkpoint.init=missing"], "checkpoint.init: missing is not a directory; name one that"),
    "unsupported layout": (
        ["--parallel.expert=2"],
        "parallel.expert=2 shares experts, of which the model has none; set model.moe.num_experts",
    ),
    "experts spawned after the end": (
        ["--model.moe.num_experts=4", "--model.moe.spawn_step=50", "--train.steps=50"],
        "model.moe.spawn_step=50 lies past the end of the run, train.steps=50; spawn earlier, or leave it out",
    ),
    "experts spawned over weights": (
        ["--model.moe.num_experts=4", "--model.moe.spawn_step=50", "--checkpoint.init=weights"],
        "model.moe.spawn_step=50 would overwrite the experts of checkpoint.init=weights with the first of each layer",
    ),
    "batch that does not divide": (
        ["--train.micro_batch_size=3", "--train.global_batch_size=8"],
        "train.global_batch_size=8 does not divide by train.micro_batch_size=3 times 1 data-parallel ranks; use a",
    ),
}

# The same, but that no process is started for each.
MISTAKES_IN_FILES = {
    "no value": (["--train.steps="], "train.steps: expected int, got nothing"),
    "key given twice": (["--config=twice.yaml"], "twice.yaml:3: 'steps' was given on line 2 already; keep one"),
    "list for a key": (["--config=list_key.yaml"], "list_key.yaml:2: a key must be a plain word"),
    "section for a key": (["--config=map_key.yaml"], "map_key.yaml:1: a key must be a plain word"),
    "key given twice in a file at home": (["--config=~/twice.yaml"], "{home}/twice.yaml:3: 'steps' was given on line"),
    "key given twice in a section's file at home": (["--model=~/shape.yaml"], "{home}/shape.yaml:2: 'num_layers' was"),
    "source given twice": (["--config=blend.yaml"], "blend.yaml:4: 'a' was given on line 3 already; keep one"),
    "empty section": (["--config=section.yaml"], "section.yaml:1: train is empty; give its keys, or leave the line"),
    "null for a number": (["--config=null.yaml"], "null.yaml:2: train.steps is null; give it a value, or leave"),
    "list for a section": (["--config=array.yaml"], "array.yaml:1: train must be a section with keys such as"),
    "list for everything": (["--config=list.yaml"], "list.yaml holds no keys; write keys such as run.dir"),
    "empty file": (["--config=empty.yaml"], "empty.yaml is empty; write keys such as run.dir"),
    "tab": (["--config=tab.yaml"], "tab.yaml:2: a tab; YAML is indented with spaces"),
    "other encoding": (["--config=latin.yaml"], "latin.yaml: byte 9 is not UTF-8; save the file as UTF-8"),
    "missing file of a section": (
        ["--model=missing_.yaml"],
        "--model: the file missing_.yaml does not exist (did you ",
    ),
    "missing file of a section in JSON": (["--model", "none.json"], "--model: the file none.json does not exist; "),
    "missing file in a file": (
        ["--config=names.yaml"],
        "names.yaml:1: model names the file shape.yml, which does not exist (did you mean shape.yaml?)",
    ),
    "key given twice in a file of a section": (["--model=shape.yaml"], "shape.yaml:2: 'num_layers' was given on"),
    "section written out wrongly": (["--model={a"], "model: {a is not YAML; write keys as in {key: value}"),
}


@pytest.fixture
def files(tmp_path):
    write(tmp_path, "unknown_key.yaml", {"train": {"steps": 200, "micro_batchsize": 3}})
    write(tmp_path, "unknown_deep.yaml", {"model": {"attention": {"num_kvheads": 3}}})
    write(tmp_path, "unknown_group.yaml", {"optimizer": {"lr": 5.0}})
    write(tmp_path, "wrong_type.yaml", {"train": {"steps": "many"}})
    write(tmp_path, "bad_value.yaml", {"train": {"micro_batch_size": 0}})
    write(tmp_path, "broken.yaml", "train: [1\n")
    write(tmp_path, "twice.yaml", "train:\n  steps: 3\n  steps: 5\n")
    write(tmp_path, "list_key.yaml", "train:\n  [a, b]: 1\n")
    write(tmp_path, "map_key.yaml", "{a: 1}: 2\n")
    write(tmp_path, "blend.yaml", "data:\n  blend:\n    a: 1\n    a: 2\n")
    write(tmp_path, "section.yaml", "train:\nmodel: {}\n")
    write(tmp_path, "null.yaml", "train:\n  steps:\n")
    write(tmp_path, "array.yaml", "train: [1, 2]\n")
    write(tmp_path, "list.yaml", "- train\n")
    write(tmp_path, "empty.yaml", "# nothing yet\n")
    write(tmp_path, "tab.yaml", "train:\n\tsteps: 3\n")
    (tmp_path / "latin.yaml").write_bytes(b"data: caf\xe9\n")
    write(tmp_path, "names.yaml", "model: shape.yml\n")
    write(tmp_path, "shape.yaml", "num_layers: 2\nnum_layers: 4\n")
    write(tmp_path, "missing.yaml", "num_layers: 2\n")
    return tmp_path


@pytest.fixture
def in_this_process(tmp_path, monkeypatch, capsys):
    """Run pretrain.py in tmp_path without a process of its own; give the exit code, output and errors."""

    def make_parser_once(config_class, description):
        # The script's own options are added to a copy.
        if config_class not in PARSERS:
            PARSERS[config_class] = make_parser(config_class, description)
        return copy.deepcopy(PARSERS[config_class])

    def run(*arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(os, "environ", os.environ.copy())
        for name in ("RANK", "WORLD_SIZE"):
            os.environ.pop(name, None)
        monkeypatch.setattr(cli, "make_parser", make_parser_once)
        monkeypatch.setattr(sys, "argv", [SCRIPT, *arguments])
        with pytest.raises(SystemExit) as leaving:
            runpy.run_path(SCRIPT, run_name="__main__")
        return leaving.value.code, *capsys.readouterr()

    return run


# Found by the parser, in a file, by a dataclass, in a folder of weights, and beside the number of ranks.
IN_A_PROCESS = ("unknown option", "YAML that is none", "bad combination", "missing weights", "unsupported layout")


@pytest.mark.parametrize("name", IN_A_PROCESS)
def test_a_mistake_is_one_line_before_torch_is_imported(command, files, name):
    arguments, message = MISTAKES[name]
    result, imported = command(*arguments, "--run.dir=here")
    assert not imported
    check_the_one_line(files, message, result.returncode, result.stdout, result.stderr)


@pytest.mark.parametrize(("arguments", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line(in_this_process, files, arguments, message):
    check_the_one_line(files, message, *in_this_process(*arguments, "--run.dir=here"))


def check_the_one_line(files, message, code, output, errors):
    assert code == 2 and output == ""
    (line,) = errors.splitlines()
    assert line.startswith("error: ") and message in line
    status = json.loads((files / "here" / "status.json").read_text())
    assert status == {"state": "config_error", "exit_code": 2, "message": line.removeprefix("error: ")}
    assert [path.name for path in (files / "here").iterdir()] == ["status.json"]


def test_a_restart_says_that_it_does_not_begin_anew(in_this_process, monkeypatch):
    said = "checkpoint.resume=never: this start is a restart, and goes on as with auto\n"
    for count, output in (("0", ""), ("2", said)):
        monkeypatch.setenv("SLURM_RESTART_COUNT", count)
        assert in_this_process("--check", "--world-size=0", "--checkpoint.resume=never")[:2] == (2, output)


@pytest.fixture(scope="module")
def parser():
    return make_parser(PretrainConfig, "")


@pytest.mark.parametrize(("arguments", "message"), MISTAKES_IN_FILES.values(), ids=MISTAKES_IN_FILES)
def test_a_mistake_in_a_file_names_file_line_and_key(parser, files, monkeypatch, arguments, message):
    monkeypatch.chdir(files)
    monkeypatch.setenv("HOME", str(files))
    with pytest.raises(ConfigError) as refusal:
        parse(PretrainConfig, parser, arguments)
    assert str(refusal.value).startswith(message.replace("{home}", str(files))) and "\n" not in str(refusal.value)
    assert guess(arguments, "run.dir") is None


def test_a_home_directory_is_written_out(command, parser, tmp_path):
    write(tmp_path, "home.yaml", {"run": {"dir": "~/from-file"}})
    result, _ = command("--config=home.yaml", "--train.steps=0", HOME=str(tmp_path))
    assert result.returncode == 2
    assert (tmp_path / "from-file" / "status.json").exists() and not (tmp_path / "~").exists()
    config, namespace = parse(PretrainConfig, parser, ["--run.dir=~/x", "--evaluation.prompt=~/x"])
    assert config.run.dir == os.path.expanduser("~/x") and config.evaluation.prompt == "~/x"
    assert yaml.safe_load(dump(parser, namespace, PretrainConfig))["run"]["dir"] == config.run.dir


def test_world_sizes_that_do_not_divide(command, tmp_path):
    batch = ("--train.micro_batch_size=2", "--train.global_batch_size=8", "--run.dir=here")
    message = "does not divide by train.micro_batch_size=2 times 3 data-parallel ranks; use a multiple of 6"
    result, imported = command(*batch, WORLD_SIZE="3", RANK="0")
    assert result.returncode == 2 and message in result.stderr and not imported
    assert json.loads((tmp_path / "here" / "status.json").read_text())["state"] == "config_error"


def test_the_tripwire_is_touched_by_a_run(command):
    """Or the tests above would prove nothing."""
    result, imported = command("--run.dir=here")
    assert imported and result.stderr.strip().endswith("tripwire: torch")


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_run_directory_that_cannot_be(command, tmp_path, place):
    (tmp_path / "file").touch()
    result, imported = command(f"--run.dir={place}")
    (line,) = result.stderr.splitlines()
    assert result.returncode == 2 and line.startswith(f"error: run.dir: {place} ") and not imported


# --check


def test_check_says_so_and_writes_nothing(command, tmp_path):
    result, imported = command("--check", "--world-size=4", "--train.global_batch_size=32", "--run.dir=here")
    assert (result.returncode, result.stdout, result.stderr, imported) == (
        0,
        "data: data/stdlib-bpe4096 is prepared from the standard library's source when the run starts\n"
        "the configuration is valid for 4 ranks\n",
        "",
        False,
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--world-size=3"], "does not divide by train.micro_batch_size=8 times 3 data-parallel ranks; use a"),
        (["--world-size=0"], "--world-size is 0: it must be at least 1"),
        (["--world-size=-1"], "--world-size is -1: it must be at least 1"),
        (["--world-size=two"], "world_size: expected int, got two"),
        (["--parallel.context=3", "--world-size=3"], "train.seq_len=512 does not divide over 3 ranks that share a"),
    ],
)
def test_check_refuses_and_writes_nothing(command, tmp_path, arguments, message):
    result, imported = command("--check", *arguments)
    (line,) = result.stderr.splitlines()
    assert result.returncode == 2 and line.startswith("error: ") and message in line and not imported
    assert result.stdout == "" and list(tmp_path.iterdir()) == []


def test_check_reads_the_world_size_of_torchrun(command):
    result, _ = command("--check", WORLD_SIZE="3")
    assert result.returncode == 2 and "times 3 data-parallel ranks" in result.stderr


# --help and --print_config


def test_help(command):
    result, imported = command("--help")
    assert result.returncode == 0 and result.stderr == "" and not imported
    for key in dotted_keys(PretrainConfig):
        assert f"--{key} " in result.stdout
    # The docstrings are the help.
    assert "Optimizer steps. Raising it later continues the run" in " ".join(result.stdout.split())


def test_the_printed_configuration_reads_back_as_itself(command, tmp_path):
    changes = ("--train.steps=500", "--model.mixers.linear_per_full=3", "--data.blend={stdlib: 2.0}", "--optim.lr=1e-5")
    printed, imported = command(*changes, "--print_config")
    assert printed.returncode == 0 and not imported
    write(tmp_path, "printed.yaml", printed.stdout)
    again, _ = command("--config=printed.yaml", "--print_config")
    assert again.stdout == printed.stdout
    values = yaml.safe_load(printed.stdout)
    assert values["train"]["steps"] == 500 and values["optim"]["lr"] == 1e-5
    checked, _ = command("--config=printed.yaml", "--check")
    assert checked.returncode == 0
    options = make_parser(PretrainConfig, "")
    options.add_argument("--check", action="store_true")
    options.add_argument("--world-size", type=int, default=None)
    options.add_argument("--init", default=None)
    config, _ = parse(PretrainConfig, options, ["--config", str(tmp_path / "printed.yaml")])
    assert config == parse(PretrainConfig, options, changes)[0]


# torchrun


def test_all_ranks_together_say_it_once(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", SCRIPT]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [*command, "--train.stepz=3", "--run.dir=here"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=WAIT,
    )
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert errors == ["error: unknown key 'train.stepz'; did you mean 'train.steps'?"]
    assert result.returncode != 0
    assert json.loads((tmp_path / "here" / "status.json").read_text())["exit_code"] == 2


@pytest.mark.parametrize("rank", [0, 1])
def test_rank_0_speaks_and_the_others_wait_for_it(monkeypatch, capsys, rank):
    """If a rank fails, torchrun ends all: one that left at once could end rank 0 before it has spoken."""
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)
    monkeypatch.setenv("RANK", str(rank))
    with pytest.raises(SystemExit) as leaving:
        fail("two\n  lines")
    assert leaving.value.code == 2
    who = "" if rank == 0 else f"rank 1 on {socket.gethostname()}: "
    assert capsys.readouterr().err == f"error: {who}two lines\n"
    assert (sum(waited) >= 5) == (rank != 0)


def test_a_rank_that_alone_is_refused_is_heard(tmp_path, monkeypatch, capsys):
    """Rank 0, which has nothing to say, waits for it."""

    def refuse(config):
        raise ConfigError("the file is not there")

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    monkeypatch.setattr(run_directory, "check", refuse)
    monkeypatch.setattr(start, "dump_stacks_on_request", lambda: None)
    handlers = {number: signal.getsignal(number) for number in STOPS}
    try:
        with pytest.raises(SystemExit) as leaving:
            start.train(PretrainConfig(run=RunConfig(dir=str(tmp_path))), "", lambda config, config_yaml, peers: 0)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert leaving.value.code == 2
    told = json.loads((tmp_path / "status.json").read_text())
    message = f"rank 1 (pid {os.getpid()}) on {socket.gethostname()} failed: the file is not there"
    assert told == {"state": "config_error", "exit_code": 2, "message": message}
    assert capsys.readouterr().err == f"error: {message}\n"
    assert "the file is not there" in (tmp_path / "error.json").read_text()


# In this process


def test_later_files_and_options_win(parser, tmp_path):
    write(tmp_path, "first.yaml", {"train": {"steps": 200, "seed": 1}})
    write(tmp_path, "second.yaml", {"train": {"seed": 2}})
    files = [f"--config={tmp_path / name}.yaml" for name in ("first", "second")]
    config, _ = parse(PretrainConfig, parser, [*files, "--train.seq_len=64"])
    assert (config.train.steps, config.train.seed, config.train.seq_len) == (200, 2, 64)
    config, _ = parse(PretrainConfig, parser, [*files[:1], "--train.steps=300"])
    assert (config.train.steps, config.train.seed) == (300, 1)


@settings(max_examples=8, deadline=None)
@given(
    st.integers(100, 10**9),
    st.floats(1e-12, 10, allow_nan=False),
    st.booleans(),
    st.none() | st.integers(1, 9),
    st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), max_size=12),
)
def test_a_dump_reads_back_as_the_same_configuration(parser, steps, lr, tied, ratio, prompt):
    values = {
        "train": {"steps": steps},
        "optim": {"lr": lr},
        "model": {"tie_embeddings": tied, "mixers": {"linear_per_full": ratio}},
        "evaluation": {"prompt": prompt},
    }
    text = dump(parser, parser.parse_object(values), PretrainConfig)
    assert list(yaml.safe_load(text)) == [field.name for field in fields(PretrainConfig)]
    config = from_mapping(PretrainConfig, yaml.safe_load(text))
    assert (config.train.steps, config.optim.lr, config.model.mixers.linear_per_full) == (steps, lr, ratio)
    assert config.evaluation.prompt == prompt


def test_a_file_named_for_a_group_is_all_of_it(parser, tmp_path, monkeypatch):
    """But what a configuration and single options say of other groups stays."""
    recipe, model, experts = (tmp_path / f"{name}.yaml" for name in ("recipe", "model", "experts"))
    write(tmp_path, "recipe.yaml", {"model": {"num_layers": 2, "moe": {"num_experts": 4}}, "optim": {"lr": 0.5}})
    write(tmp_path, "model.yaml", {"num_layers": 3})
    write(tmp_path, "experts.yaml", {"num_experts": 8})

    def read(*options):
        return parse(PretrainConfig, parser, ["--config", str(recipe), *options])[0]

    monkeypatch.setenv("HOME", str(tmp_path))
    for options in (["--model", str(model)], [f"--model={model}"], ["--model=~/model.yaml"]):
        config = read(*options, "--model.hidden_size=128")
        assert config.model == ModelConfig(num_layers=3, hidden_size=128) and config.optim.lr == 0.5
    config = read("--model", str(model), "--model.moe", str(experts))
    assert config.model == ModelConfig(num_layers=3, moe=MoEConfig(num_experts=8))
    assert read("--model.moe", str(experts)).model.num_layers == 2
    router = RouterConfig(top_k=3)
    assert read("--model.moe.router", json.dumps(asdict(router))).model.moe == MoEConfig(num_experts=4, router=router)
    assert read("--model.moe.shared_experts=1").model.moe == MoEConfig(num_experts=4, shared_experts=1)


def test_mappings_are_checked_too():
    with pytest.raises(ConfigError, match="did you mean 'steps'"):
        from_mapping(TrainConfig, {"stepz": 3})
    with pytest.raises(ConfigError, match=r"train\.steps is 0: it must be positive"):
        from_mapping(TrainConfig, {"steps": 0})


def test_keys_are_guessed_from_what_does_not_parse(tmp_path, monkeypatch):
    write(tmp_path, "run.yaml", {"run": {"dir": "in file"}, "unknown": 1})
    write(tmp_path, "broken.yaml", "run: {dir: [\n")
    config = f"--config={tmp_path / 'run.yaml'}"
    assert guess(["--nonsense", "--run.dir=a"], "run.dir") == "a"
    # The last one counts, as in the parser.
    assert guess(["--run.dir", "b", "--run.dir=c"], "run.dir") == guess([config, "--run.dir", "c"], "run.dir") == "c"
    assert guess(["--run.dir", "b", config], "run.dir") == "in file"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert guess(["--config=~/run.yaml"], "run.dir") == "in file"
    assert guess([config], "run.dir") == guess(["--config", config.split("=")[1]], "run.dir") == "in file"
    assert guess([f"--config={tmp_path / 'broken.yaml'}"], "run.dir") is None
    assert guess(["--run.dir"], "run.dir") in (None, "")


def test_only_rank_0_writes_the_status(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    write_status(tmp_path / "here", "done", 0)
    assert not (tmp_path / "here").exists()
    monkeypatch.setenv("RANK", "0")
    write_status(tmp_path / "here", "done", 0, "all is well")
    status = json.loads((tmp_path / "here" / "status.json").read_text())
    assert status == {"state": "done", "exit_code": 0, "message": "all is well"}


@pytest.mark.parametrize(("state", "lines"), [("failed", 1), ("done", 1), ("config_error", 0)])
def test_a_status_that_cannot_be_written_hides_nothing(tmp_path, capsys, state, lines):
    """A full disk ends a run, and cannot take its status: one line names the file system. A wrong run.dir is said."""
    (tmp_path / "file").touch()
    write_status(tmp_path / "file", state, 1)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == lines
    for line in said:
        assert line.startswith(
            f"error: {tmp_path}/file/status.json cannot be written: File exists (the file system at "
        )


GPU_FILES = {"/dev/nvidiactl", "/dev/dxg", "/dev/kfd"}


@pytest.mark.parametrize(
    ("gpu", "device", "expected"),
    [
        (None, None, True),
        (None, "auto", True),
        (None, "cpu", True),
        ("/dev/nvidiactl", None, False),
        ("/dev/nvidiactl", "cuda", False),
        ("/dev/kfd", "auto", False),
        ("/dev/dxg", "auto", False),
        ("/dev/nvidiactl", "cpu", True),
    ],
)
def test_openmp_threads_spin_for_a_moment_where_no_gpu_computes(monkeypatch, gpu, device, expected):
    monkeypatch.setattr(cli.os.path, "exists", lambda path: path == gpu)
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    runtime.keep_threads_awake(device)
    assert ("GOMP_SPINCOUNT" in os.environ) == expected
    assert "OMP_WAIT_POLICY" not in os.environ
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)


@pytest.mark.parametrize(("name", "value"), [("OMP_WAIT_POLICY", "passive"), ("GOMP_SPINCOUNT", "7")])
def test_openmps_settings_by_the_user_stay(monkeypatch, name, value):
    before = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} - {name}
    monkeypatch.setattr(cli.os.path, "exists", lambda path: False)
    for other in before:
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, value)
    runtime.keep_threads_awake("cpu")
    assert os.environ[name] == value and not before & os.environ.keys()
