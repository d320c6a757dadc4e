"""What the proxy asks of Ollama itself while it places models: what is loaded, its version, and what derived models take."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httpx

from planner.request import Era
from proxy.errors import ModelError, UpstreamError
from proxy.ollama.names import base_of, shown
from proxy.ollama.options import era_of

FOR_GOOD = 2200
"""A model that expires in this year or later is pinned: Ollama writes 292 years from now for ``keep_alive: -1``."""

ASK_S = 2.0
"""Longest wait for ``/api/ps`` and ``/api/version``, which Ollama answers from memory, but not while it starts a load."""

STORE_S = 30.0
"""Longest wait for a question about the store: ``/api/create`` and ``/api/show`` read the model's header from the disk."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Loaded:
    """One line of ``/api/ps``; a model that was loaded by its derived name stands under its own (the digest is the derived).

    ``pinned``: it was loaded to stay for good (``keep_alive: -1``).
    """

    name: str
    digest: str
    vram_bytes: int
    context_length: int
    pinned: bool = False


class Ollama:
    """The upstream, asked through ``client`` (its ``base_url``). Every method raises ``UpstreamError``."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client

    async def loaded(self) -> tuple[Loaded, ...]:
        """The models in memory."""
        models = (await self._ask("/api/ps")).get("models")
        return tuple(_loaded(model) for model in models if isinstance(model, dict)) if isinstance(models, list) else ()

    async def era(self) -> Era:
        """The era by ``/api/version``, asked anew each time: Ollama may have been updated."""
        version = (await self._ask("/api/version")).get("version")
        return era_of(version if isinstance(version, str) else "")

    async def names(self) -> tuple[str, ...]:
        """Every model in the store, derived ones too, as Ollama spells them."""
        models = (await self._ask("/api/tags", wait_s=STORE_S)).get("models")
        return tuple(str(m.get("name") or "") for m in models if isinstance(m, dict)) if isinstance(models, list) else ()

    async def show(self, name: str) -> dict[str, Any]:
        """``/api/show`` of a model. Raises ``ModelError`` where there is none."""
        answer = await self._tell("POST", "/api/show", {"model": name})
        value = object_of("/api/show", answer) if answer.status_code == httpx.codes.OK else None
        if value is None:
            raise ModelError(f"Ollama does not show {name}: {_error(answer)}")
        return value

    async def unload(self, name: str) -> None:
        """Unloads a model once its requests have ended."""
        answer = await self._tell("POST", "/api/generate", {"model": name, "keep_alive": 0})
        if answer.status_code != httpx.codes.OK:
            raise ModelError(f"Ollama does not unload {name}: {_error(answer)}")

    async def create(self, name: str, *, base: str, parameters: Mapping[str, Any]) -> None:
        """A model of ``base`` with more ``parameters``. Raises ``ModelError`` with Ollama's reason where it refuses."""
        body = {"model": name, "from": base, "parameters": dict(parameters), "stream": False}
        answer = await self._tell("POST", "/api/create", body)
        if answer.status_code != httpx.codes.OK or object_of("/api/create", answer).get("status") != "success":
            raise ModelError(f"Ollama refuses to make a derived model: {_error(answer)}")

    async def delete(self, name: str) -> None:
        """Deletes a model; one that is not there is fine. Raises ``ModelError`` where Ollama refuses."""
        answer = await self._tell("DELETE", "/api/delete", {"model": name})
        if answer.status_code not in (httpx.codes.OK, httpx.codes.NOT_FOUND):
            raise ModelError(f"Ollama does not delete {name}: {_error(answer)}")

    async def _tell(self, method: str, path: str, body: Mapping[str, Any]) -> httpx.Response:
        try:
            return await self._client.request(method, path, json=body, timeout=STORE_S)
        except httpx.HTTPError as error:
            raise UpstreamError(f"Ollama does not answer {path}: {str(error) or type(error).__name__}") from error

    async def _ask(self, path: str, *, wait_s: float = ASK_S) -> dict[str, Any]:
        try:
            answer = await self._client.get(path, timeout=wait_s)
        except httpx.HTTPError as error:
            raise UpstreamError(f"Ollama does not answer {path}: {str(error) or type(error).__name__}") from error
        if answer.status_code != httpx.codes.OK:
            raise UpstreamError(f"Ollama does not answer {path}: {_error(answer)}")
        return object_of(path, answer)


def object_of(path: str, answer: httpx.Response) -> dict[str, Any]:
    """The object that is ``answer``; half a surrogate pair in a text becomes a replacement, as Go reads it, since nobody could
    write it again. Raises ``UpstreamError``."""
    try:
        value = json.loads(answer.content)
        if rb"\ud" in answer.content.lower():
            value = json.loads(json.dumps(value, ensure_ascii=False).encode(errors="replace"))
    except (ValueError, RecursionError) as error:
        raise UpstreamError(f"Ollama answers {path} with something that is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise UpstreamError(f"Ollama answers {path} with JSON that is no object")
    return value


def _error(answer: httpx.Response) -> str:
    """Ollama's own words, or the beginning of whatever came instead."""
    try:
        text = answer.json()["error"]
    except (ValueError, KeyError, TypeError, RecursionError):
        text = f"status {answer.status_code} {' '.join(answer.text.split())}"
    return str(text)[:200]


def _loaded(model: dict[str, Any]) -> Loaded:
    def number(key: str) -> int:
        value = model.get(key)
        return value if isinstance(value, int) else 0

    name = str(model.get("name") or model.get("model") or "")
    base = base_of(name)
    return Loaded(
        name=shown(base) if base else name,
        digest=str(model.get("digest") or ""),
        vram_bytes=number("size_vram"),
        context_length=number("context_length"),
        pinned=_year(model.get("expires_at")) >= FOR_GOOD,
    )


def _year(time: Any) -> int:
    year = str(time)[:4]
    return int(year) if year.isascii() and year.isdecimal() else 0
