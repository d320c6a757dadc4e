"""Small GGUF files for tests, written by hand so that they can also be written wrongly."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any

from planner.quantization import ggml_type

U32, F32, BOOL, STRING, ARRAY = 4, 6, 7, 8, 9

LLAMA = {
    "general.architecture": "llama",
    "general.name": "Small",
    "llama.block_count": 2,
    "llama.context_length": 4096,
    "llama.embedding_length": 64,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": [2, 4],
    "llama.rope.freq_base": 10000.0,
    "tokenizer.ggml.add_bos_token": True,
    "tokenizer.ggml.tokens": ["a", "bc", "ü" * 200] * 350,
}
TENSORS = [
    ("token_embd.weight", "Q8_0", (64, 24)),
    ("blk.0.attn_q.weight", "Q4_0", (64, 32)),
    ("blk.0.ffn_up.weight", "F16", (64, 8)),
    ("blk.1.attn_q.weight", "Q4_0", (64, 32)),
    ("blk.1.ffn_up.weight", "F16", (64, 8)),
    ("output_norm.weight", "F32", (64,)),
]

WIDTH, LAYERS = 64, 2
EMBEDDER = {
    "general.architecture": "nomic-bert",
    "general.name": "Embedder",
    "nomic-bert.block_count": LAYERS,
    "nomic-bert.context_length": 2048,
    "nomic-bert.embedding_length": WIDTH,
    "nomic-bert.feed_forward_length": WIDTH,
    "nomic-bert.attention.head_count": 4,
    "nomic-bert.attention.layer_norm_epsilon": 1e-12,
    "nomic-bert.attention.causal": False,
    "nomic-bert.pooling_type": 1,
    "tokenizer.ggml.model": "bert",
    "tokenizer.ggml.tokens": ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "\u2581word"],
    "tokenizer.ggml.token_type_count": 2,
    "tokenizer.ggml.bos_token_id": 2,
    "tokenizer.ggml.eos_token_id": 3,
    "tokenizer.ggml.unknown_token_id": 1,
    "tokenizer.ggml.seperator_token_id": 3,
    "tokenizer.ggml.padding_token_id": 0,
}
"""An encoder that llama-server loads; all its weights are zero."""
EMBEDDER_TENSORS = [
    ("token_embd.weight", "F32", (WIDTH, 6)),
    ("token_types.weight", "F32", (WIDTH, 2)),
    *[(f"token_embd_norm.{part}", "F32", (WIDTH,)) for part in ("weight", "bias")],
    *[
        (f"blk.{layer}.{name}", "F32", shape)
        for layer in range(LAYERS)
        for name, shape in (
            ("attn_qkv.weight", (WIDTH, 3 * WIDTH)),
            *[(f"{norm}_output_norm.{part}", (WIDTH,)) for norm in ("attn", "layer") for part in ("weight", "bias")],
            *[(f"{name}.weight", (WIDTH, WIDTH)) for name in ("attn_output", "ffn_up", "ffn_gate", "ffn_down")],
        )
    ],
]


def string(text: str) -> bytes:
    """A GGUF string: length, then UTF-8."""
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def value(data: Any) -> tuple[int, bytes]:
    """Type number and encoding of a metadata value."""
    match data:
        case bool():
            return BOOL, struct.pack("<?", data)
        case int():
            return U32, struct.pack("<I", data)
        case float():
            return F32, struct.pack("<f", data)
        case str():
            return STRING, string(data)
        case list():
            kinds = [value(item) for item in data]
            return ARRAY, struct.pack("<IQ", kinds[0][0], len(kinds)) + b"".join(item for _, item in kinds)
    raise TypeError(data)


def pair(key: str, data: Any) -> bytes:
    """One row of the metadata."""
    kind, encoded = value(data)
    return string(key) + struct.pack("<I", kind) + encoded


def tensor(name: str, kind: int, shape: Sequence[int], offset: int) -> bytes:
    """One row of the tensor table."""
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def head(*, version: int = 3, tensors: int = 0, keys: int = 0) -> bytes:
    """Magic, version, counts."""
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys)


def gguf(
    metadata: Mapping[str, Any] = LLAMA,
    tensors: Sequence[tuple[str, str, tuple[int, ...]]] = tuple(TENSORS),
    *,
    data: bool = True,
) -> bytes:
    """A whole, right file; with ``data=False`` it ends after its tensor table."""
    align = int(metadata.get("general.alignment", 32))
    out = head(tensors=len(tensors), keys=len(metadata)) + b"".join(pair(k, v) for k, v in metadata.items())
    body = b""
    for name, kind_name, shape in tensors:
        kind = ggml_type(kind_name)
        out += tensor(name, kind.number, shape, len(body))
        body += bytes(kind.tensor_bytes(shape))
        body += bytes(-len(body) % align)
    return out + (bytes(-len(out) % align) + body if data else b"")
