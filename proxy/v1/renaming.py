"""Answers in which a derived model goes by the name that people know, and lists that do not show it.

Everything here wraps an ASGI ``send`` and touches nothing but names. In answers that is the JSON string that is the derived
name behind the key ``model``, at whatever depth (chunks of a stream, Anthropic's ``message``, Responses' ``response``): within
a string its quotes would be escaped, so no text of a model's can be taken for it. Error messages are texts, and there the name
is replaced wherever it stands. A stream is held back by no more than the beginning of that string at the end of a chunk, and a
chunk that ends a line, as all of Ollama's do, not at all.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from proxy.jsonedit import JsonError, Member, decode, elements, members, splice
from proxy.ollama.names import SUFFIX, base_of, shown
from proxy.wire.asgi import Message, Send

HELD_BYTES = 1024 * 1024
"""Largest answer of stated length, or error, that is held until it is complete: Ollama states no length above 2 KiB."""

LIST_BYTES = 16 * 1024 * 1024
"""Largest list that is looked through: 30 000 models."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Alias:
    """Whose ``name`` goes to the client where Ollama says ``derived``; both plain ASCII without quotes."""

    derived: str
    name: str

    def in_members(self, data: bytes) -> bytes:
        """``data`` with the client's name wherever the derived one is the value of ``model``."""
        derived, name = self.derived.encode(), self.name.encode()
        if derived not in data:
            return data
        for key in _KEYS:
            data = data.replace(b'%b"%b"' % (key, derived), b'%b"%b"' % (key, name))
        return data

    def in_errors(self, data: bytes) -> bytes:
        """``data``, an error answer, without the derived name.

        Ollama quotes the name that it was asked for; without quotes it says the model's name in all four parts.
        """
        derived, name = self.derived.encode(), self.name.encode()
        for quote in (b"'", b'\\"', b'"'):
            data = data.replace(b"%b%b%b" % (quote, derived, quote), b"%b%b%b" % (quote, name, quote))
        return data.replace(derived, (base_of(self.derived) or self.name).encode())


_KEYS = (b'"model":', b'"model": ')


class Held:
    """A ``send`` that holds the answer until it is complete, and then sends it edited.

    An answer that is encoded, larger than ``limit_bytes``, or never complete (:meth:`let_go`) goes on as it came.
    """

    def __init__(self, send: Send, edit: Callable[[bytes], bytes], *, limit_bytes: int) -> None:
        self._send = send
        self._edit = edit
        self._limit_bytes = limit_bytes
        self._start: Message | None = None
        self._body = bytearray()
        self._passes = False

    async def __call__(self, message: Message) -> None:
        """Takes one message of the answer."""
        if self._passes:
            await self._send(message)
        elif message["type"] == "http.response.start":
            self._start = message
            if header(message, b"content-encoding") is not None:
                await self.let_go()
        else:
            self._body += message.get("body", b"")
            if len(self._body) > self._limit_bytes:
                await self.let_go()
                message = {**message, "body": b""}
            if self._passes:
                await self._send(message)
            elif not message.get("more_body", False):
                await self._complete()

    async def let_go(self) -> None:
        """Sends what is held as it came; the rest follows, or does not."""
        if self._passes or self._start is None:
            return
        self._passes = True
        await self._send(self._start)
        if self._body:
            await self._send({"type": "http.response.body", "body": bytes(self._body), "more_body": True})

    async def _complete(self) -> None:
        self._passes = True
        body = self._edit(bytes(self._body))
        start = self._start or {}
        length = (b"content-length", str(len(body)).encode())
        headers = [length if name.lower() == b"content-length" else (name, value) for name, value in start["headers"]]
        await self._send({**start, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})


class Renamed:
    """A ``send`` for the answer to a request that went out under a derived name. Call :meth:`finish` at its end."""

    def __init__(self, send: Send, alias: Alias) -> None:
        self._send = send
        self._alias = alias
        self._held: Held | None = None
        self._encoded = False
        self._rest = b""
        self._needles = tuple(b'%b"%b"' % (key, alias.derived.encode()) for key in _KEYS)

    async def __call__(self, message: Message) -> None:
        """Takes one message of the answer."""
        if message["type"] == "http.response.start":
            message = self._started(message)
        elif self._held is None and not self._encoded:
            message = {**message, "body": self.renamed(message.get("body", b""), ends=not message.get("more_body", False))}
            if not message["body"] and message.get("more_body"):
                return
        await (self._held or self._send)(message)

    def renamed(self, data: bytes, *, ends: bool = False) -> bytes:
        """What can go on of a stream once ``data`` has come."""
        if self._rest:
            data, self._rest = self._rest + data, b""
        if not ends and not data.endswith(b"\n") and (left := self._unsure(data)):
            data, self._rest = data[:-left], data[-left:]
        return self._alias.in_members(data)

    async def finish(self) -> None:
        """The answer is over; one that broke off goes on as far as it came."""
        if self._held is not None:
            await self._held.let_go()

    def _started(self, message: Message) -> Message:
        length = header(message, b"content-length")
        if header(message, b"content-encoding") is not None:
            self._encoded = True
        elif message["status"] >= 400:
            self._held = Held(self._send, self._alias.in_errors, limit_bytes=HELD_BYTES)
        elif length is not None and int(length) <= HELD_BYTES:
            self._held = Held(self._send, self._alias.in_members, limit_bytes=HELD_BYTES)
        elif length is not None:
            kept = [(name, value) for name, value in message["headers"] if name.lower() != b"content-length"]
            return {**message, "headers": kept}
        return message

    def _unsure(self, data: bytes) -> int:
        """How many bytes at the end of ``data`` may be the beginning of what is looked for."""
        longest = max(map(len, self._needles)) - 1
        start = data.find(b'"', max(len(data) - longest, 0))
        while start >= 0:
            if any(needle.startswith(data[start:]) for needle in self._needles):
                return len(data) - start
            start = data.find(b'"', start + 1)
        return 0


def header(message: Message, name: bytes) -> bytes | None:
    """The first header of that (lower-case) name in a ``http.response.start``."""
    return next((value for key, value in message["headers"] if key.lower() == name), None)


def shown_list(path: str, body: bytes, *, is_hidden: Callable[[str], bool], digest: Callable[[str], str | None]) -> bytes:
    """A list of Ollama's without derived models; in ``/api/ps`` they stand there as the models that they stand for.

    ``digest`` gives the digest of a derived model's base. What can't be understood comes back as it is.
    """
    if SUFFIX.encode() not in body:
        return body
    try:
        found = members(body)
        array = next((member for member in found if member.key in ("models", "data")), None)
        if array is None or body[array.value_start : array.value_start + 1] != b"[":
            return body
        items = elements(body, array.value_start)
        hidden = {index: fields for index, (start, end) in enumerate(items) if (fields := _derived(body, start, end, is_hidden))}
        if path == "/api/ps":
            return splice(body, [change for fields in hidden.values() for change in _as_base(body, fields, digest)])
        kept = [body[start:end] for index, (start, end) in enumerate(items) if index not in hidden]
    except JsonError:
        return body
    return splice(body, [(items[0][0], items[-1][1], b",".join(kept))]) if hidden else body


def _derived(body: bytes, start: int, end: int, is_hidden: Callable[[str], bool]) -> dict[str, Member] | None:
    """The members of a list's entry where it is a derived model's."""
    if SUFFIX.encode() not in body[start:end]:
        return None
    fields = {member.key: member for member in members(body, start)}
    return fields if is_hidden(_text(body, fields, "name") or _text(body, fields, "id")) else None


def _as_base(body: bytes, fields: dict[str, Member], digest: Callable[[str], str | None]) -> list[tuple[int, int, bytes]]:
    derived = _text(body, fields, "name")
    name = shown(base_of(derived) or derived)
    values: dict[str, Any] = {"name": name, "model": name, "digest": digest(derived)}
    return [
        (fields[key].value_start, fields[key].end, json.dumps(value).encode())
        for key, value in values.items()
        if value and key in fields
    ]


def _text(body: bytes, fields: dict[str, Member], key: str) -> str:
    value = decode(body, fields[key]) if key in fields else ""
    return value if isinstance(value, str) else ""
