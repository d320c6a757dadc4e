"""llama.cpp's graph allocator: how large a compute buffer becomes when tensors of given sizes come and go.

A port of ``ggml_dyn_tallocr`` (``ggml/src/ggml-alloc.c``, llama.cpp b10488): a tensor goes into the smallest hole that holds it
(the last of equal ones), else to the end; neighbouring holes merge; the buffer is as large as the highest byte ever used. The
holes that are left between large tensors are why a buffer can be a third larger than what lives in it at any time.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable

ALIGNMENT = 128
"""Bytes; of CUDA buffers (``ggml_backend_cuda_buffer_type_get_alignment``)."""

_ENDLESS = 1 << 62

RELEASE, ALLOCATE, PART = range(3)
"""Release the tensor in a slot; allocate one; or call what lies behind its first bytes ``SCRATCH`` + its slot."""

SCRATCH = 1 << 20
"""Slots from here on are the scratch memory behind other tensors; a layer has far fewer."""

Step = tuple[int, int, int]
"""An action, the slot of a tensor, and bytes."""

State = tuple[tuple[int, ...], tuple[int, ...]]
"""Offsets and sizes of the holes, lowest first; the last hole is endless."""


def filled(size: int) -> State:
    """The holes of a buffer whose first ``size`` bytes are taken."""
    return (size,), (_ENDLESS - size,)


def align(size: int) -> int:
    """``size`` rounded up to the alignment."""
    return -(-size // ALIGNMENT) * ALIGNMENT


class Allocator:
    """One device's buffer. ``peak`` is the highest byte used so far; sizes must be aligned."""

    __slots__ = ("_empty_holes", "_offsets", "_sizes", "peak")

    def __init__(self, state: State = ((0,), (_ENDLESS,))) -> None:
        self._offsets = list(state[0])
        self._sizes = list(state[1])
        self._empty_holes = 0 in self._sizes
        self.peak = 0

    @property
    def state(self) -> State:
        """The holes, to be compared with another moment's or gone on from."""
        return tuple(self._offsets), tuple(self._sizes)

    def allocate(self, size: int) -> int:
        """Offset of a new tensor of ``size`` bytes."""
        slots: dict[int, int] = {}
        self.replay([(ALLOCATE, 0, size)], slots)
        return slots[0]

    def free(self, offset: int, size: int) -> None:
        """Give back what ``allocate`` gave."""
        self.replay([(RELEASE, 0, size)], {0: offset})

    def replay(self, steps: Iterable[Step], slots: dict[int, int]) -> None:
        """Carry out ``steps``; ``slots`` holds the offset of each living tensor by its number, and is changed.

        ``ggml_dyn_tallocr_alloc`` and ``ggml_dyn_tallocr_free_bytes`` in one loop, which a plan goes through a thousand times. A
        tensor of no bytes, which hybrid models have, may leave an empty hole; neighbours of such a hole no longer join.
        """
        offsets, sizes = self._offsets, self._sizes
        for action, slot, size in steps:
            if action == RELEASE:
                offset = slots.pop(slot)
                if not size or self._empty_holes:
                    self._free_beside_empty_holes(offset, size)
                    continue
                i = bisect_left(offsets, offset)
                joins_above = i < len(offsets) and offset + size == offsets[i]
                if i and offsets[i - 1] + sizes[i - 1] == offset:
                    sizes[i - 1] += size
                    if joins_above:
                        sizes[i - 1] += sizes[i]
                        del offsets[i], sizes[i]
                elif joins_above:
                    offsets[i] = offset
                    sizes[i] += size
                else:
                    offsets.insert(i, offset)
                    sizes.insert(i, size)
            elif action == ALLOCATE:
                best, best_size = -1, _ENDLESS
                for i, hole in enumerate(sizes):
                    if size <= hole <= best_size:
                        best, best_size = i, hole
                slots[slot] = offset = offsets[best]
                if best_size == size:
                    del offsets[best], sizes[best]
                    self._empty_holes = self._empty_holes and 0 in sizes
                else:
                    offsets[best] += size
                    sizes[best] -= size
                if offset + size > self.peak:
                    self.peak = offset + size
            else:
                slots[SCRATCH + slot] = slots[slot] + size

    def _free_beside_empty_holes(self, offset: int, size: int) -> None:
        """``ggml_dyn_tallocr_free_bytes``, line by line: it joins the first hole that fits, and that with one neighbour."""
        offsets, sizes = self._offsets, self._sizes
        for i in range(len(offsets)):
            if offsets[i] + sizes[i] == offset:
                sizes[i] += size
                if i + 1 < len(offsets) and offsets[i] + sizes[i] == offsets[i + 1]:
                    sizes[i] += sizes[i + 1]
                    del offsets[i + 1], sizes[i + 1]
                break
            if offset + size == offsets[i]:
                offsets[i] = offset
                sizes[i] += size
                if i and offsets[i - 1] + sizes[i - 1] == offset:
                    sizes[i - 1] += sizes[i]
                    del offsets[i], sizes[i]
                break
        else:
            i = bisect_left(offsets, offset)
            offsets.insert(i, offset)
            sizes.insert(i, size)
        self._empty_holes = 0 in sizes
