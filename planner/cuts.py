"""Where to cut the layers of a model for GPUs in a row, so that a token takes the least time: dynamic programming.

llama.cpp gives each device one run of layers. In a given order of devices, what a run costs is linear in the bytes that it reads
and in its layers, and only the memory of its device limits it. The devices are gone through from the last (which has the output
layer) to the first; what is known of those behind is the best time for each layer at which they begin. Where the first device has
to take all that is left, the device after it takes either all it can or as little as it must: nothing between can be faster,
unless one of the two is the faster one for some layers and the other for others.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, permutations
from math import inf
from typing import Literal

from planner.speed import HOP_SECONDS

EXACT_GPUS = 3
"""GPUs up to which every order and every cut is looked at: more would take longer than a plan may. So few are all used (the last
may hold the output layer alone), since compute buffers depend on how many there are: subsets are problems of their own."""

SLACK_LAYERS = 2
"""Layers by which a device may stay below its limit, where not every cut is looked at."""

FEW_LAYERS = 2
"""Layers from which on a device's compute buffer no longer grows: with fewer, some of the largest tensors are missing."""

Role = Literal["first", "middle", "last"]
ROLES: tuple[Role, ...] = ("first", "middle", "last")
"""A device's place in the order, which its compute buffer hangs on: hidden states come in, pass through, or become logits."""


def few(layers: int) -> int:
    """``layers``, or ``FEW_LAYERS`` where there are more."""
    return min(layers, FEW_LAYERS)


def role(position: int, count: int) -> Role:
    """The role of the device at ``position`` of ``count``; a device alone is the last."""
    return "last" if position == count - 1 else "first" if position == 0 else "middle"


@dataclass(frozen=True, slots=True)
class Split:
    """``counts``: ``(gpu, layers)`` of each device, lowest layers first; the last has the output layer. ``seconds`` a token."""

    seconds: float
    counts: tuple[tuple[int, int], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """What is to be cut. ``held`` and ``read`` are prefix sums over the layers, in bytes.

    ``inverse`` is in seconds per byte, ``layer_s`` in seconds per layer beside its bytes, ``rooms`` in bytes without the compute
    buffer, all by GPU. ``buffers``: bytes of compute buffer by GPU, role and ``few``. ``host``: seconds per byte and per layer in
    RAM, where the lowest layers stay there, else ``None``.
    """

    held: Sequence[float]
    read: Sequence[float]
    inverse: Mapping[int, float]
    layer_s: Mapping[int, float]
    rooms: Mapping[int, int]
    buffers: Mapping[tuple[int, Role, int], int]
    output_held: int
    output_read: int
    host: tuple[float, float] | None

    def solve(self) -> Split | None:
        """The fastest split over every order that is looked at; ``None`` where nothing fits. Equal: the lower GPUs first."""
        best: Split | None = None
        for order in self._orders():
            split = self._best(order, best.seconds if best else inf)
            if split and (best is None or (split.seconds, split.counts) < (best.seconds, best.counts)):
                best = split
        return best

    @property
    def _exact(self) -> bool:
        return len(self.rooms) <= EXACT_GPUS

    def _orders(self) -> Iterator[tuple[int, ...]]:
        ranked = sorted(self.rooms, key=lambda gpu: (-self.inverse[gpu], self.rooms[gpu], -gpu))
        if self._exact:
            yield from permutations(ranked)
        else:
            for gpu in reversed(ranked):
                yield (*(other for other in ranked if other != gpu), gpu)

    def _rooms(self, order: Sequence[int], position: int) -> list[int]:
        """Bytes for layers on the device at ``position``, by ``few``."""
        gpu, place = order[position], role(position, len(order))
        room = self.rooms[gpu] - (self.output_held if place == "last" else 0)
        return [room - self.buffers[gpu, place, layers] for layers in range(FEW_LAYERS + 1)]

    def _best(self, order: tuple[int, ...], bound: float) -> Split | None:
        """The fastest cuts for ``order``, if they take no more than ``bound`` seconds.

        ``states``: seconds and layers of the devices behind, by the layer where they begin.
        """
        held, read, last = self.held, self.read, len(order) - 1
        rooms = [self._rooms(order, position) for position in range(len(order))]
        if rooms[last][0] < 0:
            return None
        costs = [(self.inverse[gpu], self.layer_s[gpu]) for gpu in order]
        before = [costs[0] if self.host is None else self.host, *costs]
        states: dict[int, tuple[float, tuple[int, ...]]] = {len(held) - 1: (0.0, ())}
        for position in range(last, -1, -1):
            (inverse, layer_s), room = costs[position], rooms[position]
            output = self.output_read * inverse if position == last else 0.0
            hop = HOP_SECONDS if position < last else 0.0
            under = self._most(rooms[0]) if position == 1 and self.host is None else None
            extremes = position == (self.host is None) and self._one_is_faster(costs[position], before[0])
            quickest, quickest_layer = (min(cost) for cost in zip(*before[: position + 2], strict=True))
            some = self._exact and position < last
            least = position * self._exact + (self.host is not None)
            fills = self._exact and self.host is not None and self._each_faster(before[: position + 2]) and position < 2
            following: dict[int, tuple[float, tuple[int, ...]]] = {}
            for end, (seconds, counts) in states.items():
                if seconds + read[end] * quickest + end * quickest_layer > bound:
                    continue
                lowest, until, before_it = max(self._lowest(end, room), least), read[end], seconds + output
                highest = end - some
                if fills and lowest <= highest and (not position or self._lowest(lowest, rooms[0]) < lowest):
                    highest = lowest  # nothing that the device leaves is as fast elsewhere
                for start in self._starts(lowest, highest, position, under, extremes):
                    cost = before_it + (until - read[start]) * inverse + (end - start) * layer_s
                    if start < end:
                        cost += hop
                    known = following.get(start)
                    if known is None or cost < known[0]:
                        following[start] = (cost, (end - start, *counts))
            states = following
        ends = ((seconds + self._rest(start), start, counts) for start, (seconds, counts) in states.items())
        best = min((end for end in ends if bool(end[1]) == (self.host is not None)), default=None)
        return Split(best[0], tuple(zip(order, best[2], strict=True))) if best else None

    def _lowest(self, end: int, rooms: Sequence[int]) -> int:
        """The lowest layer that a device with ``rooms`` can take together with all others below ``end``."""
        held, room = self.held, rooms[FEW_LAYERS]
        lowest = bisect_left(held, held[end] - room, 0, end) if room > 0 else end
        if end - lowest >= FEW_LAYERS:
            return lowest
        for start in range(max(end - FEW_LAYERS + 1, 0), end):
            if held[end] - held[start] <= rooms[end - start]:
                return start
        return end

    def _most(self, rooms: Sequence[int]) -> int:
        """How many of the lowest layers a device with ``rooms`` can take."""
        most = bisect_right(self.held, rooms[FEW_LAYERS]) - 1
        short = (count for count in range(min(FEW_LAYERS, len(self.held)) - 1, 0, -1) if self.held[count] <= rooms[count])
        return next(short, 0) if most < FEW_LAYERS else most

    def _starts(self, lowest: int, highest: int, position: int, under: int | None, extremes: bool) -> Iterable[int]:
        """Where a run may begin, from ``lowest`` to ``highest``; ``under``: the layers that the first device can hold.

        ``extremes``: nothing between them can be faster, since all layers below go to one device (or RAM).
        """
        if position == 0 and self.host is None:
            return () if lowest else (0,)
        if under is not None:
            highest = min(highest, under)
        if extremes:
            return (lowest, highest) if lowest < highest else (highest,) if lowest == highest else ()
        if self._exact:
            return range(lowest, highest + 1)
        return (*range(lowest, min(lowest + SLACK_LAYERS, highest - 1) + 1), highest)

    def _one_is_faster(self, one: tuple[float, float], other: tuple[float, float]) -> bool:
        """Whether the same one of two devices (seconds per byte and per layer) is the faster one for every layer."""
        inverse, layer_s = one[0] - other[0], one[1] - other[1]
        if inverse * layer_s >= 0:
            return True
        return len({(above - below) * inverse + layer_s > 0 for below, above in pairwise(self.read)}) == 1

    def _each_faster(self, costs: Sequence[tuple[float, float]]) -> bool:
        """Whether each device is faster than the one before it, for every layer, by what its memory alone does."""
        return all(slower[0] > faster[0] and slower[1] >= faster[1] for slower, faster in pairwise(costs))

    def _rest(self, start: int) -> float:
        if not start or self.host is None:
            return 0.0
        return self.read[start] * self.host[0] + start * self.host[1] + HOP_SECONDS
