"""Experts as copies: of a dense feed-forward (trainer.upcycle), or of the first expert during a run.

The second is how EvoMoE (arXiv 2112.14397) has its experts begin: train one, spawn the others as masked copies, then
let the gate become sparse. Its published code lacks that step, so share and scaling here are not the paper's.
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

# Tokens that the mean of gates with noise is taken over: its error is below 1 %.
_TOKENS = 4096


@torch.enable_grad()  # the router takes what has no gradient for validation, and leaves out the noise
def expected_gates(moe: MoEConfig) -> float:
    """What a token's gates add up to at the gate's first training step, on average, with router weights near zero.

    k / N where all scores add up to one, 1 where the chosen ones do, k / 2 for sigmoids left as they are; of a
    dense-to-sparse gate the share that it keeps, its noise included.
    """
    router = Router(replace(moe, capacity_factor=None, pad_to_capacity=False, spawn_step=None), hidden_size=1)
    draw(router, ModelConfig(moe=moe), seed=0)
    nn.init.zeros_(router.weight)
    router.step = 0
    tokens = torch.arange(_TOKENS)[:, None]
    routing = router(torch.zeros(_TOKENS, 1, 1), token_keys(tokens, torch.zeros_like(tokens)))
    return routing.gates.detach().double().sum(-1).mean().item()


def masked_copy(matrix: Tensor, share: float, seed: int, name: str) -> Tensor:
    """A matrix with a share of its weights set to zero, drawn by (seed, name), and the others grown as in dropout."""
    if not share:
        return matrix.clone()
    drawn = torch.rand(matrix.shape, generator=seeded_generator(seed, name)).to(matrix.device)
    return matrix * (drawn >= share) / (1 - share)


def expert_weights(decoder: Decoder) -> Iterator[tuple[str, Tensor, bool]]:
    """The weights of routed experts by name, and whether they write the experts' output."""
    for name, row in parameter_rows(decoder).items():
        if row.placement.expert:
            yield name, row.tensor, row.placement.writes_residual


def spawned(weight_EOD: Tensor, name: str, writes_output: bool, moe: MoEConfig, seed: int, groups: Groups) -> Tensor:
    """The experts [E, O, D] of this rank as masked copies of the first of all ranks; every rank calls it.

    What writes the output is divided by what the gates begin with, so that the copies together put out what the first
    did alone.
    """
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
