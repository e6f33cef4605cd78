"""Runs whose objective has a teacher (train.objective): keys, refusals, and that a resumed run equals a whole one."""

import shutil
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml

from models.config import MixerLayoutConfig
from models.decoder import Decoder, initialize, shapes
from tests.trainer.conftest import finish, in_process_config, metrics, trajectory
from trainer import preflight, pretrain, run_directory, trainable
from trainer.config import EngineConfig, ObjectiveConfig, OptimConfig, ParallelConfig
from trainer.data.sources import find_sources
from trainer.errors import ConfigError
from trainer.loop import Trainer
from trainer.phases import ObjectiveChanges, PhaseConfig, TrainChanges, expand
from trainer.planning import run as planning
from trainer.planning.config import ClusterConfig, PlanConfig
from trainer.planning.report import describe
from trainer.planning.search import layouts
from trainer.stored import teacher
from trainer.stored.inference import load_model
from trainer.stored.weights import write

VOCAB = 512
# A learning rate that does not depend on the length of the run.
CONSTANT = OptimConfig(lr=0.01, warmup_steps=2, schedule="wsd", decay_fraction=0.0)


def write_weights(output, model, seed, vocab_size=VOCAB):
    """Weights of a model, drawn from a seed."""
    decoder = Decoder(model, vocab_size)
    initialize(decoder, seed)
    parameters = dict(decoder.named_parameters())

    def read(tensors):
        for name, tensor in tensors.items():
            tensor.copy_(parameters[name].detach())

    shutil.rmtree(output, ignore_errors=True)
    write(output, shapes(model, vocab_size), read, tokenizer=None, max_file_bytes=1e9, report=lambda line: None)
    return str(output)


@pytest.fixture
def taught(tiny_data, tmp_path):
    """Builds the configuration of a run in `tmp_path/NAME` that a teacher of another shape teaches."""
    config = in_process_config(tiny_data, tmp_path / "whole")
    wide = replace(config.model, num_layers=3, hidden_size=48, init_std=0.2)
    path = write_weights(tmp_path / "weights", wide, seed=11)

    def build(folder="run", phases=(), steps=6, **objective):
        keys = {"name": "distill", "teacher": path, "temperature": 1.5, "next_token_weight": 0.3, **objective}
        config = in_process_config(tiny_data, tmp_path / folder, steps=steps, objective=ObjectiveConfig(**keys))
        return replace(config, optim=CONSTANT, phases=list(phases))

    return build


def run(config, expected=0):
    """Every step's loss and gradient norm, and the last validation: a shorter run validates more at its end."""
    assert pretrain.run(config, yaml.safe_dump(asdict(config))) == expected
    steps, validations = trajectory(config.run.dir)
    return steps, validations[-1:]


@pytest.fixture
def aligned(tiny_data, tmp_path):
    """Builds the configuration of a run that aligns its first layer with that of a softmax teacher."""
    model = in_process_config(tiny_data, tmp_path / "run").model
    softmax = replace(model, mixers=MixerLayoutConfig(pattern="full_attention"), init_std=0.2)
    path = write_weights(tmp_path / "softmax", softmax, seed=11)

    def build(folder="run", phases=(), steps=6, trainable=None, **objective):
        wanted = ObjectiveConfig(**{"name": "align", "teacher": path, **objective})
        config = in_process_config(tiny_data, tmp_path / folder, steps=steps, objective=wanted, trainable=trainable)
        return replace(config, optim=CONSTANT, phases=list(phases))

    return build


def to(step, **objective):
    return PhaseConfig(from_step=step, train=TrainChanges(objective=ObjectiveChanges(**objective)))


def to_next_token(step):
    return PhaseConfig(from_step=step, train=TrainChanges(objective=ObjectiveChanges(name="next_token")))


# Runs


def test_a_run_learns_from_a_teacher(taught):
    """The loss of a line is that of its metrics; validations have the next-token loss of a run without a teacher."""
    config = taught(steps=3)
    run(config)
    lines = metrics(config.run.dir)
    for line in lines:
        if "grad_norm" in line:
            assert line["kl"] > 0.05
            assert line["loss"] == pytest.approx(1.5**2 * line["kl"] + 0.3 * line["nll"], rel=1e-6)
    (validation,) = (line for line in lines if "split" in line)
    assert validation["loss"] > 1 and validation["bits_per_byte"] > 0


def test_a_run_that_stops_and_goes_on_equals_one_that_does_not(taught, tmp_path):
    """Also where the teacher has moved meanwhile; two phases, the second with another temperature."""
    warmer = PhaseConfig(from_step=4, train=TrainChanges(objective=ObjectiveChanges(temperature=3.0)))
    whole = run(taught("whole", [warmer]))
    run(taught("stopped", steps=3))
    shutil.move(tmp_path / "weights", tmp_path / "moved")
    goes_on = taught("stopped", [warmer], teacher=str(tmp_path / "moved"))
    assert not run_directory.check(goes_on)
    assert run(goes_on) == whole


@pytest.mark.slow
def test_phases_with_and_without_a_teacher(taught, tmp_path):
    """A teacher is needed only while a phase with one is ahead."""
    phases = [to_next_token(3)]
    whole = run(taught("whole", phases))
    assert ["kl" in line for line in metrics(tmp_path / "whole") if "grad_norm" in line] == [True] * 3 + [False] * 3
    stopped = taught("stopped", phases, steps=4)
    run(replace(stopped, checkpoint=replace(stopped.checkpoint, every=4)))
    shutil.rmtree(tmp_path / "weights")
    assert run(taught("stopped", phases)) == whole


def test_another_teacher_is_refused(taught, tmp_path):
    """Of the same shape, so that no header tells; a phase that has not begun may have another."""
    config = taught(phases=[PhaseConfig(from_step=4, train=TrainChanges(objective=ObjectiveChanges(temperature=3.0)))])
    run(replace(config, train=replace(config.train, steps=3), phases=[]))
    wide = teacher.open_teacher(tmp_path / "weights").model
    write_weights(tmp_path / "weights", wide, seed=12)
    with pytest.raises(ConfigError, match=r"teacher: .*weights does not hold the weights that the run in") as error:
        preflight.check(config)
    assert "\n" not in str(error.value)
    write_weights(tmp_path / "weights", wide, seed=11)
    other = write_weights(tmp_path / "other", wide, seed=12)
    later = PhaseConfig(from_step=4, train=TrainChanges(objective=ObjectiveChanges(teacher=other)))
    preflight.check(replace(config, phases=[later]))


def test_another_objective_is_refused(taught):
    config = taught(steps=3)
    run(config)
    with pytest.raises(ConfigError, match=r"holds another run \(train.objective.temperature: 1.5 -> 2.0\)"):
        run_directory.check(taught(temperature=2.0))


def test_only_aligned_mixers_change(aligned, tmp_path):
    config = aligned(steps=3)
    run(config)
    fresh = Decoder(config.model, VOCAB)
    initialize(fresh, config.train.seed)
    ours, theirs = load_model(config.run.dir, torch.device("cpu")).model.state_dict(), fresh.state_dict()
    changed = {name for name, value in ours.items() if not torch.equal(value, theirs[name])}
    assert changed == {name for name in ours if name.startswith("layers.0.mixer.")}
    lines = [line for line in metrics(config.run.dir) if "grad_norm" in line]
    assert all(line["alignment/layer_00"] == pytest.approx(line["loss"]) for line in lines)
    assert all(line["model_flops_utilization"] is None for line in lines)
    assert "M of them, layers.0.mixer.*; the others are frozen" in (tmp_path / "run/run.log").read_text()


@pytest.mark.parametrize("stop", [3, *(pytest.param(stop, marks=pytest.mark.slow) for stop in (1, 2, 5))])
def test_alignment_then_distillation_then_text(aligned, tmp_path, monkeypatch, stop):
    """The three phases of a conversion; stopped and resumed in any of them, or between two."""
    phases = [to(2, name="distill", temperature=2.0), to(4, name="next_token")]
    whole = run(aligned("whole", phases))
    kinds = [
        ("alignment/layer_00" in line, "kl" in line) for line in metrics(tmp_path / "whole") if "grad_norm" in line
    ]
    assert kinds == [(True, False)] * 2 + [(False, True)] * 2 + [(False, False)] * 2
    step = Trainer._step

    def stop_after(self):
        self.stop_requested = self.progress.step == stop - 1
        return step(self)

    monkeypatch.setattr(Trainer, "_step", stop_after)
    run(aligned("stopped", phases), expected=75)
    monkeypatch.setattr(Trainer, "_step", step)
    if stop > 4:
        shutil.rmtree(tmp_path / "softmax")
    assert run(aligned("stopped", phases)) == whole


PHASES = '[{"from_step": 2, "train": {"objective": {"name": "distill"}}}]'
ENGINES = {
    "TP2+SP": ["--parallel.tensor=2", "--parallel.sequence=true", f"--phases={PHASES}"],
    "PP2": ["--parallel.pipeline=2", f"--phases={PHASES}"],
    "CP2": ["--parallel.context=2", f"--phases={PHASES}"],
    # DeepSpeed trains the same parameters throughout.
    "ZeRO-3": ["--engine.name=deepspeed", "--engine.zero_stage=3", "--train.trainable=[layers.0.mixer.*]"],
}


@pytest.mark.slow
@pytest.mark.parametrize("layout", ENGINES)
def test_the_command_on_two_ranks(tiny_run, tmp_path, aligned, layout):
    """Stopped after three steps and resumed, and not: the same on two ranks of both engines."""
    config = aligned()
    given = [f"--train.objective.{key}={getattr(config.train.objective, key)}" for key in ("name", "teacher")]
    given += ["--optim.schedule=wsd", "--optim.decay_fraction=0", "--model.attention.num_kv_heads=2"]
    teacher_of = replace(config.model, attention=replace(config.model.attention, num_kv_heads=2), init_std=0.2)
    softmax = replace(teacher_of, mixers=MixerLayoutConfig(pattern="full_attention"))
    write_weights(tmp_path / "softmax", softmax, seed=11)
    whole = [*given, *ENGINES[layout], "--train.steps=4"]
    finish(tiny_run("whole", *whole, ranks=2))
    finish(tiny_run("stopped", *whole, "--train.steps=3", ranks=2))
    finish(tiny_run("stopped", *whole, ranks=2))
    assert trajectory(tmp_path / "stopped")[0] == trajectory(tmp_path / "whole")[0]
    lines = [line for line in metrics(tmp_path / "stopped") if "grad_norm" in line]
    aligned_steps = 4 if layout == "ZeRO-3" else 2
    assert ["alignment/layer_00" in line for line in lines] == [step < aligned_steps for step in range(4)]


# Keys


def test_a_phase_changes_what_it_names(taught):
    config = taught(phases=[to_next_token(3)])
    first, second = (phase.config.train.objective for phase in expand(config))
    assert second == replace(first, name="next_token")
    assert (first.needed_teacher, second.needed_teacher) == (first.teacher, None)
    assert run_directory.settings_in_phase(asdict(config), 3)["train"]["objective"] == asdict(second)
    cold = PhaseConfig(from_step=2, train=TrainChanges(objective=ObjectiveChanges(temperature=-1.0)))
    with pytest.raises(ValueError, match=r"^phases: in phase 1 train.objective.temperature is -1.0: it must"):
        taught(phases=[cold])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"name": "distill"}, r"name=distill needs train\.objective\.teacher"),
        ({"temperature": 0.0}, r"temperature is 0\.0: it must be a positive number"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"kl_weight": -1.0}, r"kl_weight is -1\.0: it must be 0 or"),
        ({"next_token_weight": float("nan")}, "next_token_weight is nan"),
        ({"kl_weight": 0.0}, "kl_weight=0 leaves nothing to learn"),
    ],
)
def test_values_that_cannot_be_are_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        ObjectiveConfig(**keys)


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ({"teacher": "{}/absent"}, r"train\.objective\.teacher: .*absent is not a directory"),
        ({"teacher": "{}/whole"}, r"train\.objective\.teacher: .*whole holds no complete checkpoint \(none\)"),
        ({"teacher": "{}/narrow"}, r"narrow has 256 rows of vocabulary and the run, .* 512; both models must have"),
        ({"name": "next_token", "temperature": 1.0, "next_token_weight": 0.0}, r"teacher has no effect with"),
        ({"name": "next_token", "teacher": None}, r"temperature has no effect without train\.objective\.name=distill"),
    ],
)
def test_what_does_not_fit_is_refused(taught, tmp_path, objective, message):
    (tmp_path / "whole/checkpoints").mkdir(parents=True)
    model = teacher.open_teacher(tmp_path / "weights").model
    write_weights(tmp_path / "narrow", model, 1, vocab_size=256)
    keys = {key: value.format(tmp_path) if isinstance(value, str) else value for key, value in objective.items()}
    with pytest.raises(ConfigError, match=message) as error:
        preflight.check(taught(**keys))
    assert "\n" not in str(error.value)


def test_a_teacher_that_the_layout_cannot_shard_is_refused(taught):
    config = replace(taught(), parallel=ParallelConfig(pipeline=2, virtual_pipeline=2))
    with pytest.raises(ConfigError, match=r"weights does not fit the layout: .* makes 4 stages of 3 layers"):
        preflight.check(config)


def test_a_teacher_of_another_tokenizer_is_refused(taught, tmp_path):
    (tmp_path / "weights/tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"weights and the data have different tokenizers; prepare the data"):
        preflight.check(taught())


def test_tensors_that_a_teacher_lacks(taught, tmp_path):
    config_json = tmp_path / "weights/config.json"
    config_json.write_text(config_json.read_text().replace('"num_layers": 3', '"num_layers": 4'))
    with pytest.raises(ConfigError, match=r"weights lacks layers\.3"):
        teacher.check_tensors(taught())


def test_a_digest_sees_every_part_of_a_small_file(taught, tmp_path):
    (file,) = Path(tmp_path / "weights").glob("*.safetensors")
    content, found = file.read_bytes(), partial(lambda: teacher.digest(teacher.open_teacher(tmp_path / "weights")))
    before = found()
    for place in (len(content) // 2, len(content) - 1):
        changed = bytearray(content)
        changed[place] ^= 1
        file.write_bytes(bytes(changed))
        assert found() != before
    file.write_bytes(content)
    assert found() == before


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"hidden_size": 48}, r"softmax has hidden_size=32, and model\.hidden_size is 48: .*compares layer by layer"),
        ({"num_layers": 3}, r"softmax has num_layers=2, and model\.num_layers is 3"),
        ({"mixers": MixerLayoutConfig(pattern="full_attention")}, "every mixer is that of .*softmax already"),
    ],
)
def test_what_cannot_be_aligned_is_refused(aligned, model, message):
    config = aligned()
    with pytest.raises(ConfigError, match=message) as error:
        preflight.check(replace(config, model=replace(config.model, **model)))
    assert "\n" not in str(error.value)


def test_what_is_trained(aligned, taught):
    align, distill = aligned(), taught()
    assert trainable.trained(align) == ["layers.0.mixer.*"]
    assert trainable.trained(distill) == ["*"]
    assert trainable.trained_in_any(replace(align, phases=[to(3, name="distill")])) == ["*"]
    hgrn = replace(align, model=replace(align.model, mixers=MixerLayoutConfig(pattern="full_attention, hgrn")))
    assert trainable.trained(hgrn) == ["layers.1.mixer.*", "lower_bounds"]
    trainable.check(align)
    trainable.check(aligned(trainable=["layers.0.mixer*"]))
    with pytest.raises(ConfigError, match=r"train\.trainable trains layers\.1\.mixer\..*align does not reach"):
        trainable.check(aligned(trainable=["layers.*.mixer.*"]))


def test_deepspeed_refuses_to_change_what_is_trained(aligned):
    config = replace(aligned(phases=[to(3, name="distill")]), engine=EngineConfig("deepspeed", 1))
    with pytest.raises(ConfigError, match="phase 1 changes the trained parameters: DeepSpeed has"):
        trainable.check(config)
    trainable.check(replace(config, train=replace(config.train, trainable=["layers.0.mixer.*"])))


def test_data_have_the_vocabulary_of_these_tests(taught):
    config = taught()
    assert config.model.padded_vocab_size(find_sources(config).vocab_size) == VOCAB


# Plans


@pytest.mark.parametrize("pipeline", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_plan_counts_the_teacher(taught, pipeline):
    """Its parameters of every stage, and on the last the hidden states of both micro-batches."""
    config, cluster = taught(steps=3), ClusterConfig(devices=pipeline)
    planned = PlanConfig(**vars(replace(config, parallel=ParallelConfig(pipeline=pipeline))), cluster=cluster)
    (plan,) = planning.run(planned, all_layouts=False)
    whole = shapes(teacher.open_teacher(config.train.objective.teacher).model, VOCAB)
    total = sum(stage.states.teacher for stage in plan.stages)
    # A tied head is the embedding again on the last of several stages.
    again = whole.embedding.weight.nbytes * (pipeline - 1)
    assert total == sum(parameter.nbytes for parameter in whole.parameters()) + again + 2 * (2 * 32 * 48 * 4)
    assert "| teacher" in describe(plan)
    (without,) = planning.run(replace(planned, train=replace(planned.train, objective=ObjectiveConfig())), False)
    for mine, theirs in zip(plan.stages, without.stages, strict=True):
        assert mine.states.on_device - theirs.states.on_device == mine.states.teacher > 0
    assert plan.seconds > without.seconds and "teacher" not in describe(without)


@pytest.mark.slow
def test_a_plan_of_an_alignment_counts_mixers(aligned):
    """Optimizer states of the aligned mixer, what enters it and what it should give, and fewer operations."""
    config = PlanConfig(**vars(aligned()), cluster=ClusterConfig(devices=1))
    (plan,) = planning.run(config, all_layouts=False)
    whole = shapes(teacher.open_teacher(config.train.objective.teacher).model, VOCAB)
    kept = 2 * (2 * 32 * 32 * 4)
    assert plan.stages[0].states.teacher == sum(value.nbytes for value in whole.parameters()) + kept
    mixer = [
        value for name, value in shapes(config.model, VOCAB).named_parameters() if name.startswith("layers.0.mixer.")
    ]
    assert plan.stages[0].states.gradients == sum(value.nbytes for value in mixer)
    (distilled,) = planning.run(PlanConfig(**vars(aligned(name="distill")), cluster=ClusterConfig(devices=1)), False)
    assert plan.seconds < distilled.seconds


def test_a_search_skips_layouts_that_cannot_shard_the_teacher(taught, tmp_path):
    """The student's two layers make two stages, the teacher's single one does not."""
    model = teacher.open_teacher(tmp_path / "weights").model
    single = write_weights(tmp_path / "single", replace(model, num_layers=1), seed=1)
    for path, stages in ((str(tmp_path / "weights"), {1, 2}), (single, {1})):
        config = PlanConfig(**vars(taught(steps=3, teacher=path)), cluster=ClusterConfig(devices=2))
        assert {layout.parallel.pipeline for layout in layouts(config)} == stages
