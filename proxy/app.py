"""The application: lopsided's own endpoints under ``/lopsided``, everything else goes to Ollama. Wiring only."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from proxy.asgi import Application, Receive, Scope, Send
from proxy.forward import ClientRequest, Forwarder
from proxy.settings import Settings


def create_app(settings: Settings) -> Application:
    """The whole proxy as one ASGI application."""
    forwarder = Forwarder(settings.upstream)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await forwarder.aclose()

    own = FastAPI(title="lopsided", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] == "/lopsided" or scope["path"].startswith("/lopsided/"):
            await own(scope, receive, send)
            return
        async with ClientRequest(scope, receive) as request:
            await forwarder.pass_through(request, send)

    return app
