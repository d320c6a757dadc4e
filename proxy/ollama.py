"""What the proxy asks of Ollama itself while it places models: what is loaded, and which version it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import httpx

from planner.request import Era
from proxy.errors import UpstreamError
from proxy.options import era_of

ASK_S = 2.0
"""Longest wait for ``/api/ps`` and ``/api/version``, which Ollama answers from memory, but not while it starts a load."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Loaded:
    """One line of ``/api/ps``."""

    name: str
    digest: str
    vram_bytes: int
    context_length: int


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

    async def _ask(self, path: str) -> dict[str, Any]:
        try:
            answer = await self._client.get(path, timeout=ASK_S)
            value = answer.raise_for_status().json()
        except (httpx.HTTPError, ValueError) as error:
            raise UpstreamError(f"Ollama does not answer {path}: {error or type(error).__name__}") from error
        if not isinstance(value, dict):
            raise UpstreamError(f"Ollama answers {path} with JSON that is no object")
        return value


def _loaded(model: dict[str, Any]) -> Loaded:
    def number(key: str) -> int:
        value = model.get(key)
        return value if isinstance(value, int) else 0

    return Loaded(
        name=str(model.get("name") or model.get("model") or ""),
        digest=str(model.get("digest") or ""),
        vram_bytes=number("size_vram"),
        context_length=number("context_length"),
    )
