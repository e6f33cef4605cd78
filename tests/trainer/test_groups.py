"""One gloo device serves all groups of a rank; an engine that is closed leaves nothing behind."""

import gc
import os
import weakref
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.trainer.conftest import in_process_config
from trainer.config import EngineConfig
from trainer.pretrain import build_engine

CPU = torch.device("cpu")


def gloo_threads():
    """Threads of this process that serve process groups, by their names."""
    tasks = Path("/proc/self/task")
    names = Counter((tasks / task / "comm").read_text().strip() for task in os.listdir(tasks))
    return {name: number for name, number in names.items() if "gloo" in name}


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads as Linux shows them")
@pytest.mark.parametrize("engine", [EngineConfig("megatron"), EngineConfig("deepspeed", 2)], ids=lambda x: x.name)
def test_a_closed_engine_is_freed_with_its_threads(tiny_data, tmp_path, engine):
    gc.collect()
    before = gloo_threads()
    config = replace(in_process_config(tiny_data, tmp_path), engine=engine)
    built = build_engine(config, 512, CPU)
    while_open = gloo_threads()
    assert while_open["gloo_tcp_loop"] - before.get("gloo_tcp_loop", 0) == 1, "all groups share a device"
    assert while_open["pt_gloo_runloop"] > before.get("pt_gloo_runloop", 0)
    references = [weakref.ref(x) for x in (built, built.model, next(built.model.parameters()))]
    built.close()
    del built
    gc.collect()
    assert [reference() for reference in references] == [None] * 3
    assert gloo_threads() == before
