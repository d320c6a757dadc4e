"""Telling a load that failed for memory from every other error, by the text of Ollama's answer, here and nowhere else."""

from __future__ import annotations

OUT_OF_MEMORY = (
    "out of memory",  # cudaMalloc failed, hipMalloc failed, CUDA error: llama-server and the runner quote ggml's line
    "unable to allocate",  # error loading model: unable to allocate CUDA0 buffer
    "failed to allocate",  # ggml_gallocr_reserve_n_impl: failed to allocate CUDA0 buffer of size 253796864
    "erroroutofdevicememory",  # Vulkan: vk::Device::allocateMemory: ErrorOutOfDeviceMemory
    "memory layout cannot be allocated",  # runner era, when num_gpu asks for more than fits (llm/server.go)
    "requires more system memory",  # model requires more system memory (12.1 GiB) than is available (8.0 GiB)
    "insufficient memory",
)
"""Parts of such texts, in lower case."""

TEXT_LIMIT_BYTES = 64 * 1024
"""An error text of Ollama is far shorter: it quotes the last lines of llama-server's log."""


def is_out_of_memory(status: int, text: str) -> bool:
    """Whether an answer says that a model could not be loaded because a device's, or the host's, memory was too small."""
    lowered = text.lower()
    return status == 500 and any(part in lowered for part in OUT_OF_MEMORY)
