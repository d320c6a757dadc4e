"""Models seen on ``/v1`` without their placement: left alone, or each change of client would have Ollama load them anew."""

from __future__ import annotations

from collections.abc import Callable

from proxy.errors import ModelError, UpstreamError
from proxy.models.catalog import Catalog, full_name

KEPT_S = 3600.0
"""Seconds for which a model that was seen counts as seen."""

NAMES_KEPT = 1024
"""Names that are not looked up yet."""


class SeenOnV1:
    """Takes names, knows blobs. ``clock`` is monotonic, in seconds."""

    def __init__(self, catalog: Catalog, clock: Callable[[], float]) -> None:
        self._catalog = catalog
        self._clock = clock
        self._names: set[str] = set()  # not looked up yet
        self._blobs: dict[str, float] = {}  # and when they were seen last

    def add(self, model: str) -> None:
        """``model``, a name as a client writes it, was seen now."""
        if len(self._names) < NAMES_KEPT:
            self._names.add(full_name(model))

    @property
    def unknown(self) -> bool:
        """Whether some of the names are not looked up yet."""
        return bool(self._names)

    def names(self, model: str) -> bool:
        """Whether ``model`` is one of those."""
        return full_name(model) in self._names

    async def has(self, blob: str) -> bool:
        """Whether a model of ``blob`` was seen; looks up what is not known yet."""
        for name in tuple(self._names):
            try:
                facts = await self._catalog.facts(name)
                self._blobs[facts.key] = self._clock()
            except UpstreamError:  # nothing to hold against other models; asked for again next time
                continue
            except ModelError:
                pass  # it names nothing that could be loaded
            self._names.discard(name)
        return self._clock() - self._blobs.get(blob, -KEPT_S) < KEPT_S
