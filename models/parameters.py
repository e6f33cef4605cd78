"""What every parameter and buffer of a model declares: how it is sharded, stored, updated and drawn.

A module names its tensors in `placements`. One table, `declared(model)`, collects them, and everything else reads it:
sharding, initialisation, weight decay, the dtype in bf16 training, sums of partial gradients, what trains at all, the
checkpoints of both engines, exports, and the planner. A tensor that is not declared is an error at construction.

A model is built in four steps, so that a rank holds its shard and one block of 64 MB, never a whole model:

    shapes     on the meta device, whole
    shard      each rank keeps its part of every shape
    memory     `to_empty` on the device, in the dtype of training
    values     drawn block by block (`draw`), or read from files, each rank its part
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.config import ModelConfig

# Drawn at once: 64 MB in float32.
_BLOCK_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class Groups:
    """The ranks over which a model is sharded; None where one rank has the whole.

    Attributes:
        tensor: Ranks that share heads, feed-forward channels and the vocabulary.
        context: Ranks that hold consecutive, equal parts of every sequence.
        sequence: Shard the residual stream over `tensor`, too.
        expert: Ranks that share the routed experts, each of which is whole on one of them: tensor-, context- and
            data-parallel ranks of a pipeline stage, with tokens of their own each.
    """

    tensor: dist.ProcessGroup | None = None
    context: dist.ProcessGroup | None = None
    sequence: bool = False
    expert: dist.ProcessGroup | None = None


WHOLE = Groups()


@dataclass(frozen=True)
class Drawing:
    """What an initialisation may depend on.

    Attributes:
        config: Of the whole model.
        shape: Of the whole parameter.
        generator: The parameter's own, in a state that follows from the seed and the parameter's name.
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
    """The declaration of a parameter or buffer.

    Attributes:
        init: Draws it.
        shard_axis: The dimension that tensor-parallel ranks share; None where each has the whole.
        expert: Its first dimension counts routed experts, which expert-parallel ranks share.
        in_region: Whether it is used inside a tensor-parallel region, where a rank sees its own heads or channels
            only, so that its gradient is a partial sum. None: as the module says, see Module.
        float32: Stays float32 in bf16 training, for its changes are too small for bfloat16.
        decayed: Whether weight decay applies.
        writes_residual: Its product is added to the residual stream. GPT-2 draws such weights smaller.
        stream: Name of the generator where several parameters of a module are drawn from one; None: the parameter's.
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
        placements: By the names of its own parameters and buffers, all of them.
        in_region: Whether what is below it lies inside a tensor-parallel region; None: as for the module around it.
            A mixer and a dense feed-forward are regions; what runs on the residual stream is not.
        groups: The ranks that share the model.
    """

    placements: ClassVar[Mapping[str, Placement]] = {}
    in_region: ClassVar[bool | None] = None
    groups: Groups = WHOLE

    def set_groups(self, groups: Groups) -> None:
        """Learn of the ranks that share the model, the parameters being sharded already. Called once."""
        self.groups = groups


@dataclass(frozen=True)
class Declared:
    """A row of the table.

    Attributes:
        name: In the model.
        tensor: The parameter or buffer itself, this rank's shard.
        placement: What its module declares.
        in_region: As Placement.in_region, settled.
    """

    name: str
    tensor: Tensor
    placement: Placement
    in_region: bool

    @property
    def is_parameter(self) -> bool:
        """Whether it is one, and no buffer."""
        return isinstance(self.tensor, nn.Parameter)

    @property
    def axis(self) -> int | None:
        """The dimension that any ranks may share."""
        return 0 if self.placement.expert else self.placement.shard_axis

    def group(self, groups: Groups) -> dist.ProcessGroup | None:
        """The ranks that share it along `axis`; None where this rank has the whole."""
        if self.axis is None:
            return None
        return groups.expert if self.placement.expert else groups.tensor

    def place(self, groups: Groups) -> tuple[int | None, int, int]:
        """The axis along which it is sharded, this rank's place among those that share it, and their number."""
        group = self.group(groups)
        return (None, 0, 1) if group is None else (self.axis, dist.get_rank(group), dist.get_world_size(group))


def declared(model: nn.Module) -> dict[str, Declared]:
    """The table of a model, by name: parameters and buffers in the order of the modules.

    Raises:
        TypeError: a tensor is not declared.
    """
    return {row.name: row for row in _rows(model, "", False)}


def check_declarations(model: nn.Module) -> None:
    """Hold what the modules declare against what they have, once, when a model is built.

    Raises:
        TypeError: a tensor is not declared, or one is declared that its module does not have, not even as None.
    """
    declared(model)
    for path, module in model.named_modules():
        if isinstance(module, Module):
            kind, has = type(module).__name__, module._parameters.keys() | module._buffers.keys()
            if unknown := module.placements.keys() - has:
                raise TypeError(f"{kind}.placements names {', '.join(sorted(unknown))}, which {path} does not have")


def _rows(module: nn.Module, path: str, in_region: bool) -> Iterator[Declared]:
    # Not by module._parameters: DeepSpeed's ZeRO 3 has a dictionary there that gathers what is looked up.
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
    """The weights of routed experts, [E, O, D]: a rank holds some experts, and each of them whole."""
    rows = parameter_rows(model).values()
    return [row.tensor for row in rows if row.placement.expert and isinstance(row.tensor, nn.Parameter)]


def partial_gradients(model: nn.Module, groups: Groups) -> list[nn.Parameter]:
    """The parameters that every tensor-parallel rank holds whole, but of whose gradient each has a partial sum.

    They are those inside regions. With sequence parallelism they are all, for between regions, too, a rank has only
    its own tokens. Frozen ones are left out.
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
    """Cast every parameter in place, but those that are declared float32."""
    for row in parameter_rows(model).values():
        if not row.placement.float32:
            row.tensor.data = row.tensor.data.to(dtype)


def set_trainable(model: nn.Module, trainable: Sequence[str]) -> None:
    """Train only the parameters whose names match a pattern, such as `layers.*.mixer.*` (`*` matches dots, too)."""
    for name, row in parameter_rows(model).items():
        row.tensor.requires_grad_(matches(name, trainable))


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a parameter's name matches one of the patterns."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def local_part(x: Tensor, group: dist.ProcessGroup | None, dim: int = 0) -> Tensor:
    """The part of x that this rank has, x being sharded evenly along `dim`: a view."""
    if group is None:
        return x
    size = x.shape[dim] // dist.get_world_size(group)
    return x.narrow(dim, dist.get_rank(group) * size, size)


def shard(model: nn.Module, groups: Groups) -> None:
    """Leave this rank its part of a whole model, with or without values, and tell the modules who has the others."""
    for row in declared(model).values():
        if (group := row.group(groups)) is not None:
            assert row.axis is not None, "what is shared is shared along an axis"
            row.tensor.data = local_part(row.tensor.data, group, row.axis).clone()
    for module in model.modules():
        if isinstance(module, Module):
            module.set_groups(groups)


@torch.no_grad()
def draw(model: nn.Module, config: ModelConfig, seed: int, groups: Groups = WHOLE) -> None:
    """Draw every parameter and buffer, each rank its part, from generators seeded by (seed, name).

    So a parameter starts the same whatever the layout of ranks and whatever other layers exist. A large parameter is
    drawn in blocks of rows, each from a generator of its own, so that a rank draws only those of which it has a part.
    """
    for row in declared(model).values():
        _draw(row, groups, config, seed)


def _draw(row: Declared, groups: Groups, config: ModelConfig, seed: int) -> None:
    axis, rank, ranks = row.place(groups)
    shape = torch.Size(size * ranks if dim == axis else size for dim, size in enumerate(row.tensor.shape))
    path, _, attribute = row.name.rpartition(".")
    stream = f"{path}.{row.placement.stream or attribute}"
    # As matrices: this rank's part, and the whole of which it has some rows or some columns.
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
    """A seed that follows from another one and a name."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def normal(block: Tensor, drawing: Drawing) -> None:
    """Normal with standard deviation `init_std`; over sqrt(2 layers) what writes the residual stream (GPT-2's rule)."""
    config, std = drawing.config, drawing.config.init_std
    if drawing.writes_residual and config.scale_residual_init:
        std /= math.sqrt(2 * config.num_layers)
    block.normal_(std=std, generator=drawing.generator)


def zeros(block: Tensor, drawing: Drawing) -> None:
    """Begin at 0: biases."""
    block.zero_()


def ones(block: Tensor, drawing: Drawing) -> None:
    """Begin at 1: the weights of norms."""
    block.fill_(1)
