"""What both engines do alike: collectives, and the end of a step."""

import math

import pytest
import torch

from models.config import ModelConfig
from models.statistics import StepStatistics
from tests.processes import run_ranks
from trainer.engines.common import StepSums
from trainer.engines.timing import PhaseTimer
from trainer.objectives.log_probs import WeightedLogProbs

OBJECTIVE = WeightedLogProbs("advantages", entropy=0.1)


def test_collectives_count_ranks_as_their_names_say():
    run_ranks(3, "-m", "tests.trainer.collectives_ranks", imported="torch")


def test_sums_are_divided_by_the_count():
    sums = StepSums.of(OBJECTIVE, 6.0, 4.0, [-8.0, 2.0])
    result = sums.finish(0.5, StepStatistics(ModelConfig(), [], measure_every=1), PhaseTimer(torch.device("cpu")))
    assert (result.loss, result.grad_norm, result.tokens, result.skipped) == (1.5, 0.5, 4, False)
    assert result.metrics == {"log_prob": -2.0, "entropy": 0.5}


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)])
def test_a_step_is_skipped_for_its_loss_or_its_gradient(loss, norm):
    sums = StepSums.of(OBJECTIVE, loss, 4.0, [0.0, 0.0])
    assert sums.is_finite == math.isfinite(loss)
    assert sums.finish(
        norm, StepStatistics(ModelConfig(), [], measure_every=1), PhaseTimer(torch.device("cpu"))
    ).skipped


def test_a_step_without_tokens_has_counted_none():
    sums = StepSums.of(OBJECTIVE, 0.0, 0.0, [0.0, 0.0])
    result = sums.finish(0.0, StepStatistics(ModelConfig(), [], measure_every=1), PhaseTimer(torch.device("cpu")))
    assert (result.loss, result.tokens) == (0.0, 0)
