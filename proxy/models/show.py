"""What ``/api/show`` says about a model: the files it is made of, its default options, its tensors."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from planner.profile import Metadata, ModelProfile, Scalar, Tensor, build_profile
from planner.quantization import ggml_type
from proxy.errors import ModelError
from proxy.models.gguf import MAX_ARRAY_KEPT

_PARAMETER = re.compile(r"^(\w+)\s+(.*)$")


@dataclass(frozen=True, kw_only=True, slots=True)
class Files:
    """The files that a Modelfile names, in Ollama's store."""

    model: str = ""
    projectors: tuple[str, ...] = ()
    adapters: tuple[str, ...] = ()
    draft: str = ""


def parse_modelfile(text: str) -> Files:
    """The files at the head of a Modelfile that ``/api/show`` wrote.

    It writes ``FROM``, ``ADAPTER``, ``DRAFT``, then a ``FROM`` for each projector (``Model.String`` in ``server/images.go``).
    Whatever follows is a text of the model's author, in which such lines mean nothing.
    """
    found: dict[str, list[str]] = {"FROM": [], "ADAPTER": [], "DRAFT": []}
    for line in text.splitlines():
        command, _, path = line.partition(" ")
        if command in found:
            found[command].append(path.strip())
        elif line and not line.startswith("#"):
            break
    model, *projectors = found["FROM"] or [""]
    return Files(model=model, projectors=tuple(projectors), adapters=tuple(found["ADAPTER"]), draft="".join(found["DRAFT"][:1]))


def parse_parameters(text: str) -> Metadata:
    """The options in the ``parameters`` of ``/api/show``: a name and a value in Go's notation on each line."""
    options: dict[str, Scalar | tuple[Scalar, ...]] = {}
    for line in text.splitlines():
        if not (match := _PARAMETER.match(line)):
            continue
        name, value = match[1], _go_value(match[2].strip())
        if name in options:
            before = options[name]
            options[name] = (*(before if isinstance(before, tuple) else (before,)), value)
        else:
            options[name] = value
    return options


def profile_of_show(show: Mapping[str, Any], *, has_companions: bool, size_bytes: int) -> ModelProfile:
    """The profile of a model by ``/api/show`` alone; ``size_bytes`` is its size in ``/api/tags``, all its files together.

    Raises ``ModelError`` where the answer holds no tensor table, or one that can't be understood.
    """
    rows = show.get("tensors")
    if not isinstance(rows, list) or not rows:
        raise ModelError("/api/show names no tensors, and its file can't be read from here")
    metadata = _metadata(show.get("model_info"))
    split = metadata.get("split.count")
    if isinstance(split, int) and split > 1:
        raise ModelError(f"it is part of a model that is split into {split} files")
    try:
        tensors = [Tensor(name=row["name"], type=ggml_type(row["type"]), shape=_shape(row["shape"])) for row in rows]
        tensors_bytes = sum(tensor.bytes for tensor in tensors)
        file_bytes = tensors_bytes if has_companions else max(size_bytes, tensors_bytes)
        return build_profile(metadata=metadata, tensors=tensors, file_bytes=file_bytes)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelError(f"its tensors in /api/show can't be understood: {error}") from None


def refuse_what_runs_elsewhere(show: Mapping[str, Any]) -> None:
    """Raises ``ModelError`` for a cloud model, and for one in a format that llama.cpp does not run (MLX)."""
    if show.get("remote_host") or show.get("remote_model"):
        raise ModelError(f"it runs on {show.get('remote_host') or 'another server'}: there is nothing to place here")
    details = show.get("details")
    form = text_of(details.get("format")) if isinstance(details, dict) else ""
    if form and form != "gguf":
        raise ModelError(f"its format is {form}, not GGUF: Ollama runs it without llama.cpp")


def lacks_arrays(show: Mapping[str, Any]) -> bool:
    """Whether the answer left out an array of the architecture (KV heads of each layer), or the tensor table."""
    info = show.get("model_info")
    if not isinstance(info, dict) or not show.get("tensors"):
        return True
    return any(value in (None, []) for key, value in info.items() if not key.startswith(("general.", "tokenizer.")))


def _metadata(info: object) -> Metadata:
    """``model_info`` as GGUF metadata: long arrays and those that were left out are dropped."""
    kept: dict[str, Scalar | tuple[Scalar, ...]] = {}
    for key, value in info.items() if isinstance(info, dict) else ():
        if isinstance(value, list) and len(value) <= MAX_ARRAY_KEPT and all(isinstance(item, Scalar) for item in value):
            kept[key] = tuple(value)
        elif isinstance(value, Scalar):
            kept[key] = value
    return kept


def _shape(value: object) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(isinstance(n, int) and 0 <= n < 2**63 for n in value):
        raise ValueError(f"{value!r} is no shape")
    return tuple(value)


def _go_value(text: str) -> Scalar:
    """A value as Go's ``%#v`` writes it: ``"text"``, ``true``, ``8192``, ``1.048576e+06``."""
    if text in ("true", "false"):
        return text == "true"
    try:
        value = json.loads(text)
    except ValueError:
        return text.strip('"')
    if isinstance(value, float) and value.is_integer() and "e" in text:  # an integer from 10^6 on
        return int(value)
    return value if isinstance(value, str | int | float) else text


def text_of(value: object) -> str:
    """``value`` where it is text, else nothing: fields of a wrong type count as missing."""
    return value if isinstance(value, str) else ""
