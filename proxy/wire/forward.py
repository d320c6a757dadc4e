"""Streaming pass-through, byte for byte, both ways: plain ASGI messages on one side, httpx on the other.

Nothing here knows what a request means. A body goes on as it comes in, an answer too; a client that leaves, before the
first byte of the answer too, ends the upstream request at once; an upstream that dies in the middle of an answer leaves a
broken stream behind, never one that looks complete.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterable
from contextlib import suppress
from types import TracebackType
from typing import Any

import httpx

from proxy.address import Address
from proxy.ollama.answers import Tail
from proxy.wire.asgi import Headers, Receive, Scope, Send
from proxy.wire.replies import Reply, error_reply, send_reply
from proxy.wire.transport import UpstreamTransport

CONNECT_S = 5.0
"""Longest wait for a connection to Ollama. There is none for answers: a load can take many minutes."""

HOP_BY_HOP = frozenset(
    {
        *(b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"proxy-connection"),
        *(b"te", b"trailer", b"transfer-encoding", b"upgrade", b"expect"),
    }
)
"""Headers that concern one connection alone (RFC 9110, 7.6.1). ``expect``: the server has answered it already."""

VIA = b"1.1 lopsided"
"""What a proxy adds to requests (RFC 9110, 7.6.3), and how it knows its own."""

log = logging.getLogger("lopsided.forward")


class ClientLeftError(Exception):
    """The client closed its connection while its request was still coming in."""


class ClientRequest:
    """A client's request: its headers, its body once, and a watch on whether the client is still there.

    As a context manager it cancels the task inside as soon as the client leaves, and swallows that cancellation.
    """

    def __init__(self, scope: Scope, receive: Receive) -> None:
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.raw_path: bytes = scope["raw_path"]
        self.query: bytes = scope["query_string"]
        self.headers: Headers = scope["headers"]
        self.left = False
        self._receive = receive
        self._unread = b""
        self._more = any(name in (b"content-length", b"transfer-encoding") for name, _ in self.headers)
        self._finished = False
        self._owner: asyncio.Task[Any] | None = None
        self._watcher: asyncio.Task[None] | None = None

    @property
    def target(self) -> bytes:
        """Path and query as the client wrote them."""
        return self.raw_path + b"?" + self.query if self.query else self.raw_path

    @property
    def has_body(self) -> bool:
        """The headers announce a body, be it an empty one."""
        return self._more

    def header(self, name: bytes) -> bytes | None:
        """The first header of that (lower-case) name."""
        return next((value for key, value in self.headers if key == name), None)

    async def body(self, limit_bytes: int) -> bytes | None:
        """The whole body, or ``None`` if it is larger than that; :meth:`stream` then still gives all of it."""
        parts, taken = [], 0
        while self._more and taken <= limit_bytes:
            parts.append(await self._part())
            taken += len(parts[-1])
        data = b"".join(parts)
        if self._more:
            self._unread = data
            return None
        return data

    async def stream(self) -> AsyncIterator[bytes]:
        """The body as it comes in."""
        if self._unread:
            data, self._unread = self._unread, b""
            yield data
        while self._more:
            if data := await self._part():
                yield data

    async def _part(self) -> bytes:
        """What comes in next, or nothing at the end of the body."""
        message = await self._receive()
        if message["type"] == "http.disconnect":
            self._leave()
            raise ClientLeftError
        self._more = message.get("more_body", False)
        if not self._more:
            self._watch()
        part: bytes = message.get("body", b"")
        return part

    async def __aenter__(self) -> ClientRequest:
        self._owner = asyncio.current_task()
        if not self._more:
            self._watch()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        self.finish()
        if self.left and self._owner is not None:
            return self._owner.uncancel() == 0 and (kind is None or issubclass(kind, (asyncio.CancelledError, ClientLeftError)))
        return False

    def finish(self) -> None:
        """The answer is complete: from here on a client that leaves changes nothing."""
        self._finished = True
        if self._watcher is not None:
            self._watcher.cancel()

    def _watch(self) -> None:
        if self._watcher is None and not self._finished:
            self._watcher = asyncio.create_task(self._until_left(), name="watch-client")

    async def _until_left(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._leave()

    def _leave(self) -> None:
        if not self._finished and not self.left and self._owner is not None:
            self.left = True
            self._owner.cancel()


class _Upload(httpx.AsyncByteStream):
    def __init__(self, request: ClientRequest) -> None:
        self._request = request

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self._request.stream()


class Forwarder:
    """Sends clients' requests to one upstream and brings the answers back."""

    def __init__(self, upstream: Address) -> None:
        self.upstream = upstream
        self._url = httpx.URL(upstream.url)
        self._prefix = f"/{upstream.path}".encode() if upstream.path else b""
        self._host = None if keeps_host(upstream) else upstream.authority.encode()
        self.transport = UpstreamTransport(upstream.url)
        self.client = httpx.AsyncClient(
            transport=self.transport,
            timeout=httpx.Timeout(None, connect=CONNECT_S),
            base_url=upstream.url,
            trust_env=False,
        )
        self._timeout = self.client.timeout.as_dict()

    async def pass_through(self, request: ClientRequest, send: Send) -> None:
        """The request as it is, the answer as it is. The body must not have been read, or not to its end."""
        await self.relay(request, await self.open(request), send)

    async def open(self, request: ClientRequest, body: bytes | None = None) -> httpx.Response | Reply:
        """The upstream's answer once its headers are there; with ``body``, that instead of the client's.

        An upstream that can't be reached or breaks off before it answers gives the error answer to send instead.
        """
        headers = self._request_headers(request, body)
        streamed = body is None and request.has_body
        stream: httpx.AsyncByteStream = _Upload(request) if streamed else httpx.ByteStream(body or b"")
        extensions: dict[str, Any] = {"target": self._prefix + request.target, "timeout": self._timeout}
        if body is not None:
            extensions["repeatable"] = True
        upstream_request = httpx.Request(request.method, self._url, headers=headers, stream=stream, extensions=extensions)
        try:
            return await self.transport.handle_async_request(upstream_request)  # the client's cookies and redirects are its own
        except httpx.ConnectTimeout as error:
            return self._unreachable(f"did not accept a connection: {error}")
        except httpx.ConnectError as error:
            return self._unreachable(f"cannot be reached: {error}")
        except httpx.TransportError as error:
            log.warning("%s broke off before it answered a %s: %s", self.upstream.url, request.method, error)
            return error_reply(
                502,
                f"Ollama at {self.upstream.url} broke off before it answered: {error}. "
                "It may have been stopped or have crashed; its own log says why.",
            )

    async def relay(
        self,
        request: ClientRequest,
        response: httpx.Response | Reply,
        send: Send,
        *,
        seen: bytes = b"",
        extra_headers: Iterable[tuple[bytes, bytes]] = (),
        tail: Tail | None = None,
    ) -> None:
        """Sends ``response`` to the client as it comes, ``extra_headers`` after its own, and closes it in any case.

        ``seen`` is the beginning of its body, where :meth:`peek` has read that; ``tail`` is shown what goes by.
        """
        if not isinstance(response, httpx.Response):
            request.finish()
            await send_reply(response, send, extra_headers=extra_headers)
            return
        try:
            headers = without_hop_by_hop(response.headers.raw)
            headers.extend(extra_headers)
            await send({"type": "http.response.start", "status": response.status_code, "headers": headers})
            if seen:
                await send({"type": "http.response.body", "body": seen, "more_body": True})
            async for chunk in response.stream:  # type: ignore[union-attr]
                if tail is not None:
                    tail.feed(chunk)
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            request.finish()
            await send({"type": "http.response.body", "body": b""})
        except httpx.TransportError as error:
            # Returning without the last message makes the server close the connection: a broken stream stays a broken one.
            log.warning("%s broke off in the middle of an answer to a %s: %s", self.upstream.url, request.method, error)
        finally:
            await response.aclose()

    async def peek(self, response: httpx.Response, limit_bytes: int) -> bytes:
        """The beginning of the body: all of it, or at least ``limit_bytes``, or what came before the upstream broke off."""
        seen = b""
        with suppress(httpx.TransportError):
            async for chunk in response.stream:  # type: ignore[union-attr]
                seen += chunk
                if len(seen) >= limit_bytes:
                    break
        return seen

    async def aclose(self) -> None:
        """Closes the connections to the upstream."""
        await self.client.aclose()

    def _request_headers(self, request: ClientRequest, body: bytes | None) -> Headers:
        headers = without_hop_by_hop(request.headers)
        if self._host is not None:
            headers = [(name, self._host if name == b"host" else value) for name, value in headers]
        if body is not None:
            headers = [(name, value) for name, value in headers if name != b"content-length"]
            headers.append((b"content-length", str(len(body)).encode()))
        elif request.has_body and not any(name == b"content-length" for name, _ in headers):
            headers.append((b"transfer-encoding", b"chunked"))
        headers.append((b"via", VIA))
        return headers

    def _unreachable(self, problem: str) -> Reply:
        return error_reply(
            502,
            f"Ollama at {self.upstream.url} {problem}. Is it running (`ollama serve`)? "
            "Another address is set with LOPSIDED_UPSTREAM or OLLAMA_HOST.",
        )


def without_hop_by_hop(headers: Iterable[tuple[bytes, bytes]]) -> Headers:
    """``headers`` less those that concern one connection alone, also those that ``Connection`` names; the rest in order."""
    headers = list(headers)
    named = {token.strip().lower() for name, value in headers if name.lower() == b"connection" for token in value.split(b",")} - {
        b"host",
        b"content-length",
    }
    drop = HOP_BY_HOP | named if named else HOP_BY_HOP
    return [(name, value) for name, value in headers if name.lower() not in drop]


def keeps_host(upstream: Address) -> bool:
    """Whether the client's ``Host`` goes on unchanged.

    It does to an Ollama at an IP address or a plain name: Ollama checks it there itself when it listens on loopback. Behind
    TLS or a full domain name stands a server that picks its site by ``Host``, and gets its own.
    """
    return upstream.scheme == "http" and ("." not in upstream.host or upstream.host.replace(".", "").isdigit())
