"""``lopsided demo``: one simulated Ollama on unequal cards, asked directly and through lopsided.

Two real servers on free ports of the loopback address, real HTTP between them; only the cards and the models are simulated.
Each model is asked twice on otherwise empty cards: straight at the simulated Ollama (stock) and through the proxy. Speeds
are those of the answers, ``eval_count`` over ``eval_duration``; placements are what the simulated Ollama did.

The simulated cards are as fast as published runs on them were (``proxy.simulator.published``). lopsided is not told: it plans
from the cards' data, as on a machine that it sees for the first time.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import httpx
import uvicorn

from planner.hardware import Host
from planner.placement import Placement
from planner.request import Era
from planner.settings import LoadSettings
from planner.speed import predict_speed
from planner.units import GIB
from proxy.app import create_app
from proxy.config.settings import load_settings
from proxy.errors import UpstreamError
from proxy.gpus.static import StaticSource
from proxy.simulator import Simulator, demo_models
from proxy.simulator import create_app as create_ollama
from proxy.simulator.models import HEADERS
from proxy.simulator.placement import Environment
from proxy.simulator.published import published_rates
from proxy.wire.serve import uvicorn_options

TOKENS = 64
"""Tokens asked of each answer."""
START_S = 10.0
"""Longest wait for a server of the demo to come up or go down."""
ANSWER_S = 30.0
"""Longest wait for one answer: nothing sleeps while the table is made."""
FAST = 0
"""Index of the fastest card of each machine: they are in CUDA's order, fastest first."""
HOST = Host(total_bytes=64 * GIB, free_bytes=56 * GIB)
"""The RAM of each machine, whatever this one has."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One row: a model of the simulated store, its context, and what another program holds of the fast card meanwhile."""

    model: str
    num_ctx: int
    note: str = ""
    fast_card_held_bytes: int = 0


EACH_MODEL = tuple(Case(model=name, num_ctx=8192) for name in HEADERS)
"""Every chat model of the store."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """Cards as ``--gpu`` takes them, and what is asked of them."""

    cards: tuple[str, ...]
    cases: tuple[Case, ...] = EACH_MODEL


PAIR = Machine(
    cards=("RTX 5090:31500MiB", "RTX 3090:23700MiB"),
    cases=(
        Case(model="llama3.1:8b", num_ctx=8192, note="small"),
        Case(model="qwen2.5:32b", num_ctx=32768, note="fits the 5090, but not 80 % of it"),
        Case(model="mistral-small:24b", num_ctx=16384, note="a game holds 10 GiB of the 5090", fast_card_held_bytes=10 * GIB),
        Case(model="qwen3:30b-a3b", num_ctx=8192, note="MoE, and the same game", fast_card_held_bytes=10 * GIB),
        Case(model="gpt-oss:20b", num_ctx=32768, note="MoE, and the same game", fast_card_held_bytes=10 * GIB),
        Case(model="llama3.3:70b", num_ctx=8192, note="fits neither card alone"),
    ),
)
"""The pair whose table is printed in full."""

MACHINES = (
    PAIR,
    Machine(cards=("RTX 4090:22700MiB", "RTX 3090")),  # a desktop has 1 GiB of the fast one
    Machine(cards=("RTX 3090", "RTX 4060")),
    Machine(cards=("Quadro RTX 8000", "Tesla P40")),
    Machine(cards=("RTX 5090", "RTX 4090", "RTX 3090", "Quadro RTX 8000", "RTX 3060 12GB", "Tesla P40", "RTX 4060")),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """What one answer showed: layers of each card, the output layer counted with its card, and the speed."""

    layers: tuple[int, ...]
    tokens_per_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """Stock and lopsided on one case. ``planned`` is set where it needs the launcher (Ollama 0.30 or newer) to deliver the plan:
    that is not simulated, but as fast as the simulated cards would run it.
    """

    case: Case
    n_layers: int
    stock: Run
    lopsided: Run
    planned: Run | None = None

    @property
    def gain(self) -> float:
        """How many times as fast as stock."""
        return self.lopsided.tokens_per_s / self.stock.tokens_per_s

    @property
    def launcher_gain(self) -> float:
        """The same with the launcher."""
        return (self.planned or self.lopsided).tokens_per_s / self.stock.tokens_per_s

    @property
    def stock_is_poor(self) -> bool:
        """Whether stock splits the model, or puts it on another card than the fastest."""
        return self.stock.layers[FAST] < self.n_layers


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """What the outcomes on one machine come to: times as fast as stock. Medians are over the ``poor`` cases of stock."""

    cards: tuple[str, ...]
    models: int
    poor: int
    median_gain: float
    median_launcher_gain: float
    least_gain: float

    @classmethod
    def of(cls, machine: Machine, outcomes: Sequence[Outcome]) -> Summary:
        """Of all outcomes on ``machine``."""
        poor = [outcome for outcome in outcomes if outcome.stock_is_poor]
        return cls(
            cards=tuple(card.partition(":")[0] for card in machine.cards),
            models=len(outcomes),
            poor=len(poor),
            median_gain=median(outcome.gain for outcome in poor) if poor else 1.0,
            median_launcher_gain=median(outcome.launcher_gain for outcome in poor) if poor else 1.0,
            least_gain=min(min(outcome.gain, outcome.launcher_gain) for outcome in outcomes),
        )


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
        planned = self._planned(case, plan)
        return Outcome(
            case=case,
            n_layers=sum(plan["layers"]) + plan["cpu_layers"] + (plan["output_gpu"] is None),
            stock=stock,
            lopsided=lopsided,
            planned=planned if planned.layers != lopsided.layers and self.simulator.era == "llama-server" else None,
        )

    def _planned(self, case: Case, plan: Mapping[str, Any]) -> Run:
        """``plan`` as fast as the simulated cards would run it."""
        model, environment = self.simulator.store.find(case.model), self.simulator.environment
        if model is None:
            raise UpstreamError(f"the demo has no {case.model}")
        layers = [count - (gpu == plan["output_gpu"]) for gpu, count in enumerate(plan["layers"])]
        placement = Placement(
            layers=tuple(layers),
            order=tuple(plan["order"]),
            output_gpu=plan["output_gpu"],
            cpu_layers=plan["cpu_layers"],
            cpu_experts=frozenset(plan["cpu_experts"]),
        )
        settings = LoadSettings(num_ctx=case.num_ctx, kv_type_k=environment.kv_cache_type, kv_type_v=environment.kv_cache_type)
        speed = predict_speed(model.profile, self.simulator.rig(), settings, placement, environment.rates)
        return Run(layers=tuple(plan["layers"]), tokens_per_s=speed.decode_tokens_per_s)

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
def open_stage(era: Era = "llama-server", machine: Machine = PAIR) -> Iterator[Stage]:
    """Both servers on free ports, in front of ``machine``; what is set of Ollama's own settings holds for the simulated one.

    Nothing waits: simulated seconds pass at once until ``simulator.scheduler.time_scale`` is set.
    """
    simulated = load_settings()
    rig = replace(StaticSource.from_arguments(machine.cards).rig(), host=HOST)
    environment = Environment(
        era=era,
        num_parallel=simulated.num_parallel or 1,
        context_length=simulated.context_length,
        kv_cache_type=simulated.kv_cache_type,
        sched_spread=simulated.sched_spread,
        gpu_overhead_bytes=simulated.gpu_overhead_bytes or 0,
        rates=published_rates(rig),
    )
    simulator = Simulator(rig, demo_models(), environment=environment)
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
