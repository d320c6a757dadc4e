"""Model facts from Ollama: which blob a name stands for, what is in it, and the model's own default options.

``/api/tags`` gives each name's digest and size, ``/api/show`` the rest. The tensor table comes from the blob itself where this
machine can read it (its name is its hash, so it is the right file whatever machine Ollama runs on), else from ``/api/show``.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import httpx

from planner.profile import Metadata, ModelProfile
from proxy.errors import GgufError, ModelError, UpstreamError
from proxy.models.gguf import is_embedding, profile_of, read_header
from proxy.models.show import (
    Files,
    lacks_arrays,
    parse_modelfile,
    parse_parameters,
    profile_of_show,
    refuse_what_runs_elsewhere,
    text_of,
)
from proxy.ollama.client import object_of
from proxy.ollama.names import base_of

T = TypeVar("T")

DIGESTS_GOOD_S = 2.0
"""Seconds for which a name's digest is taken as still right; ``Catalog.forget`` ends it at once."""
MODELS_KEPT = 128
"""Models whose facts are kept, about 0.5 MB each."""
REQUEST_S = 30.0
"""Longest wait for Ollama: ``/api/show`` of a large model on a cold disk takes seconds."""

_BLOB_NAME = re.compile(r"^sha256[-:][0-9a-f]{64}$")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFacts:
    """One model as Ollama has it.

    ``digest`` is its manifest's. ``blob`` is where Ollama keeps the weights: models with the same blob share a loaded runner.
    ``defaults`` are the model's own options (``PARAMETER`` lines); a repeated one is a tuple. ``projector_bytes`` and
    ``adapter_bytes`` are the sizes of the files loaded beside the weights; where the files can't be read, what
    ``/api/tags`` leaves for them (a few MB too much: the vocabulary is in it).
    """

    digest: str
    blob: str
    profile: ModelProfile
    defaults: Metadata
    projector_bytes: int = 0
    adapter_bytes: int = 0
    is_embedding: bool = False

    @property
    def key(self) -> str:
        """What tells models apart: Ollama lets all names of one blob share a runner."""
        return self.blob or self.digest

    def default_integer(self, option: str) -> int | None:
        """The model's own value of an integer option (``num_ctx``, ``num_gpu``, …), ``None`` where it sets none."""
        value = self.defaults.get(option)
        return value if isinstance(value, int) and not isinstance(value, bool) else None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Entry:
    """A line of ``/api/tags``."""

    name: str
    digest: str
    size_bytes: int
    remote: str = ""


class Catalog:
    """Facts about Ollama's models, asked through ``client`` (its ``base_url`` is Ollama) and cached by digest.

    Concurrent questions about one model are answered by one exchange. ``clock`` is a monotonic time in seconds.
    """

    def __init__(self, client: httpx.AsyncClient, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._client = client
        self._clock = clock
        self._entries: dict[str, _Entry] = {}
        self._listed_at: float | None = None
        self._changes = 0
        self._facts: OrderedDict[str, ModelFacts | str] = OrderedDict()  # by digest; a text is why it can't be planned
        self._running: dict[str, asyncio.Task[Any]] = {}

    async def facts(self, name: str) -> ModelFacts:
        """What is known about the model that Ollama calls ``name``.

        Raises ``ModelError`` with the reason where it can't be planned (unknown, cloud, not GGUF, …), ``UpstreamError``
        where Ollama does not answer. Both mean: let the request pass as it is.
        """
        full = full_name(name)
        if full.endswith((":cloud", "-cloud")):
            raise ModelError(f"{name} runs in Ollama's cloud: there is nothing to place here")
        entry = await self._entry(full)
        if entry is None:
            raise ModelError(f"Ollama has no model {name}")
        if entry.remote:
            raise ModelError(f"{name} runs on {entry.remote}: there is nothing to place here")
        facts = self._facts.get(entry.digest)
        if facts is None:
            facts = await self._shared(entry.digest, lambda: self._learn(entry))
        else:
            self._facts.move_to_end(entry.digest)
        if isinstance(facts, str):
            raise ModelError(f"{name}: {facts}")
        return facts

    async def facts_of_blob(self, blob: str) -> ModelFacts:
        """What is known about a model whose weights are in the file named ``blob``. Raises as ``facts`` does."""
        await self._shared("/api/tags", self._list)
        known = {facts.digest for facts in self._facts.values() if not isinstance(facts, str) and Path(facts.blob).name == blob}
        for entry in sorted(self._entries.values(), key=lambda entry: entry.digest not in known):
            with suppress(ModelError):
                facts = await self.facts(entry.name)
                if Path(facts.blob).name == blob:
                    return facts
        raise ModelError(f"no model of Ollama's has its weights in {blob}")

    async def listed(self, name: str) -> tuple[str, str]:
        """The model's name as Ollama spells it, in all four parts, and its manifest's digest. Raises as ``facts`` does."""
        entry = await self._entry(full_name(name))
        if entry is None:
            raise ModelError(f"Ollama has no model {name}")
        return qualified(entry.name), entry.digest

    def digest(self, name: str) -> str | None:
        """The digest that the name had when Ollama was last asked, without asking it now."""
        entry = self._entries.get(full_name(name))
        return entry.digest if entry else None

    def forget(self) -> None:
        """Call after anything that may give a name another digest: pull, create, copy, delete."""
        self._listed_at = None
        self._changes += 1

    async def _entry(self, full: str) -> _Entry | None:
        fresh = self._listed_at is not None and self._clock() - self._listed_at < DIGESTS_GOOD_S
        if not fresh or full not in self._entries:
            await self._shared("/api/tags", self._list)
        return self._entries.get(full)

    async def _list(self) -> None:
        asked_at, changes = self._clock(), self._changes
        answer = await self._ask("GET", "/api/tags")
        models = answer.get("models") or []
        entries = [_entry(model) for model in models if isinstance(model, dict)] if isinstance(models, list) else []
        self._entries = {
            full_name(entry.name): entry for entry in entries if entry.name and entry.digest and base_of(entry.name) is None
        }
        if changes == self._changes:  # else the answer may be of before the change
            self._listed_at = asked_at

    async def _learn(self, entry: _Entry) -> ModelFacts | str:
        try:
            facts: ModelFacts | str = await self._read(entry)
        except ModelError as error:
            facts = str(error)
        self._facts[entry.digest] = facts
        while len(self._facts) > MODELS_KEPT:
            self._facts.popitem(last=False)
        return facts

    async def _read(self, entry: _Entry) -> ModelFacts:
        show = await self._ask("POST", "/api/show", {"model": entry.name})
        refuse_what_runs_elsewhere(show)
        files = parse_modelfile(text_of(show.get("modelfile")))
        if files.draft:
            raise ModelError("it has a draft model beside it (speculative decoding), which is not planned for")
        profile = await asyncio.to_thread(_profile_of_blob, files.model)
        if profile is None:
            if lacks_arrays(show):  # megabytes of vocabulary come with them, so they are asked for only where needed
                show = await self._ask("POST", "/api/show", {"model": entry.name, "verbose": True})
            profile = profile_of_show(show, has_companions=bool(files.projectors or files.adapters), size_bytes=entry.size_bytes)
        projector_bytes, adapter_bytes = await asyncio.to_thread(_companions, files, entry.size_bytes - profile.file_bytes)
        return ModelFacts(
            digest=entry.digest,
            blob=files.model,
            profile=replace(profile, name=entry.name),
            defaults=parse_parameters(text_of(show.get("parameters"))),
            projector_bytes=projector_bytes,
            adapter_bytes=adapter_bytes,
            is_embedding=is_embedding(profile.metadata) or "embedding" in (show.get("capabilities") or ()),
        )

    async def _ask(self, method: str, path: str, body: object = None) -> dict[str, Any]:
        try:
            answer = await self._client.request(method, path, json=body, timeout=REQUEST_S)
        except httpx.HTTPError as error:
            raise UpstreamError(f"Ollama does not answer {path}: {str(error) or type(error).__name__}") from error
        if answer.status_code != httpx.codes.OK:
            said = " ".join(answer.text.split())  # where it is a page instead of Ollama's JSON, one line of it
            raise UpstreamError(f"Ollama answers {path} with status {answer.status_code}: {said[:200]}")
        return await asyncio.to_thread(object_of, path, answer)

    async def _shared(self, key: str, start: Callable[[], Awaitable[T]]) -> T:
        """The result of ``start``, run once for all who ask for ``key`` meanwhile, and to its end though one of them leaves."""

        async def run() -> T:
            try:
                return await start()
            finally:
                del self._running[key]

        if key not in self._running:
            self._running[key] = asyncio.create_task(run(), name=f"catalog {key}")
            self._running[key].add_done_callback(lambda task: task.cancelled() or task.exception())
        result: T = await asyncio.shield(self._running[key])
        return result


@lru_cache(maxsize=1024)
@lru_cache(maxsize=1024)
def full_name(name: str) -> str:
    """``name`` as ``host/namespace/model:tag`` in lower case, with Ollama's defaults filled in (``types/model/name.go``)."""
    return qualified(name.strip().lower().removesuffix(":local"))


def qualified(name: str) -> str:
    """The same of a name from a list, spelt as it is there."""
    text = name.rpartition("://")[2]
    tag = "latest"
    if text.rfind(":") > text.rfind("/"):
        text, _, tag = text.rpartition(":")
    parts = text.rsplit("/", 2)
    host, namespace, model = ["registry.ollama.ai", "library"][: 3 - len(parts)] + parts
    return f"{host}/{namespace}/{model}:{tag}"


def _profile_of_blob(path: str) -> ModelProfile | None:
    """The profile in the file itself, ``None`` where it can't be read here. Raises ``ModelError`` where it is no model."""
    if not _BLOB_NAME.match(Path(path).name):
        return None
    try:
        return profile_of([read_header(path)])
    except (GgufError, OSError, ValueError):
        return None


def _companions(files: Files, left_bytes: int) -> tuple[int, int]:
    """Bytes of projectors and of adapters; files that can't be read here share ``left_bytes``, the projectors first."""
    sizes = {path: _size(path) for path in (*files.projectors, *files.adapters)}
    left_bytes = max(left_bytes - sum(size or 0 for size in sizes.values()), 0)
    totals = []
    for paths in (files.projectors, files.adapters):
        total = sum(sizes[path] or 0 for path in paths)
        if any(sizes[path] is None for path in paths):
            total, left_bytes = total + left_bytes, 0
        totals.append(total)
    return totals[0], totals[1]


def _size(path: str) -> int | None:
    if not _BLOB_NAME.match(Path(path).name):
        return None
    try:
        return Path(path).stat().st_size
    except (OSError, ValueError):
        return None


def _entry(model: Mapping[str, Any]) -> _Entry:
    size = model.get("size")
    remote = text_of(model.get("remote_host")) or text_of(model.get("remote_model"))
    return _Entry(
        name=text_of(model.get("name")) or text_of(model.get("model")),
        digest=text_of(model.get("digest")),
        size_bytes=size if isinstance(size, int) else 0,
        remote=remote,
    )
