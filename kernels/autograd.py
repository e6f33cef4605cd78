"""Shared by the autograd Functions of kernels/: saving tensors by role, and refusing second derivatives.

A Function's forward saves tensors with `save`, which states each tensor's role. A saved-tensor hook reads the role with
`role_of`. A hook that stores activations in fewer bits must leave weights, statistics and indices alone, and dtypes do
not tell them apart. Our backwards are computed by hand and not recorded, so differentiating one is an error.

Some outputs can be recomputed from tensors that the operation saves anyway: a norm's output from its input and its
statistics. The operation says so with `derive`. A hook that compresses then stores nothing for such an output.
"""

import functools
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

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


class Extent(NamedTuple):
    """The range of elements that a tensor fills in its storage, whatever the order of its dimensions.

    Attributes:
        storage: Identity of the storage. It is not reused while a weak reference to the storage is held.
        first: Index of the first element.
        numel: Number of elements.
        version: The tensor's version counter, which in-place writes increment.
    """

    storage: int
    first: int
    numel: int
    version: int

    @classmethod
    def of(cls, x: Tensor) -> "Extent":
        """Return the range of x's `numel` elements from its storage offset on."""
        return cls(x.untyped_storage()._cdata, int(x.storage_offset()), x.numel(), x._version)


class Geometry(NamedTuple):
    """A tensor's extent, shape and strides: enough to rebuild the tensor as a view of its storage."""

    extent: Extent
    shape: torch.Size
    stride: tuple[int, ...]

    @classmethod
    def of(cls, x: Tensor) -> "Geometry":
        """Return the geometry of x."""
        return cls(Extent.of(x), x.shape, x.stride())


@dataclass(frozen=True, eq=False)
class Recipe:
    """How to recompute a tensor: function(*inputs, *constants).

    Attributes:
        extent: Extent of the tensor.
        function: Computes the tensor, contiguous and without a gradient.
        inputs: Activations, each as its geometry and a weak reference. The recipe does not keep them in memory.
        constants: Weights and statistics, which the recipe keeps in memory.
        stores_inputs: See `derive`.
    """

    extent: Extent
    function: Callable[..., Tensor]
    inputs: tuple[tuple[Geometry, weakref.ref[Tensor]], ...]
    constants: tuple[Tensor, ...]
    stores_inputs: bool


@dataclass
class Notes:
    """What operations declare about their tensors while saved activations are compressed.

    Attributes:
        recipes: Recipes of recomputable tensors, by the storage's identity.
        labels: Names given by `label`, with a weak reference to the tensor, by the storage's identity.
        storages: Weak references that keep the identities of storages from being reused.
    """

    recipes: dict[int, Recipe] = field(default_factory=dict)
    labels: dict[int, tuple[str, weakref.ref[Tensor]]] = field(default_factory=dict)
    storages: list[StorageWeakRef] = field(default_factory=list)

    def hold(self, *tensors: Tensor) -> None:
        """Keep the identities of the tensors' storages from being reused, without keeping their memory."""
        self.storages += [StorageWeakRef(x.untyped_storage()) for x in tensors]


_NOTES: ContextVar[Notes | None] = ContextVar("notes", default=None)
_EXACT: ContextVar[bool] = ContextVar("exact", default=False)

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


@contextmanager
def noting(notes: Notes | None) -> Iterator[None]:
    """Context in which `derive` and `label` write to `notes`. With None they do nothing."""
    token = _NOTES.set(notes)
    try:
        yield
    finally:
        _NOTES.reset(token)


def compresses() -> bool:
    """Return whether activations saved now will be compressed."""
    return _NOTES.get() is not None


def derive(
    y: Tensor,
    function: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    *constants: Tensor,
    stores_inputs: bool = True,
) -> None:
    """Declare that y equals function(*inputs, *constants) bit by bit, so that compression need not store y.

    Does nothing if activations are not compressed, if y is not contiguous, or if y shares its storage with an input.

    Args:
        y: the tensor that can be recomputed.
        function: computes y from the inputs and constants.
        inputs: activations that backward keeps for another reason, or that are themselves derived.
        constants: weights and statistics.
        stores_inputs: whether an input that is neither is stored in place of y, if it still exists when y is saved.
            Otherwise y itself is stored then.
    """
    if (notes := _NOTES.get()) is None or not y.is_contiguous():
        return
    if y.untyped_storage()._cdata in {x.untyped_storage()._cdata for x in inputs}:
        return
    notes.hold(y, *inputs)
    extent = Extent.of(y)
    # Detach, because ZeRO 3 frees a parameter's values between its module's forward and backward.
    values = tuple(x.detach() for x in constants)
    known = tuple((Geometry.of(x), weakref.ref(x)) for x in inputs)
    notes.recipes[extent.storage] = Recipe(extent, function, known, values, stores_inputs)


def label(**tensors: Tensor) -> None:
    """Name tensors of the running module, where the order in which they are saved may differ between layouts.

    If an operation saves a part of a labelled tensor, compression stores the whole tensor, once for all parts.
    """
    if (notes := _NOTES.get()) is not None:
        notes.hold(*tensors.values())
        notes.labels |= {x.untyped_storage()._cdata: (name, weakref.ref(x)) for name, x in tensors.items()}


@contextmanager
def exact() -> Iterator[None]:
    """Context in which tensors saved by torch's own operations count as statistics.

    Used around the computation of decays and write strengths, whose inputs must keep full precision.
    """
    token = _EXACT.set(True)
    try:
        yield
    finally:
        _EXACT.reset(token)


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
    if _EXACT.get() or not tensor.requires_grad:
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
