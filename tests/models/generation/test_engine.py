"""The engine: its tokens are those of the parallel forward, and none depends on what else is running."""

import itertools

import pytest
import torch
from safetensors.torch import save_file

from models.config import MIXERS, MoEConfig, RouterConfig, SpikingConfig
from models.generation import Completion, Engine, Request, Sampling, Snapshot, traced
from models.parameters import cast_parameters
from models.spiking import neurons
from tests.helpers import VOCABULARY, draw_tokens, rows, tiny_decoder
from tests.processes import run_ranks

BRANCHES = "full_attention + gated_delta_net, hgrn2 + sliding_window_attention"
EXPERTS = MoEConfig(num_experts=4, shared_experts=1, expert_hidden_size=16, router=RouterConfig(top_k=2))
# A model each, of any layer that keeps a state.
MODELS = {
    **{name: {"pattern": name} for name in MIXERS},
    "branches": {"pattern": BRANCHES},
    "linear branches": {"pattern": "hgrn2 + gated_delta_net"},
    "experts": {"pattern": "gated_delta_net, full_attention", "moe": EXPERTS},
    "window of 1": {"pattern": "sliding_window_attention", "attention__window": 1},
    "wide window": {"pattern": "sliding_window_attention", "attention__window": 100},
    "sinks": {
        "pattern": "sliding_window_attention, hgrn + full_attention",
        "sink_tokens": 3,
        "attention__output_gate": True,
        "attention__partial_rotary_factor": 0.5,
    },
    "spikes": {
        "pattern": BRANCHES,
        "moe": EXPERTS,
        "spiking": SpikingConfig(["all"], int8_keys_values=True, queries=True),
    },
    "changes": {
        "pattern": BRANCHES,
        "spiking": SpikingConfig(["all"], code="delta", threshold="running", dead_zone=1.5),
    },
}


# Models that have every kind of state between them.
MODELS["all"] = {"pattern": ", ".join(MIXERS), "num_layers": len(MIXERS)}
MANY = ["all", "branches", "experts", "window of 1", "sinks", "spikes", "changes"]


def decoder(name):
    """In float64 if it has spikes: rounding then decides no count."""
    options = dict(MODELS[name])
    model = tiny_decoder(options.pop("pattern"), **options).eval()
    for neuron in neurons([model]):
        if neuron.average is not None:
            neuron.average.fill_(0.5)
            neuron.begin(counts=False)
    return model.double() if "spiking" in options else model


def prompt_of(length, seed=0):
    return tuple(draw_tokens(length, seed=seed + length).tolist())


@torch.no_grad()
def log_probs_of(model, tokens):
    """Log-probabilities [T, V] after each token, by the parallel forward."""
    return model(*rows(torch.tensor([tokens])))[0].float().log_softmax(-1)


def check(model, prompt, completion, tolerance=1e-4):
    """Each log-probability is the one of the parallel forward over all before it."""
    expected = log_probs_of(model, [*prompt, *completion.tokens])
    own = expected[len(prompt) - 1 : -1].gather(1, torch.tensor(completion.tokens)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(completion.log_probs), own, rtol=0, atol=tolerance)


def requests_of(lengths, new=3, **options):
    return [
        Request(prompt_of(length), Sampling(new + i, seed=i, **options), samples=1 + i % 3)
        for i, length in enumerate(lengths)
    ]


LENGTHS = (1, 9, 40, 4, 23)


@pytest.mark.parametrize(("name", "deterministic"), [*((name, False) for name in MODELS), ("branches", True)])
def test_token_by_token_is_the_parallel_forward(name, deterministic):
    """Prompts of different lengths, in chunks, in more samples than slots, over borders of pages."""
    model = decoder(name)
    requests = requests_of(LENGTHS)
    engine = Engine(model, slots=4, chunk=7, page=4, deterministic=deterministic)
    for request, completions in zip(requests, engine.generate(requests), strict=True):
        assert len(completions) == request.samples
        for completion in completions:
            assert len(completion.tokens) == request.sampling.max_new_tokens and completion.finish == "length"
            check(model, request.prompt, completion)
    assert engine.is_idle and engine.slots_in_use == 0
    assert engine._pages.used == 0 and engine._pages.reserved == 0, "every page is given back"
    assert len({completion.tokens for completion in completions}) == len(completions), "samples differ"


@pytest.mark.parametrize("name", ["all", "linear branches", "sinks", "branches", "experts", "changes"])
def test_traces_change_no_bit(name, monkeypatch):
    """Also while the number of rows changes, and with weights that were changed after tracing."""
    model = decoder(name)
    requests = requests_of((5, 12, 3), new=4)
    engine = Engine(model, slots=3, chunk=8)
    expected = engine.generate(requests)
    monkeypatch.setattr(traced, "_STEPS_BEFORE", 0)
    assert engine.generate(requests) == expected
    blocks = {block for traces in engine._tracer._traces.values() for block in traces}
    assert bool(blocks) == (name in ("all", "linear branches", "sinks"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    engine.forget()
    assert engine.generate(requests) == Engine(model, slots=3, chunk=8).generate(requests) != expected


@pytest.mark.parametrize(
    "name", ["gated_delta_net", *(pytest.param(name, marks=pytest.mark.slow) for name in ("all", "sinks", "experts"))]
)
def test_compiled_layers_give_the_same_tokens(name, monkeypatch):
    """And nearly the same probabilities. A compiled block takes part: without traces nothing would differ."""
    monkeypatch.setattr(traced, "_STEPS_BEFORE", 2)
    model = decoder(name)
    # Rows that run side by side have gaps between their states.
    requests = requests_of((5, 3), new=6)
    engine = Engine(model, slots=2, chunk=8, compile=True)
    for request, completions in zip(requests, engine.generate(requests), strict=True):
        for completion in completions:
            check(model, request.prompt, completion)
    compiled = [trace for traces in engine._tracer._traces.values() for pair in traces.values() for trace in pair]
    assert bool(compiled) == (name != "experts")
    if name == "gated_delta_net":
        assert len(engine._tracer._make._known) < len(compiled), "layers share what was compiled"
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    engine.forget()
    for request, completions in zip(requests, engine.generate(requests), strict=True):
        for completion in completions:
            check(model, request.prompt, completion)


def test_compiling_needs_a_compiler(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(ValueError, match=r"compile needs a C\+\+ compiler: install g\+\+, or leave compile out"):
        Engine(decoder("gated_delta_net"), compile=True)


@pytest.mark.parametrize("name", ["gated_delta_net", "full_attention", "branches", "experts"])
def test_bfloat16_is_near_its_own_forward(name):
    model = decoder(name)
    cast_parameters(model, torch.bfloat16)
    requests = requests_of((3, 20), temperature=0)
    for request, completions in zip(requests, Engine(model, slots=3, chunk=8).generate(requests), strict=True):
        for completion in completions:
            check(model, request.prompt, completion, 0.15)


@pytest.mark.parametrize("name", MANY)
def test_a_sample_is_the_same_alone_and_among_others_to_the_last_bit(name):
    model = decoder(name)
    request = Request(prompt_of(11), Sampling(6, seed=5, top_p=0.9))
    others = [Request(prompt_of(3 + i, seed=9), Sampling(2 + i % 4, seed=i)) for i in range(15)]
    ((alone,),) = Engine(model, chunk=8, page=4, deterministic=True).generate([request])
    for place in (0, 13):
        batch = [*others[:place], request, *others[place:]]
        (among,) = Engine(model, chunk=8, page=4, deterministic=True).generate(batch)[place]
        assert among == alone
    # Otherwise the tokens are the same too, and the numbers up to rounding.
    (among,) = Engine(model, chunk=8, page=4).generate([request, *others])[0]
    assert among.tokens == alone.tokens
    assert among.log_probs == pytest.approx(alone.log_probs, abs=1e-4)


def test_samples_of_one_prompt_are_those_of_as_many_requests():
    """The state of the prompt is computed once, and continued by each sample for itself."""
    model = decoder("branches")
    prompt = prompt_of(21)
    chunks = []
    forward = model.hidden_states
    model.hidden_states = lambda tokens, *args, **options: (
        chunks.append(tokens.shape) or forward(tokens, *args, **options)
    )
    engine = Engine(model, slots=2, chunk=8, page=4, deterministic=True)
    (together,) = engine.generate([Request(prompt, Sampling(6), samples=5)])
    assert [shape for shape in chunks if shape[1] > 1] == [(1, 8), (1, 8), (1, 5)]
    (again,) = Engine(model, slots=5, chunk=8, page=4, deterministic=True).generate(
        [Request(prompt, Sampling(6), samples=5)]
    )
    assert together == again and len({sample.tokens for sample in again}) == 5


@pytest.mark.parametrize("name", MANY)
def test_a_snapshot_resumes_where_it_was_taken(name, tmp_path):
    model = decoder(name)
    prompt, rest = prompt_of(21), prompt_of(6, seed=2)
    first = Engine(model, chunk=8, page=4)
    first.snapshot(prompt).save(tmp_path / "state.safetensors")
    assert first.is_idle and first._pages.used == 0 and first._pages.reserved == 0
    second = Engine(model, chunk=8, page=8)
    second.restore(Snapshot.load(tmp_path / "state.safetensors"))
    sampling = Sampling(6, seed=1)
    calls = []
    forward = model.hidden_states
    model.hidden_states = lambda tokens, *args, **options: (
        calls.append(tokens.shape[1]) or forward(tokens, *args, **options)
    )
    resumed = second.generate([Request(prompt, sampling, 2), Request(prompt + rest, sampling)])
    assert set(calls) == {1, len(rest)}, "the prompt itself is not computed again"
    plain = Engine(model, chunk=64).generate([Request(prompt, sampling, 2), Request(prompt + rest, sampling)])
    for got, expected in zip(itertools.chain(*resumed), itertools.chain(*plain), strict=True):
        assert got.tokens == expected.tokens
        assert got.log_probs == pytest.approx(expected.log_probs, abs=1e-4)
    second.forget()
    assert second._pages.used == 0 and second._pages.reserved == 0


def test_a_snapshot_of_another_model_is_refused(tmp_path):
    snapshot = Engine(decoder("gated_delta_net")).snapshot(prompt_of(5))
    for other in ("full_attention", "hgrn", "branches"):
        engine = Engine(decoder(other))
        with pytest.raises(ValueError, match="the state is of another model"):
            engine.restore(snapshot)
        assert engine._pages.used == 0 and engine._pages.reserved == 0
    save_file({"x": torch.zeros(1)}, str(tmp_path / "other.safetensors"))
    with pytest.raises(ValueError, match="holds no generation state"):
        Snapshot.load(tmp_path / "other.safetensors")


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("name", ["branches", "gated_delta_net", "sliding_window_attention", "full_attention"])
def test_a_shared_beginning_is_computed_once(name, deterministic):
    model = decoder(name)
    system = prompt_of(40)
    requests = [Request(system + prompt_of(5, seed=i), Sampling(5, seed=i)) for i in range(4)]
    engine = Engine(model, chunk=16, page=4, deterministic=deterministic, prefixes=2)
    lengths = []
    forward = model.hidden_states
    model.hidden_states = lambda tokens, *args, **options: (
        lengths.append(tokens.shape[1]) or forward(tokens, *args, **options)
    )
    found = [engine.generate([request])[0][0] for request in requests]
    prefill = [length for length in lengths if length > 1]
    # The second prompt computes the beginning again, and keeps it; deterministic chunks end at multiples of 16.
    expected = [16, 16, 13, 16, 16, 8, 5, 5, 5]
    assert prefill == ([16, 16, 13, 16, 16, 13, 13, 13] if deterministic else expected)
    model.hidden_states = forward
    plain = [Engine(model, chunk=16, page=4, deterministic=deterministic).generate([r])[0][0] for r in requests]
    for got, expected in zip(found, plain, strict=True):
        assert got == expected if deterministic else got.tokens == expected.tokens
    engine.forget()
    assert engine._pages.used == 0 and engine._pages.reserved == 0


def test_kept_states_are_limited_and_the_oldest_goes_first():
    model = decoder("full_attention")
    engine = Engine(model, chunk=64, page=4, prefixes=1)
    for seed in (1, 2):
        for end in range(2):
            engine.generate([Request(prompt_of(20, seed=seed) + prompt_of(3, seed=end), Sampling(1))])
    assert len(engine._prefixes) == 1
    assert engine._prefixes.longest(prompt_of(20, seed=1)) is None
    assert engine._prefixes.longest(prompt_of(20, seed=2)) is not None
    assert engine._pages.used == engine._pages.reserved == 5


def test_stop_tokens_end_a_sample_and_are_reported():
    model = decoder("gated_delta_net")
    (((plain),),) = Engine(model).generate([Request(prompt_of(5), Sampling(12, temperature=0))])
    stop = plain.tokens[4]
    ((stopped,),) = Engine(model).generate([Request(prompt_of(5), Sampling(12, temperature=0, stop_tokens=(stop,)))])
    first = plain.tokens.index(stop)
    assert stopped.tokens == plain.tokens[: first + 1] and stopped.finish == "stop"
    assert stopped.content == plain.tokens[:first] and plain.content == plain.tokens


def test_streams_share_the_engine_and_a_closed_one_frees_its_slot():
    model = decoder("branches")
    engine = Engine(model, slots=2, page=4)
    other = engine.submit(Request(prompt_of(9), Sampling(6)))
    stream = engine.stream(Request(prompt_of(4), Sampling(30)))
    events = [next(stream) for _ in range(3)]
    assert {event.request for event in events} == {other + 1}
    stream.close()
    while not engine.is_idle:
        events += engine.step()
    assert [event.finish for event in events if event.request == other] == [None] * 5 + ["length"]
    assert engine._pages.used == 0 and engine.slots_in_use == 0


def test_a_request_waits_for_a_slot_and_for_pages():
    model = decoder("full_attention")
    engine = Engine(model, slots=2, chunk=64, page=4, pages=8)
    numbers = [engine.submit(Request(prompt_of(10), Sampling(6, seed=seed))) for seed in range(3)]
    engine.step()
    engine.step()
    assert (engine.waiting, engine.running, engine.slots_in_use) == (1, 2, 2)
    events = []
    while not engine.is_idle:
        events += engine.step()
        assert engine._pages.used <= 8
    assert sorted(event.request for event in events if event.finish) == numbers
    with pytest.raises(ValueError, match="needs 9 pages of 4 tokens and there are 8"):
        engine.submit(Request(prompt_of(10), Sampling(26)))
    with pytest.raises(ValueError, match="33 tokens need 9 pages of 4 tokens, which are not free"):
        engine.snapshot(prompt_of(33))
    assert Engine(decoder("hgrn"), page=4, pages=1).generate([Request(prompt_of(10))]), "no attention, no pages"


def test_a_cancelled_request_frees_what_it_has_wherever_it_is():
    model = decoder("branches")
    engine = Engine(model, slots=3, chunk=4, page=4)
    decoding = engine.submit(Request(prompt_of(3), Sampling(30), samples=2))
    engine.step()
    filling = engine.submit(Request(prompt_of(30), Sampling(5)))
    waiting = engine.submit(Request(prompt_of(5), Sampling(5)))
    engine.step()
    assert (engine.waiting, engine.running, engine.slots_in_use) == (1, 2, 2)
    for number in (filling, decoding, waiting, waiting, 77):
        engine.cancel(number)
    assert engine.is_idle and engine._pages.used == 0 and engine._pages.reserved == 0
    # Samples that wait for a slot go too.
    crowd = engine.submit(Request(prompt_of(3), Sampling(30), samples=8))
    for _ in range(3):
        engine.step()
    engine.cancel(crowd)
    assert engine.is_idle and engine._pages.used == 0 and engine._pages.reserved == 0


def test_a_running_sample_is_not_held_up_by_a_long_prompt():
    engine = Engine(decoder("gated_delta_net"), chunk=4)
    first = engine.submit(Request(prompt_of(3), Sampling(30)))
    engine.step()
    engine.submit(Request(prompt_of(40), Sampling(2)))
    for _ in range(9):
        assert [event.request for event in engine.step()] == [first]


def test_weights_are_read_where_they_are_and_states_of_old_ones_are_forgotten():
    """As in training with rollouts: no copy of the weights, whose next values count."""
    model, other = decoder("branches"), tiny_decoder(BRANCHES, seed=3)
    engine = Engine(model, prefixes=2)
    requests = [Request(prompt_of(20), Sampling(5, temperature=0))]
    for _ in range(3):
        before = engine.generate(requests)
    model.load_state_dict(other.state_dict())
    engine.forget()
    after = engine.generate(requests)
    assert after == Engine(other).generate(requests) != before
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(()), "the prompt is empty"),
        (Request((1, VOCABULARY)), "ids outside the vocabulary of 50"),
        (Request((-1,)), "ids outside the vocabulary"),
        (Request((1,), samples=0), "samples is 0"),
    ],
)
def test_bad_requests_are_refused(request_, message):
    engine = Engine(tiny_decoder())
    with pytest.raises(ValueError, match=message):
        engine.submit(request_)
    assert engine.is_idle


@pytest.mark.parametrize("name", ["slots", "chunk", "page", "pages"])
def test_bad_settings_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} is 0"):
        Engine(tiny_decoder(), **{name: 0})


def test_drawing_leaves_the_global_generator_alone():
    engine, before = Engine(tiny_decoder()), torch.get_rng_state()
    assert isinstance(engine.generate([Request((1, 2), Sampling(3))])[0][0], Completion)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_repetition_penalty_knows_the_prompt_and_the_sample():
    model = decoder("gated_delta_net")
    prompt = prompt_of(8)
    sampling = Sampling(20, temperature=0, repetition_penalty=1e6)
    ((completion,),) = Engine(model).generate([Request(prompt, sampling)])
    tokens = [*prompt, *completion.tokens]
    seen = set(prompt)
    expected = log_probs_of(model, tokens)
    for place, token in enumerate(completion.tokens, len(prompt)):
        # Only logits matter to the penalty; an unseen token of positive logit always wins here.
        assert token not in seen or expected[place - 1, token] > expected[place - 1].min()
        seen.add(token)
    assert len(set(completion.tokens)) > 15


@pytest.mark.slow
def test_ranks_that_share_a_model_draw_the_tokens_of_one():
    """Tensor parallel with and without sequence parallel, expert parallel, and both."""
    run_ranks(2, "-m", "tests.models.generation.engine_ranks")
