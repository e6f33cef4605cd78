"""The specification that an engine is built from: the part of a run's configuration that engines need."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from models.config import ModelConfig
from models.saved_activations import Policy
from trainer.compression import block_policy
from trainer.config import EngineConfig, OptimConfig, ParallelConfig, PretrainConfig, RunConfig, TrainConfig
from trainer.run_directory import starts_anew
from trainer.stored import weights
from trainer.trainable import trained_in_any

if TYPE_CHECKING:
    from models.decoder import Decoder


@dataclass(frozen=True)
class EngineSpec:
    """A model with its optimizer, sharded over ranks.

    Attributes:
        model: Model configuration.
        vocab_size: Rows of the embedding, including padding.
        optim: AdamW settings. Each step sets the learning rate.
        parallel: The parallel layout.
        sharding: DeepSpeed's ZeRO stage and offloading. The Megatron engine ignores it.
        precision: dtype of the parameters that the model computes with, bf16 or fp32.
        seed: Seed of the parameter initialisation.
        micro_batch_size: Rows of a micro-batch.
        global_batch_size: Rows of a step, over all data-parallel ranks.
        saved_activations: Every block's policy for tensors kept for backward.
        init: The initial weights or checkpoint. None initialises the parameters at random.
        resumes: A checkpoint will be loaded, so parameters are neither initialised nor read from weights.
        trainable: Name patterns of the parameters that any phase of the run trains. The others are frozen: they have
            no gradient and no optimizer state.
        collective_seconds: Timeout of a collective, in seconds.
        measure_every: Steps between those with measures of spikes and compressed activations; 0 for never.
        value_head: Add a head for values, whose learning rate has this factor. None for no such head.
    """

    model: ModelConfig
    vocab_size: int
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    sharding: EngineConfig = field(default_factory=EngineConfig)
    precision: str = "fp32"
    seed: int = TrainConfig.seed
    micro_batch_size: int = TrainConfig.micro_batch_size
    global_batch_size: int = TrainConfig.global_batch_size
    saved_activations: Policy = field(default_factory=Policy)
    init: str | None = None
    resumes: bool = False
    trainable: tuple[str, ...] = ("*",)
    collective_seconds: float = field(default_factory=lambda: RunConfig().collective_seconds)
    measure_every: int = 0
    value_head: float | None = None

    @classmethod
    def of(cls, config: PretrainConfig, vocab_size: int) -> EngineSpec:
        """Derive the spec from a pretraining run. Initial weights apply only if the run has no checkpoint yet."""
        train = config.train
        return cls(
            config.model,
            vocab_size,
            config.optim,
            config.parallel,
            config.engine,
            train.precision,
            train.seed,
            train.micro_batch_size,
            train.global_batch_size,
            Policy(block_policy(config)),
            config.checkpoint.init,
            # Judged by file names alone. trainer.pretrain refuses to continue if no checkpoint is found later.
            not starts_anew(config),
            tuple(trained_in_any(config)),
            config.run.collective_seconds,
            config.logging.steps_between_measures,
            config.value_head,
        )

    def micro_batches(self, data_parallel_size: int) -> int:
        """Number of micro-batches that each data-parallel rank computes per step."""
        return self.global_batch_size // (self.micro_batch_size * data_parallel_size)

    def fill(self, decoder: Decoder) -> None:
        """Fill this rank's shard of a model, or of one of its stages, with initial values."""
        weights.start(decoder, self.init, self.seed, resumes=self.resumes)
