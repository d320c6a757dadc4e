"""``lopsided serve`` with one transport or another: ``python -m benchmarks.proxy.lopsided own|httpcore|aiohttp``."""

from __future__ import annotations

import sys
from typing import Any
from unittest.mock import patch

import httpx

from proxy.cli import main
from proxy.wire.transport import UpstreamTransport


class Httpcore(httpx.AsyncHTTPTransport):
    """httpx's own, without limits."""

    restarts = 0

    def __init__(self, _: str) -> None:
        super().__init__(limits=httpx.Limits(max_connections=None), trust_env=False)


def aiohttp_transport() -> Any:
    """That of httpx-aiohttp, without limits. It takes the target from the URL alone, and a body at once as ``content`` alone."""
    from aiohttp import ClientSession, TCPConnector
    from httpx_aiohttp import AiohttpTransport

    class Aiohttp(AiohttpTransport):  # type: ignore[misc]  # only the benchmark's environment has it
        restarts = 0

        def __init__(self, _: str) -> None:
            super().__init__(client=lambda: ClientSession(connector=TCPConnector(limit=0)))

        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            if "target" in request.extensions:
                request.url = request.url.copy_with(raw_path=request.extensions["target"])
            if isinstance(request.stream, httpx.ByteStream):
                await request.aread()
            answer: httpx.Response = await super().handle_async_request(request)
            return answer

    return Aiohttp


if __name__ == "__main__":
    kind = sys.argv.pop(1)
    transport = {"own": lambda: UpstreamTransport, "httpcore": lambda: Httpcore, "aiohttp": aiohttp_transport}[kind]()
    with patch("proxy.wire.forward.UpstreamTransport", transport):
        main(args=["serve"], prog_name="lopsided")
