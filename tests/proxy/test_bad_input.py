"""Bad requests and bad upstreams: Ollama's own answer comes back, or a clear error; the proxy stays up."""

from __future__ import annotations

import json
import threading

import httpx
import pytest

from proxy.address import parse_address
from proxy.gpus.static import StaticSource
from proxy.loads import BODY_LIMIT_BYTES
from proxy.placing import placement
from proxy.simulator import Simulator, create_app, demo_models
from proxy.wire.forward import CONNECT_S, Forwarder
from tests.proxy.planners import PAIR
from tests.proxy.upstreams import proxy_before, upstream
from tests.servers import serve

MODEL = "qwen3:0.6b"


@pytest.fixture(scope="module")
def pair():
    """A simulated Ollama's URL, and that of the proxy before it."""
    rig = StaticSource.from_arguments(["RTX 5090", "RTX 3090"]).rig()
    simulator = Simulator(rig, [model for model in demo_models() if model.name == MODEL])
    with serve(create_app(simulator)) as direct, proxy_before(direct, source=simulator) as proxied:
        yield direct, proxied, simulator


@pytest.mark.parametrize("path", ["/api/generate", "/api/chat", "/api/embed", "/v1/chat/completions"])
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"model": ',
        b"[]",
        b"null",
        b"\xff\xfe\x00",
        b'{"model":5}',
        b'{"model":null}',
        b'{"model":"nope"}',
        b'{"prompt":"x"}',
        b'{"model":"qwen3:0.6b","options":[]}',
        b'{"model":"qwen3:0.6b","options":{"num_gpu":"many"}}',
        b'{"model":"qwen3:0.6b","options":{"num_ctx":true}}',
        b'{"model":"' + b"m" * 10000 + b'"}',
        b'{"model":"qwen3:0.6b","x":' + b"[" * 20000,
    ],
)
def test_ollamas_own_error_comes_back(pair, path, body):
    direct, proxied, simulator = pair
    answers = [httpx.post(url + path, content=body, headers={"content-type": "application/json"}) for url in (direct, proxied)]
    assert (answers[0].status_code, answers[0].content) == (answers[1].status_code, answers[1].content)
    assert simulator.requests[-1].body == body


@pytest.mark.parametrize("num_ctx", [1, 2**31, 10**15, -5, 0])
def test_absurd_sizes_pass_to_ollama(pair, num_ctx):
    # shows: what can't be planned is not planned, and the number arrives as it was written
    _, proxied, simulator = pair
    body = {"model": MODEL, "prompt": "x", "stream": False, "options": {"num_ctx": num_ctx, "num_predict": 1}}
    answer = httpx.post(proxied + "/api/generate", json=body, timeout=20)
    assert answer.headers["x-lopsided-plan"].startswith("stock; ")
    assert json.loads(simulator.requests[-1].body)["options"]["num_ctx"] == num_ctx


def test_a_body_too_large_to_be_looked_at_passes_as_it_is(monkeypatch):
    monkeypatch.setattr("proxy.loads.BODY_LIMIT_BYTES", 2**20)
    assert BODY_LIMIT_BYTES > 2**20
    with upstream(lambda received, conversation: conversation.answer(200, b"%d" % len(received.body))) as server:
        with proxy_before(server.url, source=PAIR) as url:
            body = json.dumps({"model": "m", "images": ["x" * 2**22]})
            answer = httpx.post(url + "/api/chat", content=body)
        assert answer.text == str(len(body))
        assert server.forwarded[0].body == body.encode()


def test_a_compressed_request_passes_as_it_is():
    with upstream(lambda received, conversation: conversation.answer(200, received.body)) as server:
        with proxy_before(server.url, source=PAIR) as url:
            answer = httpx.post(url + "/api/chat", content=b'{"model":"m"}', headers={"content-encoding": "zstd"})
        assert answer.content == b'{"model":"m"}'
        assert [request.target for request in server.received if request.target != "/api/tags"] == ["/api/chat"]


def test_an_upstream_that_answers_the_proxys_questions_with_nonsense_still_answers_clients():
    def script(received, conversation):
        conversation.answer(200, b"<html>" if received.own else received.body)

    with upstream(script) as server, proxy_before(server.url, source=PAIR) as url:
        answer = httpx.post(url + "/api/generate", content=b'{"model":"m","options":{"main_gpu":0}}')
    assert answer.content == b'{"model":"m","options":{"main_gpu":0}}'
    assert answer.headers["x-lopsided-plan"].startswith("stock; Ollama answers /api/tags with something that is no JSON")


def test_a_slow_upstream_costs_the_plan_and_not_the_answer(monkeypatch):
    monkeypatch.setattr(placement, "PLAN_S", 0.3)
    answered, in_time = threading.Event(), []

    def script(received, conversation):
        if received.own:
            in_time.append(answered.wait(10))
        conversation.answer(200, b"{}")

    with upstream(script) as server, proxy_before(server.url, source=PAIR) as url:
        answer = httpx.post(url + "/api/generate", json={"model": "m"})
        answered.set()
    assert False not in in_time
    assert (answer.status_code, answer.headers["x-lopsided-plan"]) == (200, "stock; no plan within 0.3 s")


async def test_an_upstream_that_thinks_long_is_waited_for():
    # shows: there is no limit on the time to the first byte or between two (httpx's own is 5 s), one on connecting
    forwarder = Forwarder(parse_address("127.0.0.1:1"))
    assert (forwarder.client.timeout.read, forwarder.client.timeout.write) == (None, None)
    assert forwarder.client.timeout.connect == CONNECT_S
    await forwarder.aclose()


def test_an_error_that_is_not_about_memory_is_passed_on_as_it_is(pair):
    # shows: a 500 that was looked into loses nothing
    text = json.dumps({"error": "x" * 300_000}).encode()

    def script(received, conversation):
        conversation.answer(500, text, {"Content-Type": "application/json"})

    with upstream(script) as server, proxy_before(server.url, source=PAIR) as url:
        answer = httpx.post(url + "/api/generate", json={"model": "m"})
    assert (answer.status_code, answer.content) == (500, text)
