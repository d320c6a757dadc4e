"""Compute buffers: what the activations of one micro-batch take on each device and on the host.

llama.cpp (b10488) reserves the buffers once, for the largest graph (``llama_context::sched_reserve``, ``src/llama-context.cpp``),
and cuts that graph into the parts that run on each device (``ggml_backend_sched_split_graph``, ``ggml/src/ggml-backend.cpp``).
Here the part of one device is replayed through a port of its allocator. Layers of a kind leave the buffer in the same state
soon, so that a hundred layers cost hardly more than three.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from planner.allocator import Allocator, State, Step, align, replay
from planner.cache import layer_caches, window_tokens
from planner.families import family_of
from planner.graph import (
    F16,
    F32,
    I32,
    I64,
    INDICES,
    KEY_ROTATION,
    LATE_OUTPUTS,
    MASK,
    NORMED,
    OUTPUT_ROWS,
    PER_LAYER,
    POSITIONS,
    RESIDUAL,
    STATE_ROWS,
    STATES,
    VALUE_ROTATION,
    WINDOW,
    LayerGraph,
    attends_in_ram,
    is_mamba,
    next_mamba,
    rotates,
    rotation_bytes,
    scale_of,
    weight_signature,
)
from planner.profile import ModelProfile
from planner.settings import LoadSettings
from planner.tape import Tape

PIPELINE_COPIES = 4
"""Copies of each input of a device with pipeline parallelism (``GGML_SCHED_MAX_COPIES`` in ``ggml/src/ggml-backend.cpp``)."""

OFFLOAD_MIN_TOKENS = 32
"""Tokens from which CUDA takes over operations whose weights lie in RAM (``ggml_backend_cuda_device_offload_op``)."""

UNFOLLOWED_BYTES = 32 * 2**20
"""Added where Gemma 3n's layers lie in RAM: the order of their small copies is not followed to the last one (the largest
shortfall in tests/data/memory was 74 MiB)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DevicePart:
    """What one device computes.

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


@dataclass(frozen=True, slots=True)
class _Program:
    """Compiled steps; afterwards the tensor in slot ``source`` is known as ``name`` for each of ``exports``."""

    number: int
    steps: tuple[Step, ...]
    exports: tuple[tuple[int, int], ...]


class ComputeModel:
    """Compute buffers of one model with one set of settings. Results are kept; make one with ``compute_model``."""

    def __init__(self, profile: ModelProfile, settings: LoadSettings) -> None:
        self._profile = profile
        self._caches = layer_caches(profile)
        self._scale = scale_of(profile, settings)
        self._n = profile.n_computed_layers
        self._kinds = layer_kinds(profile)
        fused = self._scale.flash_attention
        mask_element = F16 if fused else F32
        # without flash attention V is stored transposed, and each of its elements has an index (build_input_v_idxs)
        indices = 2 if fused or self._scale.falls_back else 1 + max((cache.value_elements for cache in self._caches), default=1)
        tokens, width = self._scale.tokens, profile.embedding_length
        streams = max(profile.integer("altup.num_inputs"), 1)
        per_layer = profile.integer("embedding_length_per_layer_input") * profile.n_layers
        self._sizes = {
            RESIDUAL: align(width * streams * tokens * F32),
            NORMED: align(width * tokens * F32),
            PER_LAYER: align(per_layer * tokens * F32),
            POSITIONS: align(tokens * I32),
            OUTPUT_ROWS: align(self._scale.outputs * I32),
            STATE_ROWS: align(self._scale.sequences * I32),
        }
        for offset, cells in ((0, self._scale.cells), (WINDOW, self._scale.window_cells)):
            self._sizes[MASK - offset] = align(cells * tokens * mask_element)
            self._sizes[INDICES - offset] = align(indices * tokens * I64)
            for matrix in (KEY_ROTATION - offset, VALUE_ROTATION - offset):
                self._sizes[matrix] = align(rotation_bytes(profile, self._scale, matrix))
        self._embedding_bytes = align(width * tokens * F32)
        self._altup = streams > 1
        self._owners = [i for i in range(self._n) if self._caches[i].owns_cache]
        self._mamba_layers = [i for i in range(self._n) if is_mamba(profile.layer_tensors[i])]
        channels = profile.integer("ssm.inner_size") + 2 * profile.integer("ssm.group_count") * profile.integer("ssm.state_size")
        self._sizes[STATES] = align(max(profile.integer("ssm.conv_kernel") - 1, 0) * channels * self._scale.sequences * F32)
        self._programs: dict[object, _Program] = {}
        self._transitions: dict[object, tuple[State, int, dict[int, int]]] = {}
        self._parts: dict[DevicePart, int] = {}
        self._alikes: dict[object, int] = {}
        self._read_by: dict[tuple[int, bool, bool], tuple[int, ...]] = {}

    def device_bytes(self, part: DevicePart) -> int:
        """Bytes of the compute buffer of a device."""
        known = self._parts.get(part)
        if known is None:
            alike = self._alike(part)
            if alike not in self._alikes:
                self._alikes[alike] = self._replay(part)
            known = self._parts[part] = self._alikes[alike]
        return known

    def _alike(self, part: DevicePart) -> object:
        """Equal for parts whose buffers are equal: layers of the same kinds in the same order, and the same inputs."""
        kinds = tuple(self._kinds[i] for i in part.layers if i < self._n)
        ends = part.layers.stop >= self._n
        if part.visitors or part.host_experts or part.foreign_experts:
            return part
        inputs = (*self._hoisted(part), -1, *self._borrowed(part))
        return kinds, ends, inputs, part.first, part.normed, part.sends_norm, part.output, part.copies

    def host_bytes(self, *, visitors: range, copies: int) -> int:
        """Bytes of the host's compute buffer: the inputs, and what layers in RAM hand over for their caches."""
        read = {name for i in range(self._n) for name in self._reads(i, visiting=False)} - {PER_LAYER}
        masks = sum(self._sizes[name] for name in read)
        handed = max((self._handed_bytes(i) for i in visitors), default=0)
        embedding = self._embedding_bytes * (1 + self._adds_positions) + self._sizes[PER_LAYER]
        return self._embedding_bytes + masks * copies + max(embedding, handed)

    def _handed_bytes(self, i: int) -> int:
        """What a layer in RAM copies back from the device that computes it: new keys and values, or what its state is made of."""
        profile, cache, tensors = self._profile, self._caches[i], self._profile.layer_tensors[i]
        features = cache.key_elements + cache.value_elements if cache.owns_cache else 0
        if "attn_qkv.weight" in tensors and cache.owns_cache:  # values are a view of the joint projection
            features = tensors["attn_qkv.weight"].shape[1] + cache.key_elements
        if cache.state_elements:
            inner, state = profile.integer("ssm.inner_size"), profile.integer("ssm.state_size")
            channels = inner + 2 * profile.integer("ssm.group_count") * state
            in_ram = is_mamba(tensors)
            features = 3 * channels + inner if in_ram else channels
        return features * self._scale.tokens * F32 + (cache.state_elements * self._scale.sequences * F32)

    # the replay of a part

    def _replay(self, part: DevicePart) -> int:
        heap = Allocator()
        slots: dict[int, int] = {}
        own = [i for i in part.layers if i < self._n]
        everything = [*part.visitors, *own]
        pinned = part.copies > 1
        arrival = [RESIDUAL] if part.first or not part.normed else [NORMED]
        arrival += [NORMED] if part.first and self._adds_positions else []
        inputs: tuple[int, ...] = (
            ()
            if part.visitors
            else tuple(dict.fromkeys(name for i in own for name in self._reads(i, visiting=False) if name != PER_LAYER))
        )
        arrival += [PER_LAYER] if self._sizes[PER_LAYER] and not part.first and not self._altup else []
        late = [RESIDUAL] if RESIDUAL not in arrival else []
        for size in (*self._hoisted(part), *self._streams(part), *self._borrowed(part)):
            for _ in range(part.copies):
                heap.allocate(size)
        if part.output and self._profile.architecture in LATE_OUTPUTS and not part.visitors:
            inputs = (*inputs, OUTPUT_ROWS)
        for name in (*arrival, *inputs, *late):
            size = self._embedding_bytes if name == RESIDUAL and part.first else self._sizes[name]
            for copy in range(part.copies):
                offset = heap.allocate(size)
                if not copy:
                    slots[name] = offset
        if part.first:
            self._run(heap, slots, self._prelude(pinned))
        mixers = [i for i in everything if i in self._mamba_layers or self._caches[i].attends]
        fetched = {
            b: a
            for a, b in pairwise(mixers)
            if b in part.layers and is_mamba(self._profile.layer_tensors[b]) and next_mamba(self._profile, a) == b
        }
        readers: dict[int, list[int]] = {}
        for i in everything:
            for name in self._reads(i, visiting=i in part.visitors):
                readers.setdefault(name, []).append(i)
        if part.output and self._profile.architecture in LATE_OUTPUTS:
            readers[OUTPUT_ROWS] = [self._n]
        waiting = set(readers) - {PER_LAYER} if part.visitors else set()
        for i in everything:
            begins = i == everything[0]
            brings = {name for name in waiting if readers[name][0] == i and i in part.visitors}
            if part.visitors and i == part.visitors[-1]:
                brings = waiting
            waiting = waiting - brings
            kept = {*(name for name, read_by in readers.items() if pinned or read_by[-1] != i)}
            if begins and pinned and (not part.first or not self._has_prelude):
                kept |= {RESIDUAL, NORMED}
            self._run(
                heap,
                slots,
                self._layer(
                    i,
                    last=i == self._n - 1,
                    offloaded=i in part.visitors,
                    host_experts=i in part.host_experts,
                    experts_away=i in part.host_experts and not part.first,
                    normed=begins and part.normed and not part.first,
                    brings=tuple(sorted(brings, reverse=True)),
                    has_states=i in fetched,
                    fetches_states=i in fetched.values(),
                    kept=frozenset(kept),
                ),
            )
        for i in part.foreign_experts:
            self._run(heap, slots, self._foreign(i))
        if part.sends_norm:
            heap.allocate(self._sizes[NORMED])
        if part.output:
            self._run(heap, slots, self._output())
        return heap.peak + (UNFOLLOWED_BYTES if part.visitors and self._altup else 0)

    def _hoisted(self, part: DevicePart) -> list[int]:
        """Inputs that Mamba layers exchange over the border of two devices.

        ``build_rs`` puts a layer's state operations into the graph ahead of the last operations of the Mamba layer before it:
        where that lies on another device, its gate is computed here (from the whole projection), and copied back.
        """
        mamba = self._mamba_layers
        if not mamba:
            return []
        own = [i for i in mamba if i in part.layers]
        sizes = []

        def fetched_early(later: int) -> bool:
            return next_mamba(self._profile, mamba[mamba.index(later) - 1]) is not None

        if own and own[0] != mamba[0] and not part.first and fetched_early(own[0]):
            sizes.append(align(self._profile.layer_tensors[own[0]]["ssm_in.weight"].shape[1] * self._scale.tokens * F32))
        if own and own[-1] != mamba[-1] and fetched_early(mamba[mamba.index(own[-1]) + 1]):
            sizes.append(align(self._profile.integer("ssm.inner_size") * self._scale.tokens * F32))
        return sizes

    def _borrowed(self, part: DevicePart) -> list[int]:
        """Caches of layers on another device that layers here read: each reader gets a copy (Gemma 3n, Gemma 4)."""
        scale = self._scale
        owners = self._owners
        sizes: list[int] = []
        if len(owners) == self._n:
            return sizes
        for i in part.layers:
            cache = self._caches[i] if i < self._n else None
            if cache and cache.attends and not cache.owns_cache and owners:
                owner = max(j for j in owners if self._caches[j].windowed == cache.windowed)
                if owner not in part.layers:
                    cells = (scale.window_cells if cache.windowed else scale.cells) * scale.sequences
                    sizes.append(align(cells * scale.keys.row_bytes(cache.key_elements)))
                    sizes.append(align(cells * scale.values.row_bytes(cache.value_elements)))
        return sizes

    def _streams(self, part: DevicePart) -> list[int]:
        """Gemma 3n's residual streams are made where the output layer lies, and travel twice: as they are, and permuted."""
        if not self._altup or (part.first and part.output):
            return []
        permuted = [self._sizes[RESIDUAL]]
        if part.first:
            return [*permuted, self._sizes[RESIDUAL], self._embedding_bytes, self._sizes[PER_LAYER]]
        return [*permuted, *((self._sizes[PER_LAYER], self._embedding_bytes) if part.output else ())]

    def _reads(self, i: int, *, visiting: bool) -> tuple[int, ...]:
        """Inputs of the graph that a layer reads on its device, in order."""
        key = (i if visiting else self._kinds[i], i == self._n - 1, visiting)
        found = self._read_by.get(key)
        if found is None:
            found = self._read_by[key] = self._inputs_of(i, visiting=visiting)
        return found

    def _inputs_of(self, i: int, *, visiting: bool) -> tuple[int, ...]:
        cache = self._caches[i]
        extra: tuple[int, ...] = (PER_LAYER,) if self._sizes[PER_LAYER] else ()
        if i == self._n - 1 and self._profile.architecture not in LATE_OUTPUTS:
            extra += (OUTPUT_ROWS,)
        if cache.state_elements and not visiting:
            extra = (STATE_ROWS, *extra)
        if not cache.attends:
            return extra
        offset = WINDOW if cache.windowed else 0
        names = (
            *((POSITIONS,) if rotates(self._profile, cache) else ()),
            *(name for name in (KEY_ROTATION - offset, VALUE_ROTATION - offset) if self._sizes[name]),
            *((INDICES - offset,) if cache.owns_cache and not visiting else ()),
        )
        if visiting and attends_in_ram(self._profile, i):
            return tuple(name for name in names if name in (POSITIONS, KEY_ROTATION - offset))
        return (*names, MASK - offset, *extra)

    def _run(self, heap: Allocator, slots: dict[int, int], program: _Program) -> None:
        key = (program.number, heap.state, tuple(sorted(slots.items())))
        known = self._transitions.get(key)
        if known is None:
            heap.peak, before = 0, heap.peak
            replay(heap, program.steps, slots)
            for name, source in program.exports:
                slots[name] = slots.pop(source)
            self._transitions[key] = heap.state, heap.peak, dict(slots)
            heap.peak = max(before, heap.peak)
            return
        state, peak, after = known
        heap.restore(state, peak)
        slots.clear()
        slots.update(after)

    # programs

    def _program(self, key: object, tape: Tape, exports: dict[int, int], kept: frozenset[int]) -> _Program:
        steps, found = tape.compile(exports, sizes=self._sizes, kept=kept)
        program = _Program(len(self._programs), steps, found)
        self._programs[key] = program
        return program

    @property
    def _has_prelude(self) -> bool:
        return scales_embedding(self._profile) or self._adds_positions or bool(self._sizes[PER_LAYER])

    @property
    def _adds_positions(self) -> bool:
        """Whether a table of positions is added to the embedding: it arrives beside it, as ``NORMED``."""
        return "position_embd.weight" in self._profile.model_tensors

    def _prelude(self, pinned: bool) -> _Program:
        """What happens to the embedding before the first layer."""
        key = ("prelude", pinned)
        if key in self._programs:
            return self._programs[key]
        tape = Tape()
        result = RESIDUAL
        exports: dict[int, int] = {}
        if scales_embedding(self._profile):
            result = tape.op(self._embedding_bytes, RESIDUAL, into=(RESIDUAL,))
        elif self._adds_positions:
            result = tape.op(self._embedding_bytes, RESIDUAL, NORMED, into=(RESIDUAL, NORMED))
        if self._sizes[PER_LAYER]:
            size = self._sizes[PER_LAYER]
            rows = tape.op(size)
            projected = tape.op(size, result)
            normed = tape.op(size, projected)
            exports[PER_LAYER] = tape.op(size, tape.op(size, normed, rows, into=(normed,)))
            if self._profile.integer("altup.num_inputs"):
                wide = self._sizes[RESIDUAL]
                rest = tape.op(wide - self._embedding_bytes, result)
                result = tape.op(wide, result, rest)
        if result != RESIDUAL:
            exports[RESIDUAL] = result
        sizes = {**self._sizes, RESIDUAL: self._embedding_bytes}
        steps, found = tape.compile(
            exports, sizes=sizes, kept=frozenset({RESIDUAL, NORMED} if pinned else ()) if exports else {RESIDUAL}
        )
        self._programs[key] = _Program(len(self._programs), steps, found)
        return self._programs[key]

    def _layer(
        self,
        i: int,
        *,
        last: bool,
        offloaded: bool,
        host_experts: bool,
        experts_away: bool,
        normed: bool,
        brings: tuple[int, ...],
        has_states: bool,
        fetches_states: bool,
        kept: frozenset[int],
    ) -> _Program:
        key = (self._kinds[i], last, offloaded, host_experts, experts_away, normed, brings, has_states, fetches_states, kept)
        if key in self._programs:
            return self._programs[key]
        graph = LayerGraph(
            self._profile,
            i,
            self._caches[i],
            self._scale,
            last=last,
            offloaded=offloaded,
            host_experts=host_experts,
            experts="away" if experts_away else "here",
            normed=normed,
            brings={name: self._sizes[name] for name in brings},
            has_states=has_states,
            fetches_states=fetches_states,
        )
        return self._program(key, graph.tape, {RESIDUAL: graph.result, **graph.brought}, kept)

    def _foreign(self, i: int) -> _Program:
        """The routed experts of a layer of another device, whose weights lie in RAM."""
        key = ("experts", self._kinds[i])
        if key in self._programs:
            return self._programs[key]
        graph = LayerGraph(self._profile, i, self._caches[i], self._scale, host_experts=True, experts="only")
        tape = graph.tape
        tape.use(graph.result)
        return self._program(key, tape, {}, frozenset(self._sizes))

    def _output(self) -> _Program:
        """The last norm, the choice of rows, and the logits."""
        key = "output"
        if key in self._programs:
            return self._programs[key]
        profile, scale = self._profile, self._scale
        tape = Tape()
        family = family_of(profile.architecture)
        encoder = family is not None and "encoder" in family.features
        late = profile.architecture in LATE_OUTPUTS
        tokens = scale.tokens if late or encoder else scale.outputs
        width = profile.embedding_length
        shifted = "output_norm.bias" in profile.model_tensors  # a LayerNorm, which never works in place
        x = tape.op(width * tokens * F32, RESIDUAL, into=() if shifted else (RESIDUAL,))
        exports = {}
        if encoder:
            mean = tape.op(scale.tokens * scale.tokens * F32)
            exports[NORMED] = tape.op(width * F32, x, tape.op(width * tokens * F32, x), mean)
        else:
            if late:
                exports[NORMED] = x
                x = tape.op(width * scale.outputs * F32, x, OUTPUT_ROWS)
            exports[MASK] = tape.op(profile.vocab_size * scale.outputs * F32, x)
        return self._program(key, tape, exports, frozenset((MASK, MASK - WINDOW)))


def layer_kinds(profile: ModelProfile) -> tuple[int, ...]:
    """For each computed layer the first of its kind: one with equal tensors, an equal cache and an equal place in the model."""
    found: tuple[int, ...] | None = profile.memo.get("layer_kinds")
    if found is None:
        first: dict[object, int] = {}
        caches = layer_caches(profile)
        found = profile.memo["layer_kinds"] = tuple(
            first.setdefault((weight_signature(profile, i), caches[i], _place_in_model(profile, i)), i)
            for i in range(profile.n_computed_layers)
        )
    return found


def _place_in_model(profile: ModelProfile, i: int) -> object:
    """What besides its tensors tells a layer from another of its kind."""
    heads = profile.per_layer("attention.head_count")[i]
    return heads, profile.architecture == "gemma3n" and i < 10


def scales_embedding(profile: ModelProfile) -> bool:
    """Whether the embedding is multiplied by a constant on the first device."""
    architecture = profile.architecture
    return (
        architecture.startswith(("gemma", "minicpm"))
        or architecture in {"afmoe", "grok"}
        or bool(profile.metadata.get(f"{architecture}.embedding_scale"))
    )


def compute_model(profile: ModelProfile, settings: LoadSettings) -> ComputeModel:
    """The compute model of a profile with these settings; made once."""
    key = ("compute", settings)
    found: ComputeModel | None = profile.memo.get(key)
    if found is None:
        found = profile.memo[key] = ComputeModel(profile, settings)
    return found


__all__ = ["PIPELINE_COPIES", "ComputeModel", "DevicePart", "compute_model", "window_tokens"]
