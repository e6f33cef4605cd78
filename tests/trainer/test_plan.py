"""Plans beside what engines hold, keep and send on real ranks; schedules, verdicts and bad input."""

import itertools
import json
import math
import os
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from typing import get_args, get_type_hints

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd.graph import saved_tensors_hooks

from models.compression import Compression
from models.config import MixerLayoutConfig
from models.decoder import Decoder, initialize
from models.saved_activations import COMPRESS, EVERYTHING, KEEP, RECOMPUTE, BlockPolicy, Policy
from tests.parity.worker import VOCAB
from tests.processes import ROOT, finish, run_ranks, start
from trainer.cli import from_mapping
from trainer.config import TrainConfig
from trainer.errors import ConfigError
from trainer.planning import plan as planning
from trainer.planning.config import PlanConfig
from trainer.planning.dry_run import Cut, DryRun
from trainer.planning.plan import Planner, choices, in_flight
from trainer.planning.report import as_values, compare, describe, verdict
from trainer.planning.search import layouts, search

MODEL = {
    "num_layers": 4,
    "hidden_size": 64,
    "ffn_hidden_size": 128,
    "vocab_size": VOCAB,
    "mixers": {"pattern": "gated_delta_net, full_attention, hgrn, sliding_window_attention"},
    "attention": {"num_heads": 4, "num_kv_heads": 2, "window": 12},
    "gated_delta_net": {"num_heads": 2, "num_v_heads": 4, "head_dim": 16},
}


def values(parallel=None, engine=None, experts=None, **train):
    return {
        "model": MODEL | {"moe": experts or {}},
        "data": {"document_mask": False},
        "train": {"seq_len": 64, "micro_batch_size": 1, "global_batch_size": 4} | train,
        "parallel": parallel or {},
        "engine": engine or {},
    }


def configuration(job, **cluster):
    return from_mapping(PlanConfig, job | {"cluster": {"devices": 2} | cluster})


def planned(job, **cluster):
    config = configuration(job, **cluster)
    config.validate_layout(config.cluster.ranks)
    return Planner(config, VOCAB).plan(config)


ON_MEGATRON = {
    "TP2": values({"tensor": 2}, recompute="full"),
    "TP2+SP": values({"tensor": 2, "sequence": True}, recompute="selective"),
    "PP2": values({"pipeline": 2}),
    "PP2 interleaved": values({"pipeline": 2, "virtual_pipeline": 2}, recompute="full"),
    "CP2": values({"context": 2}, recompute="selective", recompute_modules=["ffn"]),
    "DP2": values(micro_batch_size=2, recompute="selective", recompute_modules=["mixer", "ffn"]),
    "DP2 in bf16": values(precision="bf16"),
    # Every token goes to every expert: as balanced as planned.
    "EP2": values({"expert": 2}, experts={"num_experts": 4, "router": {"top_k": 4}}),
    "EP2 without activations": values(
        {"expert": 2},
        experts={"num_experts": 4, "router": {"top_k": 4}, "activation": "geglu"},
        recompute="selective",
        recompute_modules=["moe_activation"],
    ),
    "EP2 in bf16": values(
        {"expert": 2},
        experts={"num_experts": 4, "router": {"top_k": 4}, "shared_experts": 1, "dense_layers": [1]},
        precision="bf16",
        recompute="selective",
    ),
}
ON_DEEPSPEED = {
    "ZeRO 1 in bf16": values(engine={"name": "deepspeed", "zero_stage": 1}, precision="bf16"),
    "ZeRO 2": values(engine={"name": "deepspeed", "zero_stage": 2}),
    "ZeRO 2 in bf16": values(engine={"name": "deepspeed", "zero_stage": 2}, precision="bf16"),
    "ZeRO 3 in bf16": values(engine={"name": "deepspeed", "zero_stage": 3}, precision="bf16"),
}


@pytest.fixture(autouse=True)
def dry_runs_are_shared(monkeypatch):
    """What one test had measured of a model is not measured again for the next one."""
    monkeypatch.setattr(planning, "DryRun", dry_run)


DRY_RUNS = {}


def dry_run(model, vocab_size, dtype):
    """As a planner makes it, but once; recompute_above is read from the policy alone."""
    model = replace(model, moe=replace(model.moe, recompute_above=None))
    return DRY_RUNS.setdefault((repr(model), vocab_size, dtype), DryRun(model, vocab_size, dtype))


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """By rank and layout what two ranks measured in a step."""
    folder = tmp_path_factory.mktemp("plan")
    (folder / "jobs.json").write_text(json.dumps(ON_MEGATRON | ON_DEEPSPEED))
    command = ("-m", "tests.trainer.plan_ranks", folder / "jobs.json", folder / "measured")
    run_ranks(2, *command, imported="deepspeed")
    return [json.loads((folder / f"measured.{rank}.json").read_text()) for rank in range(2)]


def close(expected):
    return pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("name", ON_MEGATRON)
def test_megatron_holds_keeps_and_sends_what_was_planned(measured, name):
    plan = planned(ON_MEGATRON[name])
    for rank in range(2):
        stage, seen = plan.stages[rank % len(plan.stages)], measured[rank][name]
        assert stage.states.parameters == close(seen["parameters"])
        assert stage.states.gradients == close(seen["gradients"])
        assert stage.states.optimizer == close(seen["optimizer"])
        assert stage.activations[plan.recompute] == close(seen["activations"])
        sent = stage.sent
        assert sent["tensor"] + sent["shares"] == close(seen["sent"]["tensor"])
        assert sent["context"] == close(seen["sent"]["context"])
        assert sent["expert"] == close(seen["sent"]["expert"])
        assert sent["pipeline"] == close(seen["sent"]["pipeline"])
        assert sent["gradients"] + sent["parameters"] == close(seen["sent"]["data"])
        assert sent["tied embedding"] == close(seen["sent"]["tied"])


@pytest.mark.parametrize("name", ON_DEEPSPEED)
def test_deepspeed_holds_and_sends_what_was_planned(measured, name):
    job = ON_DEEPSPEED[name]
    (stage,) = planned(job).stages
    # The bucket of ZeRO 1 and 2 is gone when Adam runs, where it was measured.
    buffers = stage.states.buffers
    if job["engine"]["zero_stage"] == 3:
        # The bucket stays, and what is kept whole from forward to backward is gone.
        buffers = 2 * stage.states.parameters
    for seen in (ranks[name] for ranks in measured):
        assert stage.states.on_device - buffers == close(seen["held"])
        assert stage.sent["gradients"] == close(seen["sent"]["gradients"])
        assert stage.sent["parameters"] == close(seen["sent"]["parameters"])


def test_the_comparison_has_something_to_compare(measured):
    for name, kind in (
        ("TP2", "tensor"),
        ("CP2", "context"),
        ("PP2", "pipeline"),
        ("PP2", "tied"),
        ("DP2", "data"),
        ("EP2", "expert"),
    ):
        assert measured[0][name]["sent"][kind] > 0
    assert len({measured[0][name]["activations"] for name in ON_MEGATRON}) == len(ON_MEGATRON)


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), st.data())
@settings(derandomize=True, deadline=None)
def test_what_is_in_flight(stages, chunks, groups, data):
    """With equal chunks the peak is the warm-up and one more, as mcore's schedules have it."""
    stage, micro_batches = data.draw(st.integers(0, stages - 1)), groups * stages
    warm_up = stages - stage - 1 if chunks == 1 else 2 * (stages - stage - 1) + (chunks - 1) * stages
    assert in_flight([1.0] * chunks, stage, stages, micro_batches) == min(warm_up + 1, micro_batches * chunks)
    uneven = [float(10**i) for i in range(chunks)]
    assert max(uneven) <= in_flight(uneven, stage, stages, micro_batches) <= micro_batches * sum(uneven)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["gated_delta_net", "full_attention", "sliding_window_attention", "hgrn"])
@pytest.mark.parametrize("cut_to", [Cut(), Cut(tensor=2, sequence=True), Cut(context=2)])
def test_long_sequences_lie_on_the_line(monkeypatch, pattern, cut_to):
    model = MODEL | {"mixers": {"pattern": pattern}}
    config = from_mapping(PlanConfig, {"model": model}).model
    extrapolated = DryRun(config, VOCAB, torch.float32)
    whole = DryRun(config, VOCAB, torch.float32)
    tokens, parts = 1024, EVERYTHING
    with monkeypatch.context() as patch:
        patch.setattr("trainer.planning.dry_run._STEP", 128)
        line, line_ends = extrapolated.layer(0, cut_to, tokens, parts, True), extrapolated.ends(cut_to, tokens)
    monkeypatch.setattr("trainer.planning.dry_run._STEP", tokens)
    monkeypatch.setattr("trainer.planning.dry_run._HEAD_STEP", tokens)
    direct, direct_ends = whole.layer(0, cut_to, tokens, parts, True), whole.ends(cut_to, tokens)
    assert line.kept == pytest.approx(direct.kept, rel=0.02)
    assert line.sent == pytest.approx(direct.sent, rel=0.02)
    for one, other in zip(line_ends, direct_ends, strict=True):
        assert one.kept == pytest.approx(other.kept, rel=0.02)
        assert one.sent == pytest.approx(other.sent, rel=0.02)


def test_pipelines_wait_for_their_ends():
    pipeline = {"pipeline": 2}
    plan = planned(values(pipeline, global_batch_size=8), inter_node=1e9, intra_node=1e9)
    busy = max(stage.seconds for stage in plan.stages)
    assert plan.bubble == pytest.approx(1 / 9, rel=1e-3)
    assert plan.seconds == pytest.approx(busy * 9 / 8, rel=1e-3)


def test_recomputation_costs_time_and_saves_memory():
    plans = [planned(values(recompute=choice)) for choice in ("none", "selective", "full")]
    assert plans[0].seconds < plans[1].seconds < plans[2].seconds
    assert plans[0].utilization > plans[1].utilization > plans[2].utilization
    kept = [plan.stages[0].activations[plan.recompute] for plan in plans]
    assert kept[0] > kept[1] > kept[2]


def test_recomputing_parts_of_experts_can_be_planned():
    """Every choice that training takes is planned, also one that the others are not compared with."""
    experts = {"num_experts": 4, "router": {"top_k": 2}}
    asked = {"recompute": "selective", "recompute_modules": ["moe_activation", "mixer"]}
    plan = planned(values(experts=experts, **asked))
    kept = plan.stages[0].activations
    assert plan.recompute == "selective [mixer, moe_activation]" and plan.memory() == plan.memory(plan.recompute)
    assert kept["none"] > kept["selective [moe_activation]"] > kept["selective [moe_experts]"]
    assert kept["selective [mixer]"] > kept[plan.recompute] > kept["full"]
    assert "moe" not in "".join(planned(values()).stages[0].activations)


def kept_by_block(config, policy, tokens):
    """Bytes that a real block keeps for backward, each storage once; neither parameters nor what layers share."""
    model = Decoder(config, VOCAB)
    initialize(model, 1)
    model.keep(Policy(policy))
    (block,), (info,) = model.layers.values(), model._layer_infos(torch.arange(tokens)[None], None)
    shared = [x for x in (info.cos, info.sin, info.lower_bound) if x is not None]
    known = {x.untyped_storage().data_ptr() for x in [*model.parameters(), *shared]}
    sizes, alive = {}, []

    def pack(tensor):
        # Alive, so that no other storage gets its address.
        alive.append(tensor)
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    x = torch.randn(tokens, 1, config.hidden_size).requires_grad_()
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        block(x, info)
    return sum(size for key, size in sizes.items() if key not in known)


def accepted(experts):
    """Every configuration of what is recomputed that is not refused, for a model of one layer."""
    modules = get_args(get_args(get_args(get_type_hints(TrainConfig)["recompute_modules"])[0])[0])
    chosen = [None, *(list(some) for n in range(1, 5) for some in itertools.combinations(modules, n))]
    for recompute, named, above in itertools.product(("none", "selective", "full"), chosen, (None, 0.9, 1.5)):
        train = {"recompute": recompute} | ({} if named is None else {"recompute_modules": named})
        job = values(experts=experts and experts | {"recompute_above": above}, **train)
        job["model"] = job["model"] | {"num_layers": 1, "mixers": {"pattern": "full_attention"}}
        if above is None or experts:
            with suppress(ConfigError):
                yield configuration(job)


@pytest.mark.parametrize(
    ("experts", "number"),
    [({}, 6), ({"num_experts": 4, "router": {"top_k": 4}, "shared_experts": 1, "activation": "geglu"}, 36)],
    ids=["dense", "experts"],
)
def test_every_choice_that_training_takes_is_planned_to_the_byte(experts, number):
    """Every token goes to every expert: as balanced as planned, with all of them busy or none."""
    configs, sizes = list(accepted(experts)), {}
    assert len(configs) == number
    for config in configs:
        plan = Planner(config, VOCAB).plan(config)
        policy = choices(config)[plan.recompute]
        real = kept_by_block(config.model, policy, 64)
        assert dry_run(config.model, VOCAB, torch.float32).kept(0, Cut(), 64, policy) == real, policy
        above = config.model.moe.recompute_above if experts else None
        sizes[plan.recompute, above] = real
        assert plan.memory() >= real and "fits" in describe(plan)
    assert len({size for (_, above), size in sizes.items() if above is None}) == len(sizes) / (3 if experts else 1)


def test_what_is_compressed_is_planned_to_the_byte():
    config = configuration(values(experts={"num_experts": 4, "router": {"top_k": 4}})).model
    config = replace(config, num_layers=1, mixers=MixerLayoutConfig(pattern="full_attention"))
    run = dry_run(config, VOCAB, torch.float32)
    compressed = BlockPolicy(block=COMPRESS, compression=Compression(min_bytes=0))
    parts = replace(compressed, block=KEEP, mixer=RECOMPUTE, ffn=COMPRESS)
    for policy in (compressed, parts, replace(compressed, moe_experts=RECOMPUTE), replace(compressed, block=RECOMPUTE)):
        assert run.kept(0, Cut(), 64, policy) == kept_by_block(config, policy, 64) < run.kept(0, Cut(), 64, EVERYTHING)


def test_stages_and_modules_are_compressed_as_configured():
    """Early stages hold more micro-batches, and may store them in fewer bits; the report has every layer's bytes."""
    settings = {"bits": 8, "group": 16, "min_bytes": 0}
    eight = planned(values({"pipeline": 2}, compression=settings))
    staged = planned(values({"pipeline": 2}, compression=settings | {"by_stage": {0: 4}}))
    whole = planned(values({"pipeline": 2}))
    assert not whole.by_layer and [plain for plain, _ in eight.by_layer] == [plain for plain, _ in staged.by_layer]
    pairs = list(zip(staged.by_layer, eight.by_layer, strict=True))
    assert all(ours < theirs for (_, ours), (_, theirs) in pairs[:2])
    assert all(ours == theirs for (_, ours), (_, theirs) in pairs[2:])
    for stage, more in ((0, True), (1, False)):
        kept, of_eight = (plan.stages[stage].activations["none"] for plan in (staged, eight))
        assert (kept < of_eight) is more and of_eight < whole.stages[stage].activations["none"]
    assert "compressed" in describe(staged) and "compressed" not in describe(whole)
    # What is said of a module goes before what is said of its stage.
    finer = planned(values({"pipeline": 2}, compression=settings | {"by_stage": {0: 4}, "modules": {"*": {"bits": 8}}}))
    assert finer.by_layer == eight.by_layer
    with pytest.raises(ValueError, match="by_stage has stage 2"):
        planned(values({"pipeline": 2}, compression=settings | {"by_stage": {2: 4}}))


def test_slow_networks_are_charged_to_those_who_cross_them():
    near, far = values({"context": 2}), values()
    fast = {"intra_node": 100.0, "inter_node": 100.0}
    slow = {"intra_node": 100.0, "inter_node": 0.001}
    assert planned(near, **slow).seconds == planned(near, **fast).seconds
    alone = {"nodes": 2, "devices": 1}
    assert planned(far, **alone, **slow).seconds > 2 * planned(far, **alone, **fast).seconds


def test_the_report_and_the_values_agree():
    plan = planned(values({"pipeline": 2}))
    text, plain = describe(plan), as_values(plan)
    assert "pipeline=2" in text and "fits" in text and plain["fits"]
    assert len(plain["stages"]) == 2 and set(plain["stages"][0]["activations"]) == set(choices(plan.config))
    assert plain["memory"] == plan.memory()
    json.dumps(plain)


def test_what_does_not_fit_says_what_would():
    job = values(recompute="none", micro_batch_size=2)
    whole = planned(job)
    least = whole.memory("full")
    just_enough = least / 0.9 / 1e9 * 1.001
    assert "use train.recompute=" in verdict(planned(job, memory=just_enough))
    states = whole.stages[0].states.on_device
    assert "raise parallel.pipeline" in verdict(planned(job, memory=states / 1e9))
    assert verdict(planned(job, memory=states * 1.2 / 1e9)).startswith("does not fit: device memory is short by")


def test_search_finds_valid_layouts_that_fit():
    config = configuration(values(), memory=0.0025, usable=1.0)
    plans = search(config, Planner(config, VOCAB), print)
    assert plans and all(plan.fits for plan in plans)
    assert [plan.seconds for plan in plans] == sorted(plan.seconds for plan in plans)
    for plan in plans:
        plan.config.validate_layout(2)
    tried = list(layouts(config))
    assert len(tried) > len(plans)
    kinds = {(c.parallel.tensor, c.parallel.pipeline, c.parallel.virtual_pipeline, c.parallel.context) for c in tried}
    assert {(1, 1, 1, 1), (2, 1, 1, 1), (1, 2, 1, 1), (1, 2, 2, 1), (1, 1, 1, 2)} <= kinds
    assert "layout" in compare(plans, config)
    assert "no layout" in compare([], config)


def test_many_ranks_cost_no_more():
    """4096 ranks have no more distinct shards than their pipeline has stages."""
    job = values({"pipeline": 4, "context": 2, "tensor": 2}, global_batch_size=512)
    plan = planned(job, nodes=512, devices=8)
    assert len(plan.stages) == 4 and plan.data_parallel == 256
    assert math.isclose(plan.stages[0].states.optimizer, plan.stages[0].states.parameters * 2 / 512)


def command(*arguments):
    process = subprocess.run(
        [sys.executable, "launch/plan.py", *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    return process.returncode, process.stdout, process.stderr


LAPTOP = ("--config", "configs/pretrain/laptop.yaml", "--cluster", "configs/cluster/laptop.yaml")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--cluster.devices", "0"), "cluster.devices is 0: it must be positive"),
        (("--cluster.usable", "1.5"), "cluster.usable is 1.5: it is a share"),
        (("--cluster.device", "3"), "did you mean 'cluster.devices'?"),
        (("--cluster", "nowhere.yaml"), "nowhere.yaml"),
        (("--parallel.tensor", "3"), "world size 2 does not divide"),
        (("--json", "nowhere/plan.json"), "nowhere is no directory"),
        (("--train.recompute", "selective", "--train.recompute_modules", "[norm]"), "train.recompute_modules"),
        (("--train.compression.bits", "5"), "train.compression.bits"),
        (("--train.compression.bits", "8", "--train.compression.group", "0"), "train.compression.group=0 must be"),
        (
            ("--train.compression.bits", "8", "--train.compression.modules", "{layers.*.fnn.*: {bits: 4}}"),
            "train.compression.modules: 'layers.*.fnn.*' matches no tensor",
        ),
    ],
)
def test_bad_input_is_one_line(arguments, message):
    code, out, errors = command(*LAPTOP, *arguments)
    assert code == 2 and not out
    assert message in errors and len(errors.strip().splitlines()) == 1


def test_the_command(tmp_path):
    code, out, errors = command(*LAPTOP, "--json", str(tmp_path / "plan.json"))
    assert code == 0 and not errors, errors
    assert out.strip().splitlines()[-1].startswith("fits:")
    assert json.loads((tmp_path / "plan.json").read_text())[0]["fits"]
    code, out = finish(start("launch/plan.py", *LAPTOP, "--cluster.memory", "0.02"))
    assert code == 1 and "does not fit" in out.strip().splitlines()[-1]
