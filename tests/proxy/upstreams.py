"""Upstreams for tests: a raw socket server that keeps the very bytes it got and sends the very bytes that a script says."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from proxy.app import create_app
from proxy.config.settings import load_settings
from proxy.wire.serve import uvicorn_options
from tests.servers import serve


@dataclass
class Received:
    """One request as it stood on the wire."""

    method: str
    target: str
    headers: list[tuple[str, str]]
    body: bytes

    def header(self, name: str) -> str | None:
        return next((value for key, value in self.headers if key.lower() == name), None)

    @property
    def own(self) -> bool:
        """The proxy asked by itself: requests that it forwards carry ``via``."""
        return self.header("via") is None


Script = Callable[[Received, "Conversation"], None]


@dataclass
class Conversation:
    """What a script does with the connection: ``send`` bytes, ``answer`` as a whole, wait until the proxy is ``gone``."""

    socket: socket.socket
    close: bool = False

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def answer(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        lines = {"Content-Length": str(len(body)), **(headers or {})}
        head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        self.send(f"HTTP/1.1 {status} X\r\n{head}\r\n".encode() + body)

    def answer_json(self, value: Any, status: int = 200) -> None:
        self.answer(status, json.dumps(value).encode(), {"Content-Type": "application/json; charset=utf-8"})

    def chunk(self, data: bytes) -> None:
        self.send(b"%x\r\n%b\r\n" % (len(data), data))

    def gone(self, timeout_s: float) -> float:
        """When the other side closed, on the monotonic clock. Raises ``TimeoutError``."""
        self.socket.settimeout(timeout_s)
        with suppress(ConnectionError):
            while self.socket.recv(65536):
                pass
        return time.monotonic()

    def reset(self) -> None:
        """Ends the connection with a RST."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        self.socket.close()


@dataclass
class RawUpstream:
    """A listening socket; each connection is a thread that reads requests and runs the script on each."""

    script: Script
    received: list[Received] = field(default_factory=list)
    connections: int = 0
    _open: list[socket.socket] = field(default_factory=list)
    _threads: list[threading.Thread] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def forwarded(self) -> list[Received]:
        """What came from clients."""
        return [request for request in self.received if not request.own]

    def stop(self) -> None:
        """Closes everything, idle connections too."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in self._open:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(5)

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self.connections += 1
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._open.append(connection)
                thread = threading.Thread(target=self._serve, args=(connection,), daemon=True)
                self._threads.append(thread)
                thread.start()

    def talk(self, connection: socket.socket) -> None:
        """One connection, from its beginning to its end."""
        with connection.makefile("rb") as reader:
            while request := read_request(reader):
                self.received.append(request)
                conversation = Conversation(connection)
                self.script(request, conversation)
                if conversation.close:
                    return

    def _serve(self, connection: socket.socket) -> None:
        with connection, suppress(OSError, ValueError):
            self.talk(connection)


def read_request(reader: Any) -> Received | None:
    """One request from a file of the socket, ``None`` at its end."""
    line = reader.readline()
    if not line:
        return None
    method, target, _ = line.decode("latin-1").split(" ", 2)
    headers = []
    while (line := reader.readline().decode("latin-1").rstrip("\r\n")) != "":
        name, _, value = line.partition(":")
        headers.append((name, value.strip()))
    request = Received(method=method, target=target, headers=headers, body=b"")
    if request.header("transfer-encoding") == "chunked":
        while size := int(reader.readline(), 16):
            request.body += reader.read(size)
            reader.readline()
        reader.readline()
    elif length := request.header("content-length"):
        request.body = reader.read(int(length))
        if len(request.body) < int(length):
            raise ValueError("the request ends inside its body")
    return request


@contextmanager
def upstream(script: Script) -> Iterator[RawUpstream]:
    """A raw upstream for the time of the block."""
    server = RawUpstream(script)
    try:
        yield server
    finally:
        server.stop()


@contextmanager
def proxy_before(url: str, *, source: Any = None, planner: Any = None, **settings: Any) -> Iterator[str]:
    """The proxy, served as the command line serves it, in front of ``url``."""
    more = {"planner": planner} if planner else {}
    app = create_app(
        load_settings(**{"host": "127.0.0.1:11435", "upstream": url, "state": "off", **settings}), source=source, **more
    )
    with serve(app, **{**uvicorn_options(), "timeout_graceful_shutdown": 1}) as base_url:
        yield base_url


def connect(base_url: str) -> socket.socket:
    """A raw connection to a server of the tests."""
    host, _, port = base_url.removeprefix("http://").rpartition(":")
    return socket.create_connection((host, int(port)), timeout=10)


def read_until_closed(connection: socket.socket) -> bytes:
    data = b""
    with suppress(ConnectionError):
        while part := connection.recv(65536):
            data += part
    return data
