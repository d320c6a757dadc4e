"""The clients of a soak: what they ask, and what each request has come to."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Literal

import httpx

MODELS = ("qwen3:0.6b", "llama3.1:8b", "phi4:14b", "qwen2.5:32b")
EMBEDDER = "all-minilm:22m"

LOST_S = 90.0
"""A request that has come to nothing after this time is lost. No stall of the relay is longer than a few seconds."""

Outcome = Literal["answered", "error", "broken", "left", "wrong", "lost"]
"""``answered``: complete and right. ``error``: a status from 400 on with a text that says why. ``broken``: the connection
broke, and the client's library said so. ``left``: the client went away on purpose. ``wrong``: complete, but not what was asked
for, or an error without a text. ``lost``: nothing within ``LOST_S``."""


class WrongError(Exception):
    """An answer that looks complete and is not the right one."""


class Traffic:
    """Clients that ask until they are told to stop; ``outcomes`` counts by kind of request and by what came of it."""

    def __init__(self, url: str, *, seed: int, requests_per_s: float, clients: int) -> None:
        self.outcomes: Counter[tuple[str, Outcome]] = Counter()
        self.sent = 0
        self.notes: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self._url = url
        host, _, port = url.removeprefix("http://").rpartition(":")
        self._address = (host, int(port))
        self._random = random.Random(seed)
        self._pause_s = clients / requests_per_s
        self._clients = clients
        self._stopping = False
        self._kinds: dict[str, Callable[[httpx.AsyncClient, str], Awaitable[Outcome]]] = {
            "generate": self._generate,
            "chat stream": self._chat_stream,
            "/v1 stream": self._v1_stream,
            "embed": self._embed,
            "lists": self._lists,
            "own endpoints": self._own,
            "upload": self._upload,
            "image": self._image,
            "leaves": self._leaves,
            "leaves before the answer": self._leaves_early,
            "slow reader": self._slow_reader,
            "nonsense": self._nonsense,
            "unload": self._unload,
        }
        self._weights = (12, 12, 6, 5, 8, 5, 2, 2, 5, 3, 2, 3, 1)

    async def run(self, seconds: float) -> None:
        """Asks for that long, and then until the last answer."""
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        await asyncio.gather(*(self._client(end, number) for number in range(self._clients)))

    async def _client(self, end: float, number: int) -> None:
        loop = asyncio.get_running_loop()
        await asyncio.sleep(self._random.uniform(0, self._pause_s))
        while loop.time() < end:
            async with httpx.AsyncClient(base_url=self._url, timeout=None, trust_env=False) as client:  # a few to a connection
                for _ in range(self._random.randrange(1, 20)):
                    if loop.time() >= end:
                        return
                    await self._one(client, f"marker-{number}-{self.sent}")
                    await asyncio.sleep(self._random.expovariate(1 / self._pause_s))

    async def _one(self, client: httpx.AsyncClient, marker: str) -> None:
        kind = self._random.choices(tuple(self._kinds), self._weights)[0]
        self.sent += 1
        try:
            async with asyncio.timeout(LOST_S):
                outcome = await self._kinds[kind](client, marker)
        except TimeoutError:
            outcome = "lost"
            self.notes[f"{kind}: no end"] += 1
        except (httpx.TransportError, ConnectionError, asyncio.IncompleteReadError) as error:
            outcome = "broken"
            self.errors[f"{type(error).__name__}"] += 1
        except WrongError as error:
            outcome = "wrong"
            self.notes[f"{kind}: {error}"] += 1
        except Exception as error:  # noqa: BLE001 - an accident of the soak itself counts against it
            outcome = "wrong"
            self.notes[f"{kind}: {type(error).__name__}: {error}"] += 1
        self.outcomes[kind, outcome] += 1

    def _model(self) -> str:
        return self._random.choice(MODELS)

    async def _generate(self, client: httpx.AsyncClient, marker: str) -> Outcome:
        options = {"num_predict": 12} | self._random.choice(({}, {}, {"num_ctx": 8192}, {"main_gpu": 0}))
        body = {"model": self._model(), "prompt": marker, "stream": False, "options": options}
        answer = await client.post("/api/generate", json=body)
        if failed := self._failed(answer):
            return failed
        return _expect(answer.json()["response"], marker)

    async def _chat_stream(self, client: httpx.AsyncClient, marker: str) -> Outcome:
        body = {"model": self._model(), "messages": [{"role": "user", "content": marker}]}
        async with client.stream("POST", "/api/chat", json=body) as answer:
            if answer.status_code >= 400:
                await answer.aread()
                return self._failed(answer) or "wrong"
            text, done = "", False
            async for line in answer.aiter_lines():
                piece = json.loads(line)
                if "error" in piece:
                    return "error"
                text += piece["message"]["content"]
                done = piece["done"]
        if not done:
            raise WrongError("a stream ends cleanly without its last line")
        return _expect(text, marker)

    async def _v1_stream(self, client: httpx.AsyncClient, marker: str) -> Outcome:
        body = {"model": self._model(), "messages": [{"role": "user", "content": marker}], "stream": True}
        async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
            if answer.status_code >= 400:
                await answer.aread()
                return self._failed(answer) or "wrong"
            text, done = "", False
            async for line in answer.aiter_lines():
                if line == "data: [DONE]":
                    done = True
                elif line.startswith("data: "):
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        return "error"
                    text += "".join(choice["delta"].get("content") or "" for choice in event["choices"])
        if not done:
            raise WrongError("a stream of events ends cleanly without [DONE]")
        return _expect(text, marker)

    async def _embed(self, client: httpx.AsyncClient, marker: str) -> Outcome:
        answer = await client.post("/api/embed", json={"model": EMBEDDER, "input": [marker, "again"]})
        if failed := self._failed(answer):
            return failed
        if len(answer.json()["embeddings"]) != 2:
            raise WrongError("not two vectors")
        return "answered"

    async def _lists(self, client: httpx.AsyncClient, _: str) -> Outcome:
        method, path = self._random.choice(
            (
                ("GET", "/api/tags"),
                ("GET", "/api/ps"),
                ("GET", "/api/version"),
                ("HEAD", "/"),
                ("GET", "/v1/models"),
                ("GET", "/none"),
            )
        )
        answer = await client.request(method, path)
        if path == "/none" and answer.status_code == 404:
            return "answered"
        return self._failed(answer) or "answered"

    async def _own(self, client: httpx.AsyncClient, _: str) -> Outcome:
        path = self._random.choice(("health", "devices", "models", f"plan?model={self._model()}", "plan?model=none"))
        answer = await client.get("/lopsided/" + path)
        return self._failed(answer) or "answered"

    async def _upload(self, client: httpx.AsyncClient, marker: str) -> Outcome:
        data = hashlib.shake_256(marker.encode()).digest(self._random.randrange(2**20, 2**23))
        digest = hashlib.sha256(data).hexdigest()

        async def chunks() -> AsyncIterator[bytes]:
            for start in range(0, len(data), 65536):
                yield data[start : start + 65536]

        content = chunks() if self._random.random() < 0.5 else data
        answer = await client.post(f"/api/blobs/sha256:{digest}", content=content)
        if failed := self._failed(answer):
            return failed
        if answer.status_code != 201:
            raise WrongError(f"an upload ends with {answer.status_code}")
        return "answered"

    async def _image(self, client: httpx.AsyncClient, marker: str) -> Outcome:
        image = base64.b64encode(b"\xff" * 2**21).decode()
        messages = [{"role": "user", "content": marker, "images": [image]}]
        body = {"model": self._model(), "messages": messages, "stream": False, "options": {"num_predict": 12}}
        answer = await client.post("/api/chat", json=body)
        if failed := self._failed(answer):
            return failed
        return _expect(answer.json()["message"]["content"], marker)

    async def _leaves(self, client: httpx.AsyncClient, marker: str) -> Outcome:
        async with client.stream("POST", "/api/generate", json={"model": self._model(), "prompt": marker}) as answer:
            if answer.status_code >= 400:
                await answer.aread()
                return self._failed(answer) or "wrong"
            async for _ in answer.aiter_bytes():
                if self._random.random() < 0.3:
                    return "left"
        return "left"

    async def _leaves_early(self, client: httpx.AsyncClient, marker: str) -> Outcome:
        with suppress(TimeoutError):
            async with asyncio.timeout(self._random.uniform(0.001, 0.05)):
                await client.post("/api/generate", json={"model": self._model(), "prompt": marker})
        return "left"

    async def _slow_reader(self, _: httpx.AsyncClient, marker: str) -> Outcome:
        body = json.dumps({"model": self._model(), "prompt": marker}).encode()
        reader, writer = await asyncio.open_connection(*self._address, limit=1024)
        try:
            head = b"POST /api/generate HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
            writer.write(head % len(body) + body)
            data = b""
            while part := await reader.read(256):
                data += part
                await asyncio.sleep(0.02)
        finally:
            writer.transport.abort()
        head, _, rest = data.partition(b"\r\n\r\n")
        if not head:
            raise ConnectionError("the connection was closed before an answer")
        if not head.startswith(b"HTTP/1.1 200"):
            if b'"error"' not in rest:
                raise WrongError(f"an error without a text: {head[:40]!r}")
            return "error"
        chunked = rest.endswith(b"0\r\n\r\n")
        if not chunked:
            raise ConnectionError("the stream broke")
        if b'"done":true' not in rest:
            raise WrongError("a stream ends cleanly without its last line")
        return "answered"

    async def _nonsense(self, _: httpx.AsyncClient, marker: str) -> Outcome:
        text = self._random.choice(
            (
                b"GARBAGE\r\n\r\n",
                b"POST /api/chat HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
                b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
                b'POST /api/generate HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: 8\r\n\r\n{"model"',
                b"GET /" + b"x" * 1_200_000,
            )
        )
        reader, writer = await asyncio.open_connection(*self._address)
        try:
            writer.write(text)
            data = await reader.read(65536)
        finally:
            writer.transport.abort()
        if not data:
            raise ConnectionError("the connection was closed")
        status = int(data.split(b" ", 2)[1])
        if status < 400:
            raise WrongError(f"nonsense is answered with {status}")
        return "error"

    async def _unload(self, client: httpx.AsyncClient, _: str) -> Outcome:
        answer = await client.post("/api/generate", json={"model": self._model(), "keep_alive": 0})
        return self._failed(answer) or "answered"

    def _failed(self, answer: httpx.Response) -> Outcome | None:
        if answer.status_code < 400:
            return None
        if answer.request.method == "HEAD":
            return "error"
        try:
            error = answer.json()["error"]
        except (ValueError, KeyError, TypeError):
            raise WrongError(f"a {answer.status_code} without a text") from None
        text = error if isinstance(error, str) else error["message"]
        self.errors[f"{answer.status_code} {' '.join(text.split()[:6])}"] += 1
        return "error"


def _expect(text: str, marker: str) -> Outcome:
    if marker not in text:
        raise WrongError("an answer to another question, or a part of one")
    return "answered"
