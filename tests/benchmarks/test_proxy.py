"""The proxy benchmark's load tool and stand-in upstream, on real sockets: what it counts, and that it does not look away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from benchmarks.proxy.contenders import chat_body, v1_body
from benchmarks.proxy.load import Client, at_once, clients, close, post, streams
from benchmarks.proxy.report import LIMITS, tables
from benchmarks.proxy.upstream import Connection, State

CHUNKS = 40


@asynccontextmanager
async def stand_in() -> AsyncIterator[tuple[int, State]]:
    state = State({"/api/tags": {"models": []}})
    server = await asyncio.get_running_loop().create_server(lambda: Connection(state), "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1], state


@asynccontextmanager
async def cut_short(answer: bytes) -> AsyncIterator[int]:
    """A server that answers with these bytes and hangs up."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1]


@pytest.mark.parametrize(("path", "body"), [("/api/chat", chat_body), ("/v1/chat/completions", v1_body)])
async def test_each_chunk_of_each_stream_is_timed_once(path, body):
    """Both APIs: as many times as chunks were asked for, none before it was written; the stream takes as long as asked."""
    async with stand_in() as (port, _):
        opened = await clients(port, 4)
        seconds, answers = await streams(opened, post(path, body(CHUNKS, 1000)), stamped=True)
        close(opened)
    assert [len(answer.late_s) for answer in answers] == [CHUNKS] * 4
    assert all(late > 0 for answer in answers for late in answer.late_s)
    assert all(CHUNKS * 0.0005 < answer.total_s <= seconds for answer in answers)


async def test_chunks_cut_anywhere_are_still_timed_once():
    """A proxy may cut and join writes as it likes: fed byte by byte, an answer has the same times and the same end."""
    client = Client()
    client.expect(stamped=True)
    stamps = b"".join(b"10\r\n @1234567890123 \r\n\r\n" for _ in range(3))
    for byte in b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + stamps + b"0\r\n\r\n":
        assert not client.done.done()
        client.data_received(bytes([byte]))
    assert client.done.done()
    assert len(client.answer.late_s) == 3


async def test_requests_and_bytes_are_counted():
    """Every client's every request is answered and timed; an upload arrives to its last byte; facts are served as given."""
    async with stand_in() as (port, state):
        opened = await clients(port, 3)
        seconds, times = await at_once(opened, post("/api/chat", chat_body(0)), 5)
        assert len(times) == 15
        assert max(times) <= seconds
        assert b"bench 0 0 1" in state.last
        await opened[0].upload(b"POST /api/blobs/x HTTP/1.1\r\nContent-Length: 300000\r\n\r\n", bytes(100_000), 3)
        assert state.received == 300_000
        await opened[0].ask(b"GET /api/tags HTTP/1.1\r\n\r\n")
        close(opened)


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"HTTP/1.1 503 Busy\r\nContent-Length: 4\r\n\r\nbusy", RuntimeError),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nbus", ConnectionError),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nbusy\r\n", ConnectionError),
    ],
)
async def test_a_failure_is_never_a_fast_answer(answer, error):
    """A contender that refuses or breaks off ends the run, instead of looking quick."""
    async with cut_short(answer) as port:
        (client,) = await clients(port, 1)
        with pytest.raises(error):
            await client.ask(post("/api/chat", chat_body(0)))


def test_ratios_are_made_within_a_round_with_the_direct_figure_subtracted():
    """Rounds of a machine twice as slow leave the ratio as it is; rates are compared as they are."""
    names = [*LIMITS, "short p99 us", "10 MiB body ms"]

    def rounds(added):
        return {name: [(1 + (0 if "per s" in name else added)) * slow for slow in (1.0, 2.0, 5.0)] for name in names}

    result = {"machine": "m", "system": "s", "versions": ["p"], "left out": ["nginx is left out: why"]}
    text = tables({**result, "rounds": {"direct": rounds(0), "naive": rounds(4), "lopsided": rounds(1)}})
    assert "nginx is left out: why" in text
    assert "| short request p50, ms | ≤ 0.45 | 0.25 (0.25–0.25) |" in text
    assert "| 32 at once: requests/s | ≥ 5 | 1.00 (1.00–1.00) |" in text
