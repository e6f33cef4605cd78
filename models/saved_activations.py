"""What backward keeps of a block: one policy, by block and module, and the saved-tensor hooks that carry it out.

Of a module of a block, backward keeps what autograd saves (KEEP), or what enters it, and runs it again (RECOMPUTE,
arXiv 1604.06174), or what autograd saves with its activations stored by a codec (COMPRESS, arXiv 2111.11124). A
mixer and a feed-forward are recomputed each with the norm before it: the norm costs next to nothing, and alone it would
save nothing, for what it gives is kept by the projections that follow. Collectives inside what is recomputed run again,
too, and before the collectives of its backward, on every rank alike.

No random state is kept: nothing in a block draws random numbers (there is no dropout), and reading the generators'
state would cost a copy to the host for every region. What a router's noise is drawn from are the tokens themselves.

torch calls the innermost saved-tensor hooks alone. Those of here (`hooks`) hand what they keep to the ones around them:
recomputation, compression and a count of bytes work in any nesting, and each sees what the ones within it left.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from typing import Any, Literal, NamedTuple, TypeVar, TypeVarTuple, get_args

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from kernels.autograd import Role, name, role_of

R = TypeVar("R")
Ts = TypeVarTuple("Ts")
# Which run of a region that is recomputed this is, 1 or 2; 0 outside of one.
_RUN = ContextVar("run", default=0)


class Kept(NamedTuple):
    """What is kept in the place of a tensor.

    Attributes:
        tensors: From forward to backward.
        restore: Gives the tensor from them, without a gradient of its own.
    """

    tensors: tuple[Tensor, ...]
    restore: Callable[..., Tensor]


Codec = Callable[[Tensor], Kept]
"""Stores an activation in fewer bytes. It must not keep the activation itself, nor depend on anything random."""


def as_it_is(x: Tensor) -> Kept:
    """Keep a tensor itself."""
    return Kept((x,), _same)


def _same(x: Tensor) -> Tensor:
    return x


def bfloat16(x: Tensor) -> Kept:
    """The codec that keeps float32 activations as bfloat16, half the bytes, eight bits of mantissa; others as they are.

    What forward computes does not change; gradients are those of the rounded activations.
    """
    return Kept((x.to(torch.bfloat16),), torch.Tensor.float) if x.dtype == torch.float32 else as_it_is(x)


class Saving(Enum):
    """What backward keeps of a module: everything, what enters it, or everything with activations compressed."""

    KEEP = "keep"
    RECOMPUTE = "recompute"
    COMPRESS = "compress"


KEEP, RECOMPUTE, COMPRESS = Saving
Part = Literal["block", "mixer", "ffn", "moe_activation", "moe_experts"]


@dataclass(frozen=True)
class BlockPolicy:
    """What one block keeps. Within what runs again as a whole, what is said of its modules means nothing.

    Attributes:
        block: Of the whole block.
        mixer: Of the mixer and the norm before it.
        ffn: Of the feed-forward, dense or of experts, and the norm before it.
        moe_activation: Of a mixture of experts' router, and of the activation between the experts' products.
        moe_experts: Of routed and shared experts, without the exchange of tokens.
        recompute_above: A routed expert with more than this times the mean number of rows, over a rank's own experts,
            is recomputed by itself; None: none is.
        codec: Of the modules to compress.
    """

    block: Saving = KEEP
    mixer: Saving = KEEP
    ffn: Saving = KEEP
    moe_activation: Saving = KEEP
    moe_experts: Saving = KEEP
    recompute_above: float | None = None
    codec: Codec = bfloat16

    @classmethod
    def of_config(cls, recompute: str, modules: Sequence[str] | None, recompute_above: float | None) -> "BlockPolicy":
        """The policy of train.recompute, train.recompute_modules and model.moe.recompute_above.

        Raises:
            ValueError: a choice or a module that a block does not have.
        """
        # Measured on the study's 340M shapes: see docs/parallelism.md.
        choices = {"none": (), "selective": modules or ("mixer",), "full": ("block",)}
        if recompute not in choices:
            raise ValueError(f"train.recompute={recompute} is unknown; use one of {', '.join(choices)}")
        known = get_args(Part)
        if unknown := [part for part in choices[recompute] if part not in known]:
            raise ValueError(f"train.recompute_modules has {', '.join(unknown)}; a block has {', '.join(known[1:])}")
        parts: dict[str, Any] = dict.fromkeys(choices[recompute], RECOMPUTE)
        return cls(recompute_above=recompute_above, **parts)

    def _saving(self, part: Part) -> Saving:
        """What is to be done now: nothing without a backward, nor in what runs again as a whole."""
        wanted: Saving = getattr(self, part)
        return wanted if torch.is_grad_enabled() and not _RUN.get() else KEEP

    @property
    def busy_experts_above(self) -> float | None:
        """`recompute_above`, where there is a backward and experts are not all recomputed anyway."""
        idle = not torch.is_grad_enabled() or _RUN.get() or self.moe_experts is RECOMPUTE
        return None if idle else self.recompute_above

    def run(self, part: Part, function: Callable[[*Ts], R], *args: *Ts) -> R:
        """What `function`, this part of the block, gives; with gradients asked for, keeping what the policy says."""
        saving = self._saving(part)
        if saving is RECOMPUTE:
            return run_region(function, *args)
        with compressing(self.codec) if saving is COMPRESS else nullcontext():
            return function(*args)

    def run_product(
        self,
        first: Callable[..., tuple[Tensor, ...]],
        second: Callable[..., Tensor],
        inputs: Sequence[Tensor],
        product: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """product(second(*first(*inputs))), the experts' moe_activation around its two steps.

        Recomputed, the second step's result is kept by what the first gave. As a region of the activation and the
        product after it, the product would run again, too.
        """
        saving = self._saving("moe_activation")
        with compressing(self.codec) if saving is COMPRESS else nullcontext():
            given = first(*inputs)
            hidden = second(*given)
            if saving is not RECOMPUTE:
                return product(hidden)
            with _keeping_by_recipe(hidden, second, given):
                return product(hidden)


EVERYTHING = BlockPolicy()


@dataclass(frozen=True)
class Policy:
    """What every block of a model keeps.

    Attributes:
        everywhere: Of all blocks.
        blocks: Of some of them, by their numbers in the whole model, in its place.
    """

    everywhere: BlockPolicy = EVERYTHING
    blocks: Mapping[int, BlockPolicy] = field(default_factory=dict)

    def of(self, layer: int) -> BlockPolicy:
        """What the block of a layer keeps."""
        return self.blocks.get(layer, self.everywhere)


def is_recomputing() -> bool:
    """Whether a region runs for the second time: what is counted in the first must not be counted again."""
    return _RUN.get() == 2


@contextmanager
def _in_run(number: int) -> Iterator[None]:
    token = _RUN.set(number)
    try:
        yield
    finally:
        _RUN.reset(token)


def _contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return _in_run(1), _in_run(2)


def run_region(function: Callable[[*Ts], R], *args: *Ts) -> R:
    """What `function` gives; with gradients asked for, it runs again in backward, and only its arguments are kept.

    The second run ends with the last tensor that backward needs, which enters the last matrix product of the region;
    the sum over tensor-parallel ranks that follows the product is not taken again, on any of them. Where mixers run
    side by side, their sums are, for the norms that follow keep them.
    """
    if not torch.is_grad_enabled():
        return function(*args)
    # Not to be compressed: on rounded tokens a router might choose other experts.
    name((x, Role.STATISTIC) for x in args if isinstance(x, Tensor))
    output: R = checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, context_fn=_contexts)
    return output


def hooks(keep: Callable[[Tensor], Kept]) -> AbstractContextManager[None]:
    """In here backward keeps of a tensor what `keep` says; what that is goes to the hooks around these, if any."""
    # The only way to the hooks around: torch itself calls the innermost alone.
    outer = torch._C._autograd._top_saved_tensors_default_hooks(False)
    # What a node gives, kept as it is, would hold the node that holds it.
    outer_pack, outer_unpack = (Tensor.detach, _same) if outer is None else outer

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
    """In here backward keeps activations (kernels.autograd.Role) by `codec`, and everything else as it is.

    What several operations save, or views of it, is compressed once; in a region that is recomputed, whose activations
    are dropped at once or read at once, nothing is.
    """
    if _RUN.get():
        yield
        return
    once: dict[tuple[Any, ...], tuple[StorageWeakRef, Kept]] = {}

    def keep(x: Tensor) -> Kept:
        repeats = any(stride == 0 and size > 1 for stride, size in zip(x.stride(), x.shape, strict=True))
        # Of what is expanded, compressing would write every copy.
        if repeats or role_of(x) is not Role.ACTIVATION:
            return as_it_is(x)
        storage, contiguous = x.untyped_storage(), x.is_contiguous()
        layout = (x.numel(),) if contiguous else (x.shape, x.stride())
        key = storage._cdata, x.storage_offset(), x._version, x.dtype, *layout
        if key not in once:
            # A weak reference keeps the address from coming again.
            once[key] = StorageWeakRef(storage), codec(x)
        kept = once[key][1]
        return Kept(kept.tensors, partial(_reshaped, kept.restore, x.shape)) if contiguous else kept

    try:
        with hooks(keep):
            yield
    finally:
        once.clear()


def _reshaped(restore: Callable[..., Tensor], shape: torch.Size, *tensors: Tensor) -> Tensor:
    return restore(*tensors).view(shape)


def _keeping_by_recipe(
    x: Tensor, function: Callable[..., Tensor], inputs: Sequence[Tensor]
) -> AbstractContextManager[None]:
    """In here backward keeps x = function(*inputs) by the inputs, and everything else as it is."""
    # By the storage's address alone, so that the hooks do not keep the tensor.
    address = x.untyped_storage()._cdata

    def keep(saved: Tensor) -> Kept:
        if saved.untyped_storage()._cdata != address:
            return as_it_is(saved)
        return Kept(tuple(inputs), partial(_reshaped, function, saved.shape))

    return hooks(keep)
