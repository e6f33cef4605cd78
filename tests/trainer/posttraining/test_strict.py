"""Strict mode: answers are draws of training's forward, and their log-probabilities are its own, to the last bit."""

import json
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch

from models.config import MIXERS, MoEConfig, RouterConfig, RouterLossConfig
from models.generation import Completion, Engine, Request, Sampling
from models.parameters import cast_parameters
from tests.helpers import VOCABULARY
from tests.launch.serving import write_model
from tests.models.generation.test_engine import MODELS, decoder, prompt_of
from tests.trainer.conftest import metrics
from tests.trainer.posttraining.conftest import run, steps
from trainer.objectives.base import Outputs
from trainer.posttraining.data.packing import Packing, pack
from trainer.posttraining.data.sequences import TokenSequence
from trainer.posttraining.objectives import OBJECTIVES
from trainer.posttraining.policy import ADVANTAGES, SAMPLER, WEIGHTS, PolicyObjective, Terms
from trainer.posttraining.strict import Check, Redraw

PACKING = Packing(40, alone=True)
TEMPERATURE = 0.9


class OneProcess:
    """What strict mode uses of an engine, with a model in this process."""

    data_parallel_rank = 0

    def __init__(self, own):
        self.model, self.collectives, self.forwards = own, self, 0

    def gather(self, value):
        return [value]

    def evaluate(self, batches, objective):
        self.run(batches, objective, torch.no_grad())

    def run(self, batches, objective, context=None):
        """The losses of micro-batches."""
        losses = []
        with context or nullcontext():
            for batch in batches:
                self.forwards += 1
                hidden = self.model.hidden_states(batch.tokens, batch.positions, batch.documents, origin=batch.origin)
                outputs = Outputs(hidden, self.model.head_weight, self.model.groups)
                losses.append(objective.forward(outputs, batch)[0])
        return losses


def answers_of(engine, requests, proposed=None):
    proposed = proposed or Engine(engine.model, slots=4).generate(requests)
    answers, changed = Redraw(engine, PACKING, VOCABULARY).answers(requests, proposed)
    return proposed, answers, changed


def requests_of(lengths, new=5, samples=2, **options):
    return [
        Request(prompt_of(length), Sampling(new, temperature=TEMPERATURE, seed=length, **options), samples)
        for length in lengths
    ]


def learned(requests, answers):
    """The micro-batches that answers are learned from."""
    sequences = []
    for request, group in zip(requests, answers, strict=True):
        for answer in group:
            sequence = TokenSequence.of([(request.prompt, False), (answer.tokens, True)])
            log_probs = np.asarray([0.0] * len(request.prompt) + list(answer.log_probs), np.float32)
            ones = np.ones(len(sequence), np.float32)
            extra = {SAMPLER: log_probs, WEIGHTS: ones, ADVANTAGES: ones}
            sequences.append(replace(sequence, extra=extra))
    return pack(sequences, PACKING, seed=3, step=2)


def mismatch_of(engine, batches):
    """What the training step's check finds, and whether any loss is a number."""
    check = Check()
    check.is_on = True
    losses = engine.run(batches, PolicyObjective(Terms(OBJECTIVES["grpo"], TEMPERATURE), len(batches), check))
    assert all(loss.requires_grad for loss in losses)
    return check.collect(engine), [bool(loss.isfinite()) for loss in losses]


@pytest.mark.parametrize("name", [*MODELS, "bf16"])
def test_log_probabilities_are_the_training_steps(name):
    """For every mixer, with experts, sinks and spikes, in training mode and with gradients, in any order of answers."""
    own = decoder("branches" if name == "bf16" else name).float()
    if name == "bf16":
        cast_parameters(own, torch.bfloat16)
    engine = OneProcess(own.train())
    requests = requests_of((3, 17))
    _, answers, _ = answers_of(engine, requests)
    found, finite = mismatch_of(engine, learned(requests, answers))
    assert found.tokens == 0 and found.difference == 0 and all(finite)


@torch.no_grad()
def one_at_a_time(engine, request, sample):
    """An answer without the generation engine: every token by a forward of its own."""
    redraw, tokens = Redraw(engine, PACKING, VOCABULARY), []
    while len(tokens) < request.sampling.max_new_tokens and not set(tokens) & set(request.sampling.stop_tokens):
        tokens.append(redraw._forward(request, sample, [*tokens, 0], len(tokens)).tokens[0])
    return tuple(tokens)


@pytest.mark.parametrize("name", MIXERS)
def test_answers_are_those_of_a_forward_for_each_token(name):
    """Whatever is proposed, also answers that end too early or too late."""
    engine = OneProcess(decoder(name))
    (request,) = requests_of((9,), samples=3)
    _, answers, changed = answers_of(engine, [request])
    assert changed == 0 and engine.forwards == 3, "rounding changes no draw here"
    stop = answers[0][0].tokens[2]
    request = replace(request, sampling=replace(request.sampling, stop_tokens=(stop,)))
    expected = [one_at_a_time(engine, request, sample) for sample in range(3)]
    assert expected[0][-1] == stop and len(expected[0]) <= 3
    proposed = Engine(engine.model).generate([request])
    short, long = ((1, stop), "stop"), ((1, 2, 3, 4, 5), "length")
    wrong = [Completion(tokens, (), (), (), finish) for tokens, finish in (short, long)] + proposed[0][2:]
    _, again, changed = answers_of(engine, [request], [wrong])
    assert [answer.tokens for answer in again[0]] == expected and changed > 0
    for answer in again[0]:
        assert (answer.finish == "stop") == (answer.tokens[-1] == stop)
        assert len(answer.log_probs) == len(answer.tokens)
    assert mismatch_of(engine, learned([request], again))[0].tokens == 0


def test_another_rounding_is_caught():
    """Of the sampler's log-probabilities, and of a weight in between."""
    engine = OneProcess(decoder("branches"))
    requests = requests_of((3, 17))
    proposed, answers, _ = answers_of(engine, requests)
    # The generation engine's own, which are right to rounding.
    found, finite = mismatch_of(engine, learned(requests, proposed_as_drawn(proposed)))
    assert found.tokens > 0 and 0 < found.difference < 1e-4 and not all(finite)
    batches = learned(requests, answers)
    place = int(batches[1].loss_mask[0].nonzero()[0])
    value = batches[1].extra[SAMPLER][0, place]
    value.copy_(torch.nextafter(value, torch.zeros(())))
    found, finite = mismatch_of(engine, batches)
    assert found.tokens == 1 and 0 < found.difference < 1e-6 and finite == [True, False, True, True]
    assert found.position == place + 1 and f"first at token {place + 1} of sequence {found.sequence};" in str(found)
    with torch.no_grad():
        weight = engine.model.final_norm.weight
        weight[0] = torch.nextafter(weight[0], weight[0] + 1)
    assert mismatch_of(engine, learned(requests, answers))[0].tokens > 0


def proposed_as_drawn(proposed):
    return [[replace(one, log_probs=one.tempered_log_probs) for one in group] for group in proposed]


def test_nothing_is_compared_after_the_first_update():
    engine, check = OneProcess(decoder("hgrn")), Check()
    requests = requests_of((3,))
    batches = learned(requests, answers_of(engine, requests)[1])
    batches[0].extra[SAMPLER].add_(1)
    losses = engine.run(batches, PolicyObjective(Terms(OBJECTIVES["grpo"], TEMPERATURE), 2, check))
    assert all(loss.isfinite() for loss in losses) and check.collect(engine).tokens == 0


def test_answers_are_alone_in_rows_of_one_shape():
    sequences = [
        TokenSequence(np.arange(1, length + 1, dtype=np.int32), np.ones(length, np.float32)) for length in (1, 5, 40)
    ]
    ranks = [pack(sequences, PACKING, seed=0, step=0, rank=rank, world=2) for rank in range(2)]
    assert [len(batches) for batches in ranks] == [2, 2]
    for batch in (batch for batches in ranks for batch in batches):
        assert batch.tokens.shape == (1, 40) and batch.documents.bounds == (0, 40)
        assert batch.positions[0].tolist() == list(range(40))
        numbers = batch.extra["sequence"][0]
        assert len(numbers[numbers >= 0].unique()) <= 1


STRICT = ("--rl.strict=true", "--train.micro_batch_size=1", "--train.steps=4")


def check_run(run_dir, updates=2):
    lines = [line for line in metrics(run_dir) if "grad_norm" in line]
    assert len(lines) == 4 and all(line["grad_norm"] > 0 for line in lines)
    first = [line for line in lines if "policy/strict_mismatches" in line]
    assert len(first) == len(lines) // updates
    assert all(line["policy/strict_mismatches"] == line["policy/strict_difference"] == 0 for line in first)
    assert all(line["policy/sampler_k3"] == 0 and "rollout/redrawn" in line for line in first)
    assert lines[1]["policy/k3"] > 0, "after the first update of a rollout the policy has moved"


def test_a_strict_run(model, rows, tmp_path):
    """Two updates of each rollout, of which the first is compared; also at another temperature."""
    run(model, rows, tmp_path / "run", "rl", *STRICT, "--rl.temperature=0.8")
    check_run(tmp_path / "run")


LAYOUTS = {
    "bf16": (1, "megatron", ("--train.precision=bf16",)),
    "data": (2, "megatron", ()),
    "tensor": (2, "megatron", ("--parallel.tensor=2",)),
    "tensor, sequence": (2, "megatron", ("--parallel.tensor=2", "--parallel.sequence=true")),
    "ZeRO 2": (2, "deepspeed", ("--engine.name=deepspeed", "--engine.zero_stage=2")),
    "reference": (1, "megatron", ("--rl.kl=0.1",)),
}


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strict_layouts(model, rows, tmp_path, layout):
    ranks, engine, options = LAYOUTS[layout]
    run(model, rows, tmp_path / "run", "rl", *STRICT, *options, ranks=ranks, imported=engine)
    check_run(tmp_path / "run")


def experts_of(**changes):
    return MoEConfig(num_experts=4, expert_hidden_size=16, losses=RouterLossConfig(balance=0.0), **changes)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_strict_with_experts(rows, tmp_path, ranks):
    """An expert's product has as many rows as tokens of the answer go there, on both sides."""
    own = write_model(tmp_path, rows=448, moe=experts_of(router=RouterConfig(top_k=2)))
    layout = ("--parallel.tensor=2", "--parallel.sequence=true") if ranks == 2 else ()
    run(own, rows, tmp_path / "run", "rl", *STRICT, *layout, ranks=ranks)
    check_run(tmp_path / "run")


BROKEN = '''
import runpy, sys
import torch
from trainer.posttraining import strict

answers = strict.Redraw.answers

def broken(self, requests, proposed):
    """Another model by one unit in the last place of one weight."""
    found = answers(self, requests, proposed)
    with torch.no_grad():
        for weight in self._engine.model.final_norm.parameters():
            weight[0] = torch.nextafter(weight[0], weight[0] + 1)
    return found

strict.Redraw.answers = broken
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
'''


def test_a_sampler_with_other_weights_ends_the_run(model, rows, tmp_path):
    """In one line that says where, and before anything is learned from its answers."""
    (tmp_path / "broken.py").write_text(BROKEN)
    output = run(model, rows, tmp_path / "run", "rl", *STRICT, code=1, wrapper=tmp_path / "broken.py")
    line = next(line for line in output.splitlines() if "to the bit" in line)
    assert "step 1: " in line and "first at token" in line and "of sequence" in line, output
    assert json.loads((tmp_path / "run/status.json").read_text())["state"] == "failed"
    assert not steps(tmp_path / "run")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--train.micro_batch_size=2",), "rl.strict gives each answer a micro-batch of its own"),
        (("--train.micro_batch_size=1", "--parallel.context=2"), "context-parallel ranks sample each for itself"),
    ],
)
def test_what_is_refused(model, rows, tmp_path, options, message):
    output = run(model, rows, tmp_path, "rl", "--rl.strict=true", *options, imported="torch", code=2)
    assert message in output.splitlines()[-1]


@pytest.mark.parametrize(
    ("experts", "option", "message"),
    [
        ({"capacity_factor": 2.0}, None, "training drops assignments"),
        ({"router": RouterConfig(gate="dense_to_sparse")}, None, "the gate depends on the step"),
        ({}, "--parallel.expert=2", "an expert multiplies other ranks' answers"),
    ],
)
def test_experts_that_are_refused(rows, tmp_path, experts, option, message):
    own = write_model(tmp_path, rows=448, moe=experts_of(**experts))
    options = (*STRICT, *(() if option is None else (option, "--check", "--world-size=2")))
    output = run(own, rows, tmp_path / "run", "rl", *options, imported="torch", code=2)
    assert message in output.splitlines()[-1]
