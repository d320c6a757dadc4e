"""A stand-in upstream with Ollama's shape, as fast as Python makes one: asyncio protocols, uvloop, answers made in advance.

    python -m benchmarks.proxy.upstream PORT FACTS.json

``FACTS.json`` maps paths (``/api/tags``, ``/api/show``, …) to the JSON that is answered there. Everything else with a body is
answered as its first 4 KiB ask, NDJSON on ``/api/…`` and server-sent events on ``/v1/…``: ``bench CHUNKS EVERY_US BATCH``
anywhere in it. ``CHUNKS`` 0 is one whole answer. ``EVERY_US`` is the mean distance of chunks, which is drawn from half to one and
a half of it, so that streams drift against each other as models do that run side by side; each chunk carries ``@`` and the
monotonic nanosecond at which it was written. ``EVERY_US`` 0 is as fast as the reader takes them, ``BATCH`` chunks to a write and
without times. ``/bench/last`` gives the first 4 KiB of the last such body, ``/bench/received`` the bytes of the last body.
"""

from __future__ import annotations

import asyncio
import gc
import json
import random
import re
import sys
import time
from pathlib import Path

import httptools
import uvloop

ASKED = re.compile(rb"bench (\d+) (\d+) (\d+)")
HEAD_BYTES = 4096
READ_BYTES = 2**18

NDJSON = (
    '{"model":"qwen2.5:32b","created_at":"2026-01-02T03:04:05.678901234Z",'
    '"message":{"role":"assistant","content":" @%d"},"done":false}\n'
)
LAST = (
    '{"model":"qwen2.5:32b","created_at":"2026-01-02T03:04:05.678901234Z","message":{"role":"assistant","content":"%s"},'
    '"done":true,"done_reason":"stop","total_duration":412345678,"load_duration":12345678,"prompt_eval_count":26,'
    '"prompt_eval_duration":123456789,"eval_count":10,"eval_duration":212345678}\n'
)
EVENT = (
    'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1767323045,"model":"qwen2.5:32b",'
    '"choices":[{"index":0,"delta":{"role":"assistant","content":" @%d"},"finish_reason":null}]}\n\n'
)
EVENTS_END = (
    'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1767323045,"model":"qwen2.5:32b",'
    '"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'
)
COMPLETION = (
    '{"id":"chatcmpl-1","object":"chat.completion","created":1767323045,"model":"qwen2.5:32b","choices":[{"index":0,'
    '"message":{"role":"assistant","content":"%s"},"finish_reason":"stop"}],'
    '"usage":{"prompt_tokens":26,"completion_tokens":10,"total_tokens":36}}'
)
WORDS = "Because their layers take as long as the slowest card."


def chunk(text: str) -> bytes:
    data = text.encode()
    return b"%x\r\n%b\r\n" % (len(data), data)


def whole(body: str | bytes) -> bytes:
    data = body.encode() if isinstance(body, str) else body
    return b"HTTP/1.1 200 OK\r\nContent-Type: application/json; charset=utf-8\r\nContent-Length: %d\r\n\r\n%b" % (len(data), data)


def stream_head(content_type: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\nTransfer-Encoding: chunked\r\n\r\n" % content_type


API = (stream_head(b"application/x-ndjson"), NDJSON, chunk(LAST % "") + b"0\r\n\r\n", whole(LAST % WORDS))
V1 = (
    stream_head(b"text/event-stream"),
    EVENT,
    chunk(EVENTS_END) + chunk("data: [DONE]\n\n") + b"0\r\n\r\n",
    whole(COMPLETION % WORDS),
)


class State:
    def __init__(self, facts: dict[str, object]) -> None:
        self.answers = {path.encode(): whole(json.dumps(value)) for path, value in facts.items()}
        self.last = b""
        self.buffer = memoryview(bytearray(READ_BYTES))
        self.received = 0


class Connection(asyncio.BufferedProtocol):
    def __init__(self, state: State) -> None:
        self.state = state
        self.loop = asyncio.get_running_loop()
        self.parser = httptools.HttpRequestParser(self)
        self.work: list[int] | None = None
        self.random = random.Random(id(self))
        self.paused = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: asyncio.Transport = transport  # type: ignore[assignment]

    def get_buffer(self, _: int) -> memoryview:
        return self.state.buffer

    def buffer_updated(self, count: int) -> None:
        try:
            self.parser.feed_data(self.state.buffer[:count])
        except httptools.HttpParserError:
            self.transport.abort()

    def pause_writing(self) -> None:
        self.paused = True

    def resume_writing(self) -> None:
        self.paused = False
        if self.work is not None:
            self.flood()

    # httptools

    def on_message_begin(self) -> None:
        self.head, self.received, self.url = b"", 0, b""
        self.work = None

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_header(self, name: bytes, _: bytes) -> None:
        if name.lower() == b"expect":
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, data: bytes) -> None:
        self.received += len(data)
        if len(self.head) < HEAD_BYTES:
            self.head += data[: HEAD_BYTES - len(self.head)]

    def on_message_complete(self) -> None:
        path = self.url.partition(b"?")[0]
        if path == b"/bench/last":
            self.transport.write(whole(self.state.last))
            return
        if path == b"/bench/received":
            self.transport.write(whole(b"%d" % self.state.received))
            return
        if (answer := self.state.answers.get(path)) is not None:
            self.transport.write(answer)
            return
        self.state.received = self.received
        asked = ASKED.search(self.head)
        self.kind = V1 if path.startswith(b"/v1") else API
        if asked is None:
            self.transport.write(whole(b"{}"))
            return
        self.state.last = self.head
        chunks, every_us, batch = map(int, asked.groups())
        if not chunks:
            self.transport.write(self.kind[3])
            return
        self.transport.write(self.kind[0])
        if every_us:
            self.pace(chunks, every_us * 1e-6, self.loop.time())
        else:
            text = chunk(self.kind[1] % 0)
            self.work = [chunks, batch]
            self.block = text * batch
            self.flood()

    def pace(self, left: int, every_s: float, due: float) -> None:
        if self.transport.is_closing():
            return
        if not left:
            self.transport.write(self.kind[2])
            return
        self.transport.write(chunk(self.kind[1] % time.monotonic_ns()))
        due += every_s * (0.5 + self.random.random())
        self.loop.call_at(due, self.pace, left - 1, every_s, due)

    def flood(self) -> None:
        if self.work is None or self.paused or self.transport.is_closing():
            return
        left, batch = self.work
        if left <= 0:
            self.work = None
            self.transport.write(self.kind[2])
            return
        self.transport.write(self.block)
        self.work[0] = left - batch
        self.loop.call_soon(self.flood)


async def main(port: int, facts: Path) -> None:
    state = State(json.loads(facts.read_text()))  # noqa: ASYNC240 - nothing else runs yet
    server = await asyncio.get_running_loop().create_server(lambda: Connection(state), "127.0.0.1", port, backlog=2048)
    gc.freeze()
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1]), Path(sys.argv[2])))
