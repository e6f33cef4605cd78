"""The gates' laptop experiment: equal FLOPs, what each run is told, and the table from metrics."""

import json
from dataclasses import asdict

import pytest

from models.config import DenseToSparseConfig
from tests.launch.test_report import assert_drawn
from trainer.errors import ConfigError
from trainer.studies import dense_to_sparse as bench
from trainer.studies import runs

COST = bench.Cost(base=10.0, expert=2.0)
VALUES = {
    "train": {"global_batch_size": 2, "seq_len": 8, "steps": 100},
    "optim": {"warmup_steps": 10},
}


@pytest.mark.parametrize("budget_steps", [50, 400, 801])
def test_a_dense_start_is_paid_for_with_steps(budget_steps):
    budget = budget_steps * COST.of(2)
    steps = bench.steps_within(budget, COST, experts=8, top_k=2)
    spent = [
        sum(COST.of(bench.schedule(length).max_experts(step, 8, 2)) for step in range(length))
        for length in (steps, steps + 1)
    ]
    assert steps < budget_steps
    assert spent[0] <= budget < spent[1]


def _router(gate):
    config = bench.Config(steps=100)
    command = runs.command(config.recipe, VALUES, bench.job(config, gate, 1, 80))
    assert command[command.index("--train.steps") + 1] == "80"
    assert command[command.index("--optim.warmup_steps") + 1] == "8"
    return json.loads(command[command.index("--model.moe.router") + 1])


def test_every_run_ends_with_as_many_experts_and_leaves_no_key_to_the_recipe():
    for gate, activation in bench.GATES.items():
        router = _router(gate)
        assert (router["top_k"], router["normalize"]) == (2, "after")
        assert router["gate"] == ("top_k" if activation is None else "dense_to_sparse")
        sparse = DenseToSparseConfig(**router["dense_to_sparse"])
        assert set(router["dense_to_sparse"]) == set(asdict(sparse))
        if activation is not None:
            assert sparse.activation == activation
            assert [sparse.max_experts(step, 8, 2) for step in (0, 8, 20, 32, 80)] == [8, 8, 5, 2, 2]
            assert sparse.threshold == 0


def test_the_table_compares_the_same_seeds(tmp_path):
    config = bench.Config(output=str(tmp_path), seeds=[0, 1], steps=100)
    ends = {("top-k", 0): 1.50, ("top-k", 1): 1.70, ("linear", 0): 1.40, ("linear", 1): 1.60}
    ends |= {("tanh", 0): 1.51, ("tanh", 1): 1.71}
    for (gate, seed), end in ends.items():
        directory = bench.job(config, gate, seed, 100).directory
        directory.mkdir(parents=True)
        router = {"moe/load_cv": 0.5, "moe/max_load": 2.0, "moe/dead_experts": 0, "moe/experts_per_token": 2.0}
        lines = [{"step": step, "grad_norm": 1.0, **router} for step in range(1, 11)]
        lines.append({"step": 10, "split": "validation", "bits_per_byte": end})
        (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = [bench.read(VALUES, COST, bench.job(config, gate, seed, 100)) for gate, seed in ends]
    assert found[0].flops == [16 * step * 14.0 for step in range(1, 11)]
    top_k, linear, tanh = bench.comparisons(found)
    assert (top_k.ours, linear.ours, tanh.ours) == pytest.approx((1.6, 1.5, 1.61))
    assert linear.ratio == pytest.approx(1.6 / 1.5)
    # Their own spread is wide, that of the differences nil.
    assert "1.5000 ± 1.2706" in linear.note and "-0.1000 ± 0.0000" in linear.note
    assert "+0.0100 ± 0.0000" in tanh.note and "variation of the load 0.500" in tanh.note
    bench.draw(found, tmp_path / "gates.png")
    assert_drawn(tmp_path / "gates.png")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": [1]}, "seeds"),
        ({"seeds": [1, 1]}, "seeds"),
        ({"steps": 0}, "steps"),
        ({"recipe": "no.yaml"}, "recipe"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ConfigError, match=message):
        bench.Config(**options)
