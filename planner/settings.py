"""How a model is loaded: context, batch, cache types, as llama-server's flags have it."""

from __future__ import annotations

from dataclasses import dataclass

from planner.quantization import CACHE_TYPE_NAMES


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadSettings:
    """What a load is asked for, as llama-server's flags have it.

    ``num_ctx`` is the context of one sequence in tokens; ``-c`` is ``num_ctx · parallel``. ``batch`` and ``ubatch`` are
    ``-b`` and ``-ub`` in tokens. Cache types are names from ``quantization.CACHE_TYPE_NAMES``.

    ``outputs`` is the number of tokens of a micro-batch for which logits are reserved. llama-server b10488 reserves one for
    each sequence (``server_output_limits`` in ``tools/server/server-context.cpp``): set it to ``parallel``. ``None`` means
    every token: what ``llama-fit-params``, embedding models and earlier releases reserve, and never too little.
    """

    num_ctx: int = 4096
    parallel: int = 1
    batch: int = 512
    ubatch: int = 512
    kv_type_k: str = "f16"
    kv_type_v: str = "f16"
    flash_attention: bool = True
    outputs: int | None = None

    def __post_init__(self) -> None:
        if min(self.num_ctx, self.parallel, self.batch, self.ubatch, self.outputs or 1) < 1:
            raise ValueError(f"context, parallel, batch, micro-batch and outputs must be at least 1: {self}")
        for name in (self.kv_type_k, self.kv_type_v):
            if name.lower() not in CACHE_TYPE_NAMES:
                raise ValueError(f"cache type {name!r} is none of {', '.join(CACHE_TYPE_NAMES)}")

    @property
    def total_ctx(self) -> int:
        """Tokens of all sequences together: llama-server's ``-c``."""
        return self.num_ctx * self.parallel
