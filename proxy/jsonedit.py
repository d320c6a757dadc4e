"""Changes inside a JSON text that leave every other byte as it is.

A request's body is never parsed and written anew: numbers keep their notation, keys their order, unknown fields, repeated keys
and blanks stay. Instead the members of one object are located (:func:`members`), and bytes are cut out and put in
(:func:`edit`, :func:`splice`). Strings are skipped with ``bytes.find``, so ten megabytes of an image cost a millisecond.

The scan follows RFC 8259 as far as structure goes: it knows where each value ends, not whether a number is well formed.
A text whose structure it does not understand raises ``JsonError``; nothing is guessed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

TOKEN_LIMIT = 1_000_000
"""Braces, brackets and strings that one scan looks at, less than 0.5 s of work; beyond it the text counts as not understood."""

MEMBER_LIMIT = 10_000
"""Members of the objects that are looked into: a request has about twenty, with all of its options fifty."""

DEPTH_LIMIT = 10_000
"""Nested containers, as in Go's ``encoding/json``."""

VALUE_LIMIT_BYTES = 4096
"""Largest value that is decoded: what is looked at are names, options and times."""

_ENCODER = json.JSONEncoder(separators=(",", ":"))
_value_of = json.JSONDecoder().raw_decode
"""``json.loads`` of a text that is one value and nothing else, as the scan cuts them out: without looks at what is around it."""
_BLANK = re.compile(rb"[ \t\n\r]*")
_OBJECT = re.compile(rb"[ \t\n\r]*\{[ \t\n\r]*(\})?")
"""The beginning of an object, or all of an empty one."""
_SCALAR = re.compile(rb"(?:true|false|null|-?(?:0|[1-9]\d*+)(?:\.\d++)?+(?:[eE][+-]?\d++)?+)(?=[ \t\n\r,\]}]|$)")
_KEY = rb'[ \t\n\r]*"([^"\\\x00-\x1f]{0,256})"[ \t\n\r]*:[ \t\n\r]*'
_TEXT = rb'"[^"\\]{0,1024}+(?:\\.[^"\\]{0,256}+){0,256}+"'
"""A string, but for one so long that ``bytes.find`` is the faster way."""
_FLAT = rb'(?:[^"{}\[\]]++|%b)*+' % _TEXT
"""Anything but brackets."""
_VALUE = rb"%b|true|false|null|-?(?:0|[1-9]\d*+)(?:\.\d++)?+(?:[eE][+-]?\d++)?+|\{%b\}|\[%b(?:\{%b\}%b)*+\]" % (
    *(_TEXT, _FLAT),
    *(_FLAT, _FLAT, _FLAT),
)
"""A value as nearly all are: messages are a list of flat objects, options one of those."""
_MEMBER = re.compile(rb"%b(%b)[ \t\n\r]*([,}])" % (_KEY, _VALUE))
"""A member as nearly all are, with what follows it; everything else takes the longer way."""
_UNSTRUCTURED = re.compile(_FLAT)


class JsonError(ValueError):
    """The text is no JSON, or too large to be looked through."""


class Member(NamedTuple):
    """One ``"key": value`` of an object: the decoded key, and where the member and its value begin and end."""

    key: str
    start: int
    value_start: int
    end: int


def blank_end(text: bytes, start: int) -> int:
    """The first position from ``start`` on that is no blank."""
    return _BLANK.match(text, start).end()  # type: ignore[union-attr]  # it matches the empty string


def members(text: bytes, start: int = 0) -> tuple[Member, ...]:
    """The members of the object that begins at ``start``, in order, repeated keys repeated.

    Raises ``JsonError`` where no object begins there or its structure is broken.
    """
    found: list[Member] = []
    if not (opened := _OBJECT.match(text, start)):
        raise JsonError(f"expected an object at byte {start}")
    if opened[1]:
        return ()
    scan, position = _Scan(text), opened.end()
    while True:
        if match := _MEMBER.match(text, position):
            position = match.start(1) - 1
            member = Member(str(match[1], "utf-8", "replace"), position, *match.span(2))  # as Go reads it
            follower = match[3]
            position = match.end()
        else:
            position = blank_end(text, position)
            key_end = scan.string_end(position)
            value_start = scan.expect(b":", key_end)
            end = scan.value_end(value_start)
            member = Member(key=decode_string(text[position:key_end]), start=position, value_start=value_start, end=end)
            position = blank_end(text, end)
            follower = text[position : position + 1]
            position += 1
        found.append(member)
        if len(found) > MEMBER_LIMIT:
            raise JsonError(f"an object of more than {MEMBER_LIMIT} members")
        if follower == b"}":
            return tuple(found)
        if follower != b",":
            raise JsonError(f"expected a comma or a brace at byte {position - 1}")


def elements(text: bytes, start: int) -> tuple[tuple[int, int], ...]:
    """Where each element of the array that begins at ``start`` begins and ends. Raises ``JsonError``."""
    scan = _Scan(text)
    found: list[tuple[int, int]] = []
    position = scan.expect(b"[", start)
    if text[position : position + 1] == b"]":
        return ()
    while True:
        end = scan.value_end(position)
        found.append((position, end))
        follower = blank_end(text, end)
        if text[follower : follower + 1] == b"]":
            return tuple(found)
        position = scan.expect(b",", follower)


Change = tuple[int, int, bytes]
"""Where a piece of a text begins and ends, and what is to stand there instead."""


def edit(
    start: int, found: Sequence[Member], *, remove: Iterable[Member] = (), add: Mapping[str, Any] | None = None
) -> list[Change]:
    """What is to change for members of the object at ``start`` to be cut out and new ones put in front of the others.

    ``found`` are the object's members as :func:`members` gave them, ``remove`` some of those.
    """
    gone = frozenset(remove)
    kept = [index for index, member in enumerate(found) if member not in gone]
    last_kept = kept[-1] if kept else -1
    changes = []
    if add:
        changes.append((start + 1, start + 1, encode(add)[1:-1] + (b"," if kept else b"")))
    for index, member in enumerate(found):
        if member not in gone:
            continue
        if index < last_kept:  # with the comma after it
            changes.append((member.start, found[index + 1].start, b""))
        else:  # with the comma before it
            changes.append((found[index - 1].end if index else member.start, member.end, b""))
    return changes


def encode(value: Mapping[str, Any]) -> bytes:
    """``value`` as JSON without blanks, in ASCII."""
    return _ENCODER.encode(dict(value)).encode("ascii")


def splice(text: bytes, changes: Iterable[Change]) -> bytes:
    """``text`` with all of ``changes`` made at once; their places must not overlap."""
    view = memoryview(text)
    parts: list[bytes | memoryview] = []
    position = 0
    for start, end, instead in sorted(changes):
        parts += (view[position:start], instead)
        position = end
    return b"".join((*parts, view[position:]))


def decode_string(token: bytes) -> str:
    """The text of a JSON string, quotes included in ``token``. Raises ``JsonError``."""
    try:
        return str(_value_of(token.decode(errors="replace"))[0])
    except ValueError as error:
        raise JsonError(f"not a string: {error}") from None


def decode(text: bytes, member: Member) -> Any:
    """The member's value. Raises ``JsonError`` where it is larger than ``VALUE_LIMIT_BYTES`` or no JSON."""
    if member.end - member.value_start > VALUE_LIMIT_BYTES:
        raise JsonError(f"the value of {member.key!r} is larger than {VALUE_LIMIT_BYTES} bytes")
    try:
        return _value_of(text[member.value_start : member.end].decode(errors="replace"))[0]
    except (ValueError, RecursionError) as error:
        raise JsonError(f"the value of {member.key!r} is no JSON: {error}") from None


class _Scan:
    def __init__(self, text: bytes) -> None:
        self.text = text
        self.left = TOKEN_LIMIT

    def expect(self, byte: bytes, position: int) -> int:
        """The position after ``byte`` and the blanks that follow it."""
        position = blank_end(self.text, position)
        if self.text[position : position + 1] != byte:
            raise JsonError(f"expected {byte.decode()} at byte {position}")
        return blank_end(self.text, position + 1)

    def string_end(self, start: int) -> int:
        """The position after the string that begins at ``start``."""
        text = self.text
        if text[start : start + 1] != b'"':
            raise JsonError(f"expected a string at byte {start}")
        end = start
        while True:
            self.count()
            end = text.find(b'"', end + 1)
            if end < 0:
                raise JsonError("a string does not end")
            backslashes = end
            while text[backslashes - 1] == 0x5C:
                backslashes -= 1
            if (end - backslashes) % 2 == 0:
                return end + 1

    def value_end(self, start: int) -> int:
        """The position after the value that begins at ``start``."""
        text = self.text
        first = text[start : start + 1]
        if first == b'"':
            return self.string_end(start)
        if first not in (b"{", b"["):
            if not first or not (match := _SCALAR.match(text, start)):
                raise JsonError(f"expected a value at byte {start}")
            return match.end()
        expected = []
        position = start
        while True:
            self.count()
            position = _UNSTRUCTURED.match(text, position).end()  # type: ignore[union-attr]  # it matches the empty string
            if position == len(text):
                raise JsonError("an object or array does not end")
            found = text[position]
            if found == 0x22:
                position = self.string_end(position)
                continue
            position += 1
            if found in b"{[":
                expected.append(found + 2)  # the closing one comes two later in ASCII, for both kinds
                if len(expected) > DEPTH_LIMIT:
                    raise JsonError(f"more than {DEPTH_LIMIT} nested values")
            elif found != expected.pop():
                raise JsonError(f"wrong bracket at byte {position - 1}")
            elif not expected:
                return position

    def count(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise JsonError(f"more than {TOKEN_LIMIT} braces, brackets and strings")
