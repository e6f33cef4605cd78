"""A backward of our own is computed, not recorded: what asks for its derivative must be refused."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

_Backward = TypeVar("_Backward", bound=Callable[..., Any])

_REFUSED = (
    "second derivatives: an operation of kernels/ has only first ones here, for its backward is written by hand; "
    "backend='reference', of operations that have it, gives every one"
)


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
