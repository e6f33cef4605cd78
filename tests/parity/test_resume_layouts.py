"""A run that is saved in the middle goes on as if it had not been: to the last bit in its own layout, to rounding in
another, whatever the model, the layout, the engine, the precision, and whether the save was beside the training.

A sample of all combinations, the same every time. Those in QUICK have been wrong once, or are unlike the rest.
"""

import random
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.parity.test_parity import configuration
from trainer.engines.pieces import Piece, Reader

HALF, LAST = 2, 4

# Ranks along each dimension, `data` among them; what is not here is 1.
LAYOUTS = {
    "one rank": {},
    "TP2": {"tensor": 2},
    "TP2+SP": {"tensor": 2, "sequence": True},
    "PP2": {"pipeline": 2},
    "PP2 [3,1]": {"pipeline": 2, "pipeline_layers": [3, 1]},
    "PP2 [1,3]": {"pipeline": 2, "pipeline_layers": [1, 3]},
    "PP2 interleaved": {"pipeline": 2, "virtual_pipeline": 2},
    "PP4": {"pipeline": 4},
    "PP2 x DP2": {"pipeline": 2, "data": 2},
    "TP2 x PP2": {"tensor": 2, "pipeline": 2},
    "TP2 x DP2": {"tensor": 2, "data": 2},
    "CP2": {"context": 2},
    "CP2 x DP2": {"context": 2, "data": 2},
    "CP2 x PP2": {"context": 2, "pipeline": 2},
    "DP2": {"data": 2},
    "DP3": {"data": 3},
    "DP4": {"data": 4},
    "EP2 x DP2": {"expert": 2, "data": 2},
    "EP4 x DP4": {"expert": 4, "data": 4},
    "EP2 of DP4": {"expert": 2, "data": 4},
    "EP2 x TP2": {"expert": 2, "tensor": 2},
    "EP2 x PP2": {"expert": 2, "pipeline": 2, "data": 2},
    "EP2 x CP2": {"expert": 2, "context": 2},
}
ENGINES = {
    "megatron": {"name": "megatron"},
    "ZeRO-0": {"name": "deepspeed", "zero_stage": 0},
    "ZeRO-1": {"name": "deepspeed", "zero_stage": 1},
    "ZeRO-2": {"name": "deepspeed", "zero_stage": 2},
    "ZeRO-3": {"name": "deepspeed", "zero_stage": 3},
    "ZeRO-2 offload": {"name": "deepspeed", "zero_stage": 2, "offload": "optimizer"},
    "ZeRO-3 offload": {"name": "deepspeed", "zero_stage": 3, "offload": "parameters"},
}
_EXPERTS = {
    "num_experts": 4,
    "shared_experts": 1,
    "expert_hidden_size": 32,
    "router": {"top_k": 2, "bias_update_rate": 0.01},
    "losses": {"balance": 0.1},
}
_HYBRID = "gated_delta_net, full_attention, hgrn, sliding_window_attention"
# Keys of the model; of 4 layers each.
MODELS = {
    "tied": {"mixers": {"pattern": _HYBRID}, "tie_embeddings": True},
    "untied": {"mixers": {"pattern": _HYBRID}, "tie_embeddings": False},
    "odd widths": {
        "mixers": {"pattern": _HYBRID},
        "hidden_size": 40,
        "ffn_hidden_size": 56,
        "attention": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "window": 12},
        "tie_embeddings": True,
    },
    "wide": {"mixers": {"pattern": _HYBRID}, "hidden_size": 96, "tie_embeddings": True},
    "bounds in every layer": {"mixers": {"pattern": "hgrn"}, "tie_embeddings": True},
    "linear layers first": {
        "mixers": {"pattern": "gated_delta_net, gated_delta_net, full_attention, full_attention"},
        "tie_embeddings": True,
    },
    # Their weights are parameters of two numbers: fewer than there are ranks.
    "branches": {"mixers": {"pattern": "hgrn + full_attention, gated_delta_net"}, "tie_embeddings": False},
    "experts": {"mixers": {"pattern": _HYBRID}, "tie_embeddings": True, "moe": _EXPERTS | {"dense_layers": [1]}},
    "experts in the first layers": {
        "mixers": {"pattern": _HYBRID},
        "tie_embeddings": True,
        "moe": _EXPERTS | {"dense_layers": [1, 2, 3]},
    },
    "experts spawned before the save": {
        "mixers": {"pattern": _HYBRID},
        "tie_embeddings": False,
        "moe": _EXPERTS | {"dense_layers": [1], "spawn_step": 1, "spawn_diversify": 0.1},
    },
    "experts spawned after it": {
        "mixers": {"pattern": _HYBRID},
        "tie_embeddings": True,
        "moe": _EXPERTS | {"dense_layers": [0, 1], "spawn_step": 3, "spawn_diversify": 0.1},
    },
    "copies of busy experts": {
        "mixers": {"pattern": "full_attention"},
        "tie_embeddings": True,
        "moe": _EXPERTS | {"replicated_experts": 1, "replicate_above": 1.0},
    },
}
# Rows of the embedding that two ranks can share but no alignment of mcore's divides; those of other tests' data.
VOCABULARIES = {"odd widths": 74, "wide": 512}


@dataclass(frozen=True)
class Case:
    """A combination.

    Attributes:
        moved: The layout in which the run goes on as well, with the same engine.
        recompute: train.recompute.
        skipped: Whether the step before the save is skipped, so that Adam's step is not the run's.
    """

    layout: str
    model: str
    engine: str = "megatron"
    precision: str = "fp32"
    in_background: bool = False
    moved: str = "one rank"
    recompute: str = "none"
    skipped: bool = False

    def __str__(self):
        marks = [self.precision, *["in background"] * self.in_background, *["skipped"] * self.skipped]
        marks += [f"recompute {self.recompute}"] * (self.recompute != "none")
        return f"{self.layout}, {self.model}, {self.engine}, {', '.join(marks)}, to {self.moved}"

    def can_run(self):
        """Whether there is such a run; by the rules of trainer.combinations, without its parser."""
        return all(self._can_run_in(LAYOUTS[layout]) for layout in (self.layout, self.moved))

    def _can_run_in(self, layout):
        experts = "moe" in MODELS[self.model]
        if layout.get("expert", 1) > 1 and not experts:
            return False
        if self.engine == "megatron":
            return True
        other = {"pipeline", "context", "expert"} & layout.keys()
        unsupported = other or (experts and "tensor" in layout)
        return not unsupported and not (self.engine == "ZeRO-0" and self.precision == "bf16")

    def config(self, layout):
        """Ranks, and the configuration as plain values."""
        keys = dict(LAYOUTS[layout])
        data = keys.pop("data", 1)
        ranks = data
        for name in ("tensor", "pipeline", "context"):
            ranks *= keys.get(name, 1)
        plain = configuration(**keys)
        # 12 samples are an even share for one to four data-parallel ranks, a multiple of two micro-batches each.
        train = {"seq_len": 32, "global_batch_size": 12, "precision": self.precision, "recompute": self.recompute}
        return ranks, plain | {
            "model": plain["model"] | MODELS[self.model],
            "train": plain["train"] | {"micro_batch_size": 3 if data != 3 else 2, "steps": LAST} | train,
            "engine": ENGINES[self.engine],
        }


QUICK = [
    # A tied embedding in a bucket of its own, behind one whose end is padded.
    Case("PP2 [1,3]", "tied", moved="PP2"),
    Case("PP2", "wide", moved="DP2", in_background=True),
    # A stage that updates no expert.
    Case("PP2", "experts in the first layers", moved="EP2 x DP2"),
    # Two stages of one rank with a parameter of the same name.
    Case("PP2 interleaved", "bounds in every layer", moved="TP2"),
    Case("EP2 x DP2", "experts spawned after it", precision="bf16", in_background=True),
    # Ranks that have no part of a parameter.
    Case("DP2", "branches", engine="ZeRO-1", moved="one rank", precision="bf16"),
    Case("TP2+SP", "odd widths", moved="CP2", skipped=True),
]
CASES = 66


def sample():
    """QUICK, then a draw in which every layout, model and engine comes again and again."""
    draw = random.Random(5)
    cases = list(QUICK)
    others = [name for name in ENGINES if name != "megatron"]
    while len(cases) < CASES:
        place = len(cases)
        engine = "megatron" if place % 5 < 3 else others[place // 5 % len(others)]
        case = Case(
            list(LAYOUTS)[place % len(LAYOUTS)] if engine == "megatron" else draw.choice(list(LAYOUTS)),
            draw.choice(list(MODELS)),
            engine,
            draw.choice(["fp32", "fp32", "bf16"]),
            draw.random() < 0.5,
            draw.choice(list(LAYOUTS)),
            draw.choice(["none", "none", "full"]),
            engine in ("megatron", "ZeRO-0") and draw.random() < 0.3,
        )
        if case.can_run() and case not in cases:
            cases.append(case)
    return cases


def check(pools, tmp_path, case):
    saved, again = str(tmp_path / "state"), str(tmp_path / "again")
    ranks, config = case.config(case.layout)
    common = {"vocab": VOCABULARIES.get(case.model, 64), "config": config, "steps": LAST}
    whole = common | {"save": saved, "save_after": HALF, "in_background": case.in_background}
    if case.skipped:
        whole["skip"] = HALF - 1
    resumed = common | {"load": saved, "first_step": HALF}
    for result in pools(ranks).run({"jobs": [whole, resumed]}):
        uninterrupted, ours = result["results"]
        assert ours["steps"] == uninterrupted["steps"][HALF:]
        assert ours["validation"] == uninterrupted["validation"]
        assert ours["digest"] == uninterrupted["digest"], "parameters"
    ranks, config = case.config(case.moved)
    moved = common | {"config": config, "load": saved, "first_step": HALF, "save_again": again}
    for result in pools(ranks).run(moved):
        for mine, theirs in zip(result["steps"], uninterrupted["steps"][HALF:], strict=True):
            # In bfloat16 other ranks round elsewhere: the checkpoints say whether it is the same state.
            assert mine[0] == pytest.approx(theirs[0], rel=1e-6 if case.precision == "fp32" else 2e-3)
            assert mine[2] == theirs[2]
    assert_same_state(Path(saved), Path(again))


def assert_same_state(ours, theirs):
    """Parameters, float32 copies and moments, bit for bit; Adam's step."""
    mine, other = Reader(ours), Reader(theirs)
    assert mine.stored.keys() == other.stored.keys()
    assert mine.adam_step == other.adam_step
    for name, entry in mine.stored.items():
        first, second = (torch.empty(entry.size, dtype=entry.properties.dtype) for _ in range(2))
        mine.read({name: Piece.of(first)})
        other.read({name: Piece.of(second)})
        assert torch.equal(first.view(torch.uint8), second.view(torch.uint8)), name


@pytest.mark.parametrize(
    "case", [case if case in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in sample()], ids=str
)
def test_a_run_goes_on_as_if_it_had_not_been_interrupted(pools, tmp_path, case):
    check(pools, tmp_path, case)


# Of the boxes below, in float32.
BOX = 1024 * 4


@pytest.mark.parametrize(
    "layout", ["DP2", pytest.param("DP4", marks=pytest.mark.slow), pytest.param("TP2 x DP2", marks=pytest.mark.slow)]
)
def test_a_rank_writes_and_reads_its_share_and_gathers_nothing(pools, tmp_path, layout):
    """Parameters and two moments: three times what a rank updates, and a box where its share begins and where it ends.

    What is sent, all of it names and places, does not grow with the model, and is a few digests at the second save.
    """
    ranks, config = Case(layout, "wide").config(layout)
    job = {"config": config, "vocab": VOCABULARIES["wide"], "most_elements": BOX // 4, "folder": str(tmp_path)}
    results = pools(ranks).run(job | {"saves": 2})
    total = sum(sum(result["written"][:1]) for result in results)
    state = Reader(tmp_path / "0").stored.values()
    assert total == sum(4 * entry.size.numel() for entry in state), "everything, and nothing twice"
    for result in results:
        first, second = result["written"]
        # What tensor-parallel ranks have alike is written by one of them.
        assert first == second <= 3 * result["owned"] == result["read"]
        assert result["owned"] <= 1.1 * sum(other["owned"] for other in results) / ranks
        assert result["largest"] <= BOX
        assert result["sent"][0] > 10 * result["sent"][1] and result["sent"][1] < 4000
    # By another number of ranks: whole boxes, of which each end of a rank's range may need only a part.
    for other in {"DP2", "DP4", "one rank"} - {layout}:
        moved_ranks, moved = Case(other, "wide").config(other)
        for result in pools(moved_ranks).run(job | {"config": moved}):
            parameters = len(state) // 3
            assert 3 * result["owned"] <= result["read"] <= 3 * (result["owned"] + 2 * BOX * parameters)


def test_the_sample_has_everything():
    cases = sample()
    assert len(set(cases)) == CASES >= 60
    for field, names in (("layout", LAYOUTS), ("model", MODELS), ("engine", ENGINES)):
        assert {getattr(case, field) for case in cases} == set(names)
    assert {case.in_background for case in cases} == {case.skipped for case in cases} == {True, False}
