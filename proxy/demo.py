"""``lopsided demo``: one simulated Ollama on an RTX 5090 and an RTX 3090, asked directly and through lopsided.

Two real servers on free ports of the loopback address, real HTTP between them; only the cards and the models are simulated.
Each model is asked twice on otherwise empty cards: straight at the simulated Ollama (stock) and through the proxy. Speeds
are those of the answers, ``eval_count`` over ``eval_duration``; placements are what the simulated Ollama did.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import uvicorn

from planner.request import Era
from planner.units import GIB
from proxy.app import create_app
from proxy.errors import UpstreamError
from proxy.gpus.static import StaticSource
from proxy.serve import uvicorn_options
from proxy.settings import load_settings
from proxy.simulator import Simulator, demo_models
from proxy.simulator import create_app as create_ollama
from proxy.simulator.placement import Environment

CARDS = ("RTX 5090:31500MiB", "RTX 3090:23700MiB")
"""The pair of the demo, with what is free on each when nothing runs."""
FAST = 0
"""Index of the fast card in ``CARDS``."""
TOKENS = 64
"""Tokens asked of each answer."""
START_S = 10.0
"""Longest wait for a server of the demo to come up or go down."""
ANSWER_S = 30.0
"""Longest wait for one answer: nothing sleeps while the table is made."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One row: a model of the simulated store, its context, and what another program holds of the fast card meanwhile."""

    model: str
    num_ctx: int
    note: str
    fast_card_held_bytes: int = 0


CASES = (
    Case(model="llama3.1:8b", num_ctx=8192, note="small"),
    Case(model="qwen2.5:32b", num_ctx=32768, note="fits the 5090, but not 80 % of it"),
    Case(model="mistral-small:24b", num_ctx=16384, note="a game holds 10 GiB of the 5090", fast_card_held_bytes=10 * GIB),
    Case(model="qwen3:30b-a3b", num_ctx=8192, note="MoE, and the same game", fast_card_held_bytes=10 * GIB),
    Case(model="gpt-oss:20b", num_ctx=32768, note="MoE, and the same game", fast_card_held_bytes=10 * GIB),
    Case(model="llama3.3:70b", num_ctx=8192, note="fits neither card alone"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """What one answer showed: layers of each card, the output layer counted with its card, and the speed."""

    layers: tuple[int, ...]
    tokens_per_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """Stock and lopsided on one case. ``planned`` is set where the options of a request cannot deliver the plan."""

    case: Case
    n_layers: int
    stock: Run
    lopsided: Run
    planned: Run | None = None

    @property
    def gain(self) -> float:
        """How many times as fast as stock."""
        return self.lopsided.tokens_per_s / self.stock.tokens_per_s


class Stage:
    """The simulated Ollama and the proxy in front of it, while both are served."""

    def __init__(self, simulator: Simulator, *, ollama_url: str, proxy_url: str, client: httpx.Client) -> None:
        self.simulator = simulator
        self.ollama_url = ollama_url
        self.proxy_url = proxy_url
        self._client = client

    def play(self, case: Case) -> Outcome:
        """``case`` by stock, then through lopsided, each on cards that hold no other model.

        Raises ``UpstreamError`` where one of the two servers fails.
        """
        try:
            return self._play(case)
        except httpx.HTTPError as error:
            raise UpstreamError(f"the demo failed at {case.model}: {error}") from error

    def _play(self, case: Case) -> Outcome:
        self.simulator.gpus.occupy(FAST, case.fast_card_held_bytes)
        try:
            self._empty_cards()
            plan = self._get(f"{self.proxy_url}/lopsided/plan", model=case.model, num_ctx=case.num_ctx)["plan"]
            stock = self._ask(self.ollama_url, case)
            self._empty_cards()
            lopsided = self._ask(self.proxy_url, case)
            self._empty_cards()
        finally:
            self.simulator.gpus.occupy(FAST, 0)
        planned = Run(layers=tuple(plan["layers"]), tokens_per_s=plan["decode_tokens_per_s"])
        return Outcome(
            case=case,
            n_layers=sum(plan["layers"]) + plan["cpu_layers"] + (plan["output_gpu"] is None),
            stock=stock,
            lopsided=lopsided,
            planned=planned if planned.layers != lopsided.layers else None,
        )

    def _ask(self, url: str, case: Case) -> Run:
        options = {"num_ctx": case.num_ctx, "num_predict": TOKENS}
        body = {"model": case.model, "prompt": "Why do unequal GPUs need a planner?", "stream": False, "options": options}
        answer = self._client.post(f"{url}/api/generate", json=body).raise_for_status().json()
        load = self._get(f"{self.ollama_url}/simulator/history")["events"][-1]
        return Run(layers=tuple(load["layers"]), tokens_per_s=answer["eval_count"] / answer["eval_duration"] * 1e9)

    def _get(self, url: str, **parameters: Any) -> Any:
        return self._client.get(url, params=parameters).raise_for_status().json()

    def _empty_cards(self) -> None:
        for model in self._get(f"{self.ollama_url}/api/ps")["models"]:
            body = {"model": model["name"], "keep_alive": 0}
            self._client.post(f"{self.ollama_url}/api/generate", json=body).raise_for_status()


@contextmanager
def open_stage(era: Era = "llama-server") -> Iterator[Stage]:
    """Both servers on free ports; what is set of Ollama's own settings holds for the simulated one.

    Nothing waits: simulated seconds pass at once until ``simulator.scheduler.time_scale`` is set.
    """
    simulated = load_settings()
    environment = Environment(
        era=era,
        num_parallel=simulated.num_parallel or 1,
        context_length=simulated.context_length,
        kv_cache_type=simulated.kv_cache_type,
        sched_spread=simulated.sched_spread,
        gpu_overhead_bytes=simulated.gpu_overhead_bytes or 0,
    )
    simulator = Simulator(StaticSource.from_arguments(CARDS).rig(), demo_models(), environment=environment)
    with _serving(create_ollama(simulator), {**uvicorn_options(), "date_header": True}) as ollama_url:
        settings = load_settings(host="127.0.0.1:0", upstream=ollama_url, state="off", calibration="off")
        proxy = create_app(settings, source=simulator)
        with _serving(proxy, uvicorn_options()) as proxy_url, httpx.Client(timeout=ANSWER_S, trust_env=False) as client:
            yield Stage(simulator, ollama_url=ollama_url, proxy_url=proxy_url, client=client)


@contextmanager
def _serving(app: Any, options: Mapping[str, Any]) -> Iterator[str]:
    """Serves ``app`` on a free port of the loopback address, in a thread of its own; yields its URL."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", **{**options, "timeout_graceful_shutdown": 1}))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="lopsided demo", daemon=True)
    thread.start()
    try:
        deadline = time.monotonic() + START_S
        while not server.started:
            if not thread.is_alive() or time.monotonic() > deadline:
                raise UpstreamError(f"a server of the demo did not come up within {START_S:g} s")
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(START_S)
        listener.close()
