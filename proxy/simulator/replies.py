"""What a model without a mind says: made-up words, JSON of a wanted shape, a call of a tool that was offered."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from proxy.simulator import gojson

_WORDS = (
    "This answer is simulated : no model was asked , and no GPU was there . It takes the time that a model of this size would "
    "take where Ollama has put it , and says nothing about the question . The first token came after the prompt was read , "
    "each next one after the weights were read once more , layer by layer , on whichever card holds them ."
)
DEFAULT_PIECES = tuple(re.sub(r" (?=[,.:])", "", _WORDS).replace(" ", "\x00 ").split("\x00"))
"""The usual answer, cut where a tokenizer would: every word brings the space before it."""
TEMPLATE_TOKENS = 9
"""Tokens that a ChatML template puts around one message and before the answer (recorded with SmolLM2)."""
_TOKEN = re.compile(r"\w+|[^\w\s]")
_TOKEN_OR_SPACE = re.compile(r"\w+|\s+|[^\w\s]")


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """What a model is asked, whichever endpoint it came by."""

    text: str
    format: Any = None
    tools: Sequence[Mapping[str, Any]] = ()
    answers_tool: bool = False
    """The last message is a tool's result: time for words, not for another call."""

    @property
    def tokens(self) -> int:
        """How many tokens it counts for, the template included."""
        return count_tokens(self.text) + TEMPLATE_TOKENS


Call = tuple[str, Mapping[str, Any]]
"""A tool's name, and the arguments that it is called with."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """An answer in pieces, one a token, or calls of tools."""

    pieces: tuple[str, ...] = ()
    calls: tuple[Call, ...] = ()


Speaker = Callable[[Prompt], Reply]
"""Where a simulator's words come from; tests bring their own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Spoken:
    """A reply cut to the length that was asked for. ``count`` is ``eval_count``: the end token counts where it was reached."""

    pieces: tuple[str, ...]
    calls: tuple[Call, ...]
    reason: str
    count: int

    @property
    def text(self) -> str:
        """All pieces together."""
        return "".join(self.pieces)


def speak(prompt: Prompt) -> Reply:
    """The default speaker."""
    if prompt.tools and not prompt.answers_tool and (call := _call(prompt)):
        return Reply(calls=(call,))
    if prompt.format:
        value = example(prompt.format) if isinstance(prompt.format, Mapping) else {}
        return Reply(pieces=tuple(_TOKEN_OR_SPACE.findall(gojson.encode(value).decode())))
    return Reply(pieces=DEFAULT_PIECES)


def cut(reply: Reply, limit: int | None) -> Spoken:
    """At most ``limit`` tokens of ``reply`` (``None`` or negative: all of it)."""
    called = sum(8 + count_tokens(str(call)) for call in reply.calls)
    if limit is None or limit < 0 or limit > len(reply.pieces):
        return Spoken(pieces=reply.pieces, calls=reply.calls, reason="stop", count=len(reply.pieces) + called + 1)
    return Spoken(pieces=reply.pieces[:limit], calls=(), reason="length", count=limit)


def count_tokens(text: str) -> int:
    """Words and punctuation marks: near enough to a tokenizer for short English."""
    return len(_TOKEN.findall(text))


def token_ids(text: str, count: int) -> list[int]:
    """``count`` made-up token numbers for ``text``, the same each time."""
    seed = hashlib.sha256(text.encode()).digest()
    return [int.from_bytes(seed[i % 30 : i % 30 + 2], "big") for i in range(count)]


def embedding(text: str, length: int, *, normalized: bool) -> list[float]:
    """A vector of ``length`` single-precision numbers for ``text``, the same each time."""
    seed = hashlib.shake_256(text.encode()).digest(2 * length)
    values = [int.from_bytes(seed[2 * i : 2 * i + 2], "big") / 32768 - 1 for i in range(length)]
    norm = math.sqrt(sum(v * v for v in values)) or 1.0
    return [gojson.shortest_float32(v / norm) for v in values] if normalized else values


def example(schema: Mapping[str, Any]) -> Any:
    """The plainest value that a JSON schema allows: the first of an ``enum``, required properties alone."""
    if "enum" in schema:
        return schema["enum"][0]
    if "const" in schema:
        return schema["const"]
    for union in ("anyOf", "oneOf"):
        if schema.get(union):
            return example(schema[union][0])
    kind = schema.get("type", "object" if "properties" in schema else "string")
    kind = kind[0] if isinstance(kind, list) else kind
    if kind == "object":
        properties = schema.get("properties", {})
        return {name: example(properties.get(name, {})) for name in schema.get("required", properties)}
    return {"array": [], "integer": 0, "number": 0, "boolean": True, "null": None}.get(kind, "simulated")


def _call(prompt: Prompt) -> Call | None:
    """A call of the first tool of whose name a word stands in the prompt; strings in its arguments are made up."""
    words = {word.lower() for word in _TOKEN.findall(prompt.text)}
    for tool in prompt.tools:
        function = tool.get("function", {})
        name = str(function.get("name", ""))
        if words & set(re.split(r"[^a-z0-9]+", name.lower())) - {"get", "set", "the", "a", ""}:
            return name, example(function.get("parameters") or {"type": "object"})
    return None
