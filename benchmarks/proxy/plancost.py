"""What a plan in force costs a request: the application with and without planning, where nothing else takes time."""

from __future__ import annotations

import asyncio
import statistics
import time
from unittest.mock import patch

import httpx
import uvloop

from benchmarks.proxy.contenders import CARDS, Contender, chat_body
from proxy.app import Proxy, create_app
from proxy.config.settings import load_settings
from proxy.gpus.static import StaticSource
from proxy.wire.asgi import Message
from proxy.wire.forward import ClientRequest, Forwarder
from proxy.wire.replies import Reply

REQUESTS = 500
ROUNDS = 21


def plan_cost_us(upstream: Contender) -> float:
    """Microseconds that a request takes longer for its plan: the median over rounds. ``upstream`` says what there is to plan."""
    return uvloop.run(_measure(upstream.port))


async def _measure(port: int) -> float:
    settings = load_settings(host="127.0.0.1:11435", upstream=f"http://127.0.0.1:{port}", state="off")
    app = create_app(settings, source=StaticSource.from_arguments(CARDS))
    sent: list[bytes] = []

    async def open_(_: Forwarder, request: ClientRequest, body: bytes | None = None) -> httpx.Response | Reply:
        sent.append(b"".join([part async for part in request.stream()]) if body is None else body)
        return Reply(status=200, body=b"{}")

    with patch.object(Forwarder, "open", open_):
        return await _plan_cost_us(app, sent)


async def _plan_cost_us(app: Proxy, sent: list[bytes]) -> float:
    """``sent``: the bodies that would have gone to Ollama."""
    body = chat_body(0)

    async def ask(path: str) -> None:
        messages: list[Message] = [{"type": "http.request", "body": body}]
        never = asyncio.get_running_loop().create_future()

        async def receive() -> Message:
            return messages.pop() if messages else await never

        async def send(_: Message) -> None:
            pass

        headers = [(b"host", b"127.0.0.1:11435"), (b"content-length", b"%d" % len(body)), (b"content-type", b"application/json")]
        scope = {
            "type": "http",
            "method": "POST",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": headers,
        }
        await app({**scope, "client": ("127.0.0.1", 50000)}, receive, send)

    async def timed(path: str) -> float:
        began = time.perf_counter()
        for _ in range(REQUESTS):
            await ask(path)
        return (time.perf_counter() - began) / REQUESTS

    await ask("/api/chat")
    if b'"main_gpu"' not in sent[-1]:
        raise RuntimeError("no plan is in force")
    await timed("/api/other")
    costs = []
    for _ in range(ROUNDS):
        await ask("/api/chat")
        costs.append(await timed("/api/chat") - await timed("/api/other"))
    return statistics.median(costs) * 1e6
