"""Pairs of answers to learn preferences from: their steps, and a validation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from trainer.posttraining.data.encode import EncodeCounts, Encoder, fit
from trainer.posttraining.data.packing import Packing, pack
from trainer.posttraining.data.rows import Rows
from trainer.posttraining.data.sampler import EndlessOrder
from trainer.posttraining.data.sequences import TokenSequence
from trainer.posttraining.policy import PreferenceObjective
from trainer.posttraining.validation import Validation

if TYPE_CHECKING:
    from trainer.data.batch import Batch
    from trainer.loop import Trainer
    from trainer.posttraining.config import PosttrainConfig

Pair = tuple[TokenSequence, TokenSequence]


def encode_pairs(rows: Rows, encoder: Encoder) -> tuple[list[list[Pair]], tuple[float, ...], EncodeCounts]:
    """The chosen and rejected answers of all rows, by pool, with the pools' weights. Pairs of which one is too long go.

    Raises:
        ConfigError: a row has no two answers, or one is too long and `overlong` is error.
    """
    pools, weights = rows.pools()
    found, counts = [], EncodeCounts()
    for pool in pools:
        pairs: list[Pair] = []
        for row in pool:
            chosen, rejected = (fit(one, encoder.options, row.id) for one in encoder.preference(row))
            if chosen is None or rejected is None:
                counts += EncodeCounts(1, overlong=1)
                continue
            pairs.append((chosen, rejected))
            counts += EncodeCounts(1, tokens=len(chosen) + len(rejected), learned=chosen.learned + rejected.learned)
        found.append(pairs)
    return found, weights, counts


class Pairs:
    """The steps of learning from pairs. A step has global_batch_size pairs; see trainer.loop.Source.

    Args:
        pools: The pairs.
        weights: Share of each pool.
        config: The run's configuration.
        packing: What micro-batches must look like; `tokens` is not used.
    """

    def __init__(
        self, pools: Sequence[Sequence[Pair]], weights: Sequence[float], config: PosttrainConfig, packing: Packing
    ) -> None:
        self._order = EndlessOrder(pools, weights, config.train.seed)
        self._train, self._packing = config.train, packing
        self._has_fixed_count = config.engine.name == "deepspeed"

    def micro_batches(self, step: int, micro_batch_size: int, *, rank: int = 0, world: int = 1) -> list[Batch]:
        """See trainer.loop.Source. A micro-batch has up to seq_len times micro_batch_size tokens of each answer."""
        size, train = self._train.global_batch_size, self._train
        count = -(-size // (micro_batch_size * world)) if self._has_fixed_count else None
        packing = replace(self._packing, tokens=2 * train.seq_len * micro_batch_size, count=count)
        pairs = self._order.take(step * size, size)
        return pack(flat(pairs), packing, seed=train.seed, step=step, rank=rank, world=world, together=2)

    def metrics(self, result: Mapping[str, Any]) -> Mapping[str, Any]:
        """See trainer.loop.Source: the data say nothing about a step."""
        return result


def flat(pairs: Sequence[Pair]) -> list[TokenSequence]:
    """The answers one after the other."""
    return [answer for pair in pairs for answer in pair]


class PairAccuracy(Validation):
    """The loss on held-out pairs, and how often the chosen answer gains more than the rejected one.

    Args:
        pairs: The pairs.
        objective: The loss.
        packing: What micro-batches must look like; `tokens` is not used.
        config: The run's configuration.
    """

    def __init__(
        self, pairs: Sequence[Pair], objective: PreferenceObjective, packing: Packing, config: PosttrainConfig
    ) -> None:
        self._pairs, self._objective, self.every = pairs, objective, config.evaluation.every
        self._packing = replace(packing, tokens=2 * config.train.seq_len * config.train.micro_batch_size)

    def validate(self, trainer: Trainer) -> dict[str, float]:
        """See `PairAccuracy`."""
        engine, objective = trainer.engine, self._objective
        rank, world = engine.data_parallel_rank, engine.data_parallel_size
        batches = pack(flat(self._pairs), self._packing, seed=0, step=0, rank=rank, world=world, together=2)
        loss, *sums = engine.collectives.sum_over_data(engine.evaluate(batches, objective))
        names = [name.removeprefix("preference/") for name in objective.metrics]
        count = max(len(self._pairs), 1)
        return {"loss": loss / count} | {name: value / count for name, value in zip(names, sums, strict=True)}
