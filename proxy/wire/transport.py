"""An httpx transport for one HTTP/1.1 upstream: asyncio protocols with httptools underneath, bytes as they come.

Why an own one: those at hand cost more (docs/performance.md), rewrite what they carry, and repeat requests behind one's back.

* The request line is ``request.extensions["target"]`` where given (httpcore's name for it), else the URL's path and query.
* Framing follows the headers: ``transfer-encoding: chunked`` is encoded here, anything else is sent as it is.
* A kept connection that turns out to be closed is replaced by a fresh one only if no byte of an answer came, the body
  can be sent again, and the request is safe to repeat: GET, HEAD, OPTIONS, or ``request.extensions["repeatable"]``.
* Leaving the response before its end, or being cancelled before its start, closes the connection: Ollama then stops.
* ``request.extensions["timeout"]`` is httpx's; ``connect`` and ``read`` count, ``None`` waits for ever.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterable
from contextlib import suppress
from typing import cast

import httptools
import httpx

READ_AHEAD_BYTES = 256 * 1024
"""Unread bytes of one response above which the socket is not read any further."""

HEADER_LIMIT_BYTES = 1024 * 1024
"""Bytes of a response in which its headers must end. Go's own client stops at 1 MiB, most servers send less than 8 KiB."""

IDLE_LIMIT = 256
"""Kept connections; more are closed when their response ends."""

IDLE_S = 30.0
"""Age at which a kept connection is not used again: Ollama keeps them for ever, load balancers often for 60 s."""


class StaleConnectionError(httpx.RemoteProtocolError):
    """A kept connection was closed before any byte of an answer came."""


class _Answer(httpx.AsyncByteStream):
    """The response to one request, as its connection gets it; its body for httpx. Closing it gives the connection back."""

    def __init__(self, connection: _Connection, method: str, read_s: float | None = None) -> None:
        self.connection, self.method, self.read_s = connection, method, read_s
        self.parser = httptools.HttpResponseParser(self)
        self.status = self.head_bytes = self.unread_bytes = 0
        self.parts: list[bytes] = []
        self.complete = self.reusable = False
        self.error: Exception | None = None
        self.waiter: asyncio.Future[None] | None = None

    async def head(self) -> None:
        """Returns when status and headers are there. Raises ``httpx.TransportError``."""
        while not self.status:
            await self._more()

    def __aiter__(self) -> _Answer:
        return self

    async def __anext__(self) -> bytes:
        while not self.parts:
            if self.complete:
                raise StopAsyncIteration
            await self._more()
        data = b"".join(self.parts)
        self.parts, self.unread_bytes = [], 0
        if len(data) > READ_AHEAD_BYTES and not self.connection.closed:
            self.connection.transport.resume_reading()
        return data

    async def aclose(self) -> None:
        self.connection.pool.release(self.connection)

    async def _more(self) -> None:
        if self.error:
            raise self.error
        self.waiter, timer = asyncio.get_running_loop().create_future(), None
        if self.read_s is not None:
            timer = self.waiter.get_loop().call_later(self.read_s, self.fail, httpx.ReadTimeout(f"no answer in {self.read_s} s"))
        try:
            await self.waiter
        finally:
            if timer:
                timer.cancel()

    def _wake(self) -> None:
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)

    def fail(self, error: Exception) -> None:
        """Ends the response with ``error``, unless it is over, and closes the connection."""
        self.error = self.error or error
        self._wake()
        self.connection.abort()

    def feed(self, data: bytes) -> None:
        self.head_bytes += 0 if self.status else len(data)
        if self.head_bytes > HEADER_LIMIT_BYTES:
            self.fail(httpx.RemoteProtocolError(f"the answer's headers are larger than {HEADER_LIMIT_BYTES} bytes"))
            return
        try:
            self.parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self.fail(httpx.RemoteProtocolError(f"the answer is no HTTP/1.1: {error or type(error).__name__}"))

    def lost(self, cause: Exception | None, *, kept: bool) -> None:
        """The connection, one that was ``kept`` from another request or not, has ended."""
        why = cause or "end of file"
        if not self.status:
            kind = StaleConnectionError if kept and not self.head_bytes else httpx.RemoteProtocolError
            self.fail(kind(f"the connection was closed before an answer came ({why})"))
        elif cause or any(name.lower() in (b"content-length", b"transfer-encoding") for name, _ in self.headers):
            self.fail(httpx.ReadError(f"the connection broke in the middle of the answer ({why})"))
        else:  # a body without length ends with the connection
            self.complete = True
            self._wake()

    def on_message_begin(self) -> None:
        if self.complete:
            raise ValueError("more than was asked for")  # nothing of it may be taken for the next answer
        self.headers: list[tuple[bytes, bytes]] = []  # those of an interim response (100, 103) are not the real one's

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self.status:  # else it is a trailer
            self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        if (status := self.parser.get_status_code()) >= 200:
            self.status = status
            if self.method == "HEAD":  # whatever its headers say, no body follows
                self.on_message_complete()
            self._wake()

    def on_body(self, data: bytes) -> None:
        if self.complete:
            return
        self.parts.append(data)
        self.unread_bytes += len(data)
        if self.unread_bytes > READ_AHEAD_BYTES:
            self.connection.transport.pause_reading()
        self._wake()

    def on_message_complete(self) -> None:
        if self.status and not self.complete:
            self.complete, self.reusable = True, self.parser.should_keep_alive()
            self._wake()


class _Connection(asyncio.Protocol):
    """One connection. Without an ``answer`` it is idle; whatever arrives then makes it useless."""

    def __init__(self, pool: UpstreamTransport) -> None:
        self.pool, self.closed, self.idle_since = pool, False, 0.0
        self.writable = asyncio.Event()
        self.writable.set()
        self.answer: _Answer | None = None
        self.sender: asyncio.Task[None] | None = None

    async def send(self, stream: AsyncIterable[bytes], answer: _Answer, *, chunked: bool) -> None:
        """Sends a streamed body, no faster than the upstream takes it. What its source raises ends the exchange."""
        try:
            async for part in stream:
                if self.closed:
                    return
                if part:
                    self.transport.write(b"%x\r\n%b\r\n" % (len(part), part) if chunked else part)
                await self.writable.wait()
            if chunked and not self.closed:
                self.transport.write(b"0\r\n\r\n")
        except Exception as error:  # noqa: BLE001 - raised where the answer is waited for
            answer.fail(error)

    def abort(self) -> None:
        self.closed = True
        self.transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        if self.answer is None or self.answer.complete:
            self.abort()
        else:
            self.answer.feed(data)

    def connection_lost(self, exc: Exception | None) -> None:
        if exc and self.answer is not None and not self.pool.ssl:  # writing fails first where an upload is answered unread
            with suppress(OSError), self.transport.get_extra_info("socket").dup() as unread:
                while not self.answer.complete and (data := unread.recv(READ_AHEAD_BYTES)):
                    self.answer.feed(data)
        if self.answer is not None and not self.answer.complete:
            self.answer.lost(exc, kept=self.idle_since > 0)
        elif self.answer is None and not self.closed:
            self.pool.restarts += 1
        self.closed = True
        self.writable.set()

    def pause_writing(self) -> None:
        self.writable.clear()

    def resume_writing(self) -> None:
        self.writable.set()


class UpstreamTransport(httpx.AsyncBaseTransport):
    """Connections to ``base_url``'s host and port, as many as are asked for at once; see the module."""

    def __init__(self, base_url: str) -> None:
        self._url = httpx.URL(base_url)
        self.ssl = ssl.create_default_context() if self._url.scheme == "https" else None
        self._port = self._url.port or (443 if self.ssl else 80)
        self.restarts = 0
        """How often the upstream closed a kept connection: Ollama never does while it lives."""
        self._idle: list[_Connection] = []
        self._busy: set[_Connection] = set()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Sends ``request`` and returns when the answer's headers are there. Raises ``httpx.TransportError``."""
        timeout: dict[str, float | None] = request.extensions.get("timeout", {})
        chunked = "transfer-encoding" in request.headers
        body = b"".join(request.stream) if isinstance(request.stream, httpx.ByteStream) and not chunked else None
        repeatable = body is not None and (request.method in ("GET", "HEAD", "OPTIONS") or "repeatable" in request.extensions)
        head = self._head(request)
        while True:
            connection = self._kept() or await self._connect(timeout.get("connect"))
            answer = connection.answer = _Answer(connection, request.method, timeout.get("read"))
            self._busy.add(connection)
            try:
                if connection.closed:
                    connection.connection_lost(None)
                elif body is None:
                    connection.transport.write(head)
                    stream = cast("httpx.AsyncByteStream", request.stream)
                    connection.sender = asyncio.create_task(connection.send(stream, answer, chunked=chunked), name="upload")
                else:
                    # asyncio from Python 3.12 on never has done with an empty part: it polls, and sees no end of the connection
                    connection.transport.writelines((head, body) if body else (head,))
                await answer.head()
            except BaseException as error:
                self.release(connection)
                if repeatable and isinstance(error, StaleConnectionError):
                    continue
                raise
            return httpx.Response(answer.status, headers=answer.headers, stream=answer, request=request)

    def _head(self, request: httpx.Request) -> bytes:
        target: bytes = request.extensions.get("target", request.url.raw_path)
        host = [] if "host" in request.headers else [b"host: " + self._url.netloc]
        first = b"%b %b HTTP/1.1" % (request.method.encode("ascii"), target)
        lines = [first, *host, *(b"%b: %b" % field for field in request.headers.raw)]
        head = b"\r\n".join(lines)
        if not head.count(b"\r") == head.count(b"\n") == len(lines) - 1:
            raise httpx.LocalProtocolError("a header or the target holds a line break")
        return head + b"\r\n\r\n"

    def _kept(self) -> _Connection | None:
        oldest = asyncio.get_running_loop().time() - IDLE_S
        while self._idle:
            connection = self._idle.pop()
            if connection.idle_since > oldest and not connection.closed and not connection.transport.is_closing():
                return connection
            connection.abort()
        return None

    async def _connect(self, connect_s: float | None) -> _Connection:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(connect_s):
                return (await loop.create_connection(lambda: _Connection(self), self._url.host, self._port, ssl=self.ssl))[1]
        except TimeoutError as error:
            raise httpx.ConnectTimeout(f"no connection within {connect_s} s") from error
        except OSError as error:
            raise httpx.ConnectError(error.strerror or str(error)) from error

    def release(self, connection: _Connection) -> None:
        """Takes a connection back: kept if all was sent and the response came to its end, else closed."""
        if connection not in self._busy:
            return
        self._busy.discard(connection)
        answer, sender = cast("_Answer", connection.answer), connection.sender
        sent = not connection.transport.get_write_buffer_size() and (sender is None or sender.done())
        if answer.reusable and sent and not connection.closed:
            connection.answer = connection.sender = None
            connection.idle_since = asyncio.get_running_loop().time()
            self._idle.append(connection)
            if len(self._idle) > IDLE_LIMIT:
                self._idle.pop(0).abort()
        else:
            if sender is not None:
                sender.cancel()
            connection.abort()

    async def aclose(self) -> None:
        """Closes every connection, those in use too."""
        while self._busy:
            cast("_Answer", self._busy.pop().answer).fail(httpx.ReadError("lopsided is shutting down"))
        while self._idle:
            self._idle.pop().abort()
        await asyncio.sleep(0)
