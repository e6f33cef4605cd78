"""Compressed activations in every kind of layout. The noise is keyed by token and channel: all layouts round alike."""

import math

import pytest

from tests.parity.test_parity import STEPS, configuration, one_process, ranks_of, whole
from tests.parity.test_parity_moe import with_experts

__all__ = ["one_process"]

LAYOUTS = {
    "TP2": {"tensor": 2},
    "TP2+SP": {"tensor": 2, "sequence": True},
    "PP2": {"pipeline": 2},
    "PP2 interleaved": {"pipeline": 2, "virtual_pipeline": 2},
    "CP2": {"context": 2},
    "DP2": {"data": 2},
    "EP2 x DP2": {"expert": 2, "data": 2},
    "EP2 x TP2": {"expert": 2, "tensor": 2},
}
ATTENTION = "full_attention, full_attention, full_attention, full_attention"
HYBRID = "gated_delta_net, full_attention, gated_delta_net, full_attention"


def compressed(config, bits=8, **settings):
    """Everything, however small."""
    compression = {"bits": bits, "group": 16, "min_bytes": 0} | settings
    return config | {"train": config["train"] | {"compression": compression}}


def compare(ours, reference, plain, steps=STEPS):
    """What a layout trains is what one process trains, as far as float32 lets it, and not what other noise would do.

    A number that two layouts round differently in float32 may fall into the neighbouring code: one step of 255. That
    moves a gradient by a part of its noise, which is its distance from the plain one; other noise by some 1.4 of it.
    """
    ratios = []
    for name, gradient in ours["gradients"].items():
        same, exact = reference["gradients"][name], plain["gradients"][name]
        difference, noise = (float((gradient - other).norm() / exact.norm()) for other in (same, exact))
        assert difference < max(noise / 2, 1e-5), name
        ratios.append(difference / noise if noise > 1e-4 else 0.0)
    assert math.sqrt(sum(ratio**2 for ratio in ratios) / len(ratios)) < 0.1
    difference, noise = (
        max(abs(a[0] / b[0] - 1) for a, b in zip(ours["steps"][:steps], other["steps"], strict=False))
        for other in (reference, plain)
    )
    assert difference < noise / 4


def check(pools, one_process, layout, config, steps=STEPS):
    ranks, keys = ranks_of(LAYOUTS[layout])
    ours = whole(pools(ranks).run({"config": compressed(config(**keys)), "steps": STEPS}))
    compare(ours, one_process(compressed(config())), one_process(config()), steps)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["TP2", "TP2+SP", "PP2", "PP2 interleaved", "DP2"])
def test_hybrid(pools, one_process, layout):
    check(pools, one_process, layout, lambda **keys: configuration(HYBRID, **keys))


@pytest.mark.slow
def test_context_parallel_attention(pools, one_process):
    check(pools, one_process, "CP2", lambda **keys: configuration(ATTENTION, **keys))


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["EP2 x DP2", "EP2 x TP2"])
def test_experts(pools, one_process, layout):
    def config(**keys):
        values = with_experts("top-k", **keys)
        return values | {"model": values["model"] | {"mixers": {"pattern": HYBRID}}}

    # A gradient's small difference may send a token to another expert soon after.
    check(pools, one_process, layout, config, steps=2)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_deepspeed(pools, one_process, stage):
    """The same noise, and so the same numbers, from the other engine; under ZeRO 3 parameters leave between uses."""
    plain = configuration(HYBRID)
    config = compressed(plain | {"engine": {"name": "deepspeed", "zero_stage": stage}})
    ours = whole(pools(2).run({"config": config, "steps": STEPS}))
    compare(ours, one_process(compressed(plain)), one_process(plain))


@pytest.mark.slow
def test_micro_batches_of_another_size(pools, one_process):
    """A token's number is that in the batch of the step, however many micro-batches the batch is cut into."""
    ours = whole(pools(1).run({"config": compressed(configuration(HYBRID, micro=2)), "steps": STEPS}))
    compare(ours, one_process(compressed(configuration(HYBRID))), one_process(configuration(HYBRID)))
