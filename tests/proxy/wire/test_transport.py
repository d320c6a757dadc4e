"""The transport to the upstream by itself: its parser fed in pieces, its pool, its limits, its use as any httpx transport."""

from __future__ import annotations

import asyncio
import threading
import time

import httpx
import pytest

from proxy.wire.transport import IDLE_LIMIT, READ_AHEAD_BYTES, UpstreamTransport, _Answer, _Connection
from tests.proxy.upstreams import RawUpstream, upstream
from tests.servers import free_port

ANSWERS = {
    b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nX: y\r\n\r\nhello": (200, b"hello", True),
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhe\r\n3;x=y\r\nllo\r\n0\r\nT: t\r\n\r\n": (
        200,
        b"hello",
        True,
    ),
    b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 204 No Content\r\n\r\n": (204, b"", True),
    b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nhi": (200, b"hi", False),
}


class Pipe(asyncio.Transport):
    """A transport that goes nowhere; counts pauses."""

    def __init__(self):
        super().__init__()
        self.paused = self.aborted = 0

    def pause_reading(self):
        self.paused += 1

    def resume_reading(self):
        self.paused -= 1

    def abort(self):
        self.aborted += 1


def exchange(method="GET"):
    made = _Connection(UpstreamTransport("http://127.0.0.1:1"))
    made.connection_made(Pipe())
    made.answer = _Answer(made, method)
    return made, made.answer


async def drain(answer):
    await answer.head()
    return b"".join([part async for part in answer])


@pytest.mark.parametrize("answer", ANSWERS)
async def test_an_answer_cut_at_every_byte_is_the_same_answer(answer):
    for cut in range(len(answer) + 1):
        made, got = exchange()
        made.data_received(answer[:cut])
        made.data_received(answer[cut:])
        assert (got.status, await drain(got), got.reusable) == ANSWERS[answer]


@pytest.mark.parametrize("answer", ANSWERS)
async def test_an_answer_that_ends_early_is_an_error_wherever_it_ends(answer):
    for cut in range(len(answer)):
        made, got = exchange()
        made.data_received(answer[:cut])
        made.connection_lost(None)
        with pytest.raises(httpx.TransportError):
            await drain(got)


async def test_a_body_after_an_answer_to_head_is_not_read():
    # shows: whatever its headers say, an answer to HEAD has none, and what comes all the same is thrown away
    made, got = exchange("HEAD")
    made.data_received(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil")
    assert await drain(got) == b""
    made.data_received(b"more")
    assert made.closed


async def test_what_follows_an_answer_makes_the_connection_useless():
    # shows: an upstream that says more than it was asked cannot put words into the next answer
    made, got = exchange()
    made.data_received(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhiHTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil")
    assert await drain(got) == b"hi"
    assert made.closed
    idle, _ = exchange()
    idle.answer = None
    idle.data_received(b"HTTP/1.1 200 OK\r\n")
    assert idle.closed


async def test_an_unread_answer_pauses_the_socket():
    made, got = exchange()
    made.data_received(b"HTTP/1.1 200 OK\r\nContent-Length: 9999999\r\n\r\n")
    made.data_received(b"x" * (READ_AHEAD_BYTES + 1))
    assert made.transport.paused == 1
    assert len(await anext(aiter(got))) == READ_AHEAD_BYTES + 1
    assert made.transport.paused == 0


def hello(_, conversation):
    conversation.answer(200, b"hello", {"X": "y"})


async def test_it_serves_any_httpx_client():
    # shows: base URL, JSON, query, headers that httpx makes up; one connection for one request after another
    with upstream(hello) as server:
        async with httpx.AsyncClient(transport=UpstreamTransport(server.url), base_url=server.url) as client:
            for _ in range(3):
                answer = await client.post("/x?a=b", json={"c": 1})
                assert (answer.text, answer.headers["x"]) == ("hello", "y")
    assert server.connections == 1
    assert (server.received[0].target, server.received[0].body) == ("/x?a=b", b'{"c":1}')


async def test_the_answer_of_a_server_that_then_resets_counts_although_writing_to_it_fails_first():
    # shows: an upload refused at once, the rest of it unread
    done = threading.Event()

    class Refusing(RawUpstream):
        def talk(self, connection):
            connection.recv(10)
            connection.sendall(b"HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\n\r\nno")
            connection.close()  # with something unread: a RST
            done.set()

    async def body():
        yield b"x" * 1000
        done.wait(10)  # the event loop stands still, and cannot read first
        yield b"x"

    server = Refusing(hello)
    async with httpx.AsyncClient(transport=UpstreamTransport(server.url), base_url=server.url) as client:
        answer = await client.post("/api/blobs/sha256:0", content=body())
    server.stop()
    assert (answer.status_code, answer.text) == (413, "no")


async def test_as_many_at_once_as_are_asked_for():
    # shows: 150 requests that all wait do not queue behind each other (httpx's own pool stops at 100)
    together = 0

    def script(_, conversation):
        nonlocal together
        together += 1
        while together < 150:
            time.sleep(0.005)
        conversation.answer(200)

    with upstream(script) as server:
        transport = UpstreamTransport(server.url)
        async with httpx.AsyncClient(transport=transport, base_url=server.url, timeout=10) as client:
            answers = await asyncio.gather(*(client.get("/") for _ in range(150)))
            assert {answer.status_code for answer in answers} == {200}
            assert len(transport._idle) <= IDLE_LIMIT
        assert not transport._idle
        assert not transport._busy


async def test_timeouts_are_those_of_httpx():
    def script(_, conversation):
        time.sleep(0.5)
        conversation.answer(200)

    with upstream(script) as server:
        async with httpx.AsyncClient(transport=UpstreamTransport(server.url), base_url=server.url) as client:
            with pytest.raises(httpx.ReadTimeout):
                await client.get("/", timeout=0.05)
    nowhere = f"http://127.0.0.1:{free_port()}"
    async with httpx.AsyncClient(transport=UpstreamTransport(nowhere), base_url=nowhere) as client:
        with pytest.raises(httpx.ConnectError):
            await client.get("/")


async def test_a_line_break_in_a_header_is_refused():
    with upstream(hello) as server:
        async with httpx.AsyncClient(transport=UpstreamTransport(server.url), base_url=server.url) as client:
            with pytest.raises(httpx.LocalProtocolError):
                await client.get("/", headers={"x": "a\r\nb: c"})
    assert server.received == []


async def test_an_upstream_that_ends_is_noticed():
    # shows: a kept connection that the upstream closes counts as a restart, one that we close does not
    with upstream(hello) as server:
        transport = UpstreamTransport(server.url)
        async with httpx.AsyncClient(transport=transport, base_url=server.url) as client:
            await client.get("/")
            assert transport.restarts == 0
            server.stop()
            for _ in range(100):
                await asyncio.sleep(0.01)
                if transport.restarts:
                    break
            assert transport.restarts == 1


async def test_an_upstream_by_https_gets_nothing_in_clear():
    # shows: the first that goes out is a TLS handshake, and no request where that fails
    received = bytearray()

    async def talk(reader, writer):
        received.extend(await reader.read(3))
        writer.close()

    server = await asyncio.start_server(talk, "127.0.0.1", 0)
    url = f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server, httpx.AsyncClient(transport=UpstreamTransport(url)) as client:
        with pytest.raises(httpx.ConnectError):
            await client.get(url)
    assert received == b"\x16\x03\x01"
