"""How uvicorn runs the proxy: the same for the command line and for the tests."""

from __future__ import annotations

from typing import Any

from proxy.upgrade import PlainProtocol

KEEP_ALIVE_S = 3600
"""Idle client connections stay open, as with Ollama itself: a server that closes them makes clients' requests fail by chance."""


def uvicorn_options(drain_s: int = 30) -> dict[str, Any]:
    """Keywords for ``uvicorn.Config`` beside the application, host and port.

    After SIGTERM, answers that are under way get ``drain_s`` seconds to end.

    No ``server`` and ``date`` headers, since Ollama sends its own date; no access log, since it costs per request and
    paths are the user's; no WebSockets, since Ollama has none.
    """
    return {
        "http": PlainProtocol,
        "loop": "auto",
        "ws": "none",
        "lifespan": "on",
        "interface": "asgi3",
        "server_header": False,
        "date_header": False,
        "access_log": False,
        "proxy_headers": False,
        "timeout_keep_alive": KEEP_ALIVE_S,
        "timeout_graceful_shutdown": drain_s,
        "backlog": 2048,
    }
