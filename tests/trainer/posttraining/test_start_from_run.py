"""Post-training that starts from another run, which goes on saving: the steps are those of a start from its export."""

import shutil

import pytest
import yaml

from tests.trainer.posttraining.conftest import VALUES, run, steps
from tests.trainer.posttraining.test_lora_run import LORA
from trainer.stored.export import export


def exported(run_dir, output):
    export(run_dir, output, None, 1e9, lambda line: None)
    return output


@pytest.mark.slow
def test_stages_start_from_runs_as_from_exports(model, rows, tmp_path):
    """From one with adapters, whose reference is read again, and from one with a head for values."""
    tuned = tmp_path / "tuned"
    run(model, rows, tuned, "sft", *LORA, "--train.steps=3")
    weights = exported(tuned, tmp_path / "tuned-weights")
    run(weights, rows, tmp_path / "whole", "rl", *VALUES)
    run(tuned, rows, tmp_path / "cut", "rl", *VALUES, "--train.steps=3")
    newest = tuned / "checkpoints/step_00000003"
    # What another model has saved meanwhile.
    shutil.copytree(tmp_path / "cut/checkpoints/step_00000003", tuned / "checkpoints/step_00000004")
    run(tuned, rows, tmp_path / "cut", "rl", *VALUES)
    assert steps(tmp_path / "cut") == steps(tmp_path / "whole")
    recorded = yaml.safe_load((tmp_path / "cut/config.yaml").read_text())
    assert recorded["checkpoint"]["init"] == str(newest) and recorded["model"]["lora"]["rank"] == 0
    run(tmp_path / "cut", rows, tmp_path / "again", "sft", "--train.steps=3")
    run(exported(tmp_path / "cut", tmp_path / "cut-weights"), rows, tmp_path / "expected", "sft", "--train.steps=3")
    assert steps(tmp_path / "again") == steps(tmp_path / "expected")
    shutil.rmtree(newest)
    output = run(tuned, rows, tmp_path / "cut", "rl", *VALUES, "--train.steps=9", code=2)
    assert f"--init: {newest} does not exist; restore it, or start another run" in output


@pytest.mark.slow
def test_a_teacher_is_read_from_a_run_as_from_its_export(model, rows, tmp_path):
    run(model, rows, tmp_path / "tuned", "sft", *LORA, "--train.steps=3")
    exported(tmp_path / "tuned", tmp_path / "weights")
    for name in ("tuned", "weights"):
        teacher = ("--rl.objective=distill", f"--rl.distillation.teacher={tmp_path / name}", "--train.steps=2")
        run(model, rows, tmp_path / f"by-{name}", "rl", *teacher)
    assert steps(tmp_path / "by-tuned") == steps(tmp_path / "by-weights")
    recorded = yaml.safe_load((tmp_path / "by-tuned/config.yaml").read_text())
    assert recorded["rl"]["distillation"]["teacher"] == str(tmp_path / "tuned/checkpoints/step_00000003")
