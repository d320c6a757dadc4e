"""The models of the demo: real shapes, read from GGUF headers that lie beside this file (header and tensor table, no weights)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from planner.profile import ModelProfile, Scalar, Tensor, build_profile
from planner.quantization import ggml_type
from proxy.models.gguf import read_profile
from proxy.simulator.store import Model, build_model

HERE = Path(__file__).parent
MADE_NS = 1_767_225_600 * 10**9
"""When the demo's store was filled: the first second of 2026, in nanoseconds since 1970."""
CHATML = (
    "{{- if .Tools }}{{ .Tools }}{{ end }}{{- range .Messages }}<|im_start|>{{ .Role }}\n"
    "{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n"
)
WITH_TOOLS = ("completion", "tools")


@dataclass(frozen=True, kw_only=True, slots=True)
class Header:
    """A name in Ollama's library, and the header of its default file.

    ``file_type`` is the ``general.file_type`` of the real file where the header, written anew, says something else.
    """

    file: str
    file_type: int | None = None
    capabilities: tuple[str, ...] = WITH_TOOLS


HEADERS = {
    "qwen3:0.6b": Header(file="qwen3-0.6b-q8.gguf", file_type=7),
    "llama3.1:8b": Header(file="llama3.1-8b-q4km.gguf"),
    "phi4:14b": Header(file="phi4-14b-q4km.gguf", capabilities=("completion",)),
    "gpt-oss:20b": Header(file="gpt-oss-20b.gguf", file_type=38),
    "mistral-small:24b": Header(file="mistral-small-24b-q4km.gguf"),
    "gemma2:27b": Header(file="gemma2-27b-q4km.gguf", capabilities=("completion",)),
    "gemma3:27b": Header(file="gemma3-27b-q4km.gguf", capabilities=("completion",)),
    "qwen2.5:32b": Header(file="qwen2.5-32b-q4km.gguf"),
    "qwen3:30b-a3b": Header(file="qwen3-30b-a3b-q4km.gguf"),
    "llama3.3:70b": Header(file="llama3.3-70b-q4km.gguf"),
}
EMBEDDER = "all-minilm:22m"


def demo_models(names: Iterable[str] = (*HEADERS, EMBEDDER)) -> tuple[Model, ...]:
    """The models of those ``names``. Raises ``KeyError`` for one that is not there."""
    return tuple(_embedder() if name == EMBEDDER else _from_header(name, HEADERS[name]) for name in names)


def _from_header(name: str, header: Header) -> Model:
    profile = read_profile(HERE / header.file)
    if header.file_type is not None:
        profile = replace(profile, metadata={**profile.metadata, "general.file_type": header.file_type})
    return build_model(
        name,
        profile,
        modified_ns=MADE_NS,
        template=CHATML,
        parameters={"stop": ["<|im_start|>", "<|im_end|>"]},
        capabilities=header.capabilities,
    )


def _embedder() -> Model:
    return build_model(EMBEDDER, _minilm(), modified_ns=MADE_NS, capabilities=("embedding",))


def _minilm() -> ModelProfile:
    """all-MiniLM-L6, a BERT in half precision."""
    n_layers, width, ffn, vocab, context = 6, 384, 1536, 30522, 512
    half, single = ggml_type("f16"), ggml_type("f32")
    metadata: dict[str, Scalar | tuple[Scalar, ...]] = {
        "general.architecture": "bert",
        "general.file_type": 1,
        "bert.attention.causal": False,
        "bert.attention.head_count": 12,
        "bert.block_count": n_layers,
        "bert.context_length": context,
        "bert.embedding_length": width,
        "bert.feed_forward_length": ffn,
        "bert.pooling_type": 1,
    }
    tensors = [
        Tensor(name="token_embd.weight", type=half, shape=(width, vocab)),
        Tensor(name="position_embd.weight", type=half, shape=(width, context)),
        Tensor(name="token_types.weight", type=single, shape=(width, 2)),
    ]
    for layer in range(n_layers):
        shapes = {f"attn_{part}": (width, width) for part in ("q", "k", "v", "output")}
        shapes |= {"ffn_up": (width, ffn), "ffn_down": (ffn, width)}
        tensors += [Tensor(name=f"blk.{layer}.{name}.weight", type=half, shape=shape) for name, shape in shapes.items()]
    file_bytes = sum(tensor.bytes for tensor in tensors)
    return build_profile(metadata=metadata, tensors=tensors, file_bytes=file_bytes, name="all-MiniLM-L6-v2")
