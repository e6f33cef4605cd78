"""Runs that start from another run: it reads as its export does, and stays the same when they go on."""

import json
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import yaml

from models.config import MoEConfig
from tests.trainer.conftest import ROOT, finish, in_process_config, trajectory
from trainer import pretrain
from trainer.cli import make_parser, parse
from trainer.config import CheckpointConfig, PretrainConfig, RunConfig
from trainer.errors import ConfigError
from trainer.stored import named_models, weights
from trainer.stored.export import export
from trainer.stored.on_disk import Part
from trainer.stored.opening import open_weights
from trainer.stored.teacher import digest


def trained(data, run_dir, precision):
    """A run with checkpoints of its steps 3 and 5."""
    config = in_process_config(data, run_dir, steps=5, precision=precision)
    assert pretrain.run(config, yaml.safe_dump(asdict(config))) == 0
    return run_dir


@pytest.fixture(scope="module")
def source(tiny_data, tmp_path_factory):
    return trained(tiny_data, tmp_path_factory.mktemp("source"), "fp32")


@pytest.fixture
def copy(source, tmp_path):
    """A copy of the run, to change."""
    return Path(shutil.copytree(source, tmp_path / "source"))


def checkpoint(run_dir, step=5):
    return run_dir / "checkpoints" / f"step_{step:08d}"


def parsed(*arguments):
    parser, expanded = make_parser(PretrainConfig, ""), weights.expand_init(arguments)
    return parse(PretrainConfig, parser, expanded, named_models.settle)[0]


def values_of(opened):
    found = {name: torch.empty(tensor.shape) for name, tensor in opened.tensors.items()}
    opened.read(found)
    return found


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_checkpoint_reads_as_its_export(tiny_data, tmp_path, precision):
    source = trained(tiny_data, tmp_path / "source", precision)
    export(source, tmp_path / "weights", None, 1e9, print)
    exported, opened = open_weights(tmp_path / "weights"), open_weights(source)
    assert opened.path == checkpoint(source) and opened.tokenizer == checkpoint(source) / "tokenizer"
    assert (opened.model, opened.vocab_size, opened.dtype) == (exported.model, exported.vocab_size, exported.dtype)
    assert opened.max_positions == exported.max_positions == 32
    headers = [{name: (one.shape, one.dtype) for name, one in own.tensors.items()} for own in (opened, exported)]
    assert headers[0] == headers[1]
    expected, found = values_of(exported), values_of(opened)
    assert all(torch.equal(found[name], values) for name, values in expected.items())
    earlier = values_of(open_weights(checkpoint(source, 3)))
    assert not torch.equal(earlier["embedding.weight"], found["embedding.weight"])
    for name, values in expected.items():
        # The second of two shards, by every dimension.
        for dim, size in enumerate(values.shape):
            index = (*[slice(None)] * dim, slice(size // 2, size))
            part = torch.empty_like(values[index])
            opened.read({name: part}, {name: Part(tuple(values.shape), index)})
            assert torch.equal(part, values[index])


def test_headers_are_read_without_torch(source):
    program = (
        "import sys\nfrom trainer.stored.opening import open_weights\nfrom trainer.stored.teacher import digest\n"
        "from trainer.stored.checkpoint_weights import require_whole\n"
        f"found = open_weights({str(source)!r})\nrequire_whole(found, 'key')\n"
        "print(found.vocab_size, digest(found), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    opened = open_weights(source)
    assert done.stdout.split() == [str(opened.vocab_size), digest(opened), "False"]


def test_a_run_stands_for_its_newest_complete_checkpoint(copy):
    config = parsed("--init", str(copy), "--train.seed=7")
    tokenizer = str(checkpoint(copy) / "tokenizer")
    assert (config.checkpoint.init, config.data.tokenizer) == (str(checkpoint(copy)), tokenizer)
    assert config.model == open_weights(copy).model and config.train.seed == 7
    (checkpoint(copy) / "progress.json").unlink()
    assert parsed("--init", str(copy)).checkpoint.init == str(checkpoint(copy, 3))
    assert parsed(f"--init={checkpoint(copy, 3)}").checkpoint.init == str(checkpoint(copy, 3))
    config = parsed(
        *("--train.objective.name=distill", f"--train.objective.teacher={copy}", "--train.steps=9"),
        f"--phases=[{{from_step: 4, train: {{objective: {{teacher: {copy}}}}}}}]",
    )
    assert config.train.objective.teacher == config.phases[0].train.objective.teacher == str(checkpoint(copy, 3))


def test_a_run_that_goes_on_keeps_the_checkpoint_it_began_with(copy, tmp_path):
    run_dir = tmp_path / "run"
    (run_dir / "checkpoints/step_00000001").mkdir(parents=True)
    began = {"checkpoint": {"init": str(checkpoint(copy, 3))}}
    (run_dir / "config.yaml").write_text(yaml.safe_dump(began))
    options = ("--init", str(copy), f"--run.dir={run_dir}")
    for arguments in (options, (f"--checkpoint.init={copy}", options[2])):
        assert parsed(*arguments).checkpoint.init == str(checkpoint(copy, 3))
    assert parsed(*options, "--checkpoint.resume=never").checkpoint.init == str(checkpoint(copy))
    assert parsed(*options[:2], f"--run.dir={tmp_path / 'other'}").checkpoint.init == str(checkpoint(copy))
    shutil.rmtree(checkpoint(copy, 3))
    with pytest.raises(ConfigError, match=r"--init: .*step_00000003 does not exist; restore it, or start another run"):
        parsed(*options)


def started_from(tiny_data, run_dir, tmp_path):
    config = in_process_config(tiny_data, tmp_path / "run")
    return replace(config, checkpoint=CheckpointConfig(init=str(run_dir)))


def damage(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_what_cannot_be_started_from_is_refused_before_torch(copy, tiny_data, tmp_path):
    config = started_from(tiny_data, checkpoint(copy), tmp_path)
    weights.check(config)
    weights.check_tensors(config)
    rows = open_weights(copy).vocab_size
    weights.check_vocabulary(config, rows)
    with pytest.raises(ConfigError, match=r"step_00000005 has 512 rows of vocabulary and the run's data"):
        weights.check_vocabulary(config, rows + 128)
    other = replace(config, model=replace(config.model, norm_eps=1e-5))
    with pytest.raises(ConfigError, match=r"step_00000005 holds another model \(model.norm_eps: .*/config.yaml has"):
        weights.check(other)
    for init in (str(copy), str(checkpoint(copy, 3))):
        for option in ("--init", "--checkpoint.init"):
            with pytest.raises(ConfigError, match=r"checkpoint.init: .* is of the run itself; choose another run.dir"):
                parsed(option, init, f"--run.dir={copy}")
    for path in checkpoint(copy, 3).iterdir():
        if path.is_file():
            path.unlink()
    with pytest.raises(ConfigError, match=r"step_00000003 holds no complete checkpoint .*checksums.json is missing"):
        parsed("--init", str(checkpoint(copy, 3)))
    shutil.rmtree(checkpoint(copy))
    with pytest.raises(
        ConfigError, match=r"checkpoint.init: .*source holds no complete checkpoint \(step_00000003: checksums"
    ):
        parsed("--init", str(copy))
    shutil.rmtree(copy / "checkpoints")
    with pytest.raises(ConfigError, match=r"checkpoint.init: .*source holds no complete checkpoint \(none\)"):
        parsed("--init", str(copy))


def test_a_damaged_checkpoint_is_refused(copy, tiny_data, tmp_path):
    file = next((checkpoint(copy) / "state").glob("*.distcp"))
    damage(file)
    with pytest.raises(ConfigError, match=rf"step_00000005 is damaged \(state/{file.name} does not match its checksum"):
        weights.check(started_from(tiny_data, checkpoint(copy), tmp_path))
    (checkpoint(copy, 3) / "state/.metadata").write_bytes(b"no pickle")
    with pytest.raises(ConfigError, match=r"checkpoint.init: .*\.metadata cannot be read \(") as error:
        open_weights(checkpoint(copy, 3))
    assert "\n" not in str(error.value)


def test_experts_that_do_not_exist_yet_are_refused(copy):
    file = checkpoint(copy) / "config.yaml"
    values = yaml.safe_load(file.read_text())
    values["model"]["moe"] = asdict(MoEConfig(num_experts=2, spawn_step=5))
    file.write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError, match=r"has experts that are to be spawned at step 5; train on past it"):
        open_weights(copy)


def test_ranks_that_found_different_checkpoints_are_refused(tmp_path):
    """The other run may have saved one between their looks."""

    class Engine:
        rank = 1

        class collectives:
            broadcast = staticmethod(lambda own: {("checkpoint", "init"): "source/checkpoints/step_00000003"})

    config = PretrainConfig(run=RunConfig(dir=str(tmp_path)), checkpoint=CheckpointConfig(init="source/other"))
    with pytest.raises(ConfigError, match=r"checkpoint.init: rank 1 reads source/other, and rank 0 source/checkpoints"):
        pretrain._require_same_models(config, Engine())
    same = replace(config, checkpoint=CheckpointConfig(init="source/checkpoints/step_00000003"))
    pretrain._require_same_models(same, Engine())


# Runs

STEPS = ("--train.steps=4", "--checkpoint.every=2", "--logging.progress=false")


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_takes_the_steps_of_one_from_the_export(tiny_data, tiny_run, tmp_path, precision):
    """And goes on from its own checkpoints while the first run has saved another."""
    copy, option = trained(tiny_data, tmp_path / "source", precision), f"--train.precision={precision}"
    export(copy, tmp_path / "weights", None, 1e9, print)
    for name in ("weights", "source"):
        code, output = finish(tiny_run(tmp_path / f"of-{name}", "--init", tmp_path / name, option, *STEPS))
        assert code == 0, output
    assert f"started from {checkpoint(copy)}" in output
    assert trajectory(tmp_path / "of-source") == trajectory(tmp_path / "of-weights")
    recorded = yaml.safe_load((tmp_path / "of-source/config.yaml").read_text())
    assert recorded["checkpoint"]["init"] == str(checkpoint(copy))
    shutil.copytree(checkpoint(copy), checkpoint(copy, 7))
    longer = (option, *STEPS, "--train.steps=6")
    for name in ("weights", "source"):
        code, output = finish(tiny_run(tmp_path / f"of-{name}", "--init", tmp_path / name, *longer))
        assert code == 0 and "resumed from" in output, output
    assert trajectory(tmp_path / "of-source") == trajectory(tmp_path / "of-weights")
    assert json.loads((tmp_path / "of-source/events.jsonl").read_text().splitlines()[0])["init"] == str(
        checkpoint(copy)
    )


LAYOUTS = {
    "tensor": (2, ("--parallel.tensor=2", "--parallel.sequence=true")),
    "pipeline": (2, ("--parallel.pipeline=2",)),
    "ZeRO 3": (2, ("--engine.name=deepspeed", "--engine.zero_stage=3")),
    "one": (1, ()),
}


@pytest.mark.slow
@pytest.mark.parametrize("layouts", [("tensor", "one", "tensor"), ("pipeline", "ZeRO 3"), ("ZeRO 3", "pipeline")])
def test_from_layout_to_layout(tiny_run, tmp_path, layouts):
    """A start moves nothing: an update of 1e-30 is lost in rounding."""
    expected, init = None, ()
    for number, layout in enumerate(layouts):
        ranks, options = LAYOUTS[layout]
        run_dir = tmp_path / str(number)
        sizes = ("--train.steps=2", "--model.attention.num_kv_heads=2")
        common = ("--train.precision=fp32", *sizes, "--logging.progress=false")
        code, output = finish(tiny_run(run_dir, *common, *options, *init, ranks=ranks))
        assert code == 0, output
        found = values_of(open_weights(run_dir))
        assert expected is None or all(torch.equal(found[name], values) for name, values in expected.items())
        expected, init = found, ("--init", run_dir, "--optim.lr=1e-30")
