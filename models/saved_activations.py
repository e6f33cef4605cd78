"""The tensors kept for backward: a policy per block and module, and the saved-tensor hooks that implement it.

Each module of a block has one of three settings:

    KEEP       keep the tensors that autograd saves
    RECOMPUTE  keep the module's inputs only, and run its forward again in backward (arXiv 1604.06174)
    COMPRESS   keep the tensors that autograd saves, with activations encoded by a codec (arXiv 2111.11124)

A mixer or a feed-forward is recomputed together with the norm before it. Recomputing the norm costs almost nothing, but
recomputing it alone would save nothing, because the projections after it keep its output. Collectives in a recomputed
module run again too, on every rank, before the collectives of the module's backward.

No random state is saved. Nothing in a block draws from a random generator: there is no dropout, and a router's noise is
a function of the tokens. Reading the generators' state would cost a copy to the host per recomputed region.

torch calls only the innermost saved-tensor hooks. The hooks of this module (`hooks`) pass the tensors they keep to the
hooks around them. Recomputation, compression and a count of bytes therefore nest in any order, and each sees the
tensors left by the hooks inside it.

Compression stores each storage once, however many operations save it or a view of it. A tensor that can be recomputed
from stored ones (kernels.autograd.derive) is not stored: backward recomputes a norm's output from its compressed input
and exact statistics, and SwiGLU's product from the compressed gate and up.
"""

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol, TypeVar, TypeVarTuple, get_args

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle

from kernels.autograd import Extent, Geometry, Notes, Recipe, Role, derive, name, noting, role_of

R = TypeVar("R")
Ts = TypeVarTuple("Ts")
# 1 in the first run of a recomputed region, 2 in the second, 0 outside of any region.
_RUN = ContextVar("run", default=0)
# Sees the tensors that autograd saves before they are encoded (`observing`).
_OBSERVER: ContextVar[Callable[[Tensor], None] | None] = ContextVar("observer", default=None)
# The modules that run, the innermost last, where their names matter (`follow`).
_SCOPES: ContextVar[tuple[str, ...]] = ContextVar("scopes", default=())


class Kept(NamedTuple):
    """The stored form of a saved tensor.

    Attributes:
        tensors: The tensors kept from forward to backward.
        restore: Computes the saved tensor from `tensors`, without a gradient.
    """

    tensors: tuple[Tensor, ...]
    restore: Callable[..., Tensor]


Codec = Callable[[Tensor, str], Kept]
"""Encodes a contiguous activation in fewer bytes, given its place in the block.

A codec must not keep the activation itself, except by returning `as_it_is` to leave it uncompressed. Its random numbers
must be a function of the place (models.compression), so that recomputation and every layout draw the same ones.
"""


def as_it_is(x: Tensor) -> Kept:
    """Keep the tensor itself."""
    return Kept((x,), _same)


def _same(x: Tensor) -> Tensor:
    return x


class Compressing(Protocol):
    """A source of codecs. models.compression implements the one that train.compression configures."""

    def codec(self) -> Codec | None:
        """Return the codec of the running block. None keeps activations as they are."""


class Saving(Enum):
    """What a module keeps for backward: everything, only its inputs, or everything with compressed activations."""

    KEEP = "keep"
    RECOMPUTE = "recompute"
    COMPRESS = "compress"


KEEP, RECOMPUTE, COMPRESS = Saving
Part = Literal["block", "mixer", "ffn", "moe_activation", "moe_experts"]


@dataclass(frozen=True)
class BlockPolicy:
    """The settings of one block. Inside a recomputed module, the settings of its submodules have no effect.

    Attributes:
        block: The whole block.
        mixer: The mixer and the norm before it.
        ffn: The feed-forward, dense or MoE, and the norm before it.
        moe_activation: The router of an MoE layer, and the activation between the experts' matrix products.
        moe_experts: The routed and shared experts, without the token exchange.
        recompute_above: A routed expert whose number of rows exceeds this multiple of the mean over the rank's experts
            is recomputed on its own. None recomputes no single expert.
        compression: Gives the codec of compressed modules; None compresses nothing. The input of a recomputed region is
            compressed too, unless the region contains a router.
        routed: Whether the feed-forward is MoE.
    """

    block: Saving = KEEP
    mixer: Saving = KEEP
    ffn: Saving = KEEP
    moe_activation: Saving = KEEP
    moe_experts: Saving = KEEP
    recompute_above: float | None = None
    compression: Compressing | None = None
    routed: bool = False

    @classmethod
    def of_config(
        cls,
        recompute: str,
        modules: Sequence[str] | None,
        recompute_above: float | None,
        compression: Compressing | None = None,
    ) -> "BlockPolicy":
        """Build the policy of train.recompute, train.recompute_modules, model.moe.recompute_above, train.compression.

        Raises:
            ValueError: `recompute` or one of `modules` is unknown.
        """
        # The default of "selective" was measured on the study's 340M shapes, see docs/parallelism.md.
        choices = {"none": (), "selective": modules or ("mixer",), "full": ("block",)}
        if recompute not in choices:
            raise ValueError(f"train.recompute={recompute} is unknown; use one of {', '.join(choices)}")
        known = get_args(Part)
        if unknown := [part for part in choices[recompute] if part not in known]:
            raise ValueError(f"train.recompute_modules has {', '.join(unknown)}; a block has {', '.join(known[1:])}")
        parts: dict[str, Any] = {"block": KEEP if compression is None else COMPRESS}
        parts |= dict.fromkeys(choices[recompute], RECOMPUTE)
        return cls(recompute_above=recompute_above, compression=compression, **parts)

    def _saving(self, part: Part) -> Saving:
        """Return the part's setting; KEEP if gradients are disabled or an enclosing region is recomputed."""
        wanted: Saving = getattr(self, part)
        return wanted if torch.is_grad_enabled() and not _RUN.get() else KEEP

    @property
    def busy_experts_above(self) -> float | None:
        """`recompute_above`; None if gradients are disabled or all experts are recomputed anyway."""
        idle = not torch.is_grad_enabled() or _RUN.get() or self.moe_experts is RECOMPUTE
        return None if idle else self.recompute_above

    def run(self, part: Part, function: Callable[[*Ts], R], *args: *Ts) -> R:
        """Run `function`, the given part of the block, under the policy's setting, and return its result."""
        saving = self._saving(part)
        if saving is RECOMPUTE:
            # A router needs exact inputs. With rounded tokens it might choose other experts.
            routes = part == "moe_activation" or (self.routed and part in ("block", "ffn"))
            with self._compressing() if part == "block" else nullcontext():
                return run_region(function, *args, exact=routes)
        with self._compressing() if saving is COMPRESS else nullcontext():
            return function(*args)

    def _compressing(self) -> AbstractContextManager[None]:
        codec = None if self.compression is None else self.compression.codec()
        return nullcontext() if codec is None else compressing(codec)

    def run_product(
        self,
        first: Callable[..., tuple[Tensor, ...]],
        second: Callable[..., Tensor],
        inputs: Sequence[Tensor],
        product: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Compute product(second(*first(*inputs))), with the setting of moe_activation applied to first and second.

        If it is RECOMPUTE, backward keeps the results of `first` and runs `second` again. A recomputed region of the
        activation and the product would run the product again too.
        """
        saving = self._saving("moe_activation")
        with self._compressing() if saving is COMPRESS else nullcontext():
            given = first(*inputs)
            hidden = second(*given)
            derive(hidden, second, given)
            if saving is not RECOMPUTE:
                return product(hidden)
            with _keeping_by_recipe(hidden, second, given):
                return product(hidden)


EVERYTHING = BlockPolicy()


@dataclass(frozen=True)
class Policy:
    """The settings of every block of a model.

    Attributes:
        everywhere: The default.
        blocks: Exceptions, by block number in the whole model.
    """

    everywhere: BlockPolicy = EVERYTHING
    blocks: Mapping[int, BlockPolicy] = field(default_factory=dict)

    def of(self, layer: int) -> BlockPolicy:
        """Return the settings of the block of a layer."""
        return self.blocks.get(layer, self.everywhere)


def is_recomputing() -> bool:
    """Whether a region is in its second run. Counters must skip that run, because the first was counted."""
    return _RUN.get() == 2


def follow(block: nn.Module) -> list[RemovableHandle]:
    """Register hooks that track which module of a block is running, for `scope_now`. Return their handles."""
    handles = []
    for path, module in block.named_modules():
        handles.append(module.register_forward_pre_hook(partial(_enter, path)))
        # Leave also after an error, so that the next forward starts without scopes.
        handles.append(module.register_forward_hook(_leave, always_call=True))
    return handles


def _enter(path: str, *_: Any) -> None:
    _SCOPES.set((*_SCOPES.get(), path))


def _leave(*_: Any) -> None:
    _SCOPES.set(_SCOPES.get()[:-1])


def scope_now() -> str:
    """Return the name, within its block, of the innermost running module."""
    scopes = _SCOPES.get()
    return scopes[-1] if scopes else ""


@contextmanager
def _in_run(number: int) -> Iterator[None]:
    token = _RUN.set(number)
    try:
        # Both runs must save the same tensors. The second runs outside of `compressing`, so neither may take notes.
        with noting(None):
            yield
    finally:
        _RUN.reset(token)


def _contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return _in_run(1), _in_run(2)


def run_region(function: Callable[[*Ts], R], *args: *Ts, exact: bool = True) -> R:
    """Return function(*args). If gradients are enabled, keep only the arguments and run it again in backward.

    With exact=False a compressing hook may compress the arguments.

    The second run stops at the last tensor that backward needs: the input of the region's last matrix product. The
    tensor-parallel all-reduce after that product does not run again, on any rank. With parallel mixer branches the
    branches' all-reduces do run again, because the norms after them keep the results.
    """
    if not torch.is_grad_enabled():
        return function(*args)
    tensors = [x for x in args if isinstance(x, Tensor)]
    # Statistics are never compressed. With rounded tokens a router might choose other experts.
    name((x, Role.STATISTIC if exact or not x.requires_grad else Role.ACTIVATION) for x in tensors)
    output: R = checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, context_fn=_contexts)
    return output


def _let_go(x: Tensor) -> Tensor:
    # Detach, because a node that keeps its own output would form a reference cycle with it. Parameters are not
    # detached, because ZeRO 3 removes their values between forward and backward.
    return x if x.is_leaf else x.detach()


def hooks(keep: Callable[[Tensor], Kept]) -> AbstractContextManager[None]:
    """Context in which saved tensors are stored as `keep` returns them, and passed to the enclosing hooks, if any."""
    # torch calls only the innermost hooks, so the enclosing ones are looked up and called here.
    outer = torch._C._autograd._top_saved_tensors_default_hooks(False)
    outer_pack, outer_unpack = (_let_go, _same) if outer is None else outer

    def pack(x: Tensor) -> tuple[list[Any], Callable[..., Tensor]]:
        kept = keep(x)
        return [outer_pack(tensor) for tensor in kept.tensors], kept.restore

    def unpack(packed: tuple[list[Any], Callable[..., Tensor]]) -> Tensor:
        tensors, restore = packed
        with torch.no_grad():
            return restore(*map(outer_unpack, tensors))

    return saved_tensors_hooks(pack, unpack)


@contextmanager
def compressing(codec: Codec) -> Iterator[None]:
    """Context in which saved activations (`kernels.autograd.Role`) are encoded by `codec`, and other tensors kept.

    A tensor that several operations save, directly or as a view, is encoded once, and a derived tensor not at all.
    Inside a recomputed region nothing is encoded: its activations are dropped, or read in backward, immediately.
    """
    if _RUN.get():
        yield
        return
    compressor = _Compressor(codec)
    try:
        with noting(compressor.notes), hooks(compressor.keep):
            yield
    finally:
        compressor.clear()


@contextmanager
def observing(see: Callable[[Tensor], None]) -> Iterator[None]:
    """Context in which `see` gets every tensor that autograd saves under `compressing`, before it is encoded."""
    token = _OBSERVER.set(see)
    try:
        yield
    finally:
        _OBSERVER.reset(token)


class _Compressor:
    """The hook of `compressing`, with the tensors that it has stored and the notes from kernels, until forward ends."""

    def __init__(self, codec: Codec) -> None:
        self.notes = Notes()
        self._codec = codec
        self._stored: dict[Extent, _Stored] = {}
        self._derived: dict[Recipe, _Stored] = {}
        self._saved: Counter[str] = Counter()

    def clear(self) -> None:
        """Forget everything, because the hooks may live as long as the autograd graph."""
        self.__init__(self._codec)  # type: ignore[misc]

    def keep(self, x: Tensor) -> Kept:
        """Return the stored form of a tensor that autograd saves."""
        if (see := _OBSERVER.get()) is not None:
            see(x)
        repeats = any(stride == 0 and size > 1 for stride, size in zip(x.stride(), x.shape, strict=True))
        # Encoding an expanded tensor would write out every copy.
        if repeats or role_of(x) is not Role.ACTIVATION:
            return as_it_is(x)
        geometry = Geometry.of(x)
        stored = self._find(geometry.extent) or self._store(x)
        if stored is None:
            return as_it_is(x)
        return Kept(stored.tensors, partial(_view, stored.restore, geometry, stored.first))

    def _find(self, extent: Extent) -> "_Stored | None":
        """Return a stored form that contains an extent, already stored or recomputed from stored tensors, or None."""
        if extent in self._stored:
            return self._stored[extent]
        recipe = self.notes.recipes.get(extent.storage)
        if recipe is None or extent.version != recipe.extent.version:
            return self._of_part(extent)
        if recipe not in self._derived:
            stores = recipe.stores_inputs
            inputs = [
                self._find(geometry.extent) or (self._of_input(x()) if stores else None)
                for geometry, x in recipe.inputs
            ]
            found = [stored for stored in inputs if stored is not None]
            if len(found) < len(inputs):
                return self._of_part(extent)
            self._derived[recipe] = _derived(recipe, found)
        return self._derived[recipe]

    def _of_part(self, extent: Extent) -> "_Stored | None":
        """Return the stored form of the whole labelled tensor of which an extent is a part, storing it if necessary.

        The whole is stored because other operations save other parts of it.
        """
        _, whole_ref = self.notes.labels.get(extent.storage, ("", None))
        whole = None if whole_ref is None else whole_ref()
        if whole is None or whole._version != extent.version or in_storage_order(whole) is None:
            return None
        return self._stored.get(Extent.of(whole)) or self._of_input(whole)

    def _of_input(self, x: Tensor | None) -> "_Stored | None":
        return None if x is None or role_of(x) is not Role.ACTIVATION else self._store(x)

    def _store(self, x: Tensor) -> "_Stored | None":
        """Encode a tensor. Return None if it has gaps in its storage and the codec leaves it uncompressed."""
        dense = in_storage_order(x)
        given = x.contiguous() if dense is None else dense
        kept = self._codec(given, self._place(x))
        if dense is None:
            # Encode a copy of the tensor's own elements, because its storage may hold much else. Restoring puts them
            # into a new storage with the same gaps.
            restore = partial(_spread, kept.restore, x.shape, x.stride())
            stored = _Stored(kept.tensors, _remembering(restore), int(x.storage_offset()))
            return None if kept.tensors[0] is given else stored
        stored = _Stored(kept.tensors, _remembering(partial(_flat, kept.restore)), int(x.storage_offset()))
        self.notes.hold(x)
        self._stored[Extent.of(x)] = stored
        return stored

    def _place(self, x: Tensor) -> str:
        scope = scope_now()
        label, _ = self.notes.labels.get(x.untyped_storage()._cdata, ("", None))
        if not label:
            # Number the tensors of a module in the order of saving, which is the same in every layout.
            label = str(self._saved[scope])
            self._saved[scope] += 1
        return f"{scope}.{label}".lstrip(".")


@dataclass(frozen=True)
class _Stored:
    """The stored form of a range of a storage.

    Attributes:
        tensors: The tensors kept from forward to backward.
        restore: Computes the range, flat, from `tensors`.
        first: Index in the storage of the range's first element.
    """

    tensors: tuple[Tensor, ...]
    restore: Callable[..., Tensor]
    first: int


def in_storage_order(x: Tensor) -> Tensor | None:
    """Return x with its dimensions permuted to the order of its storage, contiguous. None if it has gaps."""
    strides = x.stride()
    ordered = x.permute(sorted(range(x.dim()), key=lambda dim: -strides[dim]))
    return ordered if ordered.is_contiguous() else None


def _flat(restore: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    return restore(*tensors).view(-1)


def _spread(restore: Callable[..., Tensor], shape: torch.Size, stride: tuple[int, ...], *tensors: Tensor) -> Tensor:
    """Return a flat storage with gaps, in which the view of this shape and stride has the restored values."""
    values = restore(*tensors).view(shape)
    size = 1 + sum((extent - 1) * step for extent, step in zip(shape, stride, strict=True))
    flat = values.new_empty(size)
    flat.as_strided(shape, stride).copy_(values)
    return flat


def _view(restore: Callable[..., Tensor], geometry: Geometry, first: int, *tensors: Tensor) -> Tensor:
    flat = restore(*tensors)
    return flat.as_strided(geometry.shape, geometry.stride, geometry.extent.first - first)


def _derived(recipe: Recipe, inputs: Sequence[_Stored]) -> _Stored:
    tensors = tuple(x for stored in inputs for x in stored.tensors)
    counts = [len(stored.tensors) for stored in inputs]

    def restore(*given: Tensor) -> Tensor:
        rest = list(given)
        made = []
        for stored, (geometry, _), count in zip(inputs, recipe.inputs, counts, strict=True):
            made.append(_view(stored.restore, geometry, stored.first, *rest[:count]))
            del rest[:count]
        return recipe.function(*made, *rest).view(-1)

    return _Stored((*tensors, *recipe.constants), _remembering(restore), recipe.extent.first)


# Number of restored tensors that backward caches. Every projection that reads a norm's output needs it in backward.
# Gate and up are needed twice: to recompute SwiGLU's product for the down projection, and for SwiGLU's own gradient.
RECENT = 4
_recent: OrderedDict[object, Tensor] = OrderedDict()
_backward: list[int] = [-1]


def _remembering(restore: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return `restore` with a cache: within one backward, a recently restored tensor is not restored again."""
    token = object()

    def recall(*tensors: Tensor) -> Tensor:
        if (task := torch._C._current_graph_task_id()) == -1:
            return restore(*tensors)
        if task != _backward[0]:
            _recent.clear()
            _backward[0] = task
            torch.autograd.Variable._execution_engine.queue_callback(_recent.clear)
        if token not in _recent:
            made = restore(*tensors)
            _recent[token] = made
            while len(_recent) > RECENT:
                _recent.popitem(last=False)
        _recent.move_to_end(token)
        return _recent[token]

    return recall


def _keeping_by_recipe(
    x: Tensor, function: Callable[..., Tensor], inputs: Sequence[Tensor]
) -> AbstractContextManager[None]:
    """Context in which x = function(*inputs) is kept as its inputs and recomputed, and other tensors are kept."""
    # Compare addresses: a reference to the tensor would keep its memory.
    address = x.untyped_storage()._cdata

    def keep(saved: Tensor) -> Kept:
        if saved.untyped_storage()._cdata != address:
            return as_it_is(saved)
        return Kept(tuple(inputs), partial(_reshaped, function, saved.shape))

    return hooks(keep)


def _reshaped(function: Callable[..., Tensor], shape: torch.Size, *tensors: Tensor) -> Tensor:
    return function(*tensors).view(shape)
