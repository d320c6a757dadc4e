"""The helper that runs an application on a real socket."""

import threading

import httpx

from tests.servers import free_port, serve


async def hello(scope, receive, send):
    if scope["type"] != "http":
        raise NotImplementedError
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"hi"})


def test_serves_on_a_real_socket_and_leaves_nothing_behind():
    before = threading.active_count()
    with serve(hello) as url:
        assert httpx.get(url).text == "hi"
    assert threading.active_count() == before


def test_a_free_port_refuses_connections():
    try:
        httpx.get(f"http://127.0.0.1:{free_port()}/", timeout=1)
    except httpx.ConnectError:
        return
    raise AssertionError("somebody answered")
