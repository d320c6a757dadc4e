"""What uvicorn's parser lets through of a request, and Go's, and so Ollama's, does not.

Headers, trailers and chunk extensions of any size: Go stops at 1 MiB with 431. Trailers, which uvicorn would append to the
headers of a request that is already under way, are dropped: nobody here has a use for them, and they come after every check.
Two hosts or none, transfer codings other than ``chunked``, HTTP/0.9: 400. And answers of no stated length to HTTP/1.0, which
knows no chunks: they end with the connection.
"""

from __future__ import annotations

import re
import socket
import struct
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from proxy.wire.asgi import Application, Message, Receive, Scope, Send

HEAD_LIMIT_BYTES = 2**20
"""Bytes in a row that may be anything but a body; ``DefaultMaxHeaderBytes`` of Go's ``net/http``."""

_ABSOLUTE = re.compile(rb"https?://(?:[^/?#]*@)?([^/?#]*)", re.IGNORECASE)
"""The host of a request's target that is a whole URL."""

_TOO_LARGE = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-type: application/json; charset=utf-8\r\n"
    b"content-length: %d\r\nconnection: close\r\n\r\n%b"
)
_TEXT = b'{"error":"lopsided: the request\'s headers are larger than %d bytes"}' % HEAD_LIMIT_BYTES


class StrictProtocol(HttpToolsProtocol):
    """uvicorn's protocol, as strict as Go's in all of that."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_bytes = 0
        self._in_head = False
        self._went_on = False

    def data_received(self, data: bytes) -> None:
        """Parses ``data``, and ends the connection where nothing but head has come for too long."""
        self._went_on = False
        super().data_received(data)
        self._head_bytes = 0 if self._went_on else self._head_bytes + len(data)
        if self._head_bytes > HEAD_LIMIT_BYTES and not self.transport.is_closing():
            if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
                self.transport.write(_TOO_LARGE % (len(_TEXT), _TEXT))
            self.transport.close()

    def on_message_begin(self) -> None:
        """A request begins."""
        self._in_head = True
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header, or a trailer."""
        if self._in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The head ends. An error raised here is answered with 400."""
        self._in_head = False
        self._went_on = True
        names = [name for name, _ in self.headers]
        if absolute := _ABSOLUTE.match(self.url):  # its host counts (RFC 9112, 3.2.2)
            self.headers[:] = [(name, absolute[1] if name == b"host" else value) for name, value in self.headers]
        if names.count(b"host") != 1 and (b"host" in names or self.parser.get_http_version() != "1.0"):
            raise ValueError("RFC 9112, 3.2: one Host")
        if b"transfer-encoding" in names and dict(self.headers)[b"transfer-encoding"].lower() != b"chunked":
            raise ValueError("RFC 9112, 6.1: a transfer coding that would be lost on the way")
        super().on_headers_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        if cycle.scope["http_version"] == "1.0":
            app = _without_chunks(app, cycle)
        super()._start_asgi_task(cycle, app)

    def on_body(self, body: bytes) -> None:
        """A part of the body."""
        self._went_on = True
        if self.cycle.body:
            super().on_body(body)
        else:  # uvicorn collects in a bytearray, which copies each part of a large body twice
            self.cycle.body = body  # type: ignore[assignment]
            super().on_body(b"")


def _without_chunks(app: Application, cycle: RequestResponseCycle) -> Application:
    """``app`` for a client of HTTP/1.0: a body of no stated length goes out as it is, and ends with the connection.

    One that breaks off ends with a reset, since nothing else tells it from a whole one.
    """

    async def plain(scope: Scope, receive: Receive, send: Send) -> None:
        stated = True

        async def send_plain(message: Message) -> None:
            nonlocal stated
            if message["type"] == "http.response.start":
                stated = any(name.lower() == b"content-length" for name, _ in message["headers"])
                cycle.chunked_encoding = None if stated else False
            elif not stated:
                cycle.expected_content_length = len(message["body"])
            await send(message)

        try:
            await app(scope, receive, send_plain)
        finally:
            if not (stated or cycle.response_complete or cycle.disconnected):
                cycle.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                cycle.transport.abort()

    return plain
