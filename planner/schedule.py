"""What one device computes, in order: its inputs, then the program of each of its layers (``programs``).

Nothing here depends on the number of cells, so that a schedule serves every context; layers of a kind share one program.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby

from planner.cache import layer_caches
from planner.exchange import DevicePart, Exchange
from planner.inputs import (
    CHOICE_MASK,
    DEEPSTACK,
    EMBEDDING,
    EXTRA_ROWS,
    INDICES,
    KEY_ROTATION,
    MASK,
    NORMED,
    OUTPUT_ROWS,
    PER_LAYER,
    PERMUTED,
    POOLED,
    POSITIONS,
    RESIDUAL,
    STATE_ROWS,
    VALUE_ROTATION,
    WINDOW,
    ZEROS,
    Scale,
    deepstack_layers,
    input_sizes,
    rotates,
    slice_name,
    sparse_cells,
)
from planner.profile import ModelProfile
from planner.programs import Programs, adds_positions, layer_kinds, layer_shapes
from planner.tape import STEADY, Program, Size
from planner.traits import LATE_OUTPUTS, fetches_early

PRE_NORMS = frozenset({"attn_norm.weight", "ln1.weight"})
"""Tensors with which a layer begins; some architectures norm only what attention and feed-forward return."""


@dataclass(frozen=True, eq=False, slots=True)
class Schedule:
    """What happens in the buffer of one device. Two are equal only if they are the same.

    * ``leaves``: name and size of what lies there before everything else, once.
    * ``unnamed``: tensors that stay all the while; nothing here reads them.
    * ``inputs``: name and size of what lives when the first program begins.
    * ``copies``: of each of those.
    * ``programs``: in order; those of the layers from ``first_layer`` on.
    """

    leaves: tuple[tuple[int, Size], ...]
    unnamed: tuple[Size, ...]
    inputs: tuple[tuple[int, Size], ...]
    copies: int
    programs: tuple[Program, ...]
    first_layer: int


@dataclass(frozen=True, kw_only=True, slots=True)
class _Task:
    """What a device's inputs and the programs of its layers hang on.

    * ``layers``: those that get a program, visitors first.
    * ``normed``: the first norm of its first layer is computed elsewhere.
    * ``fed``: it is the first, and what its layers begin with is made of the embedding elsewhere.
    * ``late_output``: the output's rows are picked after the last layer, not within it.
    * ``borrowed``: as in ``Exchange.borrowed``.
    """

    part: DevicePart
    layers: tuple[int, ...]
    normed: bool
    fed: bool
    late_output: bool
    borrowed: Mapping[int, tuple[int, ...]]


PARTS_KEPT = 512
"""Schedules that are kept: more than one search looks at."""


class Schedules:
    """Schedules of one model at one scale. Results are kept; make one with ``schedules_of``."""

    def __init__(self, profile: ModelProfile, scale: Scale) -> None:
        self._profile = profile
        self._caches = layer_caches(profile)
        self._scale = scale
        self._n = profile.n_computed_layers
        self._kinds = layer_kinds(profile)
        self._shapes = (*layer_shapes(profile)[:-1], self._n - 1)
        """What a layer on a device does hangs on these alone. The last is one of its own: it goes on with the output's rows."""
        self.sizes = input_sizes(profile, scale)
        self.exchange = Exchange(profile, scale, self.sizes)
        self._altup = profile.integer("altup.num_inputs") > 1
        self._sparse = sparse_cells(profile) > 0
        self._programs = Programs(profile, scale, self.sizes)
        each = self._sparse or self._has(PER_LAYER) or self.exchange.fetched_behind or self.exchange.may_attend_in_ram
        self._visitor_ends = None if each else _ends(self._kinds)
        self._own_ends = None if each or self.exchange.lends else _ends(self._shapes)
        self._parts: dict[DevicePart, tuple[Schedule, tuple[int, ...]]] = {}
        self._alikes: dict[object, Schedule] = {}
        self._read_by: dict[tuple[int, bool, bool], tuple[int, ...]] = {}
        reads = [self._inputs_of(i, visiting=False, on_host=True) for i in set(self._shapes)]
        self.host_inputs = frozenset(name for names in (*reads, (POOLED,)) for name in names) - {PER_LAYER, DEEPSTACK}
        """Names of the inputs that the host fills in."""

    def of(self, part: DevicePart) -> tuple[Schedule, tuple[int, ...]]:
        """The schedule of a device, and how often each of its programs is repeated."""
        found = self._parts.get(part)
        if found is None:
            if len(self._parts) >= PARTS_KEPT:  # a server plans for years, each time with other free memory
                self._parts.clear()
                self._alikes.clear()
            own = range(part.layers.start, min(part.layers.stop, self._n))
            layers = _in_runs(self._visitor_ends, part.visitors) + _in_runs(None if part.host_experts else self._own_ends, own)
            alike = self._alike(part, layers)
            schedule = self._alikes.get(alike)
            if schedule is None:
                schedule = self._alikes[alike] = self._schedule(part, layers)
            times = [1] * len(schedule.programs)
            if not self._sparse:
                times[schedule.first_layer : schedule.first_layer + len(layers)] = [count for _, count in layers]
            found = self._parts[part] = schedule, tuple(times)
        return found

    def _alike(self, part: DevicePart, layers: Sequence[tuple[int, int]]) -> object:
        """Equal for parts that differ at most in how often layers between the first and the last of a run are repeated."""
        if part.host_experts or part.foreign_experts:
            return part
        kinds = tuple((self._kinds[i], True) if i in part.visitors else (self._shapes[i], False) for i, _ in layers)
        sends_norm = part.sends_norm and self._begins_normed(part.layers.stop)
        beside = self.exchange.unnamed(part), tuple(self.exchange.borrowed(part))
        return kinds, beside, part.first, part.normed, sends_norm, part.output, part.copies

    def _schedule(self, part: DevicePart, layers: Sequence[tuple[int, int]]) -> Schedule:
        fed = self._altup and part.first and not part.output  # Gemma 3n's streams are made where the output layer lies
        task = _Task(
            part=part,
            layers=tuple(i for i, _ in layers),
            normed=(part.normed and self._begins_normed(part.layers.start)) or fed,
            fed=fed,
            late_output=part.output and self._profile.architecture in LATE_OUTPUTS,
            borrowed={} if part.copies > 1 else self.exchange.borrowed(part),
        )
        prelude = part.first and not fed
        narrow: Size = (self.exchange.embedding_bytes, STEADY)
        own = part.layers.start < min(part.layers.stop, self._n)
        programs = [self._programs.prelude(part.copies > 1)] if prelude else []
        programs += self._layers(task)
        if own and not part.output:
            programs.append(self._programs.handed_over(norm=part.sends_norm and self._begins_normed(part.layers.stop)))
        programs += [self._programs.foreign(i) for i in part.foreign_experts]
        programs += [self._programs.output(pinned=part.copies > 1 and not own)] if part.output else []
        return Schedule(
            leaves=tuple((ZEROS - i, self.sizes[ZEROS - i]) for i, _ in layers) if self._sparse else (),
            unnamed=self.exchange.unnamed(part),
            inputs=tuple((name, narrow if name == RESIDUAL and prelude else self.sizes[name]) for name in self._names(task)),
            copies=part.copies,
            programs=tuple(programs),
            first_layer=int(prelude),
        )

    def _names(self, task: _Task) -> Iterable[int]:
        """Names of a device's inputs, in order."""
        part, layers = task.part, task.layers
        arrival = [PER_LAYER] if self._has(PER_LAYER) and part.first else []
        arrival += [RESIDUAL] if not task.normed else [NORMED]
        arrival += [PERMUTED, RESIDUAL] if task.normed and self._altup else []
        arrival += [EMBEDDING] if task.fed else []
        arrival += [NORMED] if part.first and adds_positions(self._profile) else []
        inputs: list[int] = []
        early: tuple[int, ...] = ()
        if not part.visitors:
            until = min(part.host_experts, default=self._n) if part.first else self._n
            firsts = {self._shapes[i]: i for i in reversed(layers)}  # others read what the first of their kind does
            each = task.borrowed or self._has(PER_LAYER)
            for i in layers if each else sorted(firsts.values()):
                if i > until:
                    break  # what comes later is copied along with weights from RAM
                inputs += self._copied_to(i, task.borrowed.get(i, ()))
                inputs += [slice_name(i)] if self._has(PER_LAYER) and not part.first and part.copies == 1 else []
            if part.output and not (part.first and part.host_experts):
                inputs += [OUTPUT_ROWS] if task.late_output else []
                inputs += [POOLED] if self._has(POOLED) else []
            if layers and task.normed:  # the residual itself is first read where the first layer adds to it
                arrival += self._copied_to(layers[0], task.borrowed.get(layers[0], ()))
            if layers and fetches_early(self._profile.layer_tensors[layers[0]]):
                early = (STATE_ROWS, EXTRA_ROWS)  # the first layer's states are fetched before anything is computed
        return dict.fromkeys((*early, *arrival, RESIDUAL, *inputs))

    def _layers(self, task: _Task) -> Iterator[Program]:
        """The programs of a device's layers, visitors first."""
        part, layers, borrowed = task.part, task.layers, task.borrowed
        pinned = part.copies > 1
        fetched = {b: a for b, a in self.exchange.fetched_behind.items() if b in part.layers and a in layers}
        fetchers = set(fetched.values())
        sliced = self._has(PER_LAYER) and not part.first and not pinned
        first_reader: dict[int, int] = {}
        last_reader: dict[int, int] = {}
        for i in layers:
            for name in self._reads(i, part.visitors) + borrowed.get(i, ()):
                first_reader.setdefault(name, i)
                last_reader[name] = i
        if sliced:
            last_reader |= {slice_name(i): i for i in layers}
        if task.late_output:
            last_reader[OUTPUT_ROWS] = self._n
            first_reader.setdefault(OUTPUT_ROWS, self._n)
        if not part.first:
            last_reader |= {PER_LAYER: self._n, DEEPSTACK: self._n}  # among the device's unnamed tensors
        waiting = set(first_reader) - {PER_LAYER, DEEPSTACK} if part.visitors else set()
        stops = sorted(part.host_experts) if part.first else []
        if stops and not part.visitors:
            waiting = {name for name in first_reader if first_reader[name] > stops[0]} - {PER_LAYER, DEEPSTACK}
        given = self.host_inputs.union(last_reader)  # a visitor may read what this device has no copy of
        ends: dict[int, set[int]] = {}
        for name, reader in last_reader.items():
            ends.setdefault(reader, set()).add(name)
        special = {*layers[:1], 0, self._n - 1, *ends, *part.host_experts, *borrowed}
        if part.visitors:
            special |= {*first_reader.values(), part.visitors.stop - 1}
        usual: dict[object, Program] = {}  # of layers beside which nothing begins or ends
        for i in layers:
            visits = i in part.visitors
            key = (self._kinds[i] if visits else self._shapes[i], visits, i in fetched, i in fetchers)
            ordinary = i not in special and not sliced and not self._sparse
            if ordinary and key in usual:
                yield usual[key]
                continue
            until = -1  # inputs that no layer after it reads first are copied along with this one's weights
            if visits:
                until = i if i < part.visitors[-1] else stops[0] if stops else self._n
            elif part.first and i in part.host_experts:
                until = next((stop for stop in stops if stop > i), self._n)
            brings: tuple[int, ...] = ()
            if until >= 0:
                brings = tuple(name for name, reader in first_reader.items() if reader <= until and name in waiting)
                waiting = waiting.difference(brings)
            kept = given - ends.get(i, set()) if not pinned else given
            if i == 0 and not (task.fed and pinned):
                kept -= {PER_LAYER}
            if pinned and i == layers[0] and (not part.first or task.fed or not self._programs.has_prelude):
                kept |= {RESIDUAL, NORMED, EMBEDDING, PERMUTED}
            program = self._programs.layer(
                i,
                offloaded=visits,
                host_experts=i in part.host_experts,
                experts_away=i in part.host_experts and not part.first,
                normed=i == layers[0] and task.normed,
                brings=brings,
                has_states=i in fetched,
                fetches_states=i in fetchers,
                pipelined=pinned,
                borrowed=borrowed.get(i, ()),
                per_layer=slice_name(i) if sliced else PER_LAYER,
                kept=kept,
            )
            yield program
            if ordinary:
                usual[key] = program
            if self._sparse:
                yield self._programs.release(ZEROS - i)

    def _begins_normed(self, i: int) -> bool:
        """Whether a layer's first operation is a norm, which the device before computes with the residual."""
        return i < self._n and not PRE_NORMS.isdisjoint(self._profile.layer_tensors[i])

    # inputs

    def _has(self, name: int) -> bool:
        return self.sizes[name] != (0, STEADY)

    def _reads(self, i: int, visitors: range = range(0)) -> tuple[int, ...]:
        """Inputs of the graph that a layer reads on its device, in order; one of ``visitors`` may leave its attention in RAM."""
        visiting = i in visitors
        in_ram = visiting and self.exchange.may_attend_in_ram and self.exchange.attends_in_ram(i, visitors.stop)
        key = (self._shapes[i], visiting, in_ram)
        found = self._read_by.get(key)
        if found is None:
            found = self._read_by[key] = self._inputs_of(i, visiting=visiting, in_ram=in_ram)
        return found

    def _copied_to(self, i: int, borrowed: tuple[int, ...]) -> list[int]:
        """Inputs that a layer's device gets for it, in order; a borrowed cache comes before the mask, what is left after it."""
        names = [name for name in self._reads(i) if name not in (PER_LAYER, DEEPSTACK)]
        if not borrowed:
            return names
        offset = WINDOW if self._caches[i].windowed else 0
        early = [name for name in names if name in (POSITIONS, KEY_ROTATION - offset)]
        late = [name for name in names if name not in (*early, MASK - offset)]
        return [*early, *borrowed, MASK - offset, *late]

    def _inputs_of(self, i: int, *, visiting: bool, on_host: bool = False, in_ram: bool = False) -> tuple[int, ...]:
        cache = self._caches[i]
        extra: tuple[int, ...] = (PER_LAYER,) if self._has(PER_LAYER) else ()
        if i < deepstack_layers(self._profile):
            extra += (DEEPSTACK,)
        if i == self._n - 1 and self._profile.architecture not in LATE_OUTPUTS:
            extra += (OUTPUT_ROWS,)
        if cache.state_elements and not visiting:
            extra = (STATE_ROWS, EXTRA_ROWS, *extra)
        if not cache.attends:
            return extra
        offset = WINDOW if cache.windowed else 0
        names = (
            *((POSITIONS,) if rotates(self._profile, cache) else ()),
            *(name for name in (KEY_ROTATION - offset, VALUE_ROTATION - offset) if self._has(name)),
            *((INDICES - offset,) if cache.owns_cache and not visiting else ()),
        )
        if visiting and in_ram:
            return tuple(name for name in names if name in (POSITIONS, KEY_ROTATION - offset))
        mask = () if self._scale.attention == "host" and not on_host else (MASK - offset,)
        if self._sparse:
            mask = (CHOICE_MASK, *mask)
        return (*names, *mask, *extra)


def _ends(kinds: Iterable[int]) -> list[int]:
    """Where each run of consecutive layers of one kind ends."""
    return [*accumulate(len(list(run)) for _, run in groupby(kinds))]


def _in_runs(ends: Sequence[int] | None, layers: range) -> list[tuple[int, int]]:
    """``layers``, those between the first and the last of a run as one that is repeated; without ``ends`` none is."""
    if ends is None:
        return [(i, 1) for i in layers]
    found = []
    start = layers.start
    for end in ends[bisect_right(ends, start) :]:
        stop = min(end, layers.stop)
        if stop - start > 2:
            found += [(start, 1), (start + 1, stop - start - 2), (stop - 1, 1)]
        else:
            found += [(i, 1) for i in range(start, stop)]
        if stop == layers.stop:
            break
        start = stop
    return found


def schedules_of(profile: ModelProfile, scale: Scale) -> Schedules:
    """The schedules of a profile at a scale; made once."""
    return profile.remember("schedules", scale, lambda: Schedules(profile, scale))
