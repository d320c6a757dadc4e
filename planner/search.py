"""The automatic plan: every placement worth looking at, what it costs, and which is the fastest that fits.

Candidates: stock's own; each GPU alone; the boost algorithm's layouts; the best splits over several GPUs; where not everything
fits on them, the lowest layers, or the experts of the lowest layers, in RAM.

A layer costs less on a faster GPU whichever layer it is, so the best split fills the fastest GPU first, with the output layer
on it, then the next: ``best_split`` finds it (``planner.cuts``), exactly for up to ``EXACT_GPUS`` (every order, every cut), and
for more with the devices in the order of their speed, each in turn as the one with the output layer, and filled to within
``SLACK_LAYERS`` of its limit: what that can lose is ``SLACK_LAYERS`` layers on each device. ``planner.choice`` says which wins.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations, pairwise

from planner.choice import turn
from planner.costs import layer_costs
from planner.cuts import EXACT_GPUS, FEW_LAYERS, ROLES, SLACK_LAYERS, Problem, Split, few, role
from planner.fit import Assignment
from planner.hardware import Rig, gpu_names
from planner.layout import Layouts
from planner.memory import MemoryEstimate, estimate_memory
from planner.placement import Placement, in_words, solo
from planner.profile import ModelProfile
from planner.request import Candidate, Objective, PlanRequest
from planner.settings import LoadSettings
from planner.sizes import Sizes, sizes_of
from planner.speed import (
    PROMPT_TOKENS,
    Speed,
    Work,
    decode_seconds,
    gpu_rates,
    host_rates,
    model_work,
    prefill_seconds,
    work_speed,
)
from planner.stock import StockLoad, on_rig, settings_on

BOOSTS = (1.0, 1.25, 1.5, 1.75, 2.0)
"""The boost algorithm's factors that are looked at."""

LEAST_GAIN = 1e-6
"""Part of a token's time that a move of one layer must save, a pure number: more than what rounding can pretend."""

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
        reserves = request.reserve_bytes or (0,) * len(rig.gpus)
        self._free = tuple(max(gpu.free_bytes - kept, 0) for gpu, kept in zip(rig.gpus, reserves, strict=True))
        self.limits = tuple(max(free - request.margin_bytes - request.gpu_overhead_bytes, 0) for free in self._free)
        self.names = gpu_names(rig.gpus)
        self._runtime = (request.runtime_bytes,) * len(rig.gpus)
        self._work: dict[LoadSettings, Work] = {}
        self._measured: dict[tuple[Placement, LoadSettings], tuple[MemoryEstimate, Speed]] = {}

    def sizes(self, settings: LoadSettings) -> Sizes:
        """The sizes under ``settings``."""
        return sizes_of(self.profile, settings)

    def work(self, settings: LoadSettings) -> Work:
        """The work under ``settings``, looked up once."""
        found = self._work.get(settings)
        if found is None:
            found = self._work[settings] = model_work(self.profile, settings)
        return found

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
        known = self._measured.get((placement, settings))
        if known is None:
            memory = estimate_memory(self.profile, settings, placement, runtime_bytes=self._runtime)
            speed = work_speed(self.work(settings), placement, self.rates, self.host, ubatch=settings.ubatch)
            known = self._measured[placement, settings] = memory, speed
        memory, speed = known
        if any(shifts_bytes):
            devices = tuple(
                replace(device, weights_bytes=device.weights_bytes + shift)
                for device, shift in zip(memory.devices, shifts_bytes, strict=True)
            )
            memory = replace(memory, devices=devices)
        return Candidate(
            label=label,
            placement=placement,
            settings=settings,
            memory=memory,
            limits=self.limits if limits is None else limits,
            decode_tokens_per_s=speed.decode_tokens_per_s,
            prefill_tokens_per_s=speed.prefill_tokens_per_s,
            calibrated=speed.calibrated,
        )

    def stock(self, load: StockLoad, label: str) -> Candidate:
        """Stock's load as a candidate; its limits are all free bytes: it keeps margins of its own, but knows of no reserve."""
        return self.candidate(label, load.placement, load.settings, limits=self._free, shifts_bytes=load.shifts_bytes)

    def solos(self, least_batch: int) -> list[Candidate]:
        """The model on each GPU alone, with at least stock's batch where that fits too."""
        return [self.alone(gpu, least_batch) for gpu in range(len(self.rig.gpus))]

    def alone(self, gpu: int, least_batch: int = 0) -> Candidate:
        """The model on ``gpu`` alone, with Ollama's batch there, or ``least_batch`` where that is larger and fits."""
        placement = solo(gpu, n_gpus=len(self.rig.gpus), n_layers=self.profile.n_layers)
        settings = settings_on(self.profile, self.rig, self.request, (gpu,))
        candidate = self.candidate(in_words(placement, self.names), placement, settings)
        if settings.batch >= least_batch or self.request.num_batch is not None:
            return candidate
        larger = self.candidate(candidate.label, placement, replace(settings, batch=least_batch, ubatch=least_batch))
        return larger if self.holds(larger) else candidate

    def boosted(self, gpus: Sequence[int], settings: LoadSettings) -> Iterator[Candidate]:
        """The boost algorithm's layouts on ``gpus``, with the memory model's reserve in place of its own."""
        costs = layer_costs(self.profile, settings)
        first, middle, last = self._buffers(self.sizes(settings), len(gpus), partial=False)
        buffer = max(first, middle, last)
        reserves = [self.rig.gpus[i].free_bytes - self.limits[i] + self.request.runtime_bytes + buffer for i in gpus]
        layouts = Layouts(costs, [self.rig.gpus[i] for i in gpus], reserves)
        seen: set[Assignment] = set()
        for layout in map(layouts.at, BOOSTS):
            if layout.final in seen:
                continue
            seen.add(layout.final)
            placement = on_rig(layout.placement, gpus, len(self.rig.gpus))
            if self._executable(placement):
                yield self.candidate(f"boost {layout.boost:g}", placement, settings)

    def _executable(self, placement: Placement) -> bool:
        """llama-server's ``-ngl`` counts the output layer first: it can't leave it in RAM and layers on a GPU."""
        return self.request.era == "runner" or placement.output_gpu is not None or not placement.order

    def holds(self, candidate: Candidate) -> bool:
        """Whether every GPU holds it, and the host's RAM what stays there."""
        free = self.rig.host.free_bytes
        in_ram = candidate.placement.kind in ("partial", "cpu")
        return candidate.fits and not (in_ram and free is not None and candidate.memory.host.total_bytes > free)

    def outruns_ram(self, gpu: int, settings: LoadSettings) -> bool:
        """Whether every layer decodes on ``gpu`` at least as fast as in the host's RAM. An old card beside fast RAM does not."""
        reads, rates, host = self.work(settings).layer_bytes, self.rates[gpu], self.host
        return all(
            read / rates.decode_bytes_per_s + rates.layer_s <= read / host.decode_bytes_per_s + host.layer_s
            for read in (min(reads), max(reads))
        )

    def best_split(
        self, gpus: Sequence[int], settings: LoadSettings, *, partial: bool = False, cpu_experts: int = 0
    ) -> Candidate | None:
        """The split over ``gpus`` with the fastest decode that fits; ``None`` where none does.

        ``partial``: the lowest layers, one at least, stay in RAM. ``cpu_experts``: so many layers, the lowest, keep their
        experts there.
        Compute buffers are corrected after each round. With experts in RAM they differ so much between placements that moves of
        single layers are tried at last.
        """
        sizes, work = self.sizes(settings), self.work(settings)
        sample = self._buffers(sizes, len(gpus), partial=partial, experts=bool(cpu_experts))
        doubt = OPTIMISM if len(gpus) <= EXACT_GPUS else 1.0
        buffers = {
            (gpu, part, layers): int(buffer * doubt * layers / FEW_LAYERS)
            for gpu in gpus
            for part, buffer in zip(ROLES, sample, strict=True)
            for layers in range(FEW_LAYERS + 1)
        }
        problem = Problem(
            held=_less_experts(sizes.held_prefix, sizes.experts_prefix, cpu_experts),
            read=_less_experts(work.read_prefix, work.expert_prefix, cpu_experts),
            inverse={gpu: 1 / self.rates[gpu].decode_bytes_per_s for gpu in gpus},
            layer_s={gpu: self.rates[gpu].layer_s for gpu in gpus},
            rooms={gpu: self.limits[gpu] - self.request.runtime_bytes for gpu in gpus},
            buffers=buffers,
            output_held=sizes.output_bytes,
            output_read=work.output_bytes,
            host=(1 / self.host.decode_bytes_per_s, self.host.layer_s) if partial else None,
        )
        best: Candidate | None = None
        seen: set[Placement] = set()
        for _ in range(ROUNDS):
            split = problem.solve()
            if split is None:
                break
            placement = self._placement(split, cpu_experts)
            if placement in seen:
                break
            seen.add(placement)
            found = self.candidate(in_words(placement, self.names), placement, settings)
            near = [found]
            if cpu_experts and not self.holds(found):  # the cut beside it may need a smaller buffer
                near += [self.candidate(in_words(moved, self.names), moved, settings) for moved in self.moves(found)]
            best = max(
                (candidate for candidate in (best, *near) if candidate and self.holds(candidate)),
                key=lambda candidate: candidate.decode_tokens_per_s,
                default=None,
            )
            corrected = {
                (gpu, role(position, len(split.counts)), few(layers)): found.memory.devices[gpu].compute_bytes
                for position, (gpu, layers) in enumerate(split.counts)
                if found.memory.devices[gpu].total_bytes > self.limits[gpu]
            }
            if corrected.items() <= buffers.items():  # the next round would find the same
                break
            buffers.update(corrected)
        return self._polished(best, "decode") if best and cpu_experts else best

    def _polished(self, best: Candidate, objective: Objective) -> Candidate:
        """``best`` after every move of one layer at a time that is faster and fits, measured exactly."""
        seconds = self._turn_seconds(best.settings, best.placement, objective)
        moves = iter(self.moves(best))
        while (placement := next(moves, None)) is not None:
            moved_s = self._turn_seconds(best.settings, placement, objective)
            if moved_s < seconds * (1 - LEAST_GAIN):
                moved = self.candidate(in_words(placement, self.names), placement, best.settings)
                if self.holds(moved):
                    best, seconds = moved, moved_s
                    moves = iter(self.moves(best))
        return best

    def _turned(self, candidate: Candidate) -> Candidate:
        """``candidate`` with its devices in the opposite order."""
        placement = candidate.placement
        order = tuple(gpu for gpu in reversed(placement.order) if placement.layers[gpu])
        turned = replace(placement, order=order, output_gpu=order[-1])
        return self.candidate(in_words(turned, self.names), turned, candidate.settings)

    def _turn_seconds(self, settings: LoadSettings, placement: Placement, objective: Objective) -> float:
        """Seconds of the turn that ``objective`` wants fast."""
        (prompt, answer), work = turn(objective), self.work(settings)
        seconds = answer * self.decode_seconds(work, placement) if answer else 0.0
        if prompt:
            each = prefill_seconds(work, placement, self.rates, self.host, ubatch=settings.ubatch) / PROMPT_TOKENS
            seconds += prompt * each
        return seconds

    def moves(self, candidate: Candidate) -> Iterator[Placement]:
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

        if placement.cpu_layers and runs:
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
        """The best splits over ``gpus``: all on them, or (not ``full``) with a rest in RAM, whole layers or experts.

        ``best_split`` is the fastest to decode; where prompts count, full ones are then moved, layer by layer, to what is wished.
        """
        groups, objective = [tuple(gpus)], self.request.objective
        if len(gpus) <= EXACT_GPUS:  # compute buffers depend on how many GPUs there are
            groups = [group for count in range(1 + full, len(gpus) + 1) for group in combinations(gpus, count)]
        elif full and objective != "decode":
            fastest = sorted(gpus, key=lambda gpu: (-self.rates[gpu].prefill_flops_per_s, gpu))
            groups += [tuple(sorted(fastest[:count])) for count in range(2, EXACT_GPUS + 1)]
        for group in groups:
            if len(group) > full and (best := self.best_split(group, settings, partial=not full)):
                yield best
                if full and objective != "decode":
                    yield from (self._polished(start, objective) for start in (best, self._turned(best)) if self.holds(start))
            if not full and self.profile.expert_count:
                yield from self._expert_splits(group, settings)

    def _expert_splits(self, gpus: Sequence[int], settings: LoadSettings) -> Iterator[Candidate]:
        """Experts of as few layers as possible in RAM: more never read faster, except where that frees a faster GPU."""
        low, high = 0, self._most_in_ram(gpus[0], settings)
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

    def _most_in_ram(self, gpu: int, settings: LoadSettings) -> int:
        """How many of the lowest layers can have their experts in the host's RAM, beside what is there anyway."""
        n, free, experts = self.profile.n_layers, self.rig.host.free_bytes, self.sizes(settings).experts_prefix
        if free is None or experts[n] * 2 < free:  # half of it is more than enough for all else
            return n
        everything = replace(solo(gpu, n_gpus=len(self.rig.gpus), n_layers=n), cpu_experts=frozenset(range(n)))
        host = estimate_memory(self.profile, settings, everything).host
        return max(bisect_right(experts, free - (host.total_bytes - experts[n])) - 1, 0)

    def _placement(self, split: Split, cpu_experts: int) -> Placement:
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


def _less_experts(prefix: Sequence[float], experts: Sequence[float], layers: int) -> Sequence[float]:
    """Prefix sums without the experts of the ``layers`` lowest layers."""
    return [value - experts[min(i, layers)] for i, value in enumerate(prefix)] if layers else prefix
