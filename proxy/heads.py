"""Bounds on what is no body: uvicorn's parser takes headers, trailers and chunk extensions of any size, and keeps most of it.

Go, and so Ollama, stops at 1 MiB of headers with 431. Trailers, which uvicorn would append to the headers of a request that is
already under way, are dropped: nobody here has a use for them, and they come after every check.
"""

from __future__ import annotations

from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_LIMIT_BYTES = 2**20
"""Bytes in a row that may be anything but a body; ``DefaultMaxHeaderBytes`` of Go's ``net/http``."""

_TOO_LARGE = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-type: application/json; charset=utf-8\r\n"
    b"content-length: %d\r\nconnection: close\r\n\r\n%b"
)
_TEXT = b'{"error":"lopsided: the request\'s headers are larger than %d bytes"}' % HEAD_LIMIT_BYTES


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's protocol, with that bound."""

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
        """The head ends."""
        self._in_head = False
        self._went_on = True
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A part of the body."""
        self._went_on = True
        if self.cycle.body:
            super().on_body(body)
        else:  # uvicorn collects in a bytearray, which copies each part of a large body twice
            self.cycle.body = body  # type: ignore[assignment]
            super().on_body(b"")
