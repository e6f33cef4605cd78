"""Chat completions with OpenAI's client, within this process: the application, the engine, and a template."""

import asyncio

import httpx2
import openai
import pytest
import torch

from models.generation import Engine, Request, Sampling
from tests.helpers import WAIT
from tests.launch.serving import write_model
from trainer.serving.app import Application
from trainer.serving.config import ServeConfig
from trainer.serving.errors import unavailable
from trainer.serving.metrics import Metrics
from trainer.serving.scheduler import Scheduler
from trainer.serving.service import Served, Service
from trainer.stored.inference import load_model

TALK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load_model(write_model(tmp_path_factory.mktemp("model")), torch.device("cpu"))


@pytest.fixture(scope="module")
def talk(loaded):
    """Run a coroutine that is given a client; messages are rendered as `role: content` lines."""
    tokenizer = loaded.tokenizer

    def render(messages):
        if messages[-1]["role"] != "user":
            raise ValueError("the last message must be the user's")
        lines = [f"{message['role']}: {message['content']}\n" for message in messages]
        return tokenizer.encode("".join([*lines, "assistant: "]))

    def make_engine():
        return Engine(loaded.model, slots=4, vocab_size=tokenizer.vocab_size)

    def run(test):
        metrics = Metrics()
        scheduler = Scheduler(make_engine, 8, metrics)
        config = ServeConfig(str(loaded.path), max_prompt_tokens=100, max_new_tokens=50)
        service = Service(Served("tiny", tokenizer, (tokenizer.eod_id,), render), scheduler, config)
        transport = httpx2.ASGITransport(Application(service, metrics).asgi)
        web = openai.DefaultAsyncHttpxClient(transport=transport)

        async def within():
            scheduler.start()
            try:
                async with asyncio.timeout(WAIT), web:
                    options = {"base_url": "http://server/v1", "api_key": "none", "max_retries": 0}
                    return await test(openai.AsyncOpenAI(http_client=web, **options).chat.completions)
            finally:
                scheduler.stop(unavailable("over"))

        return asyncio.run(within())

    run.render = render
    return run


def test_an_answer_continues_the_rendered_conversation(talk, loaded):
    asked = {"model": "tiny", "messages": TALK, "max_tokens": 20, "seed": 1, "logprobs": True, "top_logprobs": 3}
    answer = talk(lambda chat: chat.create(**asked, n=2))
    prompt, decode = talk.render(TALK), loaded.tokenizer.decode
    sampling = Sampling(20, seed=1, stop_tokens=(loaded.tokenizer.eod_id,), top_log_probs=3)
    engine = Engine(loaded.model, slots=4, vocab_size=loaded.tokenizer.vocab_size)
    for choice, sample in zip(answer.choices, engine.generate([Request(prompt, sampling, 2)])[0], strict=True):
        assert choice.message.role == "assistant"
        assert choice.message.content == decode([*prompt, *sample.content]).removeprefix(decode(prompt))
        assert [token.logprob for token in choice.logprobs.content] == pytest.approx(
            sample.log_probs[: len(sample.content)]
        )
        assert all(len(token.top_logprobs) == 3 for token in choice.logprobs.content)
        assert choice.finish_reason == sample.finish
    assert answer.usage.prompt_tokens == len(prompt)


def test_a_stream_adds_up_to_the_whole(talk):
    asked = {"model": "tiny", "messages": TALK, "max_completion_tokens": 20, "seed": 2}

    async def both(chat):
        stream = await chat.create(**asked, stream=True, stream_options={"include_usage": True})
        return await chat.create(**asked), [chunk async for chunk in stream]

    whole, chunks = talk(both)
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].usage == whole.usage
    deltas = [chunk.choices[0] for chunk in chunks[:-1]]
    assert "".join(choice.delta.content or "" for choice in deltas) == whole.choices[0].message.content
    assert [choice.finish_reason for choice in deltas if choice.finish_reason] == [whole.choices[0].finish_reason]


def test_what_the_template_refuses_is_a_400(talk):
    with pytest.raises(openai.BadRequestError, match="the last message must be the user's") as refused:
        talk(lambda chat: chat.create(model="tiny", messages=[*TALK, {"role": "assistant", "content": "Hi"}]))
    assert refused.value.param == "messages"
    with pytest.raises(openai.BadRequestError, match=r"messages: .* tokens are more than this server's 100"):
        talk(lambda chat: chat.create(model="tiny", messages=[{"role": "user", "content": "x y z " * 100}]))
    with pytest.raises(openai.BadRequestError, match="tools: not supported"):
        talk(lambda chat: chat.create(model="tiny", messages=TALK, tools=[{"type": "function"}]))
