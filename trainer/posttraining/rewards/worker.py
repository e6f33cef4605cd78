"""A process that scores one answer at a time: `python -m trainer.posttraining.rewards.worker FD`, as workers.py does.

It reads JSON lines from stdin: first the rewards, then answers. It writes JSON lines to the descriptor FD: `ready`, or
why the rewards cannot be loaded, then a line for each answer. What rewards print is thrown away.
"""

import dataclasses
import json
import math
import os
import resource
import sys
from pathlib import Path
from typing import Any, BinaryIO

from trainer.errors import ConfigError, describe_failure
from trainer.posttraining.rewards import base
from trainer.posttraining.rewards.base import Answer, Reward, Score, ScoringError, as_score
from trainer.posttraining.rewards.confined import die_with_parent
from trainer.posttraining.rewards.registry import RewardConfig, build

_MOST_MESSAGE_CHARACTERS = 500
_EXHAUSTED = "the reward ran out of memory"


def main(descriptor: int) -> None:
    """Load the rewards, then score until stdin ends."""
    requests = os.fdopen(os.dup(0), "rb")
    results = os.fdopen(descriptor, "wb", buffering=0)
    # Rewards may read and print: neither reaches the pipes.
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    first = json.loads(requests.readline())
    die_with_parent(first["parent"])
    sys.path[:] = first["path"]
    base.IN_WORKER = True
    try:
        configs = [RewardConfig(**config) for config in first["rewards"]]
        rewards = [build(config) for config in configs]
    except ConfigError as error:
        _write(results, {"failure": str(error)})
        return
    # Whatever a user's module does.
    except BaseException as error:
        _write(results, {"failure": f"rewards: loading failed: {describe_failure(error)}"})
        return
    space = _address_space()
    _write(results, {"ready": True})
    for line in requests:
        request = json.loads(line)
        chosen = request["reward"]
        _limit_memory(space, configs[chosen].memory_bytes)
        score, message = _score(rewards[chosen], Answer(**request["answer"]))
        _limit_memory(space, None)
        said: dict[str, Any] = {"id": request["id"], "message": message, "exhausted": message == _EXHAUSTED}
        _write(results, said | dataclasses.asdict(score))


def _score(reward: Reward, answer: Answer) -> tuple[Score, str]:
    """The score, and what happened if it could not be computed."""
    try:
        return as_score(reward(answer)), ""
    except ScoringError as error:
        return Score(error=error.kind), str(error)[:_MOST_MESSAGE_CHARACTERS]
    except MemoryError:
        return Score(error="memory"), _EXHAUSTED
    # sys.exit() of a reward is its failure, and not the worker's end.
    except BaseException as error:
        return Score(error="exception"), describe_failure(error)[:_MOST_MESSAGE_CHARACTERS]


def _address_space() -> int | None:
    """Bytes of address space that this process has; None where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:
        return None
    return pages * resource.getpagesize()


def _limit_memory(space: int | None, memory: int | None) -> None:
    """Limit the address space to `memory` bytes beyond `space`; None lifts the limit."""
    if space is None:
        return
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    soft = hard if memory is None else space + memory
    if hard != resource.RLIM_INFINITY:
        soft = min(soft, hard)
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _write(results: BinaryIO, values: dict[str, Any]) -> None:
    assert not math.isnan(values.get("value", 0.0))
    remaining = memoryview(json.dumps(values).encode() + b"\n")
    # A pipe may take less than all at once.
    while remaining:
        remaining = remaining[results.write(remaining) :]


if __name__ == "__main__":
    main(int(sys.argv[1]))
