"""Normalisation over the last dimension: RMSNorm, RMSNorm times a gate, and the l2 norm of queries and keys.

    rms_norm(x)       = x · (mean(x²) + eps)^(-1/2) · weight     Zhang and Sennrich 2019, arXiv:1910.07467, eq. 4
    gated_rms_norm(x) = rms_norm(x) · act(gate)                  output norm of gated linear attention
    l2_norm(x)        = x · (sum(x²) + eps)^(-1/2)

With n = x · rstd and g the gradient of n, all three share one backward:

    dx = rstd · (g − n · mean(g · n))          (the sum, not the mean, for l2_norm)

Statistics are float32 (float64 for float64 inputs). Each Function saves its inputs and one number per row.
"""

from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.autograd import derive, once_differentiable, save
from kernels.backend import is_generating, resolve
from kernels.shapes import block_limit
from kernels.triton import LARGEST_ROW, implementations

Activation = Literal["silu", "sigmoid"]

# Elements per block of rows on the CPU: few enough that a block's temporaries stay in the cache and reuse their memory,
# enough to hide the cost of the calls. Measured on a Zen 5: a quarter or eight times as many cost 10 to 40 %.
_BLOCK_ELEMENTS = 1 << 18

_BACKENDS = ("torch", "reference")


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rms_norm` in plain operations."""
    wide = _widen(x)
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normed * _widen(weight)).to(x.dtype)


def gated_rms_norm_reference(
    x: Tensor, gate: Tensor, weight: Tensor, eps: float, activation: Activation = "silu"
) -> Tensor:
    """`gated_rms_norm` in plain operations."""
    wide = _widen(x)
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    gate = F.silu(_widen(gate)) if activation == "silu" else _widen(gate).sigmoid()
    return (normed * _widen(weight) * gate).to(x.dtype)


def l2_norm_reference(x: Tensor, eps: float = 1e-6) -> Tensor:
    """`l2_norm` in plain operations."""
    wide = _widen(x)
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + eps)).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, backend: str = "auto") -> Tensor:
    """Compute x · (mean(x²) + eps)^(-1/2) · weight over the last dimension.

    Args:
        x: [..., D], floating.
        weight: [D]; its dtype may differ from x's.
        eps: added to the mean square.
        backend: auto, reference, torch or triton.

    Returns:
        [..., D] in x's dtype.

    Raises:
        ValueError: weight is not [D], or the backend cannot serve these inputs.
    """
    _check_weight("rms_norm", x, weight)
    choice = resolve("rms_norm", backend, _implementations(x, weight))
    if choice == "reference":
        return rms_norm_reference(x, weight, eps)
    if choice == "triton":
        from kernels.triton import norms  # lazily: not every machine has Triton

        return norms.rms_norm(x, weight, eps)
    if is_generating():
        return _narrow(_norm_alone(x, weight, eps), x)
    return _RMSNorm.apply(x, weight, eps)


def gated_rms_norm(
    x: Tensor, gate: Tensor, weight: Tensor, eps: float, activation: Activation = "silu", *, backend: str = "auto"
) -> Tensor:
    """Compute rms_norm(x, weight, eps) · activation(gate).

    Args:
        x, gate: [..., D], the same shape, floating.
        weight: [D]; its dtype may differ from x's.
        eps: added to the mean square.
        activation: "silu" or "sigmoid".
        backend: auto, reference, torch or triton.

    Returns:
        [..., D] in x's dtype.

    Raises:
        ValueError: weight is not [D], gate's shape differs from x's, the activation is unknown, or the backend cannot
            serve these inputs.
    """
    _check_weight("gated_rms_norm", x, weight)
    if gate.shape != x.shape:
        raise ValueError(f"gated_rms_norm: gate {tuple(gate.shape)} must have x's shape {tuple(x.shape)}")
    if activation not in ("silu", "sigmoid"):
        raise ValueError(f"gated_rms_norm: activation must be silu or sigmoid, not {activation!r}")
    choice = resolve("gated_rms_norm", backend, _implementations(x, gate, weight))
    if choice == "reference":
        return gated_rms_norm_reference(x, gate, weight, eps, activation)
    if choice == "triton":
        from kernels.triton import norms

        return norms.gated_rms_norm(x, gate, weight, eps, activation)
    if is_generating():
        act = F.silu if activation == "silu" else torch.sigmoid
        return _narrow(_norm_alone(x, weight, eps).mul_(act(_widen(gate))), x)
    return _GatedRMSNorm.apply(x, gate, weight, eps, activation)


def l2_norm(x: Tensor, eps: float = 1e-6, *, backend: str = "auto") -> Tensor:
    """Compute x · (sum(x²) + eps)^(-1/2) over the last dimension.

    Args:
        x: [..., K], floating.
        eps: added to the sum of squares.
        backend: auto, reference, torch or triton.

    Returns:
        [..., K] in x's dtype.

    Raises:
        ValueError: x is not floating, or the backend cannot serve it.
    """
    _check_floating("l2_norm", x)
    choice = resolve("l2_norm", backend, _implementations(x))
    if choice == "reference":
        return l2_norm_reference(x, eps)
    if choice == "triton":
        from kernels.triton import norms

        return norms.l2_norm(x, eps)
    if is_generating():
        wide = _widen(x)
        return _narrow(wide * torch.linalg.vecdot(wide, wide)[..., None].add_(eps).rsqrt_(), x)
    return _L2Norm.apply(x, eps)


def _implementations(x: Tensor, *others: Tensor) -> tuple[str, ...]:
    return implementations(_BACKENDS, x, *others, fits=x.shape[-1] <= LARGEST_ROW)


def _check_weight(op: str, x: Tensor, weight: Tensor) -> None:
    _check_floating(op, x)
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"{op}: weight {tuple(weight.shape)} must be [{x.shape[-1]}], the last dimension of x")


def _check_floating(op: str, x: Tensor) -> None:
    if not x.is_floating_point() or x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"{op}: x must be floating [..., D] with D > 0, not {x.dtype} {tuple(x.shape)}")


def _widen(x: Tensor) -> Tensor:
    """Convert x to the dtype of the arithmetic: float64 for float64, float32 for all others."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return x if x.dtype == wide else x.to(wide)


def _narrow(y: Tensor, x: Tensor) -> Tensor:
    """Convert y to x's dtype."""
    return y if y.dtype == x.dtype else y.to(x.dtype)


def _norm_alone(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rms_norm` without gradients in the dtype of the arithmetic: in generation, few operations count."""
    wide, scale = _widen(x), _widen(weight)
    # F.rms_norm takes four times as long for a row: it is made of a dozen operations.
    length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    rstd = length.square_().mul_(1 / x.shape[-1]).add_(eps).rsqrt_()
    return (wide * rstd).mul_(scale)


def _rows(x: Tensor) -> Tensor:
    """Reshape x [..., D] to [N, D]."""
    return x.reshape(-1, x.shape[-1])


def _inverse_norm(x_ND: Tensor, eps: float, divisor: int) -> Tensor:
    """Compute (sum(x²) / divisor + eps)^(-1/2) of each row, [N, 1], in the dtype of the arithmetic."""
    wide = torch.promote_types(x_ND.dtype, torch.float32)
    norm_N1 = torch.linalg.vector_norm(x_ND, dim=-1, keepdim=True, dtype=wide)
    return norm_N1.square_().div_(divisor).add_(eps).rsqrt_()


def _block_rows(x: Tensor) -> int:
    """Return the rows per block: as many as fit a CPU's cache; all on a GPU."""
    rows = x.numel() // x.shape[-1]
    return max(1, min(rows, block_limit(_BLOCK_ELEMENTS) // x.shape[-1]) if x.is_cpu else rows)


def _scaled(x: Tensor, rstd_N1: Tensor, weight: Tensor) -> Tensor:
    """X · rstd · weight, contiguous, in x's shape and dtype."""
    x_ND, scale = _rows(x), _widen(weight)
    rows = _block_rows(x)
    out_ND = torch.empty_like(x_ND, memory_format=torch.contiguous_format)
    for block, rstd, out in zip(x_ND.split(rows), rstd_N1.split(rows), out_ND.split(rows)):
        if out.dtype == scale.dtype:
            torch.mul(block, rstd, out=out).mul_(scale)
        else:
            out.copy_(_widen(block).mul_(rstd).mul_(scale))
    return out_ND.view(x.shape)


class _RMSNorm(torch.autograd.Function):
    """`rms_norm`: saves x, weight and rstd [N, 1]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        rstd_N1 = _inverse_norm(_rows(x), eps, x.shape[-1])
        out = _scaled(x, rstd_N1, weight)
        save(ctx, activations=(x,), weights=(weight,), statistics=(rstd_N1,))
        derive(out, _scaled, (x,), rstd_N1, weight)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, rstd_N1 = ctx.saved_tensors
        grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
        scale = _widen(weight)
        grad_weight = torch.zeros_like(scale)
        rows = _block_rows(x)
        tensors = (_rows(grad), _rows(x), rstd_N1, _rows(grad_x))
        for grad_block, block, rstd, out in zip(*(tensor.split(rows) for tensor in tensors)):
            wide, wide_grad = _widen(block), _widen(grad_block)
            product = wide * wide_grad
            grad_weight.addmv_(product.T, rstd[:, 0])
            # The term rstd · mean(g · n) · n of the module docstring's formula, as a factor of x.
            factor = torch.mv(product, scale)[:, None].mul_(rstd.pow(3)).div_(x.shape[-1])
            block_grad = torch.mul(wide_grad, scale, out=out if out.dtype == scale.dtype else product)
            block_grad.mul_(rstd).addcmul_(wide, factor, value=-1)
            if block_grad is not out:
                out.copy_(block_grad)
        return grad_x, grad_weight.to(weight.dtype), None


def _gated(x: Tensor, gate: Tensor, rstd_N1: Tensor, weight: Tensor, activation: Activation) -> Tensor:
    """X · rstd · weight · act(gate), contiguous, in x's shape and dtype."""
    x_ND, scale = _rows(x), _widen(weight)
    out_ND = torch.empty_like(x_ND, memory_format=torch.contiguous_format)
    act = F.silu if activation == "silu" else torch.sigmoid
    rows = _block_rows(x)
    tensors = (x_ND, _rows(gate), rstd_N1, out_ND)
    for block, gate_block, rstd, out in zip(*(tensor.split(rows) for tensor in tensors)):
        out.copy_(_widen(block).mul(rstd).mul_(scale).mul_(act(_widen(gate_block))))
    return out_ND.view(x.shape)


class _GatedRMSNorm(torch.autograd.Function):
    """`gated_rms_norm`: saves x, gate, weight and rstd [N, 1]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, weight: Tensor, eps: float, activation: Activation) -> Tensor:
        rstd_N1 = _inverse_norm(_rows(x), eps, x.shape[-1])
        out = _gated(x, gate, rstd_N1, weight, activation)
        save(ctx, activations=(x, gate), weights=(weight,), statistics=(rstd_N1,))
        derive(out, partial(_gated, activation=activation), (x, gate), rstd_N1, weight)
        ctx.activation = activation
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        x, gate, weight, rstd_N1 = ctx.saved_tensors
        grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
        grad_gate = torch.empty_like(gate, memory_format=torch.contiguous_format)
        scale = _widen(weight)
        grad_weight = torch.zeros_like(scale)
        rows = _block_rows(x)
        tensors = (_rows(grad), _rows(x), _rows(gate), rstd_N1, _rows(grad_x), _rows(grad_gate))
        for grad_block, block, gate_block, rstd, out, out_gate in zip(*(tensor.split(rows) for tensor in tensors)):
            normed = _widen(block).mul(rstd)
            act, grad_gate_block = _gate_terms(_widen(gate_block), _widen(grad_block) * normed * scale, ctx.activation)
            out_gate.copy_(grad_gate_block)
            grad_normed = _widen(grad_block) * act
            product = grad_normed * normed
            grad_weight += product.sum(0)
            mean = torch.mv(product, scale).div_(x.shape[-1])[:, None]
            out.copy_(grad_normed.mul_(scale).addcmul_(normed, mean, value=-1).mul_(rstd))
        return grad_x, grad_gate, grad_weight.to(weight.dtype), None, None


def _gate_terms(gate: Tensor, grad_act: Tensor, activation: Activation) -> tuple[Tensor, Tensor]:
    """Return act(gate) and the gradient of gate, given the gradient of act(gate)."""
    if activation == "silu":
        return F.silu(gate), torch.ops.aten.silu_backward(grad_act, gate)
    act = gate.sigmoid()
    return act, torch.ops.aten.sigmoid_backward(grad_act, act)


def _of_norm_one(x: Tensor, inverse_N1: Tensor) -> Tensor:
    """X · inverse, contiguous, in x's shape and dtype."""
    x_NK = _rows(x)
    out_NK = torch.empty_like(x_NK, memory_format=torch.contiguous_format)
    rows = _block_rows(x)
    for block, inverse, out in zip(x_NK.split(rows), inverse_N1.split(rows), out_NK.split(rows)):
        torch.mul(block, inverse, out=out)
    return out_NK.view(x.shape)


class _L2Norm(torch.autograd.Function):
    """`l2_norm`: saves x and the inverse norm [N, 1]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        inverse_N1 = _inverse_norm(_rows(x), eps, 1)
        out = _of_norm_one(x, inverse_N1)
        save(ctx, activations=(x,), statistics=(inverse_N1,))
        derive(out, _of_norm_one, (x,), inverse_N1)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        x, inverse_N1 = ctx.saved_tensors
        grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
        rows = _block_rows(x)
        tensors = (_rows(grad), _rows(x), inverse_N1, _rows(grad_x))
        for grad_block, block, inverse, out in zip(*(tensor.split(rows) for tensor in tensors)):
            normed = _widen(block).mul(inverse)
            wide = _widen(grad_block)
            dot = (wide * normed).sum(-1, keepdim=True)
            out.copy_(torch.addcmul(wide, normed, dot, value=-1).mul_(inverse))
        return grad_x, None
