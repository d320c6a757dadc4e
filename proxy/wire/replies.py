"""Answers of lopsided's own, in the shape of Ollama's: ``{"error": "lopsided: …"}``."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from proxy.wire.asgi import Send


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """A whole JSON answer, or an empty one."""

    status: int
    body: bytes


def json_reply(status: int, value: Any) -> Reply:
    """``value`` as JSON."""
    return Reply(status=status, body=json.dumps(value, ensure_ascii=False).encode())


def error_reply(status: int, message: str) -> Reply:
    """An error in Ollama's shape that says whose it is."""
    return json_reply(status, {"error": f"lopsided: {message}"})


async def send_reply(reply: Reply, send: Send, *, extra_headers: Iterable[tuple[bytes, bytes]] = ()) -> None:
    """Sends it as the answer."""
    headers = [(b"content-length", str(len(reply.body)).encode()), *extra_headers]
    if reply.body:
        headers.insert(0, (b"content-type", b"application/json; charset=utf-8"))
    await send({"type": "http.response.start", "status": reply.status, "headers": headers})
    await send({"type": "http.response.body", "body": reply.body})
