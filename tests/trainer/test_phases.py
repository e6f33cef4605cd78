"""A run in phases: where they begin, what they refuse, and that one run equals two that are joined, to the last bit."""

import json
from dataclasses import asdict, replace

import pytest
import torch
import yaml

from models.config import AttentionConfig, ModelConfig
from tests.trainer.conftest import finish, in_process_config, status, trajectory
from trainer import preflight, pretrain, run_directory, trainable
from trainer.cli import dump, from_mapping, make_parser, parse
from trainer.config import EngineConfig, OptimConfig, ParallelConfig, PretrainConfig, TrainConfig
from trainer.data.layout import tokenizer_file
from trainer.data.sources import find_sources
from trainer.data.tokenizer import learn_sentencepiece
from trainer.errors import ConfigError
from trainer.events import read_events
from trainer.loop import Trainer
from trainer.phases import DataChanges, ModelChanges, OptimChanges, PhaseConfig, TrainChanges, expand, phase_at
from trainer.planning.config import PlanConfig
from trainer.planning.plan import Planner
from trainer.planning.report import describe_phases
from trainer.planning.search import search
from trainer.stored import checkpoint
from trainer.stored.inference import load_model, open_checkpoint

LONGER = PhaseConfig(from_step=4, train=TrainChanges(seq_len=64))


def configured(*phases, **train):
    return PretrainConfig(train=TrainConfig(**{"steps": 20, "seq_len": 32, **train}), phases=list(phases))


# Where they begin and what they change


def test_a_run_without_phases_is_one():
    config = PretrainConfig()
    (phase,) = expand(config)
    assert (phase.number, phase.first, phase.last, phase.config) == (0, 0, config.train.steps, config)


def test_a_phase_keeps_what_it_does_not_change():
    optim = PhaseConfig(from_step=9, optim=OptimChanges(lr=1e-4, schedule="wsd"), data=DataChanges(blend={"stdlib": 2}))
    single = PhaseConfig(from_step=12, data=DataChanges(path="stdlib"), train=TrainChanges(global_batch_size=16))
    config = configured(LONGER, optim, single)
    phases = expand(config)
    assert [(phase.first, phase.last) for phase in phases] == [(0, 4), (4, 9), (9, 12), (12, 20)]
    assert [phase.config.train.seq_len for phase in phases] == [32, 64, 64, 64]
    assert [phase.config.optim for phase in phases[1:]] == [
        config.optim,
        *[replace(config.optim, lr=1e-4, schedule="wsd")] * 2,
    ]
    assert [phase.config.data.shares() for phase in phases] == [{"stdlib": weight} for weight in (1.0, 1.0, 2, 1.0)]
    assert [phase_at(phases, step).number for step in (0, 3, 4, 8, 9, 11, 12, 100)] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert str(phases[1]) == "phase 1, steps 5 to 9"


@pytest.mark.parametrize(("tokens", "first"), [(4 * 256, 4), (4 * 256 + 1, 5), (5 * 256, 5)])
def test_a_phase_begins_where_as_many_tokens_have_been_read(tokens, first):
    """Steps of 8 sequences of 32 tokens; after the fourth, of 64."""
    longer = PhaseConfig(from_tokens=tokens, train=TrainChanges(seq_len=64))
    again = PhaseConfig(from_tokens=first * 256 + 3 * 512, train=TrainChanges(seq_len=96))
    assert [phase.first for phase in expand(configured(longer, again))] == [0, first, first + 3]


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ([PhaseConfig(train=TrainChanges(seq_len=64))], "phase 1 needs one of from_step and from_tokens"),
        ([replace(LONGER, from_tokens=7)], "phase 1 needs one of from_step and from_tokens"),
        ([PhaseConfig(from_step=4)], "phase 1 changes nothing"),
        ([replace(LONGER, from_step=0)], "phase 1 begins at step 0, and the one before it at step 0; order"),
        ([replace(LONGER, from_step=20)], r"phase 1 begins at step 20, and the run ends at train\.steps=20"),
        ([LONGER, LONGER], "phase 2 begins at step 4, and the one before it at step 4"),
        ([replace(LONGER, train=TrainChanges(seq_len=-1))], r"in phase 1 train\.seq_len is -1"),
        ([replace(LONGER, optim=OptimChanges(lr=-1.0))], r"in phase 1 optim\.lr is -1"),
        ([replace(LONGER, data=DataChanges(blend={"nowhere": 1.0}))], "in phase 1 .*nowhere"),
    ],
)
def test_what_cannot_be_is_refused(phases, message):
    with pytest.raises(ValueError, match=f"^phases: {message}") as error:
        configured(*phases)
    assert "\n" not in str(error.value)


def test_phases_come_from_a_file_and_are_written_down(tmp_path):
    text = "train: {steps: 20}\nphases:\n- {from_step: 4, train: {seq_len: 64}, data: {blend: {stdlib: 2.0}}}\n"
    (tmp_path / "run.yaml").write_text(text)
    parser = make_parser(PretrainConfig, "")
    config, namespace = parse(PretrainConfig, parser, ["--config", str(tmp_path / "run.yaml")])
    assert config.phases == [replace(LONGER, data=DataChanges(blend={"stdlib": 2.0}))]
    (tmp_path / "again.yaml").write_text(dump(parser, namespace, PretrainConfig))
    assert parse(PretrainConfig, parser, ["--config", str(tmp_path / "again.yaml")])[0] == config
    (tmp_path / "typo.yaml").write_text(text.replace("seq_len", "seqlen"))
    with pytest.raises(ConfigError, match=r"did you mean 'train\.seq_len'"):
        parse(PretrainConfig, parser, ["--config", str(tmp_path / "typo.yaml")])


@pytest.mark.parametrize("how", ["file", "option"])
def test_phases_that_are_given_again_take_the_place_of_the_others(tmp_path, how):
    """Entries are not mixed: what an earlier one had would go on in a later one that leaves it out."""
    (tmp_path / "run.yaml").write_text("train: {steps: 20}\nphases: [{from_tokens: 4096, optim: {lr: 0.5}}]\n")
    (tmp_path / "other.yaml").write_text("phases:\n- {from_step: 4, train: {seq_len: 64}}\n")
    again = {"file": ["--config", str(tmp_path / "other.yaml")]}
    again["option"] = ["--phases", '[{"from_step": 4, "train": {"seq_len": 64}}]']
    arguments = ["--config", str(tmp_path / "run.yaml"), *again[how], "--train.steps=30"]
    config, _ = parse(PretrainConfig, make_parser(PretrainConfig, ""), arguments)
    assert config.phases == [LONGER] and config.train.steps == 30


def test_a_model_that_does_not_rotate_has_no_base_to_change():
    turned = PhaseConfig(from_step=4, model=ModelChanges(rope_theta=500.0))
    assert expand(configured(turned))[1].config.model.attention.rope_theta == 500.0
    model = replace(PretrainConfig().model, attention=AttentionConfig(rope_theta=None))
    with pytest.raises(ValueError, match=r"^phases: phase 1 changes the base of the rotary embedding, and the model"):
        replace(configured(turned), model=model)


# What is looked at before a model is built


def test_every_phases_layout_is_checked():
    with pytest.raises(ValueError, match=r"phases: in phase 1 train\.seq_len=65 does not divide over 2 ranks"):
        replace(
            configured(PhaseConfig(from_step=4, train=TrainChanges(seq_len=65))), parallel=ParallelConfig(context=2)
        ).validate_layout(2)
    with pytest.raises(ValueError, match=r"phases: in phase 1 train\.global_batch_size=9 does not divide"):
        configured(PhaseConfig(from_step=4, train=TrainChanges(global_batch_size=9))).validate_layout(1)


def test_deepspeed_takes_as_many_micro_batches_throughout():
    zero = EngineConfig("deepspeed", 1)
    twice = PhaseConfig(from_step=4, train=TrainChanges(global_batch_size=16))
    with pytest.raises(ValueError, match="phase 1 has 2 micro-batches of a rank in a step, and the run begins with 1"):
        replace(configured(twice), engine=zero).validate_layout(1)
    configured(twice).validate_layout(1)
    larger = PhaseConfig(from_step=4, train=TrainChanges(global_batch_size=16, micro_batch_size=16))
    replace(configured(larger), engine=zero).validate_layout(1)


def in_phases(data, run_dir):
    """Eight steps, the last four of twice the length, another blend, twice the batch, another rate and rotary base."""
    config = in_process_config(data, run_dir, steps=8)
    other = PhaseConfig(
        from_step=4,
        train=TrainChanges(seq_len=64, global_batch_size=8),
        data=DataChanges(blend=blend(data)),
        optim=OptimChanges(lr=0.004, min_lr_ratio=0.5),
        model=ModelChanges(rope_theta=500.0),
    )
    return replace(
        config,
        data=replace(config.data, validation_path=str(data / "validation")),
        checkpoint=replace(config.checkpoint, every=4),
        evaluation=replace(config.evaluation, every=2),
        phases=[other],
    )


def blend(data):
    return {str(data / "validation"): 1.0, str(data / "train"): 2.0}


def test_the_data_of_every_phase_are_looked_at(tiny_data, tmp_path):
    config = in_phases(tiny_data, tmp_path / "run")
    notes = preflight.check(config).notes
    assert any(line.startswith("phase 1, steps 5 to 8: 8 sequences of 64 tokens a step, 2 at a time") for line in notes)
    assert any("tokens in" in line and "phase 0 reads 512 tokens" in line for line in notes)
    # A third of 4 x 8 x 64 tokens.
    assert any("share 0.333" in line and "phase 1 reads 683 tokens" in line for line in notes)
    (other,) = config.phases
    short = replace(config, phases=[replace(other, train=TrainChanges(seq_len=10**6))])
    assert any("fewer than train.seq_len=1000000" in line for line in preflight.check(short).warnings)


@pytest.mark.parametrize("what", ["vocab_size", "eod_id", "tokenizer_path"])
def test_data_of_another_tokenizer_are_refused(tiny_data, tmp_path, what):
    config = in_phases(tiny_data, tmp_path / "run")
    first, second = (find_sources(phase.config) for phase in expand(config))
    learn_sentencepiece(["some text of few words"], "bpe", 270).save(tmp_path)
    other = {"vocab_size": 513, "eod_id": 7, "tokenizer_path": tokenizer_file(tmp_path)}[what]
    with pytest.raises(ConfigError, match=r"the data of phase 1 .* have another tokenizer"):
        preflight.check(config, [first, replace(second, **{what: other})])


@pytest.fixture
def planned(tiny_data, tmp_path):
    """A run whose second phase has eight times the length, and its planner."""
    config = in_process_config(tiny_data, tmp_path, steps=20, micro_batch_size=1)
    config = PlanConfig(**vars(config) | {"phases": [PhaseConfig(from_step=4, train=TrainChanges(seq_len=256))]})
    return config, Planner(config, 512)


def test_every_phase_is_planned(planned):
    config, planner = planned
    plans = [planner.plan(phase.config) for phase in expand(config)]
    assert plans[1].memory() > plans[0].memory() and plans[1].seconds > plans[0].seconds
    report = describe_phases(config, plans)
    assert "phase 0, steps 1 to 4\n" in report and "phase 1, steps 5 to 20\n" in report


def test_a_layout_has_to_fit_in_every_phase(planned, monkeypatch):
    config, planner = planned
    plans = [planner.plan(phase.config) for phase in expand(config)]
    enough = max(plans[0].memory("none"), plans[1].memory("full"))
    assert enough < plans[1].memory("none")
    config = replace(config, cluster=replace(config.cluster, memory=1.001 * enough / 1e9, usable=1.0))
    recomputed = replace(config, train=replace(config.train, recompute="full"))
    for phases, fitting in (([], ["none", "full"]), (config.phases, ["full"])):
        tried = [replace(layout, phases=phases) for layout in (config, recomputed)]
        monkeypatch.setattr("trainer.planning.search.layouts", lambda _, tried=tried: tried)
        found = search(config, Planner(config, 512), print)
        assert sorted(plan.config.train.recompute for plan in found) == sorted(fitting)


# Runs


def run(config, expected=0):
    assert pretrain.run(config, yaml.safe_dump(asdict(config))) == expected


@pytest.mark.parametrize("engine", ["megatron", "deepspeed"])
def test_one_run_equals_two_that_are_joined(tiny_data, tmp_path, engine):
    whole = replace(in_phases(tiny_data, tmp_path / "whole"), engine=EngineConfig(engine, 1))
    if engine == "deepspeed":
        (other,) = whole.phases
        whole.phases = [replace(other, train=replace(other.train, micro_batch_size=4))]
    run(whole)
    first = replace(whole, run=replace(whole.run, dir=str(tmp_path / "first")), phases=[])
    run(first)
    half = tmp_path / "first/checkpoints/step_00000004"
    second = replace(
        first,
        run=replace(whole.run, dir=str(tmp_path / "second")),
        train=replace(first.train, seq_len=64, global_batch_size=8, micro_batch_size=4 if engine == "deepspeed" else 2),
        data=replace(first.data, blend=blend(tiny_data)),
        optim=replace(first.optim, lr=0.004, min_lr_ratio=0.5),
        model=replace(first.model, attention=replace(first.model.attention, rope_theta=500.0)),
        checkpoint=replace(first.checkpoint, resume=str(half)),
    )
    run(second)
    (steps, validations), begun, ended = (trajectory(tmp_path / name) for name in ("whole", "first", "second"))
    assert [step for step, *_ in steps] == list(range(1, 9))
    assert steps == begun[0][:4] + ended[0]
    # After two and four steps, then on windows of the longer length.
    assert validations == begun[1][:2] + ended[1]
    assert steps[4:] != begun[0][4:]
    stored = open_checkpoint(tmp_path / "whole")
    assert stored.settings["train"]["seq_len"] == 64 and stored.model == second.model
    assert checkpoint.read_progress(tmp_path / "whole/checkpoints/step_00000008").tokens == 4 * (4 * 32 + 8 * 64)
    assert [
        (event["step"], event["number"]) for event in read_events(tmp_path / "whole") if event["kind"] == "phase"
    ] == [(4, 1)]


TRAINED = ["layers.*.mixer.*"], ["layers.*.ffn.*", "layers.*.ffn_norm.weight", "*.mixer.o_proj.weight"]


def test_a_phase_may_train_other_parameters(tiny_data, tmp_path):
    """As two runs do that are joined: what rests keeps its values and has no part in norm, decay and moments."""
    config = in_process_config(tiny_data, tmp_path / "whole", steps=8)
    config = replace(config, checkpoint=replace(config.checkpoint, every=4))
    first = replace(config, train=replace(config.train, trainable=TRAINED[0]))
    other = PhaseConfig(from_step=4, train=TrainChanges(trainable=TRAINED[1]))
    run(replace(first, phases=[other]))
    run(replace(first, run=replace(config.run, dir=str(tmp_path / "first"))))
    half = tmp_path / "first/checkpoints/step_00000004"
    second = replace(
        config,
        run=replace(config.run, dir=str(tmp_path / "second")),
        train=replace(config.train, trainable=TRAINED[1]),
        checkpoint=replace(config.checkpoint, resume=str(half)),
    )
    run(second)
    patterns = "*.mixer.o_proj.weight, layers.*.ffn.*, layers.*.ffn_norm.weight and 1 more"
    assert f" M of them, {patterns}; the others are frozen" in (tmp_path / "whole/run.log").read_text()
    whole, begun, ended = (trajectory(tmp_path / name)[0] for name in ("whole", "first", "second"))
    assert whole == begun[:4] + ended
    assert whole[4:] != begun[4:]
    stored = {}
    for name in ("whole", "second"):
        model = load_model(tmp_path / name, torch.device("cpu")).model
        stored[name] = dict(model.named_parameters())
    for name, parameter in stored["whole"].items():
        assert torch.equal(parameter, stored["second"][name]), name


def test_deepspeed_trains_the_same_parameters_throughout():
    other = PhaseConfig(from_step=4, train=TrainChanges(trainable=["*mixer*"]))
    with pytest.raises(ValueError, match=r"phases: phase 1 changes the trained parameters: DeepSpeed has"):
        trainable.check(replace(configured(other), engine=EngineConfig("deepspeed", 1)))
    trainable.check(configured(other))


def test_memory_is_that_of_all_that_any_phase_trains():
    other = PhaseConfig(from_step=4, train=TrainChanges(trainable=["*ffn*"]))
    config = configured(other, trainable=["*mixer*"])
    assert [phase.config.train.trainable for phase in expand(config)] == [["*mixer*"], ["*ffn*"]]
    assert [phase.train.trainable for phase in trainable.to_plan(config)] == [["*mixer*", "*ffn*"]] * 2


@pytest.mark.parametrize("stop", [2, 4, 6])
def test_a_run_goes_on_in_either_phase_to_the_bit(tiny_data, tmp_path, monkeypatch, stop):
    config = in_phases(tiny_data, tmp_path / "whole")
    run(config)
    stopped, step = replace(config, run=replace(config.run, dir=str(tmp_path / "stopped"))), Trainer._step

    def stop_after(self):
        self.stop_requested = self.progress.step == stop - 1
        return step(self)

    monkeypatch.setattr(Trainer, "_step", stop_after)
    run(stopped, expected=75)
    monkeypatch.setattr(Trainer, "_step", step)
    run_directory.check(stopped)
    run(stopped)
    assert status(tmp_path / "stopped")["state"] == "done"
    assert trajectory(tmp_path / "stopped") == trajectory(tmp_path / "whole")


@pytest.mark.parametrize("layout", ["", "--parallel.pipeline=2", "--parallel.context=2"])
def test_phases_over_two_ranks(tiny_run, tmp_path, layout):
    """Messages between stages and shards of a sequence follow the phase's length and micro-batch."""
    phase = {"from_step": 4, "train": {"seq_len": 64, "global_batch_size": 8, "micro_batch_size": 4}}
    phases = f"--phases={json.dumps([phase | {'model': {'rope_theta': 500}}])}"
    for folder, ranks, options in (("one", 1, ()), ("two", 2, (layout,) if layout else ())):
        code, output = finish(tiny_run(tmp_path / folder, phases, *options, ranks=ranks))
        assert code == 0, output
    for one, two in zip(trajectory(tmp_path / "one"), trajectory(tmp_path / "two"), strict=True):
        assert [line[0] for line in one] == [line[0] for line in two]
        assert [line[1] for line in two] == pytest.approx([line[1] for line in one], rel=1e-5)


@pytest.mark.parametrize(("step", "seq_len"), [(4, 32), (8, 64)])
def test_a_checkpoint_is_evaluated_as_its_phase_was(tiny_data, tmp_path, step, seq_len):
    config = in_phases(tiny_data, tmp_path / "run")
    values = yaml.safe_load(yaml.safe_dump(asdict(config)))
    settings = run_directory.settings_in_phase(values, step - 1)
    assert settings["train"] == asdict(expand(config)[step // 4 - 1].config.train)
    assert settings["train"]["seq_len"] == seq_len
    assert from_mapping(ModelConfig, settings["model"]) == expand(config)[step // 4 - 1].config.model
    assert values == yaml.safe_load(yaml.safe_dump(asdict(config)))


# Going on in a run directory


@pytest.fixture
def reached(tmp_path, monkeypatch):
    """Whether a run of these phases that has taken 6 steps may go on with others; the refusal, or None."""

    def check(theirs, ours):
        config = replace(configured(*theirs), run=replace(PretrainConfig().run, dir=str(tmp_path)))
        (tmp_path / "checkpoints/step_00000006").mkdir(parents=True)
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(asdict(config)))
        monkeypatch.setattr(run_directory, "_reached", lambda run_dir, steps: steps[-1])
        try:
            run_directory.check(replace(config, phases=list(ours)))
        except ConfigError as error:
            return str(error)
        return None

    return check


LATER = PhaseConfig(from_step=6, optim=OptimChanges(lr=1e-4))


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [([], [LATER]), ([LATER], []), ([LONGER], [LONGER, LATER]), ([LONGER, LATER], [LONGER]), ([LONGER], [LONGER])],
)
def test_phases_to_come_may_change(reached, theirs, ours):
    assert reached(theirs, ours) is None


@pytest.mark.parametrize(
    ("theirs", "ours", "message"),
    [
        ([LONGER], [], "phases: [{'from_step': 4, 'train.seq_len': 64}] -> []"),
        ([], [LONGER], "phases: [] -> [{'from_step': 4, 'train.seq_len': 64}]"),
        ([LONGER], [replace(LONGER, from_step=5)], "'from_step': 5"),
    ],
)
def test_phases_that_have_begun_may_not(reached, theirs, ours, message):
    said = reached(theirs, ours)
    assert said is not None and message in said and "holds another run" in said


def test_another_run_goes_on_with_the_model_of_the_phase(tmp_path):
    """The rotary base of the checkpoint's last step, which is not that of the run's beginning."""
    turned = PhaseConfig(from_step=4, model=ModelChanges(rope_theta=500.0))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(asdict(configured(turned))))

    def check(theta):
        model = replace(PretrainConfig().model, attention=AttentionConfig(rope_theta=theta))
        goes_on = replace(PretrainConfig().checkpoint, resume=str(tmp_path))
        run_directory._check_source(replace(configured(), model=model, checkpoint=goes_on))

    for step, theta, other in ((4, 10000.0, 500.0), (5, 500.0, 10000.0)):
        (tmp_path / "progress.json").write_text(json.dumps({"step": step}))
        check(theta)
        with pytest.raises(ConfigError, match=rf"rope_theta: {theta} -> {other}"):
            check(other)


def test_a_phases_learning_rate_is_no_change_of_the_schedule(tmp_path):
    flat = OptimConfig(warmup_steps=0)
    config = replace(configured(replace(LATER, optim=OptimChanges(lr=1e-3))), optim=flat)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(asdict(config)))
    assert run_directory.change_of_schedule(tmp_path, config, 6) is None
    said = run_directory.change_of_schedule(tmp_path, replace(config, phases=[]), 6)
    assert said is not None and "optim.lr: 0.001 -> 0.0003" in said
