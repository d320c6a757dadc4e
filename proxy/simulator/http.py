"""HTTP as Go's ``net/http`` and gin speak it, on plain ASGI: lengths, chunks, statuses, cross-origin rules, ``Host`` checks."""

from __future__ import annotations

import ipaddress
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, MutableMapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from proxy.simulator import gojson

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

BUFFERED_BYTES = 2048
"""``bufferBeforeChunkingSize``: a longer body without a stated length goes out chunked."""
JSON = "application/json; charset=utf-8"
"""What gin's ``c.JSON`` sends; ``/v1`` and some others leave the charset out."""
PLAIN_JSON = "application/json"
NDJSON = "application/x-ndjson"
EVENTS = "text/event-stream"

_LOCAL_ORIGIN_HOSTS = ("localhost", "127.0.0.1", "0.0.0.0")
_LOCAL_ORIGIN_SCHEMES = ("app", "file", "tauri", "vscode-webview", "vscode-file")
"""``envconfig.AllowedOrigins``."""
_LOCAL_DOMAINS = (".localhost", ".local", ".internal")
"""``allowedHost`` in ``server/routes.go``."""
_CORS_HEADERS = (
    "Authorization,Content-Type,User-Agent,Accept,X-Requested-With,Openai-Beta,X-Stainless-Arch,X-Stainless-Async,"
    "X-Stainless-Custom-Poll-Interval,X-Stainless-Helper-Method,X-Stainless-Lang,X-Stainless-Os,X-Stainless-Package-Version,"
    "X-Stainless-Poll-Helper,X-Stainless-Retry-Count,X-Stainless-Runtime,X-Stainless-Runtime-Version,X-Stainless-Timeout"
)
_CORS_METHODS = "GET,POST,PUT,PATCH,DELETE,HEAD,OPTIONS"


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """A request whose body has been read."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes = b""


@dataclass(frozen=True, kw_only=True, slots=True)
class Response:
    """An answer: a body of bytes, or the pieces of a stream, each of which is one chunk."""

    status: int = 200
    content_type: str | None = None
    body: bytes | AsyncGenerator[bytes, None] = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    bodiless: bool = False
    """Neither length nor chunks are stated: what Go does for ``HEAD`` when the handler wrote nothing."""


def json_response(value: Any, *, status: int = 200, content_type: str = JSON, newline: bool = False) -> Response:
    """``value`` as Go encodes it; ``/v1`` ends it with a newline."""
    return Response(status=status, content_type=content_type, body=gojson.encode(value) + (b"\n" if newline else b""))


def error(status: int, message: str) -> Response:
    """Ollama's error shape."""
    return json_response({"error": message}, status=status)


async def respond(send: Send, response: Response, extra: list[tuple[str, str]]) -> None:
    """Sends ``response`` with the ``extra`` headers before its own, in Go's order: sorted, then the length."""
    headers = [*extra, *response.headers.items()]
    if response.content_type:
        headers.append(("Content-Type", response.content_type))
    headers.sort(key=lambda header: header[0])
    body = response.body
    if isinstance(body, bytes) and len(body) <= BUFFERED_BYTES and not response.bodiless and response.status != 204:
        headers.append(("Content-Length", str(len(body))))
    await send(
        {
            "type": "http.response.start",
            "status": response.status,
            "headers": [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers],
        }
    )
    if isinstance(body, bytes):
        await send({"type": "http.response.body", "body": body})
        return
    async with aclosing(body):
        async for piece in body:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


def host_allowed(host: str) -> bool:
    """Whether a server bound to loopback answers to this ``Host`` (``allowedHostsMiddleware``)."""
    name = (urlsplit(f"//{host}").hostname or "").lower()
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return name in ("", "localhost") or name.endswith(_LOCAL_DOMAINS)
    return address.is_loopback or address.is_private or address.is_unspecified


def origin_headers(request: Request, *, allowed_methods: str | None) -> tuple[int | None, list[tuple[str, str]]]:
    """The cross-origin rules: a status where they end the request (403, 204 for a preflight), and the headers to add.

    ``allowed_methods`` is the ``Allow`` header of a path that does not take this method, ``None`` where it does.
    """
    origin = request.headers.get("origin", "")
    host = request.headers.get("host", "")
    if not origin or origin in (f"http://{host}", f"https://{host}"):
        return None, []
    parts = urlsplit(origin)
    local = parts.scheme in _LOCAL_ORIGIN_SCHEMES or (
        parts.scheme in ("http", "https") and (parts.hostname or "") in _LOCAL_ORIGIN_HOSTS
    )
    if not local:
        return 403, []
    allow_origin = ("Access-Control-Allow-Origin", origin)
    if request.method != "OPTIONS":
        return None, [allow_origin, ("Vary", "Origin")]
    return 204, [
        ("Access-Control-Allow-Headers", _CORS_HEADERS),
        ("Access-Control-Allow-Methods", _CORS_METHODS),
        allow_origin,
        ("Access-Control-Max-Age", "43200"),
        *([("Allow", allowed_methods)] if allowed_methods else []),
        ("Vary", "Origin"),
        ("Vary", "Access-Control-Request-Method"),
        ("Vary", "Access-Control-Request-Headers"),
    ]
