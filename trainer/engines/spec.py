"""What an engine is made from: all of a run that it needs, and nothing of the rest."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from models.config import ModelConfig
from trainer import weights
from trainer.config import EngineConfig, OptimConfig, ParallelConfig, PretrainConfig, RunConfig, TrainConfig
from trainer.phases import trained_in_any
from trainer.run_directory import starts_anew

if TYPE_CHECKING:
    from models.decoder import Decoder


@dataclass(frozen=True)
class EngineSpec:
    """A model with its optimizer, spread over ranks.

    Attributes:
        model: Its shape.
        vocab_size: Rows of the embedding, padding included.
        optim: AdamW; the learning rate comes with each step.
        parallel: The layout.
        sharding: DeepSpeed's ZeRO stage and offloading; Megatron's engine reads nothing of it.
        precision: bf16 or fp32, of the parameters that the model computes with.
        seed: Of the parameters that are drawn.
        micro_batch_size: Rows of a micro-batch.
        global_batch_size: Rows of a step, over all data-parallel ranks.
        recompute: The parts of a block that backward computes again, see models.decoder.Block.
        init: The directory of the weights to begin with; None to draw them.
        resumes: A checkpoint will be loaded: parameters are neither drawn nor read.
        trainable: Patterns of the names of the parameters that are trained, in any phase of the run. The others are
            frozen: they have no gradient and no optimizer state.
        collective_seconds: How long a collective may take.
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
    recompute: frozenset[str] = frozenset()
    init: str | None = None
    resumes: bool = False
    trainable: tuple[str, ...] = ("*",)
    collective_seconds: float = field(default_factory=lambda: RunConfig().collective_seconds)

    @classmethod
    def of(cls, config: PretrainConfig, vocab_size: int) -> EngineSpec:
        """The engine of a pretraining run; weights to begin with are for a run that has no checkpoint."""
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
            train.recomputed_parts,
            config.checkpoint.init,
            not starts_anew(config),
            tuple(trained_in_any(config)),
            config.run.collective_seconds,
        )

    def micro_batches(self, data_parallel_size: int) -> int:
        """Micro-batches of a rank in a step."""
        return self.global_batch_size // (self.micro_batch_size * data_parallel_size)

    def fill(self, decoder: Decoder) -> None:
        """Give this rank's shard of a model, or of a stage of it, the values to begin with."""
        weights.start(decoder, self.init, self.seed, resumes=self.resumes)
