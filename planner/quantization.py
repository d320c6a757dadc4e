"""GGML tensor types: how many bytes a tensor of each type takes.

Block and byte sizes are those of ``type_traits`` in ``ggml/src/ggml.c`` (llama.cpp b10488); the numbers are the ids that a
GGUF file stores (``enum ggml_type`` in ``ggml/include/ggml.h``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod


@dataclass(frozen=True, slots=True)
class GgmlType:
    """A tensor's element type: ``block_size`` elements are stored in ``block_bytes`` bytes."""

    number: int
    name: str
    block_size: int
    block_bytes: int

    def tensor_bytes(self, shape: Sequence[int]) -> int:
        """Bytes of a tensor with this type; ``shape`` is in GGML's order, the contiguous dimension first.

        Raises ``ValueError`` where rows do not end on a block's border, as GGML refuses them.
        """
        if shape and shape[0] % self.block_size:
            raise ValueError(f"a row of {shape[0]} elements is not a whole number of {self.name} blocks of {self.block_size}")
        return prod(shape) // self.block_size * self.block_bytes

    def row_bytes(self, elements: int) -> int:
        """Bytes of one row of ``elements`` elements."""
        return self.tensor_bytes((elements,))


_TYPES = (
    GgmlType(0, "F32", 1, 4),
    GgmlType(1, "F16", 1, 2),
    GgmlType(2, "Q4_0", 32, 18),
    GgmlType(3, "Q4_1", 32, 20),
    GgmlType(6, "Q5_0", 32, 22),
    GgmlType(7, "Q5_1", 32, 24),
    GgmlType(8, "Q8_0", 32, 34),
    GgmlType(9, "Q8_1", 32, 36),
    GgmlType(10, "Q2_K", 256, 84),
    GgmlType(11, "Q3_K", 256, 110),
    GgmlType(12, "Q4_K", 256, 144),
    GgmlType(13, "Q5_K", 256, 176),
    GgmlType(14, "Q6_K", 256, 210),
    GgmlType(15, "Q8_K", 256, 292),
    GgmlType(16, "IQ2_XXS", 256, 66),
    GgmlType(17, "IQ2_XS", 256, 74),
    GgmlType(18, "IQ3_XXS", 256, 98),
    GgmlType(19, "IQ1_S", 256, 50),
    GgmlType(20, "IQ4_NL", 32, 18),
    GgmlType(21, "IQ3_S", 256, 110),
    GgmlType(22, "IQ2_S", 256, 82),
    GgmlType(23, "IQ4_XS", 256, 136),
    GgmlType(24, "I8", 1, 1),
    GgmlType(25, "I16", 1, 2),
    GgmlType(26, "I32", 1, 4),
    GgmlType(27, "I64", 1, 8),
    GgmlType(28, "F64", 1, 8),
    GgmlType(29, "IQ1_M", 256, 56),
    GgmlType(30, "BF16", 1, 2),
    GgmlType(34, "TQ1_0", 256, 54),
    GgmlType(35, "TQ2_0", 256, 66),
    GgmlType(39, "MXFP4", 32, 17),
    GgmlType(40, "NVFP4", 64, 36),
    GgmlType(41, "Q1_0", 128, 18),
    GgmlType(42, "Q2_0", 64, 18),
)

BY_NUMBER = {t.number: t for t in _TYPES}
BY_NAME = {t.name: t for t in _TYPES}

CACHE_TYPE_NAMES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")
"""What ``--cache-type-k`` and ``--cache-type-v`` take (``common/arg.cpp``, ``kv_cache_types``)."""


def ggml_type(name: str) -> GgmlType:
    """The type called ``name``, in any case. Raises ``ValueError`` for a name that GGML does not have."""
    try:
        return BY_NAME[name.upper()]
    except KeyError:
        raise ValueError(f"unknown GGML type {name!r}") from None
