"""A tiny model, rows for every stage, and runs of `spiketrain posttrain` on them."""

import json
from pathlib import Path

import pytest

from tests.launch.serving import write_model
from tests.processes import ROOT, finish, start
from tests.trainer.conftest import metrics

# A value head beside the policy.
VALUES = ("--rl.objective=ppo", "--rl.value.lr=0.02", "--rl.value.coefficient=0.5", "--rl.kl=0.05", "--rl.kl_in=reward")
REWARD = '''
import time

def vowels(answer):
    """1 for an even number of vowels, 0 for an odd one: both occur whatever the model writes."""
    count = sum(letter in "aeiou" for letter in answer.completion)
    return {"score": float(count % 2 == 0), "length": len(answer.completion)}

def hangs(answer):
    if len(answer.completion) % 2:
        time.sleep(60)
    return 1.0
'''


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    # Rows as training pads them.
    return write_model(tmp_path_factory.mktemp("model"), rows=448)


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    prompts = [f"def function_{number}(" for number in range(12)]
    answers = [{"prompt": prompt, "completion": f"x): return {number}"} for number, prompt in enumerate(prompts)]
    questions = [{"prompt": prompt, "answer": str(number)} for number, prompt in enumerate(prompts)]
    pairs = [answer | {"chosen": answer["completion"], "rejected": "): pass"} for answer in answers]
    pairs = [{name: pair[name] for name in ("prompt", "chosen", "rejected")} for pair in pairs]
    # Every second question has a demonstration.
    shown = [
        {
            "prompt": [{"role": "user", "content": answer["prompt"]}],
            "data_source": "test",
            "reward_model": {"style": "rule", "ground_truth": "1"},
            "target": [{"role": "assistant", "content": answer["completion"]}] if number % 2 else None,
        }
        for number, answer in enumerate(answers)
    ]
    for name, lines in {"sft": answers, "rl": questions, "dpo": pairs, "shown": shown}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "reward.py").write_text(REWARD)
    return folder


def run(model, rows, run_dir, stage, *options, ranks=1, imported="megatron", code=0, wrapper=None):
    """Run `spiketrain posttrain`, by a script `wrapper` if there is one, and return its output."""
    sizes = {
        "sft": ("--train.seq_len=48", "--train.micro_batch_size=2", "--train.global_batch_size=4"),
        "dpo": ("--train.seq_len=48", "--train.micro_batch_size=2", "--train.global_batch_size=4"),
        "rl": (
            *("--train.seq_len=48", "--train.micro_batch_size=2", "--train.global_batch_size=8"),
            *("--rl.samples=4", "--rl.prompts=4", "--rl.max_new_tokens=8", "--pass_at_k.samples=4"),
            *(f'--rewards=[{{"name": "{rows}/reward.py:vowels", "label": "vowels"}}]', "--pass_at_k.every=4"),
        ),
    }[stage]
    command = (
        *(ROOT / "launch/posttrain.py", "--init", model, f"--run.dir={run_dir}", "--run.threads=1", f"--stage={stage}"),
        *(f"--rows.train=[{rows}/{stage}.jsonl]", f"--rows.validation=[{rows}/{stage}.jsonl]", *sizes),
        *("--train.steps=6", "--optim.lr=0.002", "--checkpoint.every=3", "--evaluation.every=4", *options),
    )
    command = command if wrapper is None else (wrapper, *command)
    process = start(*command, ranks=ranks if ranks > 1 else None, imported=imported)
    _, output = finish(process)
    assert process.returncode == code, output
    return output


def steps(run_dir):
    """(step, loss, gradient norm) of every step."""
    return [(line["step"], line["loss"], line["grad_norm"]) for line in metrics(run_dir) if "grad_norm" in line]
