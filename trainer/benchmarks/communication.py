"""Bytes sent by context-parallel layers, counted at the process group and compared with formulas.

Bytes are per rank, as ring algorithms on P ranks send them: all_gather (P-1) m for a rank's own m bytes, all_reduce
2 (P-1)/P m, all-to-all the bytes for other ranks. A linear layer gathers its (M, C) and reduces its gradient:
3 (P-1) |(M, C)|. Full attention exchanges q, k, v and o, forward and backward: 2 (P-1)/P of them. A sliding window
sends its halo to the next rank and the halo's gradient to the previous one. Shapes are those of a single row in
float32. Only the operators run, without the convolutions and projections around them.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from trainer.benchmarks.report import Comparison, report, say
from trainer.errors import ConfigError

DESCRIPTION = "Bytes that each rank sends for context-parallel layers, forward and backward, against formulas."
# Elements of M, the effect of a rank's tokens on a state, per head with D keys: a number, a diagonal or a matrix.
_TRANSITIONS: dict[str, Callable[[int], int]] = {
    "retention": lambda dim: 1,
    "gla": lambda dim: dim,
    "hgrn": lambda dim: dim,
    "hgrn2": lambda dim: dim,
    "delta_rule": lambda dim: dim * dim,
    "gated_delta_rule": lambda dim: dim * dim,
}
TOLERANCE = 0.1
# Bytes of a float32 element.
ELEMENT = 4


@dataclass
class Config:
    """Sizes to measure.

    Attributes:
        json: Write the comparisons to this file.
        seq_lens: Tokens of the whole sequence.
        full_seq_lens: Tokens for full attention, whose time is quadratic.
        ranks: Sizes of the context-parallel group.
        heads: Heads per layer.
        head_dim: Key and value size of a head.
        window: Keys visible to a query of sliding-window attention.
    """

    json: str | None = None
    seq_lens: list[int] = field(default_factory=lambda: [4096, 16384, 65536])
    full_seq_lens: list[int] = field(default_factory=lambda: [4096, 16384])
    ranks: list[int] = field(default_factory=lambda: [2, 4])
    heads: int = 4
    head_dim: int = 8
    window: int = 256

    def __post_init__(self) -> None:
        if not self.ranks or min(self.ranks) < 2:
            raise ConfigError(f"ranks is {self.ranks}: name at least one size, each at least 2")
        for ranks in self.ranks:
            if self.heads < 1 or self.heads % ranks:
                raise ConfigError(f"heads is {self.heads}: it must be a multiple of every number of ranks ({ranks})")
            for time in (*self.seq_lens, *self.full_seq_lens):
                if time % ranks or not 1 < self.window <= time // ranks:
                    raise ConfigError(f"{time} tokens: {ranks} ranks must divide them into parts of at least a window")


def predicted(kind: str, time: int, ranks: int, rank: int, config: Config) -> int:
    """Return the bytes that `rank` sends for a layer, forward and backward, of a row of `time` tokens."""
    heads, dim = config.heads, config.head_dim
    if kind == "full_attention":
        return 2 * (ranks - 1) * (time // ranks) * heads * 4 * dim * ELEMENT // ranks
    if kind == "sliding_window_attention":
        return ((rank < ranks - 1) + (rank > 0)) * (config.window - 1) * heads * 2 * dim * ELEMENT
    state = dim if kind == "hgrn" else dim * dim
    return 3 * (ranks - 1) * heads * (_TRANSITIONS[kind](dim) + state) * ELEMENT


def _count(kind: str, time: int, config: Config) -> dict[str, int]:
    """Run a layer, and return the bytes that this rank sends, by collective."""
    import torch
    import torch.distributed as dist

    from kernels import linear_attention
    from kernels.attention import attention
    from trainer.communication import SentBytes

    group, ranks = dist.group.WORLD, dist.get_world_size()
    shape = (1, time // ranks, config.heads, config.head_dim)
    q, k, v = (torch.nn.functional.normalize(torch.randn(shape), dim=-1).requires_grad_() for _ in range(3))
    decay, beta = -0.1 * torch.rand(shape), torch.rand(shape[:3])
    inputs = {
        "retention": (q, k, v, -0.1 * torch.rand(config.heads)),
        "gla": (q, k, v, decay),
        "hgrn": (v.flatten(2), decay.flatten(2)),
        "hgrn2": (q, v, decay),
        "delta_rule": (q, k, v, beta),
        "gated_delta_rule": (q, k, v, decay[..., 0], beta),
    }
    with SentBytes() as sent:
        if kind in inputs:
            o = getattr(linear_attention, kind)(*inputs[kind], group=group)[0]
        else:
            window = config.window if kind == "sliding_window_attention" else None
            o = attention(q, k, v, window=window, group=group)
        o.sum().backward()
    return {collective: size for (_, collective), size in sent.by_group.items()}


def _work(rank: int, ranks: int, config: Config, cases: list[tuple[str, int]], folder: str) -> None:
    import torch
    import torch.distributed as dist
    import torch.distributed.nn  # import before creating a group: it would keep the group, with its threads

    # The ranks share this machine's cores.
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    try:
        counted = []
        for kind, time in cases:
            if rank == 0:
                say(f"{ranks} ranks: {kind}, {time} tokens")
            counted.append(_count(kind, time, config))
        torch.save(counted, Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def main(config: Config) -> None:
    """Count, print the table, and exit with 1 if a count differs from its formula by more than a tenth."""
    import torch
    from torch.multiprocessing.spawn import spawn

    kinds = (*_TRANSITIONS, "sliding_window_attention")
    cases = [(kind, time) for kind in kinds for time in config.seq_lens]
    cases += [("full_attention", time) for time in config.full_seq_lens]
    lines = []
    for ranks in config.ranks:
        with tempfile.TemporaryDirectory() as folder:
            spawn(_work, (ranks, config, cases, folder), ranks)
            counted = [torch.load(Path(folder) / f"{rank}.pt") for rank in range(ranks)]
        for index, (kind, time) in enumerate(cases):
            for rank in range(ranks):
                sent, formula = counted[rank][index], predicted(kind, time, ranks, rank, config)
                note = ", ".join(f"{name} {size}" for name, size in sent.items())
                total = sum(sent.values())
                case = f"CP{ranks} {kind}, T={time}, rank {rank}"
                lines.append(Comparison(case, total, formula, total / formula, "bytes", note))
    report("bytes sent, counted (ours) and by formula (peer)", lines, config.json)
    if any(abs(line.ratio - 1) > TOLERANCE for line in lines):
        raise SystemExit(1)
