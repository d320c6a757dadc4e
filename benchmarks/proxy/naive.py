"""The obvious proxy: FastAPI, httpx and a ``StreamingResponse``; ``UPSTREAM`` names where it leads.

Two things are already better than at first try: no timeout (a load takes minutes), and no limit of 100 connections, at which the
101st stream would wait for another to end.
"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from starlette.background import BackgroundTask

client = httpx.AsyncClient(base_url=os.environ["UPSTREAM"], timeout=None, limits=httpx.Limits(max_connections=None))


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    yield
    await client.aclose()


app = FastAPI(lifespan=lifespan)


@app.api_route("/{path:path}", methods=["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS"])
async def forward(request: Request) -> StreamingResponse:
    has_body = request.method in ("POST", "PUT", "DELETE")
    asked = client.build_request(
        request.method,
        request.url.path,
        params=request.query_params,
        headers=[(name, value) for name, value in request.headers.raw if name != b"host"],
        content=request.stream() if has_body else None,
    )
    answer = await client.send(asked, stream=True)
    return StreamingResponse(
        answer.aiter_raw(), answer.status_code, dict(answer.headers), background=BackgroundTask(answer.aclose)
    )
