"""Log-probabilities of given sequences by the kernels of training, under the model in training and the initial one."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from kernels.losses.token_log_probs import IGNORE_LABEL
from trainer.data.batch import EXPERTS, Batch
from trainer.objectives.base import Outputs
from trainer.posttraining.data.packing import SEQUENCE, Packing, pack
from trainer.posttraining.data.sequences import TokenSequence

if TYPE_CHECKING:
    from trainer.engines.base import Engine
    from trainer.engines.frozen import FrozenModel

_REFERENCE = "reference"


class _Record:
    """An objective that minimises nothing, and keeps what each micro-batch shows: log-probabilities, and values."""

    metrics: tuple[str, ...] = ()

    def __init__(self, reference: FrozenModel | None, temperature: float, values: bool) -> None:
        self.models: Mapping[str, FrozenModel] = {} if reference is None else {_REFERENCE: reference}
        self._temperature, self._values = temperature, values
        # Of each micro-batch: log-probabilities of every model, then values, [B, T] each.
        self.found: list[tuple[Tensor, ...]] = []

    def count(self, batch: Batch) -> int:
        return int(batch.loss_mask.count_nonzero())

    def forward(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Sequence[Tensor]]:
        self.note([outputs, *(outputs.frozen[name] for name in self.models)], batch)
        return self.found[-1][0].new_zeros(()), ()

    def note(self, every: Sequence[Outputs], batch: Batch) -> None:
        """Keep what models show of a micro-batch; values are the first one's."""
        tokens = batch.labels.masked_fill(batch.loss_mask == 0, IGNORE_LABEL)
        found = [one.token_log_probs(tokens, temperature=self._temperature)[0] for one in every]
        if self._values:
            found.append(every[0].values())
        self.found.append(tuple(_whole(one, every[0]) for one in found))


def _whole(own: Tensor, outputs: Outputs) -> Tensor:
    """What is known of whole sequences, of which every context-parallel rank has computed a part."""
    group = outputs.groups.context
    if group is None:
        return own
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, own.contiguous(), group=group)
    return torch.cat(parts, 1)


class Scorer:
    """Scores sequences.

    Args:
        engine: What trains the model.
        reference: The initial model; None to score under the model in training alone.
        temperature: Divides the logits.
        seed: Of the run.

    Attributes:
        seconds: Time that scoring has taken so far.
    """

    def __init__(self, engine: Engine, reference: FrozenModel | None, temperature: float, seed: int) -> None:
        self.engine, self._reference = engine, reference
        self._temperature, self._seed = temperature, seed
        self.seconds = 0.0

    def score(
        self, sequences: Sequence[TokenSequence], packing: Packing, *, step: int
    ) -> tuple[list[np.ndarray], list[np.ndarray] | None]:
        """Log-probabilities of every learned token of sequences, 0 for the others. Every rank calls this.

        Args:
            sequences: The same on every rank.
            packing: What micro-batches must look like.
            step: Steps taken before this one.

        Returns:
            Under the model in training, and under the reference if there is one: float32 [L] for each sequence.
        """
        own, *others = self._columns(sequences, packing, step, values=False)
        return own, others[0] if others else None

    def score_by_reference(
        self, sequences: Sequence[TokenSequence], packing: Packing, *, step: int
    ) -> list[np.ndarray]:
        """As `score`, under the reference alone."""
        (found,) = self._columns(sequences, packing, step, values=False, policy=False)
        return found

    def score_with_values(
        self, sequences: Sequence[TokenSequence], packing: Packing, *, step: int
    ) -> tuple[list[np.ndarray], list[np.ndarray] | None, list[np.ndarray]]:
        """As `score`, and the value head's numbers before each token, by the model in training."""
        own, *others, values = self._columns(sequences, packing, step, values=True)
        return own, others[0] if others else None, values

    def _columns(
        self, sequences: Sequence[TokenSequence], packing: Packing, step: int, values: bool, policy: bool = True
    ) -> list[list[np.ndarray]]:
        start = time.perf_counter()
        engine, record = self.engine, _Record(self._reference, self._temperature, values)
        bare = [
            replace(sequence, extra={name: array for name, array in sequence.extra.items() if name == EXPERTS})
            for sequence in sequences
        ]
        rank, world = engine.data_parallel_rank, engine.data_parallel_size
        batches = pack(bare, packing, seed=self._seed, step=step, rank=rank, world=world)
        if policy:
            engine.evaluate(batches, record)
        else:
            self._visit(batches, record)
        own: dict[int, list[np.ndarray]] = {}
        for batch, found in zip(batches, record.found, strict=True):
            numbers = batch.extra[SEQUENCE].flatten().numpy()
            for number in np.unique(numbers[numbers >= 0]).tolist():
                place = np.flatnonzero(numbers == number)
                columns = []
                for column in found:
                    # The position of a token predicts the next one. A shared prompt has no places.
                    shifted = np.zeros(len(sequences[number]), np.float32)
                    shifted[len(shifted) - len(place) + 1 :] = column.flatten().float().cpu().numpy()[place[:-1]]
                    columns.append(shifted)
                own[number] = columns
        every: dict[int, list[np.ndarray]] = {}
        for part in engine.collectives.gather(own):
            every |= part
        self.seconds += time.perf_counter() - start
        return [list(column) for column in zip(*(every[number] for number in range(len(sequences))), strict=True)]

    @torch.no_grad()
    def _visit(self, batches: Sequence[Batch], record: _Record) -> None:
        """As `Engine.evaluate`, without the model in training."""
        assert self._reference is not None, "there is nothing to score by"
        group = self.engine.model.groups.context
        place = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
        parts = [batch.part(*place).to(self.engine.device) for batch in batches]
        for outputs, part in zip(self._reference.outputs(parts), parts, strict=True):
            record.note([outputs], part)
