"""Requests that load a model: placed, and sent to Ollama once more where that may get them an answer after all."""

from __future__ import annotations

from dataclasses import dataclass

import httpx

from proxy.jsonedit import JsonError
from proxy.learning.calibration import Calibrator, Watch
from proxy.ollama.endpoints import V1_PATHS, LoadRequest, parse_load_request
from proxy.ollama.failures import TEXT_LIMIT_BYTES, is_out_of_memory
from proxy.ollama.options import stock
from proxy.placing.outgoing import Outgoing, as_it_is, outgoing
from proxy.placing.placement import Decision, Placements
from proxy.v1.derived import Derived
from proxy.v1.renaming import Alias, Renamed
from proxy.wire.asgi import Send
from proxy.wire.forward import ClientRequest, Forwarder
from proxy.wire.replies import Reply

BODY_LIMIT_BYTES = 256 * 2**20
"""Largest body that is read to learn which model it loads; a larger one passes as it is."""

PLAN_HEADER = b"x-lopsided-plan"

LOSSES = 2
"""Derived models that may be gone when they are asked for: the request then goes as it is."""


@dataclass(kw_only=True, slots=True)
class _Load:
    """One request on its way.

    ``answered`` with the model placed as ``decision`` says; ``losses`` counts derived models that were gone.
    """

    wanted: LoadRequest
    decision: Decision
    watch: Watch
    answered: bool = False
    losses: int = 0


class Loads:
    """Answers requests that load a model."""

    def __init__(self, *, forwarder: Forwarder, placements: Placements, derived: Derived, calibrator: Calibrator) -> None:
        self._forwarder = forwarder
        self._placements = placements
        self._derived = derived
        self._calibrator = calibrator

    async def answer(self, request: ClientRequest, send: Send) -> None:
        """Sends the model's answer, placed if it may be, with ``X-Lopsided-Plan``."""
        body = await request.body(BODY_LIMIT_BYTES)
        if body is None:
            await self._forwarder.pass_through(request, send)
            return
        try:
            wanted = parse_load_request(request.path, body)
        except JsonError:
            await self._forwarder.relay(request, await self._forwarder.open(request, body), send)
            return
        if request.path in V1_PATHS and (reason := self._derived.refusal(wanted.model)):
            await self._unplaced(request, wanted, reason, send)
            return
        decision = await self._placements.decide(wanted)
        load = _Load(wanted=wanted, decision=decision, watch=self._calibrator.begin(decision, wanted))
        try:
            while not await self._try(load, request, send):
                pass
        finally:
            self._calibrator.end(load.watch)
            self._placements.done(load.decision, loaded=load.answered, left=request.left)

    async def _unplaced(self, request: ClientRequest, wanted: LoadRequest, reason: str, send: Send) -> None:
        """A request of ``/v1`` for a model that has no derived ones, as it is."""
        self._placements.seen_on_v1(wanted.model)
        header = (PLAN_HEADER, stock(reason).text.encode("ascii"))
        watch = self._calibrator.begin()
        try:
            response = await self._forwarder.open(request, wanted.body)
            await self._forwarder.relay(request, response, send, extra_headers=(header,))
        finally:
            self._calibrator.end(watch)

    async def _try(self, load: _Load, request: ClientRequest, send: Send) -> bool:
        """Asks Ollama and sends its answer, or ``False``: the request is to be sent once more, to ``load`` as it is by now."""
        if load.losses < LOSSES:
            out = await outgoing(request.path, load.wanted, load.decision, derived=self._derived, placements=self._placements)
        else:
            out = as_it_is(load.wanted, "Ollama loses the derived model")
        if out.alias:
            request.headers = [field for field in request.headers if field[0] != b"accept-encoding"]
        response = await self._forwarder.open(request, out.body)
        seen, again = b"", False
        if isinstance(response, httpx.Response):
            status = response.status_code
            load.answered = status < 400 and out.as_planned
            unwanted = True  # for good where the client leaves meanwhile
            try:
                if status == 500 and out.as_planned and load.decision.delivery.places:
                    seen = await self._forwarder.peek(response, TEXT_LIMIT_BYTES)
                    again = await self._placed_anew_for_memory(load, seen)
                elif status == 404 and out.alias:
                    seen = await self._forwarder.peek(response, TEXT_LIMIT_BYTES)
                    again = self._lost_derived_model(load, out.alias, seen)
                unwanted = again
            finally:
                if unwanted:
                    await response.aclose()
            if again:
                return False
        await self._relay(load, out, request, response, seen, send)
        return True

    async def _placed_anew_for_memory(self, load: _Load, seen: bytes) -> bool:
        """Whether the placement ran out of memory, and ``load`` has another now."""
        if not is_out_of_memory(500, seen.decode(errors="replace")):
            return False
        instead = await self._placements.after_failure(load.decision)
        if instead is None:
            return False
        load.decision = instead  # first of all: it is the one that is done, should the client leave now
        self._calibrator.end(load.watch)
        load.watch = self._calibrator.begin(instead, load.wanted)
        return True

    def _lost_derived_model(self, load: _Load, alias: Alias, seen: bytes) -> bool:
        """Whether the derived model was deleted behind our back: it is made anew, ``LOSSES`` times at the most."""
        if alias.derived.encode() not in seen:
            return False
        self._derived.lost(alias.derived)
        load.losses += 1
        return True

    async def _relay(
        self, load: _Load, out: Outgoing, request: ClientRequest, response: httpx.Response | Reply, seen: bytes, send: Send
    ) -> None:
        """Sends the answer on, a derived model's under the name that the client knows."""
        headers = ((PLAN_HEADER, out.text.encode("ascii")),)
        if out.alias is None:
            tail = load.watch.tail if out.as_planned else None
            await self._forwarder.relay(request, response, send, seen=seen, extra_headers=headers, tail=tail)
            return
        renamed = Renamed(send, out.alias)
        await self._forwarder.relay(request, response, renamed, seen=seen, extra_headers=headers)
        await renamed.finish()
