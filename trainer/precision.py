"""Resolves train.precision=auto: the precision of the resumed run, else the one that is faster on this device."""

import datetime
import json
import logging
import os
from dataclasses import replace
from typing import Any, Literal, TypeVar

import torch
import yaml
from torch.distributed.rendezvous import rendezvous

from kernels.matmul import multiplies_bfloat16
from trainer import run_directory
from trainer.config import PretrainConfig, world_size_from_environment
from trainer.runtime import rank

_LOGGER = logging.getLogger("spiketrain")
# rank 0's store serves the other ranks while this reference is alive.
_STORES: list[Any] = []

C = TypeVar("C", bound=PretrainConfig)


def settle(config: C, config_yaml: str, device: torch.device) -> tuple[C, str]:
    """Replace auto by fp32 or bf16 in the configuration and its YAML, and log the choice once.

    All ranks use rank 0's choice.
    """
    if config.train.precision != "auto":
        return config, config_yaml
    precision, reason = _of_rank_0(choose(config, device))
    if rank() == 0:
        _LOGGER.info("train.precision=auto: %s, %s", precision, reason)
    values = yaml.safe_load(config_yaml)
    values["train"]["precision"] = precision
    train = replace(config.train, precision=precision)  # type: ignore[arg-type]
    return replace(config, train=train), yaml.safe_dump(values, sort_keys=False)


def choose(config: PretrainConfig, device: torch.device) -> tuple[Literal["fp32", "bf16"], str]:
    """The precision, and the reason for it."""
    # A resumed run keeps its precision: switching would change its results.
    of_the_run = run_directory.precision_of_the_run(config)
    if of_the_run is not None:
        return ("bf16" if of_the_run == "bf16" else "fp32"), "as the run began"
    if config.engine.zero_stage == 0:
        return "fp32", "in which ZeRO 0 adds up"
    if device.type != "cpu":
        return "bf16", "which a GPU is faster in"
    if multiplies_bfloat16():
        return "bf16", "which this processor has instructions for"
    return "fp32", "since this processor has no instructions for bfloat16"


def _of_rank_0(choice: tuple[str, str]) -> tuple[str, str]:
    """Broadcast rank 0's choice. Uses a store, because the engines that create process groups need the choice first."""
    if world_size_from_environment() == 1:
        return choice
    store, own, _ = next(rendezvous("env://", timeout=datetime.timedelta(minutes=10)))
    _STORES.append(store)
    # torchrun's store survives a restart of the ranks, so the key contains the restart count.
    key = f"precision/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    if own == 0:
        store.set(key, json.dumps(choice))
    precision, reason = json.loads(store.get(key))
    return precision, reason
