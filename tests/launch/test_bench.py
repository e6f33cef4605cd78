"""The benchmark command: it runs, writes its fields, and refuses what it does not know in one line."""

import json
import os
import re
import runpy
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from tests.helpers import WAIT
from tests.launch.serving import write_model
from tests.processes import ROOT, finish, start
from trainer.benchmarks import compressed_operators, compression_error, serve, train_step
from trainer.benchmarks.posttrain_step import PHASES, Stopwatch

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


def _bench(*arguments: str) -> str:
    """What a benchmark that succeeds writes."""
    code, output = finish(start("launch/bench.py", *arguments))
    assert code == 0, output
    return output


def test_train_step_writes_its_fields(tmp_path):
    pytest.importorskip("transformers")
    path = tmp_path / "result.json"
    output = _bench("train_step", *TINY, "--json", str(path))
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
    for speed, used in zip(lines[::2], lines[1::2], strict=True):
        # The same work on both sides: who uses half the peak is half as quick.
        assert (speed["unit"], used["unit"]) == ("tokens/s", "of matmul peak")
        assert used["ratio"] == pytest.approx(speed["ratio"])
        assert "2 x 16 tokens a step" in speed["note"] or "hybrid" in speed["case"]
    assert "dense fp32, transformers eager" in output


def test_train_step_compares_medians_and_counts_flops():
    model = torch.nn.Linear(10, 100, bias=False)
    setup = train_step._Setup(
        name="dense fp32",
        engine=SimpleNamespace(model=model),
        peer=model,
        batch=SimpleNamespace(tokens=torch.zeros(2, 8)),
        dtype=torch.float32,
        flops=10.0,
    )
    seconds = {"ours": [1.0, 2.0, 30.0], "eager": [4.0, 1.0, 50.0]}
    speed, used = train_step._compare(setup, seconds, peak=1000.0)
    assert (speed.ours, speed.peer, speed.ratio, speed.unit) == (8.0, 4.0, 2.0, "tokens/s")
    assert (used.ours, used.peer, used.ratio) == pytest.approx((0.08, 0.04, 2.0))
    assert "0.0 M parameters, 2 x 8 tokens a step" in speed.note and "ours 0.16 in its quickest step" in used.note


def test_linear_attention_writes_its_fields(tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("fla")
    path = tmp_path / "result.json"
    sizes = {"seq_lens": "[64]", "naive_seq_len": 8, "scaling_seq_lens": "[32,64]", "window_seq_len": 64, "window": 16}
    sizes |= {"mixer_seq_len": 32, "heads": 2, "head_dim": 16, "rounds": 1, "warmup": 0, "threads": 1}
    options = [f"--{name}={value}" for name, value in sizes.items()]
    _bench("linear_attention", *options, "--json", str(path))
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
    sizes |= {"parts": "[peers,tokens,experts]"}
    _bench("moe", *(f"--{name}={value}" for name, value in sizes.items()), "--json", str(path))
    lines = json.loads(path.read_text())
    peers = ["a loop with index_add", "Mixtral's block, eager", "Mixtral's block, grouped_mm"]
    growths = ["growth with tokens from 16 to 32", "growth with experts from 2 to 4"]
    assert [line["case"] for line in lines] == [*(f"{peer}, 32 tokens" for peer in peers), *growths]
    assert all(line["ratio"] == pytest.approx(line["peer"] / line["ours"]) for line in lines[:3])
    assert [line["peer"] for line in lines[3:]] == [1.0, 0.0]


@pytest.mark.slow
def test_losses_writes_its_fields(tmp_path):
    path = tmp_path / "result.json"
    sizes = {"tokens": 600, "hidden_size": 8, "vocab_size": 3000, "rounds": 1, "warmup": 0, "threads": 1}
    sizes |= {"teacher_hidden_size": 12, "parts": "[cross_entropy,log_probs,scoring,distillation]"}
    _bench("losses", *(f"--{name}={value}" for name, value in sizes.items()), "--json", str(path))
    lines = json.loads(path.read_text())
    parts = ("cross_entropy", "log_probs", "scoring", "distillation")
    assert [line["case"] for line in lines] == [f"{part}, {what}" for part in parts for what in ("peak memory", "time")]
    assert all(line["ratio"] == pytest.approx(line["peer"] / line["ours"]) for line in lines)
    for line in lines[1::2]:
        assert float(re.search(r"agree to (\S+)$", line["note"])[1]) <= 1e-5


def test_quantization_writes_its_fields(tmp_path):
    path = tmp_path / "quantization.json"
    ways = "quantize", "dequantize"
    sizes = {"tokens": 16, "hidden_size": 64, "group": 32, "rounds": 2, "warmup": 1}
    _bench("quantization", *(f"--{name}={value}" for name, value in sizes.items()), "--json", str(path))
    lines = json.loads(path.read_text())
    cases = [f"{way} {dtype}, {bits} bits" for dtype in ("fp32", "bf16") for bits in (8, 4) for way in ways]
    assert [line["case"] for line in lines] == [*cases, *(f"{way} fp32, nearest" for way in ways)]
    assert all(line["unit"] == "ns/element" and line["ours"] > 0 and line["peer"] > 0 for line in lines)


def test_compression_error_writes_its_fields(tmp_path):
    path = tmp_path / "result.json"
    sizes = {"draws": 50, "tokens": 16, "channels": 32, "head_dim": 16, "group": 16, "outlier_every": 16}
    output = _bench("compression_error", *(f"--{name}={value}" for name, value in sizes.items()), "--json", str(path))
    lines = {line["case"]: line for line in json.loads(path.read_text())}
    operators = "linear experts rms_norm gated_rms_norm swiglu gelu silu relu convolution attention attention_sdpa"
    operators += " attention_unfused gla gated_delta_rule kimi_delta_attention spike"
    assert list(dict.fromkeys(case.split(":")[0] for case in lines)) == [
        f"{operator}, {bits} bits" for operator in operators.split() for bits in (8, 4)
    ]
    inputs = {"linear": "x weight", "experts": "x gates weight", "kimi_delta_attention": "q k v log_decay beta"}
    for operator, names in inputs.items():
        assert [case for case in lines if case.startswith(f"{operator}, 4")] == [
            f"{operator}, 4 bits: {name}" for name in names.split()
        ]
    for case, line in lines.items():
        exact = line["note"].startswith("exact")
        # One chunk of these linear attentions has exact scores, and so an exact gradient of the values.
        assert exact == bool(re.match(r"(linear|experts).*x$|relu|spike|(gla|kimi).*v$", case)), case
        assert line["unit"] == "%" and (line["ours"] < line["peer"] or exact), case
        assert (line["ours"], line["peer"], line["ratio"]) == (0, 0, 1) or not exact, case
    assert lines["gelu, 4 bits: x"]["peer"] > 5 * lines["gelu, 8 bits: x"]["peer"] > 0
    assert lines["swiglu, 8 bits: up"]["note"].endswith("rounded: gate, up")
    assert "compression_error" not in output and "kimi_delta_attention, 4 bits: beta" in output


def test_compression_error_fails_where_a_linear_gradient_is_biased(monkeypatch):
    """Rounded to nearest: the figures are printed, then the command fails and names the gradient."""
    nearest = partial(compressed_operators.quantize, noise=None)
    monkeypatch.setattr(compressed_operators, "quantize", lambda x, noise, **options: nearest(x, **options))
    options = {"operators": ["linear", "gelu"], "bits": [4], "draws": 50, "tokens": 16, "channels": 32, "head_dim": 16}
    with pytest.raises(SystemExit, match=r"exact or unbiased, but are not: linear, 4 bits: weight$"):
        compression_error.main(compression_error.Config(**options))


def test_compression_error_judges_by_the_limits():
    """Exact, unbiased, biased and unsafe; the ratio is to the bias, or to the least that would show."""

    def errors(bias):
        # 100 degrees of freedom: z of unbiased gradients is at most about 1.7.
        return compressed_operators.Errors(square=1e-2, chance=1e-6, of_mean=1e-6 + bias**2, freedom=100)

    exact = compressed_operators.Errors(0.0, 0.0, 0.0, 1.0)
    verdicts = [compression_error.verdict(found) for found in (exact, errors(1e-4), errors(5e-3), errors(0.02))]
    assert [verdict.split()[0] for verdict in verdicts] == ["exact", "unbiased", "biased", "unsafe:"]
    line = compression_error.compare("case", errors(0.02), ("x", "gate"))
    assert (line.ours, line.peer, line.ratio) == pytest.approx((2, 10, 5))
    assert line.note.endswith("rounded: x, gate")
    assert compression_error.compare("case", errors(0), ()).ratio == pytest.approx(0.1 / errors(0).least)


def test_spiking_writes_its_fields(tmp_path):
    path = tmp_path / "result.json"
    sizes = {"tokens": 64, "hidden_size": 128, "product_tokens": "[1,3]", "sparsities": "[0.95,0.5]", "rounds": 1}
    sizes |= {"warmup": 0, "threads": 1, "clock": "cpu"}
    _bench("spiking", *(f"--{name}={value}" for name, value in sizes.items()), "--json", str(path))
    lines = json.loads(path.read_text())
    kinds = ("plain, fixed k", "clipped, learned k", "surrogate, k per channel")
    cases = [f"spike {dtype}, {kind}" for dtype in ("fp32", "bf16") for kind in kinds]
    cases += [f"{tokens} x 128 x 128, {share}% silent" for tokens in (1, 3) for share in (50, 95)]
    assert [line["case"] for line in lines] == cases
    assert all(line["ratio"] == pytest.approx(line["peer"] / line["ours"]) for line in lines)
    assert all(re.search("agree to", line["note"]) for line in lines[:6])
    assert all(re.search("faster from (50|95)% silent on|dense is always faster", line["note"]) for line in lines[6:])


def test_serve_compares_several_clients_with_one(tmp_path):
    model, path = tmp_path / "model.yaml", tmp_path / "result.json"
    model.write_text(
        "{num_layers: 1, hidden_size: 32, ffn_hidden_size: 32, attention: {num_heads: 2, num_kv_heads: 1}}"
    )
    sizes = {"vocab_size": 400, "clients": "[2]", "requests": 3, "prompt_tokens": 5, "new_tokens": 4, "rounds": 1}
    _bench("serve", f"--model={model}", *(f"--{name}={value}" for name, value in sizes.items()), "--json", str(path))
    lines = json.loads(path.read_text())
    kinds = ("tokens/s", "requests/s", "first token, p50", "first token, p99")
    assert [line["case"] for line in lines] == [f"2 clients, {kind}" for kind in kinds]
    tokens, requests, *first = lines
    drawn = int(re.match(r"(\d+) tokens a round", tokens["note"])[1])
    assert 0 < drawn <= 12 and tokens["ours"] / requests["ours"] == pytest.approx(drawn / 3)
    assert all(line["ratio"] == pytest.approx(line["ours"] / line["peer"]) for line in (tokens, requests))
    assert all(line["ratio"] == pytest.approx(line["peer"] / line["ours"]) for line in first)


@pytest.mark.parametrize(("share", "expected"), [(1, 1), (50, 2), (75, 3), (76, 4), (99, 4)])
def test_percentiles_are_values_that_were_seen(share, expected):
    assert serve._percentile([4, 1, 3, 2], share) == expected


@pytest.mark.slow
def test_weights_are_converted_in_little_more_than_their_largest_tensor(tmp_path):
    model, path = tmp_path / "wide.yaml", tmp_path / "result.json"
    shape = "num_layers: 8, hidden_size: 1024, ffn_hidden_size: 4096, vocab_size: 65536, tie_embeddings: true"
    model.write_text(f"{{{shape}, mixers: {{pattern: full_attention}}, attention: {{num_heads: 16}}}}\n")
    _bench("weights", "--models", f"[{model}]", "--tensor", "2", "--folder", str(tmp_path), "--json", str(path))
    lines = {line["case"].removeprefix("wide: "): line for line in json.loads(path.read_text())}
    assert list(lines) == ["export", "import", "export again", "read by 1 of 2 ranks"]
    # 187 M parameters in bfloat16, of which the embedding has 67 M.
    assert lines["import"]["peer"] > 0.35
    assert all(line["ours"] < 0.3 for case, line in lines.items() if "rank" not in case)
    assert lines["read by 1 of 2 ranks"]["ours"] < lines["import"]["peer"] * 0.5 + 0.2
    assert {path.name for path in tmp_path.iterdir()} == {"wide.yaml", "result.json"}, "nothing is left"


@pytest.mark.slow
def test_a_shard_is_built_in_little_more_than_its_own_memory(tmp_path):
    recipe, path = tmp_path / "wide.yaml", tmp_path / "result.json"
    model = "{num_layers: 4, hidden_size: 1024, ffn_hidden_size: 4096, vocab_size: 65536}"
    recipe.write_text(f"model: {model}\ndata: {{path: stdlib}}\nparallel: {{tensor: 2}}\n")
    _bench("building", "--recipes", f"[{recipe}]", "--json", str(path))
    (line,) = json.loads(path.read_text())
    # Half of the embedding's 64 M elements, of the head's and of the layers', in float32.
    assert line["peer"] > 0.25
    assert 1 / 1.3 < line["ratio"] < 1.05


@pytest.mark.slow
def test_moe_systems_counts_what_choices_cost_and_save(tmp_path):
    """Two ranks of N tokens, each to 2 of E experts, D and F wide: FLOPs and bytes to the last one."""
    path = tmp_path / "result.json"
    N, D, E, F = 32, 16, 8, 24
    sizes = {"tokens": f"[{N}]", "experts": E, "hidden_size": D, "expert_hidden_size": F, "skew": 2, "threads": 1}
    _bench("moe", "--parts=[systems]", *(f"--{name}={value}" for name, value in sizes.items()), f"--json={path}")
    lines = {line["case"]: line for line in json.loads(path.read_text())}
    cases = ["none", "moe_activation", "moe_experts", "ffn", "recompute_above=2", "replicated_experts=1"]
    copies = "replicated_experts=2"
    cases += [copies, f"{copies} + recompute_above=2", f"{copies} + moe_experts"]
    figures = ["kept, larger rank", "FLOPs, busier rank", "sent, both ranks"]
    assert list(lines) == [f"{case}, {figure}" for case in cases for figure in figures]
    kept, busier, sent = ({case: lines[f"{case}, {figure}"]["ours"] for case in cases} for figure in figures)

    def noted(figure, pattern):
        return {case: float(re.search(pattern, lines[f"{case}, {figure}"]["note"])[1]) for case in cases}

    copied = noted(figures[0], r"copied: (\d)")
    assert [copied[case] for case in cases] == [0, 0, 0, 0, 0, 1, 2, 2, 2]
    assert kept["none"] > kept["moe_activation"] > kept["moe_experts"] > kept["ffn"]
    assert kept["none"] > kept["recompute_above=2"] > kept["moe_experts"]
    assert kept["none"] > kept["replicated_experts=1"] > kept[copies] > kept[f"{copies} + recompute_above=2"]

    flops = noted(figures[1], r"(\S+) GFLOP on both")
    routing, forward = 2 * 2 * N * D * E / 1e9, 3 * 2 * (2 * N * 2) * D * F / 1e9
    assert flops["none"] == pytest.approx(3 * forward + 3 * routing, rel=1e-5)
    again = {case: flops[case] - flops["none"] for case in cases}
    assert again["moe_activation"] == pytest.approx(routing, rel=1e-3)
    assert again["moe_experts"] == again[f"{copies} + moe_experts"] == pytest.approx(forward, rel=1e-3)
    assert again["ffn"] == pytest.approx(forward + routing, rel=1e-3)
    assert again["replicated_experts=1"] == again[copies] == 0 < again["recompute_above=2"] < forward
    assert busier["none"] > busier["replicated_experts=1"] > busier[copies]

    tokens, weights = noted(figures[2], r"(\S+) MB of tokens"), noted(figures[2], r"(\S+) MB of weights")
    assert [sent[case] for case in cases] == pytest.approx([tokens[case] + weights[case] for case in cases])
    assert sent["none"] == sent["moe_activation"] == sent["moe_experts"] == sent["recompute_above=2"]
    assert tokens["none"] > tokens["replicated_experts=1"] > tokens[copies]
    # Three float32 matrices, copied forward and their gradients summed backward.
    assert weights == pytest.approx({case: copied[case] * 2 * 3 * D * F * 4 / 1e6 for case in cases})
    # The exchange there and back runs three times in place of twice; ranks tell each other E numbers before each.
    numbers = 2 * E * 8 / 1e6
    assert tokens["ffn"] - numbers * 2 == pytest.approx((tokens["none"] - numbers) * 1.5)


# Compiling takes long, and is tested with the engine.
@pytest.mark.parametrize("precision", [pytest.param("bf16", marks=pytest.mark.slow), "fp32"])
def test_decoding_is_compared_with_its_peers(tmp_path, precision):
    path = tmp_path / "decode.json"
    sizes = {"layers": 2, "hidden_size": 64, "vocab_size": 50, "steps": 2, "rounds": 1}
    options = [f"--{name}={value}" for name, value in sizes.items()]
    compiled = precision == "bf16"
    batches = (1,) if compiled else (1, 2)
    options += ["--compile=true"] if compiled else ["--compile=false"]
    _bench(
        "decode",
        *options,
        f"--batches={list(batches)}",
        "--contexts=[80]",
        f"--precision={precision}",
        f"--json={path}",
    )
    lines = json.loads(path.read_text())
    peers = ["transformers", "ctranslate2"] if precision == "fp32" else ["transformers"]
    ways = ["", ", compiled"] if compiled else [""]
    expected = [
        case
        for batch in batches
        for case in [
            *(f"dense{way}, {precision}, batch {batch}, context 80: {peer}" for way in ways for peer in peers),
            *(f"hybrid{way}, {precision}, batch {batch}, context 80: itself at 80" for way in ways),
        ]
    ]
    assert [line["case"] for line in lines] == expected
    assert all(line["ours"] > 0 and line["ratio"] == pytest.approx(line["peer"] / line["ours"]) for line in lines)


def test_rollouts_are_compared_with_their_peers(tmp_path):
    path = tmp_path / "rollout.json"
    sizes = {"layers": 2, "hidden_size": 64, "vocab_size": 50, "samples": 3, "prompt": 20, "new_tokens": 3, "rounds": 1}
    _bench("rollout", *(f"--{name}={value}" for name, value in sizes.items()), f"--json={path}")
    lines = json.loads(path.read_text())
    assert [line["case"].rpartition(": ")[2] for line in lines] == ["without clones", "transformers"]
    assert all(line["ours"] > 0 and line["ratio"] == pytest.approx(line["peer"] / line["ours"]) for line in lines)


@pytest.mark.parametrize("kl", [0.0, 0.1])
def test_steps_of_grpo_are_compared_with_trl(tmp_path, kl):
    pytest.importorskip("trl")
    path = tmp_path / "step.json"
    sizes = {"prompts": 2, "samples": 2, "prompt": 8, "new_tokens": 4, "micro_batch": 2, "layers": 2}
    sizes |= {"hidden_size": 64, "vocab_size": 64, "rounds": 2, "kl": kl}
    # Engine and process groups are for a process of their own.
    command = [sys.executable, "launch/bench.py", "posttrain_step", f"--json={path}"]
    done = subprocess.run(
        [*command, *(f"--{name}={value}" for name, value in sizes.items())],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=WAIT,
    )
    assert done.returncode == 0, done.stderr
    lines = json.loads(path.read_text())
    assert [line["case"].rpartition(": ")[2] for line in lines] == ["step", *PHASES]
    assert all(line["ours"] > 0 and line["ratio"] == pytest.approx(line["peer"] / line["ours"]) for line in lines)
    for side in ("ours", "peer"):
        # The median of the sums, and the sum of the medians of two.
        assert sum(line[side] for line in lines[1:]) == pytest.approx(lines[0][side])


def test_a_stopwatch_counts_phases_by_themselves():
    times = iter([0.0, 1.0, 3.0, 6.0, 10.0, 15.0, 21.0])
    stopwatch = Stopwatch(lambda: next(times))
    with stopwatch.phase("update"), stopwatch.phase("scoring"):
        pass
    with stopwatch.phase("update"):
        pass
    assert stopwatch.take() == {"generation": 0.0, "rewards": 0.0, "scoring": 3.0, "update": 2.0 + 4.0 + 6.0}
    assert not any(stopwatch.take().values())


def test_long_contexts_are_compared_with_softmax(tmp_path):
    path = tmp_path / "long.json"
    sizes = {"layers": 2, "hidden_size": 64, "window": 16, "chunk": 64, "steps": 2, "softmax_limit": 128}
    options = (f"--{name}={value}" for name, value in sizes.items())
    _bench("long_context", *options, "--lengths=[128, 256]", f"--json={path}")
    states = {line["case"]: line for line in json.loads(path.read_text()) if line["case"].endswith("state")}
    assert len(states) == 4
    linear = states["linear, 128 tokens: softmax, state"]
    # Keys and values of 64 channels in bf16, of two layers, against a state that does not depend on the length.
    assert linear["peer"] == pytest.approx(128 * 2 * 64 * 2 * 2 / 1e6)
    assert states["linear, 256 tokens: itself at 128, state"]["ratio"] == 1


def test_long_contexts_compare_checkpoints(tmp_path):
    models = [str(write_model(tmp_path / pattern, pattern=pattern)) for pattern in ("full_attention", "retention")]
    path = tmp_path / "long.json"
    options = (f"--checkpoints={json.dumps(models)}", "--lengths=[32, 64]", "--chunk=16", "--steps=1")
    _bench("long_context", *options, f"--json={path}")
    lines = [line for line in json.loads(path.read_text()) if line["case"].endswith("state")]
    softmax, linear = [line["peer"] for line in lines], [line["ours"] for line in lines]
    assert softmax[1] == 2 * softmax[0] and linear[1] == linear[0]


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
        (["moe", "--parts=[systems]", "--experts=9"], "experts"),
        (["moe", "--skew=-1"], "skew"),
        (["moe", "--clock=cpu"], "--threads 1"),
        (["losses", "--clock=cpu"], "--threads 1"),
        (["quantization", "--clock=cpu"], "--threads 1"),
        (["quantization", "--bits=[2]"], "bits"),
        (["quantization", "--group=96"], "multiple of group"),
        (["compression_error", "--operators=[nonlinear]"], "linear, experts"),
        (["compression_error", "--draws=49"], "at least 50"),
        (["compression_error", "--bits=[16]"], "8 or 4"),
        (["compression_error", "--head_dim=96"], "multiple of head_dim"),
        (["compression_error", "--tokens=0"], "tokens"),
        (["posttrain_step", "--micro_batch=5"], "divide prompts * samples=64"),
        (["posttrain_step", "--samples=1"], "at least 2"),
        (["posttrain_step", "--clock=cpu", "--threads=2"], "--threads 1"),
        (["serve", "--clients=[8]", "--requests=4"], "from 1 to the 4 requests"),
        (["serve", "--model=gone.yaml"], "gone.yaml does not exist"),
        (["spiking", "--clock=cpu"], "--threads 1"),
        (["spiking", "--product_tokens=[0]"], "product_tokens"),
        (["spiking", "--sparsities=[1.5]"], "sparsities"),
    ],
)
def test_errors_are_one_line_and_exit_2(arguments, expected, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["launch/bench.py", *arguments])
    monkeypatch.setattr(os, "environ", os.environ.copy())
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / "launch" / "bench.py"), run_name="__main__")
    output, errors = capsys.readouterr()
    assert stopped.value.code == 2
    assert output == ""
    assert len(errors.splitlines()) == 1
    assert expected in errors


@pytest.mark.parametrize(("arguments", "code"), [([], 0), (["train_step", "--rounds", "0"], 2)])
def test_a_process_of_its_own_lists_the_benchmarks_or_refuses(arguments, code):
    command = [sys.executable, "launch/bench.py", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=WAIT)
    assert done.returncode == code
    assert len(done.stderr.splitlines()) == (code != 0)
    assert ("train_step" in done.stdout) == (code == 0)


def test_memory_counts_what_is_kept(tmp_path):
    model, path = tmp_path / "model.yaml", tmp_path / "result.json"
    model.write_text(
        "{num_layers: 2, hidden_size: 64, ffn_hidden_size: 128, attention: {num_heads: 2, num_kv_heads: 2}}"
    )
    options = ["--models", f"[{model}]", "--precisions", "[fp32]", "--policies", "[16 bits, 8 bits]"]
    _bench("memory", *options, "--tokens", "256", "--rounds", "1", "--json", str(path))
    lines = json.loads(path.read_text())
    assert [line["unit"] for line in lines] == ["MB", "MB", "s"] * 2
    exact, rounded = lines[0], lines[3]
    assert "cosine of the gradients 1.000000" in exact["note"]
    assert rounded["ours"] < exact["ours"] < exact["peer"] == rounded["peer"]
