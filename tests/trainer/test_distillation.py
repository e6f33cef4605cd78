"""Distillation in one process: against a loop over full logits; what a teacher costs, and where it comes from."""

import json
from dataclasses import asdict, replace

import pytest
import torch

from models.config import MoEConfig
from models.decoder import Decoder, initialize
from models.moe.statistics import routers
from tests.trainer.conftest import in_process_config
from trainer import pretrain
from trainer.data.sources import find_sources
from trainer.engines.frozen import FrozenSpec
from trainer.engines.megatron import MegatronEngine
from trainer.engines.spec import EngineSpec
from trainer.errors import ConfigError
from trainer.objectives.distillation import Distillation
from trainer.objectives.language_model import LanguageModel
from trainer.stored.inference import load_model
from trainer.stored.weights import write

SEED, LR = 11, 0.01


@pytest.fixture
def engine(tiny_data, tmp_path):
    config = in_process_config(tiny_data, tmp_path / "run")
    sources = find_sources(config)
    built = MegatronEngine(
        EngineSpec.of(config, config.model.padded_vocab_size(sources.vocab_size)), torch.device("cpu")
    )
    sampler = sources.open_training(config)
    yield built, lambda step: sampler.micro_batches(step, config.train.micro_batch_size), config
    built.close()


def draw(decoder):
    """Fill a teacher by a seed of its own."""
    initialize(decoder, SEED)


def wider(config):
    """A teacher of another shape, whose distributions are far from even."""
    return replace(config.model, num_layers=3, hidden_size=48, init_std=0.2)


def spec_of(model, engine, fill=draw):
    return FrozenSpec(model, engine.model.vocab_size, fill)


def logits_of(decoder, batch):
    return decoder(batch.tokens, batch.positions, batch.documents)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_equals_a_loop_over_full_logits(engine, direction):
    built, batches_of, config = engine
    teacher, tau, mix = Decoder(wider(config), built.model.vocab_size), 1.7, 0.3
    draw(teacher)
    objective = Distillation(built.freeze(spec_of(wider(config), built)), direction, tau, mix, 1 - mix)
    student = Decoder(config.model, built.model.vocab_size)
    initialize(student, config.train.seed)
    for step in range(2):
        student.load_state_dict(built.model.state_dict())
        student.zero_grad()
        # Masks with zeros and with weights, as fine-tuning has them.
        batches = [replace(batch, loss_mask=(batch.labels % 3) * 0.5) for batch in batches_of(step)]
        count, sums = sum(int(batch.loss_mask.count_nonzero()) for batch in batches), torch.zeros(2).double()
        for batch in batches:
            logits = logits_of(student, batch).double()
            with torch.no_grad():
                p = (logits_of(teacher, batch).double() / tau).softmax(-1)
            q = (logits / tau).softmax(-1)
            first, second = (p, q) if direction == "forward" else (q, p)
            kl = (batch.loss_mask * (first * (first.log() - second.log())).sum(-1)).sum()
            chosen = logits.log_softmax(-1).gather(-1, batch.labels[..., None])[..., 0]
            nll = -(batch.loss_mask * chosen).sum()
            ((mix * tau**2 * kl + (1 - mix) * nll) / count).backward()
            sums += torch.stack([kl.detach(), nll.detach()])
        kl, nll = (sums / count).tolist()
        norm = torch.nn.utils.get_total_norm(parameter.grad for parameter in student.parameters())
        result = built.train_step(batches, objective, LR, step)
        assert (result.tokens, result.skipped) == (count, False) and kl > 0.1
        assert result.loss == pytest.approx(mix * tau**2 * kl + (1 - mix) * nll, rel=1e-6)
        assert (result.metrics["kl"], result.metrics["nll"]) == pytest.approx((kl, nll), rel=1e-6)
        assert result.grad_norm == pytest.approx(norm.item(), rel=1e-6)


@pytest.mark.parametrize("mix", [0.0, 1.0])
def test_one_weight_is_zero(engine, mix):
    """All of the one loss, the other a metric still; of the language model to the last bit."""
    built, batches_of, config = engine
    objective = Distillation(
        built.freeze(spec_of(wider(config), built)), temperature=2.0, kl_weight=mix, next_token_weight=1 - mix
    )
    total, kl, nll = built.evaluate(batches_of(0), objective)
    assert total == pytest.approx(4 * kl if mix else nll, rel=1e-7) and kl > 0 < nll
    (language_model,) = built.evaluate(batches_of(0), LanguageModel())
    assert nll == language_model
    ours = built.train_step(batches_of(0), objective, 0.0)
    if mix == 0:
        theirs = built.train_step(batches_of(0), LanguageModel(), 0.0)
        assert (ours.loss, ours.grad_norm) == (theirs.loss, theirs.grad_norm)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_a_teacher_that_is_the_student(engine, direction):
    built, batches_of, config = engine
    state = {name: tensor.clone() for name, tensor in built.model.state_dict().items()}
    teacher = built.freeze(spec_of(config.model, built, lambda decoder: decoder.load_state_dict(state)))
    result = built.train_step(batches_of(0), Distillation(teacher, direction), LR)
    assert (result.loss, result.metrics["kl"], result.grad_norm) == (0.0, 0.0, 0.0)
    assert result.metrics["nll"] > 1


def optimizer_bytes(engine):
    """Of parameters, gradients and state that the engine holds for its updates."""
    tensors = [
        tensor
        for part in engine._optimizer.chained_optimizers
        for parameter, state in part.optimizer.state.items()
        for tensor in (parameter, *state.values())
    ]
    tensors += [buffer.grad_data for stage in engine._stages for buffer in stage.buffers]
    return sum(tensor.nbytes for tensor in tensors)


def test_a_teacher_costs_its_parameters_alone(engine):
    built, batches_of, config = engine
    before = optimizer_bytes(built)
    teacher = built.freeze(spec_of(wider(config), built))
    state = {name: tensor.clone() for name, tensor in teacher.decoders[0].state_dict().items()}
    for step in range(2):
        assert not built.train_step(batches_of(step), Distillation(teacher), LR, step).skipped
    (decoder,) = teacher.decoders
    assert optimizer_bytes(built) == before > 0
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in decoder.parameters())
    assert not any(hasattr(parameter, "main_grad") for parameter in decoder.parameters())
    assert all(torch.equal(tensor, state[name]) for name, tensor in decoder.state_dict().items())
    # Nothing of it in what is saved.
    assert {name.removeprefix("model.") for name in built._written_parts() if name.startswith("model.")} == {
        name for name, _ in built.model.named_parameters()
    }


def test_a_teacher_with_experts_counts_nothing(engine):
    """Without noise, capacity or statistics: as in evaluation, in a training step, too."""
    built, batches_of, config = engine
    moe = MoEConfig(num_experts=4, expert_hidden_size=16, capacity_factor=0.5)
    moe.router.gate = "dense_to_sparse"
    moe.router.dense_to_sparse.gumbel_noise = True
    moe.losses.balance = 0.1
    model = replace(config.model, moe=moe, init_std=0.2)
    teacher = built.freeze(spec_of(model, built))
    objective = Distillation(teacher)
    found = [built.evaluate(batches_of(0), objective)]
    result = built.train_step(batches_of(0), objective, 0.0)
    assert result.loss * result.tokens == pytest.approx(found[0][0], rel=1e-6)
    assert not any(name.startswith("moe/") for name in result.metrics)
    own = routers(teacher.decoders)
    assert len(own) == 2 and all(router.statistics is None and not router.training for router in own.values())


def test_another_vocabulary_is_refused(engine):
    built, _, config = engine
    spec = replace(spec_of(config.model, built), vocab_size=built.model.vocab_size + 128)
    with pytest.raises(ConfigError, match=r"vocabulary of 640 rows and the trained one 512; .* padded alike") as error:
        built.freeze(spec)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("weights", [(-0.1, 1.0), (1.0, -0.1), (float("nan"), 1.0)])
def test_a_negative_weight_is_refused(weights):
    with pytest.raises(ValueError, match="weights must not be negative"):
        Distillation(None, kl_weight=weights[0], next_token_weight=weights[1])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_teacher_from_a_run_or_from_weights(tiny_data, tmp_path, precision):
    """What a run has trained, read from its checkpoint or from exported weights, is what is learned from."""
    config = in_process_config(tiny_data, tmp_path / "teacher", steps=3, precision=precision)
    assert pretrain.run(config, json.dumps(asdict(config))) == 0
    exported = load_model(tmp_path / "teacher", torch.device("cpu"))
    parameters = exported.model.state_dict()
    write(
        tmp_path / "weights",
        exported.model,
        lambda tensors: [tensor.copy_(parameters[name]) for name, tensor in tensors.items()],
        tokenizer=None,
        max_file_bytes=1e6,
        report=lambda line: None,
    )
    student = in_process_config(tiny_data, tmp_path / "student", precision=precision)
    sources = find_sources(student)
    vocab_size = student.model.padded_vocab_size(sources.vocab_size)
    built = MegatronEngine(EngineSpec.of(student, vocab_size), torch.device("cpu"))
    for folder in ("teacher", "weights"):
        spec = FrozenSpec.of_weights(tmp_path / folder, precision)
        (decoder,) = built.freeze(spec).decoders
        assert spec.precision == precision
        assert all(torch.equal(tensor, parameters[name]) for name, tensor in decoder.state_dict().items())
        assert all(tensor.dtype == parameters[name].dtype for name, tensor in decoder.state_dict().items())
    built.close()
