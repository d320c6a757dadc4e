"""What a model is, as far as its placement goes: bytes of each layer, attention geometry, experts.

A profile is built from a GGUF's metadata and tensor table, whichever way those were read (the file's header or Ollama's
``/api/show``). Tensors are put into the classes that llama.cpp places them by (``llm_tensor_info`` in
``src/llama-arch.cpp``): input tensors stay on the host, ``blk.N.*`` go with their layer, the rest go with the output layer.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from typing import Any, TypeVar

from planner.quantization import GgmlType

Scalar = str | int | float | bool
Metadata = Mapping[str, Scalar | tuple[Scalar, ...]]
"""GGUF key/value pairs; long arrays (the vocabulary) may be left out."""

INPUT_TENSORS = frozenset({"token_embd", "token_types", "position_embd", "per_layer_token_embd"})
"""Tensors read once per token on the way in; llama.cpp keeps those of ``LLM_TENSOR_LAYER_INPUT`` on the host."""

FIRST_LAYER_TENSORS = frozenset(
    {"token_embd_norm", "per_layer_model_proj", "per_layer_proj_norm", "rope_freqs", "rope_factors_long", "rope_factors_short"}
)
"""Tensors of ``LLM_TENSOR_LAYER_REPEATING`` without a layer number: created as layer 0's (``tn(…, 0)``)."""

ENCODERS = frozenset(
    {"bert", "eurobert", "jina-bert-v2", "jina-bert-v3", "modern-bert", "neo-bert", "nomic-bert"} | {"nomic-bert-moe"}
)
"""Architectures without an output matrix, so that a file without one has no tied one either."""

UNTIED = ENCODERS | {"bitnet"}
"""Architectures whose embedding is not loaded a second time: BitNet multiplies with the one on the host."""

REMEMBERED = 32
"""Results of a kind that a profile keeps: about as many contexts as one search asks for."""

T = TypeVar("T")

_LAYER = re.compile(r"^blk\.(\d+)\.(.+)$")
_EXPERT = re.compile(r"_(?:ch)?exps(?:\.|$)")


MAX_LAYERS = 512
"""Repeating layers of the largest model that llama.cpp loads (``LLAMA_MAX_LAYERS`` in ``src/llama-hparams.h``)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tensor:
    """One row of a GGUF's tensor table; ``shape`` has the contiguous dimension first."""

    name: str
    type: GgmlType
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Bytes of its data, padding left out."""
        return self.type.tensor_bytes(self.shape)


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """Weights of one repeating layer, in bytes. ``expert_bytes`` are the routed experts; shared experts are in ``ffn_bytes``."""

    attention_bytes: int
    ffn_bytes: int
    expert_bytes: int
    other_bytes: int

    @property
    def weights_bytes(self) -> int:
        """All parts together."""
        return self.attention_bytes + self.ffn_bytes + self.expert_bytes + self.other_bytes


@dataclass(frozen=True, kw_only=True)
class ModelProfile:
    """One model, immutable. ``metadata`` and ``tensors`` are kept for what only the memory model needs.

    ``input_bytes`` stay on the host. ``output_bytes`` go with the output layer; ``tied_bytes`` of them are the embedding, loaded
    a second time as the output matrix, which costs nothing where the output layer is on the host too. ``model_tensors`` are those
    of no repeating layer by name, ``layer_tensors`` those of each by what stands behind ``blk.N.``; ``tensor_kinds`` holds for
    each layer the first one whose tensors have the same names, types and shapes.
    """

    architecture: str
    name: str
    file_bytes: int
    layers: tuple[Layer, ...]
    input_bytes: int
    output_bytes: int
    tied_bytes: int = 0
    metadata: Metadata = field(repr=False)
    tensors: tuple[Tensor, ...] = field(repr=False)
    model_tensors: Mapping[str, Tensor] = field(default_factory=dict, repr=False, compare=False)
    layer_tensors: tuple[Mapping[str, Tensor], ...] = field(default=(), repr=False, compare=False)
    tensor_kinds: tuple[int, ...] = field(default=(), repr=False, compare=False)

    @property
    def n_layers(self) -> int:
        """Repeating layers; llama.cpp counts the output layer as one more."""
        return len(self.layers)

    def counts(self, key: str, default: int = 0) -> tuple[int, ...]:
        """The architecture's integer ``key``, of a per-layer array all. What is no unsigned number of 32 bits, as llama.cpp reads
        them, is ``default``."""
        value = self.metadata.get(f"{self.architecture}.{key}", default)
        values = value if isinstance(value, tuple) else (value,)
        return tuple(int(v) if isinstance(v, int | float) and 0 <= v < 2**32 else default for v in values)

    def integer(self, key: str, default: int = 0) -> int:
        """The architecture's integer ``key`` (``attention.head_count``); of a per-layer array, the largest."""
        known = self._integers
        found = known.get((key, default))
        if found is None:
            found = known[key, default] = max(self.counts(key, default), default=default)
        return found

    @cached_property
    def _integers(self) -> dict[tuple[str, int], int]:
        return {}

    @cached_property
    def _arrays(self) -> dict[tuple[str, int], tuple[int, ...]]:
        return {}

    def per_layer(self, key: str, default: int = 0) -> tuple[int, ...]:
        """The architecture's integer ``key`` for each layer: an array as it is, a scalar repeated."""
        known = self._arrays
        found = known.get((key, default))
        if found is None:
            values = self.counts(key, default)
            if not isinstance(self.metadata.get(f"{self.architecture}.{key}"), tuple):
                values *= self.n_layers
            found = known[key, default] = (values + (default,) * self.n_layers)[: self.n_layers]
        return found

    def per_layer_or(self, key: str, default: tuple[int, ...]) -> tuple[int, ...]:
        """Like ``per_layer``, with a default of its own for each layer."""
        return self.per_layer(key) if f"{self.architecture}.{key}" in self.metadata else default

    @property
    def embedding_length(self) -> int:
        """Width of the hidden state."""
        return self.integer("embedding_length")

    @property
    def context_train(self) -> int:
        """Trained context in tokens, 0 where the file does not say."""
        return self.integer("context_length")

    @cached_property
    def vocab_size(self) -> int:
        """Rows of the embedding: what llama.cpp calls ``n_vocab``, also where the vocabulary itself was left out."""
        embedding = self.model_tensors.get("token_embd.weight")
        return embedding.shape[1] if embedding and len(embedding.shape) > 1 else self.integer("vocab_size")

    @cached_property
    def layer_weights(self) -> tuple[int, ...]:
        """Bytes of each repeating layer."""
        return tuple(layer.weights_bytes for layer in self.layers)

    @cached_property
    def weights_before(self) -> tuple[int, ...]:
        """Bytes of the repeating layers below each, and of all of them last: a run's weights are a difference of two."""
        return tuple(accumulate(self.layer_weights, initial=0))

    @cached_property
    def experts_before(self) -> tuple[int, ...]:
        """The same of their routed experts."""
        return tuple(accumulate((layer.expert_bytes for layer in self.layers), initial=0))

    @cached_property
    def memo(self) -> dict[Any, Any]:
        """Results of pure functions of this profile that are asked for again and again; empty at first."""
        return {}

    def remember(self, kind: str, key: Hashable, make: Callable[[], T]) -> T:
        """What ``make`` returns for ``key``: made once, and forgotten when ``REMEMBERED`` newer ones of its kind were made."""
        known: dict[Hashable, T] = self.memo.setdefault(kind, {})
        found = known.get(key)
        if found is not None:
            return found
        made = make()
        for oldest in list(known)[: max(len(known) + 1 - REMEMBERED, 0)]:
            known.pop(oldest, None)
        known[key] = made
        return made

    @cached_property
    def n_computed_layers(self) -> int:
        """Repeating layers without those for multi-token prediction: llama.cpp's ``n_layer()``, the lowest ones."""
        return self.n_layers - min(self.integer("nextn_predict_layers"), self.n_layers - 1)

    @property
    def expert_count(self) -> int:
        """Routed experts of a layer, 0 for a dense model."""
        return self.integer("expert_count")

    @property
    def experts_used(self) -> int:
        """Routed experts that one token goes through."""
        return self.integer("expert_used_count")

    @property
    def weights_bytes(self) -> int:
        """All weights that a GPU can hold: the repeating layers and the output layer."""
        return self.weights_before[-1] + self.output_bytes


def build_profile(*, metadata: Metadata, tensors: Iterable[Tensor], file_bytes: int, name: str = "") -> ModelProfile:
    """A profile from GGUF ``metadata`` and its tensor table; ``file_bytes`` is the blob's whole size.

    Raises ``ValueError`` where the file names no architecture or has no repeating layers: such a file is no language model.
    """
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise ValueError("the metadata name no general.architecture")
    rows = tuple(tensors)
    by_layer: defaultdict[int, dict[str, Tensor]] = defaultdict(dict)
    others: dict[str, Tensor] = {}
    for tensor in rows:
        if match := _LAYER.match(tensor.name):
            by_layer[int(match[1])][match[2]] = tensor
        else:
            others[tensor.name] = tensor
    if not by_layer:
        raise ValueError("the tensor table holds no repeating layers (blk.N.*)")
    n_layers = max(by_layer) + 1
    if n_layers > MAX_LAYERS:
        raise ValueError(f"{n_layers} layers are more than llama.cpp loads ({MAX_LAYERS})")
    layer_tensors = tuple(by_layer[i] for i in range(n_layers))
    first: dict[object, int] = {}
    kinds = tuple(
        first.setdefault(tuple((name, tensor.type.number, tensor.shape) for name, tensor in of_layer.items()), i)
        for i, of_layer in enumerate(layer_tensors)
    )
    of_kind = {kind: _layer_of(layer_tensors[kind]) for kind in first.values()}
    layers = [of_kind[kind] for kind in kinds]
    n_unused = metadata.get(f"{architecture}.nextn_predict_layers", 0)
    for i in range(n_layers - (n_unused if isinstance(n_unused, int) and n_unused < n_layers else 0), n_layers):
        layers[i] = _layer_of({})  # multi-token prediction: TENSOR_SKIP, not loaded without a draft
    input_bytes = output_bytes = embedding_bytes = 0
    has_output = False
    for name_of, tensor in others.items():
        stem = name_of.rsplit(".", 1)[0]
        if stem in FIRST_LAYER_TENSORS:
            layers[0] = replace(layers[0], other_bytes=layers[0].other_bytes + tensor.bytes)
        elif stem in INPUT_TENSORS:
            input_bytes += tensor.bytes
            embedding_bytes += tensor.bytes if stem == "token_embd" else 0
        else:
            output_bytes += tensor.bytes
            has_output = has_output or stem == "output"
    tied_bytes = 0 if has_output or architecture in UNTIED else embedding_bytes
    return ModelProfile(
        architecture=architecture,
        name=name or str(metadata.get("general.name", "")),
        file_bytes=file_bytes,
        layers=tuple(layers),
        input_bytes=input_bytes,
        output_bytes=output_bytes + tied_bytes,
        tied_bytes=tied_bytes,
        metadata=metadata,
        tensors=rows,
        model_tensors=others,
        layer_tensors=layer_tensors,
        tensor_kinds=kinds,
    )


def _layer_of(tensors: Mapping[str, Tensor]) -> Layer:
    sizes = dict.fromkeys(("attention", "ffn", "expert", "other"), 0)
    for name, tensor in tensors.items():
        sizes[_class_of(name)] += tensor.bytes
    return Layer(**{f"{key}_bytes": size for key, size in sizes.items()})


def _class_of(name: str) -> str:
    if _EXPERT.search(name):
        return "expert"
    if name.startswith("ffn_"):
        return "ffn"
    if name.startswith(("attn_", "ssm_", "time_mix_", "shortconv")):
        return "attention"
    return "other"
