"""What is no body is bounded, and nothing gets among the headers after they were checked."""

from __future__ import annotations

import time

import pytest

from proxy.wire.heads import HEAD_LIMIT_BYTES
from tests.proxy.upstreams import connect, proxy_before, read_until_closed, upstream


def answer(received, conversation):
    conversation.answer(200, b"fine")


def flood(url, start, part):
    """Sends ``start``, then ``part`` again and again until the proxy has had enough; what it answered."""
    with connect(url) as connection:
        connection.sendall(start)
        try:
            for _ in range(64 * HEAD_LIMIT_BYTES // len(part)):
                connection.sendall(part)
        except ConnectionError:
            pass
        else:
            raise AssertionError("it took everything")
        return read_until_closed(connection)


@pytest.mark.parametrize(
    ("start", "part"),
    [
        (b"GET /", b"x" * 65536),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX: ", b"x" * 65536),
        (b"GET / HTTP/1.1\r\nHost: a\r\n", b"X: y\r\n" * 10000),
        (b"POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1;", b"x" * 65536),
        (b"POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX: ", b"x" * 65536),
    ],
    ids=["target", "one header", "many headers", "chunk extension", "trailer"],
)
def test_a_head_without_end_is_refused(start, part):
    # shows: 431 as from Ollama or a closed connection, never memory for as long as somebody sends
    with upstream(answer) as server, proxy_before(server.url) as url:
        said = flood(url, start, part)
        assert said == b"" or said.startswith((b"HTTP/1.1 431", b"HTTP/1.1 400"))
    assert all(request.target == "/x" for request in server.forwarded)


def test_large_headers_and_small_chunks_of_a_long_body_are_no_flood():
    head = b"POST /x HTTP/1.1\r\nHost: a\r\nConnection: close\r\nTransfer-Encoding: chunked\r\nX: " + b"x" * 500_000 + b"\r\n\r\n"
    with upstream(answer) as server, proxy_before(server.url) as url, connect(url) as connection:
        connection.sendall(head)
        for _ in range(40):
            connection.sendall(b"1\r\na\r\n" * 10_000)
        connection.sendall(b"0\r\n\r\n")
        assert read_until_closed(connection).startswith(b"HTTP/1.1 200")
    assert server.forwarded[0].body == b"a" * 400_000


@pytest.mark.parametrize("path", [b"/x", b"/api/generate"])
def test_trailers_do_not_become_headers(path):
    # shows: neither while a body passes through nor where it is read before it goes on
    body = b'd\r\n{"model":"m"}\r\n0\r\nX-Late: yes\r\nHost: evil\r\nAuthorization: Bearer x\r\n\r\n'
    with upstream(answer) as server, proxy_before(server.url) as url, connect(url) as connection:
        connection.sendall(
            b"POST " + path + b" HTTP/1.1\r\nHost: a\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n" + body
        )
        read_until_closed(connection)
    (received,) = server.forwarded
    assert received.header("x-late") is None
    assert [value for name, value in received.headers if name == "host"] == ["a"]
    assert received.body == b'{"model":"m"}'


@pytest.mark.parametrize(
    "head",
    [
        b"GET / HTTP/1.1",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b",
        b"GET / HTTP/1.0\r\nHost: a\r\nHost: a",
        b"GET /",
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0",
    ],
    ids=["no host", "two hosts", "two hosts in HTTP/1.0", "HTTP/0.9", "a coding that would be lost"],
)
def test_a_head_that_go_refuses_is_refused(head):
    with upstream(answer) as server, proxy_before(server.url) as url, connect(url) as connection:
        connection.sendall(head + b"\r\n\r\n")
        assert read_until_closed(connection).startswith(b"HTTP/1.1 400")
    assert server.forwarded == []


def test_of_a_target_that_is_a_whole_url_the_host_counts():
    # shows: Ollama, which goes by it too, refuses the foreign one; a Host beside it can't hide that
    with upstream(answer) as server, proxy_before(server.url) as url, connect(url) as connection:
        connection.sendall(b"GET http://me@evil.example:80/x?y HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        read_until_closed(connection)
    assert [(received.target, received.header("host")) for received in server.forwarded] == [("/x?y", "evil.example:80")]


def chunks(received, conversation):
    conversation.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    conversation.chunk(b"one,")
    conversation.chunk(b"two")
    if received.target == "/whole":
        conversation.send(b"0\r\n\r\n")
    else:
        time.sleep(0.2)
        conversation.close = True


def test_a_client_of_http_1_0_gets_no_chunks():
    # shows: a stream ends with the connection (nginx asks so by default, and ab); a stated length stays
    with upstream(chunks) as server, proxy_before(server.url) as url, connect(url) as connection:
        connection.sendall(b"GET /whole HTTP/1.0\r\n\r\n")
        head, _, body = read_until_closed(connection).partition(b"\r\n\r\n")
    assert body == b"one,two"
    assert b"transfer-encoding" not in head.lower()
    with upstream(answer) as server, proxy_before(server.url) as url, connect(url) as connection:
        connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
        head, _, body = read_until_closed(connection).partition(b"\r\n\r\n")
    assert b"content-length: 4" in head.lower()
    assert body == b"fine"


def test_a_stream_to_http_1_0_that_breaks_off_ends_with_a_reset():
    # shows: where only the end of the connection says that it was all, an end in the middle looks different
    with upstream(chunks) as server, proxy_before(server.url) as url, connect(url) as connection:
        connection.sendall(b"GET /half HTTP/1.0\r\n\r\n")
        time.sleep(0.1)
        assert connection.recv(65536).endswith(b"\r\n\r\none,two")
        with pytest.raises(ConnectionResetError):
            connection.recv(1)
