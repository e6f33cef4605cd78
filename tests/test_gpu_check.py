"""The check of a GPU, in the interpreter: every case's path, and that a broken kernel is named."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from kernels.backend import ENVIRONMENT_VARIABLE
from kernels.triton import chunked, norms
from kernels.triton.launch import known_faults
from tests.gpu_check import peers, runner, work
from tests.gpu_check.__main__ import main
from tests.gpu_check.cases import RECURRENCES

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs the check itself")
ROOT = Path(__file__).parents[1]


def check(file: Path, *arguments: str) -> tuple[int, list[dict]]:
    """The dry run in this process; its exit code and the cases in its file."""
    code = main(["--dry-run", "--jobs", "0", "--json", str(file), *arguments])
    return code, json.loads(file.read_text())["cases"] if file.exists() else []


# One of each set of kernels is quick enough for every day.
GROUPS = sorted({case.group for case in runner.cases(dry=True)})
QUICK = {"norms", "routing"}


@pytest.mark.parametrize(
    "group", [pytest.param(group, marks=[] if group in QUICK else [pytest.mark.slow]) for group in GROUPS]
)
def test_every_case_holds_in_the_interpreter(group: str, tmp_path: Path) -> None:
    code, found = check(tmp_path / "check.json", "--group", group)
    assert [case["message"] for case in found if case["state"] != "ok"] == []
    assert code == 0
    assert {case["case"] for case in found} >= {case.name for case in runner.cases(dry=True) if case.group == group}


def test_all_recurrences_have_every_kind_of_case() -> None:
    for op in RECURRENCES:
        names = [case.name for case in runner.cases(dry=False) if case.group == op]
        for part in ("bf16", "fp32", "packed", "many programs", "long", "NaN in", "time: "):
            assert any(part in name for name in names), f"{op}: {part}"
        assert op == "hgrn" or any("K256 V256" in name for name in names)


def test_a_broken_kernel_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = norms.rms_norm
    monkeypatch.setattr(norms, "rms_norm", lambda x, weight, eps: given(x, weight, eps) * 1.02)
    code, found = check(tmp_path / "check.json", "--only", "rms_norm fp32")
    assert (code, found[0]["state"], found[0]["bitwise"]) == (1, "wrong", True)
    assert "wrong: rms_norm fp32: y is off by 2.0e-02 of 2e-05" in capsys.readouterr().out


def test_what_is_not_the_same_twice_and_what_raises_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given, calls = norms.l2_norm, []

    def unsteady(x: torch.Tensor, eps: float) -> torch.Tensor:
        calls.append(eps)
        return given(x, eps) * (1 + 1e-6 * len(calls))

    monkeypatch.setattr(norms, "l2_norm", unsteady)
    code, found = check(tmp_path / "check.json", "--only", "l2_norm fp32")
    assert (code, found[0]["bitwise"]) == (1, False)
    assert "two runs differ in y" in capsys.readouterr().out

    def failing(x: torch.Tensor, eps: float) -> torch.Tensor:
        raise RuntimeError("an illegal memory access\nmore")

    monkeypatch.setattr(norms, "l2_norm", failing)
    code, found = check(tmp_path / "check.json", "--only", "l2_norm")
    assert code == 1
    # The first does not keep the second from running.
    assert [case["message"] for case in found] == ["RuntimeError: an illegal memory access"] * 2


def test_a_lost_nan_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(case for case in runner.cases(dry=True) if case.name == "gla NaN in v")
    given = RECURRENCES["gla"]

    def finite(**arguments: object) -> tuple[torch.Tensor, torch.Tensor | None]:
        o, final = given(**arguments)
        return o.nan_to_num(), final

    monkeypatch.setitem(RECURRENCES, "gla", finite)
    found = work.run_case(case, torch.device("cpu"))
    assert (found["state"], found["message"]) == ("wrong", "a NaN input gives a finite output")


@pytest.mark.slow
def test_switches_say_what_cures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given, seen = chunked._Problem.outputs, []

    def wrong(problem: chunked._Problem, *arguments: object) -> torch.Tensor:
        seen.append(chunked.plan_switches())
        return given(problem, *arguments) * (1 if problem.plan.warps == 2 else 2)

    monkeypatch.setattr(chunked._Problem, "outputs", wrong)
    name = "gla bf16 K24 V20 1x4"
    code, _ = check(tmp_path / "check.json", "--only", name, "--switches")
    assert code == 1
    assert {"block_key": 64} in seen
    (cures,) = json.loads((tmp_path / "check.json").read_text())["cures"].values()
    assert cures == [switch for switch in runner.SWITCHES if "num_warps=2" in switch]
    assert "SPIKETRAIN_TRITON_PLAN=num_warps=2 or chunk=32" in capsys.readouterr().out


def test_the_peers_times_stand_beside_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "fla_call", lambda op: lambda inputs: inputs["v"] * 2 + inputs["q"].sum())
    monkeypatch.setattr(
        work, "_forward_backward", lambda call, inputs, device: {"forward_ms": float(call().dim()), "backward_ms": 1.0}
    )
    _, found = check(tmp_path / "check.json", "--only", "time: gla")
    assert (found[0]["forward_ms"], found[0]["fla_forward_ms"]) == (4.0, 4.0)


def test_the_peer_has_a_function_of_each_name() -> None:
    pytest.importorskip("fla")
    inputs = dict.fromkeys(("q", "k", "v", "log_decay", "beta"))
    for op in peers._FUNCTIONS:
        call = peers.fla_call(op)
        assert call is not None
        with pytest.raises(AttributeError, match="'NoneType' object"):  # all arguments are known, none is a tensor
            call(inputs)
    assert peers.fla_call("hgrn2") is None


def command(*arguments: str, path: Path, code: str = "") -> subprocess.CompletedProcess[str]:
    """The command in processes of its own, of which each runs `code` first."""
    (path / "sitecustomize.py").write_text(code)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(path), str(ROOT)])
    started = [sys.executable, "-m", "tests.gpu_check", *arguments]
    return subprocess.run(started, cwd=path, env=environment, capture_output=True, text=True, timeout=600)


DIES = """
import os, sys
if "--worker" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"
    import kernels.triton.norms
    kernels.triton.norms.l2_norm = lambda x, eps: (print("unspecified launch failure", file=sys.stderr), os._exit(7))
"""


def test_a_process_that_dies_ends_its_case_alone(tmp_path: Path) -> None:
    finished = command("--dry-run", "--jobs", "1", "--only", "norm bf16", path=tmp_path, code=DIES)
    assert finished.returncode == 1, finished.stderr
    assert "failed: l2_norm bf16: the process died, exit code 7: unspecified launch failure" in finished.stdout
    states = {case["case"]: case["state"] for case in json.loads((tmp_path / "gpu-check.json").read_text())["cases"]}
    assert states == {"rms_norm bf16": "ok", "gated_rms_norm bf16": "ok", "l2_norm bf16": "failed"}


# What the command may not need: it runs on machines that have torch and Triton alone.
NOTHING_ELSE = """
import sys
for name in ("pytest", "megatron", "deepspeed", "transformers", "tokenizers", "fla", "flash_attn"):
    sys.modules[name] = None
"""


def test_without_a_device_or_other_packages(tmp_path: Path) -> None:
    finished = command(path=tmp_path, code=NOTHING_ELSE)
    assert finished.returncode == 2
    assert finished.stderr == "gpu_check: no CUDA or ROCm device; --dry-run goes through it in the interpreter\n"
    listed = command("--list", path=tmp_path, code=NOTHING_ELSE)
    assert (listed.returncode, "gla NaN in v" in listed.stdout) == (0, True)


def test_the_time_is_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = check(tmp_path / "check.json", "--group", "norms", "--seconds", "1e-9")
    assert (code, found) == (3, [])
    assert "not run, for the time was over: 6 cases from 'rms_norm bf16'" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "switches", "text"),
    [
        (["--only", "nonsense"], "", "no such case; see --list, the groups are gated_delta_rule, kimi_delta_rule, gla"),
        ([], "num_warps=3", "SPIKETRAIN_TRITON_PLAN: 'num_warps=3' is not one of chunk=16|32|64"),
        ([], "wgmma=0", "'wgmma=0' is not one of"),
    ],
)
def test_wrong_wishes(
    arguments: list[str],
    switches: str,
    text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(chunked.PLAN_VARIABLE, switches)
    assert check(tmp_path / "check.json", *arguments)[0] == 2
    assert text in capsys.readouterr().err


def test_a_plan_with_switches(monkeypatch: pytest.MonkeyPatch) -> None:
    def plan(switches: str, target: str = "sm_90") -> chunked.Plan:
        monkeypatch.setenv(chunked.PLAN_VARIABLE, switches)
        decay = torch.empty(1, 8, 2, device="meta")
        return chunked.make_plan(2, (128, 128), decay, True, torch.bfloat16, target)

    usual, switched = plan(""), plan(" num_warps=2, scan_warps = 1,block_key=32,chunk=32 ")
    assert (usual.warps, usual.prepare_warps, usual.scan_warps, usual.block_key, usual.chunk) == (4, 8, 4, 64, 64)
    assert (switched.warps, switched.prepare_warps, switched.prepare_backward_warps) == (2, 2, 2)
    assert (switched.scan_warps, switched.block_key, switched.chunk) == (1, 32, 32)
    # Neither has the asynchronous products that the larger plan is for, nor Hopper's shared memory.
    small = plan("", "sm_80")
    for target in ("sm_86", "sm_89", "sm_120"):
        assert plan("", target) == chunked.replace(small, target=target)
    assert plan("", "sm_103") == chunked.replace(plan("", "sm_100"), target="sm_103")


def test_known_faults_by_release() -> None:
    for release, faulty in (
        ("3.3.1", False),
        ("3.4.0", True),
        ("3.6.0+git1", True),
        ("3.7.1", True),
        ("3.7.2", False),
        ("3.9.0", False),
    ):
        assert bool(known_faults("sm_90", release)) == faulty, release
    assert "scan_warps=2" in known_faults("sm_103", "3.7.0")[0]
    assert known_faults("sm_80", "3.6.0") == []
    # What they advise exists.
    for target in ("sm_90", "sm_100", "sm_103"):
        faults = known_faults(target, "3.6.0")
        assert len(faults) == (2 if target == "sm_90" else 1)
        for fault in faults:
            name, _, value = fault.rsplit(f"{chunked.PLAN_VARIABLE}=", 1)[1].partition("=")
            assert int(value) in chunked._SWITCHES[name]


def test_the_environment_is_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.delenv(chunked.PLAN_VARIABLE, raising=False)
    check(tmp_path / "check.json", "--only", "gla NaN in q")
    assert os.environ.get(chunked.PLAN_VARIABLE, "") == ""
