"""Who may ask what: the token, foreign hosts and origins, and that neither they nor the log get at anything."""

from __future__ import annotations

import json
import logging

import httpx
import pytest

from proxy.config.settings import load_settings
from proxy.errors import SettingsError
from proxy.simulator import Simulator, create_app, demo_models
from proxy.wire.access import bears_token, is_foreign, lacks_token, refuses_host, refuses_own
from tests.proxy.planners import PAIR, RIG
from tests.proxy.upstreams import proxy_before, upstream
from tests.servers import serve

TOKEN = "s3cret-token"
BEARER = {"authorization": f"Bearer {TOKEN}"}
MODEL = "qwen3:0.6b"


def settings(**more):
    return load_settings(**{"host": "127.0.0.1:11435", "upstream": "127.0.0.1:1", "token": TOKEN, **more})


def scope(path="/api/chat", *, method="POST", client="127.0.0.1", **headers):
    raw = [(name.encode(), value.encode()) for name, value in {"host": "localhost", **headers}.items()]
    return {"type": "http", "method": method, "path": path, "client": client and (client, 1), "headers": raw}


def wanted(it, **more):
    made = settings(require_token="on", **more)
    return lacks_token(it, made, trusted=bears_token(it["headers"], made)) is not None


def answer(received, conversation):
    conversation.answer_json({"path": received.target})


def test_with_require_token_nothing_is_answered_without_it():
    # shows: 401 for Ollama's and lopsided's endpoints alike, and the upstream sees neither the request nor, later, the token
    with upstream(answer) as server, proxy_before(server.url, token=TOKEN, require_token="on", source=PAIR) as url:
        for method, path in (("GET", "/"), ("GET", "/api/tags"), ("POST", "/api/chat"), ("POST", "/v1/responses"), ("GET", "/x")):
            refused = httpx.request(method, url + path)
            assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
            assert refused.json()["error"].startswith("lopsided: ")
        assert httpx.get(url + "/lopsided/models").status_code == 401
        assert server.forwarded == []
        assert httpx.get(url + "/api/tags", headers=BEARER).status_code == 200
        assert httpx.get(url + "/api/tags", headers={"authorization": "Bearer other"}).status_code == 401
    assert [request.header("authorization") for request in server.forwarded] == [None]


def test_a_health_check_over_loopback_and_a_browsers_preflight_bear_none():
    assert not wanted(scope("/lopsided/health", method="GET"))
    assert wanted(scope("/lopsided/health", method="GET", client="192.168.1.2"))
    assert wanted(scope("/lopsided/health", method="POST"))
    assert not wanted(scope(method="OPTIONS", **{"access-control-request-method": "POST"}))
    assert wanted(scope(method="OPTIONS"))


def test_two_authorizations_are_none():
    # shows: what checks one of two headers and forwards the other can be fooled
    it = scope(**BEARER)
    assert not wanted(it)
    it["headers"].append((b"authorization", b"Bearer other"))
    assert wanted(it)


def test_requiring_a_token_that_there_is_not_is_refused_at_start():
    with pytest.raises(SettingsError, match="LOPSIDED_TOKEN"):
        load_settings(host="127.0.0.1:11435", upstream="127.0.0.1:1", require_token="on")


def test_a_client_of_another_servers_key_is_passed_on():
    # shows: only lopsided's own token is taken out
    with upstream(answer) as server, proxy_before(server.url, token=TOKEN) as url:
        httpx.get(url + "/api/tags", headers={"authorization": "Bearer ollama"})
    assert server.forwarded[0].header("authorization") == "Bearer ollama"


@pytest.mark.parametrize("headers", [{"origin": "https://evil.example.com"}, {"host": "evil.example.com"}, {"origin": "null"}])
def test_a_foreign_page_gets_ollamas_own_403_and_has_no_effect(headers):
    # shows: recordings 52 and 53 on every endpoint; nothing is planned, learned or made for it
    simulator = Simulator(RIG, [model for model in demo_models() if model.name == MODEL])
    body = json.dumps({"model": MODEL, "prompt": "x", "messages": []})
    with serve(create_app(simulator)) as direct, proxy_before(direct, source=simulator) as url:
        for path in ("/api/generate", "/api/chat", "/v1/chat/completions", "/api/create"):
            answers = [httpx.post(base + path, content=body, headers=headers) for base in (direct, url)]
            assert [(answer.status_code, answer.content) for answer in answers] == [(403, b"")] * 2
        assert httpx.get(url + "/lopsided/models").json() == {"models": []}
    assert {request.method for request in simulator.requests} <= {"GET"}  # the proxy's own looks at its start


def test_an_ollama_elsewhere_does_not_weaken_the_check_of_a_proxy_on_loopback():
    # shows: a name that a page made point here reaches no Ollama that listens to the network and so checks nothing
    elsewhere = settings(upstream="http://gpu-box:11434")
    evil = scope(host="evil.example.com")
    assert refuses_host(evil, elsewhere, trusted=False).status == 403
    assert refuses_host(scope(), elsewhere, trusted=False) is None
    assert refuses_host(evil, elsewhere, trusted=True) is None
    assert refuses_host(evil, settings(host="0.0.0.0:1", upstream="http://gpu-box:11434"), trusted=False) is None
    assert refuses_host(evil, settings(), trusted=False) is None  # Ollama itself says no


def test_a_page_of_the_same_origin_is_not_foreign():
    assert not is_foreign(scope(host="gpu-box.local:1", origin="http://gpu-box.local:1"), settings(), trusted=False)
    assert is_foreign(scope(host="gpu-box.local:1", origin="http://gpu-box.local:2"), settings(), trusted=False)
    assert not is_foreign(scope(origin="https://mine.example"), settings(origins="https://mine.example"), trusted=False)


def test_what_changes_state_needs_loopback_or_the_token():
    for path in ("/lopsided/launch", "/lopsided/calibrate"):
        assert refuses_own(scope(path), settings(), trusted=False) is None
        assert refuses_own(scope(path, client="192.168.1.2"), settings(), trusted=False).status == 403
        assert refuses_own(scope(path, client=None), settings(), trusted=False).status == 403
        assert refuses_own(scope(path, client="192.168.1.2"), settings(), trusted=True) is None
    assert refuses_own(scope("/lopsided/models", method="GET", client="192.168.1.2"), settings(), trusted=False) is None


@pytest.mark.parametrize("end", ["reset", "status", "fine"])
def test_no_prompt_token_or_path_is_in_the_log(caplog, end):
    # shows: a busy session at the level of `serve`, with an upstream that answers, fails and breaks off
    secrets = ("my-secret-prompt", TOKEN, "my-private-path", "my-secret-reply")
    caplog.set_level(logging.INFO)

    def script(received, conversation):
        if received.own:
            conversation.answer(500, b"not now")
        elif end == "reset":
            conversation.reset()
            conversation.close = True
        else:
            conversation.answer(500 if end == "status" else 200, b'{"error":"my-secret-reply out of memory"}')

    with upstream(script) as server, proxy_before(server.url, source=PAIR, token=TOKEN) as url:
        for path in ("/api/generate", "/api/chat", "/v1/chat/completions", "/my-private-path", "/api/blobs/my-private-path"):
            body = {"model": "m", "prompt": secrets[0], "messages": [{"role": "user", "content": secrets[0]}]}
            for headers in ({}, BEARER, {"authorization": f"Basic {TOKEN}"}):
                httpx.post(url + path + "?q=my-private-path", json=body, headers=headers)
        httpx.post(url + "/api/chat", content=b'{"model": my-secret-prompt')
        httpx.post(url + "/lopsided/launch", content=b"A=s3cret-token\n\n--model\n/my-private-path/x\n-c\n0\n")
        httpx.get(url + "/lopsided/plan?model=my-secret-prompt")
    # the loggers that `serve` prints; httpx's own line in this log is that of the test's client
    said = "\n".join(record.getMessage() for record in caplog.records if record.name.startswith(("lopsided", "uvicorn")))
    assert said
    assert [secret for secret in secrets if secret in said] == []
