"""Ollama's own endpoints about what is there: the store, what is loaded, pulls and uploads (``server/routes.go``)."""

from __future__ import annotations

import hashlib
import re
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from proxy.simulator import gojson
from proxy.simulator.exchange import Exchange
from proxy.simulator.http import NDJSON, PLAIN_JSON, Response, error, json_response
from proxy.simulator.store import full_name, is_valid_name, show

RESOLVER = "10.255.255.53:53"
"""The name server of the recorded machine, which had no network."""
_DIGEST = re.compile(r"sha256[:-][0-9a-fA-F]{64}")


async def root(exchange: Exchange) -> Response:  # noqa: ARG001
    """``GET /``: what people open in a browser."""
    return Response(content_type="text/plain; charset=utf-8", body=b"Ollama is running")


async def version(exchange: Exchange) -> Response:
    """``GET /api/version``."""
    return json_response({"version": exchange.simulator.version})


async def tags(exchange: Exchange) -> Response:
    """``GET /api/tags``: the models of the store. Later versions say more."""
    models = []
    for model in exchange.simulator.store:
        entry = {
            "name": model.name,
            "model": model.name,
            "modified_at": gojson.timestamp(model.modified_ns),
            "size": model.size_bytes,
            "digest": model.digest,
            "details": model.details(),
        }
        if exchange.simulator.era == "llama-server":
            if model.lists_geometry:
                geometry = {"context_length": model.profile.context_train, "embedding_length": model.profile.embedding_length}
                entry["details"] = model.details() | geometry
            entry["capabilities"] = model.capabilities
        models.append(entry)
    return json_response({"models": models})


async def ps(exchange: Exchange) -> Response:
    """``GET /api/ps``: what is loaded, under the name that it was loaded by."""
    models = [
        {
            "name": runner.model.name,
            "model": runner.model.name,
            "size": runner.load.size_bytes,
            "digest": runner.model.digest,
            "details": runner.model.details(),
            "expires_at": gojson.timestamp(runner.expires_ns or exchange.simulator.now_ns()),
            "size_vram": runner.load.vram_bytes,
            "context_length": runner.load.settings.num_ctx,
        }
        for runner in exchange.simulator.scheduler.runners
    ]
    return json_response({"models": models})


async def show_model(exchange: Exchange) -> Response:
    """``POST /api/show``."""
    body = exchange.json_body()
    name = body.get("model") or body.get("name") or ""
    if not name:
        return error(400, "model is required")
    model = exchange.simulator.store.find(name)
    if model is None:
        return error(404, f"model '{full_name(name) if exchange.simulator.era == 'llama-server' else name}' not found")
    return json_response(show(model, verbose=bool(body.get("verbose")), era=exchange.simulator.era))


async def create(exchange: Exchange) -> Response:
    """``POST /api/create`` with ``from``: other parameters on the same weights. Files are not taken."""
    body = exchange.json_body()
    name = body.get("model") or body.get("name") or ""
    if not name or not is_valid_name(str(name)):
        return error(400, "invalid model name")
    if body.get("files"):
        return error(400, "the simulator makes no models from files")
    if not body.get("from"):
        return error(400, "neither 'from' or 'files' was specified")
    source = exchange.simulator.store.find(body["from"])
    if source is None:
        return _status(body, ["pulling manifest"], failure=offline(body["from"]))
    lines = exchange.simulator.store.derive(
        source,
        name,
        parameters=body.get("parameters") or {},
        template=body.get("template"),
        system=body.get("system"),
        now_ns=exchange.simulator.now_ns(),
    )
    return _status(body, list(lines))


async def copy(exchange: Exchange) -> Response:
    """``POST /api/copy``."""
    body = exchange.json_body()
    source = exchange.simulator.store.find(str(body.get("source") or ""))
    if not body.get("destination"):
        return error(400, 'destination "" is invalid')
    if source is None:
        return error(404, f'model "{body.get("source", "")}" not found')
    exchange.simulator.store.copy(source, body["destination"], now_ns=exchange.simulator.now_ns())
    return Response()


async def delete(exchange: Exchange) -> Response:
    """``DELETE /api/delete``. What is loaded stays loaded."""
    body = exchange.json_body()
    name = str(body.get("model") or body.get("name") or "")
    model = exchange.simulator.store.find(name)
    if model is None:
        return error(404, f"model '{name}' not found")
    exchange.simulator.store.remove(model)
    return Response()


async def pull(exchange: Exchange) -> Response:
    """``POST /api/pull``: progress for a model that is there, else the error of a machine without a network."""
    body = exchange.json_body()
    name = str(body.get("model") or body.get("name") or "")
    if not name:
        return error(400, "invalid model name")
    model = exchange.simulator.store.find(name)
    if model is None:
        return _status(body, ["pulling manifest"], failure=offline(name))
    short = model.blob.removeprefix("sha256:")[:12]
    whole = {"status": f"pulling {short}", "digest": model.blob, "total": model.size_bytes, "completed": model.size_bytes}
    return _status(body, ["pulling manifest", whole, "verifying sha256 digest", "writing manifest", "success"])


def offline(name: str) -> str:
    """The error of a pull on a machine that cannot resolve the registry (recorded)."""
    repository, tag = full_name(name).rsplit(":", 1)
    path = repository if "/" in repository else f"library/{repository}"
    url = f"https://registry.ollama.ai/v2/{path}/manifests/{tag}"
    return f'pull model manifest: Get "{url}": dial tcp: lookup registry.ollama.ai on {RESOLVER}: no such host'


async def history(exchange: Exchange) -> Response:
    """``GET /simulator/history``: what the scheduler did, and with how many layers on which card; no real Ollama tells."""
    events = [
        {"kind": event.kind, "model": event.model, "layers": event.load and event.load.placement.shares}
        for event in tuple(exchange.simulator.scheduler.history)
    ]
    return json_response({"events": events})


async def blob(exchange: Exchange) -> Response:
    """``HEAD`` and ``POST /api/blobs/DIGEST``. Of an upload only the digest is kept: it may be a whole model."""
    simulator = exchange.simulator
    digest = exchange.request.path.rsplit("/", 1)[-1]
    if not _DIGEST.fullmatch(digest):
        return error(400, "invalid digest format")
    digest = digest.replace("-", ":", 1).lower()
    is_there = digest in simulator.blobs or digest in simulator.store.layers
    if exchange.request.method == "HEAD":
        return Response(bodiless=True) if is_there else error(404, f'blob "{digest}" not found')
    if is_there:
        return Response()
    sha256 = hashlib.sha256()
    if exchange.chunks is not None:
        async for chunk in exchange.chunks:
            sha256.update(chunk)
    got = f"sha256:{sha256.hexdigest()}"
    if got != digest:
        return error(400, f'digest mismatch, expected "{digest}", got "{got}"')
    simulator.blobs.add(digest)
    return Response(status=201)


def _status(body: Mapping[str, Any], lines: list[str | dict[str, Any]], *, failure: str | None = None) -> Response:
    """The progress of a long job: a line each, or with ``stream: false`` its end alone."""
    if body.get("stream") is False:
        if failure:
            return json_response({"error": failure}, status=500, content_type=PLAIN_JSON)
        return json_response({"status": lines[-1]}, content_type=PLAIN_JSON)

    async def stream() -> AsyncGenerator[bytes, None]:
        for line in lines:
            yield gojson.encode({"status": line} if isinstance(line, str) else line) + b"\n"
        if failure:
            yield gojson.encode({"error": failure}) + b"\n"

    return Response(content_type=NDJSON, body=stream())
