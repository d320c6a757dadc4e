"""What is no body is bounded, and nothing gets among the headers after they were checked."""

from __future__ import annotations

import pytest

from proxy.heads import HEAD_LIMIT_BYTES
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
