"""What CUDA itself takes on a GPU, beside llama.cpp's buffers."""

from __future__ import annotations

from planner.hardware import Gpu

MIB = 2**20

CUDA_CONTEXT_BYTES = 527 * MIB
"""A process's CUDA context on each GPU that it sees, used or not. Measured by NVML on an H200 (132 SMs, driver 580, CUDA 13)
with llama-server b10488 loaded on the other GPU (benchmarks/gpu); smaller cards take less."""

CUDA_WORKSPACE_BYTES = 160 * MIB
"""cuBLAS handle, its workspace and the buffer pool on a GPU that computes: 72 MiB after the load, 83 to 153 MiB after prompts of
2048 tokens, dense and MoE, micro-batches of 512 and 2048. Measured as above: NVML's use less buffers less context."""


def context_bytes(gpu: Gpu) -> int:
    """Bytes that a process takes on ``gpu`` before it allocates anything; 0 for libraries other than CUDA: not known."""
    return CUDA_CONTEXT_BYTES if gpu.library == "CUDA" else 0


def runtime_bytes(gpu: Gpu) -> int:
    """Bytes on a GPU that computes, beside llama.cpp's buffers: context and workspaces."""
    return context_bytes(gpu) + CUDA_WORKSPACE_BYTES
