"""Plain weights: what is written comes back to the last bit, in either engine, and what is wrong is one line."""

import json
import pickle
import shutil
import subprocess
import sys
import threading
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from models.config import MixerLayoutConfig, MoEConfig, RetentionConfig, RouterLossConfig
from models.decoder import Decoder, initialize, shapes
from models.moe.statistics import routers
from tests.helpers import VOCABULARY, tiny_model_config
from tests.trainer.conftest import ROOT, finish, in_process_config, metrics
from trainer import trainable
from trainer.cli import from_mapping, make_parser, parse
from trainer.config import CheckpointConfig, PretrainConfig
from trainer.data.sources import find_sources
from trainer.errors import ConfigError
from trainer.stored import weights
from trainer.stored.export import export, import_weights
from trainer.stored.inference import load_model
from trainer.stored.opening import open_weights
from trainer.stored.weights import check, check_tensors, check_vocabulary, expand_init, fill

MODEL = tiny_model_config("gated_delta_net, hgrn, full_attention", num_layers=3)


def write(output, config, vocab_size=VOCABULARY, seed=3, max_file_bytes=1e9, dtype=torch.float32):
    """Weights of a model that is drawn here; returns its parameters."""
    model = Decoder(config, vocab_size)
    initialize(model, seed)
    drawn = {name: parameter.detach().to(dtype) for name, parameter in model.named_parameters()}

    def read(tensors):
        for name, tensor in tensors.items():
            tensor.copy_(drawn[name])

    lines = []
    weights.write(
        output,
        shapes(config, vocab_size).to(dtype),
        read,
        tokenizer=None,
        max_file_bytes=max_file_bytes,
        report=lines.append,
    )
    assert sum(line.startswith("model") for line in lines) == len(list(output.glob("*.safetensors")))
    return drawn


@pytest.mark.parametrize("max_file_bytes", [1e9, 20_000, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_written_comes_back(tmp_path, dtype, max_file_bytes):
    drawn = write(tmp_path / "weights", MODEL, max_file_bytes=max_file_bytes, dtype=dtype)
    files = sorted((tmp_path / "weights").glob("*.safetensors"))
    stored = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert stored.keys() == drawn.keys()
    assert all(torch.equal(stored[name], drawn[name]) for name in drawn)
    assert all(file.stat().st_size < max_file_bytes + 5000 for file in files) or len(files) == len(drawn)
    opened = open_weights(tmp_path / "weights")
    assert (opened.model, opened.vocab_size) == (MODEL, VOCABULARY)
    model = Decoder(MODEL, VOCABULARY)
    fill(model, opened)
    assert all(torch.equal(parameter, drawn[name].float()) for name, parameter in model.named_parameters())
    assert [path.name for path in tmp_path.iterdir()] == ["weights"], "nothing unfinished is left"


def test_files_and_index_are_hugging_faces(tmp_path):
    drawn = write(tmp_path, MODEL, max_file_bytes=20_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    assert len(files) > 2 and sorted(set(index["weight_map"].values())) == files
    assert index["weight_map"].keys() == drawn.keys()
    assert index["metadata"] == {"total_size": sum(tensor.nbytes for tensor in drawn.values())}
    config = json.loads((tmp_path / "config.json").read_text())
    facts = {"model_type": "spiketrain", "dtype": "float32", "vocab_size": 50, "max_position_embeddings": None}
    assert config == facts | {"model": asdict(MODEL)}


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(1, 20))
def test_parameters_are_shared_out_in_order(sizes, most):
    groups = weights._shards({str(i): size for i, size in enumerate(sizes)}, most)
    assert [int(name) for group in groups for name in group] == list(range(len(sizes)))
    totals = [sum(sizes[int(name)] for name in group) for group in groups]
    assert all(total <= most or len(group) == 1 for total, group in zip(totals, groups, strict=True))
    # None of them could have taken the parameter that begins the next.
    assert all(total + sizes[int(group[0])] > most for total, group in zip(totals, groups[1:], strict=False))


def test_a_stage_opens_only_the_files_that_have_its_tensors(tmp_path):
    drawn = write(tmp_path, MODEL, max_file_bytes=1)
    opened = open_weights(tmp_path)
    stage = Decoder(MODEL, VOCABULARY, range(1, 2))
    own = dict(stage.named_parameters())
    for name in drawn.keys() - own.keys():
        opened.tensors[name].file.unlink()
    fill(stage, opened)
    assert all(torch.equal(parameter, drawn[name]) for name, parameter in own.items())


def test_routers_draw_the_same_noise_from_weights_and_from_a_checkpoint(tmp_path):
    """Their seeds are in neither: a resumed run, whose parameters are drawn first, must have the same."""
    experts = tiny_model_config(moe=MoEConfig(num_experts=2, losses=RouterLossConfig(balance=0)))
    write(tmp_path / "weights", experts)
    drawn, started = Decoder(experts, VOCABULARY), Decoder(experts, VOCABULARY)
    weights.start(drawn, None, seed=5)
    weights.start(started, str(tmp_path / "weights"), seed=5)
    seeds = [[router.seed for router in routers([model]).values()] for model in (drawn, started)]
    assert seeds[0] == seeds[1] and len(set(seeds[0])) == 2


def test_a_resumed_run_draws_and_reads_nothing(monkeypatch):
    drawn = []
    monkeypatch.setattr("models.decoder.draw", lambda *arguments: drawn.append(arguments))
    monkeypatch.setattr(weights, "fill", lambda *arguments: drawn.append(arguments))
    model = Decoder(MODEL, VOCABULARY)
    weights.start(model, None, seed=5, resumes=True)
    weights.start(model, "weights of the first start", seed=5, resumes=True)
    assert drawn == []
    weights.start(model, None, seed=5)
    assert len(drawn) == 1


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"train": {"trainable": ["layers.*.mixr.*"]}}, r"no parameter's name matches 'layers.\*.mixr.\*'"),
        (
            {"model": {"moe": {"num_experts": 4, "spawn_step": 3}}, "train": {"trainable": ["*mixer*"]}},
            r"train.trainable leaves layers.*experts.* frozen, and model.moe.spawn_step=3",
        ),
    ],
)
def test_patterns_that_cannot_be_meant_are_refused(changes, expected):
    with pytest.raises(ConfigError, match=expected):
        trainable.check(from_mapping(PretrainConfig, changes))


def test_what_is_there_is_never_overwritten(tmp_path):
    """Also where it appears while another process writes; that one's unfinished directory stays its own."""
    (tmp_path / "weights").mkdir()
    other = tmp_path / ".saving_weights.other"
    other.mkdir()
    lines = []

    def read(tensors):
        (tmp_path / "weights" / "mine").write_text("kept")

    options = {"tokenizer": None, "max_file_bytes": 1e9, "report": lines.append}
    with pytest.raises(ConfigError, match=r"cannot be written \(something else was written there meanwhile\)"):
        weights.write(tmp_path / "weights", shapes(MODEL, VOCABULARY), read, **options)
    assert (tmp_path / "weights" / "mine").read_text() == "kept"
    assert {path.name for path in tmp_path.iterdir()} == {"weights", ".saving_weights.other"}
    assert f"{other} is left of a write that did not end, or of one under way" in lines[0]


@pytest.mark.parametrize("output", [".", "x/.."])
def test_a_directory_may_be_named_by_dots(tmp_path, monkeypatch, output):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    options = {"tokenizer": None, "max_file_bytes": 1e9, "report": lambda line: None}
    flushed = []
    monkeypatch.setattr(weights, "flush_to_disk", lambda path: flushed.append((path, path.is_dir())))
    weights.write(Path(output), shapes(MODEL, VOCABULARY), lambda tensors: None, **options)
    assert sorted(path.name for path in (tmp_path / "here").iterdir()) == ["config.json", "model.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["here"]
    assert flushed[-1] == (tmp_path, True), "the new name is on the disk, too"


def test_two_writes_at_once_give_one_whole_directory(tmp_path):
    """Both have begun before either ends, and neither touches the other's files."""
    both, outcomes = threading.Barrier(2, timeout=60), {}

    def one(value):
        def read(tensors):
            for tensor in tensors.values():
                tensor.fill_(value)
            both.wait()

        options = {"tokenizer": None, "max_file_bytes": 1e9, "report": lambda line: None}
        try:
            weights.write(tmp_path / "weights", shapes(MODEL, VOCABULARY), read, **options)
            outcomes[value] = "written"
        except ConfigError as error:
            outcomes[value] = str(error)

    threads = [threading.Thread(target=one, args=(value,)) for value in (1.0, 2.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (won,) = [value for value, outcome in outcomes.items() if outcome == "written"]
    (lost,) = outcomes.keys() - {won}
    assert "something else was written there meanwhile" in outcomes[lost]
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]
    stored = load_file(tmp_path / "weights" / "model.safetensors")
    assert all(torch.equal(tensor, torch.full_like(tensor, won)) for tensor in stored.values())


# Refusals


@pytest.fixture
def config(tiny_data, tmp_path):
    """A run that is to start from the whole weights in tmp_path/weights."""
    config = in_process_config(tiny_data, tmp_path / "run")
    write(tmp_path / "weights", config.model, 512)
    return replace(config, checkpoint=CheckpointConfig(init=str(tmp_path / "weights")))


def check_all(config):
    check(config)
    check_tensors(config)


def change(folder, function):
    tensors = load_file(folder / "model.safetensors")
    function(tensors)
    save_file(tensors, folder / "model.safetensors")


def pickled(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({}))


def truncated(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-1])


def indexed(weight_map):
    def damage(folder):
        index = {"weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return damage


def unreadable(folder):
    """A directory in its place: what root may not read either."""
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()


NORM = "layers.1.ffn_norm.weight"
DAMAGES = {
    "no directory": (shutil.rmtree, "weights is not a directory; name one that spiketrain convert wrote"),
    "a pickle": (
        pickled,
        "holds neither model.safetensors nor model.safetensors.index.json; pytorch_model.bin may be a",
    ),
    "a pickle by another name": (
        lambda folder: (folder / "model.safetensors").write_bytes(pickle.dumps({"a": 1})),
        "model.safetensors is not a whole safetensors file (",
    ),
    "a file cut short": (truncated, "model.safetensors is not a whole safetensors file ("),
    "no configuration": (lambda folder: (folder / "config.json").unlink(), "config.json is missing; name a directory"),
    "no JSON": (lambda folder: (folder / "config.json").write_text("{"), "config.json cannot be read ("),
    "a configuration that may not be read": (unreadable, "config.json cannot be read (Is a directory); write"),
    "another configuration": (
        lambda folder: (folder / "config.json").write_text('{"vocab_size": 512, "hidden_size": 32}'),
        "config.json has no model section and vocab_size; spiketrain convert",
    ),
    "no tensor": (lambda folder: change(folder, lambda tensors: tensors.pop(NORM)), f"lacks {NORM}; write"),
    "a tensor too many": (
        lambda folder: change(folder, lambda tensors: tensors.update(extra=torch.ones(1))),
        "holds extra, which the model does not have; write",
    ),
    "a wrong shape": (
        lambda folder: change(folder, lambda tensors: tensors.update({NORM: torch.ones(33)})),
        f"has other shapes than the model in {NORM} ({NORM}: [33] -> [32]); write",
    ),
    "a wrong type": (
        lambda folder: change(folder, lambda tensors: tensors.update({NORM: torch.ones(32, dtype=torch.int64)})),
        f"{NORM} is I64; weights are F64, F32, F16, BF16",
    ),
    "an index that leads elsewhere": (indexed({"a": "../a.safetensors"}), "it may only name files beside it"),
    "an index of a file that is not there": (indexed({"a": "b.safetensors"}), "b.safetensors is not a whole"),
    "an index that is wrong": (
        indexed({NORM: "model.safetensors"}),
        "and model.safetensors differ in embedding.weight",
    ),
    "an index of nothing": (indexed({}), "index.json has no weight_map"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_weights_are_refused(config, tmp_path, name):
    check_all(config)
    damage, message = DAMAGES[name]
    damage(tmp_path / "weights")
    with pytest.raises(ConfigError) as error:
        check_all(config)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_weights_of_another_model_are_refused_by_its_keys(config):
    def refusal(**changes):
        with pytest.raises(ConfigError) as error:
            check(replace(config, model=replace(config.model, **changes)))
        return str(error.value)

    assert "holds another model (model.norm_eps: 1e-06 -> 1e-05); set these keys as" in refusal(norm_eps=1e-5)
    attention = replace(config.model.attention, rope_theta=5e5)
    assert "(model.attention.rope_theta: 10000.0 -> 500000.0)" in refusal(attention=attention)
    mixers = "(model.mixers: gated_delta_net, full_attention -> full_attention, full_attention)"
    assert mixers in refusal(mixers=MixerLayoutConfig(pattern="full_attention"))


def test_what_means_nothing_to_the_parameters_may_differ(config):
    layout = MixerLayoutConfig(linear_per_full=1)
    changes = {"init_std": 1.0, "vocab_multiple": 512, "retention": RetentionConfig(num_heads=2), "mixers": layout}
    check_all(replace(config, model=replace(config.model, **changes)))
    experts = replace(config.model.moe, spawn_diversify=0.5, recompute_above=2.0)
    check_all(replace(config, model=replace(config.model, moe=experts)))


def test_another_vocabulary_is_refused(config):
    message = "has 512 rows of vocabulary and the run's data, padded to model.vocab_multiple, 1024; use the weights'"
    for changes in ({"vocab_size": 1024}, {"vocab_multiple": 1024}):
        with pytest.raises(ConfigError, match=message):
            check(replace(config, model=replace(config.model, **changes)))
    with pytest.raises(ConfigError, match=message):
        check_vocabulary(config, 1024)
    check_vocabulary(config, 512)


def test_they_are_not_looked_at_where_a_checkpoint_is(config, tmp_path):
    shutil.rmtree(tmp_path / "weights")
    (tmp_path / "run" / "checkpoints" / "step_00000001").mkdir(parents=True)
    check_all(config)
    check_vocabulary(config, 1)


# Runs


def first_loss(run_dir, config):
    """The loss of a run's last checkpoint on the first batch, nats per token."""
    model = load_model(run_dir, torch.device("cpu")).model
    total = tokens = 0.0
    for batch in find_sources(config).open_training(config).micro_batches(0, config.train.micro_batch_size):
        with torch.no_grad():
            total += float(model(batch.tokens, batch.positions, batch.documents, batch.labels, batch.loss_mask)[0])
        tokens += float(batch.loss_mask.sum())
    return total / tokens


MEGATRON = ("--engine.name=megatron",)
ZERO_3, ZERO_2 = (("--engine.name=deepspeed", f"--engine.zero_stage={stage}") for stage in (3, 2))


@pytest.mark.parametrize(
    ("precision", "engines"),
    [
        pytest.param("fp32", ((MEGATRON, 1), (ZERO_3, 2), (MEGATRON, 1)), marks=pytest.mark.slow),
        ("bf16", ((ZERO_2, 1), (MEGATRON, 2), (ZERO_2, 2))),
    ],
)
def test_from_engine_to_engine(tiny_run, tiny_data, tmp_path, precision, engines):
    """Each run starts from what the one before it wrote, moves nothing, and writes the same file."""
    sample = in_process_config(tiny_data, tmp_path)
    common = (f"--train.precision={precision}", "--train.steps=2", "--logging.progress=false")
    written, loss = None, None
    for number, (options, ranks) in enumerate(engines):
        run_dir, output = tmp_path / f"run{number}", tmp_path / f"weights{number}"
        # An update of 1e-30 is lost in rounding.
        start = () if loss is None else (f"--checkpoint.init={tmp_path / f'weights{number - 1}'}", "--optim.lr=1e-30")
        code, output_text = finish(tiny_run(run_dir, *common, *options, *start, ranks=ranks))
        assert code == 0, output_text
        if loss is None:
            loss = first_loss(run_dir, sample)
        else:
            assert f"started from {tmp_path / f'weights{number - 1}'}" in output_text
            assert metrics(run_dir)[0]["loss"] == pytest.approx(loss, rel=1e-5 if precision == "fp32" else 5e-4)
        export(run_dir, output, None, 1e9, print)
        content = (output / "model.safetensors").read_bytes()
        assert written in (None, content)
        written = content
        model = load_model(run_dir, torch.device("cpu")).model
        stored = load_file(output / "model.safetensors")
        assert all(torch.equal(stored[name], parameter) for name, parameter in model.named_parameters())
        export(run_dir, tmp_path / f"main{number}", "fp32", 1e9, print)
        for name, main in load_file(tmp_path / f"main{number}" / "model.safetensors").items():
            assert main.dtype == torch.float32 and torch.equal(main.to(stored[name].dtype), stored[name]), name
            # What training moved lies between the values that bfloat16 has.
            if (precision, number, stored[name].dtype) == ("bf16", 0, torch.bfloat16):
                assert not torch.equal(main, stored[name].float()), name


def test_a_run_that_goes_on_reads_its_checkpoint(tiny_run, config, tmp_path):
    """The weights may be gone by then; where no checkpoint is whole the run does not start from other numbers."""
    run_dir, init = tmp_path / "run", f"--checkpoint.init={config.checkpoint.init}"
    code, output = finish(tiny_run(run_dir, init, "--train.steps=1"))
    assert code == 0 and "started from" in output, output
    shutil.rmtree(tmp_path / "weights")
    code, output = finish(tiny_run(run_dir, init, "--train.steps=2"))
    assert code == 0 and "resumed from" in output and "started from" not in output, output
    for path in (run_dir / "checkpoints").iterdir():
        (path / "progress.json").unlink()
    code, output = finish(tiny_run(run_dir, init, "--train.steps=3"))
    assert code == 2 and "holds checkpoints, of which none can be read (step_00000002: progress.json is" in output


def hub_model(folder, tokenizer):
    """A tiny model of transformers with the tokenizer of a dataset."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    shape = transformers.Qwen3Config(vocab_size=512, head_dim=16, num_key_value_heads=1, **sizes)
    transformers.AutoModelForCausalLM.from_config(shape).save_pretrained(folder)
    shutil.copyfile(tokenizer / "tokenizer.model", folder / "tokenizer.model")


def test_a_run_starts_from_an_imported_model_by_one_option(tiny_data, tmp_path):
    hub_model(tmp_path / "hub", tiny_data)
    import_weights(tmp_path / "hub", tmp_path / "weights", "fp32", 1e9, print)
    sizes = ["--train.steps=2", "--train.seq_len=32", "--train.micro_batch_size=2", "--train.global_batch_size=4"]
    sizes += ["--evaluation.seq_len=512", "--evaluation.samples=0", "--logging.tensorboard=false"]
    arguments = ["--init", "weights", "--data.path", str(tiny_data), "--run.dir=run", "--run.threads=1", *sizes]
    start = [sys.executable, str(ROOT / "launch" / "pretrain.py")]
    done = subprocess.run([*start, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "started from weights" in done.stdout + done.stderr
    settings = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert settings["model"] == asdict(open_weights(tmp_path / "weights").model)
    assert (settings["data"]["tokenizer"], settings["checkpoint"]["init"]) == ("weights", "weights")
    assert [line["step"] for line in metrics(tmp_path / "run") if "grad_norm" in line] == [1, 2]


def parsed(*arguments):
    return parse(PretrainConfig, make_parser(PretrainConfig, ""), expand_init(arguments))[0]


def test_options_after_init_override_it(tmp_path):
    write(tmp_path, MODEL)
    config = parsed("--train.seed", "7", "--init", str(tmp_path), "--model.norm_eps", "1e-3")
    assert config.model == replace(MODEL, norm_eps=1e-3)
    assert (config.checkpoint.init, config.data.tokenizer, config.train.seed) == (str(tmp_path), None, 7)
    assert parsed(f"--init={tmp_path}").model == MODEL


def test_the_configuration_of_weights_is_a_model_section(tmp_path, monkeypatch):
    write(tmp_path, MODEL)
    monkeypatch.setenv("HOME", str(tmp_path))
    named = (("--model", f"{tmp_path}/config.json"), (f"--model={tmp_path}/config.json",), ("--model=~/config.json",))
    for argument in named:
        config = parsed(*argument)
        assert config.model == MODEL and config.checkpoint.init is None
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    for argument in (("--model", f"{tmp_path}/config.json"), ("--init", str(tmp_path))):
        with pytest.raises(ConfigError, match=r"config.json: model_type='mamba' is not known here; llama, "):
            parsed(*argument)
    with pytest.raises(ConfigError, match="--init: nowhere is not a directory"):
        parsed("--init", "nowhere")
