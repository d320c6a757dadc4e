"""Clients: raw HTTP/1.1 over asyncio, so that what is measured is not the client.

A client sends bytes made in advance and looks into answers no further than to their end. Times that the upstream wrote into
chunks are read as the chunks arrive; client and upstream share the machine's monotonic clock.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

STAMP = re.compile(rb"@(\d{12,20})[^\d]")
STAMP_BYTES = 22
"""The longest stamp: one may arrive in two pieces."""
LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
END = b"0\r\n\r\n"


@dataclass
class Answer:
    """Seconds to the end, and how late each stamped chunk was, in seconds."""

    total_s: float = 0.0
    late_s: list[float] = field(default_factory=list)


class Client(asyncio.Protocol):
    """One kept connection."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.done: asyncio.Future[None] | None = None
        self.pending = 0
        self.writable = asyncio.Event()
        self.writable.set()

    @classmethod
    async def connect(cls, port: int) -> Client:
        _, client = await asyncio.get_running_loop().create_connection(cls, "127.0.0.1", port)
        return client

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: asyncio.Transport = transport  # type: ignore[assignment]

    def pause_writing(self) -> None:
        self.writable.clear()

    def resume_writing(self) -> None:
        self.writable.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self.writable.set()
        if self.done is not None and not self.done.done():
            self.done.set_exception(ConnectionError(f"the connection was closed in an answer: {exc}"))

    def expect(self, *, stamped: bool) -> None:
        """A request is about to go out."""
        self.answer = Answer()
        self.stamped = stamped
        self.head = b""
        self.in_head = True
        self.done = self.loop.create_future()
        self.began = time.perf_counter()

    async def ask(self, request: bytes, *, stamped: bool = False) -> Answer:
        """Sends the request and waits for the whole answer. Raises ``RuntimeError`` where its status is not 200."""
        self.expect(stamped=stamped)
        self.transport.write(request)
        await self.done  # type: ignore[misc]  # expect() made it
        return self.answer

    async def upload(self, head: bytes, block: bytes, blocks: int) -> Answer:
        """Sends a body of so many ``blocks`` after ``head``, as fast as they are taken."""
        self.expect(stamped=False)
        self.transport.write(head)
        for _ in range(blocks):
            await self.writable.wait()
            self.transport.write(block)
        await self.done  # type: ignore[misc]
        return self.answer

    def data_received(self, data: bytes) -> None:
        if self.in_head:
            self.head += data
            if (end := self.head.find(b"\r\n\r\n")) < 0:
                return
            head, data = self.head[:end], self.head[end + 4 :]
            if head.startswith(b"HTTP/1.1 100"):
                self.head = b""
                return
            self.in_head = False
            if not head.startswith(b"HTTP/1.1 200"):
                self.done.set_exception(RuntimeError((head + data)[:600].decode(errors="replace")))  # type: ignore[union-attr]
                return
            length = LENGTH.search(head)
            self.left = int(length[1]) if length else -1
            self.tail = self.unread = b""
        if self.stamped:
            now = time.monotonic_ns()
            text, end = self.unread + data, 0
            for stamp in STAMP.finditer(text):
                self.answer.late_s.append((now - int(stamp[1])) * 1e-9)
                end = stamp.end()
            self.unread = text[max(end, len(text) - STAMP_BYTES) :]
        if self.left >= 0:
            self.left -= len(data)
            ended = self.left <= 0
        else:
            self.tail = (self.tail + data[-5:])[-5:]
            ended = self.tail == END
        if ended and not self.done.done():  # type: ignore[union-attr]
            self.answer.total_s = time.perf_counter() - self.began
            self.done.set_result(None)  # type: ignore[union-attr]


def post(path: str, body: bytes) -> bytes:
    """A POST request of JSON."""
    return (
        b"POST %b HTTP/1.1\r\nHost: 127.0.0.1\r\nUser-Agent: bench\r\nAccept: */*\r\nAuthorization: Bearer none\r\n"
        b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (path.encode(), len(body), body)
    )


async def clients(port: int, count: int) -> list[Client]:
    """That many open connections."""
    return [await Client.connect(port) for _ in range(count)]


def close(opened: Sequence[Client]) -> None:
    for client in opened:
        client.transport.abort()


async def in_turn(client: Client, request: bytes, count: int) -> list[float]:
    """Seconds of each of ``count`` requests, one after the other."""
    return [(await client.ask(request)).total_s for _ in range(count)]


async def at_once(opened: Sequence[Client], request: bytes, each: int) -> tuple[float, list[float]]:
    """Every client sends ``each`` requests, one after the other: seconds of it all, and of each request."""
    began = time.perf_counter()
    times = await asyncio.gather(*(in_turn(client, request, each) for client in opened))
    return time.perf_counter() - began, [seconds for row in times for seconds in row]


async def streams(
    opened: Sequence[Client], request: bytes, *, stamped: bool, spread_s: float = 0.0
) -> tuple[float, list[Answer]]:
    """One stream for every client, begun over ``spread_s`` seconds: seconds of it all, and the answers."""

    async def one(client: Client, delay_s: float) -> Answer:
        await asyncio.sleep(delay_s)
        return await client.ask(request, stamped=stamped)

    began = time.perf_counter()
    answers = await asyncio.gather(*(one(client, spread_s * i / len(opened)) for i, client in enumerate(opened)))
    return time.perf_counter() - began, answers
