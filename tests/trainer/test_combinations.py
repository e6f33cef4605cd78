"""The table of what goes together: each entry refuses what it says, and docs/parallelism.md is the table."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from models.config import ModelConfig, MoEConfig
from trainer import combinations
from trainer.combinations import CONFLICTS, FEATURES, TABLE_BEGIN, TABLE_END, as_markdown, refuse_unsupported, rewrite
from trainer.config import EngineConfig, ParallelConfig, PretrainConfig, TrainConfig

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "parallelism.md"

EXPERTS = ModelConfig(moe=MoEConfig(num_experts=6, shared_experts=1))

# For every feature, configurations that ask for it.
ASKING = {
    "engine.name=megatron": [PretrainConfig()],
    "engine.name=deepspeed": [PretrainConfig(engine=EngineConfig("deepspeed"))],
    "engine.zero_stage=0": [PretrainConfig(engine=EngineConfig("deepspeed", 0))],
    "engine.zero_stage=1": [PretrainConfig(), PretrainConfig(engine=EngineConfig("deepspeed", 1))],
    "engine.zero_stage=2": [PretrainConfig(engine=EngineConfig("deepspeed", 2))],
    "engine.zero_stage=3": [PretrainConfig(engine=EngineConfig("deepspeed", 3))],
    "engine.offload=optimizer": [PretrainConfig(engine=EngineConfig("deepspeed", 1, "optimizer"))],
    "engine.offload=parameters": [PretrainConfig(engine=EngineConfig("deepspeed", 3, "parameters"))],
    "data parallel": [PretrainConfig()],
    "parallel.tensor>1": [PretrainConfig(parallel=ParallelConfig(tensor=2))],
    "parallel.sequence": [PretrainConfig(parallel=ParallelConfig(tensor=2, sequence=True))],
    "parallel.pipeline>1": [PretrainConfig(parallel=ParallelConfig(pipeline=2))],
    "parallel.virtual_pipeline>1": [
        PretrainConfig(parallel=ParallelConfig(pipeline=2, virtual_pipeline=2), train=TrainConfig(micro_batch_size=1))
    ],
    "parallel.context>1": [PretrainConfig(parallel=ParallelConfig(context=2))],
    "parallel.expert>1": [PretrainConfig(model=EXPERTS, parallel=ParallelConfig(tensor=2, expert=2))],
    "experts with parallel.tensor>1": [PretrainConfig(model=EXPERTS, parallel=ParallelConfig(tensor=2))],
    "train.precision=fp32": [PretrainConfig()],
    "train.precision=bf16": [PretrainConfig(train=TrainConfig(precision="bf16"))],
}
PAIRS = [(feature, config) for feature in FEATURES for config in ASKING.get(feature.name, [])]


def test_every_feature_is_here():
    names = [feature.name for feature in FEATURES]
    assert len(names) == len(set(names))
    assert set(names) == set(ASKING)
    assert {name for pair in CONFLICTS for name in pair} <= set(names)


@pytest.mark.parametrize(("feature", "config"), PAIRS, ids=[feature.name for feature, _ in PAIRS])
def test_what_is_missing_is_refused_and_the_rest_runs(feature, config):
    assert feature.asked(config)
    if not feature.missing:
        parallel = config.parallel
        config.validate_layout(parallel.tensor * parallel.pipeline * parallel.context)
        return
    # 8 ranks fit every layout above, so the world size is no reason to refuse.
    with pytest.raises(ValueError, match=re.escape(feature.missing)) as error:
        config.validate_layout(8)
    assert str(error.value) == f"{feature.name} is not supported: {feature.missing}"
    assert "; use " in feature.missing


def test_a_plain_run_asks_for_nothing_that_is_missing():
    assert not any(feature.asked(PretrainConfig()) and feature.missing for feature in FEATURES)


@pytest.mark.parametrize(
    ("engine", "reason"),
    [
        (EngineConfig("megatron", 0), "its distributed optimizer is ZeRO 1"),
        (EngineConfig("megatron", 2), "its distributed optimizer is ZeRO 1"),
        (EngineConfig("megatron", 3), "its distributed optimizer is ZeRO 1"),
        (EngineConfig("megatron", 1, "optimizer"), "keeps everything on the device"),
        (EngineConfig("megatron", 1, "parameters"), "keeps everything on the device"),
        (EngineConfig("deepspeed", 0, "optimizer"), "ZeRO offloads what it shards"),
        (EngineConfig("deepspeed", 0, "parameters"), "only ZeRO 3 shards parameters"),
        (EngineConfig("deepspeed", 1, "parameters"), "only ZeRO 3 shards parameters"),
        (EngineConfig("deepspeed", 2, "parameters"), "only ZeRO 3 shards parameters"),
    ],
    ids=lambda value: f"{value.name}-{value.zero_stage}-{value.offload}" if isinstance(value, EngineConfig) else "",
)
def test_what_an_engine_does_not_have_is_refused(engine, reason):
    with pytest.raises(ValueError, match=reason) as error:
        PretrainConfig(engine=engine).validate_layout(2)
    assert " is not supported: " in str(error.value) and "; use " in str(error.value)


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("sequence", [False, True])
def test_deepspeed_has_tensor_parallel_and_refuses_the_other_cuts(stage, sequence):
    engine = EngineConfig("deepspeed", stage)
    PretrainConfig(engine=engine, parallel=ParallelConfig(tensor=2, sequence=sequence)).validate_layout(2)
    for parallel in (ParallelConfig(pipeline=2), ParallelConfig(context=2), ParallelConfig(tensor=2, context=2)):
        with pytest.raises(ValueError, match=r"use engine\.name=megatron"):
            PretrainConfig(engine=engine, parallel=parallel).validate_layout(4)


def test_deepspeed_without_zero_is_for_float32():
    config = PretrainConfig(engine=EngineConfig("deepspeed", 0), train=TrainConfig(precision="bf16"))
    with pytest.raises(ValueError, match=r"engine.zero_stage=0 with train.precision=bf16 .* use engine.zero_stage=1"):
        config.validate_layout(2)


@pytest.mark.parametrize("turned", [False, True])
def test_conflicts_are_refused_in_either_order(monkeypatch, turned):
    pair = ("train.precision=bf16", "data parallel")
    monkeypatch.setattr(combinations, "CONFLICTS", {pair[::-1] if turned else pair: "for a test; use fp32"})
    refuse_unsupported(PretrainConfig())
    with pytest.raises(ValueError, match="is not supported: for a test; use fp32"):
        refuse_unsupported(PretrainConfig(train=TrainConfig(precision="bf16")))
    assert "| for a test; use fp32 |" in as_markdown()


@pytest.mark.parametrize(
    ("world_size", "micro", "batch", "accumulation"), [(1, 8, 8, 1), (1, 2, 8, 4), (4, 2, 8, 1), (2, 2, 12, 3)]
)
def test_layouts_that_divide(world_size, micro, batch, accumulation):
    config = PretrainConfig(train=TrainConfig(micro_batch_size=micro, global_batch_size=batch))
    config.validate_layout(world_size)
    assert config.train.accumulation(config.parallel.data_parallel(world_size)) == accumulation


def test_layouts_that_do_not_divide():
    config = PretrainConfig(train=TrainConfig(micro_batch_size=2, global_batch_size=8))
    with pytest.raises(ValueError, match="times 3 data-parallel ranks; use a multiple of 6"):
        config.validate_layout(3)
    message = r"world size 3 does not divide by tensor\*pipeline\*context=2; start a multiple of 2"
    with pytest.raises(ValueError, match=message):
        ParallelConfig(tensor=2).data_parallel(3)
    assert ParallelConfig(tensor=2, pipeline=2, context=2).data_parallel(24) == 3


def test_the_page_is_the_table():
    page = PAGE.read_text()
    assert page.count(TABLE_BEGIN) == page.count(TABLE_END) == 1
    between = page.split(TABLE_BEGIN)[1].split(TABLE_END)[0]
    assert between == as_markdown(), "run `python -m trainer.combinations docs/parallelism.md`"


def test_the_table_is_one_row_for_each_feature():
    rows = as_markdown().splitlines()[2:]
    assert len(rows) == len(FEATURES) + len(CONFLICTS)
    for row, feature in zip(rows, FEATURES, strict=False):
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert cells == [f"`{feature.name}`", "no" if feature.missing else "yes", feature.missing]


def test_the_command_rewrites_the_page(tmp_path):
    stale = tmp_path / "page.md"
    stale.write_text(f"before\n{TABLE_BEGIN}old\n{TABLE_END}after\n")
    subprocess.run([sys.executable, "-m", "trainer.combinations", str(stale)], cwd=ROOT, check=True)
    expected = f"before\n{TABLE_BEGIN}{as_markdown()}{TABLE_END}after\n"
    assert stale.read_text() == expected == rewrite(expected)


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        (ParallelConfig(tensor=3), "model.ffn_hidden_size=768 does not divide|does not divide by parallel.tensor=3"),
        (ParallelConfig(tensor=8), r"num_heads=4 does not divide by parallel.tensor=8; use a divisor of 4"),
        (ParallelConfig(sequence=True), "parallel.sequence cuts over the tensor-parallel ranks.*use parallel.tensor=2"),
        (ParallelConfig(pipeline=16), "makes 16 stages of 8 layers; use at most 8 stages"),
        (ParallelConfig(virtual_pipeline=2), "virtual_pipeline interleaves pipeline stages"),
        (ParallelConfig(pipeline=2, virtual_pipeline=2), "needs a multiple of parallel.pipeline=2 micro-batches"),
        (ParallelConfig(pipeline=2, pipeline_layers=[8]), "must be 2 positive numbers that add up to 8 layers"),
        (ParallelConfig(pipeline=2, pipeline_layers=[8, 0]), "must be 2 positive numbers that add up to 8 layers"),
        (ParallelConfig(context=3), "train.seq_len=512 does not divide over 3 ranks that share a sequence"),
    ],
    ids=str,
)
def test_layouts_that_do_not_fit_the_model_are_refused(parallel, message):
    world_size = parallel.tensor * parallel.pipeline * parallel.context
    with pytest.raises(ValueError, match=message):
        PretrainConfig(parallel=parallel).validate_layout(world_size)


@pytest.mark.parametrize(
    ("model", "parallel", "world_size", "message"),
    [
        (ModelConfig(), ParallelConfig(expert=2), 2, "expert=2 shares experts, of which the model has none"),
        (
            EXPERTS,
            ParallelConfig(expert=4),
            4,
            "num_experts=6 does not divide by parallel.expert=4; use a divisor of 6",
        ),
        (
            EXPERTS,
            ParallelConfig(expert=2),
            1,
            "expert=2 does not divide the tensor*context*data=1 ranks of a pipeline",
        ),
        (EXPERTS, ParallelConfig(expert=2, pipeline=2), 2, "does not divide the tensor*context*data=1 ranks"),
        (EXPERTS, ParallelConfig(expert=3, tensor=2), 4, "does not divide the tensor*context*data=4 ranks"),
    ],
)
def test_experts_that_do_not_fit_the_ranks_are_refused(model, parallel, world_size, message):
    train = TrainConfig(micro_batch_size=1)
    with pytest.raises(ValueError, match=re.escape(message)):
        PretrainConfig(model=model, parallel=parallel, train=train).validate_layout(world_size)


def test_experts_turn_sequence_parallel_on():
    """Tensor-parallel ranks would else route the same tokens; a sequence that they cannot share is refused."""
    config = PretrainConfig(model=EXPERTS, parallel=ParallelConfig(tensor=2))
    assert config.parallel.sequence
    assert not PretrainConfig(model=EXPERTS).parallel.sequence
    assert not PretrainConfig(parallel=ParallelConfig(tensor=2)).parallel.sequence
    config.train.seq_len = 511
    with pytest.raises(ValueError, match=r"train.seq_len=511 does not divide over 2 ranks .* parallel.sequence=true"):
        config.validate_layout(2)


@pytest.mark.parametrize(("width", "shared", "message"), [(30, 1, None), (31, 1, "shared_experts"), (31, 0, None)])
def test_shared_experts_are_cut_and_routed_ones_are_whole(width, shared, message):
    moe = MoEConfig(num_experts=4, shared_experts=shared, expert_hidden_size=width)
    config = PretrainConfig(model=ModelConfig(moe=moe, ffn_hidden_size=7), parallel=ParallelConfig(tensor=2))
    if message is None:
        config.validate_layout(2)
        return
    with pytest.raises(ValueError, match=message):
        config.validate_layout(2)


def test_stages_share_the_layers():
    assert ParallelConfig(pipeline=3).stage_layers(8) == [range(3), range(3, 6), range(6, 8)]
    assert ParallelConfig(pipeline=2, pipeline_layers=[1, 3]).stage_layers(4) == [range(1), range(1, 4)]
    assert ParallelConfig(pipeline=2, virtual_pipeline=2).stage_layers(4) == [range(i, i + 1) for i in range(4)]
