"""A training step asks the device for no number: on a GPU each would make the host wait for all work before it.

There is no GPU here, so reads are told by what does them. Every operation of a step is watched, forward and backward:
those that give the host a number, or whose result has a size that depends on numbers. Two kinds of reads are none on a
GPU, and are told apart by the code, not by this test:

    checks of integers on a CPU   stand behind `kernels.indices.on_host`, which is made to say no, as it would there
    what only a CPU does          reads through `kernels.indices.host_numbers`, which refuses any other device's tensor

What `Documents.made` lays out is made of bounds on the host: no tensor of the step is in its reach.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import indices
from kernels.documents import Documents
from kernels.moe import permutation
from models.config import MIXERS, DenseToSparseConfig, MoEConfig, RouterConfig, RouterLossConfig
from models.decoder import Decoder
from models.moe.statistics import begin_step
from models.saved_activations import RECOMPUTE, BlockPolicy, Policy
from tests.helpers import documents_of, draw_tokens, pack, tiny_decoder

# Operations that give the host a number, or a result of a size that only the numbers say.
READS = {"_local_scalar_dense", "equal", "is_nonzero", "masked_select", "nonzero", "unique_consecutive", "_unique2"}
LENGTHS = (3, 30, 1, 17, 70)


class Watch(TorchDispatchMode):
    """Notes every read, by the operation's name."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        kwargs = kwargs or {}
        if name in READS or (name == "repeat_interleave" and kwargs.get("output_size") is None):
            self.reads.append(name)
        places = args[1] if len(args) > 1 and isinstance(args[1], list | tuple) else ()
        if any(isinstance(place, Tensor) and place.dtype in (torch.bool, torch.uint8) for place in places):
            self.reads.append(f"{name} by a mask")
        if name == "_to_copy" and kwargs.get("device") not in (None, args[0].device):
            self.reads.append(f"copy to {kwargs['device']}")
        return func(*args, **kwargs)


@contextmanager
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The reads of what runs within, as on a device that is no CPU."""
    watch, tolist = Watch(), Tensor.tolist

    def watched_tolist(x: Tensor) -> Any:
        if sys._getframe(1).f_code is not indices.host_numbers.__code__:
            watch.reads.append("tolist")
        return tolist(x)

    with monkeypatch.context() as patch, watch:
        patch.setattr(Tensor, "tolist", watched_tolist)
        for module in (indices, permutation):
            patch.setattr(module, "on_host", lambda _: False)
        yield watch.reads


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x[0] > 0),
        lambda x: x.tolist(),
        lambda x: x[x > 0],
        lambda x: x.masked_fill(x > 0, 0).nonzero(),
        lambda x: x.unique(),
        lambda x: x.repeat_interleave(x.long().abs()),
        lambda x: x.to("meta"),
        lambda x: Documents.of(x.int()),
    ],
)
def test_the_watch_sees(read: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.arange(4.0)
    with watched(monkeypatch) as reads:
        read(x)
    assert len(reads) == 1, reads


def test_the_watch_sees_a_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    class Reading(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad * grad.sum().item()

    x = torch.ones(3, requires_grad=True)
    with watched(monkeypatch) as reads:
        Reading.apply(x).sum().backward()
    assert reads == ["_local_scalar_dense"]


def test_what_is_read_on_a_cpu_alone_refuses_others() -> None:
    assert indices.host_numbers(torch.arange(3)) == [0, 1, 2]
    with pytest.raises(AssertionError, match="wait for the device"):
        indices.host_numbers(torch.empty(3, device="meta"))


def step(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The reads of one forward and backward over packed documents, the first one that lays them out."""
    tokens, positions, _ = pack([draw_tokens(length, seed=length) for length in LENGTHS])
    mask = (torch.rand(tokens.shape, generator=torch.Generator().manual_seed(0)) < 0.9).float()
    model.train()
    begin_step([model], step=3)
    with watched(monkeypatch) as reads:
        loss, _ = model(tokens, positions, documents_of(LENGTHS), tokens.roll(-1, 1), mask)
        loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    return reads


@pytest.mark.parametrize("mixer", MIXERS)
def test_no_mixer_reads(mixer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert step(tiny_decoder(mixer), monkeypatch) == []


TOP_K = RouterConfig(top_k=2, score="sigmoid", normalize="after", bias_update_rate=0.1)
SPARSE = RouterConfig(gate="dense_to_sparse", dense_to_sparse=DenseToSparseConfig(threshold=0.2, gumbel_noise=True))
PATTERN = "gated_delta_net, gated_linear_attention, full_attention, hgrn + sliding_window_attention"


@pytest.mark.parametrize("recompute", [(), ("block",), ("mixer", "moe_activation"), ("moe_experts",)])
def test_a_hybrid_of_experts_reads_nothing(recompute: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    losses = RouterLossConfig(balance=0.01, z=0.001)
    moe = MoEConfig(num_experts=4, shared_experts=1, expert_hidden_size=16, router=TOP_K, losses=losses)
    model = tiny_decoder(PATTERN, num_layers=4, moe=moe)
    model.keep(Policy(BlockPolicy(**dict.fromkeys(recompute, RECOMPUTE))))
    assert step(model, monkeypatch) == []


@pytest.mark.parametrize(
    ("changes", "reads"),
    [
        # How many experts a token goes to is for its logits to say, or which of its rows fit: a number for each layer.
        ({"router": SPARSE}, ["nonzero"] * 2),
        ({"router": TOP_K, "capacity_factor": 1.0}, ["nonzero"] * 2),
        ({"router": TOP_K, "spawn_step": 5}, []),
    ],
)
def test_only_a_number_of_rows_that_nobody_knows_is_read(
    changes: dict[str, Any], reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    moe = MoEConfig(**{"num_experts": 4, "expert_hidden_size": 16} | changes)
    assert step(tiny_decoder("gated_delta_net", moe=moe), monkeypatch) == reads
