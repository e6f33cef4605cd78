"""The web application: routes, and the handler of requests for text."""

import asyncio
import sys
import time
import traceback
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from trainer.serving.answers import DONE, event
from trainer.serving.errors import ApiError, unavailable
from trainer.serving.metrics import Metrics
from trainer.serving.service import Service, Task

# What nginx logs for a client that left before the end of its answer.
_CLIENT_LEFT = 499
# A stream that fails has this long to say so.
_SECONDS_FOR_ERROR = 1.0
_STREAM_HEADERS = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"}


class Application:
    """The routes. An instance is what a web server calls.

    Args:
        service: What answers.
        metrics: Its figures.

    Attributes:
        asgi: The application.
        in_flight: Requests for text that are not complete.
    """

    def __init__(self, service: Service, metrics: Metrics) -> None:
        self._service, self._metrics = service, metrics
        self._started = int(time.time())
        self.in_flight = 0
        handlers: dict[Any, Any] = {ApiError: _to_json, HTTPException: _to_json}
        self.asgi = Starlette(
            routes=[
                Route("/health", self._health),
                Route("/metrics", self._figures),
                Route("/v1/models", self._models),
                Route("/v1/models/{name:path}", self._models),
                Route("/v1/completions", _Handler(self, service.complete), methods=["POST"]),
                Route("/v1/chat/completions", _Handler(self, service.chat), methods=["POST"]),
            ],
            exception_handlers=handlers,
        )

    async def _health(self, request: Request) -> Response:
        state = self._service.state
        return JSONResponse({"status": state}, 200 if state == "ready" else 503)

    async def _figures(self, request: Request) -> Response:
        self._service.require_key(request.headers.get("authorization", ""))
        return Response(self._metrics.text(), media_type=CONTENT_TYPE_LATEST)

    async def _models(self, request: Request) -> Response:
        self._service.require_key(request.headers.get("authorization", ""))
        name = self._service.served.name
        model = {"id": name, "object": "model", "created": self._started, "owned_by": "spiketrain"}
        if "name" not in request.path_params:
            return JSONResponse({"object": "list", "data": [model]})
        self._service.require_model(request.path_params["name"])
        return JSONResponse(model)

    async def begin(self, request: Request, begin: "_Begin") -> Task:
        """Read and check a request for text, and submit it.

        Raises:
            ApiError: it is refused.
            ClientDisconnect: the client is gone.
        """
        self._service.require_key(request.headers.get("authorization", ""))
        if self._service.is_draining:
            raise unavailable("the server is shutting down")
        # Before any work for it.
        self._service.scheduler.require_room(1)
        return await begin(await _body(request, self._service.config.max_body_bytes))

    @property
    def seconds(self) -> float:
        """How long a request may take."""
        return self._service.config.request_seconds

    def count(self, path: str, status: int) -> None:
        """Count a request that is complete."""
        self._metrics.requests.labels(path, str(status)).inc()


_Begin = Callable[[bytes], Awaitable[Task]]


async def _body(request: Request, most: int) -> bytes:
    """The body of a request for text.

    Raises:
        ApiError: 413 or 415.
        ClientDisconnect: the client is gone.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # Other types are what a web page may have its reader's browser send to this machine.
        raise ApiError(415, "the body must have Content-Type: application/json", code="unsupported_media_type")
    too_large = ApiError(413, f"the body has more than {most} bytes; shorten it", code="body_too_large")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > most:
        raise too_large
    content = bytearray()
    async for part in request.stream():
        content += part
        if len(content) > most:
            raise too_large
    return bytes(content)


class _Handler:
    """The route of requests for text. Any end of a request gives back its slots.

    Args:
        application: Where it belongs.
        begin: Begins to answer a body.
    """

    def __init__(self, application: Application, begin: _Begin) -> None:
        self._application, self._begin = application, begin

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        out = _Out(send)
        self._application.in_flight += 1
        try:
            error = await self._run(Request(scope, receive), receive, out)
            if error is not None:
                await out.fail(error)
        finally:
            self._application.in_flight -= 1
            self._application.count(scope["path"], out.status if out.is_complete else _CLIENT_LEFT)

    async def _run(self, request: Request, receive: Receive, out: "_Out") -> ApiError | None:
        """Answer; return the error that ends the answer instead, if there is one."""
        seconds = self._application.seconds
        try:
            async with asyncio.timeout(seconds):
                task = await self._application.begin(request, self._begin)
                with task.generation:
                    await _while_connected(receive, _send_stream(task, out) if task.asked.stream else _send(task, out))
        except ClientDisconnect:
            return None
        except ApiError as error:
            return error
        except TimeoutError:
            # Clients that try again would take as long again.
            headers = {"x-should-retry": "false"}
            return ApiError(503, f"the answer took longer than {seconds:g} seconds", code="timeout", headers=headers)
        except Exception:
            traceback.print_exc(file=sys.stderr)
            return ApiError(500, "the server failed at this request", code="internal_error")
        return None


class _Out:
    """The sending side of a request.

    Args:
        send: See ASGI.

    Attributes:
        status: The status that was sent; 0 before.
        is_complete: Whether the whole answer was sent.
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self.status, self.is_complete, self._streams = 0, False, False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        await self._send(message)
        self.is_complete = message["type"] == "http.response.body" and not message.get("more_body", False)

    async def respond(self, response: Response) -> None:
        """Send a whole answer."""
        await response({"type": "http"}, _never, self)

    async def stream(self, content: bytes) -> None:
        """Send part of a stream; the first one after its headers."""
        if not self._streams:
            self._streams = True
            headers = [(name.encode(), value.encode()) for name, value in _STREAM_HEADERS.items()]
            await self({"type": "http.response.start", "status": 200, "headers": headers})
        await self({"type": "http.response.body", "body": content, "more_body": True})

    async def end(self) -> None:
        """End a stream."""
        await self({"type": "http.response.body", "body": b"", "more_body": False})

    async def fail(self, error: ApiError) -> None:
        """Send an error, as the answer or as the last event of a stream. Nobody has to read it."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_SECONDS_FOR_ERROR):
                if not self.status:
                    await self.respond(_response(error))
                elif self._streams:
                    await self.stream(event(error.body))
                    await self.end()


async def _never() -> Message:
    raise AssertionError("a whole answer needs nothing from its client")


async def _send(task: Task, out: _Out) -> None:
    await out.respond(JSONResponse(await task.whole()))


async def _send_stream(task: Task, out: _Out) -> None:
    # What has arrived together is sent together.
    async for chunk in task.chunks():
        await out.stream(event(chunk))
    await out.stream(DONE)
    await out.end()


async def _while_connected(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Do the work, unless the client leaves before its end.

    Raises:
        ClientDisconnect: it has left. The work was cancelled.
    """
    working, leaving = asyncio.create_task(work), asyncio.create_task(_left(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        # The end of an answer looks like a client that leaves.
        if not working.done():
            raise ClientDisconnect
        working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _response(error: ApiError) -> Response:
    return JSONResponse(error.body, error.status, error.headers)


async def _to_json(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        # What the routes refuse: unknown paths and methods.
        message = f"{error.detail}: {request.method} {request.url.path}"
        error = ApiError(error.status_code, message, headers=dict(error.headers or {}))
    assert isinstance(error, ApiError)
    return _response(error)
