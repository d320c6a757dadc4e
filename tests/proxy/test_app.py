"""lopsided's own endpoints: what they say and to whom, and the guard against a circle."""

from __future__ import annotations

import httpx
import pytest

from proxy.gpus.static import StaticSource
from proxy.simulator import Simulator, create_app, demo_models
from proxy.wire.access import has_token, is_local_host, is_local_origin
from tests.proxy.upstreams import proxy_before
from tests.servers import serve

TOKEN = "s3cret"


@pytest.fixture(scope="module")
def url():
    rig = StaticSource.from_arguments(["RTX 5090:31500MiB", "RTX 3090:23700MiB"]).rig()
    simulator = Simulator(rig, demo_models())
    with serve(create_app(simulator)) as ollama, proxy_before(ollama, source=simulator, token=TOKEN) as base_url:
        yield base_url


def get(url, **headers):
    return httpx.get(url, headers={name.replace("_", "-"): value for name, value in headers.items()}, timeout=10)


def test_health_names_the_proxy_and_its_upstream(url):
    health = get(url + "/lopsided/health").json()
    assert health["name"] == "lopsided"
    assert health["upstream"].startswith("http://127.0.0.1:")


def test_devices_are_in_ollamas_order(url):
    gpus = get(url + "/lopsided/devices").json()["gpus"]
    assert [(gpu["index"], gpu["name"]) for gpu in gpus] == [(0, "GeForce RTX 5090"), (1, "GeForce RTX 3090")]
    assert sum(gpu["power_share"] for gpu in gpus) == pytest.approx(1)


def test_a_plan_has_the_shape_that_the_command_line_prints_too(url):
    plan = get(url + "/lopsided/plan?model=qwen2.5:32b&num_ctx=32768").json()
    parts = {"model", "gpus", "request", "plan", "stock", "alternatives", "binding", "frontier", "reasons", "delivery"}
    assert plan.keys() == parts
    assert plan["request"]["num_ctx"] == 32768
    assert plan["plan"]["kind"] == "solo"
    assert plan["plan"]["layers"] == [65, 0]
    assert plan["binding"] is None
    assert all(other["layers"] != [65, 0] for other in plan["alternatives"])
    assert [point["kind"] for point in plan["frontier"]] == ["solo", "split", "partial"]
    assert 32768 < plan["frontier"][0]["num_ctx"] < plan["frontier"][1]["num_ctx"]
    assert plan["delivery"]["options"]["main_gpu"] == 0
    assert plan["delivery"]["launcher"][:2] == ["--device", "CUDA0"]
    assert {"weights_bytes", "kv_bytes", "compute_bytes", "total_bytes", "limit_bytes"} <= plan["plan"]["devices"][0].keys()
    assert plan["reasons"]


def test_models_show_what_is_in_force(url):
    body = {"model": "qwen2.5:32b", "prompt": "x", "stream": False, "options": {"num_ctx": 32768, "num_predict": 1}}
    httpx.post(url + "/api/generate", json=body, timeout=10).raise_for_status()
    (row,) = get(url + "/lopsided/models").json()["models"]
    assert row["placement"] == "solo CUDA0; auto"
    assert row["loaded"]
    assert row["actual_vram_bytes"] == pytest.approx(row["predicted_bytes"][0], rel=0.05)


@pytest.mark.parametrize(
    ("path", "status"),
    [("plan?model=nope", 404), ("plan", 422), ("plan?model=phi4:14b&num_ctx=0", 422), ("nope", 404)],
)
def test_what_cannot_be_answered_is_an_error_in_ollamas_shape(url, path, status):
    answer = get(f"{url}/lopsided/{path}")
    assert answer.status_code == status
    assert answer.json()["error"].startswith("lopsided: ")


def test_a_foreign_host_or_origin_gets_nothing_without_the_token(url):
    path = url + "/lopsided/devices"
    assert get(path, host="evil.example.com").status_code == 403
    assert get(path, origin="https://evil.example.com").status_code == 403
    assert get(path, host="evil.example.com", authorization="Bearer wrong").status_code == 403
    assert get(path, host="evil.example.com", authorization=f"Bearer {TOKEN}").status_code == 200
    assert get(path, origin="http://localhost:3000").status_code == 200


def test_ollamas_own_check_of_hosts_reaches_the_client(url):
    # shows: the proxy opens no way around it (recordings 52 and 53)
    assert get(url + "/api/tags", host="evil.example.com").status_code == 403
    assert get(url + "/api/tags", origin="https://evil.example.com").status_code == 403
    assert get(url + "/api/tags", host="localhost").status_code == 200


@pytest.mark.parametrize(
    ("host", "local"),
    [
        ("", True),
        ("localhost", True),
        ("LOCALHOST:11435", True),
        ("127.0.0.1:1", True),
        ("[::1]:1", True),
        ("192.168.1.4:11435", True),
        ("0.0.0.0", True),
        ("box.local", True),
        ("host.docker.internal:80", True),
        ("8.8.8.8", False),
        ("example.com", False),
        ("localhost.example.com", False),
        ("notlocalhost", False),
        ("[::1", False),
    ],
)
def test_local_hosts_are_those_of_ollama(host, local):
    assert is_local_host(host) is local


@pytest.mark.parametrize(
    ("origin", "local"),
    [
        ("http://localhost", True),
        ("https://127.0.0.1:3000", True),
        ("app://obsidian", True),
        ("chrome-extension://abc", False),
        ("http://localhost.evil.com", False),
        ("http://evil.com/http://localhost", False),
        ("null", False),
    ],
)
def test_local_origins_are_those_of_ollama(origin, local):
    assert is_local_origin(origin) is local


def test_further_origins_can_be_allowed():
    assert is_local_origin("chrome-extension://abc", ("chrome-extension://*",))
    assert is_local_origin("https://evil.com", ("*",))


@pytest.mark.parametrize(
    ("header", "token", "good"),
    [
        (b"Bearer a", "a", True),
        (b"bearer a", "a", True),
        (b"Bearer b", "a", False),
        (b"a", "a", False),
        (None, "a", False),
        (b"Bearer ", None, False),
    ],
)
def test_tokens(header, token, good):
    assert has_token(header, token) is good
