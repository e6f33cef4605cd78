"""Plan a configuration, or all layouts of it."""

import sys
import warnings

from trainer import trainable
from trainer.compression import check_compression
from trainer.data.sources import find_sources
from trainer.planning.config import PlanConfig
from trainer.planning.plan import Plan, Planner
from trainer.planning.search import search
from trainer.stored import teacher


def run(config: PlanConfig, all_layouts: bool) -> list[Plan]:
    """Plan each phase of the run; with `all_layouts`, every layout that fits, the fastest first.

    Raises:
        ConfigError: neither the configuration nor its data gives the vocabulary's size.
    """
    # mcore warns at import that TransformerEngine and Apex are missing, and uses deprecated names of collectives.
    warnings.simplefilter("ignore")
    check_compression(config)
    trainable.check(config)
    vocab_size = config.model.padded_vocab_size(_vocab_size(config))
    planner = Planner(config, vocab_size)
    if all_layouts:
        return search(config, planner, _say)
    teacher.check(config, vocab_size)
    return [planner.plan(phase) for phase in trainable.to_plan(config)]


def _vocab_size(config: PlanConfig) -> int:
    """Number of token ids before padding. The embedded corpus does not have to be prepared."""
    if config.model.vocab_size is not None:
        return config.model.vocab_size
    data = config.data
    return data.vocab_size if "stdlib" in data.shares() else find_sources(config).vocab_size


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
