"""launch/slurm/posttrain.sbatch on two nodes: a job that is stopped queues again, and goes on as if it had not been."""

import json

from tests.launch.serving import write_model
from tests.trainer.conftest import metrics, status

SCRIPT = "launch/slurm/posttrain.sbatch"
STEPS = 16


def write(folder):
    """A model, its prompts and a run of reinforcement learning; returns the job's arguments."""
    model = write_model(folder, rows=448)
    prompts = [{"prompt": f"def function_{number}(", "answer": "1"} for number in range(8)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    (folder / "reward.py").write_text("def even(answer):\n    return float(len(answer.completion) % 2 == 0)\n")
    config = {
        "stage": "rl",
        "rows": {"train": [f"{folder}/rows.jsonl"]},
        "rewards": [{"name": f"{folder}/reward.py:even"}],
        "rl": {"samples": 4, "prompts": 2, "max_new_tokens": 8},
        "train": {"steps": STEPS, "seq_len": 48, "micro_batch_size": 2, "global_batch_size": 8},
        "optim": {"lr": 0.002},
        "checkpoint": {"every": 2},
        "run": {"threads": 1},
    }
    (folder / "config.yaml").write_text(json.dumps(config))
    return [folder / "config.yaml", "--init", model]


def steps(run_dir):
    return [(line["step"], line["loss"], line["reward/mean"]) for line in metrics(run_dir)]


def test_a_stopped_job_queues_again_and_is_the_same(cluster, submit, tmp_path):
    arguments = write(tmp_path)
    whole, cut = (tmp_path / name for name in ("whole", "cut"))
    job = submit(["--nodes=2"], [*arguments, "--run.dir", whole], script=SCRIPT)
    assert job.wait() == "COMPLETED", job.output()
    assert "2 data-parallel" in job.output() and status(whole)["state"] == "done"
    job = submit(["--nodes=2"], [*arguments, "--run.dir", cut], script=SCRIPT)
    job.wait_until(lambda: len(list((cut / "checkpoints").glob("step_*"))) > 0, "at its first checkpoint")
    cluster.run("scancel", "--batch", "--signal=USR1", str(job.number))
    assert job.wait() == "COMPLETED", job.output()
    assert job.field("Restarts") == "1" and "resumed from" in job.output(), job.output()
    assert len(steps(cut)) == STEPS and steps(cut) == steps(whole)
