"""The simulator on real sockets: what the recordings do not hold."""

import hashlib
import json
import socket
import threading
import time
from functools import partial
from urllib.parse import urlsplit

import httpx
import pytest

from planner.hardware import Gpu, Host, Rig
from planner.units import GIB
from proxy.simulator import Simulator, create_app, demo_models
from proxy.simulator.http import Request
from proxy.simulator.placement import Environment
from tests.servers import serve

RIG = Rig(
    gpus=(
        Gpu(
            uuid="GPU-fast",
            name="NVIDIA GeForce RTX 5090",
            total_bytes=32 * GIB,
            free_bytes=31 * GIB,
            compute_capability=(12, 0),
            sm_count=170,
            clock_mhz=2407,
            bandwidth_bytes_per_s=1_792_000_000_000,
        ),
    ),
    host=Host(total_bytes=64 * GIB, free_bytes=48 * GIB, bandwidth_bytes_per_s=80_000_000_000),
)
MODEL = "qwen3:0.6b"
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def simulator(era="llama-server", **settings):
    return Simulator(RIG, demo_models(), environment=Environment(era=era), **settings)


@pytest.fixture(scope="module", params=["runner", "llama-server"])
def ollama(request):
    server = simulator(request.param)
    with serve(create_app(server)) as url, httpx.Client(base_url=url, timeout=20) as client:
        yield server, client


def wait_until(condition, *, at_most_s=5.0):
    deadline = time.monotonic() + at_most_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()


def test_each_line_of_a_stream_is_a_chunk_of_its_own(ollama):
    """Ollama flushes after each token; clients that parse chunk by chunk rely on it."""
    _, client = ollama
    address = urlsplit(str(client.base_url))
    body = json.dumps({"model": MODEL, "prompt": "x", "options": {"num_predict": 5}}).encode()
    with socket.create_connection((address.hostname, address.port), timeout=10) as connection:
        connection.sendall(b"POST /api/generate HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n")
        connection.sendall(b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
        raw = b"".join(iter(lambda: connection.recv(65536), b""))
    chunks = raw.split(b"\r\n\r\n", 1)[1].split(b"\r\n")
    sizes, pieces = chunks[0:-3:2], chunks[1:-3:2]
    assert [int(size, 16) for size in sizes] == [len(piece) for piece in pieces]
    assert [json.loads(piece)["done"] for piece in pieces] == [False] * 5 + [True]
    assert all(piece.endswith(b"}\n") for piece in pieces)


def test_a_tool_whose_name_is_mentioned_is_called_and_its_result_is_answered_in_words(ollama):
    _, client = ollama
    question = {"role": "user", "content": "What is the weather in Rome?"}
    asked = {"model": MODEL, "messages": [question], "tools": [WEATHER], "stream": False}
    message = client.post("/api/chat", json=asked).json()["message"]
    assert message["tool_calls"][0]["function"] == {"index": 0, "name": "get_weather", "arguments": {"city": "simulated"}}
    result = {"role": "tool", "content": "sunny", "tool_name": "get_weather"}
    answer = client.post("/api/chat", json={**asked, "messages": [question, message, result]}).json()
    assert "tool_calls" not in answer["message"]
    assert answer["message"]["content"]


def test_openai_clients_get_tool_calls_with_arguments_as_text(ollama):
    _, client = ollama
    asked = {"model": MODEL, "messages": [{"role": "user", "content": "weather?"}], "tools": [WEATHER]}
    choice = client.post("/v1/chat/completions", json=asked).json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert json.loads(choice["message"]["tool_calls"][0]["function"]["arguments"]) == {"city": "simulated"}


def test_a_model_without_tools_refuses_them(ollama):
    _, client = ollama
    answer = client.post(
        "/api/chat", json={"model": "gemma3:27b", "messages": [{"role": "user", "content": "?"}], "tools": [WEATHER]}
    )
    assert (answer.status_code, answer.json()) == (400, {"error": "registry.ollama.ai/library/gemma3:27b does not support tools"})


def test_an_answer_with_a_schema_fits_the_schema(ollama):
    _, client = ollama
    schema = {
        "type": "object",
        "properties": {"c": {"enum": ["red", "blue"]}, "n": {"type": "integer"}, "tags": {"type": "array"}},
        "required": ["c", "n", "tags"],
    }
    answer = client.post("/api/generate", json={"model": MODEL, "prompt": "A colour", "stream": False, "format": schema}).json()
    assert json.loads(answer["response"]) == {"c": "red", "n": 0, "tags": []}


def test_an_embedding_model_embeds_in_both_eras_and_generates_in_none(ollama):
    _, client = ollama
    vectors = client.post("/api/embed", json={"model": "all-minilm:22m", "input": ["a", "b", "a"]}).json()["embeddings"]
    assert [len(vector) for vector in vectors] == [384] * 3
    assert vectors[0] == vectors[2] != vectors[1]
    assert sum(x * x for x in vectors[0]) == pytest.approx(1, abs=1e-5)
    refused = client.post("/api/generate", json={"model": "all-minilm:22m", "prompt": "x"})
    assert (refused.status_code, refused.json()) == (400, {"error": '"all-minilm:22m" does not support generate'})


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"[]", "json: cannot unmarshal array into Go value of type api.GenerateRequest"),
        (b"nope", "invalid character 'n' looking for beginning of value"),
        (b'{"model": 5}', "json: cannot unmarshal number into Go struct field GenerateRequest.model of type string"),
        (
            b'{"model": "x", "options": []}',
            "json: cannot unmarshal array into Go struct field GenerateRequest.options of type map[string]interface {}",
        ),
        (b'{"model": "qwen3:0.6b", "keep_alive": "soon"}', 'time: invalid duration "soon"'),
        (b"[" * 100_000, "exceeded max depth"),
        (b'{"options": {"num_ctx": NaN}}', "invalid character 'N' looking for beginning of value"),
        (
            b'{"options": {"num_ctx": 1e999}}',
            "json: cannot unmarshal number 1e999 into Go struct field GenerateRequest.options of type float64",
        ),
    ],
)
def test_bodies_of_the_wrong_shape_are_refused_in_gos_words(ollama, body, message):
    _, client = ollama
    answer = client.post("/api/generate", content=body)
    assert (answer.status_code, answer.json()) == (400, {"error": message})


def test_a_batch_that_no_load_can_have_is_an_error_and_no_traceback(ollama):
    _, client = ollama
    answer = client.post("/api/generate", json={"model": "qwen3:0.6b", "prompt": "x", "options": {"num_batch": -1}})
    assert answer.status_code == 500
    assert "must be at least 1" in answer.json()["error"]


@pytest.mark.parametrize("host", ["localhost:11434", "127.0.0.1", "[::1]:11434", "192.168.1.5", "box.local", "x.internal"])
def test_local_hosts_are_answered(ollama, host):
    _, client = ollama
    assert client.get("/api/version", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("host", ["evil.example.com", "8.8.8.8", "localhost.evil.com"])
def test_other_hosts_are_refused(ollama, host):
    """Against DNS rebinding: a server bound to loopback answers to local names alone."""
    _, client = ollama
    assert client.get("/api/version", headers={"Host": host}).status_code == 403


def test_an_upload_is_checked_as_it_streams_and_found_afterwards(ollama):
    """16 MiB in pieces; only the digest is kept."""
    _, client = ollama
    piece, count = b"x" * 65536, 256
    digest = "sha256:" + hashlib.sha256(piece * count).hexdigest()
    assert client.head(f"/api/blobs/{digest}").status_code == 404
    assert client.post(f"/api/blobs/{digest}", content=(piece for _ in range(count))).status_code == 201
    assert client.head(f"/api/blobs/{digest}").status_code == 200


def test_a_pull_of_a_model_that_is_there_tells_its_progress(ollama):
    _, client = ollama
    lines = [json.loads(line) for line in client.post("/api/pull", json={"model": MODEL}).text.splitlines()]
    assert [line["status"] for line in lines[-3:]] == ["verifying sha256 digest", "writing manifest", "success"]
    assert lines[1]["completed"] == lines[1]["total"]


def test_what_was_asked_can_be_looked_up(ollama):
    """Tests of the proxy read there what reached Ollama."""
    server, client = ollama
    client.post("/api/generate", json={"model": MODEL, "options": {"main_gpu": 0}}, headers={"X-Mine": "1"})
    seen = server.requests[-1]
    assert (seen.method, seen.path, seen.headers["x-mine"]) == ("POST", "/api/generate", "1")
    assert json.loads(seen.body)["options"] == {"main_gpu": 0}


def test_large_bodies_are_forgotten_before_they_fill_the_memory():
    server = simulator()
    for number in range(5):
        server.note(Request(method="POST", path=f"/{number}", headers={}, body=bytes(20 * 2**20)))
    assert [request.path for request in server.requests] == ["/2", "/3", "/4"]


def test_what_the_scheduler_did_can_be_read_over_http(ollama):
    _, client = ollama
    assert {"kind", "model", "layers"} == set(client.get("/simulator/history").json()["events"][0])


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_stops_its_answer(stream):
    """In real time the answer takes a minute; the runner is free at once when the client has gone."""
    server = simulator(time_scale=20.0)
    with serve(create_app(server)) as url:
        address = urlsplit(url)
        body = json.dumps({"model": MODEL, "prompt": "x", "stream": stream, "keep_alive": -1}).encode()
        with socket.create_connection((address.hostname, address.port)) as connection:
            connection.sendall(b"POST /api/generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            wait_until(lambda: server.scheduler.count("launch") == 1)
        wait_until(lambda: server.cancelled == 1)
        assert all(runner.users == 0 for runner in server.scheduler.runners)


def test_answers_take_the_time_that_their_durations_say():
    """At a tenth of real time."""
    server = simulator(time_scale=0.1)
    with serve(create_app(server)) as url:
        start = time.monotonic()
        answer = httpx.post(f"{url}/api/generate", json={"model": MODEL, "prompt": "x", "stream": False}, timeout=30).json()
        took_s = time.monotonic() - start
    assert answer["total_duration"] / 1e10 <= took_s < answer["total_duration"] / 1e10 + 5.0
    assert answer["load_duration"] + answer["prompt_eval_duration"] + answer["eval_duration"] == answer["total_duration"]


def test_one_answer_at_a_time_where_there_is_one_slot():
    """``OLLAMA_NUM_PARALLEL`` is 1 by default: a second request waits for the first. A 32B takes over a second."""
    server = simulator(time_scale=0.1)
    with serve(create_app(server)) as url:
        ask = {"model": "qwen2.5:32b", "prompt": "x", "stream": False, "options": {"num_ctx": 4096}}
        alone = httpx.post(f"{url}/api/generate", json=ask, timeout=30).json()
        answer_s = 0.1 * (alone["prompt_eval_duration"] + alone["eval_duration"]) / 1e9
        post = partial(httpx.post, f"{url}/api/generate", json=ask, timeout=30)
        threads = [threading.Thread(target=post) for _ in range(3)]
        start = time.monotonic()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert time.monotonic() - start >= 3 * answer_s
    assert server.scheduler.count("launch") == 1
