"""Auxiliary losses whose gradients layers add in their backward pass. The reported loss does not include them."""

from typing import Any

import torch
from torch import Tensor

from kernels.autograd import once_differentiable


def add_loss(x: Tensor, loss: Tensor, scale: float) -> Tensor:
    """Return x. Its backward also back-propagates into `loss`, a scalar, with gradient `scale`."""
    y: Tensor = _AddLoss.apply(x, loss, scale)
    return y


class _AddLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor, scale: float) -> Tensor:
        ctx.scale, ctx.like = scale, loss.new_empty(())
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return grad, torch.full_like(ctx.like, ctx.scale), None
