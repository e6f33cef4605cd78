"""One bit an element: which elements ReLU lets through, eight to a byte, exact.

A row of D channels takes W = ceil(D / 8) bytes; byte j has the channels j, W + j, 2W + j … in its bits 0, 1, 2 …, so
that both directions work on neighbours.
"""

import torch
from torch import Tensor


@torch.no_grad()
def pack_signs(x: Tensor) -> Tensor:
    """One bit an element: 1 where x > 0 or is NaN, as torch's ReLU has its gradient.

    Args:
        x: [..., D], a ReLU's input or output; any real dtype.

    Returns:
        [..., ceil(D / 8)] of uint8.
    """
    passes = (x.detach() <= 0).logical_not_().view(torch.uint8)
    width = -(-x.shape[-1] // 8)
    packed = passes[..., :width].clone()
    for bit in range(1, 8):
        part = passes[..., bit * width : (bit + 1) * width]
        packed[..., : part.shape[-1]] |= part << bit
    return packed


@torch.no_grad()
def unpack_signs(packed: Tensor, channels: int) -> Tensor:
    """The mask that `pack_signs` packed: bool [..., channels] of packed [..., ceil(channels / 8)]."""
    width = packed.shape[-1]
    if width != -(-channels // 8):
        raise ValueError(f"unpack_signs: {channels} channels have {-(-channels // 8)} bytes a row, not {width}")
    mask = torch.empty(*packed.shape[:-1], channels, dtype=torch.uint8, device=packed.device)
    for bit in range(8):
        part = mask[..., bit * width : (bit + 1) * width]
        part.copy_((packed[..., : part.shape[-1]] >> bit) & 1)
    return mask.view(torch.bool)
