"""Which rows a step takes, as a pure function of (seed, step). There is no other state: a resumed run needs its step.

Rows are drawn without replacement: every row of a pool once per epoch, in an order of the epoch's own, and epochs
follow each other without a gap, also within a step. Several pools are blended with exact shares
(trainer.data.dataset.blend), each with its own epochs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, Generic, TypeVar

import numpy as np

from trainer.data.batch import Batch
from trainer.data.dataset import blend, split_ratios
from trainer.errors import ConfigError
from trainer.posttraining.data.packing import Packing, pack
from trainer.posttraining.data.sequences import TokenSequence

T = TypeVar("T")


class EndlessOrder(Generic[T]):
    """An endless stream of the items of pools, shuffled by (seed, pool, epoch).

    Args:
        pools: The items.
        weights: Share of each pool.
        seed: Of the run.

    Raises:
        ConfigError: a pool is empty.
    """

    def __init__(self, pools: Sequence[Sequence[T]], weights: Sequence[float], seed: int) -> None:
        assert len(pools) == len(weights) > 0
        if not all(pools):
            raise ConfigError(f"rows: pool {[len(pool) for pool in pools].index(0)} has no rows; leave its file out")
        self._pools, self._weights, self._ratios, self._seed = pools, weights, split_ratios(weights), seed
        # A step reads one epoch of each pool, or two at a boundary.
        self._order = lru_cache(maxsize=2 * len(pools))(self._compute_order)

    def _compute_order(self, pool: int, epoch: int) -> np.ndarray:
        # As in trainer.data.dataset: NumPy guarantees raw draws, but not the result of `permutation`.
        bits = np.random.Philox(np.random.SeedSequence([self._seed, pool, epoch]))
        return np.argsort(bits.random_raw(len(self._pools[pool])), kind="stable")

    def place(self, number: int) -> tuple[int, int]:
        """(pool, index in the pool) of item `number` of the stream."""
        pool, taken = blend(number, self._ratios)
        epoch, offset = divmod(taken, len(self._pools[pool]))
        return pool, int(self._order(pool, epoch)[offset])

    def take(self, first: int, count: int) -> list[T]:
        """Items `first` to `first + count` of the stream."""
        places = map(self.place, range(first, first + count))
        return [self._pools[pool][index] for pool, index in places]

    def epochs(self, count: int) -> list[float]:
        """Epochs of each pool that the first `count` items are, to within an item of each pool."""
        total = sum(self._weights)
        return [count * weight / total / len(pool) for weight, pool in zip(self._weights, self._pools, strict=True)]


class SupervisedSampler:
    """The micro-batches of supervised fine-tuning.

    Args:
        pools: The encoded sequences, each of at most `seq_len` tokens (EncodeOptions.max_length). They are held in
            memory, at 8 bytes per token.
        weights: Share of each pool.
        seed: Of the run.
        seq_len: Tokens; with the micro-batch size it bounds a micro-batch.
        global_batch_size: Sequences in a step.
        packing: Further demands on micro-batches; its `tokens` and `count` are not used.
        fixed_count: Give every step global_batch_size / (micro_batch_size · ranks) micro-batches per rank, as DeepSpeed
            needs, instead of as few as possible.
    """

    def __init__(
        self,
        pools: Sequence[Sequence[TokenSequence]],
        weights: Sequence[float] = (1.0,),
        *,
        seed: int,
        seq_len: int,
        global_batch_size: int,
        packing: Packing | None = None,
        fixed_count: bool = False,
    ) -> None:
        self._order = EndlessOrder(pools, weights, seed)
        longest = max(len(sequence) for pool in pools for sequence in pool)
        if longest > seq_len:
            raise ConfigError(f"a sequence has {longest} tokens, and train.seq_len is {seq_len}; set max_length to it")
        self.seed, self.seq_len, self.global_batch_size = seed, seq_len, global_batch_size
        self._packing, self._fixed_count = packing or Packing(seq_len), fixed_count

    def sequences(self, step: int) -> list[TokenSequence]:
        """The sequences of `step`, which counts from 0."""
        return self._order.take(step * self.global_batch_size, self.global_batch_size)

    def micro_batches(self, step: int, micro_batch_size: int, *, rank: int = 0, world: int = 1) -> list[Batch]:
        """The packed micro-batches of data-parallel rank `rank` of `world` in `step`: equally many on every rank.

        Args:
            step: Steps taken before this one.
            micro_batch_size: A micro-batch has up to seq_len times this many tokens.
            rank: This data-parallel rank.
            world: Data-parallel ranks.

        Raises:
            ConfigError: `packing.multiple` does not divide a micro-batch's tokens.
        """
        count = -(-self.global_batch_size // (micro_batch_size * world)) if self._fixed_count else None
        packing = replace(self._packing, tokens=self.seq_len * micro_batch_size, count=count)
        return pack(self.sequences(step), packing, seed=self.seed, step=step, rank=rank, world=world)

    def metrics(self, result: Mapping[str, Any]) -> Mapping[str, Any]:
        """See trainer.loop.Source: the data say nothing about a step."""
        return result

    def epochs(self, step: int) -> list[float]:
        """Epochs of each pool that the steps before `step` have read."""
        return self._order.epochs(step * self.global_batch_size)


class PromptSampler(Generic[T]):
    """The prompts of a step of reinforcement learning.

    At the boundary of two epochs a step may take a prompt twice; groups are told apart by their number in the run, not
    by their row. The number also seeds a group's samples.

    Args:
        pools: The items: rows, or rows with their tokens (encode.encode_prompts).
        weights: Share of each pool.
        seed: Of the run.
        prompts_per_step: Prompts in a step, over all ranks.
    """

    def __init__(
        self, pools: Sequence[Sequence[T]], weights: Sequence[float] = (1.0,), *, seed: int, prompts_per_step: int
    ) -> None:
        self._order, self.prompts_per_step = EndlessOrder(pools, weights, seed), prompts_per_step

    def numbers(self, step: int, *, rank: int = 0, world: int = 1) -> range:
        """Numbers in the run of the prompts that data-parallel rank `rank` of `world` takes in `step`: a slice.

        Raises:
            ConfigError: the ranks do not divide the prompts of a step.
        """
        share, rest = divmod(self.prompts_per_step, world)
        if rest:
            raise ConfigError(
                f"{self.prompts_per_step} prompts per step are not a multiple of {world} ranks; change one"
            )
        first = step * self.prompts_per_step + rank * share
        return range(first, first + share)

    def prompts(self, step: int, *, rank: int = 0, world: int = 1) -> list[T]:
        """The items of `numbers`."""
        numbers = self.numbers(step, rank=rank, world=world)
        return self.take(numbers.start, len(numbers))

    def take(self, first: int, count: int) -> list[T]:
        """Prompts `first` to `first + count` of the run, for loops that keep a place of their own.

        Dynamic sampling, for one, takes more prompts until enough groups have differing rewards.
        """
        return self._order.take(first, count)

    def epochs(self, step: int) -> list[float]:
        """Epochs of each pool that the steps before `step` have read."""
        return self._order.epochs(step * self.prompts_per_step)
