"""Compute buffers: what the activations of one micro-batch take on each device and on the host.

llama.cpp (b10488) reserves the buffers once, for the largest graph (``llama_context::sched_reserve``, ``src/llama-context.cpp``).
Here the schedule of one device is replayed through a port of its allocator. Layers of a kind leave the buffer in the same state
soon, so that a hundred layers cost hardly more than three.
"""

from __future__ import annotations

from collections.abc import Sequence

from planner.allocator import Allocator, State, Step, filled
from planner.cache import layer_caches
from planner.exchange import DevicePart
from planner.inputs import cells_of, scale_of
from planner.profile import ModelProfile
from planner.schedule import PARTS_KEPT, Schedule, schedules_of
from planner.settings import LoadSettings
from planner.tape import Program, Size, size_at
from planner.traits import next_early

PIPELINE_COPIES = 4
"""Copies of each input of a device with pipeline parallelism (``GGML_SCHED_MAX_COPIES`` in ``ggml/src/ggml-backend.cpp``)."""


class Moment:
    """A buffer between two programs: its holes, and the offset of each living tensor by name. Two are equal only if the same."""

    __slots__ = ("after", "slots", "state")

    def __init__(self, state: State, slots: tuple[tuple[int, int], ...]) -> None:
        self.state = state
        self.slots = slots
        self.after: dict[Program, tuple[Moment, int]] = {}
        """By a program: the moment when it has run, and the highest byte used by then."""


class ComputeModel:
    """Compute buffers of one model with one set of settings. Results are kept; make one with ``compute_model``."""

    def __init__(self, profile: ModelProfile, settings: LoadSettings, *, falls: bool) -> None:
        scale = scale_of(profile, settings, falls=falls)
        self._cells = cells_of(profile, settings, scale)
        self._schedules = schedules_of(profile, scale)
        self._n_layers = profile.n_computed_layers
        self._steps: dict[Program, tuple[Step, ...]] = {}
        self._moments: dict[tuple[State, tuple[tuple[int, int], ...]], Moment] = {}
        self._begun: dict[Schedule, tuple[Moment, int]] = {}
        self._known: dict[DevicePart, int] = {}
        self._host: dict[tuple[range, int], int] = {}

    def device_bytes(self, part: DevicePart) -> int:
        """Bytes of the compute buffer of a device."""
        found = self._known.get(part)
        if found is None:
            if len(self._known) >= PARTS_KEPT:
                self._known.clear()
                self._begun.clear()
                self._moments.clear()
            found = self._known[part] = self._replay(*self._schedules.of(part))
        return found

    def host_bytes(self, *, visitors: range, copies: int) -> int:
        """Bytes of the host's compute buffer: the inputs, and what layers in RAM hand over for their caches."""
        known = self._host.get((visitors, copies))
        if known is not None:
            return known
        exchange = self._schedules.exchange
        inputs = sum(self._size(self._schedules.sizes[name]) for name in self._schedules.host_inputs)
        handed = max((self._size(size) for size in exchange.handed(visitors)), default=0)
        attended = [(result, self._size(copied)) for result, copied in exchange.on_host(range(visitors.stop, self._n_layers))]
        if copies > 1:
            inputs += sum(copied for _, copied in attended)
            handed = max((handed, *(result for result, _ in attended)))
        else:
            handed = max((handed, *(result + copied for result, copied in attended)))
        if len(self._host) >= PARTS_KEPT:
            self._host.clear()
        found = exchange.image_bytes + inputs * copies + max(exchange.arriving_bytes, handed)
        self._host[visitors, copies] = found
        return found

    def _size(self, size: Size) -> int:
        return size_at(size, *self._cells)

    def _replay(self, schedule: Schedule, times: Sequence[int]) -> int:
        moment, peak = self._begun.get(schedule) or self._begin(schedule)
        for program, count in zip(schedule.programs, times, strict=True):
            for _ in range(count):
                before = moment
                moment, highest = before.after.get(program) or self._run(program, before)
                if highest > peak:
                    peak = highest
                if moment is before:  # as it will be after each repetition
                    break
        return peak

    def _begin(self, schedule: Schedule) -> tuple[Moment, int]:
        """The moment before the first program, and the highest byte used by then."""
        slots: dict[int, int] = {}
        end = 0  # one behind the other
        for name, size in schedule.leaves:
            slots[name] = end
            end += self._size(size)
        end += schedule.copies * sum(map(self._size, schedule.unnamed))
        for name, size in schedule.inputs:
            slots[name] = end
            end += schedule.copies * self._size(size)
        found = self._begun[schedule] = self._moment(filled(end), slots), end
        return found

    def _run(self, program: Program, before: Moment) -> tuple[Moment, int]:
        """The moment when a program has run, and the highest byte used by then."""
        steps = self._steps.get(program)
        if steps is None:
            steps = self._steps[program] = program.at(*self._cells)
        heap, slots = Allocator(before.state), dict(before.slots)
        heap.replay(steps, slots)
        for name, source in program.exports:
            slots[name] = slots.pop(source)
        found = before.after[program] = self._moment(heap.state, slots), heap.peak
        return found

    def _moment(self, state: State, slots: dict[int, int]) -> Moment:
        key = state, tuple(slots.items())
        return self._moments.get(key) or self._moments.setdefault(key, Moment(*key))


def compute_model(profile: ModelProfile, settings: LoadSettings, *, cpu_layers: int = 0) -> ComputeModel:
    """The compute model of a profile with these settings, and so many layers in RAM; made once."""
    falls = attention_falls(profile, cpu_layers)
    return profile.remember("compute", (settings, falls), lambda: ComputeModel(profile, settings, falls=falls))


def attention_falls(profile: ModelProfile, cpu_layers: int) -> bool:
    """Whether ``--flash-attn auto`` gives up because of where the border between RAM and GPU lies.

    It looks whether attention runs where its layer lies (``resolve_fused_ops``, ``src/llama-context.cpp``). In a hybrid model the
    states of a layer on the GPU may be fetched right behind the attention of one in RAM, which draws it to the GPU.
    """
    if not 0 < cpu_layers < profile.n_computed_layers:
        return False
    caches = layer_caches(profile)
    last = next((i for i in reversed(range(cpu_layers)) if caches[i].attends), None)
    return last is not None and (next_early(profile, last) or 0) >= cpu_layers
