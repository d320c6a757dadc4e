"""Plans in force, before a simulated Ollama on real sockets: one plan a model, no reloads, failures mended."""

from __future__ import annotations

import asyncio
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace

import httpx
import pytest

from planner.placement import Placement, solo
from planner.plan import make_plan
from planner.units import GIB
from proxy.config.rulefile import RuleFile
from proxy.config.settings import load_settings
from proxy.errors import GpuError
from proxy.gpus.reader import RigReader
from proxy.gpus.static import StaticSource
from proxy.launcher.launches import Launches
from proxy.models import catalog
from proxy.models.catalog import ModelFacts
from proxy.ollama.endpoints import parse_load_request
from proxy.ollama.options import era_of
from proxy.placing import drafts, placement
from proxy.placing.placement import Placements
from proxy.plans.loading import freed
from proxy.plans.ruled import RuledPlans
from proxy.simulator import Simulator, create_app, demo_models
from proxy.simulator.http import error
from proxy.simulator.placement import Environment
from proxy.simulator.server import ROUTES
from tests.proxy.planners import PAIR, RIG, make, planner_for
from tests.proxy.upstreams import proxy_before
from tests.servers import serve

CARDS = ("RTX 5090:31500MiB", "RTX 3090:23700MiB")
WANTED = {"qwen3:0.6b", "phi4:14b", "qwen2.5:32b", "all-minilm:22m"}
MODELS = [model for model in demo_models() if model.name in WANTED]
MODEL = "phi4:14b"
HEADER = "x-lopsided-plan"


class Stage:
    """A simulated Ollama, the proxy in front of it, and what was asked of the simulator's cards and of the planner."""

    def __init__(self, simulator, url, ollama, planned):
        self.simulator, self.url, self.ollama, self.planned = simulator, url, ollama, planned
        self.error = None

    def ask(self, *, path="/api/generate", model=MODEL, options=None, **fields):
        body = {"model": model, "stream": False, **fields}
        if path == "/api/generate":
            body.setdefault("prompt", "x")
        if options is not None:
            body["options"] = options
        return CLIENT.post(self.url + path, json=body)

    def sent(self):
        """The options of the last request that the simulator got to answer."""
        asked = [r for r in self.simulator.requests if r.method == "POST" and r.path != "/api/show"]
        return json.loads(asked[-1].body).get("options")

    def loads(self):
        return self.simulator.scheduler.count("load") + self.simulator.scheduler.count("reload")

    def rig(self):
        if self.error:
            raise self.error
        return self.simulator.rig()


CLIENT = httpx.Client(timeout=30, trust_env=False)


@pytest.fixture(scope="module", autouse=True)
def _close():
    yield
    CLIENT.close()


@contextmanager
def stage(planner=make_plan, *, era="llama-server", models=MODELS, **settings):
    rig = StaticSource.from_arguments(CARDS).rig()
    simulator = Simulator(rig, models, environment=Environment(era=era, keep_alive_s=60))
    planned = []

    def counting(profile, seen, request):
        planned.append(request)
        return planner(profile, seen, request)

    with serve(create_app(simulator)) as ollama:
        made = Stage(simulator, "", ollama, planned)
        with proxy_before(ollama, source=made, planner=counting, **settings) as url:
            made.url = url
            yield made


def on(index, *, used_bytes=0):
    return planner_for(lambda profile: solo(index, n_gpus=2, n_layers=profile.n_layers), used_bytes=used_bytes)


TIGHT = 23 * GIB
"""So much on the slow card leaves less than ``--fit``'s margin: ``num_gpu`` goes out too, and nothing can move to the CPU."""


def test_the_plan_goes_into_every_request_on_every_endpoint_and_nothing_reloads():
    # shows: generate, chat, streaming, embeddings, load-only requests: one load, one plan, the same options
    with stage(on(1)) as it:
        for fields in (
            {"options": {"num_predict": 2}},
            {"options": {"main_gpu": 0, "num_predict": 2}},
            {"prompt": ""},
            {"path": "/api/chat", "messages": [{"role": "user", "content": "hi"}]},
            {"path": "/api/chat", "messages": [{"role": "user", "content": "hi"}], "stream": True},
            {"path": "/api/chat"},
            {"path": "/api/embed", "input": "x"},
            {"path": "/api/embeddings", "prompt": "x"},
            {"model": MODEL.upper()},
        ):
            answer = it.ask(**fields)
            assert answer.headers[HEADER] == "solo CUDA1; auto"
            assert it.sent()["main_gpu"] == 1
        assert (it.loads(), len(it.planned)) == (1, 1)


def test_concurrent_first_requests_make_one_plan():
    with stage(on(1)) as it, ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda _: it.ask(options={"num_predict": 1}), range(32)))
        assert {answer.headers[HEADER] for answer in answers} == {"solo CUDA1; auto"}
        assert (it.loads(), len(it.planned)) == (1, 1)


def test_an_unloaded_model_is_planned_anew():
    with stage(on(1)) as it:
        it.ask()
        assert it.ask(prompt="", keep_alive=0).headers[HEADER] == "stock; unloads"
        assert it.sent() is None
        _wait(lambda: not CLIENT.get(it.ollama + "/api/ps").json()["models"])
        threading.Event().wait(1.1)  # LOOK_S
        it.ask()
        assert (it.loads(), len(it.planned)) == (2, 2)


def test_another_context_is_another_plan_and_back_is_the_first_again():
    with stage(on(1)) as it:
        for num_ctx in (4096, 8192, 4096):
            assert it.ask(options={"num_ctx": num_ctx}).status_code == 200
        assert [request.num_ctx for request in it.planned] == [4096, 8192, 4096]


def test_a_derived_model_shares_the_plan_of_its_base():
    # shows: Ollama lets both names share one runner, so both get the same options
    with stage(on(1)) as it:
        CLIENT.post(it.url + "/api/create", json={"model": "mine", "from": MODEL, "stream": False}).raise_for_status()
        it.ask()
        assert it.ask(model="mine").headers[HEADER] == "solo CUDA1; auto"
        assert (it.loads(), len(it.planned)) == (1, 1)


@pytest.mark.parametrize(
    ("options", "sent"),
    [
        ({"num_gpu": 10, "main_gpu": 0}, {"num_gpu": 10}),
        ({"main_gpu": 1}, {"main_gpu": 1}),
        ({"tensor_split": "1,1"}, {"tensor_split": "1,1"}),
    ],
)
def test_a_clients_own_wish_stays(options, sent):
    with stage(on(1)) as it:
        answer = it.ask(options=options)
        assert answer.headers[HEADER].startswith("stock; the request sets ")
        assert (it.sent(), it.planned) == (sent, [])


def test_the_models_own_wish_stays():
    with stage(on(1)) as it:
        body = {"model": "pinned", "from": MODEL, "parameters": {"num_gpu": 5}, "stream": False}
        CLIENT.post(it.url + "/api/create", json=body).raise_for_status()
        assert it.ask(model="pinned", options={}).headers[HEADER] == "stock; the model sets num_gpu"
        assert it.sent() == {}


def test_without_derived_models_a_model_seen_on_v1_is_left_alone():
    # shows: mixed clients cause one load; main_gpu: 0 counts as unset there too, or it would reload
    with stage(on(1), v1="off") as it:
        body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
        through = CLIENT.post(it.url + "/v1/chat/completions", json=body)
        assert (through.status_code, through.headers[HEADER]) == (200, "stock; LOPSIDED_V1 is off")
        answer = it.ask(options={"main_gpu": 0})
        assert answer.headers[HEADER] == "stock; seen on /v1"
        CLIENT.post(it.url + "/v1/chat/completions", json=body)
        assert (it.loads(), it.planned) == (1, [])


def test_a_stock_plan_takes_out_a_main_gpu_of_zero():
    with stage(on(0)) as it:
        assert it.ask(options={"main_gpu": 0}).headers[HEADER] == "stock; auto; nothing is faster"
        assert it.sent() == {}


def test_the_older_era_gets_num_gpu():
    def planner(profile, rig, request):
        n = profile.n_layers
        whole = Placement(layers=(n - 5, 5), order=(1, 0), output_gpu=0)
        part = Placement(layers=(n - 20, 5), order=(1, 0), output_gpu=0, cpu_layers=15)
        return make(profile, rig, request, whole, part)

    with stage(planner, era="runner") as it:
        assert it.ask(options={"main_gpu": 0}).headers[HEADER].endswith("; auto; by num_gpu alone")
        assert it.sent() == {"num_gpu": 41}
        assert it.planned[0].era == era_of("0.24.0")


@pytest.mark.parametrize("error", [GpuError("the GPU is lost"), RuntimeError("broken")])
def test_without_gpus_the_request_passes_and_stays_stock_while_loaded(error):
    # shows: no answer is lost, and the GPUs' return does not reload the model
    with stage(on(1)) as it:
        it.error = error
        answer = it.ask(options={"main_gpu": 0})
        assert answer.status_code == 200
        assert answer.headers[HEADER].startswith("stock; ")
        assert it.sent() == {"main_gpu": 0}
        it.error = None
        it.ask(options={"main_gpu": 0})
        assert it.loads() == 1


def test_lost_gpus_do_not_change_a_plan_in_force():
    with stage(on(1)) as it:
        it.ask()
        it.error = GpuError("gone")
        assert it.ask().headers[HEADER] == "solo CUDA1; auto"
        assert it.loads() == 1


def test_a_planner_that_fails_costs_no_answer():
    def planner(*_):
        raise ZeroDivisionError("oops")

    with stage(planner) as it:
        answer = it.ask()
        assert answer.status_code == 200
        assert answer.headers[HEADER] == "stock; planning failed: ZeroDivisionError: oops"


def test_a_load_that_runs_out_of_memory_is_replayed_with_a_wider_margin():
    # shows: the client sees one good answer; the second plan was asked for with more room
    def planner(profile, rig, request):
        best = 1 if request.margin_bytes < GIB else 0
        stock = Placement(layers=(profile.n_layers - 5, 5), order=(1, 0), output_gpu=0)
        return make(profile, rig, request, solo(best, n_gpus=2, n_layers=profile.n_layers), stock, used_bytes=TIGHT)

    with stage(planner) as it:
        it.simulator.gpus.occupy(1, 20 * GIB)
        answer = it.ask()
        assert (answer.status_code, answer.headers[HEADER]) == (200, "solo CUDA0; auto")
        assert answer.json()["response"]
        assert it.ask().headers[HEADER] == "solo CUDA0; auto"
        assert len(it.planned) == 2


def test_a_plan_that_fails_again_gives_way_to_stock():
    with stage(on(1, used_bytes=TIGHT)) as it:
        it.simulator.gpus.occupy(1, 20 * GIB)
        answer = it.ask()
        assert (answer.status_code, answer.headers[HEADER]) == (200, "stock; the same plan ran out of memory before")
        assert it.sent() in (None, {})


def test_concurrent_requests_on_a_failing_plan_all_get_an_answer():
    with stage(on(1, used_bytes=TIGHT)) as it, ThreadPoolExecutor(8) as pool:
        it.simulator.gpus.occupy(1, 20 * GIB)
        answers = list(pool.map(lambda _: it.ask(), range(8)))
        assert {answer.status_code for answer in answers} == {200}
        assert len(it.planned) <= 3


def test_stocks_own_failure_is_passed_on():
    with stage(on(0)) as it:
        it.simulator.gpus.occupy(0, 31 * GIB)
        it.simulator.gpus.occupy(1, 23 * GIB)
        it.simulator.gpus.rig()
        answer = it.ask(options={"num_gpu": 99})
        assert answer.status_code == 500
        assert "lopsided" not in answer.json()["error"]


def test_idle_models_that_ollama_evicts_are_planned_without():
    # shows: the second model is planned onto the fast card that the first one still fills
    with stage() as it:
        it.simulator.gpus.occupy(1, 16 * GIB)
        assert it.ask(model="qwen2.5:32b", options={"num_ctx": 32768}).headers[HEADER] == "solo CUDA0; auto"
        assert it.ask(options={"num_ctx": 16384}).headers[HEADER] == "stock; auto; nothing is faster"
        assert [e.load.placement.order for e in it.simulator.scheduler.history if e.kind == "load"] == [(0,), (0,)]


def test_memory_of_a_model_goes_back_to_where_it_was():
    def gib(rig):
        return [gpu.free_bytes // GIB for gpu in rig.gpus]

    used = replace(
        RIG, gpus=tuple(replace(gpu, free_bytes=gpu.total_bytes - gib * GIB) for gpu, gib in zip(RIG.gpus, (10, 2), strict=True))
    )
    assert gib(freed(used, 6 * GIB, (3 * GIB, GIB))) == [25, 23]
    assert gib(freed(used, 6 * GIB, None)) == [27, 23]
    assert gib(freed(RIG, 5 * GIB, (3 * GIB, 0))) == gib(RIG)


async def _refuses(_exchange):
    return error(500, "not now")


@pytest.mark.parametrize("path", ["/api/tags", "/api/ps", "/api/version", "/api/show"])
def test_questions_that_fail_do_not_change_a_plan_in_force(path, monkeypatch):
    # shows: the options go on into every request while Ollama answers one of the proxy's questions with an error
    monkeypatch.setattr(catalog, "DIGESTS_GOOD_S", 0.0)
    monkeypatch.setattr(placement, "LOOK_S", 0.0)
    with stage(on(1)) as it:
        it.ask()
        with monkeypatch.context() as broken:
            broken.setitem(ROUTES[path], "POST" if path == "/api/show" else "GET", _refuses)
            assert it.ask().headers[HEADER] == "solo CUDA1; auto"
        assert it.ask().headers[HEADER] == "solo CUDA1; auto"
        assert it.loads() == 1


def test_a_model_on_v1_that_cannot_be_looked_up_costs_others_nothing(monkeypatch):
    with stage(on(1)) as it:
        it.ask()
        monkeypatch.setitem(ROUTES["/api/show"], "POST", _refuses)
        it.ask(path="/v1/completions", model="qwen3:0.6b", prompt="x")
        assert it.ask().headers[HEADER] == "solo CUDA1; auto"
        assert it.simulator.scheduler.count("reload") == 0


def test_a_driver_that_hangs_is_asked_once(monkeypatch):
    # shows: it takes one thread, not one a request until there are none left for anything else
    monkeypatch.setattr(placement, "PLAN_S", 0.4)
    monkeypatch.setattr(drafts, "DRAFT_S", 0.2)
    asked, go_on = [], threading.Event()

    def hangs():
        asked.append(1)
        go_on.wait(10)
        return RIG

    with stage(on(1)) as it:
        it.rig = hangs
        texts = [it.ask(options={"num_ctx": num_ctx}).headers[HEADER] for num_ctx in (1024, 2048, 3072)]
        assert (texts, len(asked)) == (["stock; no plan within 0.2 s"] * 3, 1)
        go_on.set()
        _wait(lambda: it.ask(options={"num_ctx": 4096}).headers[HEADER] == "solo CUDA1; auto")


class Fixed:
    """Stands for Ollama and its catalog, where nothing is loaded and every name is the same model."""

    async def loaded(self):
        return ()

    async def era(self):
        return "llama-server"

    async def facts(self, name):
        return ModelFacts(digest="d", blob="b", profile=MODELS[0].profile, defaults={})


def fixed_placements(**parts):
    settings = load_settings(host="127.0.0.1:11435", upstream="127.0.0.1:1")
    catalog = parts.setdefault("catalog", Fixed())
    plans = RuledPlans(catalog=catalog, rules=RuleFile(None), settings=settings, planner=on(1), live=False)
    return Placements(ollama=Fixed(), gpus=RigReader(PAIR), settings=settings, plans=plans, **parts)


def load_request(num_ctx):
    return parse_load_request("/api/generate", b'{"model":"m","options":{"num_ctx":%d}}' % num_ctx)


async def test_placements_and_facts_are_kept_of_the_models_that_were_used_last(monkeypatch):
    class Many(Fixed):
        async def facts(self, name):
            return replace(await super().facts(name), blob=name)

    monkeypatch.setattr(placement, "MODELS_KEPT", 2)
    clock = iter(range(1000))
    placements = fixed_placements(catalog=Many(), clock=lambda: 10.0 * next(clock))
    busy, *others = [await placements.decide(parse_load_request("/api/generate", b'{"model":"m%d"}' % n)) for n in range(6)]
    for decision in others:
        placements.done(decision, loaded=True)
    await placements.decide(parse_load_request("/api/generate", b'{"model":"m6"}'))
    assert [in_force.blob for in_force in placements.in_force()] == ["m0", "m5", "m6"]
    assert busy.in_force in placements.in_force()
    assert len(placements._facts) == 2


async def test_a_failure_is_remembered_though_another_context_was_asked_for_meanwhile():
    # shows: two clients with different contexts cannot keep a plan that fails going for ever
    placements = fixed_placements()
    failing = await placements.decide(load_request(1024))
    await placements.decide(load_request(2048))
    instead = await placements.after_failure(failing)
    assert instead.delivery.text == "stock; the same plan ran out of memory before"


async def test_the_launchers_answer_to_a_load_that_nobody_expected_it_for_is_tried_again():
    # shows: a fresh proxy's first load, sent as stock's, ran out of memory by the answer to the launcher: no 500 for the client
    launches = Launches(lambda: 0.0)
    placements = fixed_placements(launches=launches)
    first = await placements.decide(load_request(1024))
    assert not first.delivery.by_launcher
    launches.asked("b", spread=True)
    launches.given("b", ("--device", "CUDA1,CUDA0"), 1024)
    assert await placements.after_failure(first) is not None
    assert launches.careful("b", 1024) == 1


@pytest.mark.parametrize("spread", [False, True])
async def test_a_card_that_options_named_is_given_up_with_the_launchers_first_answer(spread):
    # shows: a launcher that this very load shows first cannot lead it elsewhere; no more is tried than plan, margin and stock
    launches = Launches(lambda: 0.0)
    placements = fixed_placements(launches=launches)
    decision = await placements.decide(load_request(1024))
    assert decision.delivery.options == {"main_gpu": 1}
    for level in range(2):
        launches.asked("b", spread=spread)
        assert launches.careful("b", 1024) == level
        launches.given("b", level, 1024)
        decision = await placements.after_failure(decision)
        assert decision is not None
        assert not decision.delivery.options
    assert launches.careful("b", 1024) == 2


async def test_all_who_waited_for_the_launchers_answer_try_again_once():
    # shows: the first to hear of the failure does not take the second try from the others, and it ends
    launches = Launches(lambda: 0.0)
    placements = fixed_placements(launches=launches)
    launches.asked("b", spread=True)
    waiting = [await placements.decide(load_request(1024)) for _ in range(2)]
    launches.given("b", ("--device", "CUDA1,CUDA0"), 1024)
    again = [await placements.after_failure(decision) for decision in waiting]
    assert [decision.level for decision in again] == [1, 1]
    assert [await placements.after_failure(decision) for decision in again] == [None, None]


async def test_a_client_that_leaves_after_a_failure_is_counted_out_once():
    # shows: a request under way still keeps its placement, whoever left while it was planned again
    clock = iter(range(1000))
    placements = fixed_placements(clock=lambda: 10.0 * next(clock))
    failing = await placements.decide(load_request(1024))
    leaving = asyncio.create_task(placements.after_failure(failing))
    await asyncio.sleep(0)
    leaving.cancel()
    with suppress(asyncio.CancelledError):
        await leaving
    placements.done(failing, loaded=False)
    first = await placements.decide(load_request(2048))
    assert (await placements.decide(load_request(2048))).in_force is first.in_force


def _wait(condition, seconds=5.0):
    for _ in range(int(seconds / 0.02)):
        if condition():
            return
        threading.Event().wait(0.02)
    raise AssertionError("it never happened")
