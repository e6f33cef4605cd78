"""SwiGLU, silu(gate) · up: the gate of Llama-like feed-forward blocks (Shazeer 2020, arXiv:2002.05202, eq. 6)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.autograd import compresses, derive, once_differentiable, save
from kernels.backend import is_generating, resolve
from kernels.quantization import pack_signs, unpack_signs
from kernels.shapes import block_limit
from kernels.triton import implementations

# Elements per block of rows on the CPU, few enough that a second operation on the block finds it in the cache.
_BLOCK_ELEMENTS = 1 << 18

_BACKENDS = ("torch", "reference")


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up in plain operations, any floating dtype; shapes as in `swiglu`."""
    return F.silu(gate) * up


def swiglu(gate: Tensor, up: Tensor, *, backend: str = "auto") -> Tensor:
    """Compute silu(gate) · up.

    Args:
        gate, up: [..., F], the same shape and floating dtype.
        backend: auto, reference, torch or triton.

    Returns:
        [..., F] in their dtype. Only gate and up are saved; the backward recomputes silu(gate).

    Raises:
        ValueError: shapes or dtypes differ, or the backend cannot serve these inputs.
    """
    if gate.shape != up.shape or gate.dtype != up.dtype or not gate.is_floating_point():
        raise ValueError(
            f"swiglu: gate {tuple(gate.shape)} {gate.dtype} and up {tuple(up.shape)} {up.dtype} must have the same "
            "shape and floating dtype"
        )
    choice = resolve("swiglu", backend, implementations(_BACKENDS, gate, up))
    if choice == "reference":
        return swiglu_reference(gate, up)
    if choice == "triton":
        from kernels.triton import activations  # lazily: not every machine has Triton

        return activations.swiglu(gate, up)
    return F.silu(gate).mul_(up) if is_generating() else _SwiGLU.apply(gate, up)


def swiglu_packed(gate_up: Tensor, *, backend: str = "auto") -> Tensor:
    """Compute silu(gate) · up, [..., F], of one tensor [..., 2F] holding gate and then up (a fused projection).

    Compared with `swiglu` on the two halves, this avoids the copy that concatenates their gradients.

    Raises:
        ValueError: gate_up is not floating, its last dimension is odd, or the backend (as in `swiglu`) cannot serve it.
    """
    if not gate_up.is_floating_point():
        raise ValueError(f"swiglu_packed: gate and up must be floating, not {gate_up.dtype}")
    if gate_up.shape[-1] % 2:
        raise ValueError(f"swiglu_packed: the last dimension holds gate and up, but {gate_up.shape[-1]} is odd")
    choice = resolve("swiglu_packed", backend, implementations(_BACKENDS, gate_up))
    if choice == "reference":
        return swiglu_reference(*gate_up.chunk(2, dim=-1))
    if choice == "triton":
        from kernels.triton import activations

        return activations.swiglu_packed(gate_up)
    return _SwiGLUPacked.apply(gate_up)


def relu(x: Tensor) -> Tensor:
    """max(x, 0) of a floating tensor.

    Where activations are compressed, backward reads one exact bit of each element in place of a rounded output, of
    which the smallest positive ones would be 0.
    """
    return _ReLU.apply(x)


def _rows(x: Tensor) -> Tensor:
    """Reshape x [..., F] to [N, F]."""
    return x.reshape(-1, x.shape[-1])


def _block_rows(x_NF: Tensor) -> int:
    """Return the rows per block: as many as fit a CPU's cache; all on a GPU."""
    return max(1, block_limit(_BLOCK_ELEMENTS) // x_NF.shape[1] if x_NF.is_cpu else len(x_NF))


def _forward_rows(gate_NF: Tensor, up_NF: Tensor) -> Tensor:
    out_NF = torch.empty_like(gate_NF, memory_format=torch.contiguous_format)
    rows = _block_rows(gate_NF)
    for gate, up, out in zip(gate_NF.split(rows), up_NF.split(rows), out_NF.split(rows)):
        torch.ops.aten.silu.out(gate, out=out)
        out.mul_(up)
    return out_NF


def _forward(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up in their shape, contiguous."""
    return _forward_rows(_rows(gate), _rows(up)).view(gate.shape)


def _backward_rows(grad_NF: Tensor, gate_NF: Tensor, up_NF: Tensor, grad_gate_NF: Tensor, grad_up_NF: Tensor) -> None:
    """Write both gradients to grad_gate and grad_up: d up = g silu(gate), d gate = g up silu'(gate)."""
    rows = _block_rows(gate_NF)
    tensors = (grad_NF, gate_NF, up_NF, grad_gate_NF, grad_up_NF)
    for grad, gate, up, grad_gate, grad_up in zip(*(tensor.split(rows) for tensor in tensors)):
        torch.ops.aten.silu.out(gate, out=grad_up)
        grad_up.mul_(grad)
        torch.mul(grad, up, out=grad_gate)
        torch.ops.aten.silu_backward.grad_input(grad_gate, gate, grad_input=grad_gate)


class _ReLU(torch.autograd.Function):
    """`relu`: saves its output, or its signs in one bit."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = torch.relu(x)
        ctx.packed = compresses()
        if ctx.packed:
            save(ctx, indices=(pack_signs(out),))
        else:
            save(ctx, activations=(out,))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (kept,) = ctx.saved_tensors
        if ctx.packed:
            return grad * unpack_signs(kept, grad.shape[-1])
        return torch.ops.aten.threshold_backward(grad, kept, 0)


class _SwiGLU(torch.autograd.Function):
    """`swiglu`: saves its inputs."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        save(ctx, activations=(gate, up))
        out = _forward(gate, up)
        derive(out, _forward, (gate, up))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grad_gate = torch.empty_like(gate, memory_format=torch.contiguous_format)
        grad_up = torch.empty_like(up, memory_format=torch.contiguous_format)
        _backward_rows(_rows(grad), _rows(gate), _rows(up), _rows(grad_gate), _rows(grad_up))
        return grad_gate, grad_up


class _SwiGLUPacked(torch.autograd.Function):
    """`swiglu_packed`: saves its input; the gradient is one tensor of the input's shape."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        save(ctx, activations=(gate_up,))
        gate_NF, up_NF = _rows(gate_up).chunk(2, dim=-1)
        return _forward_rows(gate_NF, up_NF).view(*gate_up.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        grad_gate_up = torch.empty_like(gate_up, memory_format=torch.contiguous_format)
        _backward_rows(_rows(grad), *_rows(gate_up).chunk(2, dim=-1), *_rows(grad_gate_up).chunk(2, dim=-1))
        return grad_gate_up
