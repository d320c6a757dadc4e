"""Real servers for tests: an ASGI application behind a real uvicorn, on a free port of the loopback address."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

START_S = 10.0
"""Longest wait for a server to come up or go down."""


@contextmanager
def serve(app: Any, *, port: int = 0, server_header: bool = False, date_header: bool = True, **config: Any) -> Iterator[str]:
    """Serves ``app`` in a thread of its own and yields its base URL (``http://127.0.0.1:PORT``, a free one unless named).

    The listening socket is bound before the thread starts, so no request is ever refused. On the way out open requests
    get one second, then are cut; the thread has ended when the block is left. Further keywords go to ``uvicorn.Config``.
    """
    config.setdefault("lifespan", "auto")
    config.setdefault("timeout_graceful_shutdown", 1)
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", port))
    listener.listen(128)
    server = uvicorn.Server(
        uvicorn.Config(app, log_level="error", server_header=server_header, date_header=date_header, **config)
    )
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="test-server", daemon=True)
    thread.start()
    try:
        deadline = time.monotonic() + START_S
        while not server.started:
            if not thread.is_alive() or time.monotonic() > deadline:
                raise RuntimeError("the test server did not start")
            time.sleep(0.005)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(START_S)
        if thread.is_alive():  # a handler that ignores its cancellation
            server.force_exit = True
            thread.join(START_S)
        listener.close()


def free_port() -> int:
    """A port that nobody listens on at the moment: for upstreams that are down."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
