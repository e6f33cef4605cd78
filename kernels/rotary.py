"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864, eq. 34) in the half-split layout of Llama and Qwen.

Channel i of the first half and channel i of the second half form a pair. At position t it is rotated by the angle
t · theta^(-2i/K):

    out_1 = x_1 cos − x_2 sin
    out_2 = x_2 cos + x_1 sin
"""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernels.autograd import derive, once_differentiable, save
from kernels.backend import is_generating, resolve
from kernels.indices import check_range
from kernels.rotary_scaling import RotaryScaling, yarn_range
from kernels.shapes import block_limit
from kernels.triton import implementations

# float32 represents every integer up to this one.
_MAX_POSITIONS = 1 << 24

# Elements per block of time steps on the CPU, so that its temporaries stay in the cache. Measured on a Zen 5.
_BLOCK_ELEMENTS = 1 << 17


def frequencies(
    dim: int, theta: float, scaling: RotaryScaling | None = None, device: torch.device | None = None
) -> Tensor:
    """Compute the angle per position of each pair of channels, float32 [K/2]; scaled as kernels.rotary_scaling says."""
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
    # Same rounding as in transformers and Megatron, because distant positions of imported models depend on it.
    plain = 1.0 / theta**exponents
    if scaling is None:
        return plain
    slow = plain / scaling.factor
    if scaling.kind == "linear":
        return slow
    if scaling.kind == "llama3":
        wavelength = 2 * math.pi / plain
        share = (scaling.original_length / wavelength - scaling.low) / (scaling.high - scaling.low)
        blend = (1 - share) * slow + share * plain
        scaled = torch.where(wavelength > scaling.original_length / scaling.low, slow, blend)
        return torch.where(wavelength < scaling.original_length / scaling.high, plain, scaled)
    first, last = yarn_range(scaling, dim, theta)
    pairs = torch.arange(dim // 2, dtype=torch.float32, device=device)
    kept = 1 - ((pairs - first) / (last - first)).clamp(0, 1)
    return 1.0 / (scaling.factor * theta**exponents) * (1 - kept) + plain * kept


def rotary_tables(
    positions: Tensor, dim: int, theta: float, scaling: RotaryScaling | None = None
) -> tuple[Tensor, Tensor]:
    """Compute the cosines and sines of the angles.

    Args:
        positions: integers [T] or [B, T] in [0, 2^24); they may restart at every packed document.
        dim: the head dimension K, even.
        theta: the base of the wavelengths, 10000 in the paper.
        scaling: changes of the frequencies for longer contexts; None for none.

    Returns:
        (cos, sin), float32 [T, K/2] or [B, T, K/2].

    Raises:
        ValueError: dim is odd, or a position is out of range. On a GPU a position out of range gets NaN instead.
    """
    if dim % 2 or dim < 2:
        raise ValueError(f"rotary_tables: the head dimension must be even to be split in halves, not {dim}")
    check_range("rotary_tables", "position", positions, _MAX_POSITIONS)
    known = positions.float().masked_fill((positions < 0) | (positions >= _MAX_POSITIONS), torch.nan)
    angles = known[..., None] * frequencies(dim, theta, scaling, positions.device)
    factor = 1.0 if scaling is None else scaling.attention_factor
    return (angles.cos(), angles.sin()) if factor == 1 else (angles.cos() * factor, angles.sin() * factor)


def apply_rotary_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`apply_rotary` in plain operations. Computes in float32, or in float64 for float64 inputs."""
    math_dtype = torch.promote_types(x.dtype, torch.float32)
    first, second = x.to(math_dtype).chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(-2).to(math_dtype), sin.unsqueeze(-2).to(math_dtype)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor, *, backend: str = "auto") -> Tensor:
    """Rotate every head of x by the angles of its position.

    Args:
        x: [B, T, H, K], floating, any strides.
        cos, sin: [T, K/2] or [B, T, K/2] from `rotary_tables`; no gradient flows to them.
        backend: auto, reference, torch or triton.

    Returns:
        [B, T, H, K] in x's dtype, contiguous.

    Raises:
        ValueError: the tables do not fit x, or the backend cannot serve these inputs.
    """
    if not all(tensor.is_floating_point() for tensor in (x, cos, sin)):
        raise ValueError(f"apply_rotary: x {x.dtype}, cos {cos.dtype} and sin {sin.dtype} must be floating")
    fit = x.dim() == 4 and x.shape[3] % 2 == 0 and min(x.shape[2:]) > 0 and cos.shape == sin.shape
    # A table with batch size 1 is used for every example.
    if not fit or cos.shape[-2:] != (x.shape[1], x.shape[3] // 2) or cos.shape[:-2] not in ((), (1,), x.shape[:1]):
        raise ValueError(
            f"apply_rotary: x {tuple(x.shape)} as [B, T, H, K], H and K positive and K even, needs tables [T, K/2] "
            f"or [B, T, K/2], not cos {tuple(cos.shape)} and sin {tuple(sin.shape)}"
        )
    choice = resolve("apply_rotary", backend, implementations(("torch", "reference"), x, cos, sin))
    if choice == "reference":
        return apply_rotary_reference(x, cos, sin)
    if choice == "triton":
        from kernels.triton import rotary  # lazily: not every machine has Triton

        return rotary.apply_rotary(x, cos, sin)
    if is_generating() and x.numel() <= _BLOCK_ELEMENTS:
        return _rotate_few(x, cos, sin)
    return _Rotary.apply(x, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    """Rotate x by direction × angle, with direction 1 or −1, in blocks of time steps that stay in the cache."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    wide = torch.promote_types(x.dtype, torch.float32)
    cos_BT1K = torch.cat((cos, cos), dim=-1).unsqueeze(-2).to(wide).expand(x.shape[0], -1, -1, -1)
    sin_BT1K = torch.cat((-sin, sin), dim=-1).unsqueeze(-2).to(wide).expand(x.shape[0], -1, -1, -1)
    steps = max(1, block_limit(_BLOCK_ELEMENTS) // (x.shape[2] * x.shape[3])) if x.is_cpu else x.shape[1]
    for example in zip(x, cos_BT1K, sin_BT1K, out):
        for block, block_cos, block_sin, block_out in zip(*(tensor.split(steps) for tensor in example)):
            block = block.to(wide)
            # A channel's partner is half a head away in both halves, so one roll finds it.
            partner = block.roll(x.shape[3] // 2, dims=-1)
            turned = torch.mul(block, block_cos, out=block_out) if block_out.dtype == wide else block * block_cos
            turned.addcmul_(partner, block_sin, value=direction)
            if turned is not block_out:
                block_out.copy_(turned)
    return out


def _rotate_few(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`_rotate` without gradients in few operations, for a decoding step of many sequences."""
    wide = torch.promote_types(x.dtype, torch.float32)
    first, second = (x if x.dtype == wide else x.to(wide)).chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    turned = (
        torch.addcmul(first * cos, second, sin, value=-1),
        torch.addcmul(second * cos, first, sin),
    )
    out = torch.cat(turned, dim=-1)
    return out if x.dtype == wide else out.to(x.dtype)


class _Rotary(torch.autograd.Function):
    """A rotation. Its transpose is the rotation by the negative angle, so x is not saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        save(ctx, statistics=(cos, sin))
        out = _rotate(x, cos, sin, 1)
        derive(out, partial(_rotate, direction=1), (x,), cos, sin)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, sin, -1), None, None
