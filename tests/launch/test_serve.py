"""The HTTP server with OpenAI's own client, and with clients that misbehave."""

import contextlib
import http.client
import json
import signal
import socket
import struct
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import torch

from models.generation import Engine, Request, Sampling
from tests.helpers import WAIT
from tests.launch.serving import VOCABULARY, Server, write_model
from trainer.data.chat import ChatTemplate
from trainer.stored.inference import load_model

PROMPT = "def main("
TALK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello <|endoftext|>"}]
# The most likely tokens of this model repeat themselves and never end.
ENDLESS = {"model": "tiny", "prompt": "a", "temperature": 0}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def loaded(model):
    return load_model(model, torch.device("cpu"))


@pytest.fixture(scope="module")
def server(model):
    # Deterministic: answers are compared to the last bit while others run.
    options = ("--slots=4", "--queue=300", "--max_new_tokens=400", "--max_prompt_tokens=500", "--deterministic=true")
    server = Server(model, *options, "--max_body_bytes=100000")
    yield server
    server.stop()


def client_of(server, key="none"):
    return openai.OpenAI(base_url=f"{server.address}/v1", api_key=key, max_retries=0, timeout=WAIT)


@pytest.fixture(scope="module")
def client(server):
    return client_of(server)


@pytest.fixture
def another(model):
    """Start servers of its own options; they are ended with the test."""
    servers = []

    def begin(*options, **environment):
        servers.append(Server(model, *options, **environment))
        return servers[-1]

    yield begin
    for server in servers:
        if server.process.poll() is None:
            server.stop()


def expected(loaded, prompt, samples=1, **sampling):
    """Completions by the engine itself."""
    tokenizer = loaded.tokenizer
    tokens = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    request = Request(tuple(tokens), Sampling(stop_tokens=(tokenizer.eod_id,), **sampling), samples)
    engine = Engine(loaded.model, vocab_size=tokenizer.vocab_size, deterministic=True)
    return engine.generate([request])[0]


def text_of(loaded, prompt, completion):
    tokens = loaded.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    decode = loaded.tokenizer.decode
    return decode([*tokens, *completion.content]).removeprefix(decode(tokens))


def post(server, path, body, headers=()):
    """Status and JSON of a request that openai's client would not send."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=WAIT)
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request("POST", path, content, {"Content-Type": "application/json", **dict(headers)})
    answer = connection.getresponse()
    found = answer.status, json.loads(answer.read())
    connection.close()
    return found


def connect(server, body):
    """A socket on which a request for a completion has been sent."""
    connection = socket.socket()
    connection.settimeout(WAIT)
    connection.connect(("127.0.0.1", server.port))
    content = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
    )
    connection.sendall(head.encode() + b"\r\n\r\n" + content)
    return connection


# Completions


def test_a_completion_is_what_the_engine_gives(client, loaded):
    sampling = {"temperature": 0.8, "top_p": 0.9, "seed": 5}
    reference = expected(loaded, PROMPT, samples=2, max_new_tokens=30, top_log_probs=2, **sampling)
    answer = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=30, n=2, logprobs=2, **sampling)
    assert [choice.text for choice in answer.choices] == [text_of(loaded, PROMPT, sample) for sample in reference]
    assert [choice.finish_reason for choice in answer.choices] == [sample.finish for sample in reference]
    for choice, sample in zip(answer.choices, reference, strict=True):
        assert choice.logprobs.token_logprobs == list(sample.log_probs[: len(sample.content)])
        assert choice.logprobs.text_offset[0] == 0 and len(choice.logprobs.tokens) == len(sample.content)
        assert all(2 <= len(top) <= 3 or "\ufffd" in top for top in choice.logprobs.top_logprobs)
    usage = answer.usage
    assert usage.completion_tokens == sum(len(sample.tokens) for sample in reference)
    assert usage.prompt_tokens == len(loaded.tokenizer.encode(PROMPT))
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_extensions_arrive_at_the_engine(client, loaded):
    extensions = {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.5}
    (reference,) = expected(loaded, PROMPT, max_new_tokens=20, seed=3, **extensions)
    answer = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=20, seed=3, extra_body=extensions)
    assert answer.choices[0].text == text_of(loaded, PROMPT, reference)


def test_prompts_may_be_several_texts_or_tokens(client, loaded):
    prompts = ["import json", "class A:", ""]
    answer = client.completions.create(model="tiny", prompt=prompts, max_tokens=8, temperature=0, n=2)
    assert [choice.index for choice in answer.choices] == list(range(6))
    for place, prompt in enumerate(prompts):
        (reference,) = expected(loaded, prompt or [loaded.tokenizer.eod_id], max_new_tokens=8, temperature=0)
        text = text_of(loaded, prompt or [loaded.tokenizer.eod_id], reference)
        assert [answer.choices[2 * place + sample].text for sample in (0, 1)] == [text, text]
    tokens = loaded.tokenizer.encode("class A:")
    for form in (tokens, [tokens]):
        again = client.completions.create(model="tiny", prompt=form, max_tokens=8, temperature=0)
        assert again.choices[0].text == answer.choices[2].text


def test_a_stream_adds_up_to_the_whole(client):
    asked = {"model": "tiny", "prompt": PROMPT, "max_tokens": 40, "seed": 1, "n": 2, "logprobs": 1}
    whole = client.completions.create(**asked)
    chunks = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].usage == whole.usage and chunks[-1].choices == []
    assert all(chunk.usage is None for chunk in chunks[:-1]) and len({chunk.id for chunk in chunks}) == 1
    for index, choice in enumerate(whole.choices):
        parts = [part for chunk in chunks for part in chunk.choices if part.index == index]
        assert len(parts) > 10, "it was not sent as it came"
        assert "".join(part.text for part in parts) == choice.text
        assert [part.finish_reason for part in parts] == [None] * (len(parts) - 1) + [choice.finish_reason]
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            joined = [item for part in parts for item in getattr(part.logprobs, name)]
            assert joined == getattr(choice.logprobs, name)


def test_a_stop_string_ends_a_choice(client):
    asked = {"model": "tiny", "prompt": PROMPT, "max_tokens": 60, "seed": 1}
    whole = client.completions.create(**asked).choices[0]
    middle = whole.text[len(whole.text) // 2 :][:3]
    stopped = client.completions.create(**asked, stop=["never in it", middle])
    assert stopped.choices[0].text == whole.text[: whole.text.index(middle)]
    assert stopped.choices[0].finish_reason == "stop" and stopped.usage.completion_tokens < 60
    chunks = client.completions.create(**asked, stop=middle, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == stopped.choices[0].text


def test_a_choice_that_ends_early_gives_back_its_slot_while_the_others_go_on(client, server):
    whole = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=120, n=2, seed=1)
    early = whole.choices[0].text[5:10]
    assert early not in whole.choices[1].text
    asked = {"model": "tiny", "prompt": PROMPT, "max_tokens": 120, "seed": 1, "stop": early, "n": 2}
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(client.completions.create, **asked)
        seen = set()
        while not running.done():
            seen.add(server.figures()["slots_in_use"])
        assert {1, 2} <= seen
    assert [choice.text for choice in running.result().choices] == [whole.choices[0].text[:5], whole.choices[1].text]


# Chat completions


def test_an_answer_continues_the_rendered_conversation(client, loaded):
    prompt = ChatTemplate(loaded.tokenizer).encode(TALK)
    reference = expected(loaded, prompt, samples=2, max_new_tokens=20, seed=1, top_log_probs=3)
    asked = {"model": "tiny", "messages": TALK, "max_tokens": 20, "seed": 1, "logprobs": True, "top_logprobs": 3}
    answer = client.chat.completions.create(**asked, n=2)
    for choice, sample in zip(answer.choices, reference, strict=True):
        assert choice.message.role == "assistant" and choice.message.content == text_of(loaded, prompt, sample)
        assert [token.logprob for token in choice.logprobs.content] == list(sample.log_probs[: len(sample.content)])
        assert all(len(token.top_logprobs) == 3 for token in choice.logprobs.content)
        assert choice.finish_reason == sample.finish
    assert answer.usage.prompt_tokens == len(prompt)


def test_a_stream_of_chat_adds_up_to_the_whole(client):
    asked = {"model": "tiny", "messages": TALK, "max_completion_tokens": 20, "seed": 2}
    whole = client.chat.completions.create(**asked)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(client.chat.completions.create(**asked, **options))
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].usage == whole.usage
    deltas = [chunk.choices[0] for chunk in chunks[:-1]]
    assert "".join(choice.delta.content or "" for choice in deltas) == whole.choices[0].message.content
    assert [choice.finish_reason for choice in deltas if choice.finish_reason] == [whole.choices[0].finish_reason]


def test_conversations_that_are_refused(client):
    with pytest.raises(openai.BadRequestError, match="the last message must be the user's") as refused:
        client.chat.completions.create(model="tiny", messages=[*TALK, {"role": "assistant", "content": "Hi"}])
    assert refused.value.param == "messages"
    with pytest.raises(openai.BadRequestError, match=r"messages: \d+ tokens are more than this server's 500"):
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x y z " * 500}])
    with pytest.raises(openai.BadRequestError, match="tools: not supported"):
        client.chat.completions.create(model="tiny", messages=TALK, tools=[{"type": "function"}])


def test_without_a_template_there_is_no_chat(another, loaded, tmp_path):
    tokenizer = tmp_path / "plain"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.model").write_bytes(loaded.tokenizer.model)
    with pytest.raises(openai.BadRequestError, match="the tokenizer has no chat template: put chat_template"):
        client_of(another("--tokenizer", str(tokenizer))).chat.completions.create(model="tiny", messages=TALK)


def test_the_model_is_listed(client, server):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "spiketrain"
    assert json.loads(server.get("/health")) == {"status": "ready"}


# What is refused


def test_openai_s_client_raises_its_own_errors(client):
    with pytest.raises(openai.NotFoundError) as unknown:
        client.completions.create(model="gpt-5", prompt="a")
    assert unknown.value.code == "model_not_found" and unknown.value.param == "model"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-5")
    with pytest.raises(openai.BadRequestError, match="echo: not supported"):
        client.completions.create(model="tiny", prompt="a", echo=True)
    with pytest.raises(openai.BadRequestError, match=f"from 0 to {VOCABULARY - 1}"):
        client.completions.create(model="tiny", prompt=[VOCABULARY])


def test_a_prompt_that_is_too_long_is_refused_and_others_go_on(client, server):
    reference = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=200, seed=2)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(client.completions.create, model="tiny", prompt=PROMPT, max_tokens=200, seed=2)
        with pytest.raises(openai.BadRequestError) as refused:
            client.completions.create(model="tiny", prompt="x y z " * 15_000)
        assert refused.value.code == "context_length_exceeded" and "this server's 500" in refused.value.message
        with pytest.raises(openai.APIStatusError) as refused:
            client.completions.create(model="tiny", prompt="x" * 200_000)
        assert refused.value.status_code == 413 and refused.value.code == "body_too_large"
        assert running.result().choices[0].text == reference.choices[0].text


@pytest.mark.parametrize(
    ("path", "body", "headers", "status", "code"),
    [
        ("/v1/completions", b"{", {}, 400, "invalid_json"),
        ("/v1/completions", b"\xff\xfe", {}, 400, "invalid_json"),
        ("/v1/completions", b"", {}, 400, "invalid_json"),
        ("/v1/chat/completions", b"[]", {}, 400, "invalid_json"),
        ("/v1/completions", {"prompt": "a"}, {}, 400, "invalid_value"),
        ("/v1/completions", {"prompt": "a", "model": "m" * 9000}, {}, 404, "model_not_found"),
        ("/v1/completions", {"prompt": "a", "model": "tiny", "m" * 9000: 1}, {}, 400, "unknown_parameter"),
        ("/v1/completions", {}, {"Content-Type": "text/plain"}, 415, "unsupported_media_type"),
        ("/v1/completions", {}, {"Content-Length": "999999999999"}, 413, "body_too_large"),
        ("/v1/embeddings", {}, {}, 404, None),
        ("/v1/models", {}, {}, 405, None),
    ],
)
def test_malformed_requests(server, path, body, headers, status, code):
    found, answer = post(server, path, body, headers)
    assert (found, answer["error"]["code"]) == (status, code)
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert answer["error"]["type"] == "invalid_request_error" and len(json.dumps(answer)) < 600


def test_a_body_without_a_length_is_cut_at_the_limit(server):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=WAIT)
    parts = (b"x" * 10_000 for _ in range(50))
    connection.request("POST", "/v1/completions", parts, {"Content-Type": "application/json"}, encode_chunked=True)
    assert connection.getresponse().status == 413


def test_nonsense_on_the_wire_harms_nobody(server, client):
    for nonsense in (
        b"\x16\x03\x01\x02\x00",
        b"GET\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
    ):
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.settimeout(WAIT)
            connection.sendall(nonsense)
            connection.shutdown(socket.SHUT_WR)
            connection.recv(1000)
    assert client.completions.create(model="tiny", prompt="a", max_tokens=1).usage.completion_tokens == 1


# Clients that leave, or are too many


def drop(server, number):
    """Connect, ask for much, and leave at some point, every other time without saying so."""
    stream = bool(number % 3)
    body = ENDLESS | {"prompt": f"class A{number}:", "max_tokens": 400, "stream": stream, "n": 1 + number % 2}
    connection = connect(server, body)
    if number % 5 == 0 and stream:
        connection.settimeout(0.2)
        with contextlib.suppress(TimeoutError):
            connection.recv(100)
    if number % 2:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_clients_that_leave_leave_no_slot_behind(server, client, count):
    asked = {"model": "tiny", "prompt": PROMPT, "max_tokens": 100, "seed": 4, "logprobs": 0}
    reference = client.completions.create(**asked)
    before = server.wait_until_idle()
    left = 'requests_total{endpoint="/v1/completions",status="499"}'
    with ThreadPoolExecutor(8) as pool:
        running = pool.submit(client.completions.create, **asked)
        list(pool.map(lambda number: drop(server, number), range(count)))
        assert running.result().choices == reference.choices
    after = server.wait_until_idle()
    # Some were refused before they left, because the queue was full.
    refused = 'requests_total{endpoint="/v1/completions",status="429"}'
    gone = sum(after.get(name, 0) - before.get(name, 0) for name in (left, refused))
    assert gone == count and after[left] - before.get(left, 0) > count / 2
    assert client.completions.create(**asked).choices == reference.choices


def test_more_than_the_queue_holds_is_refused_at_once(another):
    server = another("--slots=1", "--queue=1")
    client = client_of(server)
    # A stream begins with its first token, so the one that waits is on a socket.
    with (
        client.completions.create(**ENDLESS, max_tokens=2048, stream=True),
        connect(server, ENDLESS | {"max_tokens": 2048}),
    ):
        while server.figures()["queue_length"] == 0:
            time.sleep(0.01)
        with pytest.raises(openai.RateLimitError) as refused:
            client.completions.create(model="tiny", prompt="b")
        assert refused.value.code == "queue_full" and refused.value.response.headers["retry-after"] == "1"
    server.wait_until_idle()
    assert client.completions.create(model="tiny", prompt="b", max_tokens=1).choices


def test_a_request_that_takes_too_long_is_given_up(another):
    server = another("--request_seconds=0.5", "--max_new_tokens=100000")
    client = client_of(server)
    with pytest.raises(openai.InternalServerError) as refused:
        client.completions.create(**ENDLESS, max_tokens=100_000)
    assert refused.value.status_code == 503 and refused.value.code == "timeout"
    assert refused.value.response.headers["x-should-retry"] == "false"
    stream = client.completions.create(**ENDLESS, max_tokens=100_000, stream=True)
    with pytest.raises(openai.APIError, match=r"took longer than 0\.5 seconds"):
        list(stream)
    # A body that does not come is given up, too.
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.settimeout(WAIT)
        head = (
            "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{"
        )
        connection.sendall(head.encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 503")
    server.wait_until_idle()


# Keys, addresses, signals


def test_a_key_is_needed_where_one_is_set(another):
    server = another("--host=0.0.0.0", SPIKETRAIN_API_KEY="secret")
    server.address = f"http://127.0.0.1:{server.port}"
    assert client_of(server, "secret").completions.create(model="tiny", prompt="a", max_tokens=1).choices
    for key in ("Secret", "secret2", "", "é"):
        status, answer = post(server, "/v1/completions", {}, {"Authorization": f"Bearer {key}".encode()})
        assert status == 401 and answer["error"]["code"] == "invalid_api_key"
    with pytest.raises(openai.AuthenticationError):
        client_of(server, "wrong").models.list()
    with pytest.raises(urllib.error.HTTPError, match="401"):
        server.get("/metrics")
    assert json.loads(server.get("/health")) == {"status": "ready"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--checkpoint", "nowhere"), "nowhere does not exist"),
        (("--slots", "0"), "slots is 0: it must be at least 1"),
        (("--queue=-1",), "queue is -1: it must not be negative"),
        (("--request_seconds", "0"), "request_seconds is 0.0: it must be positive"),
        (("--port", "65536"), "port is 65536"),
        (("--api_key", "é"), "api_key has characters"),
        (("--slotz", "3"), "did you mean 'slots'"),
    ],
)
def test_bad_settings_are_one_line_before_torch(launch, model, arguments, message):
    code, _, errors, imported = launch("serve", "--checkpoint", str(model), *arguments)
    assert code == 2 and len(errors.strip().splitlines()) == 1 and message in errors
    assert imported == []


def test_addresses_that_cannot_be_served_are_one_line_before_the_model(launch, model):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for arguments, message in (
            (("--port", str(port)), f"127.0.0.1:{port} cannot be listened on (Address already in use)"),
            (("--host", "0.0.0.0"), "host 0.0.0.0 can be reached from other machines: set api_key"),
            (("--host", "a" * 70), "is no address of this machine"),
            (("--host", "no.such.host.invalid"), "'no.such.host.invalid' is no address"),
        ):
            code, output, errors, _ = launch("serve", "--checkpoint", str(model), *arguments, forked=True)
            assert (code, output) == (2, "") and len(errors.strip().splitlines()) == 1 and message in errors


def test_a_signal_lets_what_is_in_flight_finish(another):
    server = another()
    client = client_of(server)
    with ThreadPoolExecutor(1) as pool:
        stream = client.completions.create(**ENDLESS, max_tokens=250, stream=True)
        chunks = [next(stream)]
        whole = pool.submit(client.completions.create, **ENDLESS, max_tokens=250)
        while server.figures()["slots_in_use"] < 2:
            time.sleep(0.01)
        server.process.send_signal(signal.SIGTERM)
        while not is_draining(server.address):
            time.sleep(0.01)
        with pytest.raises(openai.InternalServerError) as refused:
            client.completions.create(**ENDLESS, max_tokens=1)
        assert refused.value.status_code == 503 and "shutting down" in refused.value.message
        chunks += list(stream)
        assert chunks[-1].choices[0].finish_reason == "length"
        assert whole.result().usage.completion_tokens == 250
    assert server.process.wait(WAIT) == 0
    assert server.process.output() == f"serving tiny at {server.address}/v1\n"


def is_draining(address):
    try:
        urllib.request.urlopen(f"{address}/health", timeout=WAIT)
    except urllib.error.HTTPError as error:
        return error.code == 503 and json.loads(error.read()) == {"status": "draining"}
    return False


def test_what_does_not_finish_in_time_is_told(another):
    server = another("--drain_seconds=0.3", "--max_new_tokens=100000")
    stream = client_of(server).completions.create(**ENDLESS, max_tokens=100_000, stream=True)
    next(stream)
    server.process.send_signal(signal.SIGINT)
    with pytest.raises(openai.APIError, match="shutting down"):
        list(stream)
    assert server.process.wait(WAIT) == 0


def test_a_second_signal_ends_it_at_once(another):
    server = another("--max_new_tokens=100000", "--drain_seconds=600", "--request_seconds=600")
    stream = client_of(server).completions.create(**ENDLESS, max_tokens=100_000, stream=True)
    next(stream)
    for _ in range(2):
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
    assert server.process.wait(WAIT) == 0
