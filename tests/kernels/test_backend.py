"""The choice of an implementation: argument, environment, first available."""

import logging

import pytest

from kernels import backend
from kernels.backend import resolve

AVAILABLE = ("triton", "torch", "reference")


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPIKETRAIN_BACKEND", raising=False)
    monkeypatch.setattr(backend, "_logged", set())


@pytest.mark.parametrize(
    ("argument", "environment", "expected"),
    [
        ("auto", "", "triton"),
        ("auto", "auto", "triton"),
        ("auto", "reference", "reference"),
        ("torch", "reference", "torch"),
        ("auto", "gla=reference,attention=sdpa", "reference"),
        ("auto", "attention=sdpa", "triton"),
        ("auto", "torch, gla = reference", "reference"),
        ("auto", "gla=torch,reference", "torch"),
        ("auto", "gla=auto,reference", "triton"),
    ],
)
def test_argument_then_environment_then_first(
    monkeypatch: pytest.MonkeyPatch, argument: str, environment: str, expected: str
) -> None:
    monkeypatch.setenv("SPIKETRAIN_BACKEND", environment)
    assert resolve("gla", argument, AVAILABLE) == expected


@pytest.mark.parametrize(("argument", "environment"), [("trition", ""), ("auto", "gla=trition"), ("auto", "trition")])
def test_unknown_name_lists_what_exists(monkeypatch: pytest.MonkeyPatch, argument: str, environment: str) -> None:
    monkeypatch.setenv("SPIKETRAIN_BACKEND", environment)
    with pytest.raises(ValueError, match=r"gla.*'trition'.*triton, torch, reference"):
        resolve("gla", argument, AVAILABLE)


def test_each_choice_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="spiketrain"):
        for choice in ("torch", "torch", "reference", "torch"):
            resolve("gla", choice, AVAILABLE)
        resolve("hgrn", "torch", AVAILABLE)
    assert [record.getMessage() for record in caplog.records] == [
        "gla: backend torch",
        "gla: backend reference",
        "hgrn: backend torch",
    ]
