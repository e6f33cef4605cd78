"""The server on a socket with an engine that is quicker, or worse, than any model."""

import asyncio
import contextlib
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from tests.helpers import WAIT
from tests.trainer.serving.fakes import FakeEngine, FakeTokenizer
from trainer.serving.config import ServeConfig
from trainer.serving.server import Server, bind
from trainer.serving.service import Served


@contextlib.contextmanager
def serving(folder, make_engine, name="fake", **settings):
    """A server in a thread: its address, and what its end gives."""
    config = ServeConfig(str(folder), port=0, slots=2, **settings)
    addresses, announced = [], threading.Event()

    def announce(address):
        addresses.append(address)
        announced.set()

    running = Server(config, Served(name, FakeTokenizer(), (0,), list), make_engine, announce)
    with ThreadPoolExecutor(1) as pool:
        ended = pool.submit(lambda: asyncio.run(running.run_on(bind(config))))
        assert announced.wait(WAIT)
        try:
            yield addresses[0], ended
        finally:
            running.should_exit = True


def client_of(address):
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=WAIT)


def test_a_client_that_does_not_read_is_cut_off_while_others_are_answered(tmp_path):
    engine, name = FakeEngine(pause=0.0005), "m" * 30_000
    with serving(tmp_path, lambda: engine, name, max_new_tokens=1_000_000) as (address, _):
        host, port = address.removeprefix("http://").split(":")
        with socket.socket() as slow:
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            slow.settimeout(WAIT)
            slow.connect((host, int(port)))
            body = json.dumps({"model": name, "prompt": "a", "max_tokens": 1_000_000, "stream": True}).encode()
            head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}"
            slow.sendall(f"{head}\r\nContent-Type: application/json\r\n\r\n".encode() + body)
            client, end = client_of(address), time.monotonic() + WAIT
            while 0 not in engine.requests:
                time.sleep(0.01)
            while 0 in engine.requests:
                answer = client.completions.create(model=name, prompt="b", max_tokens=20)
                assert answer.choices[0].text == "x" * 20 and time.monotonic() < end
            parts = []
            while part := slow.recv(1 << 20):
                parts.append(part)
    rest = b"".join(parts).decode()
    assert rest.startswith("HTTP/1.1 200") and '"code":"slow_client"' in rest and "[DONE]" not in rest


def test_an_engine_that_cannot_start_again_ends_the_server_with_1(tmp_path, capsys):
    engines = [FakeEngine(failing_at=[(1, 3)])]
    with serving(tmp_path, lambda: engines.pop()) as (address, ended):
        with pytest.raises(openai.InternalServerError, match="not a number") as failed:
            client_of(address).completions.create(model="fake", prompt="a")
        assert failed.value.status_code == 500
        assert ended.result(WAIT) == 1
    assert "error: the engine has failed: IndexError" in capsys.readouterr().err


def test_a_request_that_breaks_the_server_s_own_code_is_a_500_with_a_trace(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(FakeTokenizer, "encode", lambda self, text: 1 / 0)
    with serving(tmp_path, FakeEngine) as (address, _):
        with pytest.raises(openai.InternalServerError) as failed:
            client_of(address).completions.create(model="fake", prompt="a")
        assert failed.value.code == "internal_error" and "ZeroDivisionError" not in failed.value.message
        assert client_of(address).completions.create(model="fake", prompt=[1]).choices[0].text == "x" * 16
    assert "ZeroDivisionError" in capsys.readouterr().err
