"""Models of real shapes without a download: GGUF files whose weights are a constant pattern, for speed and memory alone.

    python -m benchmarks.gpu.models --out models 8b 32b

Of models that answer, the rows of the output matrix make plain words the only likely tokens, all equally likely: Ollama neither
meets an end token nor stops for repetition, if it is asked with ``SAMPLING``. The model of embeddings has random weights.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice, product
from math import prod
from pathlib import Path
from typing import Any

from planner.profile import ModelProfile, Tensor, build_profile
from planner.quantization import ggml_type

HEAD = 128
VOCABULARY = 128256
WORDPIECES = 30522
SCALE = 0.002
"""Of every block of the layers, whose rows are all alike. CUDA keeps the sum of each 32 activations and, without fused attention,
the attention's scores in F16, which ends at 65504. At 0.01 the sums of the 70B came to 67 000: every answer was NaN, and Ollama
ended it. Now nothing comes to more than 12 000 (``tests/benchmarks/test_gpu.py``)."""

LETTERS = "abcdefghijklmnopqrstuvwxyz"
PLAIN = {"F32": "float32", "F16": "float16"}
"""Types whose elements NumPy has."""

SAMPLING = {"temperature": 1.0, "top_k": 40, "top_p": 1.0, "min_p": 0.0, "repeat_penalty": 1.0}


def words() -> Iterator[str]:
    """Every word of letters, short ones first; the first is empty."""
    return ("▁" + "".join(word) for length in count() for word in product(LETTERS, repeat=length))


@dataclass(frozen=True, slots=True)
class Decoder:
    """A model that answers: layers, width, width of the FFN (of one expert where there are ``experts``), heads, KV heads."""

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

    def metadata(self) -> dict[str, Any]:
        """The GGUF keys of the architecture."""
        keys: dict[str, Any] = {
            "block_count": self.layers,
            "context_length": 131072,
            "embedding_length": self.width,
            "feed_forward_length": self.ffn * (self.experts_used if self.experts else 1),
            "attention.head_count": self.heads,
            "attention.head_count_kv": self.kv_heads,
            "attention.key_length": HEAD,
            "attention.value_length": HEAD,
            "attention.layer_norm_rms_epsilon": 1e-5,
            "rope.dimension_count": HEAD,
            "rope.freq_base": 500000.0,
            "vocab_size": VOCABULARY,
        }
        if self.experts:
            keys |= {
                "expert_count": self.experts,
                "expert_used_count": self.experts_used,
                "expert_feed_forward_length": self.ffn,
            }
        return keys

    def tensors(self) -> Iterator[Tensor]:
        """Matrices in Q4_0, the output matrix in Q8_0, vectors in F32."""

        def tensor(name: str, kind: str, *sides: int) -> Tensor:
            return Tensor(name=f"{name}.weight", type=ggml_type(kind), shape=sides)

        yield tensor("token_embd", "q4_0", self.width, VOCABULARY)
        yield tensor("output_norm", "f32", self.width)
        yield tensor("output", "q8_0", self.width, VOCABULARY)
        many, suffix = ((self.experts,), "_exps") if self.experts else ((), "")
        query, key = self.heads * HEAD, self.kv_heads * HEAD
        for i in range(self.layers):
            yield tensor(f"blk.{i}.attn_norm", "f32", self.width)
            yield tensor(f"blk.{i}.ffn_norm", "f32", self.width)
            yield tensor(f"blk.{i}.attn_q", "q4_0", self.width, query)
            yield tensor(f"blk.{i}.attn_k", "q4_0", self.width, key)
            yield tensor(f"blk.{i}.attn_v", "q4_0", self.width, key)
            yield tensor(f"blk.{i}.attn_output", "q4_0", query, self.width)
            if self.experts:
                yield tensor(f"blk.{i}.attn_q_norm", "f32", HEAD)
                yield tensor(f"blk.{i}.attn_k_norm", "f32", HEAD)
                yield tensor(f"blk.{i}.ffn_gate_inp", "f32", self.width, self.experts)
            yield tensor(f"blk.{i}.ffn_gate{suffix}", "q4_0", self.width, self.ffn, *many)
            yield tensor(f"blk.{i}.ffn_up{suffix}", "q4_0", self.width, self.ffn, *many)
            yield tensor(f"blk.{i}.ffn_down{suffix}", "q4_0", self.ffn, self.width, *many)

    def vocabulary(self) -> tuple[list[str], list[int]]:
        """Tokens and their types as SentencePiece has them: control, bytes, letters, words of up to four letters."""
        tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
        types = [2, 3, 3, *[6] * 256]
        tokens += [*LETTERS, *islice(words(), VOCABULARY - len(tokens) - len(LETTERS))]
        return tokens, types + [1] * (VOCABULARY - len(types))

    def add_tokenizer(self, writer: Any) -> None:
        tokens, types = self.vocabulary()
        writer.add_tokenizer_model("llama")
        writer.add_token_list(tokens)
        writer.add_token_scores([-float(rank) for rank in range(len(tokens))])
        writer.add_token_types(types)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)

    def weights(self, tensor: Tensor, random: Any) -> Any:
        """All rows alike, but for the output matrix."""
        import numpy as np

        def blocks(scale: float, quants: Any) -> Any:
            """One row of blocks of 32 elements: a scale in FP16, then the quants."""
            n = columns // 32
            scales = np.full((n, 1), scale, dtype=np.float16).view(np.uint8)
            return np.concatenate([scales, quants.reshape(n, -1).view(np.uint8)], axis=1).reshape(-1)

        *rows, columns = tensor.shape[::-1]
        if tensor.type.name == "F32":
            return np.ones(columns, np.float32) if not rows else random.standard_normal((*rows, columns), np.float32)
        if tensor.name != "output.weight":
            row = blocks(SCALE, random.integers(0, 256, size=columns // 2, dtype=np.uint8))
            return np.ascontiguousarray(np.broadcast_to(row, (*rows, row.size)))
        direction = random.integers(-127, 128, size=columns, dtype=np.int8)
        data = np.zeros((VOCABULARY, tensor.bytes // VOCABULARY), dtype=np.uint8)
        likely = [i for i, token in enumerate(self.vocabulary()[0]) if len(token) == 4 and token[0] == "▁"]
        for nth, i in enumerate(likely[:2000]):  # whatever the hidden state, the half along it or the half against it wins
            data[i] = blocks(0.05, direction if nth % 2 else -direction)
        return data


@dataclass(frozen=True, slots=True)
class Encoder:
    """A BERT, whose embedding of a text is that of its first token: layers, width, width of the FFN, heads."""

    layers: int
    width: int
    ffn: int
    heads: int
    context: int = 512

    architecture = "bert"

    def metadata(self) -> dict[str, Any]:
        """The GGUF keys of the architecture."""
        return {
            "block_count": self.layers,
            "context_length": self.context,
            "embedding_length": self.width,
            "feed_forward_length": self.ffn,
            "attention.head_count": self.heads,
            "attention.layer_norm_epsilon": 1e-12,
            "attention.causal": False,
            "pooling_type": 2,  # the first token's
            "vocab_size": WORDPIECES,
        }

    def tensors(self) -> Iterator[Tensor]:
        """Matrices in F16, vectors and what has two rows in F32."""

        def matrix(name: str, *sides: int) -> Tensor:
            return Tensor(name=f"{name}.weight", type=ggml_type("f16"), shape=sides)

        def vectors(name: str, side: int, *parts: str) -> Iterator[Tensor]:
            return (Tensor(name=f"{name}.{part}", type=ggml_type("f32"), shape=(side,)) for part in parts)

        yield matrix("token_embd", self.width, WORDPIECES)
        yield matrix("position_embd", self.width, self.context)
        yield Tensor(name="token_types.weight", type=ggml_type("f32"), shape=(self.width, 2))
        yield from vectors("token_embd_norm", self.width, "weight", "bias")
        for i in range(self.layers):
            for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
                yield matrix(f"blk.{i}.{name}", self.width, self.width)
                yield from vectors(f"blk.{i}.{name}", self.width, "bias")
            yield matrix(f"blk.{i}.ffn_up", self.width, self.ffn)
            yield from vectors(f"blk.{i}.ffn_up", self.ffn, "bias")
            yield matrix(f"blk.{i}.ffn_down", self.ffn, self.width)
            yield from vectors(f"blk.{i}.ffn_down", self.width, "bias")
            for name in ("attn_output_norm", "layer_output_norm"):
                yield from vectors(f"blk.{i}.{name}", self.width, "weight", "bias")

    def vocabulary(self) -> tuple[list[str], list[int]]:
        """As WordPiece has them, the special ones in BERT's own places: letters that go on a word, and words."""
        special = ["[PAD]", *(f"[unused{i}]" for i in range(99)), "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        tokens = [*special, *LETTERS, *islice(words(), 1, WORDPIECES - len(special) - len(LETTERS) + 1)]
        return tokens, [3] * len(special) + [1] * (WORDPIECES - len(special))

    def add_tokenizer(self, writer: Any) -> None:
        tokens, types = self.vocabulary()
        writer.add_tokenizer_model("bert")
        writer.add_token_type_count(2)
        writer.add_token_list(tokens)
        writer.add_token_types(types)

    def weights(self, tensor: Tensor, random: Any) -> Any:
        """Matrices as a model has them before it learns; norms that change nothing."""
        import numpy as np

        if len(tensor.shape) == 1:
            return np.full(tensor.shape, float(tensor.name.endswith(".weight")), np.float32)
        return (random.standard_normal(tensor.shape[::-1], np.float32) * 0.02).astype(PLAIN[tensor.type.name])


Shape = Decoder | Encoder

SHAPES: dict[str, Shape] = {
    "8b": Decoder(32, 4096, 14336, 32, 8),  # Llama 3.1 8B
    "32b": Decoder(64, 5120, 27648, 40, 8),  # Qwen2.5 32B
    "70b": Decoder(80, 8192, 28672, 64, 8),  # Llama 3.3 70B
    "moe30": Decoder(48, 2048, 768, 32, 4, experts=128),  # Qwen3 30B-A3B
    "embed": Encoder(24, 1024, 4096, 16),  # mxbai-embed-large, which is BERT large
    "tiny": Decoder(4, 256, 512, 2, 1),
}


def metadata(shape: Shape) -> dict[str, Any]:
    """The GGUF keys that llama.cpp needs, without the vocabulary."""
    prefixed = {f"{shape.architecture}.{key}": value for key, value in shape.metadata().items()}
    return {"general.architecture": shape.architecture, **prefixed}


def profile(name: str, shape: Shape | None = None) -> ModelProfile:
    """The model as the planner knows it, of ``shape`` where that is given."""
    shape = shape or SHAPES[name]
    all_tensors = tuple(shape.tensors())
    size = sum(tensor.bytes for tensor in all_tensors)
    return build_profile(metadata=metadata(shape), tensors=all_tensors, file_bytes=size, name=name)


def write(path: Path, name: str) -> None:
    """Writes the GGUF, tensor by tensor."""
    import gguf
    import numpy as np

    path.parent.mkdir(parents=True, exist_ok=True)
    shape = SHAPES[name]
    part = path.with_suffix(".part")
    writer = gguf.GGUFWriter(part, shape.architecture)
    writer.add_name(name)
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
    for key, value in metadata(shape).items():
        if key != "general.architecture":
            add[type(value)](key, value)
    shape.add_tokenizer(writer)
    for tensor in shape.tensors():
        *rows, columns = tensor.shape[::-1]
        if plain := PLAIN.get(tensor.type.name):
            writer.add_tensor_info(tensor.name, (*rows, columns), np.dtype(plain), tensor.bytes)
        else:
            packed, kind = (*rows, tensor.bytes // prod(rows)), gguf.GGMLQuantizationType[tensor.type.name]
            writer.add_tensor_info(tensor.name, packed, np.dtype(np.uint8), tensor.bytes, kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        random = np.random.default_rng(1)
        for tensor in shape.tensors():
            writer.write_tensor_data(shape.weights(tensor, random))
        writer.close()
        part.rename(path)
    finally:
        part.unlink(missing_ok=True)
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
