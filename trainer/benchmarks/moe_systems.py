"""Cost and savings of recomputation and expert replication in a mixture-of-experts layer on two ranks.

Nothing is timed. The benchmark counts the bytes that a layer keeps between forward and backward, the FLOPs of its
matrix products in both, and the bytes that ranks send. The load is uneven: on average over tokens the router prefers
the first experts, which live on the first rank.
"""

import gc
import json
import tempfile
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.multiprocessing.spawn import spawn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from models.parameters import Groups, shard
from models.saved_activations import EVERYTHING, RECOMPUTE, BlockPolicy
from trainer.benchmarks.moe_layers import Config, build_layer, largest_difference, make_inputs
from trainer.benchmarks.report import Comparison, say
from trainer.communication import SentBytes
from trainer.config import ParallelConfig, RunConfig

if TYPE_CHECKING:
    from models.moe.layer import MoELayer

RANKS = 2


@dataclass(frozen=True)
class Case:
    """The policy for tensors kept for backward, and keys of model.moe."""

    policy: BlockPolicy = EVERYTHING
    moe: dict[str, Any] = field(default_factory=dict)


CASES = {
    "none": Case(),
    "moe_activation": Case(BlockPolicy(moe_activation=RECOMPUTE)),
    "moe_experts": Case(BlockPolicy(moe_experts=RECOMPUTE)),
    "ffn": Case(BlockPolicy(ffn=RECOMPUTE)),
    "recompute_above=2": Case(BlockPolicy(recompute_above=2.0)),
    "replicated_experts=1": Case(moe={"replicated_experts": 1}),
    "replicated_experts=2": Case(moe={"replicated_experts": 2}),
    "replicated_experts=2 + recompute_above=2": Case(BlockPolicy(recompute_above=2.0), {"replicated_experts": 2}),
    "replicated_experts=2 + moe_experts": Case(BlockPolicy(moe_experts=RECOMPUTE), {"replicated_experts": 2}),
}


@dataclass(frozen=True)
class Figures:
    """A rank's figures of a case, forward and backward.

    Attributes:
        kept: Bytes that the forward allocated and backward needs, each storage once.
        flops: FLOPs of matrix products.
        tokens: Bytes sent to exchange tokens, with their gates, gradients and counts.
        weights: Bytes sent to replicate experts' weights, and to reduce the replicas' gradients.
        copied: Number of replicated experts.
        largest_load: The largest load of an expert over the mean load.
        difference: Relative difference of output and gradients from those of the case `none`.
    """

    kept: int
    flops: int
    tokens: int
    weights: int
    copied: int
    largest_load: float
    difference: float = 0.0


class _Made(TorchDispatchMode):
    """Tracks the storages that are allocated while the mode is active.

    Saved-tensor hooks would miss the tensors that the token dispatcher holds.
    """

    def __init__(self) -> None:
        super().__init__()
        self._sizes: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for x in tree_leaves(output):
            if isinstance(x, Tensor):
                storage = x.untyped_storage()
                # A weak reference keeps the address from being reused.
                self._sizes.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        return output

    def alive(self, known: list[Tensor]) -> int:
        """Return the bytes of the storages that still exist, except those of the `known` tensors."""
        gc.collect()
        others = {x.untyped_storage()._cdata for x in known}
        return sum(size for key, (storage, size) in self._sizes.items() if key not in others and not storage.expired())


def measure(config: Config) -> list[Comparison]:
    """Run all cases on two ranks, and compare them with the first, which recomputes and replicates nothing."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(_work, (config, folder), RANKS)
        by_rank = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(RANKS)]
    ranks = {name: [Figures(**figures[name]) for figures in by_rank] for name in CASES}
    return [line for name in CASES for line in _lines(name, ranks[name], ranks["none"])]


def _lines(name: str, ranks: list[Figures], none: list[Figures]) -> list[Comparison]:
    def compare(what: str, unit: str, ours: float, peer: float, note: str) -> Comparison:
        return Comparison(f"{name}, {what}", ours, peer, peer / ours, unit, note)

    kept, peer_kept = (max(rank.kept for rank in side) / 1e6 for side in (ranks, none))
    flops, peer_flops = (max(rank.flops for rank in side) / 1e9 for side in (ranks, none))
    total, peer_total = (sum(rank.flops for rank in side) for side in (ranks, none))
    tokens, weights = (sum(sizes) / 1e6 for sizes in zip(*((rank.tokens, rank.weights) for rank in ranks)))
    peer_sent = sum(rank.tokens + rank.weights for rank in none) / 1e6
    same = f"outputs and gradients agree to {max(rank.difference for rank in ranks):.0e}"
    load = f"busiest expert: {ranks[0].largest_load:.2f} times the mean load, experts copied: {ranks[0].copied}"
    both = f"{total / 1e9:.6g} GFLOP on both ranks, of which {(total - peer_total) / 1e9:.6g} again"
    parts = f"{tokens:.6g} MB of tokens, {weights:.6g} MB of weights"
    return [
        compare("kept, larger rank", "MB", kept, peer_kept, f"{load}; {same}"),
        compare("FLOPs, busier rank", "GFLOP", flops, peer_flops, both),
        compare("sent, both ranks", "MB", tokens + weights, peer_sent, parts),
    ]


def _work(rank: int, config: Config, folder: str) -> None:
    from trainer.engines import megatron, megatron_cpu  # before any group: torch.distributed.nn would keep it

    warnings.filterwarnings("ignore")
    # The ranks share this machine's cores.
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    try:
        megatron_cpu.adapt()
        parallel = ParallelConfig(expert=RANKS)
        megatron.initialize_groups(torch.device("cpu"), parallel, RunConfig().collective_seconds)
        groups = megatron.layer_groups(parallel)
        counted: dict[str, Any] = {}
        expected: list[Tensor] = []
        for name, case in CASES.items():
            if rank == 0:
                say(f"systems: {name}")
            figures, results = _count(case, rank, config, groups)
            # The first case is the reference.
            expected = expected or results
            difference = largest_difference([expected, results])
            counted[name] = asdict(figures) | {"difference": difference}
        (Path(folder) / f"{rank}.json").write_text(json.dumps(counted))
    finally:
        dist.destroy_process_group()


def _count(case: Case, rank: int, config: Config, groups: Groups) -> tuple[Figures, list[Tensor]]:
    """Return this rank's figures, its output and its gradients."""
    layer, x = build_layer(config, config.experts, **case.moe), make_inputs(config, config.tokens[0], seed=1 + rank)
    with torch.no_grad():
        # A constant input channel acts as a bias of the router.
        x[..., 0] = 1
        layer.router.weight[:, 0] = -config.skew * torch.arange(1.0, config.experts + 1).log()
    shard(layer, groups)
    layer.policy = case.policy
    load = _load(layer, x)
    if layer.router.load is not None:
        layer.router.load = load
    layer.router.choose_replicated()
    with SentBytes() as sent, FlopCounterMode(display=False) as flops:
        with _Made() as made:
            y = case.policy.run("ffn", layer, x)
        kept = made.alive([x, y, *layer.parameters()])
        y.square().sum().backward()
    results = [y.detach(), *(tensor.grad for tensor in (x, *layer.parameters()) if tensor.grad is not None)]
    # Broadcast and reduce carry the replicas' weights and gradients; the other collectives carry tokens.
    of_weights = sum(size for (_, name), size in sent.by_group.items() if name in ("broadcast", "reduce"))
    figures = Figures(
        kept=kept,
        flops=flops.get_total_flops(),
        tokens=sum(sent.by_group.values()) - of_weights,
        weights=of_weights,
        copied=len(layer.router.replicated),
        largest_load=float(load.max() / load.mean()),
    )
    return figures, results


def _load(layer: "MoELayer", x: Tensor) -> Tensor:
    """Return the experts' shares [E] over both ranks. In training they are known from the previous step."""
    with torch.no_grad():
        load = layer.router(x).routing_map.sum(0).float()
    dist.all_reduce(load)
    return load / load.sum()
