"""A layer's tensors in the order in which llama.cpp computes them, and when each one's memory is free again.

``Tape`` records operations: bytes of the result, what it reads, and whose memory it may take over. ``compile`` turns them into
allocations and releases by ``ggml_gallocr_alloc_graph_impl`` (``ggml/src/ggml-alloc.c``, llama.cpp b10488): a tensor lives until
its last reader has run; an element-wise result takes over the memory of an operand that nobody else will read.

Only attention sees the cache, and what it makes grows in proportion to the cells. So a tape is recorded and compiled once for
all contexts; ``Program.at`` fills in the cells.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from planner.allocator import ALLOCATE, PART, RELEASE, SCRATCH, Step, align

Growth = tuple[int, int]
"""Bytes for each cell of the cache, and for each cell of the windows' cache."""

STEADY: Growth = (0, 0)
"""The growth of a tensor that no context changes."""

Size = tuple[int, Growth]
"""Bytes of a tensor: those of any context, and those that grow with it."""


NOTHING: Size = (0, STEADY)
"""The size of what takes no memory."""


def size_at(size: Size, cells: int, window_cells: int) -> int:
    """Bytes, aligned, of a tensor with so many cells."""
    fixed, (per_cell, per_window_cell) = size
    return align(fixed + per_cell * cells + per_window_cell * window_cells)


@dataclass(frozen=True, eq=False, slots=True)
class Program:
    """A compiled tape. Two are equal only if they are the same.

    * ``steps``: as if there were no cells.
    * ``growing``: places in ``steps`` where the size grows, with the whole size.
    * ``exports``: afterwards the tensor in slot ``source`` is known as ``name``, for each ``(name, source)``.
    """

    steps: tuple[Step, ...]
    growing: tuple[tuple[int, Size], ...]
    exports: tuple[tuple[int, int], ...]

    def at(self, cells: int, window_cells: int) -> tuple[Step, ...]:
        """The steps with so many cells in the cache, and in that of windowed layers."""
        if not self.growing:
            return self.steps
        steps = list(self.steps)
        for place, size in self.growing:
            action, slot, _ = steps[place]
            steps[place] = action, slot, size_at(size, cells, window_cells)
        return tuple(steps)


Operation = tuple[Size, tuple[int, ...], tuple[int, ...]]
"""Bytes of a result, what it reads, and whose memory it may take over."""


class Tape:
    """Records operations. Tensors are numbered from 0; negative numbers are the caller's, which live when the tape begins."""

    def __init__(self) -> None:
        self._operations: list[Operation] = []
        self._readers: dict[int, int] = {}
        self._scratch: dict[int, Growth] = {}
        self._given: set[int] = set()
        self._empty: set[int] = set()
        self._arrivals: list[tuple[int, tuple[int, ...] | None, tuple[int, ...]]] = []

    def op(self, size: int, *reads: int, into: tuple[int, ...] = (), growth: Growth = STEADY, scratch: Growth = STEADY) -> int:
        """A result of ``size`` bytes and its ``growth`` that reads tensors, and may take over the memory of one in ``into``.

        It takes that of the first which is as large and has no other reader. ``scratch``: memory behind the result, which
        nobody takes over (``ggml_gallocr_free_extra_space``).
        """
        number = self._record((align(size), growth), reads, into)
        if scratch != STEADY:
            self._scratch[number] = scratch
        return number

    def _record(self, size: Size, reads: tuple[int, ...], into: tuple[int, ...] = ()) -> int:
        readers = self._readers
        for read in reads:
            readers[read] = readers.get(read, 0) + 1
        self._operations.append((size, reads, into))
        return len(self._operations) - 1

    def given(self, size: int) -> int:
        """A tensor of ``size`` bytes that comes from another device and lies elsewhere: nothing is allocated, or taken over."""
        self._given.add(self.op(size))
        return len(self._operations) - 1

    def empty(self, *reads: int) -> int:
        """A result of no bytes, which is allocated all the same."""
        self._empty.add(self.op(0, *reads))
        return len(self._operations) - 1

    def in_place(self, tensor: int, *others: int) -> int:
        """A result as large as ``tensor``, which takes over its memory unless that has other readers."""
        return self._record(self._operations[tensor][0], (tensor, *others), (tensor,))

    def size(self, tensor: int) -> int:
        """Bytes of a tensor that was recorded here, its growth left out."""
        return self._operations[tensor][0][0]

    def use(self, *reads: int) -> None:
        """An operation whose result needs no memory here: it writes to a cache, or somewhere else."""
        self._record(NOTHING, reads)

    def arrives(self, name: int) -> None:
        """Here the caller's tensor ``name`` is copied to the device, if the tape is compiled to bring it."""
        self._arrivals.append((len(self._operations), (name,), ()))

    def rest_arrives(self, *, but: tuple[int, ...] = ()) -> None:
        """Here all are that the tape is compiled to bring and that have not arrived, ``but`` for these."""
        self._arrivals.append((len(self._operations), None, but))

    def names(self) -> frozenset[int]:
        """The caller's tensors that are read here."""
        return frozenset(read for read in self._readers if read < 0)

    def compile(
        self,
        exports: Mapping[int, int],
        *,
        sizes: Mapping[int, Size],
        kept: Collection[int] = (),
        brings: tuple[int, ...] = (),
    ) -> Program:
        """The steps of the recorded operations; the exported tensors outlive them, under the caller's names.

        ``exports``: name -> tensor. ``sizes``: bytes of the caller's tensors; those in ``kept`` are never released or taken over.
        ``brings``: those that are copied to the device within the tape, and exported.
        """
        operations: Iterable[tuple[int, Operation]] = enumerate(self._operations)
        readers, empty = self._readers.copy(), self._empty
        if brings:
            operations, brought = self._with_arrivals(brings, sizes, readers)
            exports = {**exports, **brought}
            empty = empty | {number for name, number in brought.items() if sizes[name] == NOTHING}
        size_of = dict(sizes)
        slot = {name: name for name in sizes}
        for tensor in exports.values():
            readers[tensor] = readers.get(tensor, 0) + 1
        steps: list[Step] = []
        growing: list[tuple[int, Size]] = []

        def step(action: int, place: int, size: Size) -> None:
            if size[1] != STEADY:
                growing.append((len(steps), size))
            steps.append((action, place, size[0]))

        for number, (size, reads, into) in operations:
            if size != NOTHING or number in empty:
                size_of[number] = size
                for taken in into:
                    if readers[taken] == 1 and taken in slot and taken not in kept and size_of[taken] == size:
                        slot[number] = slot.pop(taken)
                        if taken in self._scratch:
                            step(RELEASE, SCRATCH + taken, (0, self._scratch[taken]))
                        break
                else:
                    if number not in self._given:
                        slot[number] = number
                        if number in self._scratch:
                            scratch = self._scratch[number]
                            step(ALLOCATE, number, (size[0], (size[1][0] + scratch[0], size[1][1] + scratch[1])))
                            step(PART, number, size)
                        else:
                            step(ALLOCATE, number, size)
            for read in reads:
                readers[read] -= 1
                if not readers[read] and read in slot and read not in kept:
                    step(RELEASE, slot.pop(read), size_of[read])
                    if read in self._scratch:
                        step(RELEASE, SCRATCH + read, (0, self._scratch[read]))
        return Program(tuple(steps), tuple(growing), tuple((name, slot[tensor]) for name, tensor in exports.items()))

    def _with_arrivals(
        self, brings: tuple[int, ...], sizes: Mapping[int, Size], readers: dict[int, int]
    ) -> tuple[list[tuple[int, Operation]], dict[int, int]]:
        """The operations, numbered, with the copies of what is brought among them; and which tensors those are.

        ``readers`` of a name, counted before, become those of its copy where they come after it.
        """
        found: list[tuple[int, Operation]] = []
        brought: dict[int, int] = {}
        done = 0
        for place, names, but in (*self._arrivals, (len(self._operations), None, ())):
            for number, operation in enumerate(self._operations[done:place], done):
                if brought and not brought.keys().isdisjoint(operation[1]):
                    size, reads, into = operation
                    for read in brought.keys() & reads:
                        readers[read] -= reads.count(read)
                        readers[brought[read]] = readers.get(brought[read], 0) + reads.count(read)
                    operation = size, tuple(brought.get(read, read) for read in reads), into
                found.append((number, operation))
            done = place
            for name in brings if names is None else names:
                if name in brings and name not in brought and name not in but:
                    brought[name] = len(self._operations) + len(brought)
                    found.append((brought[name], (sizes[name], (), ())))
        return found, brought
