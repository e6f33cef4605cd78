"""Tasks of the lm-eval harness: against its own adapter of transformers on an exported model, and as a command."""

import json
import sys
import types
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml

from models.config import MixerLayoutConfig
from tests.trainer.conftest import in_process_config
from tests.trainer.evaluation.recall.test_tasks import byte_level
from trainer.errors import ConfigError
from trainer.evaluation.config import EvaluateConfig
from trainer.evaluation.harness_run import _number, evaluate_tasks, local_names

TEXTS = [path.read_text() for path in sorted(Path(json.__file__).parent.glob("*.py"))]
OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")


def write_tasks(folder):
    """A task of each kind of output, with data in files beside it."""
    lines = [line.strip() for line in TEXTS[0].splitlines() if len(line.strip()) > 30][:12]
    rows = [
        {
            "text": line[:15],
            "rest": line[15:],
            "choices": [line[15:], "return None", "x", "y z", ""][:4],
            "gold": 0,
            "document": TEXTS[0][60 * number : 60 * number + 40 + 30 * number],
        }
        for number, line in enumerate(lines)
    ]
    folder.mkdir(exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "test_split": "test",
        "doc_to_text": "{{text}}",
        "target_delimiter": "",
        "metadata": {"version": 1},
    }
    acc = [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]
    tasks = {
        "choices": {
            "output_type": "multiple_choice",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{gold}}",
            "metric_list": acc,
            "tag": ["ours"],
        },
        "rest": {
            "output_type": "loglikelihood",
            "doc_to_target": "{{rest}}",
            "metric_list": acc,
            "tag": ["ours"],
        },
        "whole": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{document}}",
            "metric_list": [{"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}],
        },
        "continued": {
            "output_type": "generate_until",
            "doc_to_target": "{{rest}}",
            "generation_kwargs": {"until": ["\n", "()"], "max_gen_toks": 12, "do_sample": False},
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        },
    }
    for name, task in tasks.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **common, **task}))
    group = {"group": "pair", "task": ["choices", "rest"], "aggregate_metric_list": [{"metric": "acc"}]}
    (folder / "group.yaml").write_text(yaml.safe_dump(group))
    return folder


@pytest.fixture(scope="session")
def task_dir(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("harness") / "tasks")


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A run of a model that transformers has too, trained without document masks, as transformers computes it."""
    from trainer import pretrain
    from trainer.data.prepare import prepare
    from trainer.data.prepare_config import PrepareConfig, TokenizerConfig

    folder = tmp_path_factory.mktemp("dense")
    byte_level(folder)
    source, data = f"{Path(json.__file__).parent}/*.py", folder / "data"
    tokenizer = TokenizerConfig(path=str(folder / "tokenizer.json"))
    prepare(
        PrepareConfig(
            source=source, output=str(data), validation_share=0.2, test_share=0.0, workers=1, tokenizer=tokenizer
        )
    )
    config = in_process_config(data, folder / "run", steps=1)
    config = replace(
        config,
        # Large random weights, so that continuations differ.
        model=replace(config.model, mixers=MixerLayoutConfig(pattern="full_attention"), init_std=0.3),
        data=replace(config.data, document_mask=False),
    )
    assert pretrain.run(config, yaml.safe_dump(asdict(config))) == 0
    return folder / "run"


@pytest.fixture
def offline(monkeypatch):
    for variable in OFFLINE:
        monkeypatch.setenv(variable, "1")


def stand_in_for_accelerate(monkeypatch):
    """The harness's adapter imports accelerate, of which it uses nothing for a model that is given to it."""
    names = ("Accelerator", "InitProcessGroupKwargs", "find_executable_batch_size", "get_max_memory")
    for name in ("accelerate", "accelerate.utils"):
        module = types.ModuleType(name)
        for attribute in names:
            setattr(module, attribute, type(attribute, (), {}))
        monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture(scope="module")
def ours(dense):
    """Our model as the harness sees it, for texts of a length at most."""
    import torch

    from trainer.evaluation.harness import HarnessModel
    from trainer.evaluation.loading import load_scorer

    config = EvaluateConfig(checkpoint=str(dense), tasks="rest", batch_size=3)
    loaded, scorer = load_scorer(config, torch.device("cpu"))
    return lambda max_length: HarnessModel(scorer, loaded.require_tokenizer(), max_length, slots=3, seed=0)


@pytest.fixture
def theirs(dense, launch, tmp_path, monkeypatch, offline):
    """The exported model in the harness's own adapter of transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = ("--checkpoint", str(dense), "--output", "hub", "--layout", "hf")
    code, _, errors, _ = launch("convert", "export", *options, forked=True)
    assert code == 0, errors
    model, tokenizer = (auto.from_pretrained(tmp_path / "hub") for auto in (AutoModelForCausalLM, AutoTokenizer))
    stand_in_for_accelerate(monkeypatch)
    from lm_eval.models.huggingface import HFLM

    return lambda max_length: HFLM(
        pretrained=model, tokenizer=tokenizer, max_length=max_length, batch_size=4, device="cpu"
    )


def instances(kind, arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, each, number) for number, each in enumerate(arguments)]


def test_requests_are_answered_as_by_transformers(ours, theirs):
    text = TEXTS[0]
    pairs = [
        (text[start : start + 7 * start % 90 + 1], text[start + 90 : start + 92 + start % 23])
        for start in range(20, 400, 23)
    ]
    # The same context with several continuations, a space between both, and none at all.
    pairs += [("for name in", each) for each in (" a", " b", " names:", " self")] + [("a = ", "1"), ("", text[:40])]
    whole = [(text[start : start + 3 * start],) for start in range(1, 200, 37)]
    prompts = [
        (text[start : start + 11 * start % 70 + 1], {"until": ["\n", "ing"], "max_gen_toks": 9 + start % 3})
        for start in range(5, 300, 41)
    ]
    # Some texts are longer than 24 tokens, and none is longer than 256.
    for models in ((ours(length), theirs(length)) for length in (24, 256)):
        found, wanted = (model.loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True) for model in models)
        assert [likely for _, likely in found] == [likely for _, likely in wanted]
        assert [total for total, _ in found] == pytest.approx([total for total, _ in wanted], abs=1e-4)
        found, wanted = (
            model.loglikelihood_rolling(instances("loglikelihood_rolling", whole), disable_tqdm=True)
            for model in models
        )
        assert found == pytest.approx(wanted, abs=1e-4, rel=1e-6)
        found, wanted = (
            model.generate_until(instances("generate_until", prompts), disable_tqdm=True) for model in models
        )
        assert found == wanted and len(set(found)) > 3


def test_tasks_of_every_kind_of_a_hybrid(launch, trained, task_dir, tmp_path, offline):
    options = ("--checkpoint", str(trained), "--tasks", "ours, whole,continued,pair", "--task_dir", str(task_dir))
    code, out, errors, _ = launch("evaluate", *options, "--seq_len", "96", "--json", "out.json", forked=True)
    assert code == 0, errors
    found = json.loads((tmp_path / "out.json").read_text())["tasks"]
    assert set(found["results"]) == {"choices", "rest", "whole", "continued", "pair"}
    both = [found["results"][task]["acc,none"] for task in ("choices", "rest")]
    assert found["groups"]["pair"]["acc,none"] == pytest.approx(sum(both) / 2)
    assert found["n-samples"]["rest"] == {"original": 12, "effective": 12}
    assert 0 <= found["results"]["choices"]["acc,none"] <= 1
    assert 1 < found["results"]["whole"]["bits_per_byte,none"] < 8
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")]
    wanted = {("choices", "acc"), ("rest", "acc"), ("whole", "bits_per_byte")}
    names = {(task.removeprefix("- "), metric) for task, metric, *_ in rows}
    assert names == wanted | {("continued", "exact_match"), ("pair", "acc")}
    bits = found["results"]["whole"]["bits_per_byte,none"]
    assert next(row for row in rows if row[0] == "whole")[2:] == ["none", f"{bits:.4f}", "", "12", "0"]


def test_examples_and_solved_examples_are_as_many_as_asked_for(trained, task_dir, offline, capsys):
    common = {"checkpoint": str(trained), "tasks": "rest", "task_dir": str(task_dir)}
    for fewshot in (0, 2):
        found = evaluate_tasks(EvaluateConfig(**common, seq_len=96, examples=5, fewshot=fewshot))["tasks"]
        assert (found["n-shot"], found["n-samples"]["rest"]["effective"]) == ({"rest": fewshot}, 5)
        # Two examples and a text are longer than 96 tokens, a text alone is not.
        assert ("5 of 5 prompts have more than 96 tokens" in capsys.readouterr().err) == (fewshot == 2)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"dataset_path": "somebody/corpus"}, "tasks: mine wants data from the network, which is off (Couldn't reach"),
        ({"dataset_kwargs": {"data_files": "none.jsonl"}}, "tasks: mine cannot be opened (FileNotFoundError: "),
    ],
)
def test_tasks_without_data_are_one_line(launch, trained, tmp_path, offline, task, message):
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/mine.yaml").write_text(yaml.safe_dump({"task": "mine", "dataset_path": "json"} | task))
    options = ("--checkpoint", str(trained), "--tasks", "mine", "--task_dir", "tasks")
    code, _, errors, _ = launch("evaluate", *options, forked=True)
    assert code == 2
    assert f"error: {message}" in errors.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_beams": 4, "max_gen_toks": 8}, "generation_kwargs has num_beams, which is not supported; leave it out"),
        ({"penalty": 4, "max_gen_toks": 8}, "generation_kwargs has penalty, which is not supported; leave it out"),
        ({"top_p": 4, "max_gen_toks": 8}, "generation_kwargs: top_p is 4: it must be in"),
        ({}, "one wants 256 new tokens, which leaves no room for its prompts in 128; raise --seq_len, or lower"),
    ],
)
def test_texts_that_cannot_be_generated_are_refused(ours, arguments, message):
    with pytest.raises(ConfigError, match=f"tasks: {message}"):
        ours(128).generate_until(instances("generate_until", [("a", {"until": ["b"], **arguments})]))


def test_drawn_texts_depend_on_the_seed_and_on_nothing_else(ours):
    model = ours(128)
    prompts = [("def f", {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 1.0, "top_k": 50})] * 3
    first = model.generate_until(instances("generate_until", prompts))
    assert len(set(first)) == 3
    assert model.generate_until(instances("generate_until", prompts[:2])) == first[:2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tasks=,",), "tasks names none; give names separated by commas"),
        (("--tasks=rest", "--task_dir=none"), "task_dir: none does not exist; name a directory with YAML files"),
        (("--tasks=rest", "--task_dir=empty"), "task_dir: empty holds no YAML file with a task"),
        (("--tasks=restt", "--task_dir=OWN"), "tasks: there is no task 'restt'; did you mean 'rest'?"),
        (("--tasks=rest", "--recall=[needle]"), "recall and tasks are two evaluations; leave one of them out"),
        (("--tasks=rest", "--spiking=true"), "spiking is of an evaluation of data, and this is one of tasks"),
        (("--fewshot=2",), "fewshot is of an evaluation of tasks, and this is one of data; leave it out"),
        (("--tasks=rest", "--fewshot=-1"), "fewshot is -1: it must not be negative"),
    ],
)
def test_bad_input_is_one_line_before_torch(launch, trained, task_dir, tmp_path, arguments, message):
    (tmp_path / "empty").mkdir()
    arguments = [argument.replace("OWN", str(task_dir)) for argument in arguments]
    code, _, errors, imported = launch("evaluate", "--checkpoint", str(trained), *arguments)
    assert code == 2
    assert len(errors.strip().splitlines()) == 1
    assert message in errors
    assert imported == []


def test_without_the_harness_a_line_says_how_to_install_it(trained, monkeypatch):
    monkeypatch.setattr("trainer.evaluation.harness_run.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"tasks needs the lm-eval harness; pip install 'spiketrain\[evaluate\]'"):
        EvaluateConfig(checkpoint=str(trained), tasks="rest")


def test_functions_of_tasks_are_not_run_to_learn_their_names(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/one.yaml").write_text("task: one\ntag: [x, y]\nprocess_docs: !function utils.docs\n")
    (tmp_path / "group.yaml").write_text("group: both\ntask: [one, two]\n")
    assert local_names(tmp_path) == {"one", "x", "y", "both"}


def test_numbers_of_any_size_have_a_place_in_the_table():
    values = (0.25, 12, 1e6, 1e70, float("inf"), "N/A", None)
    assert [_number(value) for value in values] == ["0.2500", "12", "1e+06", "1e+70", "inf", "", ""]
