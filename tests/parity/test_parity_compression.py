"""Compressed activations in every kind of layout. The noise is keyed by token and channel: all layouts round alike."""

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


def largest_difference(ours, reference, steps=STEPS):
    """Of the losses of some steps, and of the first step's gradients: relative, of each parameter as a whole."""
    losses = [abs(a[0] / b[0] - 1) for a, b in zip(ours["steps"][:steps], reference["steps"], strict=False)]
    gradients = [
        float((gradient - reference["gradients"][name]).norm() / reference["gradients"][name].norm())
        for name, gradient in ours["gradients"].items()
    ]
    return max(losses), max(gradients)


def check(pools, one_process, layout, config, losses=1e-5, steps=STEPS):
    """What a layout trains is what one process trains, and not what it trains without compression.

    A number that two layouts round differently in float32 may fall into the neighbouring code: one step of 255.
    """
    ranks, keys = ranks_of(LAYOUTS[layout])
    ours = whole(pools(ranks).run({"config": compressed(config(**keys)), "steps": STEPS}))
    loss, gradient = largest_difference(ours, one_process(compressed(config())), steps)
    plain_loss, plain_gradient = largest_difference(ours, one_process(config()), steps)
    assert loss < losses and gradient < 1e-3
    assert plain_loss > 2 * loss and plain_gradient > 10 * gradient


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

    # Then a code that fell otherwise has sent a token to another expert.
    check(pools, one_process, layout, config, losses=5e-5, steps=5)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_deepspeed(pools, one_process, stage):
    """The same noise, and so the same numbers, from the other engine; under ZeRO 3 parameters leave between uses."""

    def config(**keys):
        values = configuration(HYBRID, **keys)
        return values | ({"engine": {"name": "deepspeed", "zero_stage": stage}} if keys else {})

    ours = whole(pools(2).run({"config": compressed(config(tensor=1)), "steps": STEPS}))
    loss, gradient = largest_difference(ours, one_process(compressed(configuration(HYBRID))))
    plain_loss, _ = largest_difference(ours, one_process(configuration(HYBRID)))
    assert loss < 1e-5 and gradient < 1e-3 and plain_loss > 2 * loss


@pytest.mark.slow
def test_micro_batches_of_another_size(pools, one_process):
    """A token's number is that in the batch of the step, however many micro-batches the batch is cut into."""
    ours = whole(pools(1).run({"config": compressed(configuration(HYBRID, micro=2)), "steps": STEPS}))
    loss, gradient = largest_difference(ours, one_process(compressed(configuration(HYBRID))))
    assert loss < 1e-5 and gradient < 1e-3
