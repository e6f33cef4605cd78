"""Runs whose rollouts are drawn ahead, replayed, or dialogues with an environment."""

import json

import pytest

from tests.trainer.conftest import metrics
from tests.trainer.posttraining.conftest import run, steps
from trainer.posttraining.environments import Calculator, calculate

ENVIRONMENT = '''
from trainer.posttraining.environments import Reply

class Counts:
    """Tells the length of the turn; the third turn is the last, and worth 1 for an even length."""

    def __init__(self, last=3):
        self.last, self.turns = last, 0

    def reset(self, row):
        self.name = row.prompt[:3]

    def step(self, turn):
        self.turns += 1
        if turn.count("e") > 6:
            raise RuntimeError("too many")
        return Reply(f"<{len(turn)}>", self.turns == self.last, float(len(turn) % 2 == 0))
'''


def lines_of(run_dir):
    return [line for line in metrics(run_dir) if "grad_norm" in line]


def rollouts_of(run_dir):
    """Every group of a run's rollouts."""
    files = sorted((run_dir / "rollouts").glob("*.jsonl"))
    return [json.loads(line) for path in files for line in path.read_text().splitlines()[1:]]


@pytest.mark.parametrize(
    "prompts", [pytest.param(2, id="one update", marks=pytest.mark.slow), pytest.param(4, id="two updates")]
)
def test_a_run_that_draws_ahead_resumes_exactly(model, rows, tmp_path, prompts):
    """The second rollout is drawn by the initial weights, and the first learned from is the same as without."""
    options = (f"--rl.prompts={prompts}", "--rl.ahead=1")
    run(model, rows, tmp_path / "whole", "rl", *options)
    run(model, rows, tmp_path / "cut", "rl", *options, "--train.steps=3")
    run(model, rows, tmp_path / "cut", "rl", *options)
    assert steps(tmp_path / "cut") == steps(tmp_path / "whole")
    run(model, rows, tmp_path / "now", "rl", options[0])
    whole, now = lines_of(tmp_path / "whole"), lines_of(tmp_path / "now")
    assert whole[0]["loss"] == now[0]["loss"] and whole[-1]["loss"] != now[-1]["loss"]
    updates = prompts // 2
    ages = [line["rollout/age"] for line in whole if "rollout/age" in line]
    assert ages == [0.0, *[float(updates)] * (len(ages) - 1)]
    # The ratio is to the policy that answered, which is a rollout older.
    assert whole[0]["policy/ratio"] == pytest.approx(1, abs=1e-6)
    assert whole[updates]["policy/k3"] > 1e-7
    groups = {group["number"]: group for group in rollouts_of(tmp_path / "now")}
    drawn = {group["number"]: group for group in rollouts_of(tmp_path / "whole")}
    assert [drawn[number] for number in range(prompts)] == [groups[number] for number in range(prompts)]


def test_a_replayed_run_takes_the_same_steps(model, rows, tmp_path):
    run(model, rows, tmp_path / "first", "rl")
    replay = f"--rl.replay={tmp_path}/first/rollouts"
    run(model, rows, tmp_path / "again", "rl", replay)
    assert steps(tmp_path / "again") == steps(tmp_path / "first")
    assert rollouts_of(tmp_path / "again") == rollouts_of(tmp_path / "first")[: len(rollouts_of(tmp_path / "again"))]
    assert all(line.get("rollout/generation_seconds", 0) == 0 for line in lines_of(tmp_path / "again"))
    output = run(model, rows, tmp_path / "long", "rl", replay, "--train.steps=60", imported="torch", code=2)
    assert "lacks rollout 3 of 30; take fewer train.steps" in output.splitlines()[-1]
    output = run(model, rows, tmp_path / "other", "rl", replay, "--train.seed=5", code=2)
    assert "answers other prompts than this run's" in output.splitlines()[-1]
    output = run(model, rows, tmp_path / "more", "rl", replay, "--rl.samples=2", "--rl.prompts=8", code=2)
    assert "has not 2 answers to 8 prompts" in output.splitlines()[-1]


@pytest.fixture
def dialogue(tmp_path):
    (tmp_path / "environment.py").write_text(ENVIRONMENT)
    return (f"--environment.name={tmp_path}/environment.py:Counts", "--rl.max_new_tokens=24", "--train.seq_len=64")


def test_dialogues_are_learned_without_their_replies(model, rows, tmp_path, dialogue):
    run(model, rows, tmp_path / "whole", "rl", *dialogue)
    samples = [sample for group in rollouts_of(tmp_path / "whole") for sample in group["samples"]]
    replied = [sample for sample in samples if sample["replies"]]
    assert replied, "a random model ends a turn now and then"
    for sample in samples:
        assert len(sample["tokens"]) == len(sample["log_probs"]) <= 24
        for first, end in sample["replies"]:
            assert set(sample["log_probs"][first:end]) == {0.0}
        assert "environment" in sample["parts"] or not sample["finished"] or sample["error"]
    lines = lines_of(tmp_path / "whole")
    # What the sampler read between the turns, training reads too.
    assert all(line["policy/sampler_k3"] < 1e-5 for line in lines[::2])
    run(model, rows, tmp_path / "cut", "rl", *dialogue, "--train.steps=3")
    run(model, rows, tmp_path / "cut", "rl", *dialogue)
    assert steps(tmp_path / "cut") == steps(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("layout", [(), ("--parallel.tensor=2",)], ids=["data", "tensor"])
def test_dialogues_are_the_same_on_two_ranks(model, rows, tmp_path, dialogue, layout):
    run(model, rows, tmp_path / "one", "rl", *dialogue, "--train.steps=4")
    run(model, rows, tmp_path / "two", "rl", *dialogue, "--train.steps=4", *layout, ranks=2)
    for (_, loss, norm), (_, expected, expected_norm) in zip(
        steps(tmp_path / "two"), steps(tmp_path / "one"), strict=True
    ):
        assert loss == pytest.approx(expected, abs=2e-5) and norm == pytest.approx(expected_norm, rel=1e-3)


def test_environments_that_are_refused(model, rows, tmp_path):
    output = run(model, rows, tmp_path / "a", "rl", "--environment.name=none.py:A", imported="torch", code=2)
    assert "there is no file none.py" in output.splitlines()[-1]
    output = run(model, rows, tmp_path / "b", "sft", "--environment.turns=2", imported="torch", code=2)
    assert "environment is of stage rl" in output.splitlines()[-1]
    output = run(model, rows, tmp_path / "c", "rl", "--rl.ahead=1", "--rl.rounds=2", imported="torch", code=2)
    assert "waits for rewards" in output.splitlines()[-1]
    strict = ("--rl.strict=true", "--train.micro_batch_size=1")
    output = run(model, rows, tmp_path / "d", "rl", *strict, "--rl.ahead=1", imported="torch", code=2)
    assert "use rl.ahead=0" in output.splitlines()[-1]


def test_the_calculator_computes_what_it_is_asked():
    calculator = Calculator()
    said = calculator.step("so <calc>2*(3+4)</calc>")
    assert (said.text, said.done) == ("14", False)
    assert calculator.step("it is 14").done


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("1/4", "0.25"), ("7 // 2", "3"), ("-3 % 5", "2"), ("2**10", "1024"), (" 1.5 + 1 ", "2.5")),
        *(("1/0", "error: division by zero"), ("9**9**9", "error: a number is too large")),
        *(("", "error: no expression"), ("f(1)", "error: only numbers, + - * / // % ** and brackets")),
        *(
            ("__import__('os')", "error: only numbers, + - * / // % ** and brackets"),
            ("(" * 500, "error: no expression"),
        ),
        *(("True", "error: only numbers, + - * / // % ** and brackets"), ("(-8)**0.5", "error: no real number")),
    ],
)
def test_calculations(text, value):
    assert calculate(text) == value
