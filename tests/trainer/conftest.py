"""A tiny run on the dataset of `tiny_data`: as a command, and in this process."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import processes
from tests.processes import QUIET
from tests.processes import ROOT as ROOT
from tests.processes import finish as finish


@pytest.fixture
def log():
    """The messages of the logger spiketrain, which other tests may have cut off from pytest's."""
    logger, messages = logging.getLogger("spiketrain"), []
    level, handler = logger.level, logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)
    logger.setLevel(level)


@pytest.fixture
def tiny_run(tiny_data, tmp_path):
    """Start `launch/pretrain.py` (or another script) on a 2-layer hybrid; returns a function.

    Forked from a process that has imported all of it, unless true torchrun is asked for, or our own launcher.
    """

    def start(
        run_dir,
        *overrides,
        ranks=1,
        script="launch/pretrain.py",
        script_arguments=(),
        torchrun=False,
        own_launcher=False,
    ):
        arguments = [
            f"--run.dir={run_dir}",
            "--run.threads=1",
            "--model.num_layers=2",
            "--model.hidden_size=32",
            "--model.ffn_hidden_size=64",
            "--model.mixers.pattern=gated_delta_net, full_attention",
            "--model.gated_delta_net.num_heads=2",
            "--model.gated_delta_net.head_dim=16",
            "--model.attention.num_heads=2",
            "--model.attention.num_kv_heads=1",
            f"--data.path={tiny_data}",
            "--train.steps=8",
            "--train.seq_len=32",
            "--train.micro_batch_size=2",
            "--train.global_batch_size=4",
            "--optim.warmup_steps=2",
            "--optim.lr=0.01",
            "--evaluation.every=3",
            "--evaluation.batches=2",
            "--evaluation.samples=0",
            "--checkpoint.every=3",
            *overrides,
        ]
        command = [str(ROOT / script), *script_arguments, *arguments]
        if not torchrun and not own_launcher:
            imported = "deepspeed" if "--engine.name=deepspeed" in overrides else "megatron"
            several = ranks if ranks > 1 else None
            return processes.start(*command, ranks=several, folder=tmp_path, imported=imported)
        if own_launcher:
            command = [sys.executable, str(ROOT / "launch/main.py"), "pretrain", "--ranks", str(ranks), *arguments]
        else:
            started = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
            command = [*started, *command]
        return subprocess.Popen(
            command,
            cwd=tmp_path,
            env=os.environ | QUIET,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            # In a process group of its own, which a test may signal as a whole.
            start_new_session=own_launcher,
        )

    return start


def leave_groups():
    """What engine.close() does, for a run in this process that has failed and left its engine as it was."""
    from trainer.engines import groups

    groups.close()


def metrics(run_dir):
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]


def trajectory(run_dir):
    """(step, loss, gradient norm) of every step, and (step, loss) of every validation: exact floats."""
    lines = metrics(run_dir)
    steps = [(line["step"], line["loss"], line["grad_norm"]) for line in lines if "grad_norm" in line]
    return steps, [(line["step"], line["loss"], line["bits_per_byte"]) for line in lines if "split" in line]


def status(run_dir):
    """The run's status.json."""
    return json.loads((Path(run_dir) / "status.json").read_text())


def in_process_config(data, run_dir, **train):
    """The configuration of `tiny_run`, for a run in this process."""
    from models.config import AttentionConfig, GatedDeltaNetConfig, MixerLayoutConfig, ModelConfig
    from trainer.config import (
        CheckpointConfig,
        DataConfig,
        EvaluationConfig,
        LoggingConfig,
        OptimConfig,
        PretrainConfig,
        RunConfig,
        TrainConfig,
    )

    sizes = {"steps": 6, "seq_len": 32, "micro_batch_size": 2, "global_batch_size": 4, **train}
    return PretrainConfig(
        run=RunConfig(dir=str(run_dir), threads=1),
        model=ModelConfig(
            num_layers=2,
            hidden_size=32,
            ffn_hidden_size=64,
            mixers=MixerLayoutConfig(pattern="gated_delta_net, full_attention"),
            gated_delta_net=GatedDeltaNetConfig(num_heads=2, head_dim=16),
            attention=AttentionConfig(num_heads=2, num_kv_heads=1),
        ),
        data=DataConfig(path=str(data)),
        train=TrainConfig(**sizes),
        optim=OptimConfig(lr=0.01, warmup_steps=2),
        checkpoint=CheckpointConfig(every=3),
        evaluation=EvaluationConfig(every=3, batches=2, samples=0),
        logging=LoggingConfig(tensorboard=False, progress=False),
    )
