"""Run one rank of a layout on shapes alone, and count the bytes its layers keep for backward and send.

The model's own code runs under torch's FakeTensorMode (tensors without memory, operations without arithmetic), with
fake process groups whose collectives move no data but have the right sizes. Shards come from `models.parameters.shard`,
kept bytes from the tensors that autograd saves, and sent bytes from the layers' calls of collectives. Operations run as
on the CPU; GPU kernels keep other intermediates.

All costs are linear in the number of tokens once the attention windows are full. Long sequences are therefore
extrapolated from two shorter ones. CPU kernels that otherwise split their inputs into cache-sized blocks use one block.
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
from models.spiking import Neuron
from trainer.communication import SentBytes
from trainer.engines import megatron_cpu
from trainer.planning.experts import balance

# Longer sequences are extrapolated from one and two steps of tokens past a full window. The head has no window, so it
# takes smaller steps.
_STEP, _HEAD_STEP = 128, 64
NOTHING = (0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Cut:
    """The parallel sizes that determine a rank's shard of a layer.

    Attributes:
        tensor: Tensor-parallel size.
        context: Context-parallel size.
        expert: Expert-parallel size.
        sequence: Whether sequence parallelism shards the residual stream over the tensor-parallel ranks.
    """

    tensor: int = 1
    context: int = 1
    expert: int = 1
    sequence: bool = False

    @property
    def ranks(self) -> int:
        """World size of the dry run, which has no other parallelism."""
        return self.tensor * self.context * self.expert


@dataclass(frozen=True)
class Cost:
    """Bytes of a part of the model, for a micro-batch of one row.

    Attributes:
        kept: Bytes kept from forward to backward.
        sent: Bytes sent in forward and backward, by group: tensor, context, expert.
    """

    kept: float = 0.0
    sent: tuple[float, ...] = NOTHING

    def at(self, length: int, other: "Cost", other_length: int, wanted: int) -> "Cost":
        """Extrapolate to `wanted` tokens, linearly from this cost at `length` and `other` at `other_length` tokens."""
        share = (wanted - length) / (other_length - length)
        values = (self.kept, *self.sent), (other.kept, *other.sent)
        kept, *sent = (a + share * (b - a) for a, b in zip(*values, strict=True))
        return Cost(kept, tuple(sent))


@dataclass(frozen=True)
class ParameterSpec:
    """A parameter of a rank's shard.

    Attributes:
        name: Name in the decoder.
        numel: Elements on this rank.
        itemsize: Bytes of an element.
        expert: Whether it belongs to a routed expert, and so to one expert-parallel rank.
        partial: Whether its gradient is summed over tensor-parallel ranks.
    """

    name: str
    numel: int
    itemsize: int
    expert: bool
    partial: bool


@contextmanager
def fake_groups(cut_to: Cut) -> Iterator[Groups]:
    """Context with fake process groups, as seen by a context rank in the middle. Their collectives move no data."""
    if cut_to.ranks == 1:
        yield WHOLE
        return
    layer_ranks, own = cut_to.tensor * cut_to.context, cut_to.context // 2 * cut_to.tensor
    dist.init_process_group("fake", store=FakeStore(), rank=own, world_size=cut_to.ranks)
    try:
        tensor = dist.new_group(list(range(own, own + cut_to.tensor))) if cut_to.tensor > 1 else None
        context = dist.new_group(list(range(0, layer_ranks, cut_to.tensor))) if cut_to.context > 1 else None
        # In a real run this group overlaps the others. Here only its size matters.
        expert = dist.new_group(list(range(own, cut_to.ranks, layer_ranks))) if cut_to.expert > 1 else None
        yield Groups(tensor, context, cut_to.sequence, expert)
    finally:
        dist.destroy_process_group()


@contextmanager
def shapes_alone(cut_to: Cut) -> Iterator[Groups]:
    """Context in which new tensors have no memory and the yielded groups are fake."""
    with ExitStack() as stack:
        stack.enter_context(shapes_only())
        if cut_to.ranks > 1:
            # Unpatched, mcore's collectives would allocate their outputs on a GPU.
            stack.enter_context(megatron_cpu.on_cpu())
        groups = stack.enter_context(fake_groups(cut_to))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield groups


class _Keeper:
    """Counts the bytes of the storages that autograd saves, each once, except the `known` ones."""

    def __init__(self, *known: Tensor) -> None:
        self._seen = {_identity(tensor) for tensor in known}
        self._alive: list[Tensor] = []
        self.bytes = 0

    def keep(self, tensor: Tensor) -> Kept:
        """Count a saved tensor and keep it. Inner hooks pass in the tensors they keep in its place."""
        # Held alive so that no other storage reuses the address.
        self._alive.append(tensor)
        if _identity(tensor) not in self._seen:
            self._seen.add(_identity(tensor))
            self.bytes += tensor.untyped_storage().nbytes()
        return as_it_is(tensor)


def _identity(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class DryRun:
    """Dry runs of the parts of one model in one precision, for any cut.

    Args:
        config: The whole model.
        vocab_size: Rows of the embedding, padding included.
        dtype: Dtype of parameters and activations.
    """

    def __init__(self, config: ModelConfig, vocab_size: int, dtype: torch.dtype) -> None:
        self.config, self.vocab_size, self.dtype = config, vocab_size, dtype
        # Caches on the instance, so that they are freed with it.
        self.layer = cache(self._layer)
        self.ends = cache(self._ends)
        self.parameters = cache(self._parameters)
        self.flops = cache(self._flops)

    @cached_property
    def kinds(self) -> list[int]:
        """For each layer, the number of the first layer with the same mixer, shapes and spiking inputs."""
        first: dict[tuple[object, ...], int] = {}
        mixers = self.config.layer_mixers()
        return [
            first.setdefault((mixers[i], *_shapes_of(layer)), i) for i, layer in enumerate(self._shapes.layers.values())
        ]

    def _build(self, layers: range, groups: Groups) -> Decoder:
        decoder = Decoder(self.config, self.vocab_size, layers)
        shard(decoder, groups)
        cast_parameters(decoder, self.dtype)
        balance(decoder)
        return decoder

    def _parameters(self, layers: range, cut_to: Cut) -> list[ParameterSpec]:
        """The parameters of a rank with these layers. All tensor-parallel ranks' shards have the same sizes."""
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
        """Operations per token of a whole layer's mixer and of its feed-forward, forward and backward."""
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
        """Return `measure` of a number of tokens, extrapolated if they are many."""
        first = step * (1 + -(-window // step))
        if tokens <= first + step:
            return measure(tokens)
        return measure(first).at(first, measure(first + step), first + step, tokens)

    def kept(self, number: int, cut_to: Cut, tokens: int, policy: BlockPolicy) -> float:
        """Bytes that a layer keeps for backward, for `tokens` on this rank."""
        return self.layer(number, cut_to, tokens, policy, False).kept

    def sent(self, number: int, cut_to: Cut, tokens: int, policy: BlockPolicy) -> tuple[float, ...]:
        """Bytes that a layer sends, by group, for `tokens` on this rank."""
        if cut_to.ranks == 1:
            return NOTHING
        return self.layer(number, cut_to, tokens, policy, True).sent

    def residual(self, tokens: int, cut_to: Cut) -> int:
        """Bytes of the residual stream, for `tokens` on this rank."""
        return self._rows(tokens, cut_to) * self.config.hidden_size * self.dtype.itemsize

    def _layer(
        self, number: int, cut_to: Cut, tokens: int, policy: BlockPolicy = EVERYTHING, backward: bool = True
    ) -> Cost:
        """Cost of a layer, for `tokens` on this rank of a row that is one document; without `backward`, of forward."""
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
        """Costs of the embedding, and of the final norm, head and loss."""
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
        # The loss's backward reads a tensor's value, so it cannot run on shapes. It sends only on entering the region.
        hidden = enter_region(x, groups)
        with sent:
            hidden.backward(torch.empty_like(hidden))
        return Cost(keeper.bytes, _by_group(sent, groups))

    def tables(self, layers: range, tokens: int) -> int:
        """Bytes of the rotary tables that layers share, for one row: cosines and sines, float32, half a head each."""
        blocks: Any = self._shapes.layers
        return sum(tokens * size * 4 for size, _, _ in {blocks[str(i)].mixer.rotary for i in layers} - {None})

    @cached_property
    def _shapes(self) -> Decoder:
        with shapes_alone(Cut()):
            return Decoder(self.config, self.vocab_size)


def _shapes_of(layer: nn.Module) -> Iterator[tuple[str, object]]:
    """The names and shapes of a layer's parameters, and the names of its linear layers that read spikes."""
    yield from ((name, parameter.shape) for name, parameter in layer.named_parameters())
    yield from ((name, Neuron) for name, module in layer.named_modules() if getattr(module, "neuron", None))


def _by_group(sent: SentBytes, groups: Groups) -> tuple[float, ...]:
    parts = groups.tensor, groups.context, groups.expert
    return tuple(0.0 if group is None else float(sent.total(group)) for group in parts)
