"""The simulated model store: names, manifests, parameters, and which models share a blob.

Shapes follow ``server/routes.go`` and ``server/model.go`` of Ollama; layers have real digests of real bytes, save the weights,
of which only the header exists.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

from planner.profile import ModelProfile
from planner.request import Era
from proxy.simulator import gojson

BLOBS = "/root/.ollama/models/blobs"
"""Where the official Docker image keeps the blobs; ``/api/show`` shows paths in it."""
_FILE_TYPES = {
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    7: "Q8_0",
    8: "Q5_0",
    9: "Q5_1",
    10: "Q2_K",
    11: "Q3_K_S",
    12: "Q3_K_M",
    13: "Q3_K_L",
    14: "Q4_K_S",
    15: "Q4_K_M",
    16: "Q5_K_S",
    17: "Q5_K_M",
    18: "Q6_K",
    32: "BF16",
    38: "MXFP4",
}
"""``general.file_type`` -> its name (``fs/ggml/type.go``)."""
_VALID = re.compile(r"(?:(?:[\w][\w.:-]{0,349}/)?[\w][\w-]{0,79}/)?[\w][\w.-]{0,79}:[\w][\w.-]{0,79}", re.ASCII)
"""``isValidPart`` in ``types/model/name.go``: host, namespace, model, tag."""
_DEFAULT_PREFIXES = re.compile(r"^(?:(?:https?://)?registry\.ollama\.ai/)?(?:library/)?", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """One name in the store.

    ``digest`` is the manifest's (64 hex digits), ``blob`` the weights' (``sha256:…``); models with one blob share a runner.
    ``info`` is ``model_info`` of a verbose ``/api/show``. ``parent`` is the name that it was derived from.
    """

    name: str
    profile: ModelProfile = field(repr=False)
    info: Mapping[str, Any] = field(repr=False)
    blob: str
    digest: str
    size_bytes: int
    modified_ns: int
    template: str = "{{ .Prompt }}"
    system: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    capabilities: tuple[str, ...] = ("completion",)
    parent: str = ""
    from_files: bool = False
    """Made by ``/api/create`` from a file rather than pulled: Ollama 0.24 then calls the blob its parent."""
    lists_geometry: bool = True
    """Whether ``/api/tags`` of 0.32 gives context and embedding length (seen for one of two models; why is not known)."""

    @property
    def blob_path(self) -> str:
        """Where the weights lie on the simulated server."""
        return f"{BLOBS}/{self.blob.replace(':', '-')}"

    @property
    def is_embedding(self) -> bool:
        """An encoder: it embeds, and generates nothing."""
        return "completion" not in self.capabilities

    def details(self) -> dict[str, Any]:
        """``details`` as all lists have it."""
        return {
            "parent_model": "",
            "format": "gguf",
            "family": self.profile.architecture,
            "families": [self.profile.architecture],
            "parameter_size": human_number(int(self.info["general.parameter_count"])),
            "quantization_level": _FILE_TYPES.get(int(self.info.get("general.file_type", -1)), "unknown"),
        }


class Store:
    """The models and the layers beside them. Names are compared as Ollama does: ``:latest`` assumed, case ignored."""

    def __init__(self, models: Iterable[Model] = ()) -> None:
        self._models: dict[str, Model] = {}
        self.layers: set[str] = set()
        for model in models:
            self.add(model)

    def __iter__(self) -> Iterator[Model]:
        """Newest first, to the second, as ``/api/tags`` sorts."""
        return iter(sorted(self._models.values(), key=lambda model: -(model.modified_ns // 10**9)))

    def find(self, name: str) -> Model | None:
        """The model of that name, or ``None``."""
        return self._models.get(full_name(name).lower())

    def add(self, model: Model) -> None:
        """Puts ``model`` under its name, in the place of another of that name."""
        self._models[model.name.lower()] = model
        self.layers |= {model.blob, *(digest for digest in (_text_digest(model.template), _parameters_digest(model.parameters)))}

    def remove(self, model: Model) -> None:
        """Forgets the name; a runner that has the weights loaded keeps them."""
        del self._models[model.name.lower()]

    def copy(self, source: Model, name: str, *, now_ns: int) -> None:
        """The same manifest under another name."""
        self.add(replace(source, name=full_name(name), modified_ns=now_ns))

    def derive(
        self,
        source: Model,
        name: str,
        *,
        parameters: Mapping[str, Any],
        now_ns: int,
        template: str | None = None,
        system: str | None = None,
    ) -> tuple[str, ...]:
        """A model of the same weights with other ``parameters``; the status lines of ``/api/create``, in its order."""
        merged = {**source.parameters, **parameters}
        model = replace(
            source,
            name=full_name(name),
            parameters=dict(sorted(merged.items())),
            template=source.template if template is None else template,
            system=source.system if system is None else system,
            parent=source.name,
            from_files=False,
            modified_ns=now_ns,
        )
        texts = [model.template, *([model.system] if model.system else [])]
        digests = [model.blob, *map(_text_digest, texts), *([_parameters_digest(model.parameters)] if model.parameters else [])]
        status = [f"{'using existing' if digest in self.layers else 'creating new'} layer {digest}" for digest in digests]
        manifest = gojson.encode({"parent": source.digest, "layers": digests})
        self.add(replace(model, digest=hashlib.sha256(manifest).hexdigest()))
        self.layers.update(digests)
        return (*status, "writing manifest", "success")


def build_model(
    name: str,
    profile: ModelProfile,
    *,
    info: Mapping[str, Any] | None = None,
    modified_ns: int = 0,
    **fields: Any,
) -> Model:
    """A model of ``profile``; digests are made from its name and shape, ``info`` from its metadata where not given."""
    if info is None:
        info = dict(sorted({**profile.metadata, "general.parameter_count": parameter_count(profile)}.items()))
        info = {key: gojson.shortest_float32(value) if isinstance(value, float) else value for key, value in info.items()}
    seed = gojson.encode([profile.name, info, [[t.name, t.type.name, t.shape] for t in profile.tensors]])
    blob = hashlib.sha256(seed).hexdigest()
    defaults: dict[str, Any] = {
        "blob": f"sha256:{blob}",
        "digest": hashlib.sha256(f"{full_name(name)} {blob}".encode()).hexdigest(),
        "size_bytes": profile.file_bytes,
    }
    return Model(name=full_name(name), profile=profile, info=info, modified_ns=modified_ns, **{**defaults, **fields})


def show(model: Model, *, verbose: bool, era: Era) -> dict[str, Any]:
    """``/api/show`` of ``model``; arrays of the metadata are shown with ``verbose`` alone."""
    parent = model.parent or (model.blob_path if model.from_files and era == "runner" else "")
    answer: dict[str, Any] = {"modelfile": _modelfile(model)}
    if model.parameters:
        answer["parameters"] = "\n".join(f"{key:<30} {_go_value(value)}" for key, value in _each_parameter(model))
    return answer | {
        "template": model.template,
        **({"system": model.system} if model.system else {}),
        "details": model.details() | {"parent_model": parent},
        "model_info": {k: None if isinstance(v, list | tuple) and not verbose else v for k, v in model.info.items()},
        "tensors": [{"name": t.name, "type": t.type.name, "shape": t.shape} for t in model.profile.tensors],
        "capabilities": model.capabilities,
        "modified_at": gojson.timestamp(model.modified_ns),
    }


def full_name(name: str) -> str:
    """``name`` with its tag and without what Ollama leaves out: the default registry and namespace."""
    short = _DEFAULT_PREFIXES.sub("", name, count=1)
    return short if ":" in short.rsplit("/", 1)[-1] else f"{short}:latest"


def is_valid_name(name: str) -> bool:
    """Whether Ollama would give a model this name."""
    return _VALID.fullmatch(full_name(name)) is not None


def qualified(name: str) -> str:
    """``name`` in all four parts, as Ollama's errors have it (``Name.String``)."""
    full = full_name(name)
    return "".join(("registry.ollama.ai/", "library/")[: 2 - full.count("/")]) + full


def parameter_count(profile: ModelProfile) -> int:
    """Elements of all tensors."""
    return sum(prod(tensor.shape) for tensor in profile.tensors)


def human_number(count: int) -> str:
    """``format.HumanNumber``: ``134.52M``, ``8B``, ``7.6B``."""
    for limit, suffix, digits in ((10**9, "B", 1), (10**6, "M", 2), (10**3, "K", 0)):
        if count >= limit:
            return f"{count // limit}{suffix}" if count % limit == 0 else f"{count / limit:.{digits}f}{suffix}"
    return str(count)


def _modelfile(model: Model) -> str:
    lines = [
        '# Modelfile generated by "ollama show"',
        "# To build a new Modelfile based on this, replace FROM with:",
        f"# FROM {model.name}",
        "",
        f"FROM {model.blob_path}",
        f"TEMPLATE {_quoted(model.template)}",
        *([f"SYSTEM {_quoted(model.system)}"] if model.system else []),
        *(f"PARAMETER {key} {_quoted(_go_text(value))}" for key, value in _each_parameter(model)),
    ]
    return "\n".join(lines) + "\n"


def _each_parameter(model: Model) -> Iterator[tuple[str, Any]]:
    for key, value in sorted(model.parameters.items()):
        for item in value if isinstance(value, list | tuple) else (value,):
            yield key, item


def _quoted(text: str) -> str:
    """``parser.quote``: only what needs quotes gets them."""
    if "\n" not in text and text == text.strip(" "):
        return text
    return f'"""{text}"""' if '"' in text else f'"{text}"'


def _go_text(value: Any) -> str:
    return value if isinstance(value, str) else gojson.encode(value).decode()


def _go_value(value: Any) -> str:
    """``%#v`` of a parameter: strings in quotes."""
    return f'"{value}"' if isinstance(value, str) else _go_text(value)


def _text_digest(text: str) -> str:
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def _parameters_digest(parameters: Mapping[str, Any]) -> str:
    encoded = gojson.encode(dict(sorted(parameters.items()))) + b"\n"
    return f"sha256:{hashlib.sha256(encoded).hexdigest()}"
