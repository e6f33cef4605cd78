"""Python programs, judged by running them: assert statements, or what they write to stdout for what they read.

Programs run confined by the kernel (confined.py says how); a machine that cannot confine them is refused, unless
`sandbox: false` says to run them with the rights of the user. What a script prints is compared outside of its process.
Assertions run inside, as HumanEval's and MBPP's must, so a program that sets out to can make them pass: prefer cases of
stdin and stdout where a data set has both.
"""

import json
from typing import Any

from trainer.errors import ConfigError
from trainer.posttraining.rewards.base import ERRORS, Answer, Reward, ScoringError
from trainer.posttraining.rewards.extraction import after_thoughts, code_block, tagged
from trainer.posttraining.rewards.sandbox import Limits, Outcome, require_sandbox, run

_NAMES = ("tests", "test_list", "cases", "inputs", "outputs", "setup", "entry_point", "test")


def python_tests(
    partial: bool = False, sandbox: bool = True, packages: bool = False, most_tests: int = 100, **limits: Any
) -> Reward:
    """1 if all tests pass.

    The ground truth is Python source of tests, a list of them, or an object, which may be JSON in a text:

        {"tests": ["assert f(1) == 2", ...], "setup": "import math"}
        {"test": "def check(candidate): ...", "entry_point": "f"}        as in HumanEval
        {"cases": [{"input": "1 2", "output": "3"}, ...]}
        {"inputs": ["1 2", ...], "outputs": ["3", ...]}                  as in APPS

    The program is the last block of code of the completion, else its <answer>, else all of it after </think>. Outputs
    are compared line by line without spaces at the ends.

    Args:
        partial: The share of tests that pass instead; a timeout is then 0 for the tests of assertions all together.
        sandbox: Whether the program is confined.
        packages: Whether it may import installed packages beside the standard library.
        most_tests: Further tests are left out.
        limits: Fields of sandbox.Limits. `seconds` is for each case of stdin, and for all assertions together.

    Raises:
        ConfigError: an option is not valid, or the machine has no sandbox.
    """
    unknown = limits.keys() - Limits.__dataclass_fields__.keys()
    if unknown:
        raise ConfigError(f"there is no limit {min(unknown)!r}; choose from {', '.join(Limits.__dataclass_fields__)}")
    if most_tests < 1:
        raise ConfigError(f"most_tests is {most_tests}: it must be at least 1")
    if sandbox:
        require_sandbox()
    bounds = Limits(**limits)

    def score(answer: Answer) -> dict[str, Any]:
        program, truth = _program(answer.completion), _ground_truth(answer.ground_truth)
        cases = _cases(truth)
        if cases is None:
            tests = _assertions(truth)[:most_tests]
            result = run(program, tests, limits=bounds, sandbox=sandbox, packages=packages)
            passed, total, error = min(result.passed, len(tests)), len(tests), result.error
        else:
            passed, total, error = 0, len(cases[:most_tests]), None
            for given, expected in cases[:most_tests]:
                result = run(program, None, given.encode(), limits=bounds, sandbox=sandbox, packages=packages)
                passed += _is_right(result, expected)
                error = error or result.error
                if passed < total and not partial and not _is_right(result, expected):
                    break
        share = passed / total
        # An exception of the program is a wrong program, and no failure to score it.
        known = {"error": error} if error in ERRORS and error != "exception" else {}
        return {"score": share if partial else float(passed == total), "passed": share, **known}

    return score


def _program(completion: str) -> str:
    text = after_thoughts(completion)
    block = code_block(text, "python", "py", "python3")
    return block if block is not None else tagged(text) or text


def _ground_truth(truth: Any) -> dict[str, Any]:
    if isinstance(truth, str) and truth.lstrip().startswith(("{", "[")):
        try:
            truth = json.loads(truth)
        except ValueError as error:
            raise ScoringError("truth", f"the ground truth is no JSON: {error}") from error
    if isinstance(truth, str):
        truth = [truth]
    if isinstance(truth, list):
        truth = {"tests": truth}
    if not isinstance(truth, dict) or not truth.keys() & set(_NAMES):
        raise ScoringError("truth", f"the ground truth must hold one of {', '.join(_NAMES)}")
    return truth


def _cases(truth: dict[str, Any]) -> list[tuple[str, str]] | None:
    """Pairs of stdin and stdout, None if the tests are assertions."""
    if "cases" in truth:
        pairs = [(case.get("input", ""), case.get("output")) for case in truth["cases"]]
    elif "inputs" in truth:
        pairs = list(zip(truth["inputs"], truth.get("outputs", [])))
    else:
        return None
    if not pairs or not all(isinstance(text, str) for pair in pairs for text in pair):
        raise ScoringError("truth", "cases must be texts of input and output, at least one")
    return pairs


def _assertions(truth: dict[str, Any]) -> list[str]:
    tests = truth.get("tests") or truth.get("test_list") or truth.get("test")
    tests = [tests] if isinstance(tests, str) else tests
    if not isinstance(tests, list) or not tests or not all(isinstance(test, str) for test in tests):
        raise ScoringError("truth", "tests must be Python source, or a list of it that is not empty")
    before, entry = truth.get("setup") or "", truth.get("entry_point")
    after = f"\ncheck({entry})" if entry else ""
    return [f"{before}\n{test}{after}" for test in tests]


def _is_right(result: Outcome, expected: str) -> bool:
    written = result.stdout.decode("utf-8", "replace")
    return result.error is None and result.passed == 1 and _lines(written) == _lines(expected)


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.strip().splitlines()]
