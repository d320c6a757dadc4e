"""What Ollama counts at the end of an answer: tokens and nanoseconds, found in its last bytes without reading the rest."""

from __future__ import annotations

import re
from dataclasses import dataclass

TAIL_BYTES = 1024
"""Bytes kept of an answer's end. The counters are its last fields (``api.Metrics`` in ``api/types.go``) and take about 200."""

_COUNTER = re.compile(rb'[,{]"(load_duration|(?:prompt_)?eval_(?:count|duration))":(\d{1,19})(?=[,}])')
"""A counter and its value. Inside a string of JSON it cannot stand so: the quotes would be escaped."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Counters:
    """Tokens and seconds of one answer; ``prompt_tokens`` include what the prompt cache knew, ``prompt_s`` does not.

    ``eval_s`` begins with the first token (``t_start_generation`` in llama-server), so that it spans one token less.
    """

    eval_tokens: int
    eval_s: float
    prompt_tokens: int
    prompt_s: float
    load_s: float


class Tail:
    """The last bytes of an answer that goes by."""

    __slots__ = ("_kept",)

    def __init__(self) -> None:
        self._kept = b""

    def feed(self, chunk: bytes) -> None:
        """The next bytes of the answer."""
        self._kept = (self._kept + chunk)[-TAIL_BYTES:] if len(chunk) < TAIL_BYTES else chunk[-TAIL_BYTES:]

    def counters(self) -> Counters | None:
        """The counters of a complete answer, ``None`` where it has none: an error, an embedding, one broken off."""
        line = self._kept.rstrip().rpartition(b"\n")[2]
        if not line.endswith(b"}"):
            return None
        found = {name: int(value) for name, value in _COUNTER.findall(line)}
        if not found.get(b"eval_count") or not found.get(b"eval_duration"):
            return None
        return Counters(
            eval_tokens=found[b"eval_count"],
            eval_s=found[b"eval_duration"] / 1e9,
            prompt_tokens=found.get(b"prompt_eval_count", 0),
            prompt_s=found.get(b"prompt_eval_duration", 0) / 1e9,
            load_s=found.get(b"load_duration", 0) / 1e9,
        )
