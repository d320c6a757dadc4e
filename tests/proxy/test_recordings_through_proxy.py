"""All recorded exchanges of two real Ollamas pass through the proxy over real sockets and come out as they went in."""

from __future__ import annotations

import json

import pytest

from planner.placement import solo
from proxy.ollama.endpoints import LOAD_PATHS
from tests.proxy import recordings
from tests.proxy.planners import PAIR, planner_for
from tests.proxy.upstreams import proxy_before, upstream

FRAMING = {"transfer-encoding", "connection", "content-length"}
PLANNED = "x-lopsided-plan"


class Replay:
    """Answers with the recorded bytes, chunk by chunk; keeps what it was sent."""

    def __init__(self, version):
        self.version = version
        self.exchange = None
        self.sent = []
        # the proxy's own questions are answered from the recordings too
        self.questions = {
            ("GET", "/api/version"): "version",
            ("GET", "/api/tags"): "tags",
            ("GET", "/api/ps"): "ps-empty",
            ("POST", "/api/show"): "show-verbose",
        }

    def __call__(self, received, conversation):
        if received.own and received.target in ("/api/create", "/api/delete"):
            conversation.close = True  # no derived models: /v1 passes unchanged
        elif received.own:
            name = self.questions[received.method, received.target]
            self.send(recordings.exchange(self.version, name), conversation, received.method)
        else:
            self.sent.append(received)
            self.send(self.exchange, conversation, received.method)

    def send(self, exchange, conversation, method):
        lines = "".join(f"{name}: {value}\r\n" for name, value in exchange.answer.headers)
        conversation.send(f"HTTP/1.1 {exchange.answer.status} Recorded\r\n{lines}\r\n".encode())
        chunked = exchange.answer.header("transfer-encoding") == "chunked"
        if not chunked and method != "HEAD":
            conversation.send(on_the_wire(exchange))
            return
        for chunk in exchange.chunks:
            conversation.chunk(chunk.encode())
        if chunked:
            conversation.send(b"0\r\n\r\n")


@pytest.fixture(params=recordings.VERSIONS, scope="module")
def replayed(request):
    """A recorded server, the proxy in front of it that knows no GPU, and one that plans everything onto the second GPU."""
    replay = Replay(request.param)
    with upstream(replay) as server, proxy_before(server.url) as plain:
        planner = planner_for(lambda profile: solo(1, n_gpus=2, n_layers=profile.n_layers))
        with proxy_before(server.url, source=PAIR, planner=planner) as planning:
            yield replay, plain, planning


def test_every_exchange_passes_unchanged(replayed):
    # shows: without a plan, not one byte of request or answer differs; status and headers are the recorded ones
    replay, plain, _ = replayed
    for exchange in recordings.load(replay.version):
        replay.exchange = exchange
        check(replay, exchange, recordings.send(plain, exchange))
        assert replay.sent[-1].body == (exchange.request_body or b""), exchange


def test_every_exchange_passes_unchanged_but_for_the_placement(replayed):
    # shows: with plans, the same, placement options in the requests and the plan's header in the answers aside
    replay, _, planning = replayed
    placed = 0
    for exchange in recordings.load(replay.version):
        replay.exchange = exchange
        answer = recordings.send(planning, exchange)
        check(replay, exchange, answer)
        sent = replay.sent[-1].body
        if sent == (exchange.request_body or b""):
            continue
        placed += 1
        assert exchange.path in LOAD_PATHS
        options = json.loads(sent)["options"]
        lever = {"main_gpu": 1} if replay.version == "0.32.15" else {"num_gpu": 31}
        assert lever.items() <= options.items()
        assert without(sent, lever) == json.loads(exchange.request_body), exchange
        assert answer.header(PLANNED).startswith("solo CUDA1")
    assert placed == (10 if replay.version == "0.32.15" else 0)  # the older era cannot be told the GPU


def check(replay, exchange, answer):
    sent = replay.sent[-1]
    assert (sent.method, sent.target) == (exchange.method, exchange.path)
    wanted = {name.lower(): value for name, value in exchange.request_headers}
    got = dict(sent.headers)
    assert wanted.items() <= got.items(), exchange
    assert got.keys() - wanted.keys() <= {"host", "content-length", "via"}
    assert answer.status == exchange.answer.status, exchange
    assert answer.body == on_the_wire(exchange), exchange
    assert plain_headers(answer) == plain_headers(exchange.answer), exchange
    if answer.header("content-length"):
        assert answer.header("content-length") == exchange.answer.header("content-length"), exchange


def on_the_wire(exchange):
    """The recorded body in its recorded length: of a few long ones, the recorder cut something out."""
    length = exchange.answer.header("content-length")
    if length is None or exchange.method == "HEAD":
        return exchange.answer.body
    return exchange.answer.body[: int(length)].ljust(int(length))


def plain_headers(answer):
    return {name: value for name, value in answer.headers if name not in FRAMING | {PLANNED}}


def without(body, lever):
    value = json.loads(body)
    for name in lever:
        del value["options"][name]
    if not value["options"]:
        del value["options"]
    return value
