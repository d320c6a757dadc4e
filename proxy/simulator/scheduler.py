"""Which models are loaded: loads, reloads, evictions, expiry and Ollama's own retries, as ``server/sched.go`` has them.

One request is scheduled at a time, as in Ollama: a load holds up all others. What a load is given is decided in
``placement``; here it is checked against the bytes that the cards really have, and paid for.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Literal

from proxy.simulator.gpus import SimulatedGpus
from proxy.simulator.options import RunnerOptions, needs_reload
from proxy.simulator.placement import Environment, Load, LoadError, choose_load, smaller_num_ctx, wanted_num_ctx
from proxy.simulator.store import Model

START_S = 0.6
"""Seconds to start a runner process and CUDA before the first byte of weights; assumed."""
LOAD_BYTES_PER_S = 3_000_000_000
"""How fast weights come from a warm page cache or an NVMe disk into a card; assumed."""
MODELS_PER_GPU = 3
"""``defaultModelsPerGPU``: models kept loaded at once, for each card."""

EventKind = Literal["launch", "load", "reload", "unload", "evict", "out of memory", "abort"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """Something that the scheduler did. ``launch`` is each start of a runner, also of one that then fails."""

    kind: EventKind
    model: str
    load: Load | None = None


@dataclass(eq=False, kw_only=True)
class Runner:
    """A loaded model."""

    model: Model
    options: RunnerOptions
    load: Load
    session_s: float
    slots: asyncio.Semaphore
    users: int = 0
    expires_ns: int = 0
    timer: asyncio.TimerHandle | None = None
    idle: asyncio.Event = field(default_factory=asyncio.Event)
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    unloading: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Lease:
    """A runner for the time of one answer, and the seconds that the client waited for its load."""

    runner: Runner
    load_s: float


class Scheduler:
    """Keeps the runners. ``history`` holds every event since the start, in order.

    ``time_scale`` stretches or shrinks simulated seconds (0: nothing is waited for); keep-alive runs in real time.
    ``unload_s`` is how long a runner that expired stays visible in ``/api/ps``, in real seconds.
    """

    def __init__(self, gpus: SimulatedGpus, *, environment: Environment, time_scale: float = 0.0, unload_s: float = 0.0) -> None:
        self.gpus = gpus
        self.environment = environment
        self.time_scale = time_scale
        self.unload_s = unload_s
        self.history: list[Event] = []
        self._runners: dict[str, Runner] = {}
        self._lock = asyncio.Lock()

    @property
    def runners(self) -> tuple[Runner, ...]:
        """What ``/api/ps`` lists: the latest to expire first."""
        return tuple(sorted(self._runners.values(), key=lambda runner: -runner.expires_ns))

    def count(self, kind: EventKind, model: str | None = None) -> int:
        """How often ``kind`` happened, to ``model`` or to any."""
        return sum(event.kind == kind and model in (None, event.model) for event in tuple(self.history))

    async def sleep(self, seconds: float) -> None:
        """Waits for simulated ``seconds``."""
        await asyncio.sleep(seconds * self.time_scale)

    @asynccontextmanager
    async def lease(self, model: Model, options: RunnerOptions, keep_alive_s: float | None) -> AsyncIterator[Lease]:
        """The runner of ``model``, loaded or loaded anew where ``options`` ask for it. Raises ``LoadError``."""
        async with self._lock:
            runner, load_s = await self._runner(model, options)
            runner.users += 1
            runner.idle.clear()
            if keep_alive_s is not None:
                runner.session_s = keep_alive_s
            self._stop_timer(runner)
        try:
            async with runner.slots:
                yield Lease(runner=runner, load_s=load_s)
        finally:
            self._release(runner)

    def expire(self, model: Model) -> None:
        """Unloads ``model`` as soon as nobody uses it: ``keep_alive: 0`` with an empty prompt."""
        runner = self._runners.get(model.blob)
        if runner and not runner.unloading:
            runner.session_s = 0.0
            runner.expires_ns = time.time_ns()
            if not runner.users:
                self._unload(runner)

    async def _runner(self, model: Model, options: RunnerOptions) -> tuple[Runner, float]:
        runner = self._runners.get(model.blob)
        if runner and runner.unloading:
            await runner.gone.wait()
            runner = None
        reload = False
        if runner:
            asked_ctx = wanted_num_ctx(model.profile, self.gpus.rig(), options, self.environment)
            loaded_ctx = runner.load.settings.num_ctx
            if not needs_reload(runner.options, options, loaded_ctx=loaded_ctx, asked_ctx=asked_ctx):
                return runner, 0.0
            reload = True
            await self._evict(runner, "unload")
        runner, load_s = await self._load(model, options)
        self.history.append(Event(kind="reload" if reload else "load", model=model.name, load=runner.load))
        return runner, load_s

    async def _load(self, model: Model, options: RunnerOptions) -> tuple[Runner, float]:
        num_ctx = wanted_num_ctx(model.profile, self.gpus.rig(), options, self.environment)
        waited_s = 0.0
        retried = False
        while True:
            limit = self.environment.max_loaded_models or MODELS_PER_GPU * max(len(self.gpus.rig().gpus), 1)
            if len(self._runners) >= limit:
                await self._evict(self._victim(), "evict")
                continue
            load = choose_load(model.profile, self.gpus.rig(), options, self.environment, num_ctx=num_ctx)
            if self._runners and load.wants_more_room:
                await self._evict(self._victim(), "evict")
                continue
            self.history.append(Event(kind="launch", model=model.name, load=load))
            error, start_s = await self._start(model, load)
            waited_s += start_s
            if error is None:
                break
            self.history.append(Event(kind="out of memory", model=model.name, load=load))
            smaller = smaller_num_ctx(num_ctx) if options.num_ctx is None else None
            if retried or self.environment.era == "runner" or (smaller is None and not self._runners):
                raise LoadError(error)
            retried = True  # once in all: with a smaller automatic context, without the other models
            num_ctx = smaller or num_ctx
            for other in tuple(self._runners.values()):
                await self._evict(other, "evict")
        runner = Runner(
            model=model,
            options=options,
            load=load,
            session_s=self.environment.keep_alive_s,
            slots=asyncio.Semaphore(load.settings.parallel),
        )
        self._runners[model.blob] = runner
        return runner, waited_s

    async def _start(self, model: Model, load: Load) -> tuple[str | None, float]:
        """Starts a runner and waits until it is ready: the error of one that is not, and the simulated seconds it took."""
        if error := load.refusal(self.gpus.rig(), self.environment):
            await self.sleep(START_S)
            return error, START_S
        loading_s = START_S + sum(device.weights_bytes for device in load.memory.devices) / LOAD_BYTES_PER_S
        held = [device.total_bytes for device in load.memory.devices]
        self.gpus.hold(held)
        try:
            await self.sleep(loading_s)
        except asyncio.CancelledError:  # "client connection closed before server finished loading, aborting load"
            self._give_back(held)
            self.history.append(Event(kind="abort", model=model.name, load=load))
            raise
        return None, loading_s

    def _stop(self, runner: Runner) -> None:
        """Ends what ``_start`` started."""
        self._give_back([device.total_bytes for device in runner.load.memory.devices])

    def _victim(self) -> Runner:
        """``findRunnerToUnload``: the idle runner with the shortest keep-alive, else the first to become idle."""
        ranked = sorted(self._runners.values(), key=lambda runner: (runner.users > 0, runner.session_s, runner.model.name))
        return ranked[0]

    async def _evict(self, runner: Runner, kind: Literal["unload", "evict"]) -> None:
        if runner.users:
            await runner.idle.wait()
        if kind == "evict":
            self.history.append(Event(kind="evict", model=runner.model.name))
        if not runner.unloading:
            self._unload(runner)
        await runner.gone.wait()

    def _release(self, runner: Runner) -> None:
        runner.users -= 1
        if runner.users:
            return
        runner.idle.set()
        runner.expires_ns = time.time_ns() + int(min(runner.session_s, 292 * 365.25 * 86400) * 1e9)
        if runner.session_s <= 0:
            self._unload(runner)
        elif runner.session_s != float("inf"):
            self._stop_timer(runner)
            runner.timer = asyncio.get_running_loop().call_later(runner.session_s, self._unload, runner)

    def _unload(self, runner: Runner) -> None:
        self._stop_timer(runner)
        if runner.users or runner.unloading:
            return
        runner.unloading = True
        if self.unload_s:
            asyncio.get_running_loop().call_later(self.unload_s, self._drop, runner)
        else:
            self._drop(runner)

    def _drop(self, runner: Runner) -> None:
        self.history.append(Event(kind="unload", model=runner.model.name))
        self._runners.pop(runner.model.blob, None)
        self._stop(runner)
        runner.gone.set()

    def _give_back(self, held: Sequence[int]) -> None:
        self.gpus.hold([-used for used in held])

    @staticmethod
    def _stop_timer(runner: Runner) -> None:
        if runner.timer:
            runner.timer.cancel()
            runner.timer = None
