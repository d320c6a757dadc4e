"""Models and rigs for the planner's tests: real shapes from the header files, and small made-up ones."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

from planner.hardware import Gpu, Host, Rig
from planner.profile import ModelProfile, Tensor, build_profile
from planner.quantization import ggml_type
from planner.units import GIB, MIB
from proxy.models.gguf import read_profile

HEADERS = Path(__file__).parents[1] / "data" / "gguf"


@cache
def header(name: str) -> ModelProfile:
    """The profile of one of the header files."""
    return read_profile(HEADERS / f"{name}.gguf")


@cache
def quantized(name: str, type_name: str) -> ModelProfile:
    """The same with every matrix in one type: ``q4_0`` for the measured models."""
    profile = header(name)
    kind = ggml_type(type_name)
    tensors = [replace(tensor, type=kind) if len(tensor.shape) > 1 else tensor for tensor in profile.tensors]
    size = sum(tensor.bytes for tensor in tensors)
    return build_profile(metadata=profile.metadata, tensors=tensors, file_bytes=size, name=name)


def small(
    *, n_layers: int, width: int = 512, ffn: tuple[int, ...] = (2048,), vocabulary: int = 4096, experts: int = 0
) -> ModelProfile:
    """A made-up llama; ``ffn`` widths are used in turn, so that layers differ. With ``experts``, two of them are used."""
    q8, f32 = ggml_type("q8_0"), ggml_type("f32")
    tensors = [Tensor(name="token_embd.weight", type=q8, shape=(width, vocabulary))]
    for i in range(n_layers):
        inner = ffn[i % len(ffn)]
        matrices = {
            "attn_q": (width, width),
            "attn_k": (width, width // 2),
            "attn_v": (width, width // 2),
            "attn_output": (width, width),
        }
        if experts:
            matrices |= {"ffn_gate_exps": (width, inner, experts), "ffn_up_exps": (width, inner, experts)}
            matrices |= {"ffn_down_exps": (inner, width, experts)}
            tensors.append(Tensor(name=f"blk.{i}.ffn_gate_inp.weight", type=f32, shape=(width, experts)))
        else:
            matrices |= {"ffn_gate": (width, inner), "ffn_up": (width, inner), "ffn_down": (inner, width)}
        tensors += [Tensor(name=f"blk.{i}.{name}.weight", type=q8, shape=shape) for name, shape in matrices.items()]
        tensors += [Tensor(name=f"blk.{i}.{name}.weight", type=f32, shape=(width,)) for name in ("attn_norm", "ffn_norm")]
    tensors += [
        Tensor(name="output_norm.weight", type=f32, shape=(width,)),
        Tensor(name="output.weight", type=q8, shape=(width, vocabulary)),
    ]
    architecture = "qwen3moe" if experts else "llama"
    metadata = {
        "general.architecture": architecture,
        f"{architecture}.block_count": n_layers,
        f"{architecture}.context_length": 131072,
        f"{architecture}.embedding_length": width,
        f"{architecture}.feed_forward_length": max(ffn),
        f"{architecture}.attention.head_count": width // 64,
        f"{architecture}.attention.head_count_kv": width // 128,
        f"{architecture}.attention.key_length": 64,
        f"{architecture}.attention.value_length": 64,
    }
    if experts:
        metadata |= {f"{architecture}.expert_count": experts, f"{architecture}.expert_used_count": 2}
    return build_profile(metadata=metadata, tensors=tensors, file_bytes=sum(tensor.bytes for tensor in tensors), name="small")


def gpu(
    name: str,
    free_mib: int,
    *,
    total_mib: int | None = None,
    gb_per_s: float | None = 1000,
    capability: tuple[int, int] | None = (8, 6),
    sm_count: int | None = 80,
    clock_mhz: int | None = 1700,
    integrated: bool = False,
    library: str = "CUDA",
) -> Gpu:
    """A GPU with so much free memory."""
    return Gpu(
        uuid=f"GPU-{name}",
        name=name,
        total_bytes=(total_mib or free_mib) * MIB,
        free_bytes=free_mib * MIB,
        compute_capability=capability,
        sm_count=sm_count,
        clock_mhz=clock_mhz,
        bandwidth_bytes_per_s=None if gb_per_s is None else int(gb_per_s * 1e9),
        pcie_generation=4,
        pcie_width=16,
        integrated=integrated,
        library=library,
    )


def rtx5090(free_mib: int = 31500) -> Gpu:
    """170 SMs × 2407 MHz, 1792 GB/s."""
    return gpu("RTX 5090", free_mib, total_mib=32607, gb_per_s=1792, capability=(12, 0), sm_count=170, clock_mhz=2407)


def rtx3090(free_mib: int = 23700) -> Gpu:
    """82 SMs × 1695 MHz, 936 GB/s."""
    return gpu("RTX 3090", free_mib, total_mib=24576, gb_per_s=936, sm_count=82, clock_mhz=1695)


def rig(*gpus: Gpu, ram_gib: int = 128) -> Rig:
    """A machine with these GPUs, in Ollama's order."""
    return Rig(gpus=gpus, host=Host(total_bytes=ram_gib * GIB, free_bytes=ram_gib * GIB))
