"""A layer's tensors in the order in which llama.cpp computes them, and when each one's memory is free again.

``Tape`` records operations: bytes of the result, what it reads, and whose memory it may take over. ``compile`` turns them into
allocations and releases by ``ggml_gallocr_alloc_graph_impl`` (``ggml/src/ggml-alloc.c``, llama.cpp b10488): a tensor lives until
its last reader has run; an element-wise result takes over the memory of an operand that nobody else will read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping

from planner.allocator import Step, align


class Tape:
    """Records operations. Tensors are numbered from 0; negative numbers are the caller's, which live when the tape begins."""

    def __init__(self) -> None:
        self._operations: list[tuple[int, tuple[int, ...], tuple[int, ...]]] = []

    def op(self, size: int, *reads: int, into: tuple[int, ...] = ()) -> int:
        """A result of ``size`` bytes that reads tensors, and may take over the memory of the first fit in ``into``."""
        self._operations.append((align(size), reads, into))
        return len(self._operations) - 1

    def size(self, tensor: int) -> int:
        """Bytes of a tensor that was recorded here."""
        return self._operations[tensor][0]

    def use(self, *reads: int) -> None:
        """An operation whose result needs no memory here: it writes to a cache, or somewhere else."""
        self._operations.append((0, reads, ()))

    def compile(
        self, exports: Mapping[int, int], *, sizes: Mapping[int, int], kept: Collection[int] = ()
    ) -> tuple[tuple[Step, ...], tuple[tuple[int, int], ...]]:
        """Steps, and ``(name, slot)`` of each exported tensor: those outlive the tape, under the caller's names.

        ``exports``: name -> tensor. ``sizes``: bytes of the caller's tensors; those in ``kept`` are never released or taken over.
        """
        size_of = dict(sizes)
        readers: Counter[int] = Counter(read for _, reads, _ in self._operations for read in reads)
        readers.update(exports.values())
        slot: dict[int, int] = {number: number for number in size_of}
        steps: list[Step] = []
        for number, (size, reads, into) in enumerate(self._operations):
            if size:
                size_of[number] = size
                taken = next((t for t in into if t in slot and t not in kept and readers[t] == 1 and size_of[t] == size), None)
                if taken is None:
                    slot[number] = number
                    steps.append((True, number, size))
                else:
                    slot[number] = slot.pop(taken)
            for read in reads:
                readers[read] -= 1
                if not readers[read] and read in slot and read not in kept:
                    steps.append((False, slot.pop(read), size_of[read]))
        return tuple(steps), tuple((name, slot[tensor]) for name, tensor in exports.items())
