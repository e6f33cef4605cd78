"""The study of post-training: its jobs are recipes, its tables and claims compare the same seeds."""

import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from trainer.cli import from_mapping
from trainer.data.tokenizer import Tokenizer
from trainer.errors import ConfigError
from trainer.posttraining.config import PosttrainConfig
from trainer.posttraining.tasks import rows
from trainer.studies import posttraining as bench
from trainer.studies import posttraining_claims as claims

# Right answers of 4 to every question, by model; those of 3 to hard questions are one less.
RIGHT = dict.fromkeys(claims.MODELS, 2) | {"initial": 1, "hpt": 3}


@pytest.fixture
def doubles(monkeypatch):
    """In place of the processes: what they would write, at once. Returns the recipes and options of the commands."""
    ran = []

    def script(name, words, log):
        ran.append((name, words))

    def call(target, arguments, log):
        ran.append((target.rpartition(":")[2], arguments))
        if target.endswith("evaluate"):
            _, held_out, _, samples, _, output = arguments
            model, seed = output.parent.name, int(output.parent.parent.name[-1])
            levels = [json.loads(line)["level"] for line in held_out.read_text().splitlines()]
            # Seeds differ, models of one seed by as much in each.
            right = {"easy": RIGHT[model] + seed, "hard": RIGHT[model] + seed - 1}
            prompts = [{"level": level, "right": right[level], "different": 1} for level in levels]
            output.write_text(json.dumps({"samples": samples, "prompts": prompts}))

    monkeypatch.setattr(bench.forked, "run_script", script)
    monkeypatch.setattr(bench.forked, "call", call)
    return ran


def test_a_whole_study(tmp_path, doubles, capsys):
    config = bench.Config(
        output=str(tmp_path / "jobs"), json=str(tmp_path / "figures.json"), seeds=[0, 1], samples=4, prompts=8
    )
    bench.run(config)
    evaluated = [arguments[-1].parts[-3:-1] for name, arguments in doubles if name == "evaluate"]
    assert evaluated == [
        (f"{task}-32-steps-seed-{seed}", model) for seed in (0, 1) for task in bench.SETTINGS for model in claims.MODELS
    ], "whole seeds first"
    first, second = capsys.readouterr().out.split("seeds 0, 1")

    def lines(text, words):
        return [line for line in text.splitlines() if words in line]

    assert all("+25.0 " in line and "holds, not certain" in line for line in lines(first, "raises pass@1"))
    verdicts = lines(second, "raises pass@1")
    assert len(verdicts) == 2 and all("+25.0 ± 0.0" in line and "| holds  " in line for line in verdicts)
    assert all("does not hold" in line for line in lines(second, "GRPO lowers"))
    found = json.loads((tmp_path / "figures.json").read_text())
    own = found["tasks"]["countdown"]["models"]["hpt"]
    assert found["k"] == [1, 2, 4] and own["0"]["easy"] == [0.75, 1, 1] and own["1"]["easy"][0] == 1
    doubles.clear()
    bench.run(config)
    assert not doubles, "finished jobs are kept"


def test_recipes_are_valid_and_of_equal_samples(tmp_path, doubles):
    bench.run(bench.Config(output=str(tmp_path), tasks=["text_to_sql"], seeds=[3, 4], steps=7, prompts=8))
    folder = tmp_path / "text_to_sql-7-steps-seed-3"
    answers = {}
    for path in sorted(folder.glob("*/*.yaml")):
        recipe = json.loads(path.read_text())
        config = from_mapping(PosttrainConfig, recipe)
        assert Path(config.rows.train[0]).is_file() and config.updates == 1 and config.train.seed == 3
        model = path.parent.name
        answers[model] = answers.get(model, 0) + config.train.steps * config.train.global_batch_size
    assert answers.keys() == claims.MODELS.keys()
    assert {answers[name] for name in answers if name != "initial"} == {7 * 256}
    starts = {words[3]: words[1] for name, words in doubles if name == "posttrain" and str(folder) in words[3]}
    assert starts[str(folder / "sft_grpo/run.yaml")] == str(folder / "sft_grpo/weights")
    assert starts[str(folder / "hpt/run.yaml")] == str(folder / "initial/weights")


@pytest.mark.parametrize("task", bench.SETTINGS)
def test_nothing_held_out_is_learned_from(tmp_path, doubles, task):
    bench.Job(bench.Config(output=str(tmp_path), prompts=16), task, 0).run("initial")
    folder = tmp_path / f"{task}-32-steps-seed-0"
    files = ("held-out.jsonl", "initial/rows.jsonl", "rows/demonstrations.jsonl")
    held_out, read, shown = (
        [json.loads(line)["prompt"] for line in (folder / name).read_text().splitlines()] for name in files
    )
    assert len(held_out) == len(set(held_out)) == 16 and not set(held_out) & {*read, *shown}
    # The tokenizer has the words of all of them.
    tokenizer = Tokenizer.load(folder / "initial/tokenizer")
    for row in islice(rows(task, 0), 200):
        text = row["prompt"] + row["completion"]
        tokens = tokenizer.encode(text)
        assert tokenizer.decode(tokens) == text and tokenizer.eod_id not in tokens
        assert len(tokenizer.encode(row["completion"])) < bench.SETTINGS[task].max_new_tokens


def test_a_claim_at_its_edge_is_not_certain():
    def figures(*right):
        return [claims.Figures(4, {"all": np.array([own])}, {}) for own in right]

    claim = claims.Claim("words", "ours", "peer", 1)
    near = claim.judge({"ours": figures(2, 3, 2), "peer": figures(2, 2, 2)})
    assert near["holds"] and not near["certain"] and near["difference"] == pytest.approx(1 / 12)
    far = claim._replace(below=True).judge({"ours": figures(3, 3, 3), "peer": figures(1, 1, 1)})
    assert not far["holds"] and far["certain"] and far["difference"] == pytest.approx(0.5)


def test_pass_at_k_by_level():
    prompts = [{"level": level, "right": right, "different": 1} for level, right in (("easy", 4), ("hard", 1))]
    figures = claims.Figures.of({"samples": 4, "prompts": prompts})
    assert figures.ks == [1, 2, 4] and figures.pass_at(1) == 0.625 and figures.pass_at(2, "hard") == 0.5
    assert figures.pass_at(1, "easy") == 1


def test_the_plot(tmp_path):
    prompts = [{"level": level, "right": 1, "different": 1} for level in ("easy", "hard")]
    figures = claims.Figures.of({"samples": 4, "prompts": prompts})
    claims.draw({"countdown": {name: [figures] * 2 for name in ("initial", "grpo")}}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": [1]}, "seeds"),
        ({"tasks": ["sums"]}, "tasks: there is no 'sums'; choose from countdown"),
        ({"models": ["grpo"]}, "the first is initial"),
        ({"width": 40}, "multiple of 16"),
        ({"steps": 0}, "steps"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ConfigError, match=message):
        bench.Config(**options)


@pytest.mark.slow
def test_models_at_toy_size(tmp_path, capsys):
    """Every command of these models, and a log that says why one failed."""
    models = ["initial", "sft_grpo", "luffy", "hpt_dph"]
    config = bench.Config(output=str(tmp_path), tasks=["countdown"], models=models, quick=True, seeds=[0, 1, 2])
    assert config.seeds == [0, 1]
    job = bench.Job(config, "countdown", 0)
    for name in models:
        assert job.run(name).samples == 4
    with pytest.raises(RuntimeError, match=r"ended with 1: see .*/log"):
        bench.forked.call("trainer.studies.posttraining_models:draw", (tmp_path, tmp_path), tmp_path / "log")
    assert "TypeError" in (tmp_path / "log").read_text()
