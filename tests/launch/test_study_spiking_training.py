"""The study of training with spikes: what each variant is told, and the table from metrics."""

import json

import pytest

from models.config import SpikingConfig
from tests.launch.test_report import assert_drawn
from trainer.cli import from_mapping
from trainer.errors import ConfigError
from trainer.studies import runs
from trainer.studies import spiking_training as bench

VALUES = {"train": {"steps": 200}, "optim": {"warmup_steps": 10}, "model": {"spiking": {"layers": []}}}


def options(variant, steps=100):
    config = bench.Config(steps=steps)
    command = runs.command(config.recipe, VALUES, bench.job(config, VALUES, variant, 1))
    assert command[command.index("--train.steps") + 1] == str(steps)
    assert command[command.index("--optim.warmup_steps") + 1] == str(steps // 20)
    assert command[command.index("--run.threads") + 1] == "1"
    return json.loads(command[command.index("--model.spiking") + 1]) if "--model.spiking" in command else None


def test_variants_are_configurations():
    assert options(bench.FLOAT) is None
    assert options("k2.5") == {"layers": ["all"], "k": 2.5}
    assert options("k2_start=0.3")["start_step"] == 30
    annealed = options("k2_anneal=0.25", steps=40)
    assert (annealed["k_start"], annealed["anneal_steps"]) == (8.0, 10)
    # Of a run of the recipe's length.
    config = bench.Config()
    assert bench.job(config, VALUES, "k3", 0).steps == 200
    assert options("k3_l1=0.01")["activity"] == {"loss": "l1", "weight": 0.01}
    assert options("k3_rate=0.1@1.5")["activity"] == {"loss": "rate", "weight": 0.1, "target": 1.5}
    for variant in ("k2", "k3.5", "k2_start=0.3", "k2_anneal=0.3"):
        assert variant in bench.Config().variants
        found = from_mapping(SpikingConfig, bench.neurons(variant, 1500))
        assert found.layers == ["all"] and found.k == float(variant.split("_")[0][1:])


@pytest.mark.parametrize("name", ["", "2", "kk", "k2_", "k2_l1", "k2_l1=x", "k2_rate=0.1", "k2_none=1"])
def test_a_variant_that_is_none_is_refused(name):
    with pytest.raises(ConfigError, match="variants has"):
        bench.Config(variants=[name])


def write(config, variant, seed, loss, sparsity):
    directory = bench.job(config, VALUES, variant, seed).directory
    directory.mkdir(parents=True)
    lines = [{"step": step, "grad_norm": 1.0} for step in range(1, 101)]
    if variant != bench.FLOAT:
        for line in lines[4::5]:
            # Only the last fifth counts.
            late = sparsity if line["step"] > 80 else 0.1
            line |= {f"spiking/{name}": 0.5 for name in bench._LATE} | {"spiking/sparsity": late}
    lines.append({"step": 100, "split": "validation", "loss": loss, "bits_per_byte": 1.0})
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_table_compares_the_same_seeds(tmp_path):
    config = bench.Config(output=str(tmp_path), seeds=[0, 1], steps=100, variants=["k2", "k3", "k2_start=0.3"])
    ends = {
        (bench.FLOAT, 0): (2.00, None),
        (bench.FLOAT, 1): (3.00, None),
        ("k2", 0): (2.02, 0.81),
        ("k2", 1): (3.03, 0.81),
        ("k3", 0): (2.06, 0.70),
        ("k3", 1): (3.09, 0.70),
        ("k2_start=0.3", 0): (2.02, 0.70),
        ("k2_start=0.3", 1): (3.03, 0.70),
    }
    for (variant, seed), (loss, sparsity) in ends.items():
        write(config, variant, seed, loss, sparsity)
    found = [
        bench.Run(variant, seed, runs.Curves.read(bench.job(config, VALUES, variant, seed).directory))
        for variant, seed in ends
    ]
    floats, k2, k3, late = bench.comparisons(found)
    assert (floats.ours, k2.ours) == pytest.approx((2.5, 2.525))
    assert k2.ratio == pytest.approx(2.5 / 2.525)
    # Seeds differ widely, the increases of the same seed do not.
    assert "loss +1.00% ± 0.00% against float, seed by seed" in k2.note and "sparsity 81.00%" in k2.note
    assert k2.note.endswith("; reaches the goal of 80% sparsity with a loss at most 2% higher")
    assert "; does not reach the report's sparsity of 69.15% with a loss" in k3.note, "it costs 3 %"
    assert "; reaches the report's sparsity of 69.15% with a loss" in late.note
    bench.draw(found, tmp_path / "spikes.png")
    assert_drawn(tmp_path / "spikes.png")


def test_a_failed_run_is_named_with_its_log(tmp_path, monkeypatch):
    job = runs.Job("k2.5", tmp_path / "k2.5-seed-0", 10, 0, ())
    monkeypatch.setattr(runs, "command", lambda *_: ["false"])
    with pytest.raises(RuntimeError, match=r"k2\.5, seed 0 ended with 1: see .*/k2\.5-seed-0\.log"):
        runs.train_all("recipe", {}, [job], 1)
    (job.directory / "status.json").write_text(json.dumps({"state": "done"}))
    runs.train_all("recipe", {}, [job], 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"seeds": [1]}, "seeds"), ({"steps": 0}, "steps"), ({"jobs": 0}, "jobs"), ({"recipe": "no.yaml"}, "recipe")],
)
def test_bad_input(options, message):
    with pytest.raises(ConfigError, match=message):
        bench.Config(**options)
