"""Shared by the autograd Functions of kernels/: saving tensors by role, and refusing second derivatives.

A Function's forward saves tensors with `save`, which states each tensor's role. A saved-tensor hook reads the role with
`role_of`. A hook that stores activations in fewer bits must leave weights, statistics and indices alone, and dtypes do
not tell them apart. Our backwards are computed by hand and not recorded, so differentiating one is an error.
"""

import functools
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextvars import ContextVar
from enum import Enum
from typing import Any, TypeVar

import torch
from torch import Tensor

_Backward = TypeVar("_Backward", bound=Callable[..., Any])

_REFUSED = (
    "second derivatives: the kernels' hand-written backwards have only first ones; use backend='reference' where there "
    "is one"
)


class Role(Enum):
    """The role of a tensor saved for backward.

    Attributes:
        ACTIVATION: Data with one row per token. May be stored in fewer bits.
        WEIGHT: A parameter, or a tensor computed from one.
        STATISTIC: Must keep full precision: norms and sums of rows, decays and states, gates, gradients, and the
            inputs of a recomputed region.
        INDEX: Integers and masks.
    """

    ACTIVATION = "activation"
    WEIGHT = "weight"
    STATISTIC = "statistic"
    INDEX = "index"


_Named = tuple[tuple[weakref.ref[Tensor], Role], ...]
# Set by the latest call of `name`. torch calls the hooks right after the forward that saved, in the same thread.
_NAMED: ContextVar[_Named] = ContextVar("named", default=())


def save(
    ctx: Any,
    *,
    activations: Sequence[Tensor | None] = (),
    weights: Sequence[Tensor | None] = (),
    statistics: Sequence[Tensor | None] = (),
    indices: Sequence[Tensor | None] = (),
) -> None:
    """Save tensors for a Function's backward by role. Call it once per forward, in place of save_for_backward.

    `ctx.saved_tensors` returns them in the order of this signature: activations, weights, statistics, indices.
    """
    groups = zip(Role, (activations, weights, statistics, indices), strict=True)
    named = [(x, role) for role, tensors in groups for x in tensors]
    name(named)
    ctx.save_for_backward(*(x for x, _ in named))


def name(named: Iterable[tuple[Tensor | None, Role]]) -> None:
    """Set the roles of the tensors that torch saves next. They hold until the next call."""
    _NAMED.set(tuple((weakref.ref(x), role) for x, role in named if x is not None))


def role_of(tensor: Tensor) -> Role:
    """Return the role of a tensor that a saved-tensor hook packs: as named, or else derived from autograd's metadata.

    torch's own operations do not name their tensors. For those, integers and masks are indices, leaves and views of
    leaves are weights, and tensors without a gradient (an attention's logsumexp, a rotary table) are statistics. Any
    other floating tensor is an activation; tensors computed from weights alone cannot be told apart from activations.
    """
    for named, role in _NAMED.get():
        if named() is tensor:
            return role
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return Role.INDEX
    if not tensor.requires_grad:
        return Role.STATISTIC
    # A linear layer saves the transpose of its weight, a view of a leaf. A Function's output may also be a view of a
    # leaf, but of one that requires no gradient.
    base = tensor if tensor._base is None else tensor._base
    return Role.WEIGHT if base.is_leaf and base.requires_grad else Role.ACTIVATION


def once_differentiable(backward: _Backward) -> _Backward:
    """Decorate a Function's backward so that differentiating its results raises a RuntimeError.

    torch's decorator of this name raises only if the incoming gradients require a gradient. The gradients of a sum are
    constants, so there torch silently leaves the dependence on the saved inputs out of second derivatives. Here every
    result of a recorded backward (`create_graph=True`) gets a node that raises.
    """

    @functools.wraps(backward)
    def call(ctx: Any, *grads: Tensor) -> Any:
        with torch.no_grad():
            outputs = backward(ctx, *grads)
        if not torch.is_grad_enabled():
            return outputs
        several = isinstance(outputs, tuple)
        given = outputs if several else (outputs,)
        message = _REFUSED.encode()
        # The node joins the graph only if one of its inputs requires a gradient.
        leaves: list[Any] = [None if x is None else x.detach().requires_grad_() for x in given]
        refused = torch._C._functions.DelayedError(message, len(leaves))(*leaves)
        return refused if several else refused[0] if isinstance(refused, tuple) else refused

    call.once_differentiable = True  # type: ignore[attr-defined]
    return call  # type: ignore[return-value]
