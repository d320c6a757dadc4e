"""The automatic plan: every placement worth looking at, what it costs, and which is the fastest that fits.

Candidates: stock's own; each GPU alone; the boost algorithm's layouts; the best splits over several GPUs; where not everything
fits on them, the lowest layers, or the experts of the lowest layers, in RAM.

A layer costs less on a faster GPU whichever layer it is, so the best split fills the fastest GPU first, with the output layer
on it, then the next: ``best_split`` finds it by dynamic programming over devices and layers, exactly for up to ``EXACT_GPUS``
(every order, every cut), and for more with the devices in the order of their speed, each in turn as the one with the output
layer, and filled to within ``SLACK_LAYERS`` of its limit: what that can lose is ``SLACK_LAYERS`` layers on each device.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, combinations, pairwise, permutations
from typing import Literal

from planner.costs import layer_costs
from planner.hardware import Rig
from planner.layout import create_layout
from planner.memory import estimate_memory
from planner.placement import Placement, solo
from planner.profile import ModelProfile
from planner.request import Candidate, Objective, PlanRequest
from planner.settings import LoadSettings
from planner.sizes import Sizes
from planner.speed import (
    HOP_SECONDS,
    PROMPT_TOKENS,
    Work,
    decode_seconds,
    gpu_rates,
    host_rates,
    model_work,
    prefill_seconds,
)
from planner.stock import StockLoad, on_rig, settings_on

NEVER_WORSE_GAIN = 0.02
"""How much faster than stock a plan must be predicted to be taken, a pure number; a smaller gain is not worth a reload."""

TIE = 0.001
"""Scores that differ by less count as equal, a pure number."""

BALANCED_TURN = (1024, 256)
"""Tokens of prompt and answer by which the objective ``balanced`` weighs prefill and decode."""

BOOSTS = (1.0, 1.25, 1.5, 1.75, 2.0)
"""The boost algorithm's factors that are looked at."""

EXACT_GPUS = 3
"""GPUs up to which every order and every cut is looked at: more would take longer than a plan may."""

SLACK_LAYERS = 2
"""Layers by which a device may stay below its limit, where not every cut is looked at."""

LEAST_GAIN = 1e-6
"""Part of a token's time that a move of one layer must save, a pure number: more than what rounding can pretend."""

Role = Literal["first", "middle", "last"]
ROLES: tuple[Role, ...] = ("first", "middle", "last")
"""A device's place in the order, which its compute buffer hangs on: hidden states come in, pass through, or become logits."""

ROUNDS = 8
"""How often a split is searched again with the compute buffers that the last one turned out to have."""

OPTIMISM = 0.5
"""Part of a sample's compute buffers that the first round of an exact search counts on: what does not fit then is corrected, what
was never looked at would be lost."""


class Search:
    """One request on one rig. Rates and work are worked out once."""

    def __init__(self, profile: ModelProfile, rig: Rig, request: PlanRequest) -> None:
        self.profile = profile
        self.rig = rig
        self.request = request
        self.rates = tuple(gpu_rates(gpu, request.calibration) for gpu in rig.gpus)
        self.host = host_rates(rig.host, request.calibration)
        self.limits = tuple(max(gpu.free_bytes - request.margin_bytes - request.gpu_overhead_bytes, 0) for gpu in rig.gpus)
        self._runtime = (request.runtime_bytes,) * len(rig.gpus)
        self._sizes: dict[LoadSettings, Sizes] = {}

    def sizes(self, settings: LoadSettings) -> Sizes:
        """The sizes under ``settings``, made once."""
        if settings not in self._sizes:
            self._sizes[settings] = Sizes(self.profile, settings)
        return self._sizes[settings]

    def work(self, settings: LoadSettings) -> Work:
        """The work under ``settings``."""
        return model_work(self.profile, settings)

    def decode_seconds(self, work: Work, placement: Placement) -> float:
        """Seconds of one token of an answer."""
        return decode_seconds(work, placement, self.rates, self.host)

    def candidate(
        self,
        label: str,
        placement: Placement,
        settings: LoadSettings,
        *,
        limits: tuple[int, ...] | None = None,
        shifts_bytes: Sequence[int] = (),
    ) -> Candidate:
        """``placement`` with its memory and its speed. ``limits``: if not given, free bytes less the margin."""
        memory = estimate_memory(self.profile, settings, placement, runtime_bytes=self._runtime)
        if any(shifts_bytes):
            devices = tuple(
                replace(device, weights_bytes=device.weights_bytes + shift)
                for device, shift in zip(memory.devices, shifts_bytes, strict=True)
            )
            memory = replace(memory, devices=devices)
        work = self.work(settings)
        return Candidate(
            label=label,
            placement=placement,
            settings=settings,
            memory=memory,
            limits=self.limits if limits is None else limits,
            decode_tokens_per_s=1 / decode_seconds(work, placement, self.rates, self.host),
            prefill_tokens_per_s=PROMPT_TOKENS / prefill_seconds(work, placement, self.rates, self.host, ubatch=settings.ubatch),
            calibrated=bool(placement.order) and all(self.rates[gpu].source == "calibrated" for gpu in placement.order),
        )

    def stock(self, load: StockLoad, label: str) -> Candidate:
        """Stock's load as a candidate; its limits are all free bytes: it keeps margins of its own."""
        free = tuple(gpu.free_bytes for gpu in self.rig.gpus)
        return self.candidate(label, load.placement, load.settings, limits=free, shifts_bytes=load.shifts_bytes)

    def solos(self, least_batch: int) -> list[Candidate]:
        """The model on each GPU alone, with at least stock's batch where that fits too."""
        return [self.alone(gpu, least_batch) for gpu in range(len(self.rig.gpus))]

    def alone(self, gpu: int, least_batch: int = 0) -> Candidate:
        """The model on ``gpu`` alone, with Ollama's batch there, or ``least_batch`` where that is larger and fits."""
        placement = solo(gpu, n_gpus=len(self.rig.gpus), n_layers=self.profile.n_layers)
        settings = settings_on(self.profile, self.rig, self.request, (gpu,))
        candidate = self.candidate(f"all on {gpu_names(self.rig)[gpu]}", placement, settings)
        if settings.batch >= least_batch or self.request.num_batch is not None:
            return candidate
        larger = self.candidate(candidate.label, placement, replace(settings, batch=least_batch, ubatch=least_batch))
        return larger if self.holds(larger) else candidate

    def boosted(self, gpus: Sequence[int], settings: LoadSettings, boosts: Iterable[float] = BOOSTS) -> Iterator[Candidate]:
        """The boost algorithm's layouts on ``gpus``, with the memory model's reserve in place of its own."""
        costs = layer_costs(self.profile, settings)
        first, middle, last = self._buffers(self.sizes(settings), len(gpus), partial=False)
        buffer = max(first, middle, last)
        reserves = [self.rig.gpus[i].free_bytes - self.limits[i] + self.request.runtime_bytes + buffer for i in gpus]
        seen: set[Placement] = set()
        for boost in boosts:
            layout = create_layout(costs, [self.rig.gpus[i] for i in gpus], boost=boost, reserves_bytes=reserves)
            placement = on_rig(layout.placement, gpus, len(self.rig.gpus))
            if placement not in seen and self._executable(placement):
                seen.add(placement)
                yield self.candidate(f"boost {boost:g}", placement, settings)

    def _executable(self, placement: Placement) -> bool:
        """llama-server's ``-ngl`` counts the output layer first: it can't leave it in RAM and layers on a GPU."""
        return self.request.era == "runner" or placement.output_gpu is not None or not placement.order

    def holds(self, candidate: Candidate) -> bool:
        """Whether every GPU holds it, and the host's RAM what stays there."""
        free = self.rig.host.free_bytes
        in_ram = candidate.placement.kind in ("partial", "cpu")
        return candidate.fits and not (in_ram and free is not None and candidate.memory.host.total_bytes > free)

    def best_split(
        self, gpus: Sequence[int], settings: LoadSettings, *, partial: bool = False, cpu_experts: int = 0
    ) -> Candidate | None:
        """The split over ``gpus`` with the fastest decode that fits; ``None`` where none does.

        ``partial``: the lowest layers may stay in RAM. ``cpu_experts``: the experts of so many layers, the lowest, stay there.
        Compute buffers are corrected after each round. With experts in RAM they differ so much between placements that moves of
        single layers are tried at last.
        """
        sizes, work = self.sizes(settings), self.work(settings)
        sample = self._buffers(sizes, len(gpus), partial=partial, experts=bool(cpu_experts))
        doubt = OPTIMISM if len(gpus) <= EXACT_GPUS else 1.0
        buffers = {(gpu, role): int(buffer * doubt) for gpu in gpus for role, buffer in zip(ROLES, sample, strict=True)}
        best: Candidate | None = None
        seen: set[Placement] = set()
        for _ in range(ROUNDS):
            problem = _Problem(
                held=_less_experts(sizes.held_prefix, sizes.experts_prefix, cpu_experts),
                read=_less_experts(work.read_prefix, (0.0, *accumulate(work.expert_bytes)), cpu_experts),
                inverse={gpu: 1 / self.rates[gpu].decode_bytes_per_s for gpu in gpus},
                rooms={gpu: self.limits[gpu] - self.request.runtime_bytes for gpu in gpus},
                buffers=buffers,
                output_held=sizes.output_bytes,
                output_read=work.output_bytes,
                host_inverse=1 / self.host.decode_bytes_per_s if partial else None,
            )
            counts = problem.solve()
            if counts is None:
                break
            placement = self._placement(counts, cpu_experts)
            if placement in seen:
                break
            seen.add(placement)
            found = self.candidate(self._label(placement), placement, settings)
            near = [found]
            if cpu_experts and not self.holds(found):  # the cut beside it may need a smaller buffer
                near += [self.candidate(self._label(moved), moved, settings) for moved in self._moves(found)]
            best = max(
                (candidate for candidate in (best, *near) if candidate and self.holds(candidate)),
                key=lambda candidate: candidate.decode_tokens_per_s,
                default=None,
            )
            for position, gpu in enumerate(placement.order):
                device, key = found.memory.devices[gpu], (gpu, _role(position, len(placement.order)))
                if device.total_bytes > self.limits[gpu]:
                    buffers[key] = device.compute_bytes
        return self._polished(best) if best and cpu_experts else best

    def _polished(self, best: Candidate) -> Candidate:
        """``best`` after every move of one layer at a time that is faster and fits, measured exactly."""
        work = self.work(best.settings)
        moves = iter(self._moves(best))
        while (placement := next(moves, None)) is not None:
            if self.decode_seconds(work, placement) * best.decode_tokens_per_s < 1 - LEAST_GAIN:
                moved = self.candidate(self._label(placement), placement, best.settings)
                if self.holds(moved):
                    best = moved
                    moves = iter(self._moves(best))
        return best

    def _moves(self, candidate: Candidate) -> Iterator[Placement]:
        """One layer from a device (or RAM) to the next one, either way, where half a compute buffer more would make room."""
        placement, sizes = candidate.placement, self.sizes(candidate.settings)
        held = _less_experts(sizes.held_prefix, sizes.experts_prefix, len(placement.cpu_experts))
        layers = placement.layers
        runs = placement.ranges()

        def has_room(gpu: int, layer: int) -> bool:
            device = candidate.memory.devices[gpu]
            taken = device.total_bytes - device.compute_bytes // 2 + held[layer + 1] - held[layer]
            return taken <= self.limits[gpu]

        def moved(source: int | None, target: int) -> Placement:
            now = [count + (gpu == target) - (gpu == source) for gpu, count in enumerate(layers)]
            order = placement.order if target in placement.order else (target, *placement.order)
            order = tuple(gpu for gpu in order if now[gpu] or gpu == placement.output_gpu)
            cpu = placement.cpu_layers - (source is None)
            return replace(placement, layers=tuple(now), order=order, cpu_layers=cpu)

        if placement.cpu_layers:
            library = self.rig.gpus[runs[0][0]].library
            idle = [i for i, gpu in enumerate(self.rig.gpus) if gpu.library == library and i not in placement.order]
            for gpu in (runs[0][0], *idle):
                if has_room(gpu, placement.cpu_layers - 1):
                    yield moved(None, gpu)
        for (lower, below), (upper, above) in pairwise(runs):
            if len(below) and has_room(upper, below.stop - 1):
                yield moved(lower, upper)
            if len(above) and has_room(lower, above.start):
                yield moved(upper, lower)

    def splits(self, gpus: Sequence[int], settings: LoadSettings, *, full: bool) -> Iterator[Candidate]:
        """The best splits over ``gpus``: all on them, or (not ``full``) with a rest in RAM, whole layers or experts."""
        groups = [tuple(gpus)]
        if len(gpus) <= EXACT_GPUS:  # compute buffers depend on how many GPUs there are
            groups = [group for count in range(1 + full, len(gpus) + 1) for group in combinations(gpus, count)]
        for group in groups:
            if len(group) > full and (best := self.best_split(group, settings, partial=not full)):
                yield best
            if not full and self.profile.expert_count:
                yield from self._expert_splits(group, settings)

    def _expert_splits(self, gpus: Sequence[int], settings: LoadSettings) -> Iterator[Candidate]:
        """Experts of as few layers as possible in RAM: more never read faster, except where that frees a faster GPU."""
        low, high = 0, self.profile.n_layers
        found = {high: self.best_split(gpus, settings, cpu_experts=high)}
        if found[high] is None:
            return
        while high - low > 1:
            middle = (low + high) // 2
            found[middle] = self.best_split(gpus, settings, cpu_experts=middle)
            low, high = (low, middle) if found[middle] else (middle, high)
        for count in range(high, min(high + SLACK_LAYERS, self.profile.n_layers) + 1):
            candidate = found.get(count) or self.best_split(gpus, settings, cpu_experts=count)
            if candidate:
                yield candidate

    def _placement(self, split: _Split, cpu_experts: int) -> Placement:
        layers = [0] * len(self.rig.gpus)
        for gpu, count in split.counts:
            layers[gpu] = count
        output = split.counts[-1][0]
        order = tuple(gpu for gpu, count in split.counts if count or gpu == output)
        return Placement(
            layers=tuple(layers),
            order=order,
            output_gpu=output,
            cpu_layers=self.profile.n_layers - sum(layers),
            cpu_experts=frozenset(range(cpu_experts)),
        )

    def _label(self, placement: Placement) -> str:
        names = gpu_names(self.rig)
        text = " + ".join(f"{placement.shares[gpu]} on {names[gpu]}" for gpu in placement.order)
        text += f" + {placement.cpu_layers} in RAM" if placement.cpu_layers else ""
        return text + (f", experts of {len(placement.cpu_experts)} layers in RAM" if placement.cpu_experts else "")

    def _buffers(self, sizes: Sizes, n_gpus: int, *, partial: bool, experts: bool = False) -> tuple[int, int, int]:
        """Compute buffers of the first, a middle and the last device, of a sample placement over up to three devices."""
        n = sizes.n_layers
        used = min(n_gpus, 3)
        in_ram = max(n // (used + 1), 1) if partial else 0
        counts = [(n - in_ram) // used + (i < (n - in_ram) % used) for i in range(used)]
        order = tuple(i for i, count in enumerate(counts) if count or i == used - 1)
        sample = Placement(
            layers=tuple(counts),
            order=order,
            output_gpu=order[-1],
            cpu_layers=in_ram,
            cpu_experts=frozenset(range(n // 2)) if experts else frozenset(),
        )
        buffers = sizes.compute_bytes(sample)
        return buffers[0], buffers[len(buffers) // 2], buffers[-1]


def _role(position: int, count: int) -> Role:
    return "last" if position == count - 1 else "first" if position == 0 else "middle"


@dataclass(frozen=True, slots=True)
class _Split:
    """Layers of each device, lowest layers first; the last has the output layer."""

    seconds: float
    counts: tuple[tuple[int, int], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Problem:
    """Where to cut the layers. ``held`` and ``read`` are prefix sums in bytes; ``inverse`` is in seconds per byte."""

    held: Sequence[float]
    read: Sequence[float]
    inverse: dict[int, float]
    rooms: dict[int, int]
    buffers: Mapping[tuple[int, Role], int]
    output_held: int
    output_read: int
    host_inverse: float | None

    def solve(self) -> _Split | None:
        """The fastest split over every order that is looked at; ``None`` where nothing fits."""
        exact = len(self.rooms) <= EXACT_GPUS
        found = (self._best_cuts(order, None if exact else SLACK_LAYERS) for order in self._orders(exact))
        return min((split for split in found if split), key=lambda split: (split.seconds, split.counts), default=None)

    def _orders(self, exact: bool) -> Iterator[tuple[int, ...]]:
        ranked = sorted(self.rooms, key=lambda gpu: (-self.inverse[gpu], self.rooms[gpu], -gpu))
        if exact:
            yield from permutations(ranked)
        else:
            for gpu in reversed(ranked):
                yield (*(other for other in ranked if other != gpu), gpu)

    def _best_cuts(self, order: tuple[int, ...], slack: int | None) -> _Split | None:
        held, read, last = self.held, self.read, len(order) - 1
        states: dict[int, tuple[float, tuple[int, ...]]] = {len(held) - 1: (0.0, ())}
        for position in range(last, -1, -1):
            gpu = order[position]
            room = self.rooms[gpu] - self.buffers[gpu, _role(position, len(order))]
            room -= self.output_held if position == last else 0
            if position == last and room < 0:
                return None
            fixed = self.output_read * self.inverse[gpu] if position == last else HOP_SECONDS
            inverse = self.inverse[gpu]
            following: dict[int, tuple[float, tuple[int, ...]]] = {}
            for end, (seconds, counts) in states.items():
                lowest = bisect_left(held, held[end] - room, 0, end) if room > 0 else end
                for start in self._starts(lowest, end, gpu, position, slack):
                    took = end - start
                    cost = seconds + (read[end] - read[start]) * inverse + (fixed if took or position == last else 0.0)
                    known = following.get(start)
                    if known is None or cost < known[0]:
                        following[start] = (cost, (took, *counts))
            states = following
        ends = ((seconds + self._rest(start), start, counts) for start, (seconds, counts) in states.items())
        best = min((end for end in ends if not end[1] or self.host_inverse is not None), default=None)
        return _Split(best[0], tuple(zip(order, best[2], strict=True))) if best else None

    def _starts(self, lowest: int, end: int, gpu: int, position: int, slack: int | None) -> Iterable[int]:
        """Where the run that ends at ``end`` may begin. The last device in turn takes all it can, unless RAM is faster."""
        if position == 0:
            if self.host_inverse is None:
                return () if lowest else (0,)
            if self.inverse[gpu] < self.host_inverse:
                return (lowest, end) if lowest < end else (end,)
        if slack is None:
            return range(lowest, end + 1)
        return (*range(lowest, min(lowest + slack, end - 1) + 1), end)

    def _rest(self, start: int) -> float:
        return self.read[start] * (self.host_inverse or 0.0) + (HOP_SECONDS if start else 0.0)


def _less_experts(prefix: Sequence[float], experts: Sequence[float], layers: int) -> Sequence[float]:
    """Prefix sums without the experts of the ``layers`` lowest layers."""
    return [value - experts[min(i, layers)] for i, value in enumerate(prefix)] if layers else prefix


def gpu_names(rig: Rig) -> tuple[str, ...]:
    """Names for people: a card's own, with its index where several cards share it."""
    names = [gpu.name for gpu in rig.gpus]
    return tuple(name if names.count(name) == 1 else f"{name} (GPU {i})" for i, name in enumerate(names))


def score(candidate: Candidate, objective: Objective) -> float:
    """What the objective wants more of: tokens/s of decode or prefill, or of a whole turn."""
    if objective == "decode":
        return candidate.decode_tokens_per_s
    if objective == "prefill":
        return candidate.prefill_tokens_per_s
    prompt, answer = BALANCED_TURN if objective == "balanced" else objective
    return (prompt + answer) / (prompt / candidate.prefill_tokens_per_s + answer / candidate.decode_tokens_per_s)


def ranked(candidates: Iterable[Candidate], objective: Objective) -> tuple[Candidate, ...]:
    """The best first. Within ``TIE`` of the best: fewer GPUs, then the faster prefill, then the order given."""
    rest = sorted(candidates, key=lambda candidate: -score(candidate, objective))
    order: list[Candidate] = []
    while rest:
        best = score(rest[0], objective)
        tied = [candidate for candidate in rest if score(candidate, objective) >= best * (1 - TIE)]
        order += sorted(tied, key=lambda candidate: (len(candidate.placement.order), -candidate.prefill_tokens_per_s))
        rest = rest[len(tied) :]
    return tuple(order)


def choose(candidates: Iterable[Candidate], stock: Candidate, objective: Objective) -> Candidate:
    """The best of ``candidates``, or ``stock`` itself where none is worth leaving it.

    Stock stays unless the best scores ``NEVER_WORSE_GAIN`` more, so what decodes no faster and prefills slower is never taken,
    whatever the objective. A stock that does not fit (the load would fail) is left for any candidate.
    """
    best = next(iter(ranked(candidates, objective)), None)
    if best is None or not stock.fits:
        return best or stock
    return best if score(best, objective) >= score(stock, objective) * (1 + NEVER_WORSE_GAIN) else stock
