"""Derived models: how ``/v1`` requests, which carry no options, get their placement all the same.

A derived model is the base with a few more parameters (``/api/create`` with ``from``): a manifest and two small layers beside
the base's own, no weights. Ollama lets all names of one blob share a runner, so a request by the derived name and one to
``/api/*`` with the same options find the same loaded model. Each is made on first use, made anew when its base changes, and
removed when its base is gone, when it is not used any more, and at shutdown; what a crash leaves is removed at the next start.
Only models that lopsided has made are ever removed: their names say so, and the name's stamp is the hash of what is in them.

Nothing here costs a request its answer: whoever gets an exception from :meth:`Derived.name_for` sends the request as it is.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any

from proxy.errors import LopsidedError, ModelError, UpstreamError
from proxy.models.catalog import Catalog, full_name
from proxy.models.show import parse_modelfile, parse_parameters, text_of
from proxy.ollama.client import Ollama
from proxy.ollama.names import base_of, derived_name, is_stamped
from proxy.ollama.options import Options

WAIT_S = 10.0
"""Longest wait of a request for its derived model: reading a model's header from a cold disk takes seconds."""

CHECK_S = 5.0
"""Seconds for which a base counts as unchanged; a change that went through the proxy ends them at once."""

TIDY_S = 60.0
"""Seconds between two looks at whether a base is still there: deleted past the proxy, its blobs are held by what is derived."""

REFUSED_S = 3600.0
"""Seconds for which a base that got no derived model is left alone: Ollama's reasons (a read-only store, too old) last."""

SHUTDOWN_S = 5.0
"""Longest wait at shutdown for the removal of all derived models; what is left is removed at the next start."""

NAMES_KEPT = 1024
"""Derived names remembered after their end: a runner that was loaded by one is listed by it as long as it lives."""

log = logging.getLogger("lopsided.derived")


@dataclass(kw_only=True, slots=True)
class _Made:
    """A derived model in Ollama's store. ``digest`` is its base's at the time."""

    name: str
    base: str
    digest: str
    options: Options
    checked_at: float


class Derived:
    """The derived models of one Ollama."""

    def __init__(self, *, ollama: Ollama, catalog: Catalog, enabled: bool) -> None:
        self._ollama = ollama
        self._catalog = catalog
        self._enabled = enabled
        self._made: dict[str, _Made] = {}  # by name in lower case
        self._by_use: dict[tuple[str, str, str], _Made] = {}  # by what requests ask for
        self._refused: dict[str, tuple[str, float]] = {}  # by the base's full name
        self._digests: OrderedDict[str, str] = OrderedDict()  # the bases' digests of all that ever were
        self._strangers: set[str] = set()  # named like derived models, and not ours
        self._unswept = False
        self.hides = False
        """Whether there may be anything that Ollama's lists must not show, be it another lopsided's."""
        self._tasks: dict[str, asyncio.Task[Any]] = {}

    # What requests ask

    def refusal(self, model: str) -> str | None:
        """Why ``model`` gets no derived model, ``None`` where it may have one."""
        if not self._enabled:
            return "LOPSIDED_V1 is off"
        reason, at = self._refused.get(full_name(model), ("", 0.0)) if self._refused else ("", 0.0)
        return reason if reason and time.monotonic() - at < REFUSED_S else None

    async def name_for(self, model: str, blob: str, options: Options) -> str:
        """The name of ``model`` with ``options``, made now where there is none; ``blob`` is where its weights are.

        Raises ``ModelError`` where there can be none for a while (:meth:`refusal` then says so too), ``UpstreamError`` where
        it did not work this time.
        """
        use = (full_name(model), blob, repr(sorted(options.items())))
        made = self._by_use.get(use)
        if made is not None and time.monotonic() - made.checked_at < CHECK_S:
            return made.name
        task = self._start(f"derive {use}", lambda: self._renewed(use, model, blob, options))
        try:
            async with asyncio.timeout(WAIT_S):
                name: str = await asyncio.shield(task)
        except TimeoutError:
            raise UpstreamError(f"Ollama made no derived model within {WAIT_S:g} s") from None
        except ModelError as error:
            self._refuse(use[0], str(error))
            raise
        except LopsidedError:
            raise
        except Exception as error:
            log.debug("no derived model", exc_info=error)
            raise UpstreamError(f"no derived model: {type(error).__name__}: {error}") from error
        return name

    def lost(self, name: str) -> None:
        """Ollama does not know ``name`` (any more): it was deleted behind our back."""
        self._forget(name)

    # What changes the store

    def start(self) -> None:
        """Removes, in the background, what an earlier run left; where Ollama is not there yet, before the first is made."""
        self._unswept = self.hides = True
        self._start("sweep", self._sweep)

    def store_changed(self) -> None:
        """Names may stand for other models now (pull, create, copy, delete): bases that are gone free their blobs at once."""
        self._refused.clear()
        for made in self._made.values():
            made.checked_at = -CHECK_S
        if self._made:
            self._start("tidy", self._tidy)

    async def aclose(self) -> None:
        """Removes every derived model, as far as Ollama answers in time."""
        for task in tuple(self._tasks.values()):
            task.cancel()
        try:
            async with asyncio.timeout(SHUTDOWN_S):
                await asyncio.gather(*self._tasks.values(), return_exceptions=True)
                for made in tuple(self._made.values()):
                    await self._delete(made)
        except (LopsidedError, TimeoutError) as error:
            if self._made:
                log.warning("%d derived models are left to the next start: %s", len(self._made), str(error) or "no time left")

    # What lists show

    def is_hidden(self, name: str) -> bool:
        """Whether ``name`` is a derived model of ours."""
        return base_of(name) is not None and name.lower() not in self._strangers

    def digest_of_base(self, name: str) -> str | None:
        """The digest of the model that the derived ``name`` stands for."""
        return self._digests.get(name.lower()) or self._catalog.digest(base_of(name) or "")

    # How it is done

    async def _renewed(self, use: tuple[str, str, str], model: str, blob: str, options: Options) -> str:
        """The name of the derived model for ``use``, which has been checked or made now."""
        if self._unswept:
            await asyncio.shield(self._start("sweep", self._sweep))
        try:
            base, digest = await self._catalog.listed(model)
        except ModelError as error:  # no reason to refuse it one once it is back
            self._start("tidy", self._tidy)
            raise UpstreamError(str(error)) from error
        name = derived_name(base, blob, options)
        made = self._made.get(name.lower())
        if made is None or (made.digest, made.options) != (digest, options):
            self._forget(name)
            made = _Made(name=name, base=base, digest="", options=options, checked_at=0.0)  # from here on shutdown removes it
            self._made[name.lower()] = made
            self._remember(name, digest)
            try:
                await self._ollama.create(name, base=base, parameters=options)
                if what := await self._difference(base, name, options):
                    await self._ollama.delete(name)
                    raise ModelError(f"Ollama makes a derived model of other {what}")
            except ModelError:
                self._forget(name)
                raise
            made.digest = digest
            log.info("%s with %s is %s on /v1", model, dict(options), name)
            self._start("tidy", self._tidy)
            self._start("keep tidy", self._keep_tidy)
        made.checked_at = time.monotonic()
        self._by_use[use] = made
        return name

    async def _difference(self, base: str, name: str, options: Options) -> str | None:
        """In what beside ``options`` the two models differ; old Ollamas lose parts of the base.

        Raises ``UpstreamError`` where one is gone: another lopsided that starts removes what it finds.
        """
        try:
            one, other = await asyncio.gather(self._ollama.show(base), self._ollama.show(name))
        except ModelError as error:
            raise UpstreamError(str(error)) from error
        return difference(one, other, options)

    async def _tidy(self) -> None:
        """Removes what nobody can want any more: of bases that are gone or changed, and placements that others have followed."""
        latest = {made.base: made for made in self._made.values() if made.digest}  # made last
        for made in tuple(self._made.values()):
            if not made.digest:  # not made yet
                continue
            try:
                _, digest = await self._catalog.listed(made.base)
            except ModelError:
                digest = ""
            if digest != made.digest or latest.get(made.base) is not made:
                await self._delete(made)

    async def _keep_tidy(self) -> None:
        while self._made:
            await asyncio.sleep(TIDY_S)
            await asyncio.wait({self._start("tidy", self._tidy)})

    async def _sweep(self) -> None:
        """Removes what an earlier run has made; names of the same form that are not lopsided's stay, and are said."""
        for name in await self._ollama.names():
            base = base_of(name)
            if base is None or name.lower() in self._made:
                continue
            try:
                show = await self._ollama.show(name)
            except ModelError:
                continue
            blob = parse_modelfile(text_of(show.get("modelfile"))).model
            if not is_stamped(name, blob, parse_parameters(text_of(show.get("parameters")))):
                self._strangers.add(name.lower())
                log.warning("%s is named like a model of lopsided's and is none: it stays, `ollama rm` removes it", name)
                continue
            self._remember(name, self._catalog.digest(base) or "")
            try:
                await self._ollama.delete(name)
                log.info("removed %s, left by an earlier run", name)
            except ModelError as error:
                log.warning("%s, which an earlier run has left", error)
        self._unswept = False

    async def _delete(self, made: _Made) -> None:
        """Removes one from the store; where that fails, shutdown and the next start try again."""
        self._by_use = {use: kept for use, kept in self._by_use.items() if kept is not made}
        try:
            await self._ollama.delete(made.name)
        except ModelError as error:
            log.warning("%s", error)
            return
        log.info("removed %s", made.name)
        if self._made.get(made.name.lower()) is made:
            del self._made[made.name.lower()]

    def _forget(self, name: str) -> None:
        made = self._made.pop(name.lower(), None)
        self._by_use = {use: kept for use, kept in self._by_use.items() if kept is not made}

    def _refuse(self, base: str, reason: str) -> None:
        if len(self._refused) >= NAMES_KEPT:
            self._refused.clear()
        self._refused[base] = (reason, time.monotonic())
        log.warning("%s keeps no placement on /v1: %s", base, reason)

    def _remember(self, name: str, digest: str) -> None:
        self._digests[name.lower()] = digest
        while len(self._digests) > NAMES_KEPT:
            self._digests.popitem(last=False)

    def _start(self, key: str, work: Callable[[], Coroutine[Any, Any, Any]]) -> asyncio.Task[Any]:
        """A task that runs ``work``; the one that runs already where there is one of this key."""
        if (running := self._tasks.get(key)) is not None:
            return running

        def ended(task: asyncio.Task[Any]) -> None:
            self._tasks.pop(key, None)
            if not task.cancelled() and (error := task.exception()):
                log.debug("%s: %s", key, error)

        self._tasks[key] = task = asyncio.create_task(work(), name=f"derived: {key}")
        task.add_done_callback(ended)
        return task


def difference(base: Mapping[str, Any], derived: Mapping[str, Any], options: Options) -> str | None:
    """In what two answers of ``/api/show`` differ beside ``options``, which the second must have; ``None`` where in nothing.

    The Modelfile holds all that makes a model: files, template, renderer, parser, system prompt, licence, messages.
    """
    if parse_parameters(text_of(derived.get("parameters"))) != {**parse_parameters(text_of(base.get("parameters"))), **options}:
        return "parameters"
    if _lines(base, options) != _lines(derived, options):
        return "files or texts"
    if sorted(map(str, base.get("capabilities") or ())) != sorted(map(str, derived.get("capabilities") or ())):
        return "capabilities"
    return None


def _lines(show: Mapping[str, Any], options: Options) -> list[str]:
    """The lines of a Modelfile that count, sorted: Ollama writes parameters in any order."""
    ignored = ("# FROM ", *(f"PARAMETER {name} " for name in options))
    return sorted(line for line in text_of(show.get("modelfile")).splitlines() if not line.startswith(ignored))
