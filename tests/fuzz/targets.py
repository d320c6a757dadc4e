"""What is fuzzed. Each target takes any bytes, and raises only where a promise is broken."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from contextlib import suppress

from proxy.errors import GgufError, ModelError
from proxy.jsonedit import JsonError
from proxy.launcher.launch import parse_launch
from proxy.models.catalog import full_name
from proxy.models.gguf import parse_header, profile_of
from proxy.models.show import (
    lacks_arrays,
    parse_modelfile,
    parse_parameters,
    profile_of_show,
    refuse_what_runs_elsewhere,
    text_of,
)
from proxy.ollama.endpoints import LOAD_PATHS, V1_PATHS, parse_load_request

PATHS = (*LOAD_PATHS, min(V1_PATHS))
ADDED = {"main_gpu": 1, "tensor_split": "1,2"}


def gguf(data: bytes) -> None:
    """A file is a header or a ``GgufError``, a header a profile or an error of ours; its numbers are possible."""
    with suppress(GgufError, ModelError):
        header = parse_header(io.BytesIO(data), len(data))
        assert header.file_bytes >= 0
        assert all(offset >= 0 for offset in header.offsets)
        _ = header.kind, header.is_embedding, header.split_index, header.architecture
        profile = profile_of([header])
        assert profile.file_bytes >= 0


def load_request(data: bytes) -> None:
    """The first byte chooses the path. What is understood is changed as it was told, and in nothing else."""
    path, body = PATHS[data[0] % len(PATHS)] if data else PATHS[0], data[1:]
    try:
        request = parse_load_request(path, body)
    except JsonError:
        return
    assert request.model
    _ = full_name(request.model)
    assert request.with_options({}) == body
    if path in V1_PATHS:
        return
    changed = request.with_options(ADDED)
    again = parse_load_request(path, changed)
    assert again.model == request.model
    assert dict(again.options) == {**request.options, **ADDED}
    back = parse_load_request(path, again.with_options({}, without=frozenset(ADDED)))
    assert dict(back.options) == {name: value for name, value in request.options.items() if name not in ADDED}
    with suppress(ValueError, RecursionError):
        before = json.loads(body)
        assert isinstance(json.loads(changed), type(before))


def launch(data: bytes) -> None:
    """A body is a launch or a ``ModelError``."""
    with suppress(ModelError):
        request = parse_launch(data)
        assert request.model_path
        assert request.settings.num_ctx >= 0
        _ = request.blob, request.spread, request.wish


def show(data: bytes) -> None:
    """An answer of ``/api/show`` is a profile or a ``ModelError``."""
    text = data.decode(errors="replace")
    _ = parse_modelfile(text), parse_parameters(text)
    try:
        answer = json.loads(data)
    except (ValueError, RecursionError):
        return
    if not isinstance(answer, dict):
        return
    _ = parse_modelfile(text_of(answer.get("modelfile"))), parse_parameters(text_of(answer.get("parameters")))
    with suppress(ModelError):
        refuse_what_runs_elsewhere(answer)
        _ = lacks_arrays(answer)
        profile_of_show(answer, has_companions=False, size_bytes=1)


TARGETS: Mapping[str, Callable[[bytes], None]] = {"gguf": gguf, "json": load_request, "launch": launch, "show": show}
