"""The study of conversion: its jobs are recipes, its tables and claims compare the same seeds."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from launch.convert import COMMANDS
from tests.processes import ROOT
from trainer.cli import make_parser, parse
from trainer.config import PretrainConfig
from trainer.errors import ConfigError
from trainer.evaluation.config import EvaluateConfig
from trainer.phases import expand
from trainer.recipe import Record, read_steps
from trainer.studies import conversion as bench

VALUES = {
    "train": {"steps": 2000, "seq_len": 256, "global_batch_size": 8},
    "optim": {"warmup_steps": 60},
    "data": {"path": "stdlib", "cache_dir": "data", "vocab_size": 4096, "blend": None},
    "phases": [],
}
# The loss of each model at the base's length, over the base's.
LOSSES = {"base": 1.0, "more": 0.97, "hybrid": 0.99, "fixed": 1.0, "hybrid_3": 1.03, "scratch": 1.2, "experts": 1.05}
LOSSES |= {"spiking": 1.01, "all": 1.06}


def steps_of(job, base):
    """The steps of a job as `spiketrain convert run` reads them."""
    known = {command: kind for command, (_, kind, _) in COMMANDS.items()}
    return read_steps(base, job.steps, known | {"train": PretrainConfig, "evaluate": EvaluateConfig})


@pytest.fixture
def doubles(monkeypatch):
    """In place of the commands: what they would write, at once. Returns the names of the jobs that were run."""
    ran = []

    def run_logged(name, words, directory):
        ran.append(name)
        recipe = yaml.safe_load(Path(words[-1]).read_text())
        known = {command: kind for command, (_, kind, _) in COMMANDS.items()}
        steps = read_steps(
            recipe["base"], recipe["steps"], known | {"train": PretrainConfig, "evaluate": EvaluateConfig}
        )
        loss = LOSSES[directory.name] * (2 + int(directory.parent.name[-1]))
        for step in steps:
            if step.command == "layers":
                Path(step.options["json"]).write_text(json.dumps({"replaced": [2, 0, 3][: 4 - step.options["keep"]]}))
            elif step.command == "evaluate" and "recall" in step.options:
                rows = [
                    {"task": task, "length": length, "tokens": 0.25, "nats": 3.0}
                    for task in step.options["recall"]
                    for length in step.options["lengths"]
                ]
                step.output.write_text(json.dumps({"recall": rows}))
            elif step.command == "evaluate":
                longer = 0.5 if step.options["seq_len"] > 256 else 1
                step.output.write_text(json.dumps({"loss": longer * loss, "bits_per_byte": longer * loss / 2}))
            Record(directory).write(step, state="done", seconds=10)

    monkeypatch.setattr(bench, "run_logged", run_logged)
    monkeypatch.setattr(bench, "recipe_values", lambda _: VALUES)
    return ran


def test_a_whole_study(tmp_path, doubles, capsys):
    config = bench.Config(output=str(tmp_path), seeds=[0, 1], json=str(tmp_path / "figures.json"), lengths=[128, 256])
    bench.run(config)
    assert doubles == [f"{name}, seed {seed}" for seed in (0, 1) for name in bench.MODELS], "whole seeds first"
    out, errors = capsys.readouterr()
    first, second = out.split("seeds 0, 1")
    assert "not certain (-1.00%)" in first, "an interval takes two seeds"
    # Seeds differ widely, the changes of the same seed do not.
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in second.splitlines() if "|" in line]
    losses = {row[0]: row[1:] for row in rows[: 2 + len(bench.MODELS)]}
    assert losses["1:1, by damage"][:2] == ["3,072,000 + 276,480", "2.4750 ± 6.2895"]
    assert losses["1:1, by damage"][3::3] == ["-1.00 ± 0.00 %"] * 2
    assert losses["base: softmax"][3::3] == ["", ""] and losses["1:1, from scratch"][0] == "276,480"
    assert rows[-1][0] == "1:1, experts, spiking, int8" and rows[-1][1:] == ["3.000 ± 0.000"] * 4
    assert "seed 1: 1:1 keeps the layers [1, 3], 3:1 [1]" in second
    assert "1:1 is within 2% of the base after a tenth of its tokens: holds (-1.00% ± 0.00%)" in second
    assert "3:1 is within 2% of the base after a tenth of its tokens: does not hold (+3.00% ± 0.00%)" in second
    assert "from scratch at equal tokens: holds (-17.50% ± 0.00%)" in second
    assert "base, seed 0: done in 50 s; some 12 minutes left" in errors and "some 0 minutes left" in errors
    found = json.loads((tmp_path / "figures.json").read_text())
    assert found["seeds"] == [0, 1] and set(found["models"]) == set(bench.MODELS)
    assert found["models"]["scratch"]["1"]["loss"] == {"256": pytest.approx(3.6), "1024": pytest.approx(1.8)}
    assert [claim["holds"] for claim in found["claims"]] == [True, False, True, True]


def test_a_claim_at_its_edge_is_not_certain():
    def figures(*losses):
        return [bench.Figures({256: loss}, {}, {}) for loss in losses]

    claim = bench.Claim("within 2%", "ours", "base", 0.02)
    near = claim.judge({"ours": figures(1.0, 1.03), "base": figures(1.0, 1.0)}, 256)
    assert near["holds"] and not near["certain"], "the interval reaches beyond"
    far = claim.judge({"ours": figures(1.1, 1.1), "base": figures(1.0, 1.0)}, 256)
    assert not far["holds"] and far["certain"]


def test_the_budget_is_a_tenth_of_the_tokens(tmp_path):
    plan = bench.Plan(bench.Config(output=str(tmp_path), steps=1200), VALUES)
    budget = plan.budget
    read = (budget.choice + budget.steps) * 1024
    assert 0.099 < read / (1200 * 8 * 256) <= bench.BUDGET
    for job in plan.jobs(0):
        for step in steps_of(job, plan.base_options()):
            if step.command == "layers":
                aligned = step.options["align_steps"] * step.options["align_batch_size"] * step.options["seq_len"]
                assert aligned == budget.choice * 1024
            if step.is_training and job.name != "base":
                assert step.options["train.steps"] == budget.steps
                phases = [{"from_step": 0, "train": {"seq_len": 256, "global_batch_size": 4}}, *step.options["phases"]]
                sizes = [phase["train"] for phase in phases if "seq_len" in phase["train"]]
                assert [size["seq_len"] for size in sizes] == [256, 512, 1024]
                assert {size["seq_len"] * size["global_batch_size"] for size in sizes} == {1024}


def test_the_parts_of_a_conversion_are_those_of_the_laptop_recipe(tmp_path):
    recipe = yaml.safe_load((ROOT / "configs/convert/laptop.yaml").read_text())
    train = next(step["train"] for step in recipe["steps"] if "phases" in step.get("train", {}))
    shares = [phase["from_step"] / train["train"]["steps"] for phase in train["phases"]]
    assert shares == [bench.DISTILL, bench.NEXT_TOKEN, bench.TWICE, bench.FOUR_TIMES]
    plan = bench.Plan(bench.Config(output=str(tmp_path), steps=4400), VALUES)
    jobs = {job.name: job for job in plan.jobs(0)}
    for name in ("hybrid", "fixed", "hybrid_3"):
        (own,) = [step["train"] for step in jobs[name].steps if "train" in step]
        assert [phase["from_step"] / own["train.steps"] for phase in own["phases"]] == pytest.approx(shares, abs=1e-3)
        assert own["train.objective"]["teacher"] == str(plan.folder("base", 0) / "weights")
    for name in ("more", "scratch", "experts", "all"):
        (own,) = [step["train"] for step in jobs[name].steps if "train" in step]
        assert "train.objective" not in own and len(own["phases"]) == 2


def test_training_steps_are_valid_configurations(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    plan, parser = bench.Plan(bench.Config(output=str(tmp_path)), VALUES), make_parser(PretrainConfig, "")
    for job in plan.jobs(2):
        for step in (step for step in steps_of(job, plan.base_options()) if step.is_training):
            # Weights that earlier steps make are not there yet.
            left = {key: value for key, value in step.options.items() if key != "init"}
            if job.name == "scratch":
                left["model"] = "configs/models/laptop-dense.yaml"
            config, _ = parse(PretrainConfig, parser, replace(step, options=left).arguments())
            config.validate_layout(1)
            phases = expand(config)
            lengths = [256] if job.name == "base" else [256, 512, 1024]
            assert [*dict.fromkeys(phase.config.train.seq_len for phase in phases)] == lengths
            assert config.train.seed == (2 if job.name == "base" else 1002)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": [1]}, "seeds"),
        ({"layers": 6}, "multiple of four"),
        ({"lengths": []}, "lengths"),
        ({"experts": "no.yaml"}, "experts: no.yaml does not exist"),
        ({"threads": 0}, "threads"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ConfigError, match=message):
        bench.Config(**options)


@pytest.mark.parametrize(
    ("values", "message"), [({"phases": [{"from_step": 1}]}, "phases"), ({"data": {"blend": {"a": 1}}}, "blend")]
)
def test_recipes_that_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        bench.Plan(bench.Config(), VALUES | values)
    with pytest.raises(ConfigError, match="too few to convert"):
        bench.Plan(bench.Config(steps=20), VALUES)


MODEL = {"num_layers": 4, "hidden_size": 32, "ffn_hidden_size": 32, "init_std": 0.1}
MODEL |= {
    "mixers": {"pattern": "full_attention"},
    "attention": {"num_heads": 2, "num_kv_heads": 1, "head_dim": 16, "qk_norm": True},
}


@pytest.mark.slow
def test_conversions_at_toy_size(trained, tiny_data, tmp_path):
    """Every command, and again: nothing is run twice."""
    data = tmp_path / "data"
    shutil.copytree(tiny_data, data)
    for file in data.glob("validation.*"):
        shutil.copyfile(file, data / f"test{file.suffix}")
    recipe = yaml.safe_load((trained / "config.yaml").read_text())
    recipe["data"]["path"] = str(data)
    recipe["train"] |= {"steps": 50, "seq_len": 16, "micro_batch_size": 8, "global_batch_size": 8}
    moe = {"num_experts": 2, "router": {"gate": "dense_to_sparse", "top_k": 1, "normalize": "after"}}
    for name, values in (("recipe", recipe), ("model", MODEL), ("experts", moe)):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(values))
    config = bench.Config(
        output=str(tmp_path / "jobs"),
        recipe=str(tmp_path / "recipe.yaml"),
        model=str(tmp_path / "model.yaml"),
        experts=str(tmp_path / "experts.yaml"),
        layers=4,
        steps=50,
        lengths=[256],
        examples=2,
        threads=1,
    )
    plan = bench.Plan(config, bench.recipe_values(config.recipe))
    jobs = {job.name: job for job in plan.jobs(0)}
    # Of the nine, those between which every kind of step is.
    for name in ("base", "hybrid", "all"):
        bench.run_job(plan, jobs[name])
    losses = [bench.read(plan, name, 0).loss[16] for name in ("base", "hybrid", "all")]
    assert len(set(losses)) == 3
    before = (jobs["hybrid"].directory / "run/metrics.jsonl").read_text()
    bench.run_job(plan, jobs["hybrid"])
    assert (jobs["hybrid"].directory / "run/metrics.jsonl").read_text() == before
