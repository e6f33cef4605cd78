"""Creates experts as copies of a dense feed-forward (trainer.stored.upcycle), or of the first expert during a run.

The latter is how experts begin in EvoMoE (arXiv 2112.14397): train one, spawn the others as masked copies, then let the
gate become sparse. The paper's published code lacks the spawning, so share and scaling here are not the paper's.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.config import ModelConfig, MoEConfig
from models.decoder import Decoder
from models.moe.router import Router, token_keys
from models.parameters import Groups, draw, parameter_rows, seeded_generator

# Number of tokens to average noisy gates over. The error of the mean is then below 1 %.
_TOKENS = 4096


@torch.enable_grad()  # without gradients the router assumes validation, and omits the noise
def expected_gates(moe: MoEConfig) -> float:
    """Return the average sum of a token's gates at the gate's first training step, with router weights near zero.

    This is k / N if all scores add up to one, 1 if the chosen ones do, and k / 2 for plain sigmoids. For a
    dense-to-sparse gate it is the share that the gate keeps, noise included.
    """
    router = Router(replace(moe, capacity_factor=None, pad_to_capacity=False, spawn_step=None), hidden_size=1)
    draw(router, ModelConfig(moe=moe), seed=0)
    nn.init.zeros_(router.weight)
    router.step = 0
    tokens = torch.arange(_TOKENS)[:, None]
    routing = router(torch.zeros(_TOKENS, 1, 1), token_keys(tokens, torch.zeros_like(tokens)))
    return routing.gates.detach().double().sum(-1).mean().item()


def masked_copy(matrix: Tensor, share: float, seed: int, name: str) -> Tensor:
    """Set a share of a matrix's weights to zero, chosen by (seed, name), and scale up the others as in dropout."""
    if not share:
        return matrix.clone()
    drawn = torch.rand(matrix.shape, generator=seeded_generator(seed, name)).to(matrix.device)
    return matrix * (drawn >= share) / (1 - share)


def expert_weights(decoder: Decoder) -> Iterator[tuple[str, Tensor, bool]]:
    """Yield the routed experts' weights by name, and whether they write the experts' output."""
    for name, row in parameter_rows(decoder).items():
        if row.placement.expert:
            yield name, row.tensor, row.placement.writes_residual


def spawned(weight_EOD: Tensor, name: str, writes_output: bool, moe: MoEConfig, seed: int, groups: Groups) -> Tensor:
    """Return this rank's experts [E, O, D] as masked copies of the first expert of all ranks. Every rank calls this.

    Weights that write the output are divided by the gates' initial sum. All copies together then produce the output
    that the first expert produced alone.
    """
    # In float32, so that bf16 weights are divided and masked before they are rounded once.
    first = weight_EOD[0].detach().to(torch.float32, copy=True)
    begin = 0
    if groups.expert is not None:
        begin = dist.get_rank(groups.expert) * len(weight_EOD)
        dist.broadcast(first, group=groups.expert, group_src=0)
    if writes_output:
        first = first / expected_gates(moe)
    experts = range(begin, begin + len(weight_EOD))
    copies = [masked_copy(first, moe.spawn_diversify, seed, f"{name}.{expert}") for expert in experts]
    return torch.stack(copies).to(weight_EOD.dtype)
