"""The benchmark command: it runs, writes its fields, and refuses what it does not know in one line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

_SIZES = {
    "layers": 2,
    "hidden_size": 32,
    "ffn_hidden_size": 64,
    "heads": 4,
    "kv_heads": 2,
    "delta_heads": 2,
    "delta_head_dim": 8,
    "vocab_size": 64,
    "seq_len": 16,
    "batch_size": 2,
    "hybrid_seq_len": 64,
    "rounds": 1,
    "warmup": 1,
    "compile": "false",
}
TINY = [f"--{name}={value}" for name, value in _SIZES.items()]


def _bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "launch/bench.py", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300
    )


def test_train_step_writes_its_fields(tmp_path):
    pytest.importorskip("transformers")
    path = tmp_path / "result.json"
    done = _bench("train_step", *TINY, "--json", str(path))
    assert done.returncode == 0, done.stderr
    lines = json.loads(path.read_text())
    cases = [line["case"] for line in lines]
    assert cases == [
        f"{model}, {what}"
        for model in ("dense fp32", "dense bf16", "hybrid fp32")
        for what in ("transformers eager", "utilisation")
    ]
    for line in lines:
        assert set(line) == {"case", "ours", "peer", "ratio", "unit", "note"}
        assert line["ours"] > 0
        assert line["ratio"] == pytest.approx(line["ours"] / line["peer"])
    assert "dense fp32, transformers eager" in done.stdout


def test_linear_attention_writes_its_fields(tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("fla")
    path = tmp_path / "result.json"
    sizes = {"seq_lens": "[64]", "naive_seq_len": 8, "scaling_seq_lens": "[32,64]", "window_seq_len": 64, "window": 16}
    sizes |= {"mixer_seq_len": 32, "heads": 2, "head_dim": 16, "rounds": 1, "warmup": 0, "threads": 1}
    options = [f"--{name}={value}" for name, value in sizes.items()]
    done = _bench("linear_attention", *options, "--json", str(path))
    assert done.returncode == 0, done.stderr
    lines = json.loads(path.read_text())
    cases = [line["case"].split(",")[1].split(" T=")[0].strip() for line in lines]
    peers = ["transformers' fallback", "our gated_delta_rule", *["SDPA"] * 7, *["fla-core naive"] * 5]
    assert cases == [*peers, *["growth from 32 to 64"] * 7, "SDPA with a mask", "Qwen3-Next's"]
    timed = [line for line in lines if line["unit"] == "s"]
    assert all(line["ratio"] == pytest.approx(line["peer"] / line["ours"]) for line in timed)


def test_moe_writes_its_fields(tmp_path):
    pytest.importorskip("transformers")
    path = tmp_path / "result.json"
    sizes = {"tokens": "[32]", "scaling_tokens": "[16,32]", "scaling_experts": "[2,4]", "experts": 4}
    sizes |= {"hidden_size": 16, "expert_hidden_size": 24, "rounds": 1, "warmup": 0, "threads": 1, "clock": "cpu"}
    done = _bench("moe", *(f"--{name}={value}" for name, value in sizes.items()), "--json", str(path))
    assert done.returncode == 0, done.stderr
    lines = json.loads(path.read_text())
    peers = ["a loop with index_add", "Mixtral's block, eager", "Mixtral's block, grouped_mm"]
    growths = ["growth with tokens from 16 to 32", "growth with experts from 2 to 4"]
    assert [line["case"] for line in lines] == [*(f"{peer}, 32 tokens" for peer in peers), *growths]
    assert all(line["ratio"] == pytest.approx(line["peer"] / line["ours"]) for line in lines[:3])
    assert [line["peer"] for line in lines[3:]] == [1.0, 0.0]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["no_such_benchmark"], "train_step"),
        (["train_step", "--rounds", "0"], "rounds"),
        (["train_step", "--roundz", "3"], "rounds"),
        (["train_step", "--hidden_size=-1"], "hidden_size"),
        (["train_step", "--clock=cpu"], "--threads 1"),
        (["linear_attention", "--seq_lens", "[0]"], "seq_lens"),
        (["linear_attention", "--parts", "[sdap]"], "parts"),
        (["moe", "--top_k=16"], "top_k"),
        (["moe", "--clock=cpu"], "--threads 1"),
    ],
)
def test_errors_are_one_line_and_exit_2(arguments, expected):
    done = _bench(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert expected in done.stderr


def test_without_a_name_it_lists_the_benchmarks():
    done = _bench()
    assert done.returncode == 0
    assert "train_step" in done.stdout
