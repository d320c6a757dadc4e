"""Models of real shapes without a download: GGUF files whose weights are a constant pattern, for speed and memory alone.

    python -m benchmarks.gpu.models --out models 8b 32b

The rows of the output matrix make plain words the only likely tokens, all equally likely: Ollama neither meets an end token nor
stops for repetition, if it is asked with ``SAMPLING``.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, product
from math import prod
from pathlib import Path
from typing import Any

from planner.profile import ModelProfile, Tensor, build_profile
from planner.quantization import ggml_type

HEAD = 128
VOCABULARY = 128256
SCALE = 0.002
"""Of every block of the layers, whose rows are all alike. CUDA keeps the sum of each 32 activations and, without fused attention,
the attention's scores in F16, which ends at 65504. At 0.01 the sums of the 70B came to 67 000: every answer was NaN, and Ollama
ended it. Now nothing comes to more than 12 000 (``tests/benchmarks/test_gpu.py``)."""

SAMPLING = {"temperature": 1.0, "top_k": 40, "top_p": 1.0, "min_p": 0.0, "repeat_penalty": 1.0}


@dataclass(frozen=True, slots=True)
class Shape:
    """Layers, width, width of the FFN (of one expert where there are ``experts``), heads, KV heads."""

    layers: int
    width: int
    ffn: int
    heads: int
    kv_heads: int
    experts: int = 0
    experts_used: int = 8

    @property
    def architecture(self) -> str:
        return "qwen3moe" if self.experts else "llama"


SHAPES = {
    "1b": Shape(16, 2048, 8192, 32, 8),  # Llama 3.2 1B with heads of 128
    "8b": Shape(32, 4096, 14336, 32, 8),  # Llama 3.1 8B
    "32b": Shape(64, 5120, 27648, 40, 8),  # Qwen2.5 32B
    "70b": Shape(80, 8192, 28672, 64, 8),  # Llama 3.3 70B
    "moe30": Shape(48, 2048, 768, 32, 4, experts=128),  # Qwen3 30B-A3B
    "tiny": Shape(4, 256, 512, 2, 1),
}


def metadata(shape: Shape) -> dict[str, Any]:
    """The GGUF keys that llama.cpp needs, without the vocabulary."""
    numbers: dict[str, Any] = {
        "block_count": shape.layers,
        "context_length": 131072,
        "embedding_length": shape.width,
        "feed_forward_length": shape.ffn * (shape.experts_used if shape.experts else 1),
        "attention.head_count": shape.heads,
        "attention.head_count_kv": shape.kv_heads,
        "attention.key_length": HEAD,
        "attention.value_length": HEAD,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.dimension_count": HEAD,
        "rope.freq_base": 500000.0,
        "vocab_size": VOCABULARY,
    }
    if shape.experts:
        numbers |= {
            "expert_count": shape.experts,
            "expert_used_count": shape.experts_used,
            "expert_feed_forward_length": shape.ffn,
        }
    return {
        "general.architecture": shape.architecture,
        **{f"{shape.architecture}.{key}": value for key, value in numbers.items()},
    }


def tensors(shape: Shape) -> Iterator[Tensor]:
    """Every tensor: matrices in Q4_0, the output matrix in Q8_0, vectors in F32."""

    def tensor(name: str, kind: str, *sides: int) -> Tensor:
        return Tensor(name=f"{name}.weight", type=ggml_type(kind), shape=sides)

    yield tensor("token_embd", "q4_0", shape.width, VOCABULARY)
    yield tensor("output_norm", "f32", shape.width)
    yield tensor("output", "q8_0", shape.width, VOCABULARY)
    many, suffix = ((shape.experts,), "_exps") if shape.experts else ((), "")
    query, key = shape.heads * HEAD, shape.kv_heads * HEAD
    for i in range(shape.layers):
        yield tensor(f"blk.{i}.attn_norm", "f32", shape.width)
        yield tensor(f"blk.{i}.ffn_norm", "f32", shape.width)
        yield tensor(f"blk.{i}.attn_q", "q4_0", shape.width, query)
        yield tensor(f"blk.{i}.attn_k", "q4_0", shape.width, key)
        yield tensor(f"blk.{i}.attn_v", "q4_0", shape.width, key)
        yield tensor(f"blk.{i}.attn_output", "q4_0", query, shape.width)
        if shape.experts:
            yield tensor(f"blk.{i}.attn_q_norm", "f32", HEAD)
            yield tensor(f"blk.{i}.attn_k_norm", "f32", HEAD)
            yield tensor(f"blk.{i}.ffn_gate_inp", "f32", shape.width, shape.experts)
        yield tensor(f"blk.{i}.ffn_gate{suffix}", "q4_0", shape.width, shape.ffn, *many)
        yield tensor(f"blk.{i}.ffn_up{suffix}", "q4_0", shape.width, shape.ffn, *many)
        yield tensor(f"blk.{i}.ffn_down{suffix}", "q4_0", shape.ffn, shape.width, *many)


def profile(name: str, shape: Shape | None = None) -> ModelProfile:
    """The model as the planner knows it, of ``shape`` where that is given."""
    shape = shape or SHAPES[name]
    all_tensors = tuple(tensors(shape))
    size = sum(tensor.bytes for tensor in all_tensors)
    return build_profile(metadata=metadata(shape), tensors=all_tensors, file_bytes=size, name=name)


def vocabulary() -> tuple[list[str], list[int]]:
    """Tokens and their types as SentencePiece has them: control, bytes, letters, and every word of up to three letters and on."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    types = [2, 3, 3, *[6] * 256]
    words = ("▁" + "".join(word) for length in range(5) for word in product(letters, repeat=length))
    tokens += [*letters, *islice(words, VOCABULARY - len(tokens) - len(letters))]
    return tokens, types + [1] * (VOCABULARY - len(types))


def write(path: Path, name: str) -> None:
    """Writes the GGUF, tensor by tensor."""
    import gguf
    import numpy as np

    path.parent.mkdir(parents=True, exist_ok=True)
    shape = SHAPES[name]
    part = path.with_suffix(".part")
    writer = gguf.GGUFWriter(part, shape.architecture)
    writer.add_name(name)
    for key, value in metadata(shape).items():
        if isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
    tokens, types = vocabulary()
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(rank) for rank in range(len(tokens))])
    writer.add_token_types(types)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)

    def row_bytes(tensor: Tensor) -> int:
        return tensor.bytes // prod(tensor.shape[1:])

    for tensor in tensors(shape):
        rows = tensor.shape[:0:-1]
        if tensor.type.name.lower() == "f32":
            writer.add_tensor_info(tensor.name, (*rows, tensor.shape[0]), np.dtype(np.float32), tensor.bytes)
        else:
            kind = gguf.GGMLQuantizationType[tensor.type.name.upper()]
            writer.add_tensor_info(tensor.name, (*rows, row_bytes(tensor)), np.dtype(np.uint8), tensor.bytes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()

    def blocks(columns: int, scale: float, quants: Any) -> Any:
        """One row of blocks of 32 elements: a scale in FP16, then the quants."""
        n = columns // 32
        scales = np.full((n, 1), scale, dtype=np.float16).view(np.uint8)
        return np.concatenate([scales, quants.reshape(n, -1).view(np.uint8)], axis=1).reshape(-1)

    random = np.random.default_rng(1)
    for tensor in tensors(shape):
        columns, *rows = tensor.shape
        rows.reverse()
        if tensor.type.name.lower() == "f32":
            data = np.ones(columns, np.float32) if not rows else random.standard_normal((*rows, columns), np.float32)
        elif tensor.name == "output.weight":
            direction = random.integers(-127, 128, size=columns, dtype=np.int8)
            data = np.zeros((VOCABULARY, row_bytes(tensor)), dtype=np.uint8)
            likely = [i for i, token in enumerate(tokens) if len(token) == 4 and token[0] == "▁"]
            for nth, i in enumerate(likely[:2000]):  # whatever the hidden state, the half along it or the half against it wins
                data[i] = blocks(columns, 0.05, direction if nth % 2 else -direction)
        else:
            row = blocks(columns, SCALE, random.integers(0, 256, size=columns // 2, dtype=np.uint8))
            data = np.ascontiguousarray(np.broadcast_to(row, (*rows, row.size)))
        writer.write_tensor_data(data)
    writer.close()
    part.rename(path)
    print("wrote", path, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("names", nargs="+", choices=sorted(SHAPES))
    args = parser.parse_args()
    for name in args.names:
        write(args.out / f"{name}.gguf", name)


if __name__ == "__main__":
    main()
