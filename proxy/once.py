"""Lines of the log that are written once."""

from __future__ import annotations

import logging


class Once:
    """Logs each text as a warning, the first time it comes; ``kept`` different ones at most, then no more."""

    def __init__(self, log: logging.Logger, *, kept: int) -> None:
        self._log = log
        self._kept = kept
        self._told: set[str] = set()

    def __call__(self, text: str) -> None:
        """Logs ``text``, unless that was done before."""
        if text not in self._told and len(self._told) < self._kept:
            self._told.add(text)
            self._log.warning("%s", text)
