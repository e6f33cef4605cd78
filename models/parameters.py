"""Declarations of all parameters and buffers: how each is sharded, stored, updated and initialised.

A module names its tensors in `placements`. One table, `declared(model)`, collects them. Sharding, initialisation,
weight decay, the dtype in bf16 training, sums of partial gradients, the choice of trained parameters, the checkpoints
of both engines, exports and the planner all read this table. An undeclared tensor is an error at construction.

A model is built in four steps, so that a rank holds its shard plus one 64 MB block, and never a whole model:

    shapes     on the meta device, whole
    shard      each rank keeps its shard of every shape
    memory     `to_empty` on the device, in the dtype of training
    values     drawn block by block (`draw`) or read from files, each rank its shard
"""

import hashlib
import math
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.config import ModelConfig

# Elements drawn at a time: 64 MB in float32.
_BLOCK_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class Groups:
    """The process groups over which a model is sharded; None means not sharded.

    Attributes:
        tensor: Ranks that share heads, feed-forward channels and the vocabulary.
        context: Ranks that hold consecutive, equal shards of every sequence.
        sequence: Also shard the residual stream over `tensor`.
        expert: Ranks that share the routed experts; each expert is whole on one of them. They are tensor-, context- and
            data-parallel ranks of a pipeline stage, and each has its own tokens.
    """

    tensor: dist.ProcessGroup | None = None
    context: dist.ProcessGroup | None = None
    sequence: bool = False
    expert: dist.ProcessGroup | None = None


WHOLE = Groups()


@dataclass(frozen=True)
class Drawing:
    """The inputs of an initialisation function.

    Attributes:
        config: Configuration of the whole model.
        shape: Shape of the whole parameter.
        generator: The parameter's own generator, seeded from the seed and the parameter's name.
        writes_residual: See Placement.
    """

    config: ModelConfig
    shape: torch.Size
    generator: torch.Generator
    writes_residual: bool


Init = Callable[[Tensor, Drawing], None]
"""Fills a block of rows [..., D] of a parameter in place, float32, in host memory."""


@dataclass(frozen=True)
class Placement:
    """Declaration of a parameter or buffer.

    Attributes:
        init: Function that draws its values.
        shard_axis: Dimension sharded over tensor-parallel ranks; None if replicated.
        expert: Whether its first dimension counts routed experts, sharded over expert-parallel ranks.
        in_region: Whether it is used inside a tensor-parallel region, where a rank sees only its own heads or channels
            and so computes a partial gradient. None inherits from the module, see Module.
        float32: Whether it stays float32 in bf16 training, because its updates are too small for bfloat16.
        decayed: Whether weight decay applies.
        writes_residual: Whether its product is added to the residual stream. GPT-2 scales such weights down.
        stream: Name of a generator that several parameters of a module share; None uses the parameter's own.
    """

    init: Init
    shard_axis: int | None = None
    expert: bool = False
    in_region: bool | None = None
    float32: bool = False
    decayed: bool = True
    writes_residual: bool = False
    stream: str | None = None


class Module(nn.Module):
    """A module that declares its parameters and buffers.

    Attributes:
        placements: Placement of each of its own parameters and buffers, by name.
        in_region: Whether its subtree lies inside a tensor-parallel region; None inherits from the enclosing module.
            Mixers and dense feed-forwards are regions; modules on the residual stream are not.
        groups: Process groups that share the model.
    """

    placements: ClassVar[Mapping[str, Placement]] = {}
    in_region: ClassVar[bool | None] = None
    groups: Groups = WHOLE

    def set_groups(self, groups: Groups) -> None:
        """Set the process groups, after the parameters have been sharded. Called once."""
        self.groups = groups


@dataclass(frozen=True)
class Declared:
    """A row of the table.

    Attributes:
        name: Name in the model.
        tensor: The parameter or buffer itself; this rank's shard.
        placement: Its declaration.
        in_region: Placement.in_region with inheritance resolved.
    """

    name: str
    tensor: Tensor
    placement: Placement
    in_region: bool

    @property
    def is_parameter(self) -> bool:
        """Whether it is a parameter rather than a buffer."""
        return isinstance(self.tensor, nn.Parameter)

    @property
    def axis(self) -> int | None:
        """The dimension that may be sharded over any kind of ranks."""
        return 0 if self.placement.expert else self.placement.shard_axis

    def group(self, groups: Groups) -> dist.ProcessGroup | None:
        """The ranks that shard it along `axis`; None if this rank has it whole."""
        if self.axis is None:
            return None
        return groups.expert if self.placement.expert else groups.tensor

    def place(self, groups: Groups) -> tuple[int | None, int, int]:
        """The sharded axis, this rank's index among the ranks that share it, and their number."""
        group = self.group(groups)
        return (None, 0, 1) if group is None else (self.axis, dist.get_rank(group), dist.get_world_size(group))


def declared(model: nn.Module) -> dict[str, Declared]:
    """The table of a model by name: parameters and buffers in module order.

    Raises:
        TypeError: a tensor is not declared.
    """
    return {row.name: row for row in _rows(model, "", False)}


def check_declarations(model: nn.Module) -> None:
    """Check declarations against the modules' actual tensors, once, when a model is built.

    Raises:
        TypeError: a tensor is not declared, or a declared name is not a parameter or buffer of its module, not even as
            None.
    """
    declared(model)
    for path, module in model.named_modules():
        if isinstance(module, Module):
            kind, has = type(module).__name__, module._parameters.keys() | module._buffers.keys()
            if unknown := module.placements.keys() - has:
                raise TypeError(f"{kind}.placements names {', '.join(sorted(unknown))}, which {path} does not have")


def _rows(module: nn.Module, path: str, in_region: bool) -> Iterator[Declared]:
    # Not module._parameters: under DeepSpeed's ZeRO 3 that is a dictionary that gathers a parameter on access.
    tensors = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    placements: Mapping[str, Placement] = {}
    if isinstance(module, Module):
        placements = module.placements
        in_region = in_region if module.in_region is None else module.in_region
    kind = type(module).__name__
    for attribute, tensor in tensors:
        placement = placements.get(attribute)
        if placement is None:
            raise TypeError(f"{path}{attribute} is not declared: give {kind}.placements a Placement for {attribute}")
        inside = in_region if placement.in_region is None else placement.in_region
        yield Declared(f"{path}{attribute}", tensor, placement, inside)
    for name, child in module.named_children():
        yield from _rows(child, f"{path}{name}.", in_region)


def parameter_rows(model: nn.Module) -> dict[str, Declared]:
    """The rows of the table that are parameters."""
    return {name: row for name, row in declared(model).items() if row.is_parameter}


def expert_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The weights of routed experts, [E, O, D]: each rank holds some of the experts, each of them whole."""
    rows = parameter_rows(model).values()
    return [row.tensor for row in rows if row.placement.expert and isinstance(row.tensor, nn.Parameter)]


def partial_gradients(model: nn.Module, groups: Groups) -> list[nn.Parameter]:
    """Replicated parameters of which each tensor-parallel rank computes only a partial gradient.

    These are the parameters inside regions. With sequence parallelism they are all replicated parameters, because
    between regions, too, a rank sees only its own tokens. Frozen parameters are excluded.
    """
    if groups.tensor is None:
        return []
    return [
        row.tensor
        for row in parameter_rows(model).values()
        if row.axis is None and (groups.sequence or row.in_region) and row.tensor.requires_grad
        if isinstance(row.tensor, nn.Parameter)
    ]


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast all parameters in place, except those declared float32."""
    for row in parameter_rows(model).values():
        if not row.placement.float32:
            row.tensor.data = row.tensor.data.to(dtype)


def set_trainable(model: nn.Module, trainable: Sequence[str]) -> None:
    """Train only the parameters whose names match a pattern such as `layers.*.mixer.*` (`*` also matches dots)."""
    for name, row in parameter_rows(model).items():
        row.tensor.requires_grad_(matches(name, trainable))


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a parameter's name matches one of the patterns."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def local_part(x: Tensor, group: dist.ProcessGroup | None, dim: int = 0) -> Tensor:
    """The shard of x that this rank has, evenly sharded along `dim`: a view."""
    if group is None:
        return x
    size = x.shape[dim] // dist.get_world_size(group)
    return x.narrow(dim, dist.get_rank(group) * size, size)


def shard(model: nn.Module, groups: Groups) -> None:
    """Replace a whole model's tensors, with or without values, by this rank's shards, and set the modules' groups."""
    for row in declared(model).values():
        if (group := row.group(groups)) is not None:
            assert row.axis is not None, "what is shared is shared along an axis"
            # clone: a view would keep the whole tensor's memory alive.
            row.tensor.data = local_part(row.tensor.data, group, row.axis).clone()
    for module in model.modules():
        if isinstance(module, Module):
            module.set_groups(groups)


@torch.no_grad()
def draw(
    model: nn.Module,
    config: ModelConfig,
    seed: int,
    groups: Groups = WHOLE,
    names: Container[str] | None = None,
) -> None:
    """Initialise every parameter and buffer, or some by name, each rank its shard, from generators of (seed, name).

    Initial values therefore depend on neither the parallel layout nor the other layers. A large parameter is drawn in
    blocks of rows, each from its own generator, so that a rank draws only the blocks that overlap its shard.
    """
    for name, row in declared(model).items():
        if names is None or name in names:
            _draw(row, groups, config, seed)


@torch.no_grad()
def draw_into(tensors: Mapping[str, Tensor], model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Initialise whole tensors by the names that they have in `model`, which may be on the meta device, as `draw`."""
    rows = declared(model)
    for name, tensor in tensors.items():
        _draw(replace(rows[name], tensor=tensor), WHOLE, config, seed)


def _draw(row: Declared, groups: Groups, config: ModelConfig, seed: int) -> None:
    axis, rank, ranks = row.place(groups)
    shape = torch.Size(size * ranks if dim == axis else size for dim, size in enumerate(row.tensor.shape))
    path, _, attribute = row.name.rpartition(".")
    stream = f"{path}.{row.placement.stream or attribute}"
    # As matrices: `part` is this rank's shard, a range of rows or of columns of the whole.
    part = row.tensor.detach().view(-1, row.tensor.shape[-1] if row.tensor.dim() > 1 else 1)
    width = shape[-1] if len(shape) > 1 else 1
    rows = shape.numel() // width
    first, left = (0, rank * part.shape[1]) if part.shape[1] < width else (rank * len(part) if axis == 0 else 0, 0)
    step = max(_BLOCK_ELEMENTS // width, 1)
    for number, start in enumerate(range(0, rows, step)):
        begin, end = max(start, first), min(start + step, first + len(part))
        if begin >= end:
            continue
        block = torch.empty(min(step, rows - start), width)
        generator = seeded_generator(seed, f"{stream}.{number}" if number else stream)
        drawing = Drawing(config, shape, generator, row.placement.writes_residual)
        row.placement.init(block.view(shape) if len(block) == rows else block, drawing)
        part[begin - first : end - first].copy_(block[begin - start : end - start, left : left + part.shape[1]])


def seeded_generator(seed: int, name: str) -> torch.Generator:
    """A generator for one parameter."""
    return torch.Generator().manual_seed(seed_of(seed, name))


def seed_of(seed: int, name: str) -> int:
    """Derive a seed from a seed and a name."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    # manual_seed takes signed 64-bit integers, so one bit is dropped.
    return int.from_bytes(digest, "little") >> 1


def normal(block: Tensor, drawing: Drawing) -> None:
    """Normal with standard deviation init_std, divided by sqrt(2 num_layers) for residual projections (GPT-2)."""
    config, std = drawing.config, drawing.config.init_std
    if drawing.writes_residual and config.scale_residual_init:
        std /= math.sqrt(2 * config.num_layers)
    block.normal_(std=std, generator=drawing.generator)


def zeros(block: Tensor, drawing: Drawing) -> None:
    """Initialise to 0 (biases)."""
    block.zero_()


def ones(block: Tensor, drawing: Drawing) -> None:
    """Initialise to 1 (norm weights)."""
    block.fill_(1)
