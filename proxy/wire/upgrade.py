"""Requests that offer to go on in another protocol, read as the plain ones that they are.

The JDK's ``HttpClient`` offers HTTP/2 (``Upgrade: h2c``) with the first request of each connection, a POST with a body too. Go,
and so Ollama, passes the offer over and reads the body (RFC 9110, 7.8: a server may). httptools takes every such body for bytes
of the other protocol: uvicorn would hand on an empty one, and read the real one as the next request.
"""

from __future__ import annotations

from typing import Any, cast

import httptools

from proxy.wire.heads import StrictProtocol


class PlainProtocol(StrictProtocol):
    """uvicorn's protocol for a server that upgrades to nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.parser = cast("httptools.HttpRequestParser", _Parser(self))

    def on_message_complete(self) -> None:
        """The end of a request, unless its body is still to be read."""
        if not (self.parser.should_upgrade() and _framing(self.headers)):
            super().on_message_complete()


class _Parser:
    """A parser of requests that goes on where httptools' own stops for an upgrade."""

    def __init__(self, protocol: PlainProtocol) -> None:
        self._protocol = protocol
        self._use(httptools.HttpRequestParser(protocol))

    def feed_data(self, data: bytes) -> None:
        while data:
            try:
                self._parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as upgrade:
                data = data[upgrade.args[0] :]
                self._go_on()

    def _go_on(self) -> None:
        framing = _framing(self._protocol.headers)
        resumed = _Resumed(self._protocol, has_head=framing is None)
        self._use(httptools.HttpRequestParser(resumed))
        if framing is not None:
            self._parser.feed_data(b"POST / HTTP/1.1\r\n%b: %b\r\n\r\n" % framing)
            resumed.has_head = True

    def _use(self, parser: httptools.HttpRequestParser) -> None:
        parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
        self._parser = parser
        self.should_upgrade, self.should_keep_alive = parser.should_upgrade, parser.should_keep_alive
        self.get_method, self.get_http_version = parser.get_method, parser.get_http_version


class _Resumed:
    """Hands on what its parser reads, less a first head that only says again how long the body is."""

    def __init__(self, protocol: PlainProtocol, *, has_head: bool) -> None:
        self.has_head = has_head
        self._protocol = protocol
        self.on_body, self.on_message_complete = protocol.on_body, protocol.on_message_complete

    def on_message_begin(self) -> None:
        if self.has_head:
            self._protocol.on_message_begin()

    def on_url(self, url: bytes) -> None:
        if self.has_head:
            self._protocol.on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.has_head:
            self._protocol.on_header(name, value)

    def on_headers_complete(self) -> None:
        if self.has_head:
            self._protocol.on_headers_complete()


def _framing(headers: list[tuple[bytes, bytes]]) -> tuple[bytes, bytes] | None:
    """The header that says how long the body is, ``None`` where there is none."""
    for name, value in headers:
        if name == b"transfer-encoding" or (name == b"content-length" and value.strip(b"0")):
            return name, value
    return None
