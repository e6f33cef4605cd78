"""One rank of test_neuron: this rank's channels of every token, against the whole on one process.

python -m tests.kernels.spiking.neuron_ranks
"""

import torch
import torch.distributed as dist

from kernels.spiking import spike, spike_counts
from tests.kernels.sharded_ranks import Traffic

CHANNELS = 512


def check(k: torch.Tensor | float, gradient: str, dtype: torch.dtype, backend: str) -> None:
    """x̂, counts and gradients are bitwise those of the whole; of a k that all ranks hold, the ranks' sum is."""
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(40, CHANNELS, generator=generator).to(dtype) for _ in range(2))
    rank, world = dist.get_rank(), dist.get_world_size()
    part = slice(rank * CHANNELS // world, (rank + 1) * CHANNELS // world)
    options = {"gradient": gradient, "count_range": (-5, 5), "backend": backend}
    found = []
    for columns, group in ((slice(None), None), (part, dist.group.WORLD)):
        leaf, k_here = x[:, columns].clone().requires_grad_(), k
        learned = isinstance(k, torch.Tensor)
        if learned:
            k_here = (k[columns] if k.dim() else k).clone().requires_grad_()
        with Traffic() as forward:
            out = spike(leaf, k=k_here, group=group, **options)
        with Traffic() as backward:
            out.backward(grad[:, columns])
        # In and out of the collective, one float64 a token.
        assert forward.calls == ([] if group is None else [("c10d::allreduce_", 40 * 8)])
        assert backward.calls == []
        counts, thresholds = spike_counts(
            leaf.detach(), k=k if not isinstance(k, torch.Tensor) else k_here, group=group
        )
        found.append((out, counts, leaf.grad, k_here.grad if isinstance(k_here, torch.Tensor) else None, thresholds))
    whole, ours = found
    for a, b in zip(whole[:3], ours[:3]):
        assert torch.equal(a[:, part], b)
    if isinstance(k, torch.Tensor) and k.dim():
        torch.testing.assert_close(ours[3], whole[3][part], rtol=1e-5, atol=1e-5)
    elif isinstance(k, torch.Tensor):
        dist.all_reduce(ours[3])
        torch.testing.assert_close(ours[3], whole[3], rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(whole[4], ours[4])


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for dtype in (torch.float32, torch.bfloat16):
        for gradient in ("plain", "clipped", "surrogate"):
            for k in (3.0, torch.tensor(3.0), torch.linspace(1, 4, CHANNELS)):
                for backend in ("torch", "reference"):
                    check(k, gradient, dtype, backend)
    # A NaN on one rank makes the token NaN on all.
    x = torch.ones(2, 64)
    x[0, 3] = torch.nan if dist.get_rank() == 0 else 1.0
    assert spike(x, k=3.0, group=dist.group.WORLD).isnan().any(1).tolist() == [True, False]
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
