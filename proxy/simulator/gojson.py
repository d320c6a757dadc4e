"""JSON and timestamps as Go writes them, so that an answer has Ollama's very bytes.

``encoding/json`` escapes ``<``, ``>``, ``&`` and the two Unicode line separators, writes whole floats without a fraction, and
uses exponents only below 1e-6 and from 1e21 on. Keys keep the order in which they are given, as struct fields do.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from ctypes import c_float
from datetime import UTC, datetime
from typing import Any

_ESCAPES = str.maketrans({"<": r"\u003c", ">": r"\u003e", "&": r"\u0026", "\u2028": r"\u2028", "\u2029": r"\u2029"})


def encode(value: Any) -> bytes:
    """``json.Marshal`` of plain values: mappings, lists, tuples, strings, numbers, booleans and ``None``."""
    return _text(value).encode()


def _text(value: Any) -> str:
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).translate(_ESCAPES)
    if value is None or isinstance(value, bool | int):
        return json.dumps(value)
    if isinstance(value, float):
        return _number(value)
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{_text(str(key))}:{_text(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(_text, value)) + "]"
    raise TypeError(f"no JSON for {type(value).__name__}")


def _number(value: float) -> str:
    if not math.isfinite(value):
        raise ValueError(f"no JSON for {value}")
    mantissa, _, exponent = repr(value).partition("e")
    if not exponent:
        return mantissa.removesuffix(".0")
    if 1e-6 <= abs(value) < 1e21:
        digits = len(mantissa.lstrip("-").replace(".", "")) - 1
        return f"{value:.{max(digits - int(exponent), 0)}f}"
    return f"{mantissa.removesuffix('.0')}e{exponent[0]}{exponent[1:].lstrip('0')}"


def shortest_float32(value: float) -> float:
    """The float with the fewest digits that is the same single-precision number: how Go prints a ``float32``."""
    single = c_float(value).value
    shorts = (float(f"{single:.{digits}g}") for digits in range(1, 10))  # nine digits always suffice
    return next(short for short in shorts if c_float(short).value == single)


def timestamp(unix_ns: int) -> str:
    """RFC 3339 in UTC with as many digits of the nanoseconds as there are: ``time.RFC3339Nano``."""
    seconds, nanoseconds = divmod(unix_ns, 10**9)
    fraction = f".{nanoseconds:09d}".rstrip("0") if nanoseconds else ""
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}{fraction}Z"
