"""One rank of a layout, run on shapes alone: what its layers keep for backward, and what they send.

The model's own code runs, under torch's FakeTensorMode (tensors without memory, operations without arithmetic) and in
a world of fake process groups, whose collectives do nothing but have the right sizes. So every shard is that of
`models.parameters.shard`, what is kept is what autograd saves, and what is sent is what the layers hand to their
groups. Operations are those of the CPU: kernels on a GPU keep other intermediates.

Everything is linear in the number of tokens once the windows are full, so that long sequences are not walked through:
two shorter ones give the line. Kernels that go through their inputs in blocks, for the CPU's cache, take them at once.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend `fake`

from kernels.shapes import shapes_only
from models.config import ModelConfig
from models.decoder import Decoder, flops_per_token, matmul_parameters
from models.parallel import enter_region, vocabulary_loss
from models.parameters import (
    WHOLE,
    Groups,
    cast_parameters,
    expert_parameters,
    parameter_rows,
    partial_gradients,
    shard,
)
from models.saved_activations import EVERYTHING, BlockPolicy, Kept, Policy, as_it_is, hooks
from trainer.communication import SentBytes
from trainer.engines import megatron_cpu
from trainer.planning.experts import balance

# Longer sequences are extrapolated from one and two of these, behind a full window; the head, all linear, from fewer.
_STEP, _HEAD_STEP = 128, 64
NOTHING = (0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Cut:
    """What decides a rank's shard of a layer.

    Attributes:
        tensor: Tensor-parallel ranks.
        context: Context-parallel ranks.
        expert: Ranks that share the experts.
        sequence: Whether the residual stream is cut over tensor-parallel ranks, too.
    """

    tensor: int = 1
    context: int = 1
    expert: int = 1
    sequence: bool = False

    @property
    def ranks(self) -> int:
        """Of a world of which no rank shares anything else."""
        return self.tensor * self.context * self.expert


@dataclass(frozen=True)
class Cost:
    """Bytes of a part of the model for a micro-batch of one row.

    Attributes:
        kept: Kept from forward to backward.
        sent: Sent in forward and backward, by group: tensor, context, expert.
    """

    kept: float = 0.0
    sent: tuple[float, ...] = NOTHING

    def at(self, length: int, other: "Cost", other_length: int, wanted: int) -> "Cost":
        """The cost at `wanted` tokens, on the line through this one and another."""
        share = (wanted - length) / (other_length - length)
        values = (self.kept, *self.sent), (other.kept, *other.sent)
        kept, *sent = (a + share * (b - a) for a, b in zip(*values, strict=True))
        return Cost(kept, tuple(sent))


@dataclass(frozen=True)
class ParameterSpec:
    """A parameter of a rank's shard.

    Attributes:
        name: As in the decoder.
        numel: Elements on this rank.
        itemsize: Bytes of an element.
        expert: Whether it belongs to a routed expert, of which expert-parallel ranks hold different ones.
        partial: Whether tensor-parallel ranks sum their shares of its gradient.
    """

    name: str
    numel: int
    itemsize: int
    expert: bool
    partial: bool


@contextmanager
def fake_groups(cut_to: Cut) -> Iterator[Groups]:
    """The groups of a middle context rank of a world of its own, whose collectives do nothing."""
    if cut_to.ranks == 1:
        yield WHOLE
        return
    layer_ranks, own = cut_to.tensor * cut_to.context, cut_to.context // 2 * cut_to.tensor
    dist.init_process_group("fake", store=FakeStore(), rank=own, world_size=cut_to.ranks)
    try:
        tensor = dist.new_group(list(range(own, own + cut_to.tensor))) if cut_to.tensor > 1 else None
        context = dist.new_group(list(range(0, layer_ranks, cut_to.tensor))) if cut_to.context > 1 else None
        # They are some of the others in truth; only their number matters here.
        expert = dist.new_group(list(range(own, cut_to.ranks, layer_ranks))) if cut_to.expert > 1 else None
        yield Groups(tensor, context, cut_to.sequence, expert)
    finally:
        dist.destroy_process_group()


@contextmanager
def shapes_alone(cut_to: Cut) -> Iterator[Groups]:
    """Tensors made within have no memory, and the groups are fake."""
    with ExitStack() as stack:
        stack.enter_context(shapes_only())
        if cut_to.ranks > 1:
            # The exchanges allocate what they gather.
            stack.enter_context(megatron_cpu.on_cpu())
        groups = stack.enter_context(fake_groups(cut_to))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield groups


class _Keeper:
    """Counts the storages that autograd saves, each once, but for those that are known."""

    def __init__(self, *known: Tensor) -> None:
        self._seen = {_identity(tensor) for tensor in known}
        self._alive: list[Tensor] = []
        self.bytes = 0

    def keep(self, tensor: Tensor) -> Kept:
        """The hook for a tensor that is saved; within others, which tell it what they really keep."""
        # Alive, so that no other storage gets its address.
        self._alive.append(tensor)
        if _identity(tensor) not in self._seen:
            self._seen.add(_identity(tensor))
            self.bytes += tensor.untyped_storage().nbytes()
        return as_it_is(tensor)


def _identity(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class DryRun:
    """The parts of one model in one precision, for any cut.

    Args:
        config: The whole model.
        vocab_size: Rows of its embedding, padding included.
        dtype: Of parameters and activations.
    """

    def __init__(self, config: ModelConfig, vocab_size: int, dtype: torch.dtype) -> None:
        self.config, self.vocab_size, self.dtype = config, vocab_size, dtype
        # On the instance, so that the measurements go with it.
        self.layer = cache(self._layer)
        self.ends = cache(self._ends)
        self.parameters = cache(self._parameters)
        self.flops = cache(self._flops)

    @cached_property
    def kinds(self) -> list[int]:
        """For each layer the first one that is like it: the same mixer and the same shapes."""
        first: dict[tuple[object, ...], int] = {}
        mixers = self.config.layer_mixers()
        return [
            first.setdefault((mixers[i], *((name, parameter.shape) for name, parameter in layer.named_parameters())), i)
            for i, layer in enumerate(self._shapes.layers.values())
        ]

    def _build(self, layers: range, groups: Groups) -> Decoder:
        decoder = Decoder(self.config, self.vocab_size, layers)
        shard(decoder, groups)
        cast_parameters(decoder, self.dtype)
        balance(decoder)
        return decoder

    def _parameters(self, layers: range, cut_to: Cut) -> list[ParameterSpec]:
        """The shard that a rank with these layers has. Tensor-parallel ranks' shards have the same sizes."""
        with shapes_alone(cut_to) as groups:
            decoder = self._build(layers, groups)
            partial = {id(parameter) for parameter in partial_gradients(decoder, groups)}
            return [
                ParameterSpec(
                    name, row.tensor.numel(), row.tensor.element_size(), row.placement.expert, id(row.tensor) in partial
                )
                for name, row in parameter_rows(decoder).items()
            ]

    def _flops(self, number: int, seq_len: int) -> tuple[float, float]:
        """Operations of a token in a whole layer, forward and backward: its mixer's, and its feed-forward's."""
        with shapes_alone(Cut()):
            decoder = Decoder(self.config, self.vocab_size, range(number, number + 1))
            block: Any = decoder.layers[str(number)]
            own = {id(parameter) for parameter in block.parameters()}
            outside = sum(6.0 * weight.numel() for weight in matmul_parameters(decoder) if id(weight) not in own)
            total = flops_per_token(decoder, seq_len) - outside
            in_mixer = {id(parameter) for parameter in block.mixer.parameters()}
            feed_forward = sum(
                6.0 * weight.numel() for weight in matmul_parameters(decoder) if id(weight) in own - in_mixer
            )
            active = self.config.moe.experts_at(None)
            feed_forward += active * sum(6.0 * weight[0].numel() for weight in expert_parameters(decoder))
            return total - feed_forward, feed_forward

    def _line(self, measure: Callable[[int], Cost], tokens: int, step: int, window: int = 0) -> Cost:
        """What `measure` gives for a number of tokens, extrapolated where they are many."""
        first = step * (1 + -(-window // step))
        if tokens <= first + step:
            return measure(tokens)
        return measure(first).at(first, measure(first + step), first + step, tokens)

    def kept(self, number: int, cut_to: Cut, tokens: int, policy: BlockPolicy) -> float:
        """Bytes that a layer keeps over `tokens` on this rank."""
        return self.layer(number, cut_to, tokens, policy, False).kept

    def sent(self, number: int, cut_to: Cut, tokens: int, policy: BlockPolicy) -> tuple[float, ...]:
        """What a layer sends, by group."""
        if cut_to.ranks == 1:
            return NOTHING
        return self.layer(number, cut_to, tokens, policy, True).sent

    def residual(self, tokens: int, cut_to: Cut) -> int:
        """Bytes of the residual stream of `tokens` on this rank."""
        return self._rows(tokens, cut_to) * self.config.hidden_size * self.dtype.itemsize

    def _layer(
        self, number: int, cut_to: Cut, tokens: int, policy: BlockPolicy = EVERYTHING, backward: bool = True
    ) -> Cost:
        """A layer, over `tokens` on this rank, of a row that is one document; without `backward` what it keeps."""
        window = self.config.attention.window if "sliding" in self.config.layer_mixers()[number] else 0
        with shapes_alone(cut_to) as groups:
            decoder = self._build(range(number, number + 1), groups)
            decoder.keep(Policy(policy))
            (block,) = decoder.layers.values()

            def measure(length: int) -> Cost:
                (info,) = decoder._layer_infos(torch.arange(length)[None], None)
                shared = [x for x in (info.cos, info.sin, info.lower_bound) if x is not None]
                keeper = _Keeper(*decoder.parameters(), *shared)
                x = self._residual(length, cut_to)
                with SentBytes() as sent:
                    with hooks(keeper.keep):
                        y = block(x, info)
                    if backward:
                        y.backward(torch.empty_like(y))
                return Cost(keeper.bytes, _by_group(sent, groups))

            return self._line(measure, tokens, _STEP * cut_to.tensor, window)

    def _rows(self, length: int, cut_to: Cut) -> int:
        return length // cut_to.tensor if cut_to.sequence else length

    def _residual(self, length: int, cut_to: Cut) -> Tensor:
        shape = self._rows(length, cut_to), 1, self.config.hidden_size
        return torch.empty(shape, dtype=self.dtype, requires_grad=True)

    def _ends(self, cut_to: Cut, tokens: int) -> tuple[Cost, Cost]:
        """What comes before the first layer, and what comes after the last one."""
        layers = self.config.num_layers
        with shapes_alone(cut_to) as groups:
            first, last = self._build(range(1), groups), self._build(range(layers - 1, layers), groups)
            step = _HEAD_STEP * cut_to.tensor
            before = self._line(lambda length: self._embed(first, groups, length), tokens, step)
            return before, self._line(lambda length: self._head(last, groups, cut_to, length), tokens, step)

    def _embed(self, decoder: Decoder, groups: Groups, length: int) -> Cost:
        assert decoder.embedding is not None, "the first stage has an embedding"
        ids = torch.zeros(length, 1, dtype=torch.int64)
        keeper = _Keeper(*decoder.parameters())
        with SentBytes() as sent, hooks(keeper.keep):
            x = decoder.embedding(ids)
            x.backward(torch.empty_like(x))
        return Cost(keeper.bytes, _by_group(sent, groups))

    def _head(self, decoder: Decoder, groups: Groups, cut_to: Cut, length: int) -> Cost:
        norm: nn.Module | None = decoder.final_norm
        assert norm is not None, "the last stage has a norm"
        labels, mask = torch.zeros(1, length, dtype=torch.int64), torch.ones(1, length)
        keeper = _Keeper(*decoder.parameters(), labels, mask)
        x = self._residual(length, cut_to)
        with SentBytes() as sent, hooks(keeper.keep):
            vocabulary_loss(norm(x), decoder.head_weight, labels, mask, groups)
        # The loss's backward reads a number, which has no value here; it sends nothing but where hidden states enter.
        hidden = enter_region(x, groups)
        with sent:
            hidden.backward(torch.empty_like(hidden))
        return Cost(keeper.bytes, _by_group(sent, groups))

    def tables(self, layers: range, tokens: int) -> int:
        """Bytes of the cosines and sines that layers share, for one row: float32, half a head's size each."""
        blocks: Any = self._shapes.layers
        return sum(tokens * size * 4 for size, _ in {blocks[str(i)].mixer.rotary for i in layers} - {None})

    @cached_property
    def _shapes(self) -> Decoder:
        with shapes_alone(Cut()):
            return Decoder(self.config, self.vocab_size)


def _by_group(sent: SentBytes, groups: Groups) -> tuple[float, ...]:
    parts = groups.tensor, groups.context, groups.expert
    return tuple(0.0 if group is None else float(sent.total(group)) for group in parts)
