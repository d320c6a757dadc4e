"""The recorded exchanges of two real Ollama versions: loading, sending again over a raw socket, comparing.

What a recording leaves out: names of headers keep the case that Go wrote, of a header that came several times only the last
line was kept, and ``chunks`` are what one read returned (so a stream's lines may stand together). ``show-verbose`` was written
again by the recorder, with the first 14 and the last 3 tensors and the beginnings of the vocabulary's arrays.
"""

from __future__ import annotations

import http.client
import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

DATA = Path(__file__).parents[1] / "data" / "recordings"
VERSIONS = ("0.24.0", "0.32.15")

VOLATILE = {
    "created_at", "modified_at", "expires_at", "created", "completed_at",  # clocks
    "total_duration", "load_duration", "prompt_eval_duration", "eval_duration",
    "context", "embedding",  # token numbers and vectors of the model
    "id", "digest",  # drawn by chance, or of a manifest with a date in it
    "size", "size_vram",
}  # fmt: skip
"""Fields whose values differ between two runs of the same Ollama, or belong to the model's mind. Their types are compared."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What came back: headers as (lower-case name, value) lines in the order of arrival."""

    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes

    def header(self, name: str) -> str | None:
        """The last line of that name, as the recordings keep it."""
        return dict(self.headers).get(name.lower())


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """One recorded request and its answer."""

    version: str
    name: str
    method: str
    path: str
    request_headers: tuple[tuple[str, str], ...]
    request_body: bytes | None
    answer: Answer
    chunks: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.version}-{self.name}"


@cache
def load(version: str) -> tuple[Exchange, ...]:
    """The exchanges with that version, in the order in which they were made: later ones build on earlier ones."""
    return tuple(_read(version, path) for path in sorted((DATA / f"ollama-{version}").glob("*.json")))


def exchange(version: str, name: str) -> Exchange:
    """The one of that name."""
    return next(e for e in load(version) if e.name == name)


def send(base_url: str, exchange: Exchange, *, timeout_s: float = 30) -> Answer:
    """Makes the request of ``exchange`` against ``base_url``, with its very headers and nothing that a client library adds."""
    address = urlsplit(base_url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=timeout_s)
    try:
        headers = dict(exchange.request_headers)
        connection.putrequest(exchange.method, exchange.path, skip_host="Host" in headers, skip_accept_encoding=True)
        for name, value in headers.items():
            connection.putheader(name, value)
        if exchange.request_body is not None:
            connection.putheader("Content-Length", str(len(exchange.request_body)))
        connection.endheaders(exchange.request_body)
        response = connection.getresponse()
        lines = tuple((name.lower(), value) for name, value in response.getheaders())
        return Answer(status=response.status, headers=lines, body=response.read())
    finally:
        connection.close()


def comparable_headers(answer: Answer) -> dict[str, str]:
    """Headers that must agree: all but the clock's, and the length, which depends on the volatile fields of the body.

    Whether there is a length or chunks is kept.
    """
    headers = {name: value for name, value in answer.headers if name != "date"}
    if "content-length" in headers and answer.body:
        headers["content-length"] = "some"
    return headers


def comparable_body(exchange: Exchange, body: bytes) -> Any:
    """``body`` as values with the volatile ones replaced by their types: JSON, lines of JSON, events, or text."""
    text = body.decode()
    content_type = exchange.answer.header("content-type") or ""
    if "cut in this recording" in text and not text.endswith("}"):
        text = _uncut(text)
    if "ndjson" in content_type:
        return [_masked(json.loads(line)) for line in text.splitlines()]
    if content_type.startswith("text/event-stream"):
        return [_event(event) for event in text.removesuffix("\n\n").split("\n\n")]
    if "json" in content_type and text:
        value = _masked(json.loads(text))
        if exchange.name == "show-verbose":
            value["tensors"] = value["tensors"][:14] + value["tensors"][-3:]
        return [value, text[-1] == "\n"]
    return text


def _read(version: str, path: Path) -> Exchange:
    raw = json.loads(path.read_text())
    request, response = raw["request"], raw["response"]
    body = request["body"]
    if body is not None:
        body = (body if isinstance(body, str) else json.dumps(body)).encode()
    return Exchange(
        version=version,
        name=raw["name"],
        method=request["method"],
        path=request["path"],
        request_headers=tuple(request["headers"].items()),
        request_body=body,
        answer=Answer(
            status=response["status"],
            headers=tuple((name.lower(), value) for name, value in response["headers"].items()),
            body="".join(response["chunks"]).encode(),
        ),
        chunks=tuple(response["chunks"]),
    )


def _event(text: str) -> Any:
    name, _, data = text.rpartition("data: ")
    return [name, data if data == "[DONE]" else _masked(json.loads(data))]


def _masked(value: Any) -> Any:
    if isinstance(value, dict):
        masked = {key: type(item).__name__ if _is_volatile(key, item) else _masked(item) for key, item in value.items()}
        if "modelfile" in masked:  # Go writes the PARAMETER lines in any order
            lines = masked["modelfile"].splitlines()
            masked["modelfile"] = [sorted(lines), [line for line in lines if not line.startswith("PARAMETER")]]
        if isinstance(masked.get("models"), list):  # made within one second: Go sorts them in any order
            masked["models"] = sorted(masked["models"], key=lambda model: model["name"])
        if masked.get("object") == "list":
            masked["data"] = sorted(masked["data"], key=lambda item: str(item.get("id")) + str(item.get("index")))
        if "tensors" in masked:
            masked["model_info"] = {key: _cut(item) for key, item in masked["model_info"].items()}
        if "embeddings" in masked:
            masked["embeddings"] = [[type(x).__name__ for x in vector] for vector in masked["embeddings"]]
        return masked
    return [_masked(item) for item in value] if isinstance(value, list) else value


def _is_volatile(key: str, value: Any) -> bool:
    if key == "id" and isinstance(value, str) and re.fullmatch(r"[\w.-]+:[\w.-]+", value):
        return False  # a model's name in /v1/models
    return key in VOLATILE


def _cut(value: Any) -> Any:
    """A vocabulary, of which the recording kept the first items."""
    return "vocabulary" if isinstance(value, list) and value and "cut in this recording" in str(value[-1]) else value


def _uncut(text: str) -> str:
    """Valid JSON of an answer whose end the recording cut off: up to the last whole number."""
    text = text.split("...")[0]
    return text if text.endswith("}") else f"{text.rsplit(',', 1)[0]}]}}"
