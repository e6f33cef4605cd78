"""Choose which layers of a model stay softmax attention, by the damage that their replacement does.

A fixed pattern such as every fourth layer ignores what the layers have learned to do. Here the damage of replacing a
set S of layers by a linear mixer is measured, as the divergence of next-token distributions on held-out text:

    damage(S) = mean over tokens of KL(base || base with the layers of S replaced)   in nats

The replacing mixer has the attention's matrices (models.conversion). Before the measurement it can be aligned: it
learns to give the softmax mixer's output for the softmax mixer's input, by the mean squared error, while everything
else is fixed. Inputs and outputs of all layers come from one forward pass of the base, so all layers are aligned at
once, and independently of each other.

one_shot measures each layer alone and replaces those of the least damage. greedy replaces the least harmful layer, and
measures the others again with it replaced, and so on: it sees that two layers can stand in for each other. It takes
about half as many measurements as the square of the number of layers.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from kernels.losses.distillation import distillation_kl
from models import conversion
from models.config import SOFTMAX_MIXERS, ModelConfig
from models.decoder import Decoder, shapes
from models.parameters import seeded_generator
from trainer.data.batch import Batch
from trainer.errors import ConfigError
from trainer.planning.report import table
from trainer.stored.hybrid import checked_config
from trainer.stored.inference import LoadedModel
from trainer.stored.source import Source

Layers = frozenset[int]


class Damage(NamedTuple):
    """The divergence that replaced layers cause.

    Attributes:
        kl: Mean over all tokens, nats.
        error: Standard error of the mean over sequences, nats.
    """

    kl: float
    error: float


@dataclass(frozen=True)
class Choice:
    """Which layers are replaced, and what was measured on the way.

    Attributes:
        replaced: The replaced layers in the order of their choice, the least harmful first.
        measured: For each step of the choice, the damage of each candidate together with the layers replaced before.
            one_shot has one step.
        damage: Damage of all replaced layers together.
    """

    replaced: tuple[int, ...]
    measured: tuple[dict[int, Damage], ...]
    damage: Damage


def choose(
    measure: Callable[[Layers], Damage], layers: Sequence[int], keep: int, method: Literal["one_shot", "greedy"]
) -> Choice:
    """Choose the layers to replace.

    Args:
        measure: Measures the damage of replacing a set of layers.
        layers: The candidates.
        keep: How many of them stay.
        method: one_shot or greedy.
    """
    replaced: list[int] = []
    steps: list[dict[int, Damage]] = []
    while len(replaced) < len(layers) - keep:
        left = (layer for layer in layers if layer not in replaced)
        steps.append({layer: measure(frozenset({*replaced, layer})) for layer in left})
        order = sorted(steps[-1], key=lambda layer: steps[-1][layer].kl)
        replaced += order[: len(layers) - keep] if method == "one_shot" else order[:1]
    # The last step of greedy has measured the whole choice.
    found = steps[-1][replaced[-1]] if method == "greedy" or len(replaced) == 1 else measure(frozenset(replaced))
    return Choice(tuple(replaced), tuple(steps), found)


def measurements(layers: int, keep: int, method: Literal["one_shot", "greedy"]) -> int:
    """Return how often `choose` measures."""
    if method == "one_shot":
        return layers + (layers - keep > 1)
    return sum(range(keep + 1, layers + 1))


def evenly_spaced(layers: Sequence[int], keep: int) -> Layers:
    """Return the layers that a pattern would replace: of each of `keep` equal groups all but the last."""
    kept = {layers[math.ceil((group + 1) * len(layers) / keep) - 1] for group in range(keep)}
    return frozenset(layers) - kept


class Replacer:
    """A model of softmax attention, and hybrids that share its parameters.

    Args:
        base: The model, in float32 and evaluation mode.
        linear: What replaces a layer: a mixer, or parallel branches of mixers.
        config_of: Returns the configuration of a hybrid with a pattern.
        seed: New parameters are drawn from (seed, name), and the order of batches from the seed.

    Attributes:
        layers: The candidates: the layers of other softmax attention.
    """

    def __init__(self, base: Decoder, linear: str, config_of: Callable[[str], ModelConfig], seed: int) -> None:
        self.base, self.linear, self.seed = base, linear, seed
        self.layers = candidates(base.model_config, linear)
        self._config_of = config_of
        self._base_state = base.state_dict()
        # The hybrid with all candidates replaced holds the mixers of all others.
        every = frozenset(self.layers)
        config = config_of(self.pattern(every))
        self._all = shapes(config, base.vocab_size)
        device = base.head_weight.device
        new = {
            name: torch.empty_like(tensor, device=device)
            for name, tensor in self._all.state_dict().items()
            if self._is_new(name, every)
        }
        meta = shapes(base.model_config, base.vocab_size), shapes(config, base.vocab_size)
        conversion.fill(new, copier(base), *meta, seed)
        old = {name: tensor for name, tensor in self._base_state.items() if not self._is_new(name, every)}
        self._all.load_state_dict(old | new, assign=True)

    def _is_new(self, name: str, replaced: Layers) -> bool:
        """Whether a tensor is not the base's, given which layers are replaced."""
        return name not in self._base_state or name.startswith(tuple(f"layers.{layer}.mixer." for layer in replaced))

    def pattern(self, replaced: Layers) -> str:
        """Return the pattern of all layers, with some replaced."""
        kinds = enumerate(self.base.model_config.layer_mixers())
        return ", ".join(self.linear if layer in replaced else kind for layer, kind in kinds)

    def hybrid(self, replaced: Layers) -> Decoder:
        """Return the model with some layers replaced. It shares its parameters with the base and other hybrids."""
        model = shapes(self._config_of(self.pattern(replaced)), self.base.vocab_size)
        ours = self._all.state_dict()
        state = {
            name: (ours if self._is_new(name, replaced) else self._base_state)[name] for name in model.state_dict()
        }
        model.load_state_dict(state, assign=True)
        return model.eval()

    def align(self, batches: Sequence[Batch], steps: int, lr: float) -> Iterator[dict[int, float]]:
        """Train every replacing mixer to give the output of the softmax mixer that it replaces, on the same input.

        Args:
            batches: The batches to train on, each once in an order drawn from the seed, then again.
            steps: Number of steps.
            lr: Peak learning rate of Adam, which rises linearly for a tenth of the steps and falls like a cosine to 0.

        Yields:
            After each step, each layer's mean squared error over the mean square of the softmax mixer's output.
        """
        mixers = {layer: self._all.layers[str(layer)].get_submodule("mixer") for layer in self.layers}
        parameters = [parameter for mixer in mixers.values() for parameter in mixer.parameters()]
        optimizer = torch.optim.Adam(parameters, betas=(0.9, 0.95))
        order = torch.randperm(len(batches), generator=seeded_generator(self.seed, "order")).tolist()
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = lr * _schedule(step, steps)
            errors = self._add_gradients(mixers, batches[order[step % len(batches)]])
            optimizer.step()
            optimizer.zero_grad()
            yield errors

    def _add_gradients(self, mixers: Mapping[int, nn.Module], batch: Batch) -> dict[int, float]:
        moved = batch.to(self.base.head_weight.device)
        observed = self._observe(moved)
        with torch.no_grad():
            # Lower bounds of decays belong to all layers, and stay what they are.
            infos = self._all._layer_infos(moved.positions, moved.documents)
        errors = {}
        for layer, mixer in mixers.items():
            x, y = observed[layer]
            error = (mixer(x, infos[layer]) - y).square().mean() / y.square().mean().clamp(min=1e-12)
            # Layer by layer, so that the activations of one layer are kept at a time.
            error.backward()
            nn.utils.clip_grad_norm_(mixer.parameters(), 1.0)
            errors[layer] = error.item()
        return errors

    @torch.no_grad()
    def _observe(self, batch: Batch) -> dict[int, tuple[Tensor, Tensor]]:
        """Run the base; returns input and output of every candidate's mixer, [T, B, D]."""
        found: dict[int, tuple[Tensor, Tensor]] = {}

        def keep(layer: int, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            found[layer] = inputs[0], output

        hooks = [
            self.base.layers[str(layer)].get_submodule("mixer").register_forward_hook(partial(keep, layer))
            for layer in self.layers
        ]
        try:
            self.base.hidden_states(batch.tokens, batch.positions, batch.documents)
        finally:
            for hook in hooks:
                hook.remove()
        return found


def _schedule(step: int, steps: int) -> float:
    warmup = max(steps // 10, 1)
    return min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / steps))


class Meter:
    """Measures damage on fixed text.

    Args:
        replacer: The model and its hybrids.
        batches: Micro-batches of windows of text.
        seq_len: Tokens in a window.
        done: Called after each measurement.
    """

    @torch.no_grad()
    def __init__(
        self, replacer: Replacer, batches: Sequence[Batch], seq_len: int, done: Callable[[], None] = lambda: None
    ) -> None:
        base = replacer.base
        self._replacer, self._seq_len, self._done = replacer, seq_len, done
        self._batches = [batch.to(base.head_weight.device) for batch in batches]
        self._expected = [_hidden(base, batch) for batch in self._batches]

    @torch.no_grad()
    def damage(self, replaced: Layers) -> Damage:
        """Measure the damage of replacing some layers."""
        model, head = self._replacer.hybrid(replaced), self._replacer.base.head_weight
        sums, counts = [], []
        for batch, expected in zip(self._batches, self._expected, strict=True):
            mask = batch.loss_mask.flatten()
            _, kl = distillation_kl(_hidden(model, batch), model.head_weight, expected, head, mask)
            sums.append((kl * mask).view(-1, self._seq_len).sum(1).double())
            counts.append(mask.view(-1, self._seq_len).sum(1).double())
        self._done()
        # Windows that only pad a micro-batch count nothing.
        count = torch.cat(counts)
        total, count = torch.cat(sums)[count > 0], count[count > 0]
        kl = total.sum() / count.sum()
        # Of a ratio of sums, by linearisation: windows may count different numbers of tokens.
        spread = ((total - kl * count) / count.mean()).square().sum() / max(len(count) * (len(count) - 1), 1)
        return Damage(kl.item(), math.sqrt(spread.item()) if len(count) > 1 else math.nan)


def _hidden(model: Decoder, batch: Batch) -> Tensor:
    """Final hidden states [N, D], in the order of batch.labels.flatten()."""
    return model.hidden_states(batch.tokens, batch.positions, batch.documents).transpose(0, 1).flatten(0, 1)


def candidates(config: ModelConfig, linear: str) -> list[int]:
    """Return the layers that `linear`, a mixer or parallel branches, can replace: other softmax attention."""
    return [layer for layer, kind in enumerate(config.layer_mixers()) if kind in SOFTMAX_MIXERS and kind != linear]


def copier(model: Decoder) -> conversion.Read:
    """Return a function that fills tensors by their names from a model in memory."""
    stored = model.state_dict()

    def read(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            tensor.copy_(stored[name])

    return read


def open_replacer(
    loaded: LoadedModel,
    linear: str,
    given: Mapping[str, Any],
    *,
    keep: int,
    window: int | None,
    drop_biases: bool,
    seed: int,
) -> Replacer:
    """Prepare the choice of the layers of a loaded model.

    Args:
        loaded: The model.
        linear: What replaces a layer.
        given: Settings of the linear mixers by section.
        keep: How many layers stay.
        window: Keys that a sliding-window layer sees; None keeps the model's.
        drop_biases: Leave out biases that the linear mixer cannot have.
        seed: See Replacer.

    Raises:
        ConfigError: the layers cannot be replaced so, or there are too few.
    """
    base = loaded.model.float()
    config = base.model_config
    if config.moe.num_experts:
        raise ConfigError(f"source: {loaded.path} has experts; choose the layers first, and upcycle the hybrid")
    if config.sink_tokens:
        raise ConfigError(
            f"source: {loaded.path} has sink tokens; choose the layers of a model without, and add them then"
        )
    layers = candidates(config, linear)
    if keep >= len(layers):
        raise ConfigError(f"keep is {keep}, and {loaded.path} has {len(layers)} layers to replace; keep fewer")
    source = Source(loaded.path, config, base.vocab_size, None, copier(base))
    return Replacer(base, linear, lambda own: checked_config(source, own, given, window, None, drop_biases), seed)


def final_errors(errors: Sequence[Mapping[int, float]]) -> dict[int, float]:
    """Return each layer's mean error over the last tenth of the steps that Replacer.align yields."""
    last = errors[len(errors) - max(len(errors) // 10, 1) :] if errors else []
    return {layer: sum(step[layer] for step in last) / len(last) for layer in (last[0] if last else ())}


def describe(choice: Choice, errors: Mapping[int, float], even: Damage | None) -> str:
    """The table of the candidates, each beside its place in the choice, and the damage of the whole."""
    header = ["layer", "replaced alone, nats a token", "when it was replaced", "place"]
    if errors:
        header.insert(1, "error of its output after alignment, %")
    rows = []
    for layer, alone in sorted(choice.measured[0].items()):
        cells = [str(layer), _nats(alone), "", "stays"]
        if layer in choice.replaced:
            place = choice.replaced.index(layer)
            then = choice.measured[place][layer] if len(choice.measured) > 1 else alone
            cells[2:] = [_nats(then), str(place + 1)]
        if errors:
            cells.insert(1, f"{100 * errors[layer]:.3g}")
        rows.append(cells)
    lines = [table(header, rows), "", f"all {len(choice.replaced)} replaced: {_nats(choice.damage)} nats a token"]
    if even is not None:
        lines.append(f"an evenly spaced pattern that keeps as many: {_nats(even)}")
    return "\n".join(lines)


def _nats(damage: Damage) -> str:
    return f"{damage.kl:.4g} ± {damage.error:.2g}"


def as_values(choice: Choice, errors: Mapping[int, float], even: Damage | None) -> dict[str, Any]:
    """The figures as JSON values.

    Args:
        choice: The choice.
        errors: Each layer's relative squared error after alignment; empty without.
        even: Damage of replacing as many layers by an evenly spaced pattern.
    """
    return {
        "replaced": list(choice.replaced),
        "damage": choice.damage._asdict(),
        "evenly_spaced": None if even is None else even._asdict(),
        "alignment_error": {str(layer): error for layer, error in errors.items()},
        "measured": [{str(layer): damage._asdict() for layer, damage in step.items()} for step in choice.measured],
    }
