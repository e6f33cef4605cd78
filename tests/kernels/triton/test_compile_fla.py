"""FLA's kernels through the ahead-of-time compiler: one of them, what the table shows, and a machine without FLA."""

import json
from pathlib import Path

import pytest

from kernels.compile_fla import PeerReport, table
from tests.kernels.triton.test_compile import run

pytest.importorskip("triton")


def test_a_kernel_is_compiled_in_every_configuration_with_4_warps(tmp_path: Path) -> None:
    pytest.importorskip("fla")
    file = tmp_path / "kernels.json"
    finished = run("--peer", "fla", "--kernel", "gla.chunk_gla_bwd_kernel_dv", "--jobs", "1", "--json", str(file))
    assert finished.returncode == 0, finished.stderr
    reports = json.loads(file.read_text())
    # FLA's lists for a Hopper's shared memory, pruned for K = V = 128: shorter ones where no GPU seems to be there.
    tiles = {(report["configuration"], report["num_stages"]) for report in reports}
    assert tiles == {(f"BK={keys} BV=64", stages) for keys in (32, 64) for stages in (2, 3, 4)}
    for report in reports:
        assert (report["function"], report["kernel"]) == ("gla", "chunk_gla_bwd_kernel_dv")
        assert (report["target"], report["head_dim"], report["dtype"]) == ("sm_90", 128, "bf16")
        assert (report["num_warps"], report["error"]) == (4, "")
        assert report["matrix_instructions"] > 0
        assert 0 < report["shared_bytes"] <= report["shared_limit"]
        # It spills, which is told and is no fault of ours.
        assert report["registers"] == 255
        assert report["spilled_bytes"] > 0
    first, headers, row = finished.stdout.splitlines()
    assert first.startswith("fla-core 0.6")
    found = dict(zip(headers.split(), row.replace("BK=64 BV=64", "BK=64,BV=64").split(), strict=True))
    assert found["kernel"] == "gla.chunk_gla_bwd_kernel_dv"
    assert (found["configurations"], found["spilling"]) == ("6", "6")
    assert int(found["spilled"]) == min(report["spilled_bytes"] for report in reports)
    assert int(found["worst"]) == max(report["spilled_bytes"] for report in reports)


def report(configuration: str, registers: int, spilled: int, shared: int, error: str = "") -> PeerReport:
    resources = {"registers": registers, "spilled_bytes": spilled, "shared_bytes": shared, "matrix_instructions": 8}
    kernel = {"function": "gla", "kernel": "k", "configuration": configuration, "num_warps": 4, "num_stages": 2}
    return PeerReport(target="sm_90", head_dim=128, dtype="bf16", shared_limit=1000, error=error, **kernel, **resources)


def test_the_table_shows_the_configuration_that_spills_least_and_fits() -> None:
    reports = [
        report("A=1", 255, 8, 500),
        report("A=2", 255, 4, 900),
        report("A=3", 100, 0, 1001),
        report("A=4", 255, 4, 901),
        report("A=5", 0, 0, 0, "no such instruction"),
        report("A=6", 254, 4, 999),
    ]
    row = table(reports).splitlines()[1].split()
    assert row[3:11] == ["gla.k", "A=6", "4", "2", "254", "4", "999/1000", "8"]
    assert row[11:14] == ["6", "4", "8"]
    assert " ".join(row[14:]) == "1 does not compile: no such instruction"


def test_a_machine_without_fla() -> None:
    code = "import sys; sys.modules['fla'] = None; from kernels.compile import main; sys.exit(main(['--peer', 'fla']))"
    finished = run(code=code)
    assert (finished.returncode, finished.stdout) == (2, "")
    assert finished.stderr == ("kernels.compile: --peer fla: it is not installed: pip install 'fla-core>=0.6,<0.7'\n")
