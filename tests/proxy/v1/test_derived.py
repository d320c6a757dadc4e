"""Derived models, before a simulated Ollama on real sockets: placement for clients that cannot ask for it, and no traces."""

from __future__ import annotations

import asyncio
import json
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import anthropic
import httpx
import openai
import pytest

from planner.placement import solo
from planner.units import GIB
from proxy.gpus.static import StaticSource
from proxy.ollama.names import base_of, derived_name
from proxy.simulator import Simulator, create_app, demo_models
from proxy.simulator.http import error, json_response
from proxy.simulator.placement import Environment
from proxy.simulator.server import ROUTES
from proxy.v1 import derived as module
from proxy.v1.derived import Derived, difference
from tests.proxy.planners import make, planner_for
from tests.proxy.upstreams import proxy_before
from tests.servers import free_port, serve

CHAT, EMBEDDER, OTHER = "phi4:14b", "all-minilm:22m", "qwen3:0.6b"
MODELS = demo_models((CHAT, EMBEDDER, OTHER))
HEADER = "x-lopsided-plan"
MESSAGES = [{"role": "user", "content": "Why is the sky blue?"}]
V1 = {
    "/v1/chat/completions": {"messages": MESSAGES},
    "/v1/completions": {"prompt": "x"},
    "/v1/responses": {"input": "x"},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 20},
}
FAST = planner_for(lambda profile: solo(1, n_gpus=2, n_layers=profile.n_layers))


class Stage:
    """A simulated Ollama; proxies come and go in front of it."""

    def __init__(self, simulator, ollama):
        self.simulator, self.ollama, self.url = simulator, ollama, ""
        self.client = httpx.Client(timeout=30, trust_env=False)

    @contextmanager
    def proxy(self, planner=FAST, **settings):
        with proxy_before(self.ollama, source=self.simulator, planner=planner, **settings) as self.url:
            yield self

    def post(self, path, *, model=CHAT, to=None, **fields):
        return self.client.post((to or self.url) + path, json={"model": model, **V1.get(path, {}), **fields})

    def api(self, *, model=CHAT, **options):
        body = {"model": model, "prompt": "x", "stream": False, "options": {"num_predict": 2, **options}}
        return self.client.post(self.url + "/api/generate", json=body)

    def get(self, path, *, to=None):
        return self.client.get((to or self.url) + path)

    def delete(self, name, *, to=None):
        self.client.request("DELETE", (to or self.url) + "/api/delete", json={"model": name}).raise_for_status()

    def create(self, name, base, *, to=None, **fields):
        body = {"model": name, "from": base, "stream": False, **fields}
        self.client.post((to or self.url) + "/api/create", json=body).raise_for_status()

    def derived(self):
        """The derived models in the store."""
        return [model for model in self.simulator.store if base_of(model.name)]

    def count(self, *kinds):
        return sum(self.simulator.scheduler.count(kind) for kind in kinds)

    def wait(self, condition):
        for _ in range(400):
            if condition():
                return
            self.client.get(self.ollama + "/")
        raise AssertionError(f"it did not come about: {self.derived()}")


@pytest.fixture
def stage():
    rig = StaticSource.from_arguments(["RTX 5090:31500MiB", "RTX 3090:23700MiB"]).rig()
    simulator = Simulator(rig, MODELS, environment=Environment(keep_alive_s=60))
    with serve(create_app(simulator)) as ollama:
        made = Stage(simulator, ollama)
        yield made
        made.client.close()


def test_mixed_clients_share_one_runner_and_nothing_reloads(stage):
    # shows: every endpoint, streaming or not, in turns with /api, ends in one load with the plan's options
    with stage.proxy():
        for path in V1:
            for fields in ({}, {"stream": True}):
                answer = stage.post(path, **fields)
                assert (answer.status_code, answer.headers[HEADER]) == (200, "solo CUDA1; auto"), answer.text
                assert stage.api().headers[HEADER] == "solo CUDA1; auto"
        assert stage.post("/v1/embeddings", model=EMBEDDER, input="x").status_code == 200
        stage.client.post(stage.url + "/api/embed", json={"model": EMBEDDER, "input": "x"}).raise_for_status()
        assert (stage.count("load"), stage.count("reload")) == (2, 0)
        loads = [event.load for event in stage.simulator.scheduler.history if event.kind == "load"]
        assert [load.placement.order for load in loads] == [(1,), (1,)]
        assert len(stage.derived()) == 2


def test_where_stocks_choice_is_taken_nothing_is_made(stage):
    with stage.proxy(planner_for(lambda profile: solo(0, n_gpus=2, n_layers=profile.n_layers))):
        assert stage.post("/v1/completions").headers[HEADER] == "stock; auto; nothing is faster"
        stage.api()
        assert (stage.derived(), stage.count("load", "reload")) == ([], 1)
        assert "/api/create" not in {request.path for request in stage.simulator.requests}


def test_many_clients_at_once_make_one(stage):
    with stage.proxy(), ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda _: stage.post("/v1/completions").headers[HEADER], range(24)))
        assert set(answers) == {"solo CUDA1; auto"}
        assert sum(request.path == "/api/create" for request in stage.simulator.requests) == 1
        assert (stage.count("load"), stage.count("reload")) == (1, 0)


def test_a_derived_model_weighs_nothing_and_differs_in_its_placement_alone(stage):
    with stage.proxy():
        stage.post("/v1/completions")
        (made,) = stage.derived()
        base = stage.simulator.store.find(CHAT)
        assert made.blob == base.blob
        assert made.parameters == {**base.parameters, "main_gpu": 1}
        assert base_of(made.name) == "registry.ollama.ai/library/phi4:14b"


def test_no_list_shows_it_and_what_is_loaded_is_listed_as_the_base(stage):
    paths = ("/api/tags", "/v1/models")
    before = {path: stage.get(path, to=stage.ollama).content for path in paths}
    with stage.proxy():
        assert {path: stage.get(path).content for path in paths} == before
        stage.post("/v1/completions")
        assert stage.derived()
        assert {path: stage.get(path).content for path in paths} == before
        (loaded,) = stage.get("/api/ps").json()["models"]
        (raw,) = stage.get("/api/ps", to=stage.ollama).json()["models"]
        assert base_of(raw["name"])
        base = stage.simulator.store.find(CHAT)
        assert loaded == {**raw, "name": CHAT, "model": CHAT, "digest": base.digest}
        (row,) = stage.get("/lopsided/models").json()["models"]
        assert row["loaded"]


def test_it_is_gone_after_shutdown(stage):
    with stage.proxy():
        stage.post("/v1/completions")
        assert stage.derived()
    assert not stage.derived()
    assert len(list(stage.simulator.store)) == len(MODELS)


def test_what_a_crash_leaves_is_removed_at_the_next_start(stage, monkeypatch):
    # shows: also of a base that has gone; a user's models stay, whatever their names are
    async def crash(self):
        for task in self._tasks.values():
            task.cancel()

    with monkeypatch.context() as crashing, stage.proxy():
        crashing.setattr(Derived, "aclose", crash)
        stage.post("/v1/completions")
        stage.post("/v1/completions", model=OTHER)
        stage.delete(OTHER, to=stage.ollama)
    left = stage.derived()
    assert len(left) == 2
    blob = stage.simulator.store.find(CHAT).blob
    stranger = derived_name("registry.ollama.ai/me/model:latest", blob, {"num_gpu": 3})
    users = {stranger, "lopsided.invalid/me/model:latest", "lopsided/model:latest"}
    for name in users:
        stage.create(name, CHAT, to=stage.ollama, parameters={"num_gpu": 4})
    with stage.proxy(v1="off"):
        stage.wait(lambda: len(stage.derived()) == 1)
        names = {model["name"] for model in stage.get("/api/tags").json()["models"]}
        assert names == {CHAT, EMBEDDER, *users}
        loaded = {model["name"] for model in stage.get("/api/ps").json()["models"]}
        assert loaded == {CHAT, OTHER}
    assert {model.name for model in stage.simulator.store} == names


def test_ollama_down_at_shutdown_and_at_start_costs_nothing(stage, monkeypatch):
    # shows: what is left is removed before the first is made, once Ollama is there again
    async def crash(self):
        pass

    with monkeypatch.context() as crashing, stage.proxy():
        crashing.setattr(Derived, "aclose", crash)
        stage.post("/v1/completions", model=OTHER)
    (left,) = stage.derived()
    with monkeypatch.context() as down:
        down.setitem(ROUTES["/api/tags"], "GET", _refuses)
        with stage.proxy():
            stage.wait(lambda: stage.simulator.requests[-1].path == "/")
            down.undo()
            assert stage.get("/api/tags").json() == {
                "models": [m for m in stage.get("/api/tags", to=stage.ollama).json()["models"] if m["name"] != left.name]
            }
            stage.post("/v1/completions")
            assert [base_of(model.name) for model in stage.derived()] == ["registry.ollama.ai/library/phi4:14b"]
            down.setitem(ROUTES["/api/delete"], "DELETE", _refuses)
        assert len(stage.derived()) == 1
    with stage.proxy():
        stage.wait(lambda: not stage.derived())


@pytest.mark.parametrize("change", ["create", "copy", "past the proxy"])
def test_a_base_that_changes_gets_a_new_one(stage, monkeypatch, change):
    # shows: the next answer is by the new base; of the old one nothing stays
    monkeypatch.setattr(module, "CHECK_S", 0.0)
    monkeypatch.setattr("proxy.models.catalog.DIGESTS_GOOD_S", 0.0)
    to = stage.ollama if change == "past the proxy" else None
    with stage.proxy():
        stage.create("mine", CHAT, system="one")
        stage.post("/v1/completions", model="mine")
        (before,) = stage.derived()
        if change == "copy":
            stage.create("yours", CHAT, system="two")
            stage.client.post(stage.url + "/api/copy", json={"source": "yours", "destination": "mine"}).raise_for_status()
        else:
            stage.create("mine", CHAT, system="two", to=to)
        stage.post("/v1/completions", model="mine")
        stage.wait(lambda: len(stage.derived()) == 1)
        (after,) = stage.derived()
        assert (before.system, after.system) == ("one", "two")
        assert (stage.count("load"), stage.count("reload")) == (1, 0)


def test_a_base_that_is_deleted_takes_it_along(stage):
    # shows: or its weights could not be freed
    with stage.proxy():
        stage.post("/v1/completions")
        assert stage.derived()
        stage.delete(CHAT)
        stage.wait(lambda: not stage.derived())
        assert stage.post("/v1/completions").json()["error"]["message"] == "model 'phi4:14b' not found"


def test_a_base_that_is_deleted_past_the_proxy_takes_it_along_too(stage, monkeypatch):
    monkeypatch.setattr(module, "TIDY_S", 0.1)
    monkeypatch.setattr("proxy.models.catalog.DIGESTS_GOOD_S", 0.0)
    with stage.proxy():
        stage.post("/v1/completions")
        stage.delete(CHAT, to=stage.ollama)
        stage.wait(lambda: not stage.derived())


def test_a_base_that_was_gone_for_a_while_has_its_placement_again_at_once(stage, monkeypatch):
    # shows: a request that comes meanwhile is no reason to leave the model alone for an hour
    monkeypatch.setattr(module, "CHECK_S", 0.0)
    monkeypatch.setattr("proxy.models.catalog.DIGESTS_GOOD_S", 0.0)
    with stage.proxy():
        stage.create("mine:latest", CHAT, to=stage.ollama)
        assert stage.post("/v1/completions", model="mine").headers[HEADER] == "solo CUDA1; auto"
        stage.delete("mine:latest", to=stage.ollama)
        gone = stage.post("/v1/completions", model="mine")
        assert (gone.status_code, gone.json()["error"]["message"]) == (404, "model 'mine' not found")
        stage.wait(lambda: not stage.derived())
        stage.create("mine:latest", CHAT, to=stage.ollama)
        assert stage.post("/v1/completions", model="mine").headers[HEADER] == "solo CUDA1; auto"
        assert stage.count("reload") == 0


def test_two_in_front_of_one_ollama_lose_nothing(stage, monkeypatch):
    # shows: the other one removes what is in use when it starts and ends; it is made again, and no request notices
    monkeypatch.setattr(module, "CHECK_S", 0.0)
    with stage.proxy() as first:
        kept = first.url
        for _ in range(3):
            assert stage.post("/v1/completions", to=kept).headers[HEADER] == "solo CUDA1; auto"
            with stage.proxy():
                for url in (kept, stage.url, kept):
                    answer = stage.post("/v1/completions", to=url)
                    assert (answer.status_code, answer.headers[HEADER]) == (200, "solo CUDA1; auto")
            assert stage.post("/v1/completions", to=kept).headers[HEADER] == "solo CUDA1; auto"
        assert (stage.count("load"), stage.count("reload")) == (1, 0)


def test_where_ollama_loses_each_one_the_request_goes_as_it_is(stage, monkeypatch):
    # shows: two are made, none more; the client has its answer
    complete, lost = ROUTES["/v1/completions"]["POST"], []

    async def gone(exchange):
        name = exchange.json_body()["model"]
        if not base_of(name):
            return await complete(exchange)
        lost.append(name)
        return error(404, f"model '{name}' not found")

    monkeypatch.setitem(ROUTES["/v1/completions"], "POST", gone)
    with stage.proxy():
        answer = stage.post("/v1/completions")
        assert (answer.status_code, answer.headers[HEADER]) == (200, "stock; Ollama loses the derived model")
        assert len(lost) == 2


def test_one_that_another_removes_before_it_was_looked_at_is_made_the_next_time(stage, monkeypatch):
    show, lost = ROUTES["/api/show"]["POST"], []

    async def gone(exchange):
        name = exchange.json_body()["model"]
        if base_of(name) and not lost:
            lost.append(name)
            return error(404, f"model '{name}' not found")
        return await show(exchange)

    monkeypatch.setitem(ROUTES["/api/show"], "POST", gone)
    with stage.proxy():
        assert "does not show" in stage.post("/v1/completions").headers[HEADER]
        assert stage.post("/v1/completions").headers[HEADER] == "solo CUDA1; auto"


def test_one_that_another_lopsided_has_made_is_hidden_too(stage):
    with stage.proxy() as first:
        kept = first.url
        stage.wait(lambda: any(request.path == "/api/tags" for request in stage.simulator.requests))  # it has looked
        with stage.proxy():
            stage.post("/v1/completions")
            assert len(stage.derived()) == 1
            assert "lopsided.invalid" not in stage.get("/api/tags", to=kept).text


def test_the_length_of_a_list_is_that_of_what_is_shown(stage):
    with stage.proxy():
        stage.post("/v1/completions")
        head, got = (stage.client.request(method, stage.url + "/api/tags") for method in ("HEAD", "GET"))
        assert (head.status_code, head.content, head.headers["content-length"]) == (200, b"", got.headers["content-length"])
        assert stage.client.head(stage.url + "/api/ps").status_code == stage.client.head(stage.ollama + "/api/ps").status_code


def test_another_placement_takes_another_and_the_old_one_goes(stage, monkeypatch):
    monkeypatch.setattr("proxy.placing.placement.LOOK_S", 0.0)
    used_bytes = [23 * GIB]  # less than --fit's margin is left: num_gpu goes out too

    def planner(profile, rig, request):
        chosen, stock = (solo(index, n_gpus=2, n_layers=profile.n_layers) for index in (1, 0))
        return make(profile, rig, request, chosen, stock, used_bytes=used_bytes[0])

    with stage.proxy(planner):
        stage.post("/v1/completions")
        first = stage.derived()
        stage.client.post(stage.url + "/api/generate", json={"model": CHAT, "keep_alive": 0}).raise_for_status()
        used_bytes[0] = 0
        stage.post("/v1/completions")
        stage.wait(lambda: len(stage.derived()) == 1)
        assert [model.parameters.get("num_gpu") for model in (*first, *stage.derived())] == [41, None]


def test_one_that_was_deleted_behind_our_back_is_made_again(stage):
    with stage.proxy():
        stage.post("/v1/completions")
        (made,) = stage.derived()
        stage.delete(made.name, to=stage.ollama)
        answer = stage.post("/v1/completions")
        assert (answer.status_code, answer.json()["model"]) == (200, CHAT)
        assert len(stage.derived()) == 1


def test_one_that_is_always_lost_costs_the_request_nothing(stage, monkeypatch):
    # shows: after a second loss the request goes as it is, and says so
    completions = ROUTES["/v1/completions"]["POST"]

    async def loses(exchange):
        name = json.loads(exchange.request.body)["model"]
        return error(404, f"model '{name}' not found") if base_of(name) else await completions(exchange)

    monkeypatch.setitem(ROUTES["/v1/completions"], "POST", loses)
    with stage.proxy():
        answer = stage.post("/v1/completions")
        assert (answer.status_code, answer.headers[HEADER]) == (200, "stock; Ollama loses the derived model")


async def _refuses(exchange):
    return error(500, "open /root/.ollama/models: read-only file system")


async def _forgets_parameters(exchange):
    body = exchange.json_body()
    base = exchange.simulator.store.find(body["from"])
    exchange.simulator.store.copy(base, body["model"], now_ns=0)
    return json_response({"status": "success"})


@pytest.mark.parametrize(
    ("create", "reason"),
    [
        (_refuses, "Ollama refuses to make a derived model: open /root/.ollama/models: read-only file system"),
        (_forgets_parameters, "Ollama makes a derived model of other parameters"),
    ],
)
def test_an_ollama_that_makes_none_answers_all_the_same(stage, monkeypatch, create, reason):
    # shows: the request passes with the reason; from then on the model is left alone on /api too: one load, no more attempts
    monkeypatch.setitem(ROUTES["/api/create"], "POST", create)
    with stage.proxy():
        for _ in range(2):
            answer = stage.post("/v1/completions")
            assert (answer.status_code, answer.headers[HEADER]) == (200, f"stock; {reason}")
            assert stage.api().headers[HEADER] == "stock; seen on /v1"
        assert sum(request.path == "/api/create" for request in stage.simulator.requests) == 1
        assert (stage.count("load"), stage.count("reload"), stage.derived()) == (1, 0, [])


def test_a_slow_ollama_is_not_waited_for(stage, monkeypatch):
    monkeypatch.setattr(module, "WAIT_S", 0.05)
    create = ROUTES["/api/create"]["POST"]

    async def slow(exchange):
        await asyncio.sleep(0.5)
        return await create(exchange)

    monkeypatch.setitem(ROUTES["/api/create"], "POST", slow)
    with stage.proxy():
        answer = stage.post("/v1/completions")
        assert (answer.status_code, answer.headers[HEADER]) == (200, "stock; Ollama made no derived model within 0.05 s")


def test_switched_off_it_touches_nothing(stage):
    with stage.proxy(v1="off"):
        assert stage.post("/v1/completions").headers[HEADER] == "stock; LOPSIDED_V1 is off"
        assert "/api/create" not in {request.path for request in stage.simulator.requests}


def test_a_request_changes_in_its_models_name_alone(stage):
    # shows: numbers, order, blanks and unknown fields stay; of several names the one that counts is replaced
    with stage.proxy():
        stage.post("/v1/completions")
        (made,) = stage.derived()
        body = b'{ "model":"nope" , "x": 1.0,"Model": "%b","prompt":"x" ,"model":null}' % CHAT.encode()
        answer = stage.client.post(stage.url + "/v1/completions", content=body, headers={"content-type": "application/json"})
        assert answer.headers[HEADER] == "solo CUDA1; auto"
        sent = stage.simulator.requests[-1].body
        assert sent == body.replace(b'"%b"' % CHAT.encode(), b'"%b"' % made.name.encode())


def test_models_differ_in_nothing_but_the_options():
    show = {"modelfile": '# FROM a\nFROM /b\nTEMPLATE x\nPARAMETER stop "y"\n', "parameters": 'stop "y"', "capabilities": ["a"]}
    mine = show | {
        "modelfile": '# FROM b\nFROM /b\nTEMPLATE x\nPARAMETER main_gpu 0\nPARAMETER stop "y"\n',
        "parameters": 'main_gpu 0\nstop "y"',
    }
    assert difference(show, mine, {"main_gpu": 0}) is None
    assert difference(show, mine, {"main_gpu": 1}) == "parameters"
    assert difference(show, mine | {"modelfile": mine["modelfile"] + "PARSER p\n"}, {"main_gpu": 0}) == "files or texts"
    assert difference(show, mine | {"capabilities": []}, {"main_gpu": 0}) == "capabilities"


CHANGING = re.compile(r"(?<=id=')[^']*|(?<=item_id=')[^']*|(?<=\w_at=)[\d.]+|(?<=created=)\d+|(?<=req_)\w+")
OPENAI = {
    "chat": lambda c: c.chat.completions.create(model=CHAT, messages=MESSAGES),
    "chat streamed": lambda c: list(
        c.chat.completions.create(model=CHAT, messages=MESSAGES, stream=True, stream_options={"include_usage": True})
    ),
    "completion": lambda c: c.completions.create(model=CHAT, prompt="x"),
    "completion streamed": lambda c: list(c.completions.create(model=CHAT, prompt="x", stream=True)),
    "embeddings": lambda c: c.embeddings.create(model=EMBEDDER, input=["a", "b"]),
    "response": lambda c: c.responses.create(model=CHAT, input="x"),
    "response streamed": lambda c: list(c.responses.create(model=CHAT, input="x", stream=True)),
    "models": lambda c: sorted(model.id for model in c.models.list()),
    "model": lambda c: c.models.retrieve(CHAT),
    "unknown model": lambda c: c.chat.completions.create(model="nope", messages=MESSAGES),
    "tools that the model has not": lambda c: c.chat.completions.create(
        model=CHAT, messages=MESSAGES, tools=[{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    ),
    "no messages": lambda c: c.chat.completions.create(model=CHAT, messages=[]),
    "a name of another form": lambda c: c.chat.completions.create(model="PHI4:14b", messages=MESSAGES).model,
}
ANTHROPIC = {
    "message": lambda c: c.messages.create(model=CHAT, max_tokens=20, messages=MESSAGES),
    "message streamed": lambda c: list(c.messages.create(model=CHAT, max_tokens=20, messages=MESSAGES, stream=True)),
    "unknown model": lambda c: c.messages.create(model="nope", max_tokens=20, messages=MESSAGES),
}


@pytest.fixture(scope="module")
def clients():
    """For each vendor a client of a simulated Ollama, and one of the proxy before another."""
    rig = StaticSource.from_arguments(["RTX 5090:31500MiB", "RTX 3090:23700MiB"]).rig()
    alone, simulator = Simulator(rig, MODELS), Simulator(rig, MODELS)
    with (
        serve(create_app(alone)) as direct,
        serve(create_app(simulator)) as behind,
        proxy_before(behind, source=simulator, planner=FAST) as proxied,
    ):
        found = {}
        for vendor, client, suffix in (("openai", openai.OpenAI, "/v1"), ("anthropic", anthropic.Anthropic, "")):
            found[vendor] = [client(base_url=url + suffix, api_key="x", max_retries=0) for url in (direct, proxied)]
        yield found
        for pair in found.values():
            for client in pair:
                client.close()
        loads = [event for event in simulator.scheduler.history if event.kind in ("load", "reload")]
        assert {(event.kind, event.load.placement.order) for event in loads} == {("load", (1,))}


@pytest.mark.parametrize(("vendor", "name"), [("openai", name) for name in OPENAI] + [("anthropic", name) for name in ANTHROPIC])
def test_official_clients_see_no_difference(clients, vendor, name):
    call = (OPENAI if vendor == "openai" else ANTHROPIC)[name]

    def outcome(client):
        try:
            return CHANGING.sub("…", repr(call(client)))
        except (openai.APIStatusError, anthropic.APIStatusError) as problem:
            return (type(problem), CHANGING.sub("…", str(problem)))

    direct, proxied = clients[vendor]
    assert outcome(proxied) == outcome(direct)


async def test_nobody_there_is_no_trouble():
    # shows: start and shutdown with an Ollama that is not there
    with proxy_before(f"http://127.0.0.1:{free_port()}", source=StaticSource.from_arguments(["RTX 3090"])) as url:
        async with httpx.AsyncClient() as client:
            assert (await client.post(url + "/v1/completions", json={"model": CHAT})).status_code == 502
