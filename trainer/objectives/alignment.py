"""Alignment: single mixers learn what a teacher's mixers of the same layers do.

The first step of turning a softmax Transformer into a hybrid, as the attention transfer of LoLCATs (Zhang et al. 2024,
arXiv:2410.10254) and the attention alignment of RADLADS (Goldstein et al. 2025, arXiv:2505.03005). Every
layer reads what the teacher's layer reads. The layers are therefore independent of each other, and one forward pass of
the teacher serves all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from models.parallel import sum_counts, sum_of_shares
from models.parameters import Groups, local_part
from trainer.data.batch import Batch
from trainer.objectives.base import Objective

if TYPE_CHECKING:
    from models.decoder import Decoder
    from trainer.engines.frozen import FrozenModel

# Keeps a teacher's mixer whose output is zero from a division by zero.
_LEAST_SQUARES = 1e-20


@dataclass
class _Seen:
    """What a layer of the teacher has read and its mixer has written in a micro-batch.

    Attributes:
        entering: The residual stream that enters the layer, [T, B, D]; [T/P, B, D] with sequence parallelism.
        mixed: What the mixer adds to it, of the same shape.
    """

    entering: Tensor | None = None
    mixed: Tensor | None = None


class Alignment:
    """The mean over layers l of sum_t m_t |s_lt - y_lt|^2 / |y_l|^2, divided by the number of tokens with m_t not 0.

    s_l is what the trained model's mixer, after its norm, adds to the residual stream that enters layer l of the
    teacher, and y_l what the teacher's mixer adds to it. |y_l|^2 is the mean of |y_lt|^2 over the micro-batch, weighted
    by the loss mask m: all layers weigh alike, and one whose mixer gives 0 has loss 1.

    The metrics are the layers' losses, `alignment/layer_NN`.

    Args:
        teacher: The teacher, its layers split over pipeline stages like the trained model's.
        layers: The layers to align.
    """

    def __init__(self, teacher: FrozenModel, layers: Sequence[int]) -> None:
        self.teacher, self.layers = teacher, tuple(layers)
        self.metrics: tuple[str, ...] = tuple(f"alignment/layer_{layer:02d}" for layer in layers)
        self._seen: dict[int, _Seen] = {layer: _Seen() for layer in layers}
        for decoder in teacher.decoders:
            for number, block in decoder.layers.items():
                if int(number) in self._seen:
                    block.register_forward_pre_hook(partial(_keep_entering, self._seen[int(number)]))
                    block.get_submodule("mixer").register_forward_hook(partial(_keep_mixed, self._seen[int(number)]))

    def count(self, batch: Batch) -> int:
        """Count the tokens in the loss mask."""
        return int(batch.loss_mask.count_nonzero())

    def forward(self, decoder: Decoder, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        """Return the sum over a stage's layers, a differentiable scalar, and the sum of every metric.

        The teacher's stage with the same layers has run on this micro-batch before. Layers of other stages have sum 0,
        and the sums of all stages add up.

        Args:
            decoder: The trained model, or this stage of it.
            batch: The micro-batch, on the model's device.
        """
        own = [layer for layer in self.layers if str(layer) in decoder.layers]
        sums = torch.zeros(len(self.layers), device=batch.tokens.device)
        if not own:
            return sums.sum(), list(sums)
        entering, targets = self._take(own)
        mixed = decoder.mixed(entering, batch.tokens, batch.positions, batch.documents, origin=batch.origin)
        groups = decoder.groups
        weights = local_part(batch.loss_mask.transpose(0, 1), groups.tensor if groups.sequence else None)
        losses = _losses([mixed[layer] for layer in own], [targets[layer] for layer in own], weights, groups)
        sums = sums.index_copy(0, torch.tensor([self.layers.index(layer) for layer in own]).to(sums.device), losses)
        return sums.sum() / len(self.layers), list(sums.detach())

    def _take(self, layers: Sequence[int]) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """Return what entered the teacher's layers and what their mixers gave, and let go of it."""
        entering, targets = {}, {}
        for layer in layers:
            seen = self._seen[layer]
            assert seen.entering is not None and seen.mixed is not None, "the teacher runs first"
            entering[layer], targets[layer] = seen.entering, seen.mixed
            seen.entering = seen.mixed = None
        return entering, targets


AnyObjective = Objective | Alignment


def _keep_entering(seen: _Seen, block: Any, arguments: tuple[Any, ...]) -> None:
    seen.entering = arguments[0].detach()


def _keep_mixed(seen: _Seen, mixer: Any, arguments: tuple[Any, ...], mixed: Tensor) -> None:
    seen.mixed = mixed.detach()


def _losses(outputs: Sequence[Tensor], targets: Sequence[Tensor], weights: Tensor, groups: Groups) -> Tensor:
    """Return this context rank's sums sum_t m_t |s_t - y_t|^2 / |y|^2 of every layer, float32 [layers].

    Args:
        outputs: s of every layer, [T, B, D] or this rank's part of it.
        targets: y, likewise.
        weights: m of the same tokens, float32 [T, B].
        groups: The ranks that share the micro-batch.
    """
    pairs = list(zip(outputs, targets, strict=True))
    errors = torch.stack([(weights * (s.float() - y.float()).square().sum(-1)).sum() for s, y in pairs])
    if groups.sequence:
        errors = sum_of_shares(errors, groups)
    with torch.no_grad():
        squares = [(weights * y.float().square().sum(-1)).sum() for _, y in pairs]
        *totals, tokens = sum_counts(torch.stack([*squares, weights.sum()]), groups).unbind()
        mean_squares = torch.stack(totals).clamp_min(_LEAST_SQUARES) / tokens.clamp_min(1e-9)
    return errors / mean_squares
