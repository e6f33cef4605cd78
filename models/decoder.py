"""The decoder: embedding, pre-norm blocks, final norm and head, in plain PyTorch."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kernels.documents import Documents
from kernels.matmul import linear
from kernels.rotary import rotary_tables
from models.compression import BEGINNING, Observer, Origin, Site, TokenRows, running, sharded_modules
from models.config import MIXERS, SOFTMAX_MIXERS, ModelConfig, branches
from models.layers import SwiGLU, residual_norm
from models.lora import add_adapters
from models.mixers import build_mixer
from models.mixers.base import LayerCache, SequenceInfo
from models.mixers.hgrn import layer_bounds
from models.moe.layer import MoELayer
from models.moe.router import Router, token_keys
from models.parallel import ColumnLinear, VocabEmbedding, enter_region, vocabulary_loss
from models.parameters import (
    WHOLE,
    Groups,
    Module,
    Placement,
    cast_parameters,
    check_declarations,
    draw,
    expert_parameters,
    local_part,
    seed_of,
    shard,
    zeros,
)
from models.saved_activations import EVERYTHING, BlockPolicy, Policy, follow
from models.sinks import SinkKeys, SinkTokens
from models.spiking import Order, add_neurons, in_order
from models.value_head import ValueHead


class Block(Module):
    """x = x + mixer(norm(x)); x = x + ffn(norm(x)).

    Attributes:
        policy: The settings for tensors kept for backward.
        meter: Measures what compression keeps; None in most steps.
    """

    policy: BlockPolicy = EVERYTHING
    meter: Observer | None = None
    _sharded: frozenset[str] = frozenset()

    def __init__(self, config: ModelConfig, layer: int, mixer: str, experts: bool = False) -> None:
        super().__init__()
        self.layer = layer
        self._followed: list[RemovableHandle] = []
        self.mixer_norm = residual_norm(config, config.hidden_size)
        self.mixer = build_mixer(mixer, config)
        self.ffn_norm = residual_norm(config, config.hidden_size)
        self.ffn = MoELayer(config) if experts else SwiGLU(config)

    def keep(self, policy: BlockPolicy) -> None:
        """Set the policy for tensors kept for backward."""
        self.policy = replace(policy, routed=isinstance(self.ffn, MoELayer))
        if isinstance(self.ffn, MoELayer):
            self.ffn.policy = self.policy
        while self._followed:
            self._followed.pop().remove()
        if policy.compression is not None:
            self._followed, self._sharded = follow(self), sharded_modules(self)

    def forward(self, x: Tensor, info: SequenceInfo, cache: LayerCache | None = None) -> Tensor:
        """Transform the residual stream x [T, B, D]."""
        with self._running(info):
            return self.policy.run("block", self._add_both, x, info, cache)

    def mixed(self, x: Tensor, info: SequenceInfo) -> Tensor:
        """Return what the mixer alone adds to the residual stream x [T, B, D]."""
        with self._running(info):
            return self.policy.run("block", self.policy.run, "mixer", self._mix, x, info, None)

    @contextmanager
    def _running(self, info: SequenceInfo) -> Iterator[None]:
        """Context of a forward pass: tells where compressed activations lie."""
        if self.policy.compression is None or info.rows is None:
            yield
            return
        measuring = nullcontext() if self.meter is None else self.meter.forward()
        with running(Site(self.layer, self._sharded, self.groups, info.rows, self.meter)), measuring:
            yield

    def _add_both(self, x: Tensor, info: SequenceInfo, cache: LayerCache | None) -> Tensor:
        x = x + self.policy.run("mixer", self._mix, x, info, cache)
        return x + self.policy.run("ffn", self.feed_forward, x, info, cache)

    def _mix(self, x: Tensor, info: SequenceInfo, cache: LayerCache | None) -> Tensor:
        with in_order(_order(info, cache)):
            mixed: Tensor = self.mixer(enter_region(self.mixer_norm(x), self.groups), info, cache)
        return mixed

    def feed_forward(self, x: Tensor, info: SequenceInfo, cache: LayerCache | None) -> Tensor:
        """The feed-forward of the normalised residual stream x [T, B, D]."""
        normed = self.ffn_norm(x)
        fed: Tensor
        with in_order(_order(info, cache)):
            if isinstance(self.ffn, MoELayer):
                fed = self.ffn(normed, info.token_keys, info.are_sinks, info.experts)
            else:
                fed = self.ffn(enter_region(normed, self.groups))
        return fed


RunBlock = Callable[[nn.Module, Tensor, SequenceInfo, LayerCache | None], Tensor]
"""Runs a block as it would run itself."""


def _order(info: SequenceInfo, cache: LayerCache | None) -> Order:
    return Order(info.documents, info.group, None if cache is None else cache.tensors, info.are_sinks)


class Decoder(Module):
    """A language model over a vocabulary of `vocab_size` rows, or a pipeline stage of its consecutive layers.

    Args:
        config: Configuration of the whole model.
        vocab_size: Rows of the embedding, including padding.
        layers: The layers to build, a range of all. The first one brings the embedding, the last the norm and the head.

    Attributes:
        value_head: A head for values, which `build` adds; it is no part of the language model.
    """

    # Every rank holds the bounds of all channels and reads those of its own, so their gradients are partial.
    placements: ClassVar = {"lower_bounds": Placement(zeros, in_region=True, float32=True, decayed=False)}

    def __init__(self, config: ModelConfig, vocab_size: int, layers: range | None = None) -> None:
        super().__init__()
        layers = range(config.num_layers) if layers is None else layers
        self.model_config = config
        self.vocab_size = vocab_size
        self.is_first, self.is_last = layers.start == 0, layers.stop == config.num_layers
        self.embedding: VocabEmbedding | None = None
        # A tied head needs the embedding on the last stage too.
        if self.is_first or (self.is_last and config.tie_embeddings):
            self.embedding = VocabEmbedding(vocab_size, config.hidden_size)
        has_sinks = self.is_first and config.sink_tokens > 0
        self.sinks = SinkTokens(config.sink_tokens, config.hidden_size) if has_sinks else None
        mixers = config.layer_mixers()
        with_experts = config.moe_layers()
        blocks = {str(i): Block(config, i, mixers[i], i in with_experts) for i in layers}
        self._rotary = [block.mixer.rotary for block in blocks.values()]
        self.layers = nn.ModuleDict(blocks)
        add_neurons(self.layers, config.spiking, is_whole=len(layers) == config.num_layers)
        add_adapters(self.layers, config.lora, is_whole=len(layers) == config.num_layers)
        self.final_norm = residual_norm(config, config.hidden_size) if self.is_last else None
        self.lm_head: ColumnLinear | None = None
        if self.is_last and not config.tie_embeddings:
            self.lm_head = ColumnLinear(config.hidden_size, vocab_size, bias=False)
        self.value_head: ValueHead | None = None
        # One parameter for all layers of any kind, because the bounds are a softmax over depth. The first layer has no
        # bound.
        bounded = config.bounded_layers()
        bounds = torch.empty(config.num_layers, config.hidden_size) if set(bounded) & set(layers) else None
        self.lower_bounds: nn.Parameter | None
        self.register_parameter("lower_bounds", None if bounds is None else nn.Parameter(bounds))
        self._first_bounded = bounded[0] if bounded else None
        # Check here, before a rank can silently skip a reduction.
        check_declarations(self)

    def rotate_by(self, config: ModelConfig) -> None:
        """Switch to the rotary embeddings of another configuration, which may differ in their base only."""
        names = config.layer_mixers()
        for place, layer in enumerate(self.layers):
            own = (config.rotary(mixer) for mixer in branches(names[int(layer)]))
            self._rotary[place] = next((rotary for rotary in own if rotary is not None), None)

    @property
    def is_whole(self) -> bool:
        """Whether this rank can run the model by itself."""
        return self.is_first and self.is_last and self.groups == WHOLE

    def keep(self, policy: Policy) -> None:
        """Set every block's policy for tensors kept for backward."""
        for number, block in self.layers.items():
            assert isinstance(block, Block)
            block.keep(policy.of(int(number)))

    def copies(self) -> frozenset[str]:
        """Return the parameters that an earlier stage holds too: a tied head, and lower bounds."""
        names = set()
        if self.embedding is not None and not self.is_first:
            names.add("embedding.weight")
        if self.lower_bounds is not None and str(self._first_bounded) not in self.layers:
            names.add("lower_bounds")
        return frozenset(names)

    def summed_over_stages(self) -> frozenset[str]:
        """Return the parameters whose gradients are summed over pipeline stages: a tied embedding, and lower bounds."""
        tied = self.embedding is not None and self.model_config.tie_embeddings
        bounded = self.lower_bounds is not None
        return frozenset({"embedding.weight"} if tied else ()) | frozenset({"lower_bounds"} if bounded else ())

    @property
    def head_weight(self) -> Tensor:
        """Return the output projection [V, D]."""
        head = self.embedding if self.lm_head is None else self.lm_head
        assert head is not None and self.is_last, "the last stage has a head"
        return head.weight

    def hidden_states(
        self,
        tokens: Tensor,
        positions: Tensor,
        documents: Documents | None = None,
        caches: list[LayerCache] | None = None,
        entering: Tensor | None = None,
        origin: Origin = BEGINNING,
        run: RunBlock | None = None,
        experts: Tensor | None = None,
        prefix: Tensor | None = None,
    ) -> Tensor:
        """Run the embedding, blocks and final norm that this stage holds.

        Args:
            tokens: Token ids, int64 [B, T]. Only the first stage reads them. With context parallelism, T is this rank's
                share.
            positions: Position of each token in its document, int64 [B, T].
            documents: The documents packed into the whole row. Requires B = 1.
            caches: One cache per layer, to continue sequences.
            entering: The previous stage's output, for any stage but the first.
            origin: Where the tokens lie in the batch of the step: the noise of compression depends on it.
            run: Runs a block in place of a call of it; for generation, with caches.
            experts: The choice of all routers by layer, int16 [B, T, layers with experts, k] as
                models.moe.router.recorded_experts has it. None, like 0, leaves the choice to them.
            prefix: Tokens in front of every row, int64 [1, P]. They are computed once, and take part in gradients.
                Requires all layers, without documents, caches, recomputation, context or sequence parallelism.

        Returns:
            [T, B, D]; [T/P, B, D] with sequence parallelism over P ranks. Every stage but the last puts the sinks in
            front of the T tokens.
        """
        if prefix is not None:
            caches = self._behind(prefix, len(tokens))
        if self.model_config.sink_tokens:
            # The sinks take the first positions of every document.
            positions = positions + self.model_config.sink_tokens
        infos = self._layer_infos(positions, documents, tokens, origin)
        if experts is not None:
            infos = self._with_experts(infos, experts)
        if self.is_first:
            assert self.embedding is not None, "the first stage has an embedding"
            x = self.embedding(tokens.transpose(0, 1))
        else:
            assert entering is not None, "a later stage takes what the one before it gives"
            x = entering
        sinks, x = self._take_sinks(x)
        if sinks is not None:
            sinks, keys = self._run_sinks(sinks, caches)
            infos = [replace(info, sinks=of_layer) for info, of_layer in zip(infos, keys, strict=True)]
        for i, layer in enumerate(self.layers.values()):
            cache = None if caches is None else caches[i]
            x = layer(x, infos[i], cache) if run is None else run(layer, x, infos[i], cache)
        if self.final_norm is not None:
            return self.final_norm(x)
        # The next stage goes on with the sinks, too. Every row brings a copy, of which one is read.
        return x if sinks is None else torch.cat((sinks.expand(-1, x.shape[1], -1), x))

    def _behind(self, prefix_1P: Tensor, rows: int) -> list[LayerCache]:
        """The layers' states behind a prefix, for so many rows."""
        caches = [LayerCache() for _ in self.layers]
        self.hidden_states(prefix_1P, torch.arange(prefix_1P.shape[1], device=prefix_1P.device)[None], caches=caches)
        return [cache.repeated(rows) for cache in caches]

    def _with_experts(self, infos: list[SequenceInfo], experts_BTLK: Tensor) -> list[SequenceInfo]:
        """Tell the layers with experts their routers' choice."""
        places = {layer: place for place, layer in enumerate(self.model_config.moe_layers())}
        group = self.groups.tensor if self.groups.sequence else None
        by_layer = experts_BTLK.transpose(0, 1).unbind(2)
        return [
            replace(info, experts=local_part(by_layer[places[int(layer)]], group)) if int(layer) in places else info
            for layer, info in zip(self.layers, infos, strict=True)
        ]

    def _take_sinks(self, x: Tensor) -> tuple[Tensor | None, Tensor]:
        """The residual stream of the sinks [S, 1, D], None without, and that of the tokens, which x may hold both."""
        count = self.model_config.sink_tokens
        if not count:
            return None, x
        if self.sinks is not None:
            return self.sinks(), x
        if self.groups.sequence:
            count //= dist.get_world_size(self.groups.tensor)
        return x[:count, :1], x[count:]

    def _run_sinks(self, sinks: Tensor, caches: list[LayerCache] | None) -> tuple[Tensor, list[SinkKeys]]:
        """Run the layers over the sinks, unless caches remember: the sinks [S, 1, D], and their keys by layer."""
        known = [] if caches is None else [cache.sinks for cache in caches if cache.sinks is not None]
        if known:
            return sinks, known
        positions = torch.arange(self.model_config.sink_tokens, device=sinks.device)[None]
        keys = []
        for info, layer in zip(self._layer_infos(positions, None), self.layers.values(), strict=True):
            keys.append(SinkKeys())
            # Every context-parallel rank computes all of them.
            sinks = layer(sinks, replace(info, group=None, rows=None, sinks=keys[-1], are_sinks=True))
        for cache, of_layer in zip(caches or (), keys):
            cache.sinks = of_layer
        return sinks, keys

    def mixed(
        self,
        entering: Mapping[int, Tensor],
        tokens: Tensor,
        positions: Tensor,
        documents: Documents | None = None,
        origin: Origin = BEGINNING,
    ) -> dict[int, Tensor]:
        """Return what the mixers of single layers add to a residual stream of their own.

        Args:
            entering: What enters each of these layers, [T, B, D] ([T/P, B, D] with sequence parallelism), by layer.
            tokens: As for `hidden_states`, like the rest.
            positions: Position of each token in its document.
            documents: The documents packed into the whole row.
            origin: Where the tokens lie in the batch of the step.

        Returns:
            Tensors of the same shapes, by layer.
        """
        infos = dict(zip(map(int, self.layers), self._layer_infos(positions, documents, tokens, origin), strict=True))
        found = {}
        for layer, x in entering.items():
            block = self.layers[str(layer)]
            assert isinstance(block, Block)
            found[layer] = block.mixed(x, infos[layer])
        return found

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        documents: Documents | None = None,
        labels: Tensor | None = None,
        loss_mask: Tensor | None = None,
        entering: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return logits [B, T, V], or with labels (int64 [B, T]) `vocabulary_loss`: (sum in nats, per token [B*T]).

        loss_mask is float32 [B, T] and defaults to ones. Per-token values are in the order of labels.flatten(). Every
        stage but the last returns the next one's input, like `hidden_states`.
        """
        hidden_TBD = self.hidden_states(tokens, positions, documents, entering=entering)
        if not self.is_last:
            return hidden_TBD
        if labels is None:
            assert self.groups.tensor is None, "logits are cut over tensor-parallel ranks: ask for the loss"
            return linear(hidden_TBD.transpose(0, 1), self.head_weight)
        if loss_mask is None:
            loss_mask = torch.ones_like(labels, dtype=torch.float32)
        return vocabulary_loss(hidden_TBD, self.head_weight, labels, loss_mask, self.groups)

    def _layer_infos(
        self,
        positions: Tensor,
        documents: Documents | None,
        tokens: Tensor | None = None,
        origin: Origin = BEGINNING,
    ) -> list[SequenceInfo]:
        """Build each layer's information on the micro-batch. Layers with equal rotary settings share their tables."""
        tables = {rotary: rotary_tables(positions, *rotary) for rotary in set(self._rotary) if rotary is not None}
        bounds = {} if self.lower_bounds is None else dict(enumerate(layer_bounds(self.lower_bounds)))
        keys = None
        if tokens is not None and self.model_config.moe.router.dense_to_sparse.gumbel_noise:
            keys = token_keys(tokens, positions).transpose(0, 1)
            # With sequence parallelism each rank routes its own tokens.
            keys = local_part(keys, self.groups.tensor if self.groups.sequence else None)
        batch, time = positions.shape
        rows = TokenRows(origin, batch, time, self.groups.tensor if self.groups.sequence else None)
        infos = []
        for layer, rotary in zip(self.layers, self._rotary, strict=True):
            cos, sin = (None, None) if rotary is None else tables[rotary]
            infos.append(SequenceInfo(cos, sin, documents, bounds.get(int(layer)), self.groups.context, keys, rows))
        return infos


def shapes(config: ModelConfig, vocab_size: int) -> Decoder:
    """Build the whole model on the meta device, without memory for its parameters, for counting."""
    with torch.device("meta"):
        return Decoder(config, vocab_size)


def build(
    config: ModelConfig,
    vocab_size: int,
    layers: range | None = None,
    *,
    groups: Groups = WHOLE,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    value_head: bool = False,
) -> Decoder:
    """Build this rank's shard of a model, or of consecutive layers of it, in uninitialised memory.

    With `value_head` the last stage gets one.

    Never allocates more than the shard. `initialize`, trainer.stored.weights or a checkpoint fills it.
    """
    # Shard on the meta device first, so that the whole model is never in memory.
    with torch.device("meta"):
        decoder = Decoder(config, vocab_size, layers)
        if value_head and decoder.is_last:
            decoder.value_head = ValueHead(config.hidden_size)
    shard(decoder, groups)
    cast_parameters(decoder, dtype)
    return decoder.to_empty(device=device)


def initialize(model: Decoder, seed: int) -> None:
    """Initialise this rank's shard of every parameter as its module declares; see models.parameters.draw."""
    draw(model, model.model_config, seed, model.groups)
    seed_routers(model, seed)


def seed_routers(model: Decoder, seed: int) -> None:
    """Seed every router's noise by (seed, name). No parameter holds this seed."""
    for path, module in model.named_modules():
        if isinstance(module, Router):
            module.seed = seed_of(seed, f"{path}.noise")


def matmul_parameters(model: Decoder) -> Iterator[Tensor]:
    """Yield the weights that every token is multiplied with: all matrices but lower bounds and a lookup-only embedding.

    Routed experts, of which a token uses only some, are stacks of matrices and not included.
    """
    for name, parameter in model.named_parameters():
        lookup = name == "lower_bounds" or (name == "embedding.weight" and model.lm_head is not None)
        if parameter.dim() == 2 and not lookup:
            yield parameter


def flops_per_token(model: Decoder, seq_len: int, experts_per_token: float | None = None) -> float:
    """Count the floating-point operations of a training token, forward and backward, without recomputation.

    6 per matrix weight. Routed experts count `experts_per_token` times (None: the gate's final number). Added to that
    are the mixers' own products: softmax attention with its (causal, windowed) keys, linear attention with the K x V
    state. This is PaLM's convention (arXiv 2204.02311, appendix B). Only the layers that `model` holds are counted.
    """
    config = model.model_config
    # 2 FLOPs per weight and token in forward, 4 in backward.
    total = 6.0 * sum(weight.numel() for weight in matmul_parameters(model))
    active = config.moe.experts_at(None) if experts_per_token is None else experts_per_token
    total += 6.0 * active * sum(weight[0].numel() for weight in expert_parameters(model))
    mixers = config.layer_mixers()
    for mixer in (mixer for layer in model.layers for mixer in branches(mixers[int(layer)])):
        if mixer in SOFTMAX_MIXERS:
            keys = seq_len if mixer == "full_attention" else min(config.attention.window, seq_len)
            # Full attention sees (T + 1) / 2 keys on average. A window of w sees w, less w^2 / 2T at the start.
            seen = keys - keys * (keys - 1) / (2 * seq_len) + config.sink_tokens
            # Two products, with keys and with values, of 6 FLOPs each per element.
            total += 12.0 * config.attention.num_heads * config.attention_head_dim * seen
        else:
            total += 6.0 * MIXERS[mixer].state_products * math.prod(config.state_shape(mixer))
    return total
