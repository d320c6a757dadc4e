"""A relay of bytes in front of an upstream that breaks things: refuses, resets, ends early, stalls, answers 503, restarts."""

from __future__ import annotations

import asyncio
import random
import struct
from collections import Counter
from contextlib import suppress
from socket import SO_LINGER, SOL_SOCKET

RESTART_S = 1.5
"""How long the upstream refuses connections when it restarts."""

STALL_S = (0.2, 3.0)

BROKEN_AT_BYTE = 4000
"""A connection that is to break does so at a random byte up to this one of an answer."""

_TEXT = b'{"error":"the relay answers for its upstream"}'
UNAVAILABLE = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json; charset=utf-8\r\n"
    b"Content-Length: %d\r\nConnection: close\r\n\r\n%b" % (len(_TEXT), _TEXT)
)


class Relay:
    """Listens on a port of its own; ``faults`` counts what it did, ``open`` the connections there are."""

    def __init__(self, host: str, port: int, *, seed: int, fault_rate: float) -> None:
        self.faults: Counter[str] = Counter()
        self.connections = 0
        self._upstream = (host, port)
        self._random = random.Random(seed)
        self._rate = fault_rate
        self._open: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None
        self.port = 0
        self.quiet = False
        """No more faults: the time of the last answers."""

    @property
    def open(self) -> int:
        return len(self._open)

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, backlog=512)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Refuses from now on, and resets what is open."""
        if self._server is not None:
            self._server.close()
        for writer in tuple(self._open):
            _reset(writer)

    async def restart(self) -> None:
        """As an upstream that ends and comes back on the same port."""
        self.faults["restart"] += 1
        await self.stop()
        await asyncio.sleep(RESTART_S)
        await self.start()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._open.add(writer)
        try:
            up_reader, up_writer = await asyncio.open_connection(*self._upstream)
        except OSError:
            self._open.discard(writer)
            _reset(writer)
            return
        try:
            requests = asyncio.create_task(self._requests(reader, up_writer, writer), name="relay requests")
            answers = asyncio.create_task(self._answers(up_reader, writer), name="relay answers")
            await asyncio.wait((requests, answers), return_when=asyncio.FIRST_COMPLETED)
            for task in (requests, answers):
                task.cancel()
            await asyncio.gather(requests, answers, return_exceptions=True)
        finally:
            self._open.discard(writer)
            for end in (up_writer, writer):
                with suppress(OSError):
                    end.close()

    async def _requests(self, reader: asyncio.StreamReader, upstream: asyncio.StreamWriter, client: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            if data.startswith((b"GET", b"POST")) and self._happens():
                kind = self._random.choice(("503", "reset before the answer", "end before the answer"))
                self.faults[kind] += 1
                if kind == "503":
                    client.write(UNAVAILABLE)
                    await client.drain()
                elif kind == "reset before the answer":
                    _reset(client)
                return
            upstream.write(data)
            await upstream.drain()

    async def _answers(self, upstream: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        while data := await upstream.read(65536):
            if self._happens():
                kind = self._random.choice(("reset in the answer", "end in the answer", "stall"))
                self.faults[kind] += 1
                if kind == "stall":
                    await asyncio.sleep(self._random.uniform(*STALL_S))
                else:
                    client.write(data[: self._random.randrange(min(len(data), BROKEN_AT_BYTE))])
                    await client.drain()
                    if kind == "reset in the answer":
                        _reset(client)
                    return
            client.write(data)
            await client.drain()

    def _happens(self) -> bool:
        return not self.quiet and self._random.random() < self._rate


def _reset(writer: asyncio.StreamWriter) -> None:
    """Ends the connection with a RST."""
    with suppress(OSError, AttributeError):
        writer.get_extra_info("socket").setsockopt(SOL_SOCKET, SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
