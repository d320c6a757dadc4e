"""How the proxy's process runs: where it listens and logs, glibc's settings, and uvicorn's, the same for the tests."""

from __future__ import annotations

import ctypes
import errno
import gc
import logging
import socket
import sys
from typing import Any

from planner.units import MIB
from proxy.address import Address
from proxy.errors import LopsidedError
from proxy.wire.upgrade import PlainProtocol

KEEP_ALIVE_S = 3600
"""Idle client connections stay open, as with Ollama itself: a server that closes them makes clients' requests fail by chance."""

KEPT_BYTES = 64 * MIB
"""Freed memory that the process keeps: what a request with 10 MiB of images takes, twice."""

MAPPED_BYTES = 32 * MIB
"""Size from which a block is the system's own, and given back at once; glibc takes no more (``HEAP_MAX_SIZE / 2``)."""


SWITCH_S = 0.0005
"""Seconds for which a plan that is made in another thread holds up the streams; Python's own is 0.005."""


def settle_process() -> None:
    """Sets up garbage collection, threads and memory of a process in which all is imported, so that streams are not held up.

    glibc gives large blocks back to the system and fetches them again page by page, which takes longer than anything else that
    is done with 10 MiB of images (measured in a virtual machine: 30 ms a request, and 18 ms where it keeps them). Other C
    libraries are left alone.
    """
    gc.collect()
    gc.freeze()  # what is there now stays for ever: looking through it takes 20 ms each time
    sys.setswitchinterval(SWITCH_S)
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        mallopt(-3, MAPPED_BYTES)  # M_MMAP_THRESHOLD
        mallopt(-1, KEPT_BYTES)  # M_TRIM_THRESHOLD


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


def listen(address: Address) -> socket.socket:
    """The listening socket, to be bound before anything else starts. Raises ``LopsidedError`` with what to do."""
    try:
        family, _, _, _, where = socket.getaddrinfo(
            address.host or None, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        both = family == socket.AF_INET6 and where[0] == "::" and socket.has_dualstack_ipv6()
        return socket.create_server(where, family=family, backlog=2048, dualstack_ipv6=both)
    except OSError as error:
        problem = f"cannot listen on {address.authority}: {error.strerror or error}"
        if error.errno == errno.EADDRINUSE:
            problem = f"another program listens on {address.authority} (lopsided already?)"
        raise LopsidedError(f"{problem}; choose another address: lopsided serve --host 127.0.0.1:PORT") from error


class OneLine(logging.Formatter):
    """A record is a line, whatever is in the names that clients send."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        """The line, control characters replaced."""
        return "".join(character if character.isprintable() else "?" for character in super().formatMessage(record))


def log_to_stderr() -> None:
    """What lopsided decides, a line each; other libraries keep their own settings."""
    handler = logging.StreamHandler()
    handler.setFormatter(OneLine("%(asctime)s %(levelname)s %(message)s"))
    log = logging.getLogger("lopsided")
    log.setLevel(logging.INFO)
    log.addHandler(handler)
