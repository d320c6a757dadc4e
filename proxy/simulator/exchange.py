"""One request on its way through a handler: its body, the model that it names, the runner that it holds."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from math import isfinite
from typing import Any

from proxy.simulator.http import Request, Response
from proxy.simulator.options import OptionError, keep_alive_seconds
from proxy.simulator.placement import LoadError
from proxy.simulator.scheduler import Lease
from proxy.simulator.simulation import Simulator
from proxy.simulator.store import Model


class RequestError(Exception):
    """A request that is answered with ``status`` and ``message`` in the endpoint's error shape."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


@dataclass(frozen=True, kw_only=True, slots=True)
class Exchange:
    """What a handler is given. What it enters on ``stack`` is left when the last byte is out, or the client is gone."""

    simulator: Simulator
    request: Request
    stack: AsyncExitStack
    chunks: AsyncIterator[bytes] | None = None
    """The body as it comes in, where it may be too large to be read whole."""

    def json_body(self) -> dict[str, Any]:
        """The request's JSON object. Raises ``RequestError`` with Go's words for what is wrong with it."""
        if not self.request.body:
            raise RequestError(400, "missing request body")
        try:
            value = json.loads(self.request.body, parse_int=_number, parse_float=_number, parse_constant=_no_number)
        except UnicodeDecodeError:
            raise RequestError(400, "invalid character '\\ufffd' in string literal") from None
        except (json.JSONDecodeError, RecursionError) as problem:
            raise RequestError(400, _syntax_error(problem)) from None
        if not isinstance(value, dict):
            raise RequestError(400, f"json: cannot unmarshal {go_kind(value)} into Go value of type api.GenerateRequest")
        for key, kind, wanted in (
            ("model", str, "string"),
            ("stream", bool, "bool"),
            ("options", dict, "map[string]interface {}"),
        ):
            if value.get(key) is not None and not isinstance(value[key], kind):
                raise unmarshal_error(f"GenerateRequest.{key}", wanted, value[key])
        return value

    def find_model(self, body: Mapping[str, Any]) -> Model:
        """The model that ``body`` names. Raises ``RequestError`` where the store has none."""
        name = body.get("model") or ""
        model = self.simulator.store.find(name) if name else None
        if model is None:
            raise RequestError(404, f"model '{name}' not found")
        return model

    async def lease(self, model: Model, body: Mapping[str, Any]) -> Lease:
        """A runner for as long as ``stack`` is open. Raises ``RequestError`` where options are wrong or the load fails."""
        keep_alive_s = keep_alive(body)
        try:
            lease = self.simulator.lease(model, body.get("options"), keep_alive_s, shift=body.get("shift") is not False)
            return await self.stack.enter_async_context(lease)
        except (ValueError, LoadError) as problem:
            raise RequestError(500, str(problem)) from None


Handler = Callable[[Exchange], Awaitable[Response]]
"""Answers a request. Raises ``RequestError``."""


def keep_alive(body: Mapping[str, Any]) -> float | None:
    """``keep_alive`` of ``body`` in seconds, ``None`` where it has none. Raises ``RequestError``."""
    try:
        return keep_alive_seconds(body.get("keep_alive"))
    except OptionError as problem:
        raise RequestError(400, str(problem)) from None


def unmarshal_error(field: str, wanted: str, value: Any) -> RequestError:
    """Go's error for a JSON value of the wrong type."""
    return RequestError(400, f"json: cannot unmarshal {go_kind(value)} into Go struct field {field} of type {wanted}")


def go_kind(value: Any) -> str:
    """What Go calls the type of a JSON value."""
    if isinstance(value, bool):
        return "bool"
    return {str: "string", int: "number", float: "number", list: "array", dict: "object"}.get(type(value), "null")


def _number(text: str) -> float:
    """A number of JSON, which Go reads as a float64 wherever it may be of any type."""
    value = float(text)
    if not isfinite(value):
        where = "Go struct field GenerateRequest.options"
        raise RequestError(400, f"json: cannot unmarshal number {text} into {where} of type float64")
    return int(text) if text.lstrip("-").isdecimal() else value


def _no_number(text: str) -> None:
    """Refuses ``NaN`` and ``Infinity``, which Python takes for JSON."""
    raise RequestError(400, f"invalid character {text.lstrip('-')[0]!r} looking for beginning of value")


def _syntax_error(problem: Exception) -> str:
    if not isinstance(problem, json.JSONDecodeError):
        return "exceeded max depth"
    rest = problem.doc[problem.pos :].strip()
    if not rest or problem.msg.startswith("Unterminated"):
        return "unexpected EOF"
    where = "after object key" if "':'" in problem.msg else "looking for beginning of value"
    return f"invalid character {rest[0]!r} {where}"
