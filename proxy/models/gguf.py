"""GGUF files: header, metadata and tensor table, read from the first megabytes; no tensor data is touched.

Layout (``ggml/include/gguf.h``, llama.cpp b10488): magic, version, tensor count, key count, the key/value pairs, the tensor
table, padding to ``general.alignment``, then each tensor's data at its offset. All of a file's own numbers are checked against
the file's length before anything is read or walked on their word.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from math import prod
from pathlib import Path
from typing import BinaryIO, Literal, cast

from planner.families import family_of
from planner.profile import Metadata, ModelProfile, Scalar, Tensor, build_profile
from planner.quantization import BY_NUMBER
from proxy.errors import GgufError, ModelError
from proxy.models.bounded import BoundedReader

MAGIC = b"GGUF"
VERSIONS = (2, 3)
"""Versions that llama.cpp loads; 3 only added big-endian files to 2, and 1 had lengths of 32 bits."""
DEFAULT_ALIGNMENT = 32
"""Bytes; ``GGUF_DEFAULT_ALIGNMENT`` in ``gguf.h``."""
MAX_DIMENSIONS = 4
"""``GGML_MAX_DIMS`` in ``ggml.h``."""
MAX_ARRAY_KEPT = 1024
"""Elements; a longer array is a vocabulary, and is skipped. Per-layer arrays are far shorter."""

Kind = Literal["model", "adapter", "projector", "vocabulary"]

_NOT_A_MODEL: dict[Kind, str] = {
    "adapter": "a LoRA adapter",
    "projector": "a vision or audio projector",
    "vocabulary": "a vocabulary without tensors",
}

_BOOL, _STRING, _ARRAY = 7, 8, 9
_SCALARS = {
    number: struct.Struct("<" + code)
    for number, code in {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", _BOOL: "?", 10: "Q", 11: "q", 12: "d"}.items()
}
"""``enum gguf_type`` -> its encoding; 8 is a string, 9 an array."""
_MIN_KEY_BYTES = 8 + 4 + 1
"""Name length, value type, a value of one byte."""
_MIN_TENSOR_BYTES = 8 + 4 + 4 + 8
"""Name length, dimension count, type, offset."""
MISSING_NAMED = 8
"""Parts that are not there, as an error names them."""

_SPLIT_NAME = re.compile(r"^(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf$")
"""``llama_split_path``: parts are named from 1, ``split.no`` counts from 0."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GgufHeader:
    """What a GGUF file says before its tensor data.

    ``offsets[i]`` is where the data of ``tensors[i]`` begin, in bytes after ``data_offset``. ``file_bytes`` is the file's size;
    of a file that ends after its tensor table (``header_only``), the size that its table implies. Arrays of more than
    ``MAX_ARRAY_KEPT`` elements are left out of ``metadata``.
    """

    version: int
    metadata: Metadata
    tensors: tuple[Tensor, ...]
    offsets: tuple[int, ...]
    data_offset: int
    file_bytes: int
    header_only: bool

    @property
    def architecture(self) -> str:
        """``general.architecture``, empty where the file does not say."""
        return str(self.metadata.get("general.architecture", ""))

    @property
    def kind(self) -> Kind:
        """What the file is for: weights of a language model, or something that goes beside one."""
        stated = self.metadata.get("general.type")
        if stated == "adapter" or "adapter.type" in self.metadata:
            return "adapter"
        if stated == "mmproj" or self.architecture == "clip":
            return "projector"
        return "model" if self.tensors or self.split_count > 1 else "vocabulary"

    @property
    def is_embedding(self) -> bool:
        """Whether the model makes embeddings rather than text."""
        return is_embedding(self.metadata)

    @property
    def split_count(self) -> int:
        """Files that the model is split into; 1 for a whole one."""
        return max(_integer(self.metadata, "split.count"), 1)

    @property
    def split_index(self) -> int:
        """Which of them this is, from 0."""
        return _integer(self.metadata, "split.no")


def is_embedding(metadata: Metadata) -> bool:
    """Whether these are the metadata of a model that makes embeddings.

    It states a pooling type, be it none, by which Ollama goes too (``NewLlamaServerRunner``), or is an encoder.
    """
    architecture = str(metadata.get("general.architecture", ""))
    family = family_of(architecture)
    return (family is not None and "encoder" in family.features) or f"{architecture}.pooling_type" in metadata


def read_header(path: Path | str) -> GgufHeader:
    """The header of the file at ``path``. Raises ``GgufError`` where it is no whole GGUF, or cannot be read."""
    path = Path(path)
    if not path.is_file():
        raise GgufError(f"{path}: no such file")
    try:
        with path.open("rb") as file:
            return parse_header(file, path.stat().st_size)
    except GgufError as error:
        raise GgufError(f"{path.name}: {error}") from None
    except OSError as error:
        raise GgufError(f"{path}: cannot be read: {error.strerror or error}") from error


def read_profile(path: Path | str) -> ModelProfile:
    """The model at ``path``; of a split one any part, whose sibling parts are then read too.

    Raises ``GgufError`` for a broken file or a missing part, ``ModelError`` for a file that is no language model.
    """
    path = Path(path)
    header = read_header(path)
    headers = [header] if header.split_count == 1 else _read_parts(path, header)
    return profile_of(headers, name=path.name)


def profile_of(parts: list[GgufHeader], *, name: str = "") -> ModelProfile:
    """The model whose parts, in their order, are ``parts`` (one header where it is not split).

    Raises ``GgufError`` where parts are missing, ``ModelError`` where they are no language model.
    """
    first = parts[0]
    if first.kind != "model":
        raise ModelError(
            f"{name or 'the file'} is {_NOT_A_MODEL[first.kind]}, not a language model: there are no layers to place"
        )
    if len(parts) != first.split_count or [part.split_index for part in parts] != list(range(len(parts))):
        have = ", ".join(str(part.split_index + 1) for part in parts)
        raise GgufError(f"{name or 'the model'} is split into {first.split_count} files, and only part {have} is here")
    tensors = tuple(chain.from_iterable(part.tensors for part in parts))
    expected = _integer(first.metadata, "split.tensors.count", len(tensors))
    if len(tensors) != expected:
        raise GgufError(f"{name or 'the model'}: its parts hold {len(tensors)} tensors, split.tensors.count says {expected}")
    try:
        return build_profile(metadata=first.metadata, tensors=tensors, file_bytes=sum(part.file_bytes for part in parts))
    except ValueError as error:
        raise ModelError(f"{name or 'the file'} is no language model: {error}") from None


def parse_header(file: BinaryIO, file_bytes: int) -> GgufHeader:
    """The header at the start of ``file``, whose length is ``file_bytes``. Raises ``GgufError``."""
    reader = BoundedReader(file, file_bytes)
    version = _read_version(reader)
    tensor_count, key_count = reader.u64("the tensor count"), reader.u64("the key count")
    reader.refuse_more_than_fit(key_count, _MIN_KEY_BYTES, "metadata keys")
    metadata: dict[str, Scalar | tuple[Scalar, ...]] = {}
    for _ in range(key_count):
        _read_pair(reader, metadata)
    reader.refuse_more_than_fit(tensor_count, _MIN_TENSOR_BYTES, "tensors")
    rows = [_read_tensor(reader) for _ in range(tensor_count)]
    tensors, offsets = tuple(tensor for tensor, _ in rows), tuple(offset for _, offset in rows)
    if len({tensor.name for tensor in tensors}) < len(tensors):
        raise GgufError("the tensor table names a tensor twice")
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise GgufError(f"general.alignment is {alignment!r}, not a power of two")
    table_end = reader.position
    data_offset = -(-table_end // alignment) * alignment
    implied = data_offset + max((offset + tensor.bytes for tensor, offset in rows), default=0)
    header_only = bool(tensors) and file_bytes <= data_offset
    if tensors and not header_only and file_bytes < implied:
        raise GgufError(
            f"the file ends inside its tensor data: {file_bytes:,} bytes are here, {implied:,} belong to it, "
            f"{implied - file_bytes:,} are missing. Download it again"
        )
    return GgufHeader(
        version=version,
        metadata=metadata,
        tensors=tensors,
        offsets=offsets,
        data_offset=data_offset,
        file_bytes=implied if header_only else file_bytes,
        header_only=header_only,
    )


def _read_version(reader: BoundedReader) -> int:
    magic = reader.take(4, "the magic")
    if magic != MAGIC:
        raise GgufError(f"no GGUF file: it begins with {magic!r}, not {MAGIC!r}")
    version = reader.u32("the version")
    if version & 0xFFFF == 0 and version:
        raise GgufError("a big-endian GGUF file: llama.cpp on this kind of machine does not load it; convert it to little-endian")
    if version not in VERSIONS:
        raise GgufError(f"GGUF version {version}; versions {VERSIONS[0]} and {VERSIONS[1]} can be read")
    return version


def _read_pair(reader: BoundedReader, metadata: dict[str, Scalar | tuple[Scalar, ...]]) -> None:
    key = reader.string("a metadata key")
    if key in metadata:
        raise GgufError(f"the metadata hold {key} twice")
    kind = reader.u32(key)
    if kind != _ARRAY:
        metadata[key] = _scalar_reader(reader, kind, key)()
        return
    item_kind, count = reader.u32(key), reader.u64(key)
    read_item = _scalar_reader(reader, item_kind, key)
    item_bytes = 8 if item_kind == _STRING else _SCALARS[item_kind].size
    reader.refuse_more_than_fit(count, item_bytes, f"elements of {key}")
    if count <= MAX_ARRAY_KEPT:
        metadata[key] = tuple(read_item() for _ in range(count))
    elif item_kind == _STRING:
        reader.skip_strings(count, key)
    else:
        reader.skip(count * item_bytes, key)


def _scalar_reader(reader: BoundedReader, kind: int, key: str) -> Callable[[], Scalar]:
    if kind == _STRING:
        return lambda: reader.string(key)
    if kind not in _SCALARS:
        what = "an array of arrays, which llama.cpp does not read either" if kind == _ARRAY else f"of unknown value type {kind}"
        raise GgufError(f"{key} is {what}")
    return lambda: cast("Scalar", reader.unpack(_SCALARS[kind], key))


def _read_tensor(reader: BoundedReader) -> tuple[Tensor, int]:
    name = reader.string("a tensor's name")
    dimensions = reader.u32(name)
    if dimensions > MAX_DIMENSIONS:
        raise GgufError(f"tensor {name} has {dimensions} dimensions; GGML has at most {MAX_DIMENSIONS}")
    shape = tuple(reader.u64(name) for _ in range(dimensions)) or (1,)
    kind, offset = reader.u32(name), reader.u64(name)
    if kind not in BY_NUMBER:
        raise GgufError(f"tensor {name} is of type {kind}, which is not known; a newer lopsided may know it")
    if prod(shape) >= 2**63 or offset >= 2**63:
        raise GgufError(f"tensor {name} cannot be: shape {shape}, offset {offset}")
    tensor = Tensor(name=name, type=BY_NUMBER[kind], shape=shape)
    try:
        _ = tensor.bytes
    except ValueError as error:
        raise GgufError(f"tensor {name}: {error}") from None
    return tensor, offset


def _read_parts(path: Path, header: GgufHeader) -> list[GgufHeader]:
    match = _SPLIT_NAME.match(path.name)
    if not match or int(match["count"]) != header.split_count:
        raise GgufError(
            f"{path.name} is part {header.split_index + 1} of {header.split_count} of a split model; "
            f"its parts are found by names that end in -00001-of-{header.split_count:05}.gguf"
        )
    names = [f"{match['stem']}-{i + 1:05}-of-{header.split_count:05}.gguf" for i in range(header.split_count)]
    missing = [name for name in names if not (path.parent / name).is_file()]
    if missing:
        named = ", ".join(missing[:MISSING_NAMED]) + (", …" if len(missing) > MISSING_NAMED else "")
        raise GgufError(f"{path.name} is one of {header.split_count} parts of a model; missing: {named}")
    return [read_header(path.parent / name) for name in names]


def _integer(metadata: Metadata, key: str, default: int = 0) -> int:
    value = metadata.get(key, default)
    return value if isinstance(value, int) else default
