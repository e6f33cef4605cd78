"""One rank of test_delta: this rank's tokens, against the whole row on one process.

python -m tests.kernels.spiking.delta_ranks
"""

import torch
import torch.distributed as dist

from kernels.documents import Documents
from kernels.spiking import delta_changes, delta_levels, delta_spike

TIME, CHANNELS, V = 24, 5, 0.7


def check(documents: Documents | None, dead_zone: float, with_state: bool) -> None:
    """x̂, levels, changes, final states and gradients are those of one process."""
    generator = torch.Generator().manual_seed(0)
    batch = 2 if documents is None else 1
    sequences = batch if documents is None else len(documents)
    x, grad = (torch.randn(batch, TIME, CHANNELS, generator=generator) for _ in range(2))
    state = torch.randint(-2, 3, (sequences, CHANNELS), generator=generator).float() if with_state else None
    rank, world = dist.get_rank(), dist.get_world_size()
    part = slice(rank * TIME // world, (rank + 1) * TIME // world)
    found = []
    for tokens, group in ((slice(None), None), (part, dist.group.WORLD)):
        leaf, common = x[:, tokens].clone().requires_grad_(), {"documents": documents, "group": group}
        options = {"threshold": V, "dead_zone": dead_zone, "count_range": (-3, 3), "initial_state": state}
        out, final = delta_spike(leaf, gradient="clipped", output_final_state=True, **options, **common)
        out.backward(grad[:, tokens])
        levels, _ = delta_levels(leaf, **options, **common)
        changes = delta_changes(levels, initial_state=state, **common)
        found.append((final, out, levels, changes, leaf.grad))
    (whole_final, *whole), (final, *own) = found
    assert torch.equal(final, whole_final)
    for a, b in zip(whole, own, strict=True):
        assert torch.equal(a[:, part], b)


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for bounds in (None, (0, 24), (0, 3, 8, 13, 24), (0, 12, 24)):
        for dead_zone in (0.0, 1.0):
            for with_state in (False, True):
                check(None if bounds is None else Documents(bounds), dead_zone, with_state)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
