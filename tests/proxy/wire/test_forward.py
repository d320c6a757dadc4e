"""Pass-through over real sockets: bytes both ways, leaving clients, dying upstreams, back-pressure."""

from __future__ import annotations

import logging
import resource
import socket
import threading
import time

import httpx
import pytest

from proxy.address import parse_address
from proxy.wire.forward import keeps_host, without_hop_by_hop
from tests.proxy.upstreams import RawUpstream, connect, proxy_before, read_until_closed, upstream
from tests.servers import free_port

SOON_S = 0.5  # the promise is 0.1, kept with 5 ms on an idle machine; a busy one is no reason to fail
"""How fast the upstream must notice that a client left."""


def request(base_url: str, text: bytes) -> bytes:
    """Sends the very bytes and returns the very answer."""
    with connect(base_url) as connection:
        connection.sendall(text)
        return read_until_closed(connection)


def echo(received, conversation):
    conversation.answer(200, received.body)


def test_target_headers_and_body_arrive_as_they_were_sent():
    # shows: percent-encodings, odd characters, repeated headers and bytes of any kind are not touched
    body = bytes(range(256))
    with upstream(echo) as server, proxy_before(server.url) as url:
        head = (
            b"POST /api/x%2fy//z/../{a}?q=%7B&b={c}&&=|%zz HTTP/1.1\r\nHost: localhost:1234\r\nX-One: 1\r\nX-One: 2\r\n"
            b"X-Latin: caf\xe9\r\nX-Empty:\r\nContent-Length: 256\r\nConnection: close, X-Private\r\nX-Private: mine\r\n"
            b"Te: trailers\r\n\r\n"
        )
        answer = request(url, head + body)
    (received,) = server.forwarded
    assert (received.method, received.target) == ("POST", "/api/x%2fy//z/../{a}?q=%7B&b={c}&&=|%zz")
    assert received.headers == [
        ("host", "localhost:1234"),
        ("x-one", "1"),
        ("x-one", "2"),
        ("x-latin", "caf\xe9"),
        ("x-empty", ""),
        ("content-length", "256"),
        ("via", "1.1 lopsided"),
    ]
    assert received.body == body
    assert answer.endswith(b"\r\n\r\n" + body)


def test_the_answers_headers_arrive_in_order_and_repeated():
    # shows: Set-Cookie twice, Date once, no Server of our own, a compressed body stays compressed
    def script(_, conversation):
        conversation.send(
            b"HTTP/1.1 203 Fine\r\nDate: then\r\nSet-Cookie: a\r\nContent-Encoding: gzip\r\nSet-Cookie: b\r\n"
            b"Keep-Alive: timeout=5\r\nContent-Length: 3\r\n\r\n\x1f\x8b\x00"
        )

    with upstream(script) as server, proxy_before(server.url) as url:
        answer = request(url, b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    assert answer == (
        b"HTTP/1.1 203 Non-Authoritative Information\r\ndate: then\r\nset-cookie: a\r\ncontent-encoding: gzip\r\n"
        b"set-cookie: b\r\ncontent-length: 3\r\nconnection: close\r\n\r\n\x1f\x8b\x00"
    )


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "DELETE", "PUT", "PATCH"])
def test_every_method_passes_and_no_body_is_made_up(method):
    with upstream(echo) as server, proxy_before(server.url) as url:
        assert httpx.request(method, url + "/any", headers={"accept-encoding": "x"}).status_code == 200
    (received,) = server.forwarded
    assert received.method == method
    if method in ("GET", "HEAD", "OPTIONS", "DELETE"):
        assert received.header("transfer-encoding") is None
        assert received.header("content-length") is None


def test_a_head_answer_keeps_its_length_and_the_connection_goes_on():
    # shows: the length of a HEAD answer announces no body
    def script(_, conversation):
        conversation.send(b"HTTP/1.1 200 OK\r\nContent-Length: 17\r\n\r\n")

    with upstream(script) as server, proxy_before(server.url) as url, httpx.Client() as client:
        for _ in range(3):
            assert client.head(url + "/").headers["content-length"] == "17"
    assert server.connections == 1


def test_a_chunked_body_stays_chunked_and_a_counted_one_counted():
    with upstream(echo) as server, proxy_before(server.url) as url:
        httpx.post(url + "/a", content=iter([b"ab", b"", b"c"]))
        httpx.post(url + "/b", content=b"abc")
        httpx.post(url + "/c", content=b"")
    first, second, third = server.forwarded
    assert (first.body, first.header("transfer-encoding"), first.header("content-length")) == (b"abc", "chunked", None)
    assert (second.body, second.header("transfer-encoding"), second.header("content-length")) == (b"abc", None, "3")
    assert (third.body, third.header("content-length")) == (b"", "0")


def test_expect_100_continue_is_answered_and_the_body_arrives():
    with upstream(echo) as server, proxy_before(server.url) as url, connect(url) as connection:
        connection.sendall(
            b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\nExpect: 100-continue\r\nConnection: close\r\n\r\n"
        )
        assert connection.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(b"hi")
        assert read_until_closed(connection).endswith(b"\r\n\r\nhi")
    assert server.forwarded[0].body == b"hi"


def test_an_upgrade_is_answered_as_the_plain_request_it_is():
    # shows: Ollama knows no other protocol; Upgrade is a header of one connection
    with upstream(echo) as server, proxy_before(server.url) as url:
        headers = {"Connection": "upgrade", "Upgrade": "websocket", "Sec-WebSocket-Key": "x", "Sec-WebSocket-Version": "13"}
        assert httpx.get(url + "/", headers=headers).status_code == 200
    assert server.forwarded[0].header("upgrade") is None


H2C = b"Host: a\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA\r\n"


@pytest.mark.parametrize("cut", [0, 20, 165])
@pytest.mark.parametrize(
    ("framing", "body"),
    [
        (b"Content-Length: 13\r\n\r\n", b'{"model":"m"}'),
        (b"Transfer-Encoding: chunked\r\n\r\n", b'6\r\n{"mode\r\n7\r\nl":"m"}\r\n0\r\n\r\n'),
        (b"Content-Length: 0\r\n\r\n", b""),
    ],
)
def test_a_body_that_comes_with_the_offer_of_http_2_arrives(cut, framing, body):
    # shows: what Java's own client sends, in one piece or in two; and the connection goes on, with a second offer too
    with upstream(echo) as server, proxy_before(server.url) as url, connect(url) as connection:
        data = b"POST /api/chat HTTP/1.1\r\n" + H2C + framing + body
        connection.sendall(data[:cut])
        time.sleep(0.02 if cut else 0)
        connection.sendall(data[cut:] + data + b"GET /y HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        read_until_closed(connection)
    wanted = b'{"model":"m"}' if body else b""
    assert [(got.target, got.body) for got in server.forwarded] == [("/api/chat", wanted)] * 2 + [("/y", b"")]


def test_an_interim_answer_is_passed_over():
    def script(_, conversation):
        conversation.send(b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi")

    with upstream(script) as server, proxy_before(server.url) as url:
        answer = httpx.get(url + "/")
    assert (answer.status_code, answer.text, answer.headers.get("link")) == (200, "hi", None)


def test_a_chunk_goes_out_when_it_comes_in():
    # shows: each chunk of a stream reaches the client before anything follows it
    seen, arrived, in_time = [], threading.Semaphore(0), []

    def script(_, conversation):
        conversation.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for number in range(5):
            conversation.chunk(b"%d" % number)
            in_time.append(arrived.acquire(timeout=10))
        conversation.send(b"0\r\n\r\n")

    with upstream(script) as server, proxy_before(server.url) as url, httpx.stream("POST", url + "/api/pull") as answer:
        for chunk in answer.iter_raw():
            seen.append(chunk)
            arrived.release()
    assert seen == [b"0", b"1", b"2", b"3", b"4"]
    assert in_time == [True] * 5


def test_headers_go_out_before_the_first_chunk():
    arrived, in_time = threading.Event(), []

    def script(_, conversation):
        conversation.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        in_time.append(arrived.wait(10))
        conversation.send(b"0\r\n\r\n")

    with upstream(script) as server, proxy_before(server.url) as url, httpx.stream("GET", url + "/") as answer:
        arrived.set()
        answer.read()
    assert in_time == [True]


@pytest.mark.parametrize("path", ["/api/tags", "/api/generate", "/v1/chat/completions"])
@pytest.mark.parametrize("moment", ["before the answer", "in the middle"])
def test_a_client_that_leaves_ends_the_upstream_request(path, moment, caplog):
    # shows: Ollama sees within 100 ms that it need not go on, also while it still loads the model; it is nothing to be said
    caplog.set_level(logging.INFO, "lopsided")
    ended = threading.Event()
    times = {}

    def script(received, conversation):
        if received.own:
            conversation.answer_json({"models": []})
            return
        if moment == "in the middle":
            conversation.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            conversation.chunk(b"x")
        times["upstream"] = conversation.gone(5)
        conversation.close = True
        ended.set()

    with upstream(script) as server, proxy_before(server.url) as url:
        body = b'{"model":"m"}'
        client = connect(url)
        client.sendall(b"POST %b HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%b" % (path.encode(), len(body), body))
        if moment == "in the middle":
            client.recv(10)
        time.sleep(0.3)
        times["client"] = time.monotonic()
        client.close()
        assert ended.wait(5)
    assert times["upstream"] - times["client"] < SOON_S
    assert "cut off" not in caplog.text


def test_a_client_that_leaves_in_the_middle_of_an_upload_ends_it():
    ended = threading.Event()

    def script(received, conversation):
        raise AssertionError("the request was never complete")

    class Counting(RawUpstream):
        def talk(self, connection):
            try:
                super().talk(connection)
            finally:
                ended.set()

    server = Counting(script)
    with proxy_before(server.url) as url:
        client = connect(url)
        client.sendall(b"POST /api/blobs/sha256:0 HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\nonly this")
        time.sleep(0.2)
        client.close()
        assert ended.wait(5)
    server.stop()


@pytest.mark.parametrize("framing", ["chunked", "counted"])
@pytest.mark.parametrize("end", ["fin", "reset", "garbage"])
def test_an_upstream_that_dies_in_the_middle_leaves_a_broken_stream(framing, end):
    # shows: no terminating chunk is made up, and a length that was announced stays unfulfilled
    def script(_, conversation):
        if framing == "chunked":
            conversation.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            conversation.chunk(b"half")
        else:
            conversation.send(b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\nhalf")
        time.sleep(0.1)
        if end == "garbage" and framing == "chunked":
            conversation.send(b"no chunk size\r\n")
        elif end == "reset":
            conversation.reset()
        conversation.close = True

    with upstream(script) as server, proxy_before(server.url) as url, httpx.stream("GET", url + "/") as answer:
        assert answer.status_code == 200
        chunks: list[bytes] = []
        with pytest.raises(httpx.RemoteProtocolError):
            chunks.extend(answer.iter_raw())
        assert b"".join(chunks) == b"half"


def test_a_body_without_length_ends_with_the_connection():
    # shows: an HTTP/1.0 way of answering, complete by its own rules
    def script(_, conversation):
        conversation.send(b"HTTP/1.1 200 OK\r\n\r\nall of it")
        conversation.close = True

    with upstream(script) as server, proxy_before(server.url) as url:
        assert httpx.get(url + "/").text == "all of it"


def test_an_upstream_that_is_down_gives_502_in_ollamas_shape():
    with proxy_before(f"http://127.0.0.1:{free_port()}") as url:
        for answer in (httpx.get(url + "/api/tags"), httpx.post(url + "/api/chat", json={"model": "m"})):
            assert answer.status_code == 502
            assert answer.json().keys() == {"error"}
            assert answer.json()["error"].startswith("lopsided: Ollama at http://127.0.0.1:")
            assert "ollama serve" in answer.json()["error"]
            assert "LOPSIDED_UPSTREAM" in answer.json()["error"]


@pytest.mark.parametrize("nonsense", [b"", b"HTTP/1.1 abc\r\n\r\n", b"\x00" * 100, b"HTTP/1.1 200 OK\r\nContent-Le"])
def test_an_upstream_that_breaks_off_before_it_answers_gives_502(nonsense):
    def script(_, conversation):
        conversation.send(nonsense)
        conversation.close = True

    with upstream(script) as server, proxy_before(server.url) as url:
        answer = httpx.post(url + "/api/show", json={"model": "m"})
    assert answer.status_code == 502
    assert answer.json()["error"].startswith("lopsided: ")


def test_headers_without_end_are_cut_off():
    # shows: a rogue upstream cannot fill the proxy's memory with headers
    def script(_, conversation):
        conversation.send(b"HTTP/1.1 200 OK\r\nX: ")
        for _ in range(200):
            conversation.send(b"x" * 65536)

    with upstream(script) as server, proxy_before(server.url) as url:
        assert httpx.get(url + "/", timeout=10).status_code == 502


def test_a_kept_connection_that_died_is_replaced_unseen():
    # shows: the race of a keep-alive connection that closes as a request goes out costs nothing where repeating is safe
    def script(received, conversation):
        if len(server.forwarded) == 2:  # the second request finds the connection closed
            conversation.close = True
            return
        conversation.answer(200, b"ok")

    with upstream(script) as server, proxy_before(server.url) as url, httpx.Client() as client:
        assert client.get(url + "/api/tags").text == "ok"
        assert client.get(url + "/api/tags").text == "ok"
    assert [received.method for received in server.forwarded] == ["GET", "GET", "GET"]
    assert server.connections == 2


def test_what_is_not_safe_to_repeat_is_not_repeated():
    def script(received, conversation):
        if len(server.forwarded) == 2:
            conversation.close = True
            return
        conversation.answer(200, b"ok")

    with upstream(script) as server, proxy_before(server.url) as url, httpx.Client() as client:
        assert client.get(url + "/").status_code == 200
        assert client.post(url + "/api/pull", json={"model": "m"}).status_code == 502
    assert len(server.forwarded) == 2


def test_a_restarted_upstream_is_found_again():
    # shows: connections that were closed meanwhile are not used, whatever the method
    first = RawUpstream(echo)
    with proxy_before(first.url) as url, httpx.Client() as client:
        assert client.post(url + "/api/pull", content=b"1").text == "1"
        first.stop()
        time.sleep(0.1)
        assert client.post(url + "/api/pull", content=b"2").status_code == 502


def test_a_slow_reader_slows_the_upstream_down():
    # shows: back-pressure instead of memory: the upstream cannot send 64 MiB into a client that reads nothing
    sent = 0

    def script(_, conversation):
        nonlocal sent
        conversation.send(b"HTTP/1.1 200 OK\r\nContent-Length: 67108864\r\n\r\n")
        for _ in range(1024):
            conversation.send(b"x" * 65536)
            sent += 65536

    with upstream(script) as server, proxy_before(server.url) as url, connect(url) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        time.sleep(0.7)
        stalled_at = sent
        assert stalled_at < 16 * 2**20
        taken = 0
        while taken < 67108864:
            taken += len(client.recv(2**20))
    assert sent == 67108864


def test_a_large_upload_takes_constant_memory_and_waits_for_the_upstream():
    # shows: 256 MiB go through with < 32 MiB more memory, and no faster than the upstream reads
    size = 256 * 2**20
    taken = 0
    seen_while_stalled = []

    class Slow(RawUpstream):
        def talk(self, connection):
            nonlocal taken
            head = b""
            while b"\r\n\r\n" not in head:
                head += connection.recv(1)
            time.sleep(0.5)
            seen_while_stalled.append(sent)
            while taken < size:
                taken += len(connection.recv(2**20))
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    sent = 0
    server = Slow(echo)
    with proxy_before(server.url) as url, connect(url) as client:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        client.sendall(b"POST /api/blobs/sha256:0 HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % size)
        part = b"x" * 2**20
        while sent < size:
            client.sendall(part)
            sent += len(part)
        client.settimeout(20)
        assert client.recv(100).startswith(b"HTTP/1.1 200")
        grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    server.stop()
    assert taken == size
    assert seen_while_stalled[0] < 32 * 2**20
    assert grown_kib < 32 * 1024


def test_an_answer_before_the_upload_is_complete_is_passed_on():
    # shows: Ollama may refuse an upload at once
    def script(_, __):
        raise AssertionError

    class Refusing(RawUpstream):
        def talk(self, connection):
            head = b""
            while b"\r\n\r\n" not in head:
                head += connection.recv(1)
            connection.sendall(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 2\r\n\r\nno")
            time.sleep(0.5)

    server = Refusing(script)
    with proxy_before(server.url) as url, connect(url) as client:
        client.sendall(b"POST /api/blobs/sha256:0 HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\nbeginning")
        answer = client.recv(1000)
        while b"no" not in answer:
            answer += client.recv(1000)
        assert answer.startswith(b"HTTP/1.1 403")
    server.stop()


def test_a_proxy_in_front_of_itself_says_so():
    with upstream(echo) as server, proxy_before(server.url) as inner, proxy_before(inner) as outer:
        answer = httpx.get(outer + "/api/tags")
    assert answer.status_code == 508
    assert "leads back" in answer.json()["error"]


@pytest.mark.parametrize(
    "smuggled",
    [
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        b"GET / HTTP/1.1\r\nHost: a\r\nX : y\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nX: a\rb\r\n\r\n",
    ],
)
def test_smuggled_requests_are_refused(smuggled):
    with upstream(echo) as server, proxy_before(server.url) as url:
        answer = request(url, smuggled)
    assert answer.startswith(b"HTTP/1.1 400") or answer == b""
    assert all(received.body == b"" for received in server.forwarded)


def test_the_path_of_the_upstream_stands_before_the_clients():
    # shows: OLLAMA_HOST=http://host/ollama
    with upstream(echo) as server, proxy_before(server.url + "/ollama") as url:
        httpx.get(url + "/api/tags?x=1")
    assert server.forwarded[0].target == "/ollama/api/tags?x=1"


@pytest.mark.parametrize(
    ("address", "kept"),
    [
        ("127.0.0.1", True),
        ("[::1]", True),
        ("ollama:11434", True),
        ("http://10.0.0.7", True),
        ("https://127.0.0.1", False),
        ("ollama.example.com", False),
    ],
)
def test_the_clients_host_goes_on_where_ollama_itself_checks_it(address, kept):
    assert keeps_host(parse_address(address)) is kept


def test_hop_by_hop_headers_and_those_named_by_connection_are_dropped():
    headers = [(b"Connection", b"X-A, close"), (b"x-a", b"1"), (b"X-B", b"2"), (b"TE", b"x"), (b"x-b", b"3")]
    assert without_hop_by_hop(headers) == [(b"X-B", b"2"), (b"x-b", b"3")]


def test_connection_cannot_take_away_what_frames_the_message():
    assert without_hop_by_hop([(b"connection", b"content-length, host"), (b"content-length", b"1"), (b"host", b"h")]) == [
        (b"content-length", b"1"),
        (b"host", b"h"),
    ]
