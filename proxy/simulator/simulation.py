"""One simulated Ollama: its version, store, scheduler and words, and what was asked of it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from planner.hardware import Rig
from planner.request import Era
from proxy.simulator.gpus import SimulatedGpus
from proxy.simulator.http import Request
from proxy.simulator.options import parse_options, runner_options
from proxy.simulator.placement import Environment
from proxy.simulator.replies import Prompt, Speaker, Spoken, cut, speak
from proxy.simulator.scheduler import Lease, Scheduler
from proxy.simulator.store import Model, Store

VERSIONS: dict[Era, str] = {"runner": "0.24.0", "llama-server": "0.32.15"}
"""The version that each era's recordings were made with."""
REQUESTS_KEPT = 10_000
BODIES_KEPT_BYTES = 64 * 2**20
"""What the bodies of the requests that are kept may take together; the oldest go first."""


@dataclass(kw_only=True)
class Answer:
    """One generation: what is said, and the simulated nanoseconds of its parts (known when it is over)."""

    lease: Lease
    prompt_tokens: int
    spoken: Spoken
    decode_tokens_per_s: float
    prefill_tokens_per_s: float

    @property
    def load_ns(self) -> int:
        """``load_duration``; a model that is loaded takes a millisecond to be found so."""
        return int(self.lease.load_s * 1e9) or 1_000_000

    @property
    def prompt_ns(self) -> int:
        """``prompt_eval_duration``."""
        return int(self.prompt_tokens / self.prefill_tokens_per_s * 1e6) * 1000

    @property
    def eval_ns(self) -> int:
        """``eval_duration``."""
        return int(self.spoken.count / self.decode_tokens_per_s * 1e6) * 1000

    def durations(self) -> dict[str, int]:
        """The counters at the end of an answer, in Ollama's order."""
        return {
            "total_duration": self.load_ns + self.prompt_ns + self.eval_ns,
            "load_duration": self.load_ns,
            "prompt_eval_count": self.prompt_tokens,
            "prompt_eval_duration": self.prompt_ns,
            "eval_count": self.spoken.count,
            "eval_duration": self.eval_ns,
        }


class Simulator:
    """A stand-in Ollama on ``rig`` with ``models``; ``create_app`` puts it on HTTP.

    ``time_scale`` is how many real seconds a simulated one takes: 1.0 for a demo in real time, 0.0 for tests, where nothing
    waits and durations are reported as they would be. ``speaker`` gives the words. Counters and ``requests`` may be read from
    another thread.
    """

    def __init__(
        self,
        rig: Rig,
        models: Iterable[Model] = (),
        *,
        environment: Environment | None = None,
        time_scale: float = 0.0,
        unload_s: float = 0.0,
        speaker: Speaker = speak,
        version: str | None = None,
    ) -> None:
        self.environment = environment or Environment()
        self.version = version or VERSIONS[self.era]
        self.gpus = SimulatedGpus(rig)
        self.store = Store(models)
        self.scheduler = Scheduler(self.gpus, environment=self.environment, time_scale=time_scale, unload_s=unload_s)
        self.speaker = speaker
        self.blobs: set[str] = set()
        self.requests: deque[Request] = deque()
        self._kept_bytes = 0
        self.cancelled = 0
        """Requests whose client left before the answer was complete."""

    @property
    def era(self) -> Era:
        """Which Ollama this is."""
        return self.environment.era

    def rig(self) -> Rig:
        """The simulated cards with the memory that is free now: a source of GPUs for the proxy."""
        return self.gpus.rig()

    def note(self, request: Request) -> None:
        """Keeps ``request`` for those who look it up in ``requests``."""
        self.requests.append(request)
        self._kept_bytes += len(request.body)
        while len(self.requests) > REQUESTS_KEPT or (self._kept_bytes > BODIES_KEPT_BYTES and len(self.requests) > 1):
            self._kept_bytes -= len(self.requests.popleft().body)

    def now_ns(self) -> int:
        """Nanoseconds since 1970."""
        return time.time_ns()

    @asynccontextmanager
    async def lease(
        self, model: Model, options: Mapping[str, Any] | None, keep_alive_s: float | None, *, shift: bool = True
    ) -> AsyncIterator[Lease]:
        """A runner for a request with ``options``. Raises ``OptionError`` and ``LoadError``."""
        split = (options or {}).get("tensor_split") if self.environment.honours_tensor_split else None
        parsed = parse_options(model.parameters) | parse_options(options)
        wanted = runner_options(parsed, era=self.era, tensor_split=str(split) if split else None, shift=shift)
        async with self.scheduler.lease(model, wanted, keep_alive_s) as lease:
            yield lease

    def answer(self, model: Model, lease: Lease, prompt: Prompt, options: Mapping[str, Any] | None) -> Answer:
        """What ``model`` says to ``prompt``, and how long it takes."""
        parsed = parse_options(model.parameters) | parse_options(options)
        load = lease.runner.load
        return Answer(
            lease=lease,
            prompt_tokens=prompt.tokens,
            spoken=cut(self.speaker(prompt), parsed.get("num_predict")),
            decode_tokens_per_s=load.decode_tokens_per_s,
            prefill_tokens_per_s=load.prefill_tokens_per_s,
        )

    async def pieces(self, answer: Answer) -> AsyncIterator[str]:
        """The pieces of the answer, each when its time has come: after the prompt, then one a token."""
        await self.scheduler.sleep(answer.prompt_ns / 1e9)
        for piece in answer.spoken.pieces:
            await self.scheduler.sleep(1 / answer.decode_tokens_per_s)
            yield piece
        silent = answer.spoken.count - len(answer.spoken.pieces)  # the end token, calls of tools
        await self.scheduler.sleep(silent / answer.decode_tokens_per_s)

    async def whole(self, answer: Answer) -> str:
        """The answer's text when all its time has gone by."""
        return "".join([piece async for piece in self.pieces(answer)])
