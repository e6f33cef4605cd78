"""The ahead-of-time compiler: the kernels that exist, ones that are unfit on purpose, and its refusals.

Interpreted kernels cannot be compiled, and the tests' process interprets: the compiler runs in processes of its own.
"""

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from kernels.compile import DTYPES, HEAD_DIMS, TARGETS, kernel_modules, main
from tests.helpers import WAIT

pytest.importorskip("triton")
ROOT = Path(__file__).parents[3]

UNFIT = """
import os
import triton
import triton.language as tl
from kernels.triton.launch import KernelSpec, dot

@triton.jit
def product(a, b, c, PRECISION: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    grid = i[:, None] * N + i[None, :]
    tl.store(c + grid, dot(tl.load(a + grid), tl.load(b + grid), PRECISION))

@triton.jit
def product_by_sums(a, b, c, N: tl.constexpr):
    i = tl.arange(0, N)
    grid = i[:, None] * N + i[None, :]
    tl.store(c + grid, tl.sum(tl.load(a + grid)[:, :, None] * tl.load(b + grid)[None, :, :], axis=1))

@triton.jit
def mix_rows(a, N: tl.constexpr):
    i = tl.arange(0, N)
    grid = i[:, None] * N + i[None, :]
    x = tl.load(a + grid)
    tl.store(a + grid, x + tl.cumsum(x, axis=0) + tl.cumsum(x, axis=1) * tl.trans(x))

@triton.jit
def unknown_name(a):
    tl.store(a, no_such_thing)

class Aborting:
    @property
    def arg_names(self):
        os._exit(9)

def specs(target, head_dim, dtype):
    narrow = {"a": "*bf16", "b": "*bf16", "c": "*fp32"}
    wide = {"a": "*fp32", "b": "*fp32", "c": "*fp32"}
    size = {"PRECISION": "ieee", "N": head_dim}
    return [
        KernelSpec("fit", product, narrow, size, 4, 1, True, 1e6, 2e9),
        KernelSpec("spilling", mix_rows, {"a": "*fp32"}, {"N": 64}, 1, 1, False, 0, 0),
        KernelSpec("wide", product, narrow, size | {"N": 256}, 8, 1, True, 0, 0),
        KernelSpec("slow", product_by_sums, wide, {"N": 16}, 4, 1, True, 0, 0),
        KernelSpec("broken", unknown_name, {"a": "*fp32"}, {}, 4, 1, False, 0, 0),
        KernelSpec("aborting", Aborting(), {}, {}, 4, 1, False, 0, 0),
        # What the process that dies had before it.
        KernelSpec("incomplete", product, narrow, {"N": 16}, 4, 1, True, 0, 0),
    ]
"""

# Every process of the command sees these modules in the place of the real ones.
REPLACE_MODULES = """
import pathlib
import kernels.triton.launch
kernels.triton.__path__[:] = [str(pathlib.Path(__file__).parent / "modules")]
"""


def run(*arguments: str, path: Path | None = None, code: str | None = None) -> subprocess.CompletedProcess[str]:
    """The command, or Python code, without the interpreter; `path` comes before the repository."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([*([] if path is None else [str(path)]), str(ROOT)])
    command = [sys.executable, *(["-m", "kernels.compile"] if code is None else ["-c", code]), *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=WAIT)


def test_specifications_name_every_argument_of_their_kernels() -> None:
    assert {"activations", "convolution", "losses", "norms", "rotary"} <= set(kernel_modules())
    for module in kernel_modules():
        specs = import_module(f"kernels.triton.{module}").specs
        for target in TARGETS:
            for head_dim in HEAD_DIMS:
                for dtype in DTYPES:
                    found = specs(target, head_dim, dtype)
                    assert found
                    for spec in found:
                        names = [*spec.signature, *spec.constexprs]
                        assert sorted(names) == sorted(spec.fn.arg_names), f"{module}.{spec.name}"
                        assert spec.bytes > 0


@pytest.mark.parametrize(
    ("target", "kernel"),
    [
        ("sm_90", "scan_per_channel"),
        pytest.param("sm_90", "", marks=pytest.mark.slow),
        pytest.param("gfx942", "", marks=pytest.mark.slow),
    ],
)
def test_every_kernel_fits(target: str, kernel: str, tmp_path: Path) -> None:
    file = tmp_path / "kernels.json"
    arguments = ["--target", target, "--head-dim", "64", "--dtype", "bf16", "--json", str(file)]
    # One process does for a few.
    arguments += ["--kernel", kernel, "--jobs", "1"] if kernel else []
    finished = run(*arguments)
    assert finished.returncode == 0, finished.stderr
    reports = json.loads(file.read_text())
    modules = {report["module"] for report in reports}
    assert modules == ({"delta_rule", "gla"} if kernel else set(kernel_modules()))
    for report in reports:
        assert kernel in report["kernel"]
        assert report["target"] == target
        assert report["multiplies"] <= (report["matrix_instructions"] > 0)
        assert report["registers"] > 0
        assert (report["spilled_bytes"], report["problems"]) == (0, [])
        assert report["shared_bytes"] <= report["shared_limit"]
    lines = finished.stdout.splitlines()
    assert len(lines) == 1 + len(reports)
    assert lines[0].split()[:6] == ["target", "K", "dtype", "kernel", "warps", "registers"]


def test_unfit_kernels_are_named(tmp_path: Path) -> None:
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "unfit.py").write_text(UNFIT)
    (tmp_path / "sitecustomize.py").write_text(REPLACE_MODULES)
    file = tmp_path / "kernels.json"
    arguments = ["--head-dim", "64", "--dtype", "bf16", "--jobs", "1", "--json", str(file)]
    finished = run("--target", "sm_90", *arguments, path=tmp_path)
    assert finished.returncode == 1, finished.stderr
    problems = {report["kernel"]: "; ".join(report["problems"]) for report in json.loads(file.read_text())}
    assert problems.pop("fit") == ""
    messages = {
        "spilling": "spills",
        "wide": "wants 262144 bytes of shared memory of 232448",
        "slow": "multiplies matrices without a matrix instruction",
        "broken": "does not compile",
        "incomplete": r"lacks the arguments ['PRECISION']",
        "aborting": "process died",
    }
    assert problems.keys() == messages.keys()
    for kernel, message in messages.items():
        assert message in problems[kernel]
        assert f"unfit.{kernel} (sm_90, head size 64, bf16): {problems[kernel]}" in finished.stderr
    assert "unfit.fit (" not in finished.stderr


def test_the_interpreter_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert main(["--all"]) == 2
    assert capsys.readouterr().err == (
        "kernels.compile: TRITON_INTERPRET is set, and interpreted kernels cannot be compiled: unset it\n"
    )


def test_a_machine_without_triton() -> None:
    code = "import sys; sys.modules['triton'] = None; from kernels.compile import main; sys.exit(main(['--all']))"
    finished = run(code=code)
    assert finished.returncode == 2
    assert finished.stderr.startswith("kernels.compile: triton cannot be imported")
    assert len(finished.stderr.splitlines()) == 1
    operations = """
import sys
sys.modules["triton"] = None
import torch
from kernels.activations import swiglu
from kernels.norms import l2_norm
x = torch.ones(2, 4)
swiglu(x, l2_norm(x))
try:
    l2_norm(x, backend="triton")
except ValueError as error:
    print(error)
"""
    finished = run(code=operations)
    assert finished.returncode == 0, finished.stderr
    assert "asks for 'triton', which does not exist for these inputs" in finished.stdout


ONE = ["--target", "sm_90", "--head-dim", "64", "--dtype", "bf16", "--kernel"]


@pytest.mark.slow
def test_one_kernel_by_its_name() -> None:
    finished = run(*ONE, "rotary.rotary_forward")
    assert finished.returncode == 0, finished.stderr
    (line,) = finished.stdout.splitlines()[1:]
    assert line.split()[:4] == ["sm_90", "64", "bf16", "rotary.rotary_forward"]


def test_a_name_that_no_kernel_has(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert main([*ONE, "no_such_kernel"]) == 2
    assert capsys.readouterr() == ("", "kernels.compile: no kernel has 'no_such_kernel' in its name\n")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--all", "--target", "sm_90"],
        ["--target", "sm_75"],
        ["--all", "--jobs", "0"],
        ["--peer", "fla", "--all"],
        ["--peer", "fla", "--target", "gfx942"],
        ["--peer", "fla", "--dtype", "bf16", "fp32"],
        ["--peer", "liger"],
    ],
)
def test_wrong_arguments(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "error:" in capsys.readouterr().err
