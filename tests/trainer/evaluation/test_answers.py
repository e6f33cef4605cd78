"""Evaluation by answers to prompts: figures, several files, going on after an interruption, refusals."""

import json
from pathlib import Path

import pytest

from launch.evaluate import main
from tests.launch.serving import write_model
from trainer.errors import ConfigError
from trainer.evaluation.config import AnswersConfig, EvaluateConfig
from trainer.posttraining.config import RowsConfig
from trainer.posttraining.rewards.registry import RewardConfig

REWARD = """
def even(answer):
    return {"score": float(len(answer.completion) % 2 == 0), "length": len(answer.completion)}
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("rows")
    (folder / "reward.py").write_text(REWARD)
    for name, count in {"one": 5, "two": 3}.items():
        lines = [json.dumps({"prompt": f"def {name}_{number}(", "answer": "1"}) + "\n" for number in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return [str(folder / "one.jsonl"), str(folder / "two.jsonl")]


def settings(model: Path, files: list[str], **answers: object) -> EvaluateConfig:
    options = {"samples": 4, "max_new_tokens": 6, "slots": 8} | answers
    return EvaluateConfig(
        checkpoint=str(model),
        rows=RowsConfig(validation=files),
        rewards=[RewardConfig(f"{Path(files[0]).parent}/reward.py:even", label="even")],
        pass_at_k=AnswersConfig(**options),
        device="cpu",
        json=str(Path(model).parent / "figures.json"),
    )


def evaluate(config: EvaluateConfig) -> dict:
    main(config)
    return json.loads(Path(config.json).read_text())["answers"]


def texts(line: str) -> list[str]:
    return [sample["text"] for sample in json.loads(line)["samples"]]


def test_figures_of_files_and_going_on(model, files, tmp_path, capsys):
    output = tmp_path / "answers.jsonl"
    found = evaluate(settings(model, files, output=str(output)))
    assert "pass@k" in capsys.readouterr().out
    assert list(found) == ["all", *files] and [found[name]["prompts"] for name in found] == [8, 5, 3]
    about, *groups = map(json.loads, output.read_text().splitlines())
    assert about["samples"] == 4 and [group["number"] for group in groups] == list(range(8))
    right = [sum(sample["reward"] == 1 for sample in group["samples"]) for group in groups]
    every = found["all"]
    assert 0 < sum(right) < 32 and every["reward"]["mean"] == every["pass_at_k"]["1"]["mean"] == sum(right) / 32
    assert every["pass_at_k"]["4"]["mean"] == sum(count > 0 for count in right) / 8
    lengths = [sample["parts"]["length"] for group in groups[5:] for sample in group["samples"]]
    assert found[files[1]]["parts"]["length"] == pytest.approx(sum(lengths) / 12)
    assert every["tokens"]["most"] == 6 and set(every["majority_at_k"]) == {"1", "2", "4"}
    # Interrupted within the fourth line of answers; what is there is not computed again.
    whole = output.read_text().splitlines(keepends=True)
    marked = whole[1].replace('"reward": 0.0', '"reward": 1.0')
    output.write_text("".join([whole[0], marked, *whole[2:4], whole[4][:30]]))
    again = evaluate(settings(model, files, output=str(output)))
    mended = output.read_text().splitlines(keepends=True)
    assert mended[:4] == [whole[0], marked, *whole[2:4]] and len(mended) == 9
    # The draws do not depend on what is answered at once.
    assert [texts(line) for line in mended[4:]] == [texts(line) for line in whole[4:]]
    assert again[files[1]] == found[files[1]] and again[files[0]]["reward"]["mean"] > found[files[0]]["reward"]["mean"]
    with pytest.raises(ConfigError, match="of another evaluation"):
        evaluate(settings(model, files, output=str(output), temperature=0.5))
    output.write_text(whole[0] + "{}\n")
    with pytest.raises(ConfigError, match="is damaged"):
        evaluate(settings(model, files, output=str(output)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rewards": []}, "rewards: there is none"),
        ({"rows": RowsConfig()}, "rewards needs prompts to answer"),
        ({"recall": ["needle"]}, "recall and rows are two evaluations"),
        ({"by_position": True}, "by_position is of an evaluation of data, and this is one of rows"),
    ],
)
def test_what_is_refused(model, files, changes, message):
    known = vars(settings(model, files[:1])) | changes
    with pytest.raises(ConfigError, match=message):
        EvaluateConfig(**known)


def test_refused_settings(files):
    with pytest.raises(ValueError, match="samples is 0"):
        AnswersConfig(samples=0)
    with pytest.raises(ConfigError, match="does not exist"):
        AnswersConfig(output="nowhere/answers.jsonl")
