"""The DeepSpeed engine on two ranks and on one: against Megatron's, from checkpoint to checkpoint, and as a run."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load

from tests.processes import finish, start
from tests.trainer.conftest import metrics, status
from trainer.engines.pieces import boxes
from trainer.stored.inference import load_model

FP32 = {
    "zero0": {"stage": 0},
    "zero1": {"stage": 1},
    "zero2": {"stage": 2},
    "zero3": {"stage": 3},
    "zero2-offload": {"stage": 2, "offload": "optimizer"},
    "zero3-offload": {"stage": 3, "offload": "parameters"},
    "zero0-tp2": {"stage": 0, "tensor": 2},
    "zero1-tp2": {"stage": 1, "tensor": 2},
    "zero2-tp2-offload": {"stage": 2, "offload": "optimizer", "tensor": 2, "sequence": True},
    "zero3-tp2": {"stage": 3, "tensor": 2},
}
BF16 = {
    "zero1-bf16": {"stage": 1, "precision": "bf16"},
    "zero2-bf16": {"stage": 2, "precision": "bf16"},
    "zero1-offload-bf16": {"stage": 1, "offload": "optimizer", "precision": "bf16"},
    "zero3-bf16": {"stage": 3, "precision": "bf16"},
    "zero1-tp2-bf16": {"stage": 1, "precision": "bf16", "tensor": 2},
}
STAGES = FP32 | BF16
# Of each dimension something; the others take minutes, and belong to the slow tests.
QUICK = ("zero0", "zero1", "zero2", "zero3", "zero2-offload", "zero3-tp2", "zero2-bf16", "zero1-tp2-bf16")
HALF, LAST = 2, 4
# On two ranks: the stage that goes on from the checkpoint of another; `one` was written by a single rank.
MOVES = {
    "zero2": "zero3",
    "zero3": "one",
    "zero0": "zero2-offload",
    "zero1": "zero2-tp2-offload",
    "zero2-offload": "zero3-tp2",
    "zero1-tp2": "zero3",
    "zero3-tp2": "zero0-tp2",
    "zero3-bf16": "zero1-bf16",
    "zero1-bf16": "zero3-bf16",
}
POISONED = ("zero0", "zero1", "zero2", "zero2-offload", "zero3", "zero1-bf16", "zero2-bf16", "zero0-tp2", "zero1-tp2")
EXPERTS = ("zero0", "zero2", "zero3", "zero2-bf16")
ON_ONE = ("zero0", "zero2-offload", "zero3", "zero2-bf16", "zero1-tp2", "zero3-tp2", "zero1-tp2-bf16")


def is_quick(job):
    """Whether a job is of quick stages alone; of the two poisons each stage has one in the quick tests, by turns."""
    stages = [word for word in job.split() if word in STAGES]
    if not set(stages) <= set(QUICK) or ("experts" in job and stages in (["zero0"], ["zero2"])):
        return False
    return "without" not in job or job.endswith(("loss", "gradient")[POISONED.index(stages[0]) % 2])


def cases(jobs):
    """Their names as parameters of a test; those that are not quick are slow."""
    return [pytest.param(job, marks=() if is_quick(job) else pytest.mark.slow, id=job) for job in jobs]


def jobs_of_two_ranks(folder):
    """Every stage, with a checkpoint on the way and one at the end, and an engine that goes on from the first."""
    second = {"first": HALF, "last": LAST}
    jobs = {}
    for name, stage in STAGES.items():
        half, whole = str(folder / f"{name}-half"), str(folder / f"{name}-whole")
        jobs[name] = {**stage, "last": LAST, "validate": True, "save": {HALF: half, LAST: whole}}
    for name, stage in STAGES.items():
        jobs[f"{name} resumed"] = {**stage, **second, "load": str(folder / f"{name}-half")}
    for name in POISONED:
        for poison in ("loss", "gradient"):
            jobs[f"{name} without {poison}"] = {**STAGES[name], "last": 3, "poison": poison}
    for name in EXPERTS:
        half, experts = str(folder / f"{name}-experts-half"), {**STAGES[name], "experts": True}
        jobs[f"{name} with experts"] = {**experts, "last": LAST, "validate": True, "save": {HALF: half}}
        jobs[f"{name} with experts resumed"] = {**experts, **second, "load": half}
    for name, other in MOVES.items():
        jobs[f"{name} from {other}"] = {**STAGES[name], **second, "load": str(folder / f"{other}-half")}
    return jobs


def jobs_of_one_rank(folder):
    """Megatron's engine, DeepSpeed's alone, and what it makes of the checkpoints of two ranks."""
    megatron = {"engine": "megatron", "last": LAST, "validate": True}
    jobs = {
        "one": {**STAGES["zero1"], "last": LAST, "save": {HALF: str(folder / "one-half")}},
        "megatron": {**megatron, "save": {HALF: str(folder / "megatron-half"), LAST: str(folder / "megatron-whole")}},
        "megatron bf16": {**megatron, "precision": "bf16"},
        "megatron with experts": {**megatron, "experts": True},
        "megatron bf16 with experts": {**megatron, "experts": True, "precision": "bf16"},
        "from megatron": {"first": HALF, "last": LAST, "load": str(folder / "megatron-half")},
        "megatron from zero2": {**megatron, "first": HALF, "load": str(folder / "zero2-half")},
    }
    for name in ON_ONE:
        load_from = str(folder / f"{name}-half")
        alone = STAGES[name] | {"tensor": 1, "sequence": False}
        jobs[f"{name} on one"] = {**alone, "first": HALF, "last": LAST, "load": load_from}
    return jobs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def results(folder, tiny_data, request):
    """Both lists of jobs at once: each waits for the other's checkpoints. Without slow tests, the quick ones alone."""
    chosen = [item for item in request.session.items if item.path == request.path]
    slow = any(item.get_closest_marker("slow") for item in chosen)
    started, outcomes = [], {}
    for ranks, jobs in ((None, jobs_of_one_rank(folder)), (2, jobs_of_two_ranks(folder))):
        jobs = {name: job for name, job in jobs.items() if slow or is_quick(name)}
        files = folder / f"jobs{ranks or 1}.json", folder / f"results{ranks or 1}.json"
        files[0].write_text(json.dumps(jobs))
        command = ("-m", "tests.trainer.deepspeed_ranks", tiny_data, *files)
        started.append(start(*command, ranks=ranks, imported="deepspeed"))
    for ranks, process in enumerate(started, start=1):
        code, output = finish(process)
        assert code == 0, output
        outcomes |= json.loads((folder / f"results{ranks}.json").read_text())
    return outcomes


def assert_same_steps(ours, theirs, rel):
    assert len(ours) == len(theirs) > 0
    for (loss, norm, tokens, skipped), (loss_2, norm_2, tokens_2, skipped_2) in zip(ours, theirs, strict=True):
        assert (tokens, skipped) == (tokens_2, skipped_2)
        assert loss == pytest.approx(loss_2, rel=rel)
        assert norm == pytest.approx(norm_2, rel=10 * rel)


def read_parameters(directory):
    reader = FileSystemReader(directory)
    saved = reader.read_metadata().state_dict_metadata
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in saved.items()
        if name.startswith("model.")
    }
    load(state, storage_reader=reader, no_dist=True)
    return state


def error(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("name", cases(FP32))
def test_every_stage_trains_as_megatron_on_one_rank(results, folder, name):
    """Losses, norms, validation and parameters, where micro-batches count different numbers of tokens."""
    megatron = results["megatron"]
    assert_same_steps(results[name]["steps"], megatron["steps"], rel=1e-5)
    assert results[name]["validation"] == pytest.approx(megatron["validation"], rel=1e-5)
    ours, theirs = read_parameters(folder / f"{name}-whole"), read_parameters(folder / "megatron-whole")
    assert ours.keys() == theirs.keys()
    for parameter in theirs:
        assert error(ours[parameter], theirs[parameter]) < 1e-4, parameter


def test_the_batches_of_the_comparison_count_different_numbers_of_tokens(results):
    counts = {tokens for _, _, tokens, _ in results["megatron"]["steps"]}
    assert len(counts) > 1 and max(counts) < 128


@pytest.mark.parametrize("name", cases(BF16))
def test_bf16_trains_as_megatron_but_for_rounding(results, name):
    megatron = results["megatron bf16"]
    assert_same_steps(results[name]["steps"], megatron["steps"], rel=5e-4)
    assert results[name]["validation"] == pytest.approx(megatron["validation"], rel=5e-4)


@pytest.mark.parametrize("job", cases(f"{name} with experts" for name in EXPERTS))
def test_experts_train_as_megatrons_on_one_rank(results, job):
    """Balance and z-losses, noise, loads and a learned temperature included; the run goes on from a checkpoint."""
    megatron, rel = ("megatron bf16", 2e-3) if "bf16" in job else ("megatron", 1e-5)
    ours, theirs = results[job], results[f"{megatron} with experts"]
    assert_same_steps(ours["steps"], theirs["steps"], rel)
    assert ours["validation"] == pytest.approx(theirs["validation"], rel=rel)
    assert ours["metrics"].keys() == theirs["metrics"].keys()
    for key in ("moe/experts_per_token", "moe/temperature", "moe/balance_loss", "moe/z_loss"):
        assert ours["metrics"][key] == pytest.approx(theirs["metrics"][key], rel=10 * rel)
    assert results[f"{job} resumed"]["steps"] == ours["steps"][HALF:]


@pytest.mark.parametrize("name", cases(["zero1-bf16", "zero1-offload-bf16", "zero2-bf16", "zero1-tp2-bf16"]))
def test_bf16_keeps_float32_where_it_matters(results, name):
    types = {key.rsplit(".", 1)[-1]: dtype for key, dtype in results[name]["types"].items()}
    assert types["A_log"] == types["dt_bias"] == "torch.float32"
    assert types["weight"] == "torch.bfloat16"


@pytest.mark.parametrize("name", cases(STAGES))
def test_resumed_equals_uninterrupted(results, name):
    assert results[f"{name} resumed"]["steps"] == results[name]["steps"][HALF:]
    assert results[f"{name} resumed"]["random"] == results["one"]["random"]


@pytest.mark.parametrize(
    "job", cases([*(f"{name} from {other}" for name, other in MOVES.items()), *(f"{name} on one" for name in ON_ONE)])
)
def test_another_layout_goes_on(results, job):
    megatron, rel = ("megatron bf16", 5e-4) if "bf16" in job else ("megatron", 1e-5)
    assert_same_steps(results[job]["steps"], results[megatron]["steps"][HALF:], rel)


@pytest.mark.parametrize("job", ["from megatron", "megatron from zero2"])
def test_the_other_engine_goes_on(results, job):
    """The format is that of both."""
    assert_same_steps(results[job]["steps"], results["megatron"]["steps"][HALF:], 1e-5)


@pytest.mark.parametrize("job", cases(f"{name} without {what}" for name in POISONED for what in ("loss", "gradient")))
def test_a_step_without_numbers_on_one_rank_is_skipped_on_all(results, job):
    result = results[job]
    first, poisoned, after = result["steps"]
    assert poisoned[3] and not math.isfinite(poisoned[0] if job.endswith("loss") else poisoned[1])
    assert result["after"] == result["before"]
    assert not first[3] and not after[3] and math.isfinite(after[0]) and math.isfinite(after[1])
    assert first == results[job.split()[0]]["steps"][0]


def test_zero_3_holds_a_part_of_the_matrices_and_counts_them_all(results):
    zero3, megatron = results["zero3"], results["megatron"]
    matrices = [name for name, size in megatron["held"].items() if size > 320]
    assert len(matrices) > 5
    assert all(zero3["held"][name] <= 1 for name in matrices)
    assert zero3["counted"] == megatron["counted"] == results["zero0"]["counted"]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.data())
def test_boxes_cover_a_range_in_order(shape, data):
    total = math.prod(shape)
    start = data.draw(st.integers(0, total))
    stop = data.draw(st.integers(start, total))
    whole = torch.arange(total).view(shape)
    found = list(boxes(shape, start, stop))
    parts = [whole[tuple(slice(o, o + n) for o, n in zip(*box, strict=True))].flatten() for box in found]
    assert torch.cat([torch.arange(0), *parts]).tolist() == list(range(start, stop))
    assert len(found) <= max(2 * len(shape) - 1, 1)


@pytest.mark.parametrize("tensor", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_run_is_quiet_and_its_checkpoint_opens_without_deepspeed(tiny_run, tmp_path, monkeypatch, tensor):
    """Nor does it compile anything, which two ranks at once could break."""
    run_dir, operators = tmp_path / "run", tmp_path / "operators"
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(operators))
    process = tiny_run(
        run_dir,
        "--engine.name=deepspeed",
        "--engine.zero_stage=2",
        "--engine.offload=optimizer",
        "--train.precision=bf16",
        f"--evaluation.samples={2 - tensor}",
        "--evaluation.sample_tokens=4",
        f"--parallel.tensor={tensor}",
        "--model.attention.num_kv_heads=2",
        "--logging.progress=false",
        "--train.steps=4",
        ranks=2,
        # What a rank says while it imports DeepSpeed is heard of true ranks alone.
        torchrun=tensor == 1,
    )
    code, output = finish(process)
    assert code == 0, output
    assert status(run_dir)["state"] == "done"
    for noise in ("deepspeed", "warn", "memory"):
        assert noise not in output.lower(), output
    assert not operators.exists() or not list(operators.rglob("*.so"))
    losses = [line["loss"] for line in metrics(run_dir) if "grad_norm" in line]
    assert len(losses) == 4 and losses[-1] < losses[0]
    assert [line["step"] for line in metrics(run_dir) if "split" in line] == [3, 4]
    opened = load_model(run_dir, torch.device("cpu"))
    assert opened.path.name == "step_00000004"
    saved = read_parameters(opened.path / "state")
    for name, parameter in opened.model.named_parameters():
        assert torch.equal(parameter, saved[f"model.{name}"]) and parameter.isfinite().all()
