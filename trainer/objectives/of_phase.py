"""Builds the objective that a phase of a run names (train.objective)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainer.config import ObjectiveConfig, PretrainConfig
from trainer.engines.frozen import FrozenSpec
from trainer.objectives.alignment import Alignment, AnyObjective
from trainer.objectives.distillation import Distillation
from trainer.objectives.language_model import LanguageModel
from trainer.stored.teacher import aligned_layers

if TYPE_CHECKING:
    from trainer.engines.base import Engine


class PhaseObjectives:
    """The objective of each phase, built when its first step begins. At most one teacher is in memory.

    Args:
        engine: The engine that trains.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._config = ObjectiveConfig()
        self._objective: AnyObjective = LanguageModel()

    def __call__(self, config: PretrainConfig) -> AnyObjective:
        """Return the objective of a phase, given its configuration. Every rank calls this.

        Raises:
            ConfigError: the teacher cannot be read, or does not fit the model.
        """
        wanted = config.train.objective
        if wanted != self._config:
            # Let the last phase's teacher go before the next one takes memory.
            self._objective = LanguageModel()
            self._config, self._objective = wanted, self._build(config)
        return self._objective

    def _build(self, config: PretrainConfig) -> AnyObjective:
        wanted = config.train.objective
        if wanted.needed_teacher is None:
            return LanguageModel()
        aligns = wanted.name == "align"
        spec = FrozenSpec.of_weights(wanted.needed_teacher, config.train.precision, stages_as_trained=aligns)
        teacher = self._engine.freeze(spec)
        if aligns:
            return Alignment(teacher, aligned_layers(config))
        return Distillation(
            teacher,
            temperature=wanted.temperature,
            kl_weight=wanted.kl_weight,
            next_token_weight=wanted.next_token_weight,
        )
