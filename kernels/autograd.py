"""What all autograd Functions of our own share: they save by role, and refuse second derivatives.

A Function's forward says with `save` what each tensor is that its backward will read, and a saved-tensor hook asks with
`role_of`: what stores activations in fewer bits must leave weights, statistics and indices alone, which a dtype does
not tell apart. A backward of our own is computed, not recorded: what asks for its derivative is refused.
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
    "second derivatives: an operation of kernels/ has only first ones here, for its backward is written by hand; "
    "backend='reference', of operations that have it, gives every one"
)


class Role(Enum):
    """What a tensor is that is kept for backward.

    Attributes:
        ACTIVATION: What flows through the model, one row for each token; it may be stored in fewer bits.
        WEIGHT: A parameter, or what was made of one.
        STATISTIC: What must keep its digits: norms and sums of rows, decays and their states, gates, gradients, and
            what enters a region that runs again.
        INDEX: Integers and masks.
    """

    ACTIVATION = "activation"
    WEIGHT = "weight"
    STATISTIC = "statistic"
    INDEX = "index"


_Named = tuple[tuple[weakref.ref[Tensor], Role], ...]
# By the latest `name`: torch calls the hooks right after the forward that saved, in the same thread.
_NAMED: ContextVar[_Named] = ContextVar("named", default=())


def save(
    ctx: Any,
    *,
    activations: Sequence[Tensor | None] = (),
    weights: Sequence[Tensor | None] = (),
    statistics: Sequence[Tensor | None] = (),
    indices: Sequence[Tensor | None] = (),
) -> None:
    """Keep tensors for a Function's backward, each by its role; once in a forward, in place of save_for_backward.

    `ctx.saved_tensors` has them in the order of this signature: activations, weights, statistics, indices.
    """
    groups = zip(Role, (activations, weights, statistics, indices), strict=True)
    named = [(x, role) for role, tensors in groups for x in tensors]
    name(named)
    ctx.save_for_backward(*(x for x, _ in named))


def name(named: Iterable[tuple[Tensor | None, Role]]) -> None:
    """Say what tensors are that torch is to save next; it holds until others are named."""
    _NAMED.set(tuple((weakref.ref(x), role) for x, role in named if x is not None))


def role_of(tensor: Tensor) -> Role:
    """What the tensor is that a saved-tensor hook is to pack: as it was named, or else by what autograd knows of it.

    torch's own operations name nothing. Of theirs an activation is a floating tensor that a gradient flows through.
    Leaves and views of leaves are weights; what has no gradient (an attention's logsumexp, a rotary table) counts as a
    statistic. What was computed from weights alone cannot be told from an activation.
    """
    for named, role in _NAMED.get():
        if named() is tensor:
            return role
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return Role.INDEX
    if not tensor.requires_grad:
        return Role.STATISTIC
    # A linear layer saves the transpose of its weight, a view. What a Function gives may be a view of a leaf, too, but
    # that one has no gradient.
    base = tensor if tensor._base is None else tensor._base
    return Role.WEIGHT if base.is_leaf and base.requires_grad else Role.ACTIVATION


def once_differentiable(backward: _Backward) -> _Backward:
    """Mark the backward of an autograd Function: whoever differentiates what it gives gets a RuntimeError.

    torch's decorator of this name refuses only where the incoming gradients depend on something. Those of a sum are
    constants, and then what the backward owes to the saved inputs is left out of second derivatives without a word.
    Here every result of a backward that is recorded (`create_graph=True`) hangs on a node that raises.
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
        # The node takes part in a graph only if something that enters it does.
        leaves: list[Any] = [None if x is None else x.detach().requires_grad_() for x in given]
        refused = torch._C._functions.DelayedError(message, len(leaves))(*leaves)
        return refused if several else refused[0] if isinstance(refused, tuple) else refused

    call.once_differentiable = True  # type: ignore[attr-defined]
    return call  # type: ignore[return-value]
