"""The simulator on HTTP: routes, the checks before them, and the client that leaves."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import replace

from proxy.simulator import answers, compatible, library
from proxy.simulator.exchange import Exchange, Handler, RequestError
from proxy.simulator.http import Receive, Request, Response, Scope, Send, error, host_allowed, origin_headers, respond
from proxy.simulator.simulation import Simulator

_BLOB = re.compile(r"/api/blobs/[^/]+")


class ClientLeftError(Exception):
    """The client closed the connection before its request was complete."""


ROUTES: dict[str, dict[str, Handler]] = {
    "/": {"GET": library.root, "HEAD": library.root},
    "/api/version": {"GET": library.version, "HEAD": library.version},
    "/api/tags": {"GET": library.tags, "HEAD": library.tags},
    "/api/ps": {"GET": library.ps},
    "/api/show": {"POST": library.show_model},
    "/api/generate": {"POST": answers.generate},
    "/api/chat": {"POST": answers.chat},
    "/api/embed": {"POST": answers.embed},
    "/api/embeddings": {"POST": answers.embeddings},
    "/api/create": {"POST": library.create},
    "/api/copy": {"POST": library.copy},
    "/api/delete": {"DELETE": library.delete},
    "/api/pull": {"POST": library.pull},
    "/v1/models": {"GET": compatible.models},
    "/v1/chat/completions": {"POST": compatible.chat_completions},
    "/v1/completions": {"POST": compatible.completions},
    "/v1/embeddings": {"POST": compatible.embeddings},
    "/v1/responses": {"POST": compatible.responses},
    "/v1/messages": {"POST": compatible.messages},
    "/simulator/history": {"GET": library.history},
}


class SimulatorApp:
    """The ASGI application of one simulator."""

    def __init__(self, simulator: Simulator) -> None:
        self.simulator = simulator

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one HTTP request; lifespan messages are taken note of."""
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, send)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        request = Request(method=scope["method"], path=scope["path"], headers=headers)
        methods = _methods(request.path)
        allowed = ", ".join(methods) if methods and request.method not in methods else None
        status, extra = origin_headers(request, allowed_methods=allowed)
        if status is None and not host_allowed(headers.get("host", "")):
            status, extra = 403, []
        if status is not None:
            await respond(send, Response(status=status), extra)
        elif methods is None:
            await respond(send, Response(status=404, content_type="text/plain", body=b"404 page not found"), extra)
        elif allowed:
            refusal = Response(status=405, content_type="text/plain", body=b"405 method not allowed", headers={"Allow": allowed})
            await respond(send, refusal, extra)
        else:
            await self._handle(methods[request.method], request, receive, send, extra)

    async def _handle(
        self, handler: Handler, request: Request, receive: Receive, send: Send, extra: list[tuple[str, str]]
    ) -> None:
        try:
            if handler is library.blob:
                self.simulator.note(request)
                return await self._answer(handler, request, send, extra, chunks=_chunks(receive))
            request = replace(request, body=b"".join([chunk async for chunk in _chunks(receive)]))
        except ClientLeftError:
            self.simulator.cancelled += 1
            return None
        self.simulator.note(request)
        answer = asyncio.create_task(self._answer(handler, request, send, extra), name=f"simulate {request.path}")
        watcher = asyncio.create_task(_left(receive), name="simulator watches its client")
        try:
            await asyncio.wait((answer, watcher), return_when=asyncio.FIRST_COMPLETED)
        finally:
            left = not answer.done()
            answer.cancel()
            watcher.cancel()
            await asyncio.gather(answer, watcher, return_exceptions=True)
        if left:
            self.simulator.cancelled += 1
            return None
        return answer.result()

    async def _answer(
        self,
        handler: Handler,
        request: Request,
        send: Send,
        extra: list[tuple[str, str]],
        *,
        chunks: AsyncIterator[bytes] | None = None,
    ) -> None:
        async with AsyncExitStack() as stack:
            exchange = Exchange(simulator=self.simulator, request=request, stack=stack, chunks=chunks)
            try:
                response = await handler(exchange)
            except RequestError as problem:
                response = _failure(request.path, problem)
            await respond(send, response, extra)


def create_app(simulator: Simulator) -> SimulatorApp:
    """The ASGI application of ``simulator``; run it with ``server_header=False``, as Ollama names no server."""
    return SimulatorApp(simulator)


def _methods(path: str) -> dict[str, Handler] | None:
    if path.startswith("/v1/models/"):
        return {"GET": compatible.model}
    if _BLOB.fullmatch(path):
        return {"POST": library.blob, "HEAD": library.blob}
    return ROUTES.get(path)


def _failure(path: str, problem: RequestError) -> Response:
    if path == "/v1/messages":
        return compatible.anthropic_error(problem)
    if path.startswith("/v1/"):
        return compatible.openai_error(problem)
    return error(problem.status, problem.message)


async def _chunks(receive: Receive) -> AsyncIterator[bytes]:
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientLeftError
        yield message.get("body", b"")
        more = message.get("more_body", False)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return
