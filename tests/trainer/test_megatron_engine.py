"""The Megatron engine: what it runs on, that it computes what plain PyTorch does, what it does with broken numbers."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.pipeline_parallel import schedules

from models.decoder import Decoder, initialize
from models.parameters import parameter_rows
from tests.trainer.conftest import finish, in_process_config, leave_groups, metrics, status
from trainer import pretrain
from trainer.data.sources import find_sources
from trainer.engines import megatron
from trainer.engines.megatron import MegatronEngine
from trainer.engines.spec import EngineSpec
from trainer.loop import Trainer
from trainer.objectives.language_model import LanguageModel


def build(config):
    sources = find_sources(config)
    vocab_size = config.model.padded_vocab_size(sources.vocab_size)
    return MegatronEngine(EngineSpec.of(config, vocab_size), torch.device("cpu")), sources.open_training(config)


@pytest.fixture
def engine(tiny_data, tmp_path):
    config = in_process_config(tiny_data, tmp_path / "run")
    built, sampler = build(config)
    yield built, sampler, config
    built.close()


def run_step(engine, sampler, config, step, lr=0.01):
    batches = sampler.micro_batches(step, config.train.micro_batch_size)
    return engine.train_step(batches, LanguageModel(), lr)


def test_a_step_in_which_no_token_counts(engine):
    built, sampler, config = engine
    batches = sampler.micro_batches(0, config.train.micro_batch_size)
    silent = [replace(batch, loss_mask=torch.zeros_like(batch.loss_mask)) for batch in batches]
    result = built.train_step(silent, LanguageModel(), 0.01)
    assert (result.loss, result.grad_norm, result.tokens, result.skipped) == (0.0, 0.0, 0, False)


def test_a_step_runs_mcores_schedule_ddp_and_distributed_optimizer(engine, monkeypatch):
    built, sampler, config = engine
    calls = []

    def spy(owner, name):
        original = getattr(owner, name)

        def wrapper(*args, **kwargs):
            calls.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, wrapper)

    assert built._forward_backward is schedules.forward_backward_no_pipelining
    (stage,) = built._stages
    assert isinstance(stage, DistributedDataParallel)
    (optimizer,) = built._optimizer.chained_optimizers
    assert isinstance(optimizer, DistributedOptimizer)
    spy(schedules, "forward_step")
    spy(schedules, "backward_step")
    spy(DistributedDataParallel, "finish_grad_sync")
    spy(DistributedDataParallel, "scale_gradients")
    spy(DistributedOptimizer, "get_main_grads_for_grad_norm")
    spy(megatron, "clip_grad_by_total_norm_fp32")
    spy(DistributedOptimizer, "step_with_ready_grads")
    run_step(built, sampler, config, 0)
    assert calls == [
        *["forward_step", "backward_step"] * 2,  # two micro-batches
        "finish_grad_sync",
        "scale_gradients",
        "get_main_grads_for_grad_norm",
        "clip_grad_by_total_norm_fp32",
        "step_with_ready_grads",
    ]


def test_equals_plain_pytorch(engine):
    built, sampler, config = engine
    model = Decoder(config.model, built.model.vocab_size)
    initialize(model, config.train.seed)
    optim = config.optim
    groups = [[], []]
    for row in parameter_rows(model).values():
        groups[not row.placement.decayed].append(row.tensor)
    adam = torch.optim.AdamW(
        [{"params": groups[0], "weight_decay": optim.weight_decay}, {"params": groups[1], "weight_decay": 0.0}],
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
    )
    for step in range(5):
        result = run_step(built, sampler, config, step, lr=0.01)
        total, tokens = 0.0, 0
        for batch in sampler.micro_batches(step, config.train.micro_batch_size):
            loss, _ = model(batch.tokens, batch.positions, batch.documents, batch.labels, batch.loss_mask)
            (loss / 128).backward()
            total, tokens = total + loss.item(), tokens + int(batch.loss_mask.sum())
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip_grad)
        for group in adam.param_groups:
            group["lr"] = 0.01
        adam.step()
        adam.zero_grad()
        assert result.tokens == tokens == 128
        assert result.loss == pytest.approx(total / tokens, rel=1e-5)
        assert result.grad_norm == pytest.approx(norm.item(), rel=1e-4)
    for (name, ours), theirs in zip(built.model.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4, msg=name)


def test_layouts_of_the_batch_give_the_same_steps(tiny_run, tmp_path):
    """1 x (batch 8), 1 x (micro 2, accumulate 4) and 2 ranks x (micro 4), ten steps, 1e-5 relative."""
    layouts = {"batch": (1, 8), "accumulated": (1, 2), "ranks": (2, 4)}
    processes = {}
    for name, (ranks, micro) in layouts.items():
        overrides = ("--train.steps=10", "--train.global_batch_size=8", f"--train.micro_batch_size={micro}")
        processes[name] = tiny_run(tmp_path / name, *overrides, "--optim.lr=0.003", ranks=ranks)
    steps = {}
    for name, process in processes.items():
        code, output = finish(process)
        assert code == 0, output
        steps[name] = [line for line in metrics(tmp_path / name) if "grad_norm" in line]
        assert len(steps[name]) == 10
    for name in ("accumulated", "ranks"):
        for ours, whole in zip(steps[name], steps["batch"], strict=True):
            assert ours["tokens"] == whole["tokens"]
            assert ours["loss"] == pytest.approx(whole["loss"], rel=1e-5), name
            assert ours["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-5), name


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_non_finite_loss_skips_the_step(engine, poison):
    built, sampler, config = engine
    run_step(built, sampler, config, 0)
    before = [parameter.clone() for parameter in built.model.parameters()]
    handle = built.model.final_norm.register_forward_hook(lambda module, inputs, output: output * poison)
    result = run_step(built, sampler, config, 1)
    handle.remove()
    assert result.skipped and not math.isfinite(result.loss)
    assert all(torch.equal(a, b) for a, b in zip(before, built.model.parameters(), strict=True))
    after = run_step(built, sampler, config, 1)
    assert not after.skipped and math.isfinite(after.loss)
    assert not all(torch.equal(a, b) for a, b in zip(before, built.model.parameters(), strict=True))


def test_a_non_finite_gradient_skips_the_step(engine):
    built, sampler, config = engine
    before = [parameter.clone() for parameter in built.model.parameters()]
    handle = built.model.embedding.weight.register_hook(lambda gradient: gradient * math.inf)
    result = run_step(built, sampler, config, 0)
    handle.remove()
    assert result.skipped and math.isfinite(result.loss) and not math.isfinite(result.grad_norm)
    assert all(torch.equal(a, b) for a, b in zip(before, built.model.parameters(), strict=True))


def test_too_many_skipped_steps_stop_the_run(tiny_data, tmp_path, monkeypatch):
    original = Trainer._step

    def poisoned(self):
        if self.progress.step == 2:
            self.engine.model.final_norm.register_forward_hook(lambda module, inputs, output: output * math.nan)
        return original(self)

    monkeypatch.setattr(Trainer, "_step", poisoned)
    config = in_process_config(tiny_data, tmp_path / "run", max_skipped_steps=3)
    assert pretrain.run(config, "") == 1
    leave_groups()
    assert status(tmp_path / "run")["state"] == "failed"
    assert "3 steps in a row had a non-finite loss or gradient" in status(tmp_path / "run")["message"]
    lines = [line for line in metrics(tmp_path / "run") if "grad_norm" in line]
    assert [line["skipped"] for line in lines] == [False, False, True, True, True]
    assert lines[-1]["skipped_total"] == 3


def test_weight_decay_spares_vectors(engine):
    built, _, config = engine
    (optimizer,) = built._optimizer.chained_optimizers
    decayed = sum(p.numel() for g in optimizer.param_groups if g["weight_decay"] > 0 for p in g["params"])
    spared = sum(p.numel() for g in optimizer.param_groups if g["weight_decay"] == 0 for p in g["params"])
    parameters = list(built.model.parameters())
    assert decayed == sum(p.numel() for p in parameters if p.dim() >= 2)
    assert spared == sum(p.numel() for p in parameters if p.dim() < 2) > 0
    assert {g["weight_decay"] for g in optimizer.param_groups} == {0.0, config.optim.weight_decay}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_loaded_engine_goes_on_as_the_saved_one(tiny_data, tmp_path, precision):
    config = in_process_config(tiny_data, tmp_path / "run", precision=precision)
    built, sampler = build(config)
    for step in range(3):
        run_step(built, sampler, config, step)
    (tmp_path / "state").mkdir()
    built.save(tmp_path / "state")
    expected = [run_step(built, sampler, config, step) for step in range(3, 6)]
    torch.manual_seed(7)
    built.load(tmp_path / "state")
    assert [run_step(built, sampler, config, step) for step in range(3, 6)] == expected
    built.close()
    fresh, _ = build(config)
    fresh.load(tmp_path / "state")
    assert [run_step(fresh, sampler, config, step) for step in range(3, 6)] == expected
    fresh.close()


def test_bf16_keeps_float32_where_it_matters(tiny_data, tmp_path):
    config = in_process_config(tiny_data, tmp_path / "run", precision="bf16")
    built, sampler = build(config)
    dtypes = {name.rsplit(".", 1)[-1]: parameter.dtype for name, parameter in built.model.named_parameters()}
    assert dtypes["A_log"] == dtypes["dt_bias"] == torch.float32
    assert dtypes["weight"] == torch.bfloat16
    (optimizer,) = built._optimizer.chained_optimizers
    assert {p.dtype for g in optimizer.optimizer.param_groups for p in g["params"]} == {torch.float32}
    # An update far below bfloat16's resolution is remembered in the main parameters.
    main = optimizer.optimizer.param_groups[0]["params"][0]
    before = main.clone()
    run_step(built, sampler, config, 0, lr=1e-7)
    assert not torch.equal(main, before)
    built.close()


def test_the_random_state_comes_back(engine, tmp_path):
    built, _, _ = engine
    (tmp_path / "state").mkdir()
    torch.manual_seed(3)
    built.save(tmp_path / "state")
    expected = torch.rand(4)
    torch.manual_seed(4)
    built.load(tmp_path / "state")
    assert torch.equal(torch.rand(4), expected)


def test_a_save_starts_no_process(engine, tmp_path):
    """A helper would die of a signal to the process group, and a save with it."""

    def children():
        return {path.read_text() for path in Path("/proc/self/task").glob("*/children")}

    built, _, _ = engine
    before = children()
    for name in ("now", "later"):
        (tmp_path / name).mkdir()
    built.save(tmp_path / "now")
    assert children() == before
    built.begin_save(tmp_path / "later").write()
    assert children() == before


def test_adams_step_is_that_of_the_updates_and_not_of_the_run(engine, tmp_path, monkeypatch):
    built, sampler, config = engine
    run_step(built, sampler, config, 0)
    with monkeypatch.context() as skipping:
        skipping.setattr(built, "_grad_norm", lambda: math.inf)
        assert run_step(built, sampler, config, 1).skipped
    (tmp_path / "state").mkdir()
    built.save(tmp_path / "state")
    run_step(built, sampler, config, 2)
    built.load(tmp_path / "state")
    (part,) = built._optimizer.chained_optimizers
    assert {float(state["step"]) for state in part.optimizer.state.values()} == {1.0}
