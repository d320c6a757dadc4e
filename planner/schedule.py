"""What one device computes, in order: its inputs, then the program of each of its layers (``programs``).

llama.cpp (b10488) cuts the graph of a micro-batch into the parts that run on each device (``ggml_backend_sched_split_graph``,
``ggml/src/ggml-backend.cpp``). Nothing here depends on the number of cells, so that a schedule serves every context; layers of a
kind share one program.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby, pairwise

from planner.allocator import align
from planner.cache import layer_caches
from planner.inputs import (
    CHOICE_MASK,
    DEEPSTACK,
    EMBEDDING,
    EXTRA_ROWS,
    F32,
    INDICES,
    KEY_ROTATION,
    MASK,
    NORMED,
    OUTPUT_ROWS,
    PER_LAYER,
    PERMUTED,
    POSITIONS,
    RESIDUAL,
    STATE_ROWS,
    VALUE_ROTATION,
    WINDOW,
    ZEROS,
    Scale,
    attention_features,
    borrowed_names,
    deepstack_layers,
    embedding_bytes,
    input_sizes,
    rotates,
    slice_name,
    sparse_cells,
)
from planner.profile import ModelProfile
from planner.programs import Programs, adds_positions, layer_kinds
from planner.tape import STEADY, Program, Size
from planner.traits import (
    LATE_OUTPUTS,
    attends_beside_state,
    attends_in_ram,
    fetches_early,
    is_mamba,
    next_early,
    scans_on_gpu,
)

PRE_NORMS = frozenset({"attn_norm.weight", "ln1.weight"})
"""Tensors with which a layer begins; some architectures norm only what attention and feed-forward return."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DevicePart:
    """What lies on a device, and what it computes for others.

    * ``layers``: the repeating layers that lie on it.
    * ``visitors``: layers in RAM that it computes for the CPU, copying their weights: the lowest ones, on the first device.
    * ``first``: the embedding comes from the host; otherwise the residual comes from the device before.
    * ``normed``: it comes normed as well, see ``sends_norm``.
    * ``sends_norm``: the first norm of the next device's first layer is computed here.
    * ``output``: the output layer lies here.
    * ``copies``: of each input: 1, or ``PIPELINE_COPIES``.
    * ``host_experts``: layers of this device whose routed experts lie in RAM; the first device computes them.
    * ``foreign_experts``: those of other devices' layers, which this one, the first, computes.
    """

    layers: range
    visitors: range = range(0)
    first: bool = True
    normed: bool = False
    sends_norm: bool = False
    output: bool = False
    copies: int = 1
    host_experts: frozenset[int] = frozenset()
    foreign_experts: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False, slots=True)
class Schedule:
    """What happens in the buffer of one device. Two are equal only if they are the same.

    * ``leaves``: name and size of what lies there before everything else, once.
    * ``unnamed``: tensors that stay all the while; nothing here reads them.
    * ``inputs``: name and size of what lives when the first program begins.
    * ``copies``: of each of those.
    * ``programs``: in order, with how often each is repeated.
    """

    leaves: tuple[tuple[int, Size], ...]
    unnamed: tuple[Size, ...]
    inputs: tuple[tuple[int, Size], ...]
    copies: int
    programs: tuple[tuple[Program, int], ...]


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
        self.sizes = input_sizes(profile, scale)
        self.embedding_bytes = embedding_bytes(profile, scale)
        self.image_bytes = self.embedding_bytes * (1 + deepstack_layers(profile))
        """Bytes of the input that takes an image's embeddings instead of tokens."""
        self._altup = profile.integer("altup.num_inputs") > 1
        self._lends = any(cache.borrows_cache for cache in self._caches)
        self._width = profile.embedding_length * F32
        self._sparse = sparse_cells(profile) > 0
        self._last_owners = {cache.windowed: i for i, cache in enumerate(self._caches[: self._n]) if cache.owns_cache}
        self._fetched_behind, self._fetched_behind_any = profile.remember(
            "fetched behind", None, lambda: _fetched_behind(profile)
        )
        self._scans_on_host = profile.remember(
            "scans on the host", None, lambda: {i for i in set(self._kinds) if not scans_on_gpu(profile, i)}
        )
        self._programs = Programs(profile, scale, self.sizes)
        self._parts: dict[DevicePart, Schedule] = {}
        self._alikes: dict[object, Schedule] = {}
        self._read_by: dict[tuple[int, bool, bool, bool], tuple[int, ...]] = {}
        last = {self._kinds[self._n - 1]: self._n - 1}
        reads = [self._inputs_of(i, visiting=False, on_host=True) for i in {*self._kinds, *last.values()}]
        self.host_inputs = frozenset(name for names in reads for name in names) - {PER_LAYER, DEEPSTACK}
        """Names of the inputs that the host fills in."""

    def of(self, part: DevicePart) -> Schedule:
        """The schedule of a device."""
        found = self._parts.get(part)
        if found is None:
            if len(self._parts) >= PARTS_KEPT:  # a server plans for years, each time with other free memory
                self._parts.clear()
                self._alikes.clear()
            alike = self._alike(part)
            if alike not in self._alikes:
                self._alikes[alike] = self._schedule(part)
            found = self._parts[part] = self._alikes[alike]
        return found

    def handed(self, i: int, cpu_layers: int) -> Size:
        """What a layer in RAM takes there: new keys and values, or what its state is made of, from the device that computes it.

        Where attention runs in RAM, and is not fused, its scores are in it. ``cpu_layers`` lie in RAM.
        """
        profile, cache, tensors, scale = self._profile, self._caches[i], self._profile.layer_tensors[i], self._scale
        features = cache.key_elements + cache.value_elements if cache.owns_cache else 0
        if "attn_qkv.weight" in tensors and cache.owns_cache:  # values are a view of the joint projection
            features = tensors["attn_qkv.weight"].shape[1] + cache.key_elements
        if cache.state_elements:
            inner, state = profile.integer("ssm.inner_size"), profile.integer("ssm.state_size")
            channels = inner + 2 * profile.integer("ssm.group_count") * state
            in_ram = is_mamba(tensors)
            features = 3 * channels + inner if in_ram else channels
        growth = 0
        if attends_beside_state(tensors):
            queries, attended = attention_features(profile, cache, i)
            features = attended + features - cache.key_elements - cache.value_elements if scale.fused else attended
        if cache.attends and not scale.fused and self._attends_in_ram(i, cpu_layers):
            queries, attended = attention_features(profile, cache, i)
            features += queries + attended
            growth = profile.per_layer("attention.head_count")[i] * scale.tokens * F32
            growth += scale.values.row_bytes(cache.value_elements) * scale.sequences if scale.attention == "fallen" else 0
        fixed = features * scale.tokens * F32 + cache.state_elements * scale.sequences * F32
        if scale.attention == "host" and cache.attends:  # as all attention then, which reads the cache where it lies
            fixed = max(fixed, sum(attention_features(profile, cache, i)) * scale.tokens * F32)
        return fixed, ((0, growth) if cache.windowed else (growth, 0))

    @property
    def arriving_bytes(self) -> int:
        """Bytes of the embedding as it arrives, with positions beside it and the embeddings of each layer (Gemma 3n, Gemma 4)."""
        return self.embedding_bytes * (1 + adds_positions(self._profile)) + self.sizes[PER_LAYER][0]

    def _alike(self, part: DevicePart) -> object:
        """Equal for parts whose buffers are equal: layers of the same kinds in the same order, and the same inputs."""
        if part.visitors or part.host_experts or part.foreign_experts:
            return part
        kinds = self._kinds[part.layers.start : part.layers.stop]
        ends = part.layers.stop >= self._n
        unnamed = (*self._hoisted(part), *self._borrowed(part))
        return kinds, ends, unnamed, part.first, part.normed, part.sends_norm, part.output, part.copies

    def _schedule(self, part: DevicePart) -> Schedule:
        own = range(part.layers.start, min(part.layers.stop, self._n))
        fed = self._altup and part.first and not part.output  # Gemma 3n's streams are made where the output layer lies
        normed = (part.normed and self._begins_normed(part.layers.start)) or fed
        late_output = part.output and self._profile.architecture in LATE_OUTPUTS
        arrival = [PER_LAYER] if self._has(PER_LAYER) and part.first else []
        arrival += [RESIDUAL] if not normed else [NORMED]
        arrival += [PERMUTED, RESIDUAL] if normed and self._altup else []
        arrival += [EMBEDDING] if fed else []
        arrival += [NORMED] if part.first and adds_positions(self._profile) else []
        inputs: list[int] = []
        borrowed = {} if part.copies > 1 else self._borrowed(part)
        if not part.visitors:
            until = min(part.host_experts, default=self._n) if part.first else self._n
            alike = not borrowed and not self._has(PER_LAYER)  # then a layer reads what another of its kind does
            for i in sorted({(self._kinds[i], i == self._n - 1): i for i in reversed(own)}.values()) if alike else own:
                if i > until:
                    break  # what comes later is copied along with weights from RAM
                inputs += self._copied_to(i, borrowed.get(i, ()))
                inputs += [slice_name(i)] if self._has(PER_LAYER) and not part.first and part.copies == 1 else []
            inputs += [OUTPUT_ROWS] if late_output and not (part.first and part.host_experts) else []
        if normed and own and not part.visitors:  # the residual itself is first read where the first layer adds to it
            arrival += self._copied_to(own.start, borrowed.get(own.start, ()))
        early: tuple[int, ...] = ()
        if own and not part.visitors and fetches_early(self._profile.layer_tensors[own.start]):
            early = (STATE_ROWS, EXTRA_ROWS)  # the first layer's states are fetched before anything is computed
        names = dict.fromkeys((*early, *arrival, RESIDUAL, *inputs))
        narrow: Size = (self.embedding_bytes, STEADY)
        prelude = part.first and not fed
        programs = [self._programs.prelude(part.copies > 1)] if prelude else []
        programs += self._layers(part, own, normed=normed, fed=fed, late_output=late_output, borrowed=borrowed)
        if own and not part.output:
            programs.append(self._programs.handed_over(norm=part.sends_norm and self._begins_normed(part.layers.stop)))
        programs += [self._programs.foreign(i) for i in part.foreign_experts]
        programs += [self._programs.output(pinned=part.copies > 1 and not own)] if part.output else []
        return Schedule(
            leaves=tuple((ZEROS - i, self.sizes[ZEROS - i]) for i in (*part.visitors, *own) if self._sparse),
            unnamed=(
                *self._hoisted(part),
                *self._slices(part),
                *self._token_shifts(part),
                *self._streams(part),
                *self._pinned_copies(part),
                *self._answers(part),
            ),
            inputs=tuple((name, narrow if name == RESIDUAL and prelude else self.sizes[name]) for name in names),
            copies=part.copies,
            programs=tuple((program, len(list(run))) for program, run in groupby(programs)),
        )

    def _layers(
        self, part: DevicePart, own: range, *, normed: bool, fed: bool, late_output: bool, borrowed: Mapping[int, tuple[int, ...]]
    ) -> list[Program]:
        """The programs of a device's layers, visitors first."""
        everything = [*part.visitors, *own]
        pinned = part.copies > 1
        fetched = {b: a for b, a in self._fetched_behind_any.items() if b in part.layers and a in everything}
        sliced = self._has(PER_LAYER) and not part.first and not pinned
        first_reader: dict[int, int] = {}
        last_reader: dict[int, int] = {}
        all_reads = [
            (i, self._reads(i, visiting=i in part.visitors, cpu_layers=part.visitors.stop) + borrowed.get(i, ()))
            for i in everything
        ]
        for found, readers in ((first_reader, all_reads), (last_reader, all_reads[::-1])):
            seen = set()
            for i, reads in readers:
                if reads not in seen:
                    seen.add(reads)
                    for name in reads:
                        found.setdefault(name, i)
        if sliced:
            last_reader |= {slice_name(i): i for i in everything}
        if late_output:
            last_reader[OUTPUT_ROWS] = self._n
            first_reader.setdefault(OUTPUT_ROWS, self._n)
        if not part.first:
            last_reader |= {PER_LAYER: self._n, DEEPSTACK: self._n}  # among the device's unnamed tensors, see _slices
        waiting = set(first_reader) - {PER_LAYER, DEEPSTACK} if part.visitors else set()
        stops = sorted(part.host_experts) if part.first else []
        if stops and not part.visitors:
            waiting = {name for name in first_reader if first_reader[name] > stops[0]} - {PER_LAYER, DEEPSTACK}
        everything_given = self.host_inputs.union(last_reader)  # a visitor may read what this device has no copy of
        ends = set(last_reader.values())
        fetchers = set(fetched.values())
        programs = []
        usual: dict[tuple[int, bool, bool], Program] = {}  # of layers beside which nothing begins or ends
        special = {*part.visitors, *part.host_experts, *ends, *borrowed, *everything[:1], 0, self._n - 1}
        for i in everything:
            key = (self._kinds[i], i in fetched, i in fetchers)
            ordinary = i not in special and not sliced and not self._sparse
            if ordinary and key in usual:
                programs.append(usual[key])
                continue
            begins = i == everything[0]
            visits = i in part.visitors
            brings = {name for name in waiting if first_reader[name] == i and visits}
            if visits and i == part.visitors[-1]:
                brings = {name for name in waiting if not stops or first_reader[name] <= stops[0]}
            if part.first and i in part.host_experts:
                following = next((stop for stop in stops if stop > i), self._n)
                brings = {name for name in waiting if first_reader[name] <= following}
            waiting = waiting - brings
            kept = everything_given - ({PER_LAYER} if i == 0 and not (fed and pinned) else set())
            if i in ends and not pinned:
                kept = kept.difference(name for name, reader in last_reader.items() if reader == i)
            if begins and pinned and (not part.first or fed or not self._programs.has_prelude):
                kept |= {RESIDUAL, NORMED, EMBEDDING, PERMUTED}
            programs.append(
                self._programs.layer(
                    i,
                    offloaded=visits,
                    host_experts=i in part.host_experts,
                    experts_away=i in part.host_experts and not part.first,
                    normed=begins and normed,
                    brings=tuple(name for name in first_reader if name in brings),
                    has_states=i in fetched,
                    fetches_states=i in fetchers,
                    pipelined=pinned,
                    borrowed=borrowed.get(i, ()),
                    per_layer=slice_name(i) if sliced else PER_LAYER,
                    kept=kept,
                )
            )
            if ordinary:
                usual[key] = programs[-1]
            programs += [self._programs.release(ZEROS - i)] if self._sparse else []
        return programs

    def _begins_normed(self, i: int) -> bool:
        """Whether a layer's first operation is a norm, which the device before computes with the residual."""
        return i < self._n and not PRE_NORMS.isdisjoint(self._profile.layer_tensors[i])

    # inputs

    def _has(self, name: int) -> bool:
        return self.sizes[name] != (0, STEADY)

    def _hoisted(self, part: DevicePart) -> list[Size]:
        """Inputs that two devices exchange over their border because states are fetched early.

        ``build_rs`` puts the fetch into the graph ahead of the last operations of the layer before. Where that lies on another
        device, those up to the next weight are computed here, and copied back: a Mamba layer's gate (from the whole
        projection), or the rotation of what attention returned.
        """
        features: list[int] = []
        if part.copies == 1:  # they come and go
            return []
        for after, before in self._fetched_behind.items():
            if before < part.layers.start <= after < part.layers.stop and not part.first:
                features += self._moved(before)[:1]
            elif part.layers.start <= before < part.layers.stop <= after:
                features += self._moved(before)[1:]
        return [(align(count * self._scale.tokens * F32), STEADY) for count in features]

    def _moved(self, i: int) -> tuple[int, ...]:
        """Features that another device gets to compute the last operations of a layer's mixer, and those that it returns."""
        tensors, cache = self._profile.layer_tensors[i], self._caches[i]
        if is_mamba(tensors):
            return tensors["ssm_in.weight"].shape[1], self._profile.integer("ssm.inner_size")
        if cache.attends and self._has(VALUE_ROTATION - (WINDOW if cache.windowed else 0)):
            return (attention_features(self._profile, cache, i)[1],) * 2
        return ()

    def _borrowed(self, part: DevicePart) -> dict[int, tuple[int, ...]]:
        """Layers that read another's cache, which lies elsewhere (Gemma 3n, Gemma 4): names of their copies of it."""
        if not self._lends or self._scale.attention == "host":
            return {}
        found: dict[int, tuple[int, ...]] = {}
        for i in part.layers:
            borrows = i < self._n and self._caches[i].borrows_cache
            if borrows and self._last_owners[self._caches[i].windowed] not in part.layers:
                found[i] = borrowed_names(i)
        return found

    def _pinned_copies(self, part: DevicePart) -> list[Size]:
        """Those copies where a pipeline keeps them all the while."""
        return [self.sizes[name] for names in self._borrowed(part).values() for name in names] if part.copies > 1 else []

    def _answers(self, part: DevicePart) -> list[Size]:
        """What attention and scans on the CPU return; without a pipeline that is only there when it is needed."""
        return [(result, STEADY) for result, _ in self.on_host(part.layers)] if part.copies > 1 else []

    def _attended_bytes(self, i: int) -> int:
        """Bytes of attention's result in a layer."""
        _, features = attention_features(self._profile, self._caches[i], i)
        return align(features * self._scale.tokens * F32)

    def on_host(self, layers: range) -> list[tuple[int, Size]]:
        """What these layers of a GPU leave to the CPU: bytes of the result there, and of all that is copied there for it.

        Attention that CUDA cannot fuse, with its queries, keys and values; a Mamba layer's scan that CUDA has no kernel for, with
        its states.
        """
        scale = self._scale
        found: list[tuple[int, Size]] = []
        if scale.attention != "host" and not self._scans_on_host:
            return found
        for i in range(layers.start, min(layers.stop, self._n)):
            cache = self._caches[i]
            if cache.attends and scale.attention == "host":
                row = scale.keys.row_bytes(cache.key_elements)
                row += scale.values.row_bytes(cache.value_elements) if cache.value_elements else row
                growth = row * scale.sequences
                queries, _ = attention_features(self._profile, cache, i)
                copied = queries * scale.tokens * F32, ((0, growth) if cache.windowed else (growth, 0))
                found.append((self._attended_bytes(i), copied))
            if self._kinds[i] in self._scans_on_host:
                profile = self._profile
                inner, state = profile.integer("ssm.inner_size"), profile.integer("ssm.state_size")
                states = inner * state * scale.sequences
                read = 2 * inner + 2 * max(profile.integer("ssm.group_count"), 1) * state  # tokens, steps, B and C
                result = align((inner * scale.tokens + states) * F32)
                found.append((result, ((read * scale.tokens + states) * F32, STEADY)))
        return found

    def _token_shifts(self, part: DevicePart) -> list[Size]:
        """What RWKV's devices exchange beside the residual: two views of a norm, the first layer's values, a mixed state."""
        if not any(name.startswith("time_mix_") for name in self._profile.layer_tensors[0]):
            return []
        values = "time_mix_v1.weight" in self._profile.layer_tensors[-1]
        count = (0 if part.first else 2 + values) + (0 if part.output else 1 + (values and part.first))
        return [(self.embedding_bytes, STEADY)] * count

    def _slices(self, part: DevicePart) -> list[Size]:
        """Embeddings of its layers that a later device keeps: a tensor for each (Gemma 3n, Gemma 4), or a view (Qwen3-VL)."""
        if stacked := range(part.layers.start, min(part.layers.stop, deepstack_layers(self._profile))):
            rows = self._scale.tokens - 1
            return (
                []
                if part.first
                else [(align(self.image_bytes // self._scale.tokens * rows + self._width), STEADY)] * len(stacked)
            )
        if part.first or part.copies == 1 or not self._has(PER_LAYER):
            return []
        return [self.sizes[slice_name(i)] for i in part.layers]

    def _streams(self, part: DevicePart) -> list[Size]:
        """Gemma 3n's residual streams are made where the output layer lies, and travel twice: as they are, and permuted."""
        if not self._altup or part.first or not part.output or part.copies == 1:
            return []
        return [self.sizes[PER_LAYER], (self.embedding_bytes, STEADY)]

    def _reads(self, i: int, *, visiting: bool, cpu_layers: int = 0) -> tuple[int, ...]:
        """Inputs of the graph that a layer reads on its device, in order."""
        in_ram = visiting and self._attends_in_ram(i, cpu_layers)
        key = (i if visiting else self._kinds[i], i == self._n - 1, visiting, in_ram)
        found = self._read_by.get(key)
        if found is None:
            found = self._read_by[key] = self._inputs_of(i, visiting=visiting, in_ram=in_ram)
        return found

    def _copied_to(self, i: int, borrowed: tuple[int, ...]) -> list[int]:
        """Inputs that a layer's device gets for it, in order; a borrowed cache comes before the mask, what is left after it."""
        names = [name for name in self._reads(i, visiting=False) if name not in (PER_LAYER, DEEPSTACK)]
        if not borrowed:
            return names
        offset = WINDOW if self._caches[i].windowed else 0
        early = [name for name in names if name in (POSITIONS, KEY_ROTATION - offset)]
        late = [name for name in names if name not in (*early, MASK - offset)]
        return [*early, *borrowed, MASK - offset, *late]

    def _attends_in_ram(self, i: int, cpu_layers: int) -> bool:
        """Whether attention of a layer in RAM is computed there: not where the states fetched behind it are on a GPU."""
        return attends_in_ram(self._profile, i) and (next_early(self._profile, i) or 0) < cpu_layers

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


def _fetched_behind(profile: ModelProfile) -> tuple[dict[int, int], dict[int, int]]:
    """Layers whose states are fetched early -> the layer behind whose mixer that happens; then with its routed experts too."""
    tensors, kinds, caches = profile.layer_tensors, layer_kinds(profile), layer_caches(profile)
    early_kinds = {kind for kind in set(kinds) if fetches_early(tensors[kind])}
    early = {i for i, kind in enumerate(kinds) if kind in early_kinds}
    mixers = [i for i in range(len(kinds)) if i in early or caches[i].attends] if early else []
    behind = {b: a for a, b in pairwise(mixers) if next_early(profile, a) == b}
    routed = {b: b - 1 for b in range(1, len(kinds)) if b in early and "ffn_gate_inp.weight" in tensors[b - 1]}
    return behind, behind | routed


def schedules_of(profile: ModelProfile, scale: Scale) -> Schedules:
    """The schedules of a profile at a scale; made once."""
    return profile.remember("schedules", scale, lambda: Schedules(profile, scale))
