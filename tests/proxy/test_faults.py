"""Faults of what the proxy depends on, each with its promise: nothing lost, no wrong answer, and it recovers by itself.

Here stand the faults that no other test has; docs/reliability.md has the whole table.
"""

from __future__ import annotations

import json
import signal
import socket
import sys
import threading
import time
from contextlib import contextmanager

import httpx
import pytest

from planner.placement import solo
from planner.units import GIB
from proxy.gpus.static import StaticSource
from proxy.models import catalog
from proxy.placing import placement
from proxy.simulator import Simulator, create_app, demo_models
from proxy.simulator.placement import Environment
from tests.proxy.planners import PAIR, planner_for
from tests.proxy.processes import lopsided_serve
from tests.proxy.upstreams import connect, proxy_before, read_until_closed, upstream
from tests.servers import free_port, serve

MODEL = "phi4:14b"
HEADER = "x-lopsided-plan"
MODELS = [model for model in demo_models() if model.name in (MODEL, "qwen3:0.6b")]
ON_THE_SLOW_CARD = planner_for(lambda profile: solo(1, n_gpus=2, n_layers=profile.n_layers))


def simulated(era="llama-server", **more):
    rig = StaticSource.from_arguments(["RTX 5090:31500MiB", "RTX 3090:23700MiB"]).rig()
    return Simulator(rig, MODELS, environment=Environment(era=era, keep_alive_s=60), **more)


@contextmanager
def asking(simulator, url, planner=ON_THE_SLOW_CARD):
    with proxy_before(url, source=simulator, planner=planner) as proxy, httpx.Client(timeout=20, trust_env=False) as client:

        def ask(model=MODEL, **options):
            body = {"model": model, "prompt": "x", "stream": False, "options": {"num_predict": 1, **options}}
            return client.post(proxy + "/api/generate", json=body)

        yield ask


def sent(simulator):
    asked = [request for request in simulator.requests if request.path == "/api/generate"]
    return {key: value for key, value in json.loads(asked[-1].body)["options"].items() if key != "num_predict"}


ANSWER = b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 17\r\n\r\n{"response":"hi"}'


@pytest.mark.parametrize("path", ["/api/generate", "/v1/chat/completions", "/api/pull"])
@pytest.mark.parametrize("at", [0, 1, 9, 40, len(ANSWER) - 18, len(ANSWER) - 17, len(ANSWER) - 1])
@pytest.mark.parametrize("end", ["reset", "end of file"])
def test_an_answer_that_breaks_at_any_byte_is_a_502_or_a_broken_stream(path, at, end):
    # promise: what is not whole never looks whole, on planned and unplanned paths; the next request is answered
    broken = threading.Event()

    def script(received, conversation):
        if received.own:
            conversation.answer(503)
        elif broken.is_set():
            conversation.send(ANSWER)
        else:
            broken.set()
            conversation.send(ANSWER[:at])
            if end == "reset":
                conversation.reset()
            conversation.close = True

    with upstream(script) as server, proxy_before(server.url, source=PAIR) as url, httpx.Client(timeout=10) as client:
        try:
            answer = client.post(url + path, json={"model": "m"})
        except httpx.RemoteProtocolError:
            pass
        else:
            if at == 0 and answer.status_code == 200:  # a kept connection ended without a byte: asked again on a new one
                return
            assert answer.status_code == 502
            assert answer.json()["error"].startswith("lopsided: Ollama at ")
        assert client.post(url + path, json={"model": "m"}).json() == {"response": "hi"}


@pytest.mark.parametrize("stated", [1, 16, 18, 1000])
def test_a_wrong_content_length_gives_no_wrong_answer(stated):
    # promise: more than stated is cut off and never taken for the next answer; less is a broken stream
    def script(received, conversation):
        if received.target == "/next":
            conversation.answer(200, b"next")
            return
        conversation.send(ANSWER.replace(b"Content-Length: 17", b"Content-Length: %d" % stated))
        conversation.close = True

    with upstream(script) as server, proxy_before(server.url) as url, httpx.Client(timeout=10) as client:
        if stated > 17:
            with pytest.raises(httpx.RemoteProtocolError):
                client.get(url + "/wrong")
        else:
            assert client.get(url + "/wrong").content == b'{"response":"hi"}'[:stated]
        assert client.get(url + "/next").content == b"next"


@pytest.mark.parametrize("path", ["/api/tags", "/api/ps", "/api/version", "/api/show"])
@pytest.mark.parametrize("answer", [b'{"models":[{"name"', b"", b'{"models":7,"version":[],"tensors":{}}', b"[" * 5000, b"\xff"])
def test_truncated_json_from_ollama_costs_a_plan_and_no_answer(path, answer):
    # promise: a question of the proxy's own that is answered with half of something is as if it had not been asked
    good = {"/api/tags": {"models": []}, "/api/ps": {"models": []}, "/api/version": {"version": "0.32.15"}, "/api/show": {}}
    good["/api/tags"] = {"models": [{"name": "m:latest", "model": "m:latest", "digest": "d" * 64, "size": 1}]}

    def script(received, conversation):
        if not received.own:
            conversation.answer(200, received.body)
        elif received.target == path:
            conversation.answer(200, answer)
        else:
            conversation.answer_json(good.get(received.target, {}))

    with upstream(script) as server, proxy_before(server.url, source=PAIR) as url:
        for _ in range(2):
            back = httpx.post(url + "/api/generate", content=b'{"model":"m"}', timeout=10)
            assert (back.status_code, back.content) == (200, b'{"model":"m"}')
            assert back.headers[HEADER].startswith("stock; ")


def test_a_restart_between_two_requests_is_planned_anew():
    # promise: what was loaded is gone with Ollama, and the next request plans for the cards as they are then
    first, second = simulated(), simulated()
    port = free_port()
    with asking(first, f"http://127.0.0.1:{port}") as ask:
        with serve(create_app(first), port=port):
            assert ask().headers[HEADER] == "solo CUDA1; auto"
        down = ask()
        assert (down.status_code, down.json()["error"].startswith("lopsided: Ollama at ")) == (502, True)
        with serve(create_app(second), port=port):
            assert ask().headers[HEADER] == "solo CUDA1; auto"
    assert second.scheduler.count("load") == 1


def test_another_version_of_ollama_between_two_requests(monkeypatch):
    # promise: 0.24 is told num_gpu and 0.32 main_gpu, whichever answers by now; nobody gets the other's options
    monkeypatch.setattr(catalog, "DIGESTS_GOOD_S", 0.0)
    old, new = simulated("runner"), simulated()
    port = free_port()
    part = planner_for(lambda profile: solo(1, n_gpus=2, n_layers=profile.n_layers))
    with asking(old, f"http://127.0.0.1:{port}", part) as ask:
        with serve(create_app(old), port=port):
            assert "main_gpu" not in ask().headers[HEADER]
            before = sent(old)
        with serve(create_app(new), port=port):
            answers = [ask() for _ in range(2)]
    assert [answer.headers[HEADER] for answer in answers] == ["solo CUDA1; auto"] * 2
    assert "main_gpu" not in before
    assert sent(new) == {"main_gpu": 1}


def test_memory_that_another_program_takes_changes_no_plan_in_force(monkeypatch):
    # promise: the plan stays while the model is loaded, though it would not fit any more
    monkeypatch.setattr(placement, "LOOK_S", 0.0)
    simulator = simulated()
    with serve(create_app(simulator)) as url, asking(simulator, url) as ask:
        assert ask().headers[HEADER] == "solo CUDA1; auto"
        simulator.gpus.occupy(1, 14 * GIB)
        simulator.gpus.occupy(0, 30 * GIB)
        assert [ask().headers[HEADER] for _ in range(3)] == ["solo CUDA1; auto"] * 3
        assert (simulator.scheduler.count("load"), simulator.scheduler.count("reload")) == (1, 0)


@pytest.mark.parametrize("jump_s", [365 * 86400.0, -365 * 86400.0])
def test_a_clock_that_jumps_changes_nothing(monkeypatch, jump_s):
    # promise: a wall clock that is set a year forward or back ends no plan, reloads no model and breaks no answer
    simulator = simulated()
    with serve(create_app(simulator)) as url, asking(simulator, url) as ask:
        assert ask().headers[HEADER] == "solo CUDA1; auto"
        real = time.time
        monkeypatch.setattr(time, "time", lambda: real() + jump_s)
        assert [ask().headers[HEADER] for _ in range(3)] == ["solo CUDA1; auto"] * 3
        assert simulator.scheduler.count("load") + simulator.scheduler.count("reload") == 1


def test_an_upstream_that_hangs_holds_up_nobody_else():
    # promise: a request waits for its own answer alone; one whose client leaves is ended upstream
    go_on = threading.Event()

    def script(received, conversation):
        if received.target == "/api/generate" and not received.own:
            go_on.wait(10)
        conversation.answer(200, b"{}")

    with upstream(script) as server, proxy_before(server.url) as url:
        hanging = connect(url)
        hanging.sendall(
            b'POST /api/generate HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: 13\r\n\r\n{"model":"m"}'
        )
        for _ in range(20):
            assert httpx.get(url + "/api/version", timeout=5).status_code == 200
        go_on.set()
        assert read_until_closed(hanging).startswith(b"HTTP/1.1 200")
        hanging.close()


@contextmanager
def a_stream(url):
    """A raw request whose answer has begun."""
    connection = connect(url)
    connection.sendall(b"GET /stream HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    data = b""
    while b"first" not in data:
        data += connection.recv(4096)
    try:
        yield connection
    finally:
        connection.close()


@pytest.mark.skipif(sys.platform == "win32", reason="SIGTERM is POSIX's")
@pytest.mark.parametrize(("drain_s", "whole"), [("20", True), ("1", False)])
def test_sigterm_lets_answers_end_for_so_many_seconds(tmp_path, drain_s, whole):
    # promise: a stream under way ends whole within LOPSIDED_DRAIN and as a broken one after it; no new connection is taken
    go_on = threading.Event()

    def script(received, conversation):
        if received.target != "/stream":
            conversation.answer(200, b'{"version":"0.32.15"}')
            return
        conversation.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        conversation.chunk(b"first")
        go_on.wait(15)
        conversation.chunk(b"last")
        conversation.chunk(b"")

    with upstream(script) as server, lopsided_serve(server.url, tmp_path, LOPSIDED_DRAIN=drain_s) as served:
        with a_stream(served.url) as connection:
            served.process.send_signal(signal.SIGTERM)
            for _ in range(100):
                try:
                    connect(served.url).close()
                except ConnectionError:
                    break
                time.sleep(0.05)
            else:
                raise AssertionError("it takes connections still")
            if whole:
                go_on.set()
            connection.settimeout(10)
            rest = read_until_closed(connection)
        begun = time.monotonic()
        assert served.process.wait(10) == -signal.SIGTERM
        assert time.monotonic() - begun < 5
        go_on.set()
    assert (b"last" in rest, rest.endswith(b"0\r\n\r\n")) == (whole, whole)
    assert "Traceback" not in served.text


def test_a_half_closed_client_counts_as_one_that_left():
    # promise: as from Ollama (Go cancels a request whose connection ends for reading): it stops to load or to generate
    noticed = threading.Event()

    def script(received, conversation):
        conversation.gone(5)
        noticed.set()
        conversation.close = True

    with upstream(script) as server, proxy_before(server.url) as url, connect(url) as connection:
        connection.sendall(b"GET /x HTTP/1.1\r\nHost: localhost\r\n\r\n")
        while not server.forwarded:
            time.sleep(0.01)
        connection.shutdown(socket.SHUT_WR)
        assert noticed.wait(1)
