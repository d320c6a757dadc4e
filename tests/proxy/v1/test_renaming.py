"""Names in answers: the recorded answers of Ollama, as they would be for a derived model, come out as recorded."""

from __future__ import annotations

import json

import pytest

from proxy.ollama.names import derived_name
from proxy.v1.renaming import HELD_BYTES, Alias, Held, Renamed, shown_list
from tests.proxy import recordings

NAME = "smollm2:135m"
DERIVED = derived_name("registry.ollama.ai/library/smollm2:135m", "sha256-5", {"main_gpu": 0})
OTHER = derived_name("hf.co/me/Model:Q4_K_M", "sha256-6", {"num_gpu": 20})
ALIAS = Alias(derived=DERIVED, name=NAME)
V1 = [
    exchange
    for version in recordings.VERSIONS
    for exchange in recordings.load(version)
    if exchange.path.startswith("/v1/") and exchange.method == "POST"
]


class Sent:
    """What an ASGI server is told."""

    def __init__(self):
        self.messages = []

    async def __call__(self, message):
        self.messages.append(message)

    @property
    def body(self):
        return b"".join(message.get("body", b"") for message in self.messages)

    @property
    def headers(self):
        return dict(self.messages[0]["headers"])


def start(status=200, **headers):
    lines = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return {"type": "http.response.start", "status": status, "headers": lines}


async def through(wrapped, first, *chunks):
    await wrapped(first)
    for chunk in chunks:
        await wrapped({"type": "http.response.body", "body": chunk, "more_body": True})
    await wrapped({"type": "http.response.body", "body": b""})


@pytest.mark.parametrize("exchange", V1, ids=str)
async def test_recorded_answers_come_out_as_recorded_cut_at_every_byte(exchange):
    # shows: top level, message, response, streams, errors with and without quotes; lengths are stated anew
    recorded = exchange.answer.body
    asked = recorded.replace(b'"smollm2:135m"', b'"%b"' % DERIVED.encode()).replace(
        b"registry.ollama.ai/library/smollm2:135m", DERIVED.encode()
    )
    length = {"content_length": str(len(asked))} if exchange.answer.header("content-length") else {}
    step = max(1, len(asked) // 400)
    for cut in range(0, len(asked), step):
        sent = Sent()
        await through(Renamed(sent, ALIAS), start(exchange.answer.status, **length), asked[:cut], asked[cut:])
        assert sent.body == recorded
        if length:
            assert sent.headers[b"content-length"] == str(len(recorded)).encode()
    sent = Sent()
    await through(Renamed(sent, ALIAS), start(), *(asked[i : i + 1] for i in range(len(asked))))
    if exchange.answer.status == 200:
        assert sent.body == recorded


async def test_a_streams_events_go_on_at_once():
    sent = Sent()
    renamed = Renamed(sent, ALIAS)
    await renamed(start(content_type="text/event-stream"))
    for text in ("a", "b"):
        event = f'data: {{"model":"{DERIVED}","text":"{text}"}}\n\n'.encode()
        await renamed({"type": "http.response.body", "body": event, "more_body": True})
        assert sent.messages[-1]["body"] == event.replace(DERIVED.encode(), NAME.encode())


async def test_texts_in_which_the_name_stands_are_not_touched():
    said = json.dumps({"model": DERIVED, "text": f'{DERIVED} "model":"{DERIVED}"'}, separators=(",", ":")).encode()
    sent = Sent()
    await through(Renamed(sent, ALIAS), start(), said)
    assert json.loads(sent.body) == {"model": NAME, "text": f'{DERIVED} "model":"{DERIVED}"'}


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        (f"model '{DERIVED}' not found", f"model '{NAME}' not found"),
        (f'"{DERIVED}" does not support thinking', f'"{NAME}" does not support thinking'),
        (f"{DERIVED} does not support tools", "registry.ollama.ai/library/smollm2:135m does not support tools"),
    ],
)
async def test_errors_say_what_they_say_of_the_base(message, shown):
    # shows: the three forms of Ollama 0.32, seen with a real one
    sent = Sent()
    await through(Renamed(sent, ALIAS), start(400), json.dumps({"error": {"message": message}}).encode())
    assert json.loads(sent.body) == {"error": {"message": shown}}


@pytest.mark.parametrize("wrap", [lambda send: Renamed(send, ALIAS), lambda send: Held(send, bytes.upper, limit_bytes=10**6)])
async def test_an_answer_that_breaks_off_is_sent_as_far_as_it_came_and_never_ended(wrap):
    sent = Sent()
    wrapped = wrap(sent)
    await wrapped(start(content_length="500"))
    await wrapped({"type": "http.response.body", "body": b'{"a":', "more_body": True})
    await (wrapped.finish() if isinstance(wrapped, Renamed) else wrapped.let_go())
    assert sent.body == b'{"a":'
    assert sent.headers[b"content-length"] == b"500"
    assert all(message.get("more_body", True) for message in sent.messages)


async def test_encoded_answers_pass_as_they_are():
    for wrap in (lambda send: Renamed(send, ALIAS), lambda send: Held(send, bytes.upper, limit_bytes=10**6)):
        sent = Sent()
        await through(wrap(sent), start(content_encoding="gzip", content_length="9"), DERIVED.encode())
        assert sent.body == DERIVED.encode()


async def test_large_answers_are_not_held():
    # shows: of stated length they are renamed on their way and go without it; lists above the limit pass as they are
    body = b'{"model":"%b","text":"%b"}' % (DERIVED.encode(), b"x" * HELD_BYTES)
    sent = Sent()
    await through(Renamed(sent, ALIAS), start(content_length=str(len(body))), body[:1000], body[1000:])
    assert sent.body == body.replace(DERIVED.encode(), NAME.encode())
    assert b"content-length" not in sent.headers
    sent = Sent()
    await through(Held(sent, bytes.upper, limit_bytes=10), start(), b"a" * 8, b"b" * 8, b"c")
    assert sent.body == b"a" * 8 + b"b" * 8 + b"c"


LISTS = {
    "/api/tags": lambda name: f'{{"name":"{name}","model":"{name}","size": 1.0}}',
    "/v1/models": lambda name: f'{{"id":"{name}","object":"model"}}',
}


@pytest.mark.parametrize("path", LISTS)
@pytest.mark.parametrize(
    "names", [[DERIVED], [DERIVED, "a"], ["a", DERIVED], ["a", DERIVED, "b", OTHER], ["a", "x.lopsided.invalid"]]
)
def test_lists_lose_derived_models_and_nothing_else(path, names):
    def body(shown):
        return ('{"object":"list", "models" : [' + ",".join(LISTS[path](name) for name in shown) + '],"x":[1]}\n').encode()

    hidden = (DERIVED, OTHER)
    kept = [name for name in names if name not in hidden]
    assert shown_list(path, body(names), is_hidden=hidden.__contains__, digest=lambda _: None) == body(kept)


def test_what_is_loaded_by_a_derived_name_is_listed_as_its_base():
    entry = '{"models":[{"name":"%s","model":"%s","size":330427268,"digest":"%s","expires_at":"2026"}]}'
    body = (entry % (DERIVED, DERIVED, "edc2")).encode()
    shown = shown_list("/api/ps", body, is_hidden=lambda _: True, digest={DERIVED: "e56e"}.get)
    assert shown == (entry % (NAME, NAME, "e56e")).encode()
    unknown = shown_list("/api/ps", body, is_hidden=lambda _: True, digest=lambda _: None)
    assert unknown == (entry % (NAME, NAME, "edc2")).encode()


@pytest.mark.parametrize("body", [b"[", b'{"models":[{"name":"%b"}', b'{"models":"%b"}', b'{"models":[{"name":["%b"]}]}'])
def test_lists_that_cannot_be_understood_pass_as_they_are(body):
    body = body.replace(b"%b", DERIVED.encode())
    assert shown_list("/api/tags", body, is_hidden=lambda name: bool(name), digest=lambda _: None) == body
