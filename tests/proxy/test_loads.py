"""Requests that load a model, before an Ollama that does not get on with its answer."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import httpx
import pytest

from proxy import loads
from proxy.address import parse_address
from proxy.loads import Loads
from proxy.wire.forward import Forwarder


class Stalled(httpx.AsyncByteStream):
    """A body that never comes."""

    def __init__(self) -> None:
        self.asked, self.closed = asyncio.Event(), False

    async def __aiter__(self):
        self.asked.set()
        await asyncio.sleep(60)
        yield b""

    async def aclose(self) -> None:
        self.closed = True


async def test_a_failure_whose_client_leaves_while_it_is_read_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else its connection would be in use for ever."""
    stalled, done = Stalled(), []

    async def gives(value):
        return value

    out = SimpleNamespace(body=b"", alias=None, as_planned=True, text="solo CUDA0; auto")
    decision = SimpleNamespace(delivery=SimpleNamespace(places=True))
    forwarder = Forwarder(parse_address("127.0.0.1:1"))
    monkeypatch.setattr(forwarder, "open", lambda *_: gives(httpx.Response(500, stream=stalled)))
    monkeypatch.setattr(loads, "outgoing", lambda *_, **__: gives(out))
    answers = Loads(
        forwarder=forwarder,
        placements=SimpleNamespace(decide=lambda _: gives(decision), done=lambda _, **how: done.append(how)),
        derived=None,
        calibrator=SimpleNamespace(begin=lambda *_: None, end=lambda _: None),
    )
    request = SimpleNamespace(path="/api/generate", body=lambda _: gives(b'{"model":"m"}'), headers=[], left=True)
    answering = asyncio.create_task(answers.answer(request, None))
    await asyncio.wait_for(stalled.asked.wait(), 5)
    answering.cancel()
    with pytest.raises(asyncio.CancelledError):
        await answering
    assert (stalled.closed, done) == (True, [{"loaded": False, "left": True}])
