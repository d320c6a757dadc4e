"""An httpx transport for one HTTP/1.1 upstream: asyncio protocols with httptools underneath, bytes as they come.

Why an own one: httpcore costs more per streamed chunk than everything else in the proxy together, and the transports at
hand rewrite what they carry (targets are normalized, repeated headers joined, ``accept-encoding`` added, idempotent
requests repeated behind one's back). This one sends what it is given and yields what arrives.

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
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any, cast

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

REPEATABLE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})


class StaleConnectionError(httpx.RemoteProtocolError):
    """A kept connection was closed before any byte of an answer came."""


class _Connection(asyncio.Protocol):
    """One connection. Between requests ``parser`` is ``None``; whatever arrives then makes it useless."""

    def __init__(self, lost_idle: Callable[[], None] = lambda: None) -> None:
        self.lost_idle = lost_idle
        self.loop = asyncio.get_running_loop()
        self.transport: asyncio.Transport = cast("asyncio.Transport", None)
        self.closed = False
        self.idle_since = 0.0
        self.used = False
        self.parser: httptools.HttpResponseParser | None = None
        self._writable: asyncio.Future[None] | None = None
        self._paused_writing = False

    # One exchange

    def begin(self, method: str) -> asyncio.Future[None]:
        """Gets ready for the response to a ``method`` request; the future ends when its headers are complete."""
        self.method = method
        self.parser = httptools.HttpResponseParser(self)
        self.head = self.loop.create_future()
        self.reason = b""
        self.headers: list[tuple[bytes, bytes]] = []
        self.header_bytes = 0
        self.chunks: deque[bytes] = deque()
        self.buffered = 0
        self.reading_paused = False
        self.answered = self.head_complete = self.complete = self.reusable = False
        self.framed = False
        self.error: Exception | None = None
        self.waiter: asyncio.Future[None] | None = None
        return self.head

    async def write_body(self, stream: AsyncIterator[bytes], *, chunked: bool) -> None:
        """Sends a streamed body, no faster than the upstream takes it."""
        async for part in stream:
            if self.closed:
                return
            if part:
                self.transport.write(b"%x\r\n%b\r\n" % (len(part), part) if chunked else part)
            if self._paused_writing:
                self._writable = self.loop.create_future()
                await self._writable
        if chunked and not self.closed:
            self.transport.write(b"0\r\n\r\n")

    async def read(self) -> bytes:
        """What has arrived since the last call, at least one byte; ``b""`` at the end of the response."""
        while not self.chunks:
            if self.error:
                raise self.error
            if self.complete:
                return b""
            self.waiter = self.loop.create_future()
            try:
                await self.waiter
            finally:
                self.waiter = None
        data = self.chunks.popleft() if len(self.chunks) == 1 else b"".join(self.chunks)
        self.chunks.clear()
        self.buffered = 0
        if self.reading_paused:
            self.reading_paused = False
            if not self.closed:
                self.transport.resume_reading()
        return data

    def fail(self, error: Exception) -> None:
        """Ends the exchange with ``error`` and closes the connection."""
        if self.parser is not None and not self.complete and self.error is None:
            self.error = error
            if not self.head.done():
                self.head.set_exception(error)
                self.head.exception()  # seen: it may have nobody to await it any more
            self._wake()
        self.abort()

    def abort(self) -> None:
        """Closes at once; unsent data is dropped."""
        self.closed = True
        if self.transport is not None:
            self.transport.abort()

    def _wake(self) -> None:
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        if self.parser is None or self.complete:
            self.abort()
            return
        self.answered = True
        if not self.head_complete:
            self.header_bytes += len(data)
            if self.header_bytes > HEADER_LIMIT_BYTES:
                self.fail(httpx.RemoteProtocolError(f"the answer's headers are larger than {HEADER_LIMIT_BYTES} bytes"))
                return
        try:
            self.parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            if not self.complete:
                self.fail(httpx.RemoteProtocolError(f"the answer is no HTTP/1.1: {error or type(error).__name__}"))
            else:
                self.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        if self.parser is None and self.used and not self.closed:
            self.lost_idle()
        self.closed = True
        self.resume_writing()
        if self.parser is None or self.complete:
            return
        if self.head_complete and not self.framed and exc is None:
            self.complete = True  # a body without length ends with the connection
            self._wake()
        elif not self.answered and self.used:
            self.fail(StaleConnectionError("the connection was closed before an answer came"))
        elif not self.head_complete:
            self.fail(httpx.RemoteProtocolError(f"the connection was closed before an answer came ({exc or 'end of file'})"))
        else:
            self.fail(httpx.ReadError(f"the connection broke in the middle of the answer ({exc or 'end of file'})"))

    def pause_writing(self) -> None:
        self._paused_writing = True

    def resume_writing(self) -> None:
        self._paused_writing = False
        if self._writable is not None and not self._writable.done():
            self._writable.set_result(None)

    # httptools

    def on_message_begin(self) -> None:
        if self.complete:  # more than was asked for: nothing of it may be taken for the next answer
            self.abort()

    def on_status(self, reason: bytes) -> None:
        self.reason += reason

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.head_complete:
            return  # a trailer
        self.headers.append((name, value))
        self.framed = self.framed or name.lower() in (b"content-length", b"transfer-encoding")

    def on_headers_complete(self) -> None:
        parser = cast("httptools.HttpResponseParser", self.parser)
        self.status = parser.get_status_code()
        if self.status < 200:
            return
        self.head_complete = True
        if self.method == "HEAD":  # whatever its headers say, no body follows
            self._end(keep_alive=parser.should_keep_alive())
        if not self.head.done():
            self.head.set_result(None)

    def on_body(self, data: bytes) -> None:
        if self.complete:
            return
        self.chunks.append(data)
        self.buffered += len(data)
        if self.buffered > READ_AHEAD_BYTES and not self.reading_paused:
            self.reading_paused = True
            self.transport.pause_reading()
        if self.waiter is not None:
            self._wake()

    def on_message_complete(self) -> None:
        if not self.head_complete:  # an interim response (100, 103): the real one follows
            self.reason = b""
            self.headers = []
            self.framed = False
        elif not self.complete:
            self._end(keep_alive=cast("httptools.HttpResponseParser", self.parser).should_keep_alive())

    def _end(self, *, keep_alive: bool) -> None:
        self.complete = True
        self.reusable = keep_alive
        self._wake()


class _Body(httpx.AsyncByteStream):
    """The response's body; closing it returns the connection to the pool, or closes that too."""

    def __init__(self, pool: UpstreamTransport, connection: _Connection, sender: asyncio.Task[None] | None, read_s: float | None):
        self._pool = pool
        self._connection = connection
        self._sender = sender
        self._read_s = read_s

    async def __aiter__(self) -> AsyncIterator[bytes]:
        read = self._connection.read
        if self._read_s is None:
            while data := await read():
                yield data
        else:
            while data := await _within(self._read_s, read()):
                yield data

    async def aclose(self) -> None:
        connection, sender = self._connection, self._sender
        if sender is not None and not sender.done():
            sender.cancel()
            connection.reusable = False
        self._pool.release(connection)


class UpstreamTransport(httpx.AsyncBaseTransport):
    """Connections to ``base_url``'s host and port, as many as are asked for at once; see the module."""

    def __init__(self, base_url: str, *, ssl_context: ssl.SSLContext | None = None) -> None:
        url = httpx.URL(base_url)
        self._host = url.host
        self._port = url.port or (443 if url.scheme == "https" else 80)
        self._ssl = (ssl_context or ssl.create_default_context()) if url.scheme == "https" else None
        self._host_header = url.netloc
        self.restarts = 0
        """How often the upstream closed a kept connection: Ollama never does while it lives."""
        self._idle: deque[_Connection] = deque()
        self._busy: set[_Connection] = set()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Sends ``request`` and returns when the answer's headers are there. Raises ``httpx.TransportError``."""
        timeout: dict[str, float | None] = request.extensions.get("timeout", {})
        head, chunked = self._head(request)
        body = b"".join(request.stream) if isinstance(request.stream, httpx.ByteStream) else None
        repeatable = body is not None and (request.method in REPEATABLE_METHODS or "repeatable" in request.extensions)
        while True:
            connection = self._kept() or await self._connect(timeout.get("connect"))
            try:
                return await self._exchange(connection, request, head, body, chunked, timeout.get("read"))
            except StaleConnectionError:
                if not repeatable:
                    raise

    async def _exchange(
        self,
        connection: _Connection,
        request: httpx.Request,
        head: bytes,
        body: bytes | None,
        chunked: bool,
        read_s: float | None,
    ) -> httpx.Response:
        self._busy.add(connection)
        answer = connection.begin(request.method)
        sender = None
        try:
            if connection.closed:
                connection.connection_lost(None)
            elif body is not None:
                if chunked:
                    body = (b"%x\r\n%b\r\n" % (len(body), body) if body else b"") + b"0\r\n\r\n"
                connection.transport.write(head + body if len(body) < 65536 else head)
                if len(body) >= 65536:
                    connection.transport.write(body)
            else:
                connection.transport.write(head)
                stream = cast("httpx.AsyncByteStream", request.stream)
                sender = asyncio.create_task(self._send(connection, stream, chunked=chunked), name="upload")
            await (answer if read_s is None else _within(read_s, answer))
        except BaseException:
            if sender is not None:
                sender.cancel()
            self._busy.discard(connection)
            connection.abort()
            raise
        extensions: dict[str, Any] = {"http_version": b"HTTP/1.1", "reason_phrase": connection.reason}
        return httpx.Response(
            connection.status,
            headers=connection.headers,
            stream=_Body(self, connection, sender, read_s),
            extensions=extensions,
            request=request,
        )

    @staticmethod
    async def _send(connection: _Connection, stream: httpx.AsyncByteStream, *, chunked: bool) -> None:
        try:
            await connection.write_body(aiter(stream), chunked=chunked)
        except Exception as error:  # noqa: BLE001 - whatever the body's source raises ends the exchange, and is raised there
            connection.fail(error)

    def _head(self, request: httpx.Request) -> tuple[bytes, bool]:
        target: bytes = request.extensions.get("target", request.url.raw_path)
        headers = request.headers.raw
        lines = [b"%b %b HTTP/1.1" % (request.method.encode("ascii"), target)]
        chunked = has_host = False
        for name, value in headers:
            lower = name.lower()
            if lower == b"transfer-encoding":
                chunked = True
            elif lower == b"host":
                has_host = True
            lines.append(b"%b: %b" % (name, value))
        if not has_host:
            lines.insert(1, b"host: " + self._host_header)
        if any(b"\r" in line or b"\n" in line for line in lines):
            raise httpx.LocalProtocolError("a header or the target holds a line break")
        return b"\r\n".join(lines) + b"\r\n\r\n", chunked

    def _kept(self) -> _Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.closed or connection.transport.is_closing():
                continue
            if connection.loop.time() - connection.idle_since < IDLE_S:
                return connection
            connection.abort()
        return None

    async def _connect(self, connect_s: float | None) -> _Connection:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(connect_s):
                _, connection = await loop.create_connection(
                    lambda: _Connection(self._lost_idle), self._host, self._port, ssl=self._ssl
                )
        except TimeoutError as error:
            raise httpx.ConnectTimeout(f"no connection within {connect_s} s") from error
        except OSError as error:
            raise httpx.ConnectError(error.strerror or str(error)) from error
        return connection

    def _lost_idle(self) -> None:
        self.restarts += 1

    def release(self, connection: _Connection) -> None:
        """Takes a connection back after its response: kept if that was read to its end, else closed."""
        if connection not in self._busy:
            return
        self._busy.discard(connection)
        drained = not connection.chunks and not connection.transport.get_write_buffer_size()
        if connection.complete and connection.reusable and drained and not connection.closed:
            connection.parser = None
            connection.used = True
            connection.idle_since = connection.loop.time()
            self._idle.append(connection)
            if len(self._idle) > IDLE_LIMIT:
                self._idle.popleft().abort()
        else:
            connection.abort()

    async def aclose(self) -> None:
        """Closes every connection, those in use too."""
        for connection in (*self._idle, *self._busy):
            connection.fail(httpx.ReadError("lopsided is shutting down"))
        self._idle.clear()
        self._busy.clear()
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(0)


async def _within(seconds: float, awaitable: Any) -> Any:
    try:
        async with asyncio.timeout(seconds):
            return await awaitable
    except TimeoutError as error:
        raise httpx.ReadTimeout(f"no answer within {seconds} s") from error
