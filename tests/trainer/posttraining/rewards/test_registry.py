"""Rewards by name and path, and functions of other libraries."""

import textwrap

import pytest
import torch

from trainer.errors import ConfigError
from trainer.posttraining.rewards.adapters import adapt, choose_signature
from trainer.posttraining.rewards.base import Answer, Score, as_score
from trainer.posttraining.rewards.registry import BUILT_IN, RewardConfig, build, check

ANSWER = Answer("2 + 2 = ", "4", "sums", "4", {"level": 3}, True)


def verl(data_source, solution_str, ground_truth, extra_info=None, bonus=0.0):
    assert data_source == "sums" and extra_info == {"level": 3}
    return {"score": float(solution_str == ground_truth) + bonus, "acc": True}


def trl(prompts, completions, ground_truth, level, **others):
    assert prompts == ["2 + 2 = "] and others == {"data_source": ["sums"]}
    return [level[0] * (completion == truth) for completion, truth in zip(completions, ground_truth)]


def trl_narrow(completions, level):
    return [len(completion) + level[0] for completion in completions]


def trl_chat(prompts, completions, **_):
    assert prompts == [[{"role": "user", "content": "2 + 2 = "}]]
    return [float(completion[0]["content"]) for completion in completions]


def openrlhf(queries, prompts, labels):
    rewards = torch.tensor([float(query == prompt + label) for query, prompt, label in zip(queries, prompts, labels)])
    return {"rewards": rewards, "scores": rewards / 2, "extra_logs": {"length": torch.tensor([1.0])}}


def own(answer, factor=1):
    return factor * len(answer.completion)


def _unclear(a, b):
    return 0


@pytest.mark.parametrize(
    ("function", "signature", "options", "expected"),
    [
        (verl, "auto", {}, Score(1.0, {"acc": 1.0})),
        (verl, "verl", {"bonus": 1.0}, Score(2.0, {"acc": 1.0})),
        (trl, "auto", {}, Score(3.0)),
        (trl_narrow, "auto", {}, Score(4.0)),
        (trl_chat, "trl_chat", {}, Score(4.0)),
        (lambda completions, **_: [None], "auto", {}, Score(error="value")),
        (lambda completions, **_: [1.0, 2.0], "auto", {}, Score(error="value")),
        (openrlhf, "auto", {}, Score(1.0, {"length": 1.0, "scores": 0.5})),
        (lambda queries, prompts, labels: torch.ones(1), "auto", {}, Score(1.0)),
        (own, "auto", {"factor": 5}, Score(5.0)),
        (lambda solution, *, ground_truth=None: 2, "auto", {}, Score(2.0)),
    ],
)
def test_signatures(function, signature, options, expected):
    assert as_score(adapt(function, signature, options)(ANSWER)) == expected


def test_what_is_no_known_signature_is_refused():
    with pytest.raises(ConfigError, match=r"\(a, b\)"):
        choose_signature(_unclear)
    with pytest.raises(ConfigError, match="no signature"):
        adapt(own, "other")


@pytest.fixture
def package(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "__init__.py").write_text("raise RuntimeError('imported')\n")
    source = """
        from os.path import join as imported
        LIMIT: int = 3
        def score(answer): return 1.0
        if True:
            def late(answer): return 2.0
        def outer():
            inner = 1
    """
    for name in ("mine/rewards.py", "alone.py"):
        (tmp_path / name).write_text(textwrap.dedent(source))
    (tmp_path / "broken.py").write_text("def (")
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("name", ["mine.rewards:score", "mine.rewards:late", "mine.rewards:imported", "FILE:score"])
def test_functions_are_found_without_running_their_modules(package, name):
    check([RewardConfig(name.replace("FILE", str(package / "alone.py")))])


def test_functions_of_files_are_built(package):
    assert build(RewardConfig(f"{package}/alone.py:late"))(ANSWER) == 2.0
    with pytest.raises(ConfigError, match="no function"):
        build(RewardConfig(f"{package}/alone.py:LIMIT"))
    with pytest.raises(ConfigError, match="RuntimeError: imported"):
        build(RewardConfig("mine.rewards:score"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "exakt"}, "did you mean 'exact'"),
        ({"name": "zzzz"}, "choose from exact"),
        ({"name": "exact", "options": {"ignore_cases": True}}, "did you mean 'ignore_case'"),
        ({"name": "exact", "options": {"extract": "box"}}, "choose from boxed"),
        ({"name": "numeric", "options": {"tolerance": "x"}}, "wrong type"),
        ({"name": "mine.missing:score"}, "no module 'mine.missing'"),
        ({"name": "missing.module:score"}, "no module"),
        ({"name": "mine.rewards:scores"}, "did you mean 'score'"),
        ({"name": "mine.rewards:inner"}, "has no 'inner'"),
        ({"name": "mine.rewards:"}, "is no package.module:function"),
        ({"name": "none.py:score"}, "no file none.py"),
        ({"name": "BROKEN:score"}, "not valid Python"),
    ],
)
def test_wrong_rewards_are_refused_in_one_line(package, config, message):
    config["name"] = config["name"].replace("BROKEN", str(package / "broken.py"))
    with pytest.raises(ConfigError, match=message) as caught:
        check([RewardConfig(**config)])
    assert "\n" not in str(caught.value)


def test_wrong_settings_are_refused():
    for settings in ({"seconds": 0}, {"memory_bytes": 1}, {"weight": float("nan")}, {"signature": "x"}):
        with pytest.raises(ConfigError):
            RewardConfig(**settings)
    with pytest.raises(ConfigError, match="there is none"):
        check([])
    with pytest.raises(ConfigError, match="two are called exact"):
        check([RewardConfig(), RewardConfig()])
    check([RewardConfig(), RewardConfig(label="again")])


def test_every_built_in_reward_has_a_page():
    from tests.documented import ROOT

    page = (ROOT / "docs" / "rewards.md").read_text()
    assert [name for name in BUILT_IN if f"`{name}`" not in page] == []
