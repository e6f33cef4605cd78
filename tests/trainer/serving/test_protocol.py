"""What a request may say, field by field, and the message where it may not."""

import json

import pytest

from models.generation import Sampling
from trainer.serving.errors import ApiError
from trainer.serving.protocol import Limits, parse_json, read_chat, read_completions

LIMITS = Limits(prompt_tokens=100, new_tokens=50, choices=8)
HELLO = [{"role": "user", "content": "hello"}]


def completions(**fields):
    return read_completions({"model": "m", "prompt": "a"} | fields, LIMITS)


def chat(**fields):
    return read_chat({"model": "m", "messages": HELLO} | fields, LIMITS)


def test_the_least_request_has_the_interface_s_defaults():
    asked = completions()
    assert asked.prompts == ("a",) and asked.samples == 1 and asked.stops == ()
    assert not asked.stream and not asked.log_probs
    assert asked.sampling == Sampling(16, seed=asked.sampling.seed)
    assert chat().sampling.max_new_tokens == 50 and chat().messages == tuple(HELLO)


def test_without_a_seed_no_two_requests_draw_alike():
    assert completions().sampling.seed != completions().sampling.seed
    assert completions(seed=-3).sampling.seed == -3


def test_every_field_of_sampling_arrives():
    fields = {"temperature": 0.5, "top_k": 7, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.2, "seed": 3}
    assert completions(max_tokens=9, logprobs=2, **fields).sampling == Sampling(9, **fields, top_log_probs=2)
    asked = chat(max_completion_tokens=9, logprobs=True, top_logprobs=20, **fields)
    assert asked.sampling == Sampling(9, **fields, top_log_probs=20) and asked.log_probs


@pytest.mark.parametrize(("value", "expected"), [(0, 0.0), (1e-6, 0.0), (1e-5, 1e-5), (2, 2.0)])
def test_a_tiny_temperature_is_greedy(value, expected):
    assert completions(temperature=value).sampling.temperature == expected


def test_null_is_the_same_as_nothing():
    names = ("n", "stop", "stream", "logprobs", "seed", "temperature", "max_tokens", "echo", "logit_bias", "suffix")
    assert completions(**dict.fromkeys(names)).samples == 1
    assert chat(tools=None, response_format=None, max_completion_tokens=None).sampling.max_new_tokens == 50


def test_fields_that_change_no_answer_are_accepted():
    chat(user="u", metadata={"a": "b"}, store=True, service_tier="auto", parallel_tool_calls=True, tool_choice="none")
    chat(response_format={"type": "text"}, frequency_penalty=0, presence_penalty=0.0, tools=[], logit_bias={})
    completions(echo=False, suffix="", best_of=2, n=2)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("", ("",)),
        ([1, 2], ((1, 2),)),
        (["a", "b"], ("a", "b")),
        ([[1], [2, 3]], ((1,), (2, 3))),
        (["a", [2]], ("a", (2,))),
    ],
)
def test_prompts(prompt, expected):
    assert completions(prompt=prompt).prompts == expected


def test_parts_of_text_are_joined():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    asked = chat(messages=[{"role": "user", "content": parts, "name": "me"}])
    assert asked.messages == ({"role": "user", "content": "ab", "name": "me"},)


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"model": None}, "model", "missing"),
        ({"prompt": None}, "prompt", "must be a text"),
        ({"prompt": []}, "prompt", "must be a text"),
        ({"prompt": [[]]}, "prompt", "must be a text"),
        ({"prompt": [1.5]}, "prompt", "must be a text"),
        ({"prompt": [True]}, "prompt", "must be a text"),
        ({"prompt": "\ud800"}, "prompt", "surrogate"),
        ({"prompt": ["a"] * 9}, "prompt", "9 prompts x n 1 exceed this server's 8 choices"),
        ({"n": 0}, "n", "an integer from 1 to 8"),
        ({"n": 9}, "n", "an integer from 1 to 8"),
        ({"n": True}, "n", "an integer"),
        ({"n": 2, "best_of": 3}, "best_of", "not supported"),
        ({"max_tokens": 51}, "max_tokens", "an integer from 1 to 50"),
        ({"max_tokens": 0}, "max_tokens", "an integer from 1 to 50"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "differs"),
        ({"temperature": -0.1}, "temperature", "a number from 0 to 2"),
        ({"temperature": float("inf")}, "temperature", "a number from 0 to 2"),
        ({"temperature": "1"}, "temperature", "a number"),
        ({"top_p": 0}, "top_p", "more than 0"),
        ({"top_p": 1.1}, "top_p", "a number from 0 to 1"),
        ({"top_k": -2}, "top_k", "an integer"),
        ({"min_p": 2}, "min_p", "a number from 0 to 1"),
        ({"repetition_penalty": 0}, "repetition_penalty", "a number from 0.01"),
        ({"seed": 1 << 64}, "seed", "an integer"),
        ({"logprobs": 6}, "logprobs", "an integer from 0 to 5"),
        ({"logprobs": True}, "logprobs", "an integer"),
        ({"stop": ""}, "stop", "none of them empty"),
        ({"stop": ["a"] * 5}, "stop", "at most 4"),
        ({"stream": 1}, "stream", "true or false"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "needs stream"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "unknown field"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage", "true or false"),
        ({"echo": True}, "echo", "not supported"),
        ({"suffix": "b"}, "suffix", "not supported"),
        ({"logit_bias": {"1": 2}}, "logit_bias", "not supported"),
        ({"frequency_penalty": 0.1}, "frequency_penalty", "not supported"),
        ({"temperatures": 1}, "temperatures", "did you mean temperature?"),
        ({"xyz": 1}, "xyz", "unknown field xyz; leave it out"),
    ],
)
def test_what_completions_refuse(fields, param, message):
    with pytest.raises(ApiError) as refused:
        completions(**fields)
    assert refused.value.status == 400 and refused.value.param == param
    assert param in refused.value.message and message in refused.value.message
    assert len(refused.value.message.splitlines()) == 1


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": ["hello"]}, "messages[0]"),
        ({"messages": [*HELLO, {"content": "a"}]}, "messages[1].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "\udfff"}]}, "messages[0].content"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}, "messages[0].tool_calls"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": 1}, "logprobs"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"functions": [{}]}, "functions"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"audio": {"voice": "x"}}, "audio"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"prompt": "a"}, "prompt"),
    ],
)
def test_what_chat_refuses(fields, param):
    with pytest.raises(ApiError) as refused:
        chat(**fields)
    assert refused.value.status == 400 and refused.value.param == param and param in refused.value.message


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"1", b"\xff", b'{"temperature": NaN}', b"[" * 100_000, b'{"n": ' + b"9" * 5000 + b"}"],
)
def test_a_body_that_is_no_object_is_refused(content):
    with pytest.raises(ApiError) as refused:
        parse_json(content)
    assert refused.value.status == 400 and refused.value.code == "invalid_json"
    assert json.loads(json.dumps(refused.value.body))["error"]["type"] == "invalid_request_error"
