"""ReLU masks packed into one bit per element. The gradient is exact.

A row of D channels takes W = ceil(D / 8) bytes. Bits 0, 1, 2, … of byte j hold channels j, W + j, 2W + j, …, so packing
and unpacking both work on contiguous slices of channels.
"""

import torch
from torch import Tensor


@torch.no_grad()
def pack_signs(x: Tensor) -> Tensor:
    """Pack one bit per element: 1 where x > 0 or x is NaN, which is where torch's ReLU passes the gradient.

    Args:
        x: [..., D], the input or output of a ReLU, in any real dtype.

    Returns:
        uint8 [..., ceil(D / 8)].
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
    """Unpack the result of `pack_signs`, [..., ceil(channels / 8)], to the mask bool [..., channels].

    Raises:
        ValueError: the width of `packed` does not fit `channels`.
    """
    width = packed.shape[-1]
    if width != -(-channels // 8):
        needed = -(-channels // 8)
        raise ValueError(
            f"unpack_signs: rows of channels={channels} take {needed} bytes, but the packed rows have {width}; pass "
            "the number of channels that was packed"
        )
    mask = torch.empty(*packed.shape[:-1], channels, dtype=torch.uint8, device=packed.device)
    for bit in range(8):
        part = mask[..., bit * width : (bit + 1) * width]
        part.copy_((packed[..., : part.shape[-1]] >> bit) & 1)
    return mask.view(torch.bool)
