"""What backward keeps: hooks in any nesting, compression of activations alone, a policy for each block."""

import itertools
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from kernels.activations import swiglu
from kernels.matmul import linear
from kernels.norms import rms_norm
from models.config import MoEConfig, RouterConfig
from models.decoder import Decoder, initialize
from models.moe.layer import MoELayer
from models.saved_activations import (
    COMPRESS,
    EVERYTHING,
    KEEP,
    RECOMPUTE,
    BlockPolicy,
    Kept,
    Policy,
    as_it_is,
    compressing,
    hooks,
    run_region,
)
from tests.helpers import VOCABULARY, draw_tokens, tiny_model_config

ROWS, WIDTH = 24, 16


def bfloat16(x, place=""):
    """A codec that keeps float32 activations as bfloat16: half the bytes, eight bits of mantissa."""
    return Kept((x.to(torch.bfloat16),), torch.Tensor.float) if x.dtype == torch.float32 else as_it_is(x)


@dataclass(frozen=True)
class Every:
    """A policy's compression that stores everything by one codec."""

    store: Callable = bfloat16

    def codec(self):
        return self.store


class Count:
    """Bytes of the storages that it is told of, each once."""

    def __init__(self, known=()):
        self.known, self.sizes, self.alive = {x.untyped_storage().data_ptr() for x in known}, {}, []

    def keep(self, x):
        self.alive.append(x)
        storage = x.untyped_storage()
        if storage.data_ptr() not in self.known:
            self.sizes[storage.data_ptr()] = storage.nbytes()
        return as_it_is(x)

    @contextmanager
    def from_outside(self):
        """By torch's own hooks, which know of no others."""
        with saved_tensors_hooks(lambda x: self.keep(x).tensors[0], lambda x: x):
            yield

    @property
    def bytes(self):
        return sum(self.sizes.values())


def weights():
    generator = torch.Generator().manual_seed(0)
    shapes = (WIDTH,), (2 * WIDTH, WIDTH), (2 * WIDTH, WIDTH), (WIDTH, 2 * WIDTH)
    return [torch.randn(shape, generator=generator).mul_(0.3).requires_grad_() for shape in shapes]


def feed_forward(x, norm, gate, up, down):
    normed = rms_norm(x, norm, 1e-6)
    return linear(swiglu(linear(normed, gate), linear(normed, up)), down)


def run(*contexts, region=False):
    """The output and all gradients of a feed-forward within the contexts, the first one outermost."""
    parameters = weights()
    x = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1)).requires_grad_()
    entering = 2 * x
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context())
        y = run_region(feed_forward, entering, *parameters) if region else feed_forward(entering, *parameters)
    y.sin().sum().backward()
    return [y.detach(), *(leaf.grad for leaf in (x, *parameters))]


def equal(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def compressed():
    return compressing(bfloat16)


# x, what the norm gives, gate, up and their product; and a float32 for each row. Compressed half of the bytes of x,
# gate and up: the others are derived from them.
ACTIVATIONS = ROWS * WIDTH * 4 * (2 + 3 * 2)
OF_WEIGHTS = WIDTH * 4 + 3 * 2 * WIDTH * WIDTH * 4
FULL, HALF = ACTIVATIONS + ROWS * 4, ROWS * WIDTH * 4 * (1 + 2 * 2) // 2 + ROWS * 4


def test_hooks_see_what_those_within_them_keep():
    """A count outside of compression counts what is left, one within it what there was; the numbers are the same."""
    plain, rounded = run(), run(compressed)
    assert torch.equal(plain[0], rounded[0]) and not equal(plain, rounded)
    for kinds in itertools.permutations(("outside", "count", "compress", "count again")):
        counts = {kind: Count() for kind in kinds}
        contexts = {kind: partial(hooks, count.keep) for kind, count in counts.items()}
        contexts |= {"compress": compressed}
        if kinds[0] == "outside":
            # torch's own pair lets nothing through, so that it can only be the outermost.
            contexts["outside"] = counts["outside"].from_outside
        results = run(*(contexts[kind] for kind in kinds))
        assert equal(results, rounded), kinds
        for kind, count in counts.items():
            if kind != "compress":
                expected = HALF if kinds.index(kind) < kinds.index("compress") else FULL
                assert count.bytes - OF_WEIGHTS == expected, (kinds, kind)


def test_a_region_within_compression_keeps_what_enters_as_it_is():
    """Run on rounded tokens, it might be another one: a router would choose other experts."""
    count, whole = Count(), Count()
    results = run(count.from_outside, compressed, region=True)
    run(whole.from_outside, region=True)
    assert count.bytes == whole.bytes == ROWS * WIDTH * 4 + OF_WEIGHTS
    assert equal(results, run())


def test_within_a_region_nothing_is_compressed():
    """What is dropped at once need not be rounded: the numbers are those without compression."""

    def body(x, *parameters):
        with compressing(bfloat16):
            return feed_forward(x, *parameters)

    def whole(function):
        parameters = weights()
        x = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = function(2 * x, *parameters)
        y.sin().sum().backward()
        return [y.detach(), *(leaf.grad for leaf in (x, *parameters))]

    assert equal(whole(lambda *args: run_region(body, *args)), whole(feed_forward))


def test_each_tensor_is_the_one_that_was_saved():
    """Memory that is freed and used again is not taken for what lay there before."""
    x = torch.linspace(0.1, 1.0, 64).requires_grad_()
    expected, h = torch.ones(64), x.detach() * 1
    with compressing(bfloat16):
        y = 1 * x
        for _ in range(50):
            y = y.sin()
    for _ in range(50):
        expected = expected * h.bfloat16().float().cos()
        h = h.sin()
    y.sum().backward()
    assert torch.allclose(x.grad, expected, rtol=1e-5)
    assert not torch.allclose(x.grad, torch.autograd.grad(_sines(x), x)[0], rtol=1e-5)


def _sines(x):
    y = 1 * x
    for _ in range(50):
        y = y.sin()
    return y.sum()


def test_a_tensor_is_compressed_once_also_by_its_views():
    seen = []

    def codec(x, place):
        seen.append(x.shape)
        return bfloat16(x)

    x = torch.randn(4, 6, requires_grad=True)
    with compressing(codec):
        h = x.exp()
        (h.view(24).square().sum() + h.view(2, 12).square().sum() + h[:, :3].square().sum()).backward()
    # Saved by exp, by two squares of views of all of it, and by one of a part.
    assert seen == [(4, 6), (4, 3)]


def test_what_is_expanded_is_left_alone():
    x = torch.randn(1, 8, requires_grad=True)
    count = Count()
    with count.from_outside(), compressing(bfloat16):
        (2 * x).expand(1000, 8).square().sum()
    assert count.bytes == 8 * 4


def test_without_gradients_no_codec_runs():
    def refuse(x, place):
        raise AssertionError("nothing is kept here")

    config = tiny_model_config(num_layers=1)
    model = Decoder(config, VOCABULARY)
    initialize(model, 1)
    model.keep(Policy(BlockPolicy(block=COMPRESS, mixer=COMPRESS, compression=Every(refuse))))
    tokens = draw_tokens(1, 8)
    with torch.no_grad():
        model(tokens, torch.arange(8)[None])
    with pytest.raises(AssertionError, match="nothing is kept here"):
        model(tokens, torch.arange(8)[None])


def moe_results(policy, **moe):
    """Bytes that a layer keeps, its output, and all gradients."""
    config = tiny_model_config(
        moe=MoEConfig(num_experts=4, shared_experts=1, router=RouterConfig(top_k=2, normalize="after"), **moe)
    )
    layer = MoELayer(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.3, generator=generator)
    layer.policy = policy
    x = torch.randn(32, 1, 32, generator=generator).requires_grad_()
    count = Count(layer.parameters())
    with count.from_outside():
        y = policy.run("block", lambda: policy.run("ffn", layer, 1 * x))
    y.square().sum().backward()
    return count.bytes, y.detach(), [x.grad, *(p.grad for p in layer.parameters())]


@pytest.mark.parametrize("activation", ["swiglu", "geglu", "gelu", "relu_squared"])
def test_every_policy_of_a_mixture_of_experts(activation):
    """Recomputation to the last bit, compression up to rounding; each keeps no more than keeping everything."""
    everything, y, gradients = moe_results(EVERYTHING, activation=activation)
    choices = KEEP, RECOMPUTE, COMPRESS
    for block, experts, between, above in itertools.product((KEEP, COMPRESS), choices, choices, (None, 0.9)):
        policy = BlockPolicy(
            block=block, moe_experts=experts, moe_activation=between, recompute_above=above, compression=Every()
        )
        kept, output, others = moe_results(policy, activation=activation)
        assert torch.equal(output, y), policy
        if COMPRESS not in (block, experts, between):
            assert all(torch.equal(a, b) for a, b in zip(others, gradients, strict=True)), policy
        for a, b in zip(others, gradients, strict=True):
            assert (a - b).norm() <= 0.02 * b.norm(), policy
        if (block, experts, between, above) != (KEEP, KEEP, KEEP, None):
            assert kept < everything, policy


def test_blocks_keep_what_is_said_of_them():
    model = Decoder(tiny_model_config(num_layers=3), VOCABULARY)
    initialize(model, 1)

    def kept(policy):
        model.keep(policy)
        sizes = []
        for info, layer in zip(model._layer_infos(torch.arange(16)[None], None), model.layers.values(), strict=True):
            known = [x for x in (info.cos, info.sin, info.lower_bound) if x is not None]
            count = Count([*model.parameters(), *known])
            with count.from_outside():
                layer(torch.randn(16, 1, 32).requires_grad_() * 1, info)
            sizes.append(count.bytes)
        return sizes

    everything, recomputed = kept(Policy()), kept(Policy(BlockPolicy(block=RECOMPUTE)))
    compressed = kept(Policy(BlockPolicy(block=COMPRESS, compression=Every())))
    assert all(a > b > c for a, b, c in zip(everything, compressed, recomputed, strict=True))
    mixed = kept(
        Policy(EVERYTHING, {1: BlockPolicy(block=RECOMPUTE), 2: BlockPolicy(block=COMPRESS, compression=Every())})
    )
    assert mixed == [everything[0], recomputed[1], compressed[2]]
    # A stage of a pipeline goes by the numbers in the whole model.
    stage = Decoder(tiny_model_config(num_layers=3), VOCABULARY, range(1, 3))
    stage.keep(Policy(EVERYTHING, {1: BlockPolicy(block=RECOMPUTE)}))
    assert [block.policy.block for block in stage.layers.values()] == [RECOMPUTE, KEEP]
