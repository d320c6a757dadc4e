"""A simulator that holds what the recorded servers held: SmolLM2-135M and a tiny model, with SmolLM2's recorded words."""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime
from typing import Any

from planner.hardware import Gpu, Host, Rig
from planner.profile import Tensor, build_profile
from planner.quantization import ggml_type
from planner.units import GIB
from proxy.simulator import Model, Simulator, build_model
from proxy.simulator.placement import Environment
from proxy.simulator.replies import Prompt, Reply
from tests.proxy import recordings
from tests.proxy.recordings import Exchange

H200 = Gpu(
    uuid="GPU-0",
    name="NVIDIA H200",
    total_bytes=140 * GIB,
    free_bytes=139 * GIB,
    compute_capability=(9, 0),
    sm_count=132,
    clock_mhz=1980,
    bandwidth_bytes_per_s=4_800_000_000_000,
)
HOST = Host(total_bytes=64 * GIB, free_bytes=60 * GIB, bandwidth_bytes_per_s=50_000_000_000)
RIGS = {"0.24.0": Rig(gpus=(), host=HOST), "0.32.15": Rig(gpus=(H200, H200), host=HOST)}
"""0.24 was recorded on a CPU alone: its ``size_vram`` is 0 and its context 4096."""
UNLOADING_S = 0.3
"""0.24 still listed the unloaded model in the very next request."""


class RecordedWords:
    """Says what the recorded model said to ``exchange``, in as many tokens."""

    exchange: Exchange | None = None

    def __call__(self, prompt: Prompt) -> Reply:
        assert self.exchange is not None
        return Reply(pieces=tuple(pieces_of(self.exchange)))


def recorded_models(version: str) -> tuple[Model, ...]:
    """The two models of the recordings, from ``/api/tags`` and ``/api/show``."""
    listed = json.loads(recordings.exchange(version, "tags").answer.body)["models"]
    shown = {name: json.loads(recordings.exchange(version, name).answer.body) for name in ("show", "show-verbose", "show-tiny")}
    smollm2 = shown["show"] | {"model_info": shown["show-verbose"]["model_info"]}  # its tensor table is whole, its arrays null
    by_name = {"smollm2:135m": smollm2, "tiny:latest": shown["show-tiny"]}
    return tuple(_model(entry, by_name[entry["name"]]) for entry in listed)


def recorded_simulator(version: str, words: RecordedWords) -> Simulator:
    """The recorded server."""
    era = "runner" if version == "0.24.0" else "llama-server"
    simulator = Simulator(
        RIGS[version],
        recorded_models(version),
        environment=Environment(era=era),
        unload_s=UNLOADING_S if era == "runner" else 0,
        speaker=words,
    )
    if version == "0.32.15":  # an earlier run had left the blob there: "blob-head-missing" found it
        simulator.blobs.add(f"sha256:{hashlib.sha256(b'hello').hexdigest()}")
    return simulator


def pieces_of(exchange: Exchange) -> list[str]:
    """The recorded answer's tokens; where only their number and the text are known, the text cut into as many pieces."""
    text = exchange.answer.body.decode()
    content_type = exchange.answer.header("content-type") or ""
    if "ndjson" in content_type:
        lines = [json.loads(line) for line in text.splitlines()]
        return [line["response"] if "response" in line else line["message"]["content"] for line in lines[:-1]]
    if content_type == "text/event-stream":
        events = [json.loads(event.split("data: ", 1)[1]) for event in text.split("\n\n") if "data: {" in event]
        deltas = [event["choices"][0]["delta"].get("content", "") for event in events if event.get("choices")]
        return [piece for piece in deltas if piece] or [
            event["delta"]["text"] for event in events if event["type"] == "content_block_delta"
        ]
    said, count, stopped = _said(json.loads(text))
    count -= stopped
    return [*said[: count - 1], said[count - 1 :]] if count else []


def _said(body: dict[str, Any]) -> tuple[str, int, bool]:
    """(text, tokens, whether it came to its own end) of a whole answer."""
    if "choices" in body:
        choice = body["choices"][0]
        text = choice["message"]["content"] if "message" in choice else choice["text"]
        return text, body["usage"]["completion_tokens"], choice["finish_reason"] == "stop"
    if "output" in body:
        return body["output"][0]["content"][0]["text"], body["usage"]["output_tokens"], False
    if "content" in body:
        return body["content"][0]["text"], body["usage"]["output_tokens"], body["stop_reason"] == "end_turn"
    text = body["response"] if "response" in body else body["message"]["content"]
    return text, body["eval_count"], body["done_reason"] == "stop"


def _model(listed: dict[str, Any], shown: dict[str, Any]) -> Model:
    info = shown["model_info"]
    tensors = [Tensor(name=t["name"], type=ggml_type(t["type"]), shape=tuple(t["shape"])) for t in shown["tensors"]]
    scalars = {key: value for key, value in info.items() if not isinstance(value, list | None)}
    parameters: dict[str, list[str]] = {}
    for line in shown.get("parameters", "").splitlines():
        name, value = line.split(None, 1)
        parameters.setdefault(name, []).append(json.loads(value))
    made = datetime.strptime(listed["modified_at"][:19], "%Y-%m-%dT%H:%M:%S").replace(tzinfo=UTC)
    blob = shown["modelfile"].split("sha256-")[1][:64]
    return build_model(
        listed["name"],
        build_profile(metadata=scalars, tensors=tensors, file_bytes=listed["size"]),
        info=info,
        blob=f"sha256:{blob}",
        digest=listed["digest"],
        size_bytes=listed["size"],
        modified_ns=int(made.timestamp()) * 10**9 + int(listed["modified_at"][20:-1].ljust(9, "0")),
        template=shown["template"],
        parameters=parameters,
        capabilities=tuple(shown["capabilities"]),
        from_files=True,
        lists_geometry="context_length" in listed["details"],
    )
