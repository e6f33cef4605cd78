"""Alignment in one process: against float64, what it reaches, and which mixers differ."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from models.config import AttentionConfig, MixerLayoutConfig, ModelConfig, MoEConfig
from models.decoder import Decoder, initialize
from tests.trainer.conftest import in_process_config
from trainer.data.sources import find_sources
from trainer.engines.frozen import FrozenSpec
from trainer.engines.megatron import MegatronEngine
from trainer.engines.spec import EngineSpec
from trainer.objectives.alignment import Alignment

LR = 0.01
# The student's layer 1 is of another kind, its layer 3 too; layers 0 and 2 are the teacher's.
PATTERN = "full_attention, gated_delta_net, full_attention, hgrn"


def softmax(model):
    """The model with softmax attention in every layer, far from 0."""
    return replace(model, mixers=MixerLayoutConfig(pattern="full_attention"), init_std=0.2)


@pytest.fixture
def aligning(tiny_data, tmp_path):
    """An engine, micro-batches with weights in the mask, and the teacher, drawn from a seed of its own."""
    config = in_process_config(tiny_data, tmp_path / "run")
    config = replace(config, model=replace(config.model, num_layers=4, mixers=MixerLayoutConfig(pattern=PATTERN)))
    sampler = find_sources(config).open_training(config)
    teacher = Decoder(softmax(config.model), 512)
    initialize(teacher, seed=11)
    engines = []

    def build(model=None, vocab_size=512):
        spec = EngineSpec.of(replace(config, model=model or config.model), vocab_size)
        engines.append(MegatronEngine(spec, torch.device("cpu")))
        given = FrozenSpec(
            softmax(spec.model), vocab_size, lambda decoder: decoder.load_state_dict(teacher.state_dict())
        )
        batches = [
            replace(batch, loss_mask=(batch.labels % 3) * 0.5)
            for batch in sampler.micro_batches(0, config.train.micro_batch_size)
        ]
        return engines[-1], batches, given, teacher

    yield build
    for engine in engines:
        engine.close()


def reference(student, teacher, batches, layers):
    """The losses of the layers, [layers], each with its gradient: layer after layer, in float64."""
    losses = torch.zeros(len(layers), dtype=torch.float64)
    for batch in batches:
        where = batch.positions, batch.documents
        infos, own_infos = teacher._layer_infos(*where), student._layer_infos(*where)
        x, mask = teacher.embedding(batch.tokens.T).detach(), batch.loss_mask.T.double()
        for layer, block in enumerate(teacher.layers.values()):
            with torch.no_grad():
                y = block._mix(x, infos[layer], None)
            if layer in layers:
                s = student.layers[str(layer)]._mix(x, own_infos[layer], None)
                mean_square = (mask * y.square().sum(-1)).sum() / mask.sum()
                loss = (mask * (s - y).square().sum(-1)).sum() / mean_square
                losses = losses + loss * torch.nn.functional.one_hot(torch.tensor(layers.index(layer)), len(layers))
            with torch.no_grad():
                x = x + y
                x = x + block.feed_forward(x, infos[layer], None)
    return losses / sum(int(batch.loss_mask.count_nonzero()) for batch in batches)


def test_equals_float64(aligning):
    engine, batches, spec, teacher = aligning()
    layers = [1, 3]
    student = deepcopy(engine.model).double()
    losses = reference(student, deepcopy(teacher).double(), batches, layers)
    losses.mean().backward()
    norm = torch.nn.utils.get_total_norm(value.grad for value in student.parameters() if value.grad is not None)
    objective = Alignment(engine.freeze(spec), layers)
    sums = engine.evaluate(batches, objective)
    count = sum(map(objective.count, batches))
    result = engine.train_step(batches, objective, LR)
    assert result.tokens == count and not result.skipped
    assert result.loss == pytest.approx(losses.mean().item(), rel=1e-6)
    assert [value / count for value in sums] == pytest.approx([losses.mean().item(), *losses.tolist()], rel=1e-6)
    assert list(result.metrics.values()) == pytest.approx(losses.tolist(), rel=1e-6)
    assert list(result.metrics) == ["alignment/layer_01", "alignment/layer_03"]
    assert result.grad_norm == pytest.approx(norm.item(), rel=1e-5)


def test_the_gradient_touches_the_aligned_mixers_alone(aligning):
    """Even where everything may be trained: the other parameters' gradients are exactly 0."""
    engine, batches, spec, _ = aligning()
    engine.train_step(batches, Alignment(engine.freeze(spec), [1, 3]), LR)
    found = {name for name, value in engine.model.named_parameters() if value.main_grad.any()}
    reached = ("layers.1.mixer.", "layers.1.mixer_norm.", "layers.3.mixer.", "layers.3.mixer_norm.", "lower_bounds")
    assert all(name.startswith(reached) for name in found)
    expected = {name for name, _ in engine.model.named_parameters() if name.startswith(reached)}
    assert found == expected


def test_a_mixer_that_gives_nothing_has_loss_1(aligning):
    engine, batches, spec, _ = aligning()
    with torch.no_grad():
        for layer in ("1", "3"):
            engine.model.layers[layer].mixer.o_proj.weight.zero_()
    binary = [replace(batch, loss_mask=(batch.labels % 3 != 0).float()) for batch in batches]
    total, *sums = engine.evaluate(binary, Alignment(engine.freeze(spec), [1, 3]))
    count = sum(int(batch.loss_mask.count_nonzero()) for batch in binary)
    assert [total / count, *(value / count for value in sums)] == pytest.approx([1.0] * 3, rel=1e-6)


def test_a_copy_of_the_teacher_has_loss_0(aligning):
    engine, batches, spec, teacher = aligning()
    engine.model.layers["0"].load_state_dict(teacher.layers["0"].state_dict())
    result = engine.train_step(batches, Alignment(engine.freeze(spec), [0]), LR)
    assert (result.loss, result.grad_norm) == (0.0, 0.0)


def test_aligning_brings_the_outputs_together(aligning):
    engine, batches, spec, _ = aligning()
    objective = Alignment(engine.freeze(spec), [1, 3])
    losses = [engine.train_step(batches, objective, LR, step).metrics for step in range(30)]
    for name in objective.metrics:
        assert losses[-1][name] < 0.7 * losses[0][name]


def test_a_batch_without_counted_tokens(aligning):
    engine, batches, spec, _ = aligning()
    empty = [replace(batch, loss_mask=torch.zeros_like(batch.loss_mask)) for batch in batches]
    result = engine.train_step(empty, Alignment(engine.freeze(spec), [1, 3]), LR)
    assert (result.loss, result.grad_norm, result.tokens) == (0.0, 0.0, 0)


def test_experts_route_nothing_and_report_nothing(aligning):
    engine, batches, spec, _ = aligning()
    model = replace(engine.model.model_config, moe=MoEConfig(num_experts=4, expert_hidden_size=16))
    engine.close()
    engine, batches, spec, _ = aligning(model)
    initialized = replace(spec, fill=lambda decoder: initialize(decoder, 11))
    result = engine.train_step(batches, Alignment(engine.freeze(initialized), [1, 3]), LR)
    assert list(result.metrics) == ["alignment/layer_01", "alignment/layer_03"] and result.loss > 0.1


# Which mixers differ


def model_of(pattern, **attention):
    return ModelConfig(num_layers=4, attention=AttentionConfig(**attention), mixers=MixerLayoutConfig(pattern=pattern))


@pytest.mark.parametrize(
    ("own", "layers"),
    [
        (model_of("full_attention"), []),
        # The same head size, once by default; a window that no full layer has.
        (model_of("full_attention", head_dim=64, window=7), []),
        (model_of("full_attention, hgrn"), [1, 3]),
        (model_of("full_attention*2, sliding_window_attention, full_attention + hgrn2"), [2, 3]),
        (model_of("full_attention", num_kv_heads=1), [0, 1, 2, 3]),
        (model_of("full_attention", rope_theta=5e5), [0, 1, 2, 3]),
    ],
)
def test_mixers_that_differ(own, layers):
    assert own.differing_mixers(model_of("full_attention")) == layers


def test_a_window_counts_where_there_is_one():
    own, other = model_of("sliding_window_attention", window=8), model_of("sliding_window_attention", window=16)
    assert own.differing_mixers(other) == [0, 1, 2, 3]
    assert own.differing_mixers(own) == []
