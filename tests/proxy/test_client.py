"""The official Python client does everything through the proxy, and gets what it gets without it."""

from __future__ import annotations

import re

import ollama
import pytest

from proxy.gpus.static import StaticSource
from proxy.simulator import Simulator, create_app, demo_models
from tests.proxy.upstreams import proxy_before
from tests.servers import serve

MODEL = "qwen3:0.6b"
QUICK = {"num_predict": 6}
MESSAGES = [{"role": "user", "content": "Why is the sky blue?"}]
CHANGING = re.compile(
    r"\d{4}-\d\d-\d\d[T ][\d:.,]+(?:Z|[+-][\d:]+)?|datetime\.datetime\([^)]*\)+|TzInfo\([^)]*\)|(?<==)\d{4,}|'id': '[^']*'"
)


def weather(city: str) -> str:
    """The weather.

    Args:
      city: where

    """
    return city


CALLS = {
    "generate": lambda c: c.generate(MODEL, "hi", options=QUICK),
    "generate streamed": lambda c: [part.response for part in c.generate(MODEL, "hi", options=QUICK, stream=True)],
    "generate, pinned by habit": lambda c: c.generate(MODEL, "hi", options=QUICK | {"main_gpu": 0}).response,
    "chat": lambda c: c.chat(MODEL, MESSAGES, options=QUICK),
    "chat streamed": lambda c: [part.message.content for part in c.chat(MODEL, MESSAGES, options=QUICK, stream=True)],
    "chat with tools": lambda c: c.chat(MODEL, MESSAGES, tools=[weather], options=QUICK).message,
    "chat in a format": lambda c: c.chat(MODEL, MESSAGES, format="json", options=QUICK).message,
    "embed": lambda c: c.embed("all-minilm:22m", ["a", "b"]).embeddings,
    "embeddings": lambda c: c.embeddings("all-minilm:22m", "a").embedding,
    "list": lambda c: sorted(model.model for model in c.list().models),
    "show": lambda c: c.show(MODEL),
    "ps": lambda c: [model.model for model in c.ps().models],
    "copy": lambda c: c.copy(MODEL, "copied"),
    "create": lambda c: c.create("made", from_=MODEL, parameters={"temperature": 0.5}),
    "create streamed": lambda c: [part.status for part in c.create("made", from_=MODEL, stream=True)],
    "generate by another name": lambda c: c.generate("made", "hi", options=QUICK).response,
    "delete": lambda c: [c.delete("copied"), c.delete("made")],
    "unknown model": lambda c: c.chat("nope", MESSAGES),
    "unknown model streamed": lambda c: list(c.chat("nope", MESSAGES, stream=True)),
    "delete what is not there": lambda c: c.delete("nope"),
    "wrong option": lambda c: c.generate(MODEL, "hi", options={"num_gpu": "many"}),
    "pull without a registry": lambda c: list(c.pull("nope", stream=True)),
    "unload": lambda c: c.generate(MODEL, keep_alive=0).done_reason,
}


@pytest.fixture(scope="module")
def clients():
    """A client of the simulated Ollama, and one of the proxy before it."""
    rig = StaticSource.from_arguments(["RTX 5090:31500MiB", "RTX 3090:23700MiB"]).rig()
    simulator = Simulator(rig, [model for model in demo_models() if model.name in (MODEL, "all-minilm:22m")])
    with (
        serve(create_app(simulator)) as direct,
        proxy_before(direct, source=simulator) as proxied,
        ollama.Client(direct) as one,
        ollama.Client(proxied) as other,
    ):
        yield one, other


def outcome(call, client):
    try:
        return CHANGING.sub("…", repr(call(client)))
    except ollama.ResponseError as error:
        return (error.status_code, error.error)


@pytest.mark.parametrize("name", CALLS)
def test_through_the_proxy_it_is_the_same(clients, name):
    direct, proxied = clients
    through = outcome(CALLS[name], proxied)
    if name == "delete":  # what was made can be deleted once
        CALLS["copy"](direct)
        CALLS["create"](direct)
    assert through == outcome(CALLS[name], direct)
