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
# 1 in the first run of a recomputed region, 2 in the second, 0 outside of any region.
_RUN = ContextVar("run", default=0)


class Kept(NamedTuple):
    """The stored form of a saved tensor.

    Attributes:
        tensors: The tensors kept from forward to backward.
        restore: Computes the saved tensor from `tensors`, without a gradient.
    """

    tensors: tuple[Tensor, ...]
    restore: Callable[..., Tensor]


Codec = Callable[[Tensor], Kept]
"""Encodes an activation in fewer bytes. It must not keep the activation itself, and must not be random."""


def as_it_is(x: Tensor) -> Kept:
    """Keep the tensor itself."""
    return Kept((x,), _same)


def _same(x: Tensor) -> Tensor:
    return x


def bfloat16(x: Tensor) -> Kept:
    """Codec that stores float32 activations as bfloat16 (half the bytes, 8 significant bits) and others unchanged.

    The forward's results do not change. Gradients are computed from the rounded activations.
    """
    return Kept((x.to(torch.bfloat16),), torch.Tensor.float) if x.dtype == torch.float32 else as_it_is(x)


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
        codec: Codec of the compressed modules.
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
        """Build the policy from train.recompute, train.recompute_modules and model.moe.recompute_above.

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
        parts: dict[str, Any] = dict.fromkeys(choices[recompute], RECOMPUTE)
        return cls(recompute_above=recompute_above, **parts)

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
        """Compute product(second(*first(*inputs))), with the setting of moe_activation applied to first and second.

        If it is RECOMPUTE, backward keeps the results of `first` and runs `second` again. A recomputed region of the
        activation and the product would run the product again too.
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
    """Return function(*args). If gradients are enabled, keep only the arguments and run it again in backward.

    The second run stops at the last tensor that backward needs: the input of the region's last matrix product. The
    tensor-parallel all-reduce after that product does not run again, on any rank. With parallel mixer branches the
    branches' all-reduces do run again, because the norms after them keep the results.
    """
    if not torch.is_grad_enabled():
        return function(*args)
    # A statistic is never compressed: from rounded tokens a router might choose other experts.
    name((x, Role.STATISTIC) for x in args if isinstance(x, Tensor))
    output: R = checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, context_fn=_contexts)
    return output


def hooks(keep: Callable[[Tensor], Kept]) -> AbstractContextManager[None]:
    """Context in which saved tensors are stored as `keep` returns them, and passed to the enclosing hooks, if any."""
    # torch calls only the innermost hooks, so the enclosing ones are looked up and called here.
    outer = torch._C._autograd._top_saved_tensors_default_hooks(False)
    # Detach: a node that keeps its own output would otherwise form a reference cycle with it.
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
    """Context in which saved activations (`kernels.autograd.Role`) are encoded by `codec`, and other tensors kept.

    A tensor that several operations save, directly or as a view, is encoded once. Inside a recomputed region nothing is
    encoded, because its activations are dropped, or read in backward, immediately.
    """
    if _RUN.get():
        yield
        return
    once: dict[tuple[Any, ...], tuple[StorageWeakRef, Kept]] = {}

    def keep(x: Tensor) -> Kept:
        repeats = any(stride == 0 and size > 1 for stride, size in zip(x.stride(), x.shape, strict=True))
        # Encoding an expanded tensor would write out every copy.
        if repeats or role_of(x) is not Role.ACTIVATION:
            return as_it_is(x)
        storage, contiguous = x.untyped_storage(), x.is_contiguous()
        layout = (x.numel(),) if contiguous else (x.shape, x.stride())
        key = storage._cdata, x.storage_offset(), x._version, x.dtype, *layout
        if key not in once:
            # The weak reference prevents the address from being reused for another storage.
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
    """Context in which x = function(*inputs) is kept as its inputs and recomputed, and other tensors are kept."""
    # Compare addresses: a reference to the tensor would keep its memory.
    address = x.untyped_storage()._cdata

    def keep(saved: Tensor) -> Kept:
        if saved.untyped_storage()._cdata != address:
            return as_it_is(saved)
        return Kept(tuple(inputs), partial(_reshaped, function, saved.shape))

    return hooks(keep)
