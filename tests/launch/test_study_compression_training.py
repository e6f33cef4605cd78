"""The study of training with compressed activations: what each variant is told, and the table from metrics."""

import json
from pathlib import Path

import pytest

from trainer.errors import ConfigError
from trainer.studies import compression_training as bench
from trainer.studies import runs

VALUES = {"train": {"steps": 200, "compression": {"bits": 0}}, "optim": {"warmup_steps": 10}}


def test_variants_are_options(tmp_path):
    chosen = tmp_path / "mixed.yaml"
    chosen.write_text("bits: 4\n")
    config = bench.Config(variants=["8", str(chosen), bench.KEPT, "8"], output=str(tmp_path))
    assert config.variants == ["8", str(chosen)], "each once, and what keeps everything comes by itself"
    jobs = {name: bench.job(config, VALUES, name, 1) for name in (bench.KEPT, *config.variants)}
    assert jobs[bench.KEPT].options == ()
    assert jobs["8"].options == ("--train.compression.bits", "8")
    assert jobs[str(chosen)].options == ("--train.compression", str(chosen))
    assert [Path(job.directory).name for job in jobs.values()] == [
        f"{name}-200-steps-seed-1" for name in ("kept", "8-bits", "mixed")
    ]


def test_the_table_compares_the_same_seeds(tmp_path):
    ends = {("kept", 0): 2.0, ("kept", 1): 3.0, ("8-bits", 0): 2.004, ("8-bits", 1): 3.006, ("4-bits", 0): 2.04}
    ends[("4-bits", 1)] = 3.06
    kept, eight, four = bench.comparisons([bench.Run(variant, seed, loss) for (variant, seed), loss in ends.items()])
    assert (kept.ours, eight.ours, four.ours) == pytest.approx((2.5, 2.505, 2.55))
    # Seeds differ widely, the changes of the same seed do not.
    assert "+0.200% ± 0.000%, within 0.5%" in eight.note
    assert "+2.000% ± 0.000%, beyond 0.5%" in four.note


def test_losses_are_read_from_the_runs(tmp_path, monkeypatch):
    config = bench.Config(output=str(tmp_path), seeds=[0, 1], variants=["8"])
    monkeypatch.setattr(bench, "recipe_values", lambda _: VALUES)

    def train(_recipe, _values, jobs, parallel_runs):
        for number, job in enumerate(jobs):
            job.directory.mkdir()
            lines = [{"step": 1, "loss": 9.0}, {"step": 200, "split": "validation", "loss": number, "bits_per_byte": 1}]
            (job.directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    monkeypatch.setattr(bench, "train_all", train)
    found = [(one.variant, one.seed, one.loss) for one in bench.run(config)]
    assert found == [("kept", 0, 0), ("8-bits", 0, 1), ("kept", 1, 2), ("8-bits", 1, 3)]
    monkeypatch.setitem(VALUES["train"]["compression"], "bits", 8)
    with pytest.raises(ConfigError, match="compresses"):
        bench.run(config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": [1]}, "seeds"),
        ({"steps": 0}, "steps"),
        ({"variants": ["7"]}, "variants"),
        ({"recipe": "no"}, "recipe"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ConfigError, match=message):
        bench.Config(**options)


def test_a_quick_study_is_short():
    config = bench.Config(quick=True)
    command = runs.command(config.recipe, VALUES, bench.job(config, VALUES, "8", 0))
    assert command[command.index("--train.steps") + 1] == "10"
