"""The application: lopsided's own endpoints under ``/lopsided``, everything else goes to Ollama. Wiring only."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from planner.frontier import frontier
from planner.plan import Planner, make_plan
from planner.runnersup import with_runners_up
from proxy.config.rulefile import RuleFile
from proxy.config.settings import Settings, setting_names, settings_file
from proxy.dashboard import page
from proxy.errors import GpuError, LopsidedError, UpstreamError
from proxy.gpus import GpuSource
from proxy.gpus.order import DeviceOrder
from proxy.gpus.reader import RigReader
from proxy.launcher.launch import BODY_LIMIT_BYTES as LAUNCH_LIMIT_BYTES
from proxy.launcher.launches import Launches
from proxy.launcher.launching import Launching
from proxy.learning.calibration import Calibrator, LearnedPlanner
from proxy.learning.measurements import FILE_NAME as MEASUREMENTS_FILE
from proxy.learning.measurements import Measurements
from proxy.loads import Loads
from proxy.models.catalog import Catalog
from proxy.ollama.client import Ollama
from proxy.ollama.endpoints import kind_of
from proxy.overview import Overview
from proxy.placing.placement import Placements
from proxy.planjson import devices_json, plan_json
from proxy.plans.loading import MAX_TOKENS
from proxy.plans.ruled import RuledPlans
from proxy.statefile import StateFile
from proxy.v1.derived import Derived
from proxy.v1.renaming import LIST_BYTES, Held, shown_list
from proxy.wire.access import LAUNCH_PATH, bears_token, is_foreign, lacks_token, refuses_host, refuses_own, without_token
from proxy.wire.asgi import Application, Receive, Scope, Send
from proxy.wire.forward import VIA, ClientRequest, Forwarder
from proxy.wire.replies import error_reply, send_reply

OWN_PATH = "/lopsided"
"""Everything under it is lopsided's, everything else Ollama's."""

CHALLENGE = ((b"www-authenticate", b"Bearer"),)
"""What comes with a 401 (RFC 9110, 11.6.1)."""

log = logging.getLogger("lopsided")


class Proxy:
    """The proxy as one ASGI application. Made by :func:`create_app`."""

    def __init__(
        self,
        settings: Settings,
        *,
        forwarder: Forwarder,
        placements: Placements,
        derived: Derived,
        loads: Loads,
        own: Application,
    ) -> None:
        self._settings = settings
        self._forwarder = forwarder
        self._placements = placements
        self._derived = derived
        self._loads = loads
        self._own = own

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        if scope["type"] != "http":
            await self._own(scope, receive, send)
            return
        try:
            await self._http(scope, receive, send)
        except asyncio.CancelledError:
            log.info("an answer is cut off: the time to drain is over")  # uvicorn closes the connection, and ends

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        path: str = scope["path"]
        is_own = path == OWN_PATH or path.startswith(OWN_PATH + "/")
        settings = self._settings
        trusted = bears_token(scope["headers"], settings)
        refuses = refuses_own if is_own else refuses_host
        refusal = lacks_token(scope, settings, trusted=trusted) or refuses(scope, settings, trusted=trusted)
        if refusal is not None:
            await send_reply(refusal, send, extra_headers=CHALLENGE if refusal.status == 401 else ())
            return
        if is_own:
            await self._own(scope, receive, send)
            return
        foreign = is_foreign(scope, settings, trusted=trusted)
        if trusted:
            scope["headers"] = without_token(scope["headers"])
        async with ClientRequest(scope, receive) as request:
            if any(name == b"via" and VIA in value for name, value in request.headers):
                request.finish()
                await send_reply(
                    error_reply(508, f"{self._settings.upstream.url} leads back to lopsided; set LOPSIDED_UPSTREAM"), send
                )
                return
            if foreign:  # Ollama refuses it, or knows better: nothing is planned for it, learned from it or made
                await self._forwarder.pass_through(request, send)
                return
            kind = kind_of(request.method, path)
            if kind in ("load", "v1") and request.header(b"content-encoding") is None:
                await self._loads.answer(request, send)
                return
            if kind == "list" and self._derived.hides:
                await self._list(request, send)
                return
            await self._forwarder.pass_through(request, send)
            if kind == "store":
                self._placements.store_changed()
                self._derived.store_changed()

    async def _list(self, request: ClientRequest, send: Send) -> None:
        """A list of models, in which derived ones are not to be seen, nor in its length where only that is asked for."""
        if request.method == "HEAD":
            request.method = "GET"  # the server sends no body all the same

        def edit(body: bytes) -> bytes:
            return shown_list(request.path, body, is_hidden=self._derived.is_hidden, digest=self._derived.digest_of_base)

        held = Held(send, edit, limit_bytes=LIST_BYTES)
        await self._forwarder.pass_through(request, held)
        await held.let_go()


def create_app(
    settings: Settings, *, source: GpuSource | None, order: DeviceOrder | None = None, planner: Planner = make_plan
) -> Proxy:
    """The whole proxy. ``source`` is ``None`` where there are no GPUs to be planned for: then everything passes unchanged.

    ``order`` is what is known of the order in which Ollama counts the GPUs of ``source``.
    """
    forwarder = Forwarder(settings.upstream)
    ollama, gpus = Ollama(forwarder.client), RigReader(source)
    catalog, launches = Catalog(forwarder.client), Launches(time.monotonic)
    measurements = Measurements(StateFile(settings.state if settings.calibration else None, MEASUREMENTS_FILE))
    learned = LearnedPlanner(planner=planner, measurements=measurements, objective=settings.objective)
    rules = RuleFile(settings_file(), settings=setting_names())
    plans = RuledPlans(catalog=catalog, rules=rules, settings=settings, planner=learned, live=gpus.live)
    placements = Placements(
        ollama=ollama,
        catalog=catalog,
        gpus=gpus,
        settings=settings,
        plans=plans,
        restarts=lambda: forwarder.transport.restarts,
        launches=launches,
    )
    launching = Launching(
        rig=gpus.rig,
        injected=placements.injected,
        catalog=catalog,
        ollama=ollama,
        settings=settings,
        launches=launches,
        plans=plans,
        order=order,
        in_force=lambda: [in_force.blob for in_force in placements.in_force()],
    )
    calibrator = Calibrator(measurements, learned, placements, gpus, off=not settings.calibration)
    derived = Derived(ollama=ollama, catalog=catalog, enabled=settings.v1)
    overview = Overview(
        ollama=ollama,
        catalog=catalog,
        gpus=gpus,
        placements=placements,
        launches=launches,
        calibrator=calibrator,
        settings=settings,
    )

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        placements.take_over()
        if source is not None:
            derived.start()
        try:
            yield
        finally:
            await derived.aclose()
            await launching.aclose()
            await calibrator.aclose()
            await forwarder.aclose()

    own = FastAPI(title="lopsided", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)

    @own.exception_handler(LopsidedError)
    async def explain(_: Request, error: LopsidedError) -> JSONResponse:
        status = 502 if isinstance(error, UpstreamError) else 503 if isinstance(error, GpuError) else 404
        return JSONResponse({"error": f"lopsided: {error}"}, status_code=status)

    @own.exception_handler(RequestValidationError)
    async def refuse(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        return JSONResponse({"error": f"lopsided: {first['loc'][-1]}: {first['msg']}"}, status_code=422)

    @own.exception_handler(HTTPException)
    async def name(_: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse({"error": f"lopsided: {error.detail}"}, status_code=error.status_code)

    @own.get("/lopsided/health")
    async def health() -> dict[str, str]:
        return {"name": "lopsided", "version": version("lopsided"), "upstream": settings.upstream.url}

    @own.get("/lopsided/devices")
    async def devices() -> JSONResponse:
        rig = await gpus.rig()
        return JSONResponse(devices_json(rig, await asyncio.to_thread(measurements.class_rates, rig)))

    @own.get("/lopsided/plan")
    async def plan(model: str, num_ctx: int | None = Query(None, ge=1, le=MAX_TOKENS)) -> JSONResponse:
        made, delivery = await placements.preview(model, num_ctx)
        told = await asyncio.to_thread(with_runners_up, made)
        points = await asyncio.to_thread(frontier, made.profile, made.rig, made.request)
        return JSONResponse(plan_json(told, delivery, points))

    @own.post(LAUNCH_PATH)
    async def launch(request: Request) -> Response:
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > LAUNCH_LIMIT_BYTES:
                log.warning("a launch is left to Ollama: it has more than %d bytes", LAUNCH_LIMIT_BYTES)
                return Response(status_code=204)
        status, text = await launching.answer(bytes(body))
        return Response(text, status_code=status, media_type="text/plain")

    @own.get("/lopsided/models")
    async def models() -> JSONResponse:
        return JSONResponse(await overview.models())

    @own.get("/lopsided/launcher")
    async def launcher() -> JSONResponse:
        return JSONResponse(await overview.launcher())

    content, headers = page()

    @own.get(OWN_PATH + "/")
    async def dashboard() -> Response:
        return Response(content, headers=headers)

    loads = Loads(forwarder=forwarder, placements=placements, derived=derived, calibrator=calibrator)
    return Proxy(settings, forwarder=forwarder, placements=placements, derived=derived, loads=loads, own=own)
