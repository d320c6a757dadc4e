"""Which of Ollama's endpoints load a model, where their options stand, and what one request asks for.

Names of fields are compared as Go's ``encoding/json`` does: without regard to case, the last one counts. ``options`` is a map
there, so several of them add up, and its own keys are compared exactly.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from proxy.jsonedit import MEMBER_LIMIT, Change, JsonError, Member, blank_end, decode, edit, encode, members, splice

Kind = Literal["load", "v1", "store", "list", "other"]

LOAD_PATHS: Mapping[str, str | None] = {
    "/api/generate": "prompt",
    "/api/chat": "messages",
    "/api/embed": None,
    "/api/embeddings": None,
}
"""Endpoints that load the model they name with the ``options`` they carry; and the field that, empty beside a
``keep_alive`` of zero, makes the request one to unload (``GenerateHandler``, ``ChatHandler`` in ``server/routes.go``)."""

V1_PATHS = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses", "/v1/messages"})
"""Endpoints that load a model and know no options."""

STORE_PATHS = frozenset({"/api/create", "/api/copy", "/api/delete", "/api/pull"})
"""Endpoints after which a name may stand for another model."""

LIST_PATHS = frozenset({"/api/tags", "/api/ps", "/v1/models"})
"""Endpoints that name models unasked."""

INTEGER_OPTIONS = ("num_gpu", "main_gpu", "num_ctx", "num_batch")
"""Options that placement looks at and that Ollama takes as integers only."""

QUOTE_LIMIT = 4_000_000
"""Quotes in a body that is looked through, less than 0.5 s of work; beyond it the request passes as it is."""

FEW_QUOTES = 10_000
"""Quotes up to which they are found one by one: that passes over an image thirty times as fast as counting does."""

_ZERO_DURATION = re.compile(r"[+-]?(?:0++\.?0*+|\.0++)(?:(?:ns|us|µs|μs|ms|s|m|h)(?:0++\.?0*+|\.0++)?)*+")
"""A duration of zero as Go reads it. Nothing is tried twice (``+``, ``*+``): clients could make that last for ever."""


def kind_of(method: str, path: str) -> Kind:
    """What a request may do to the models that are loaded."""
    if method == "POST" and path in LOAD_PATHS:
        return "load"
    if method == "POST" and path in V1_PATHS:
        return "v1"
    if path in STORE_PATHS:
        return "store"
    if (method == "GET" and path in LIST_PATHS) or (method == "HEAD" and path == "/api/tags"):
        return "list"
    return "other"


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadRequest:
    """A request that may load a model: its body, and what placement wants to know of it.

    ``options`` holds the placement options that the client sets, ``null`` ones left out. ``fields`` (by name in lower case) and
    ``option_members`` locate them in the body.
    """

    body: bytes
    model: str
    options: Mapping[str, Any]
    unloads: bool
    start: int
    fields: Mapping[str, Sequence[Member]]
    option_members: tuple[tuple[Member, tuple[Member, ...]], ...]

    def with_options(self, add: Mapping[str, Any], *, without: frozenset[str] = frozenset()) -> bytes:
        """The body with ``add`` among its options, and those of ``without`` (and the replaced ones) taken out."""
        names = without | add.keys()
        target = self.option_members[-1][0] if self.option_members else None
        changes: list[Change] = []  # made at once: each copies the body
        for field, inner in self.option_members:
            mine = add if field is target else {}
            if self.body[field.value_start] != 0x7B:  # null
                if mine:
                    # null has thrown away what stood before it, so it stays where there was something
                    again = b'null,"options":' if len(self.option_members) > 1 else b""
                    changes.append((field.value_start, field.end, again + encode(mine)))
                continue
            changes += edit(field.value_start, inner, remove=[member for member in inner if member.key in names], add=mine)
        if target is None and add:
            first = next(iter(self.fields.values()))[0]  # there is one: the model
            changes += edit(self.start, (first,), add={"options": dict(add)})
        return splice(self.body, changes) if changes else self.body

    def with_model(self, name: str) -> bytes:
        """The body with ``name`` (plain ASCII) in place of the model that it names."""
        counts = next(field for field in reversed(self.fields["model"]) if self.body[field.value_start : field.end] != b"null")
        return splice(self.body, [(counts.value_start, counts.end, b'"%b"' % name.encode("ascii"))])


def parse_load_request(path: str, body: bytes) -> LoadRequest:
    """What the body of a ``load`` or ``v1`` request asks for.

    Raises ``JsonError`` where Ollama would not understand it either (or would, by rules that are not worth knowing): such a
    request goes on as it is, and Ollama's own answer comes back.
    """
    if len(body) > QUOTE_LIMIT and _has_many_quotes(body):
        raise JsonError(f"more than {QUOTE_LIMIT} quotes")
    start = blank_end(body, 0)
    by_name: dict[str, list[Member]] = {}
    for field in members(body, start):
        by_name.setdefault(field.key.casefold(), []).append(field)
    model = _last(body, by_name, "model")
    if not isinstance(model, str) or not model:
        raise JsonError("it names no model")
    if path in V1_PATHS:
        return LoadRequest(body=body, model=model, options={}, unloads=False, start=start, fields=by_name, option_members=())
    option_members: list[tuple[Member, tuple[Member, ...]]] = []
    options: dict[str, Any] = {}
    looked_at = 0
    for field in by_name.get("options", ()):
        if body[field.value_start : field.end] == b"null":
            options = {}
            option_members.append((field, ()))
            continue
        inner = members(body, field.value_start)
        if (looked_at := looked_at + len(inner)) > MEMBER_LIMIT:
            raise JsonError(f"more than {MEMBER_LIMIT} options")
        option_members.append((field, inner))
        options.update({member.key: decode(body, member) for member in inner if member.key in _WANTED})
    options = {
        name: _integer(name, value) if name in INTEGER_OPTIONS else value for name, value in options.items() if value is not None
    }
    return LoadRequest(
        body=body,
        model=model,
        options=options,
        unloads=_unloads(path, body, by_name),
        start=start,
        fields=by_name,
        option_members=tuple(option_members),
    )


def _has_many_quotes(body: bytes) -> bool:
    position = -1
    for _ in range(FEW_QUOTES):
        if (position := body.find(b'"', position + 1)) < 0:
            return False
    return body.count(b'"', position) > QUOTE_LIMIT - FEW_QUOTES


_WANTED = frozenset(INTEGER_OPTIONS) | {"tensor_split"}


def _unloads(path: str, body: bytes, by_name: Mapping[str, list[Member]]) -> bool:
    content = LOAD_PATHS[path]
    if content is None or "keep_alive" not in by_name:
        return False
    for field in by_name.get(content, ()):
        if body[field.value_start : field.end].replace(b" ", b"") not in (b'""', b"[]", b"null"):
            return False
    keep_alive = _last(body, by_name, "keep_alive")
    if isinstance(keep_alive, str):
        return _ZERO_DURATION.fullmatch(keep_alive) is not None
    return isinstance(keep_alive, int | float) and not isinstance(keep_alive, bool) and keep_alive == 0


def _last(body: bytes, by_name: Mapping[str, list[Member]], name: str) -> Any:
    for field in reversed(by_name.get(name, ())):
        if (value := decode(body, field)) is not None:  # null leaves what was there
            return value
    return None


def _integer(name: str, value: Any) -> int:
    """The number as Ollama takes it (``Options.FromMap`` in ``api/types.go``): cut to an integer."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not -(2**63) <= value < 2**63:
        raise JsonError(f"option {name} is no integer that Ollama takes")
    return int(value)
