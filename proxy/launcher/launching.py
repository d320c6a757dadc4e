"""``POST /lopsided/launch``: which arguments a load gets that the launcher asks about.

Whatever goes wrong ends in 204, which leaves Ollama's own arguments in force, and in one line of the log.
"""

from __future__ import annotations

import asyncio
import logging
import os
import stat
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path

from planner.hardware import Gpu, Rig
from planner.plan import Plan
from planner.profile import ModelProfile
from planner.stock import settings_on
from proxy.config.settings import Settings
from proxy.errors import GpuError, LopsidedError, ModelError, UpstreamError
from proxy.gpus.listed import MOST_DEVICES
from proxy.gpus.order import DeviceOrder
from proxy.launcher.launch import (
    LaunchRequest,
    answer,
    ask_for_devices,
    parse_launch,
    plan_arguments,
    plan_request,
    render,
    visible_devices,
)
from proxy.launcher.launches import MOST_CAREFUL, Launches
from proxy.models.catalog import Catalog, ModelFacts
from proxy.models.gguf import is_embedding, read_profile
from proxy.ollama.client import Ollama
from proxy.ollama.names import blob_name
from proxy.once import Once
from proxy.plans.loading import plan_request as base_request
from proxy.plans.ruled import Load, RuledPlans

ANSWER_S = 1.5
"""Longest wait for a plan; the launcher itself waits 1.8 s."""

KEPT_S = 120.0
"""Seconds for which a plan that came too late answers the next launch."""

PLANS_KEPT = 16
PROFILES_KEPT = 32

LOOKS_S = (0.1,) * 50 + (0.5,)
"""Seconds between two looks at ``/api/ps`` while a load is open, the last one for good: small models come and go quickly."""

Arguments = tuple[str, ...] | None

log = logging.getLogger("lopsided.launcher")


class Launching:
    """Answers the launcher.

    ``rig`` reads the GPUs and raises ``GpuError``; where ``plans`` are not live, the launcher is asked for what is free.
    ``order`` is what is known of Ollama's device order; ``injected`` has the options that lopsided itself put into the requests
    for a blob, ``in_force`` the blobs of models that are taken to be loaded.
    """

    def __init__(
        self,
        *,
        rig: Callable[[], Awaitable[Rig]],
        catalog: Catalog,
        ollama: Ollama,
        settings: Settings,
        launches: Launches,
        injected: Callable[[str], Mapping[str, object]],
        plans: RuledPlans,
        order: DeviceOrder | None,
        in_force: Callable[[], Collection[str]],
    ) -> None:
        self._rig = rig
        self._injected = injected
        self._catalog = catalog
        self._ollama = ollama
        self._settings = settings
        self._launches = launches
        self._order = order
        self._ruled = plans
        self._in_force = in_force
        self._profiles: OrderedDict[tuple[str, int, int], ModelProfile] = OrderedDict()
        self._plans: OrderedDict[object, tuple[asyncio.Task[Plan], float]] = OrderedDict()  # under way, or too late
        self._watching: asyncio.Task[None] | None = None
        self._looks = 0  # since the last launch
        self._tell = Once(log, kept=MOST_DEVICES)

    async def answer(self, body: bytes) -> tuple[int, bytes]:
        """Status and body for what the launcher posted; never raises."""
        try:
            request = parse_launch(body)
        except ModelError as error:
            log.warning("a launch is left to Ollama: %s", error)
            return answer(None)
        reason = ""
        try:
            self._launches.asked(request.blob, spread=request.spread)
            if request.gpu_layers is not None and request.gpu_layers == self._injected(request.blob).get("num_gpu"):
                request = replace(request, gpu_layers=None)  # lopsided's own, from before the launcher was seen
            if request.wish is None:
                async with asyncio.timeout(ANSWER_S):
                    return await self._answer(request)
            reason = request.wish
        except TimeoutError:
            reason = f"no plan within {ANSWER_S:g} s; it is kept for the next launch"
        except LopsidedError as error:
            reason = str(error)
        except Exception as error:
            log.debug("a launch failed", exc_info=error)
            reason = f"{type(error).__name__}: {error}"
        log.warning("%s is left to Ollama: %s", request.blob[:19], reason)
        return answer(None)

    async def aclose(self) -> None:
        """Ends what runs in the background."""
        tasks = [task for task in (self._watching, *(task for task, _ in self._plans.values())) if task and not task.done()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _answer(self, request: LaunchRequest) -> tuple[int, bytes]:
        try:
            rig = await self._rig()
        except GpuError:
            rig = None
        devices = visible_devices(request, rig, self._order)
        if request.devices is None and (devices is None or not self._ruled.live):
            return ask_for_devices()
        for name, gpu in (devices or {}).items():
            if rig and not self._ruled.live and gpu.uuid == name:  # known from the list alone
                self._tell(f"{name} ({gpu.name}) is none of the profile's cards: it is planned with what is listed of it")
        devices = _allowed(request, devices or {})
        if not devices:
            raise GpuError("no GPU is visible to it")
        blob, names = request.blob, tuple(devices)
        context = request.settings.total_ctx
        careful = self._launches.careful(blob, context)
        machine = Rig(gpus=tuple(devices.values()), host=rig.host) if rig else Rig(gpus=tuple(devices.values()))
        plan = await self._plan(request, names, machine, careful)
        if self._ruled.by_name and self._ruled.rule(await self._name(blob)).off:
            careful = MOST_CAREFUL
        arguments = launch_arguments(plan, names, request, careful=careful)
        given = (request.settings, arguments)
        if careful == 1 and self._launches.has_failed(blob, given):
            careful = self._launches.give_up(blob, given)
            arguments = launch_arguments(plan, names, request, careful=careful)
        taken = plan.chosen if careful < MOST_CAREFUL else plan.stock
        if arguments or taken == plan.stock:
            self._launches.place(blob, plan, taken)
        if arguments:
            self._launches.given(blob, (request.settings, arguments), context)
            self._watch()
        how = ("", ", with a wider margin", ", as stock would: its plans have failed")[careful]
        log.info("%s: %s%s", plan.profile.name or blob[:19], " ".join(arguments or ("Ollama's own arguments",)), how)
        return answer(arguments)

    async def _plan(self, request: LaunchRequest, names: tuple[str, ...], rig: Rig, careful: int) -> Plan:
        """The plan; one that takes too long goes on, and answers the same launch if it comes again."""
        companions = (request.projector_path, request.adapter_paths)
        key = (
            request.blob,
            companions,
            request.settings,
            tuple(zip(names, (gpu.uuid for gpu in rig.gpus), strict=True)),
            careful,
        )
        task, since = self._plans.get(key, (None, 0.0))
        if task is None or (task.done() and time.monotonic() - since > KEPT_S):
            task = asyncio.create_task(self._make(request, rig, careful), name="plan a launch")
            task.add_done_callback(lambda done: done.cancelled() or done.exception())
            self._plans[key] = (task, time.monotonic())
            while len(self._plans) > PLANS_KEPT:
                self._plans.popitem(last=False)
        try:
            plan = await asyncio.shield(task)
        except Exception:
            self._plans.pop(key, None)
            raise
        self._plans.pop(key, None)  # in time: the next launch finds other free memory
        return plan

    async def _make(self, request: LaunchRequest, rig: Rig, careful: int) -> Plan:
        facts = await self._facts(request)
        base = base_request({}, facts, self._settings, "llama-server", careful=careful > 0)
        options, wanted = {"num_ctx": request.settings.num_ctx}, plan_request(request, base)
        if request.settings.batch < settings_on(facts.profile, rig, wanted, range(len(rig.gpus))).batch:
            wanted = replace(wanted, num_batch=request.settings.batch)  # less than Ollama takes by itself: a client's
        load = Load(model=await self._name(request.blob), facts=facts, options=options, request=wanted)
        return await self._ruled.on(load, rig, loaded=self._in_force(), by_options=not request.spread)

    async def _name(self, blob: str) -> str:
        """What the model is called, for the rules; where there are none, nobody is asked."""
        if (name := self._launches.name(blob)) is not None or not self._ruled.by_name:
            return name or blob
        try:
            return (await self._catalog.facts_of_blob(blob)).profile.name
        except LopsidedError:
            return blob

    async def _facts(self, request: LaunchRequest) -> ModelFacts:
        """The model and what is loaded beside it: from the files where they can be read here, else as Ollama describes it."""
        profile = await asyncio.to_thread(self._profile, request.model_path)
        projector = await asyncio.to_thread(_sizes, (request.projector_path,) if request.projector_path else ())
        adapters = await asyncio.to_thread(_sizes, request.adapter_paths)
        if profile is None or projector is None or adapters is None:
            return replace(await self._catalog.facts_of_blob(request.blob), defaults={})
        return ModelFacts(
            digest="",
            blob=request.model_path,
            profile=profile,
            defaults={},
            projector_bytes=projector,
            adapter_bytes=adapters,
            is_embedding=is_embedding(profile.metadata),
        )

    def _profile(self, path: str) -> ModelProfile | None:
        """What the file says, ``None`` where it can't be read here. Raises ``LopsidedError`` where it is no model."""
        try:
            seen = Path(path).stat()
        except (OSError, ValueError):
            return None
        if not stat.S_ISREG(seen.st_mode) or not os.access(path, os.R_OK):
            return None
        key = (path, seen.st_mtime_ns, seen.st_size)
        profile = self._profiles.get(key)
        if profile is None:
            profile = self._profiles[key] = read_profile(path)
            while len(self._profiles) > PROFILES_KEPT:
                with suppress(KeyError):
                    self._profiles.popitem(last=False)
        return profile

    def _watch(self) -> None:
        """Looks at ``/api/ps`` until no load is open."""
        self._looks = 0
        if self._watching is None or self._watching.done():
            self._watching = asyncio.create_task(self._look(), name="watch launches")

    async def _look(self) -> None:
        while self._launches.pending:
            await asyncio.sleep(LOOKS_S[min(self._looks, len(LOOKS_S) - 1)])
            self._looks += 1
            with suppress(UpstreamError):
                for entry in await self._ollama.loaded():
                    with suppress(ModelError):
                        facts = await self._catalog.facts(entry.name)
                        self._launches.loaded(blob_name(facts.key))


def launch_arguments(plan: Plan, names: Sequence[str], request: LaunchRequest, *, careful: int) -> Arguments:
    """What to append for ``plan``; for stock's own placement what Ollama would do without ``OLLAMA_SCHED_SPREAD``.

    Stock on one GPU of several is said, since Ollama may have been told to spread; stock over several is what Ollama's own
    arguments do.
    """
    if careful < MOST_CAREFUL and not plan.unchanged:
        return plan_arguments(plan, names, request.settings)
    if plan.stock.placement.kind != "solo" or len(names) == 1:
        return None
    return render(plan.stock.placement, names, settings=request.settings, asked=request.settings, exact=False)


def _allowed(request: LaunchRequest, devices: dict[str, Gpu]) -> dict[str, Gpu]:
    """The visible devices less those that ``--split-mode none --main-gpu N`` rules out."""
    if request.main_gpu is None:
        return devices
    return dict(islice(devices.items(), max(request.main_gpu, 0), max(request.main_gpu, 0) + 1))


def _sizes(paths: Sequence[str]) -> int | None:
    """Bytes of the files together, ``None`` where one can't be seen here."""
    try:
        return sum(Path(path).stat().st_size for path in paths)
    except (OSError, ValueError):
        return None
