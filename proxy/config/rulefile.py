"""``lopsided.toml`` while lopsided runs: its rules are read anew when the file has changed."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection
from pathlib import Path

from proxy.config.rules import Rule, Rules, parse_rules
from proxy.config.tomlfile import read_toml
from proxy.errors import SettingsError

LOOK_S = 1.0
"""Seconds between two looks at the file."""

NAMES_KEPT = 1024
"""Models whose rule is remembered."""

log = logging.getLogger("lopsided.rules")

_Seen = tuple[int, int, int] | None


class RuleFile:
    """The rules of the file ``path``, which need not exist; ``None`` is no file. ``clock`` is monotonic, in seconds.

    A file that is broken when it is first read is refused (``SettingsError``); one that is broken later leaves the rules in force
    that were, and is said once. One that is gone, or empty, may be an editor's between two steps: that counts from the second
    look on. ``settings``: the names of the other keys that may stand there; by default that is not looked at.
    """

    def __init__(
        self, path: Path | None, *, settings: Collection[str] | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._path = path
        self._settings = settings
        self._clock = clock
        self._seen = self._look()
        self._looked_at = clock()
        self._rules = read_rules(path, settings=settings) if path else Rules()
        self._gone = False
        self._by_model: dict[str, Rule] = {}
        self.problem: str | None = None
        """Why the file as it is now is not in force."""

    def current(self) -> Rules:
        """The rules in force, after a look at the file if the last one is ``LOOK_S`` ago."""
        if self._path is None or self._clock() - self._looked_at < LOOK_S:
            return self._rules
        self._looked_at = self._clock()
        seen = self._look()
        was_gone, self._gone = self._gone, seen is None or seen[1] == 0
        if seen != self._seen and (was_gone or not self._gone):
            self._seen = seen
            try:
                self._rules, self.problem = read_rules(self._path, settings=self._settings), None
                self._by_model.clear()
                log.info("%s has changed: its rules are in force", self._path)
            except SettingsError as error:
                self.problem = str(error)
                log.warning("%s. The rules of before stay in force", error)
        return self._rules

    def for_model(self, model: str) -> Rule:
        """What holds for ``model`` now: asked for every request."""
        rules = self.current()
        if model not in self._by_model:
            if len(self._by_model) >= NAMES_KEPT:
                self._by_model.clear()
            self._by_model[model] = rules.for_model(model)
        return self._by_model[model]

    def _look(self) -> _Seen:
        try:
            seen = self._path.stat() if self._path else None
        except OSError:
            return None
        return (seen.st_mtime_ns, seen.st_size, seen.st_ino) if seen else None


def read_rules(path: Path, *, settings: Collection[str] | None = None) -> Rules:
    """The rules in the file ``path``; none where it does not exist. Raises ``SettingsError`` with file and line."""
    content, text = read_toml(path)
    return parse_rules(content, text, path, settings=settings)
