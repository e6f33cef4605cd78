"""Post-training runs: what they learn, their layouts, and that a resumed run is the uninterrupted one."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from models.config import MoEConfig, RouterLossConfig
from models.decoder import build
from tests.launch.serving import write_model
from tests.trainer.conftest import metrics
from tests.trainer.posttraining.conftest import VALUES, run, steps
from trainer.stored.inference import load_model, open_checkpoint


def drawn_rows(run_dir):
    """Names of the rows of all rollouts."""
    return {
        json.loads(line)["row"]
        for path in (run_dir / "rollouts").glob("*.jsonl")
        for line in path.read_text().splitlines()[1:]
    }


@pytest.mark.parametrize("stage", ["sft", "dpo", "rl"])
def test_a_resumed_run_is_the_uninterrupted_one(model, rows, tmp_path, stage):
    """Also between two updates of a rollout, with an old policy: step 3 is the first of two."""
    run(model, rows, tmp_path / "whole", stage)
    run(model, rows, tmp_path / "cut", stage, "--train.steps=3")
    output = run(model, rows, tmp_path / "cut", stage)
    assert "resumed from" in output and "step_00000003" in output
    assert steps(tmp_path / "cut") == steps(tmp_path / "whole")
    whole = [line for line in metrics(tmp_path / "whole") if "split" in line]
    assert [line["step"] for line in whole] == [0, 4, 6]
    last = [line for line in metrics(tmp_path / "cut") if "split" in line][-1]
    assert last == whole[-1]
    if stage == "sft":
        assert whole[-1]["loss"] < whole[0]["loss"] - 1
    elif stage == "dpo":
        # Before the first step both models are the same.
        assert whole[0]["loss"] == pytest.approx(0.693147, abs=1e-6) and whole[0]["margin"] == pytest.approx(
            0, abs=1e-6
        )
        assert whole[-1]["loss"] < 0.6 and whole[-1]["accuracy"] > 0.9
    else:
        assert 0 <= whole[-1]["pass@1"] <= whole[-1]["pass@4"] <= 1
        assert 0 <= whole[-1]["maj@1"] == pytest.approx(whole[-1]["pass@1"]) and whole[-1]["maj@4"] <= 1
        files = sorted((tmp_path / "whole/samples").iterdir())
        assert [path.name for path in files] == [f"step_0000000{step}.jsonl" for step in (0, 4, 6)]
        shown = [json.loads(line) for line in files[0].read_text().splitlines()]
        assert len(shown) == 8 and shown[3]["prompt"] == "def function_3(" and "length" in shown[3]["parts"]


LAYOUTS = {
    "accumulation": (1, "megatron", ("--train.micro_batch_size=1",)),
    "data": (2, "megatron", ()),
    "tensor": (2, "megatron", ("--parallel.tensor=2",)),
    "tensor, sequence": (2, "megatron", ("--parallel.tensor=2", "--parallel.sequence=true")),
    "context": (2, "megatron", ("--parallel.context=2",)),
    "ZeRO 2": (2, "deepspeed", ("--engine.name=deepspeed", "--engine.zero_stage=2")),
}


@pytest.fixture(scope="module")
def alone(model, rows, tmp_path_factory):
    """One rank's steps of each stage."""
    found = {}
    for stage in ("sft", "dpo", "rl"):
        run_dir = tmp_path_factory.mktemp(f"alone-{stage}")
        run(model, rows, run_dir, stage, "--train.steps=4")
        found[stage] = steps(run_dir)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "dpo", "rl"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_take_the_same_steps(model, rows, tmp_path, alone, layout, stage):
    ranks, engine, options = LAYOUTS[layout]
    run(model, rows, tmp_path, stage, "--train.steps=4", *options, ranks=ranks, imported=engine)
    for (_, loss, norm), (_, expected, expected_norm) in zip(steps(tmp_path), alone[stage], strict=True):
        assert loss == pytest.approx(expected, abs=2e-5)
        assert norm == pytest.approx(expected_norm, rel=1e-3)
    first = next(line for line in metrics(tmp_path) if "grad_norm" in line)
    if stage == "rl":
        # The policy is that of the rollout, and the sampler computes the same.
        assert first["policy/ratio"] == pytest.approx(1, abs=1e-5) and first["policy/sampler_k3"] < 1e-5


@pytest.fixture(scope="module")
def alone_with_kl(model, rows, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("alone-kl")
    run(model, rows, run_dir, "rl", *KL)
    return of_kl(run_dir)


# One update a rollout: the initial model scores answers, and the policy does not.
KL = ("--train.steps=4", "--rl.prompts=2", "--rl.kl=0.05")


def of_kl(run_dir):
    return [[line[name] for name in ("loss", "grad_norm", "policy/kl")] for line in metrics(run_dir) if "loss" in line]


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_divergence_from_the_initial_model_is_the_same_in_every_layout(
    model, rows, tmp_path, alone_with_kl, layout
):
    ranks, engine, options = LAYOUTS[layout]
    run(model, rows, tmp_path, "rl", *KL, *options, ranks=ranks, imported=engine)
    found = of_kl(tmp_path)
    assert found[0][2] == pytest.approx(0, abs=1e-6) and found[-1][2] > 1e-5
    for line, expected in zip(found, alone_with_kl, strict=True):
        assert line == pytest.approx(expected, rel=1e-3, abs=2e-5)


@pytest.mark.slow
def test_ranks_that_share_experts_sample_together(rows, tmp_path):
    """With experts on two ranks, both answer all prompts; the steps are those of one rank, which holds all experts."""
    experts = MoEConfig(num_experts=4, expert_hidden_size=16, losses=RouterLossConfig(balance=0.0))
    model = write_model(tmp_path, rows=448, moe=experts)
    run(model, rows, tmp_path / "one", "rl", "--train.steps=4")
    run(model, rows, tmp_path / "two", "rl", "--train.steps=4", "--parallel.expert=2", ranks=2)
    for (_, loss, norm), (_, expected, expected_norm) in zip(
        steps(tmp_path / "two"), steps(tmp_path / "one"), strict=True
    ):
        assert loss == pytest.approx(expected, abs=2e-5) and norm == pytest.approx(expected_norm, rel=1e-3)


def test_values_are_learned_and_resumed_and_left_out_of_the_model(model, rows, tmp_path):
    run(model, rows, tmp_path / "whole", "rl", *VALUES, "--train.steps=12")
    run(model, rows, tmp_path / "cut", "rl", *VALUES, "--train.steps=3")
    run(model, rows, tmp_path / "cut", "rl", *VALUES, "--train.steps=12")
    assert steps(tmp_path / "cut") == steps(tmp_path / "whole")
    lines = [line for line in metrics(tmp_path / "whole") if "grad_norm" in line]
    # Values begin at 0, and the first loss is that of the rewards, between 0 and 1.
    assert lines[0]["value/explained_variance"] == pytest.approx(0, abs=1e-6)
    assert 0 < lines[0]["value/loss"] < 0.5 and lines[-2]["value/loss"] < lines[0]["value/loss"]
    assert lines[0]["policy/ratio"] == pytest.approx(1, abs=1e-5) and all(line["grad_norm"] > 0 for line in lines)
    stored = open_checkpoint(tmp_path / "whole")
    decoder = build(stored.model, stored.vocab_size, value_head=True)
    stored.fill(decoder)
    assert decoder.value_head.weight.abs().max() > 0.01
    # Whoever reads the checkpoint reads a language model.
    assert load_model(tmp_path / "whole", torch.device("cpu")).model.value_head is None


@pytest.mark.slow
@pytest.mark.parametrize("layout", [*LAYOUTS, "ZeRO 0"])
def test_values_are_the_same_in_every_layout(model, rows, tmp_path, alone_with_values, layout):
    ranks, engine, options = LAYOUTS.get(layout, (2, "deepspeed", ("--engine.name=deepspeed", "--engine.zero_stage=0")))
    run(model, rows, tmp_path, "rl", *VALUES, "--train.steps=4", *options, ranks=ranks, imported=engine)
    for line, expected in zip(of_values(tmp_path), alone_with_values, strict=True):
        assert line == pytest.approx(expected, rel=1e-3, abs=2e-5)


@pytest.fixture(scope="module")
def alone_with_values(model, rows, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("alone-values")
    run(model, rows, run_dir, "rl", *VALUES, "--train.steps=4")
    return of_values(run_dir)


def of_values(run_dir):
    names = ("loss", "grad_norm", "value/loss", "value/clipped", "policy/entropy")
    return [[line[name] for name in names] for line in metrics(run_dir) if "grad_norm" in line]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    """Another model over the same tokens, far from even."""
    return write_model(tmp_path_factory.mktemp("teacher"), rows=448, init_std=0.3, hidden_size=48)


def distilling(teacher):
    return ("--rl.objective=distill", f"--rl.distillation.teacher={teacher}", "--rewards=[]", "--rows.validation=[]")


def test_distillation_on_own_answers_needs_no_rewards_and_resumes(model, rows, teacher, tmp_path):
    options = distilling(teacher)
    run(model, rows, tmp_path / "whole", "rl", *options, "--train.steps=8")
    run(model, rows, tmp_path / "cut", "rl", *options, "--train.steps=3")
    run(model, rows, tmp_path / "cut", "rl", *options, "--train.steps=8")
    assert steps(tmp_path / "cut") == steps(tmp_path / "whole")
    lines = [line for line in metrics(tmp_path / "whole") if "grad_norm" in line]
    # The loss is the divergence, a mean over tokens.
    assert all(line["distillation/kl"] == pytest.approx(line["loss"], rel=1e-6) for line in lines)
    assert 0.05 < lines[-1]["loss"] < lines[0]["loss"] and lines[0]["policy/sampler_k3"] < 1e-5
    output = run(model, rows, tmp_path / "self", "rl", *distilling(model), "--train.steps=1")
    (line,) = (line for line in metrics(tmp_path / "self") if "grad_norm" in line)
    assert abs(line["loss"]) < 1e-6 and line["grad_norm"] < 1e-5 and "does not have the tokenizer" not in output


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_distillation_is_the_same_in_every_layout(model, rows, teacher, tmp_path, alone_with_a_teacher, layout):
    ranks, engine, options = LAYOUTS[layout]
    options = (*distilling(teacher), "--train.steps=4", *options)
    run(model, rows, tmp_path, "rl", *options, ranks=ranks, imported=engine)
    for (_, loss, norm), (_, expected, expected_norm) in zip(steps(tmp_path), alone_with_a_teacher, strict=True):
        assert loss == pytest.approx(expected, rel=1e-4) and norm == pytest.approx(expected_norm, rel=1e-3)


@pytest.fixture(scope="module")
def alone_with_a_teacher(model, rows, teacher, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("alone-teacher")
    run(model, rows, run_dir, "rl", *distilling(teacher), "--train.steps=4")
    return steps(run_dir)


REHEARSED = ("--rl.prompts=2", "--rehearsal.samples=2", "--rehearsal.threshold=1", "--rehearsal.per_step=2")


def test_rehearsal_begins_at_the_initial_policy_and_resumes(model, rows, tmp_path):
    options = (*REHEARSED, "--rehearsal.divergence=forward", "--rehearsal.eta=0.5")
    output = run(model, rows, tmp_path / "whole", "rl", *options)
    known = json.loads((tmp_path / "whole/rehearsal/mastered.json").read_text())
    assert f"rehearsal: {len(known['mastered'])} of 12 prompts mastered, {len(known['answered'])} stored" in output
    assert 0 < len(known["answered"]) <= len(known["mastered"]) < 12
    run(model, rows, tmp_path / "cut", "rl", *options, "--train.steps=3")
    run(model, rows, tmp_path / "cut", "rl", *options)
    assert steps(tmp_path / "cut") == steps(tmp_path / "whole")
    lines = [line for line in metrics(tmp_path / "whole") if "grad_norm" in line]
    # The stored answers are the initial policy's, by the same kernels.
    assert lines[0]["rehearsal/u"] == pytest.approx(1, abs=1e-5) and abs(lines[0]["rehearsal/f"]) < 1e-6
    assert lines[-1]["rehearsal/f"] > 1e-6
    kept = [line["keep_rate"] for line in metrics(tmp_path / "whole") if line.get("split") == "mastered"]
    assert kept and all(0 <= rate <= 1 for rate in kept)
    # Mastered prompts are not sampled any more.
    assert not drawn_rows(tmp_path / "whole") & {f"rl.jsonl:{number}" for number in known["mastered"]}
    (tmp_path / "cut/rehearsal/mastered.json").unlink()
    output = run(model, rows, tmp_path / "cut", "rl", *options, "--train.steps=8", code=2)
    assert "without which the run cannot go on" in output.splitlines()[-1]


def test_training_on_prompts_that_the_initial_model_fails(model, rows, tmp_path):
    """The others are drawn no more, also after resuming, and without any that is failed there is nothing to do."""
    options = ("--prompt_filter.keep=failed", "--prompt_filter.samples=2")
    output = run(model, rows, tmp_path / "whole", "rl", *options)
    counts = json.loads((tmp_path / "whole/prompt_filter.json").read_text())["right_answers"]
    failed = {f"rl.jsonl:{number}" for number, count in enumerate(counts) if count == 0}
    assert 0 < len(failed) < len(counts) == 12 and set(counts) <= {0, 1, 2}
    assert f"the initial model fails {len(failed)} of 12 prompts" in output
    assert drawn_rows(tmp_path / "whole") == failed
    run(model, rows, tmp_path / "cut", "rl", *options, "--train.steps=3")
    run(model, rows, tmp_path / "cut", "rl", *options)
    assert steps(tmp_path / "cut") == steps(tmp_path / "whole")
    (tmp_path / "cut/prompt_filter.json").unlink()
    output = run(model, rows, tmp_path / "cut", "rl", *options, "--train.steps=8", code=2)
    assert "without which the run cannot go on" in output.splitlines()[-1]
    output = run(model, rows, tmp_path / "none", "rl", *options, "--pass_at_k.right=-1", code=2)
    message = "solved all 12 prompts in 2 answers each (24 of 24 answers are right)"
    assert message in output.splitlines()[-1]


def test_demonstrations_where_the_model_fails(model, rows, tmp_path):
    """With a reward that no answer gets, every question with a demonstration is fine-tuned on it."""
    (tmp_path / "never.py").write_text("def never(answer):\n    return 0.0\n")
    options = (
        *("--rl.prompts=2", "--gate.kind=switch", f"--rows.train=[{rows}/shown.jsonl]", "--train.seq_len=96"),
        f'--rewards=[{{"name": "{tmp_path}/never.py:never"}}]',
    )
    run(model, rows, tmp_path / "run", "rl", *options)
    lines = [line for line in metrics(tmp_path / "run") if "grad_norm" in line]
    shares = [line["gate/demonstrations"] for line in lines]
    assert set(shares) <= {0.0, 0.5, 1.0} and sum(shares) == pytest.approx(len(shares) / 2, abs=0.5)
    taken = [line for line in lines if line["gate/demonstrations"]]
    # Nothing is learned from answers that are all alike.
    assert taken and all(line["demonstrations/loss"] == pytest.approx(line["loss"], rel=1e-4) for line in taken)
    assert all(line["grad_norm"] == 0 for line in lines if not line["gate/demonstrations"])


def test_demonstrations_among_the_answers(model, rows, tmp_path):
    """LUFFY: where all answers are wrong, the demonstration is better than the group's mean, and they are worse."""
    (tmp_path / "never.py").write_text("def never(answer):\n    return 0.0\n")
    options = (
        *("--rl.prompts=2", "--gate.kind=mixed", f"--rows.train=[{rows}/shown.jsonl]", "--train.seq_len=96"),
        f'--rewards=[{{"name": "{tmp_path}/never.py:never"}}]',
    )
    run(model, rows, tmp_path / "run", "rl", *options)
    lines = [line for line in metrics(tmp_path / "run") if "grad_norm" in line]
    assert sum(line["gate/off_policy"] for line in lines) == pytest.approx(len(lines) / 2, abs=0.5)
    # Four zeros and a one: the answers' advantage is -0.2 over the deviation. Each counts an eighth, at a ratio of 1.
    wrong = 0.2 / float(np.std([0, 0, 0, 0, 1], ddof=1))
    for line in lines:
        own = line["loss"] - line["demonstrations/off_policy_loss"]
        assert own == pytest.approx(line["gate/off_policy"] * wrong, rel=1e-3, abs=1e-6)
        assert (line["grad_norm"] > 0) == (line["gate/off_policy"] > 0)


DISTILL = ("--rl.objective=distill", "--rl.distillation.teacher=nowhere")


@pytest.mark.parametrize(
    ("stage", "options", "message"),
    [
        ("rl", ("--rewards=[]",), "rewards: there is none"),
        ("rl", ("--rl.max_new_tokens=48",), "train.seq_len=48 leaves no room for a prompt"),
        ("rl", ("--train.global_batch_size=6",), "does not divide the 16 answers of a rollout"),
        ("rl", ("--gate.kind=switch", "--rl.prompts=2"), "no row of"),
        ("rl", ("--prompt_filter.samples=0",), "prompt_filter.samples is 0"),
        ("rl", ("--gate.kind=switch",), "let a rollout be one update"),
        ("rl", ("--engine.name=deepspeed", "--engine.zero_stage=3"), "leaves no rank a model to sample from"),
        ("rl", ("--rl.value.lr=0.1",), "rl.value is of rl.objective=ppo, not grpo"),
        ("rl", ("--rl.objective=distill",), "rl.distillation.teacher names no teacher"),
        ("rl", ("--rl.distillation.teacher=x",), "rl.distillation is of rl.objective=distill, not grpo"),
        ("rl", (*DISTILL, "--rl.kl=0.1"), "rl.kl=0.1 has no effect with rl.objective=distill"),
        ("rl", (*DISTILL, "--gate.kind=switch", "--rl.prompts=2"), "which rl.objective=distill has not"),
        ("rl", (*DISTILL, "--rewards=[]"), "rows.validation: answers are validated by rewards"),
        ("rl", DISTILL, "rl.distillation.teacher: nowhere is not a directory; name one"),
        ("rl", ("--rl.objective=ppo", "--rl.value.lam=2"), "rl.value.lam is 2.0"),
        ("sft", ("--rows.train=[]",), "rows.train names no file"),
        ("sft", ("--rows.train=[none.jsonl]",), "none.jsonl does not exist"),
        ("sft", ("--parallel.pipeline=2",), "post-training has no pipeline stages"),
        ("sft", ("--gate.kind=switch",), "gate is of stage rl"),
        ("sft", ("--prompt_filter.keep=failed",), "prompt_filter is of stage rl"),
        ("dpo", ("--rows.train=[{rows}/sft.jsonl]",), "has no chosen and rejected answer"),
    ],
)
def test_what_is_refused(model, rows, tmp_path, stage, options, message):
    """In one line, and before anything is written."""
    options = tuple(option.replace("{rows}", str(rows)) for option in options)
    output = run(model, rows, tmp_path / "run", stage, *options, imported="torch", code=2)
    assert message in output.splitlines()[-1] and not (tmp_path / "run/checkpoints").exists()


def test_a_reward_that_hangs_scores_nothing_and_is_counted(model, rows, tmp_path):
    options = (
        *(
            "--rl.prompts=2",
            "--rl.samples=2",
            "--train.global_batch_size=4",
            "--train.steps=2",
            "--pass_at_k.prompts=1",
        ),
        f'--rewards=[{{"name": "{rows}/reward.py:hangs", "seconds": 0.5}}]',
    )
    run(model, rows, tmp_path, "rl", *options)
    lines = [line for line in metrics(tmp_path) if "grad_norm" in line]
    assert len(lines) == 2 and sum(line.get("reward/errors/timeout", 0) for line in lines) > 0
    for path in (tmp_path / "rollouts").glob("*.jsonl"):
        samples = [sample for line in path.read_text().splitlines()[1:] for sample in json.loads(line)["samples"]]
        assert all((sample["reward"] == 0) == (sample["error"] == "timeout") for sample in samples)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        *((f"--rl.objective={name}",) for name in ("reinforce", "rloo", "reinforce++", "dr_grpo", "gspo", "cispo")),
        ("--rl.objective=dapo", "--rl.rounds=2", "--rl.dual_clip=3"),
        ("--rl.kl=0.1", "--rl.entropy=0.01", "--rl.temperature=0.8"),
        ("--rl.kl=0.1", "--rl.kl_in=reward", "--rl.kl_estimator=k1", "--rl.epochs=2"),
        ("--rl.correction=sequence", "--rl.correction_how=mask"),
    ],
    ids=" ".join,
)
def test_every_objective_takes_steps(model, rows, tmp_path, options):
    """And begins at the policy that sampled: the ratio is 1, and the divergence from the initial policy 0."""
    run(model, rows, tmp_path, "rl", *options, "--train.steps=4")
    lines = [line for line in metrics(tmp_path) if "grad_norm" in line]
    assert len(lines) == 4 and all(line["loss"] is not None and line["grad_norm"] > 0 for line in lines)
    assert lines[0]["policy/ratio"] == pytest.approx(1, abs=1e-5)
    assert lines[1]["policy/k3"] > 0, "after the first update of a rollout the policy has moved"
    if "--rl.kl=0.1" in options and "--rl.kl_in=reward" not in options:
        assert lines[0]["policy/kl"] == pytest.approx(0, abs=1e-5) and lines[-1]["policy/kl"] > 0


def test_nothing_is_learned_from_answers_that_are_cut(model, rows, tmp_path):
    run(model, rows, tmp_path, "rl", "--rl.mask_overlong=true", "--train.steps=2")
    lines = [line for line in metrics(tmp_path) if "grad_norm" in line]
    # An untrained model does not end an answer within eight tokens.
    assert lines[0]["answers/finished"] == 0 and all(line["grad_norm"] == line["loss"] == 0 for line in lines)
