"""What lies on a device, and what it exchanges with the others and the host beside the residual.

llama.cpp (b10488) cuts the graph of a micro-batch into the parts that run on each device (``ggml_backend_sched_split_graph``,
``ggml/src/ggml-backend.cpp``); what one part reads of another is copied to its device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

from planner.allocator import align
from planner.cache import distinct_caches, layer_caches
from planner.inputs import (
    F32,
    PER_LAYER,
    VALUE_ROTATION,
    WINDOW,
    Scale,
    attention_features,
    borrowed_names,
    deepstack_layers,
    embedding_bytes,
    slice_name,
)
from planner.profile import ModelProfile
from planner.programs import adds_positions, layer_kinds
from planner.tape import STEADY, Size
from planner.traits import (
    attends_beside_state,
    attends_in_ram,
    fetches_early,
    is_mamba,
    may_attend_in_ram,
    next_early,
    scans_on_gpu,
)


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


class Exchange:
    """What the devices of one model exchange at one scale. ``sizes``: bytes of the inputs by name."""

    def __init__(self, profile: ModelProfile, scale: Scale, sizes: Mapping[int, Size]) -> None:
        self._profile = profile
        self._scale = scale
        self._sizes = sizes
        self._caches = layer_caches(profile)
        self._kinds = layer_kinds(profile)
        self._n = profile.n_computed_layers
        self.embedding_bytes = embedding_bytes(profile, scale)
        self._stacked = deepstack_layers(profile)
        self.image_bytes = self.embedding_bytes * (1 + self._stacked)
        """Bytes of the input that takes an image's embeddings instead of tokens."""
        self.arriving_bytes = self.embedding_bytes * (1 + adds_positions(profile)) + sizes[PER_LAYER][0]
        """Bytes of the embedding as it arrives, with positions beside it and the embeddings of each layer (Gemma 3n, Gemma 4)."""
        self._has_per_layer = sizes[PER_LAYER] != (0, STEADY)
        self._altup = profile.integer("altup.num_inputs") > 1
        self.lends = any(cache.borrows_cache for cache in distinct_caches(profile))
        owners = self._caches[: self._n] if self.lends else ()
        self._last_owners = {cache.windowed: i for i, cache in enumerate(owners) if cache.owns_cache}
        self._fetched_behind, self.fetched_behind = profile.remember("fetched behind", None, lambda: _fetched_behind(profile))
        self._scans_on_host = profile.remember(
            "scans on the host", None, lambda: {i for i in set(self._kinds) if not scans_on_gpu(profile, i)}
        )
        self.may_attend_in_ram = profile.remember("may attend in RAM", None, lambda: may_attend_in_ram(profile))
        self._shifts_tokens = any(name.startswith("time_mix_") for name in profile.layer_tensors[0])
        on_host = scale.attention == "host" or self._scans_on_host
        beside = self._has_per_layer or self._stacked or self._altup or self.lends or self._shifts_tokens
        self._residual_alone = not (on_host or beside or self._fetched_behind)

    # between a device and the others

    def unnamed(self, part: DevicePart) -> tuple[Size, ...]:
        """Tensors that lie on the device all the while, although no layer here reads them by a name."""
        if self._residual_alone:
            return ()
        return (
            *self.hoisted(part),
            *self._slices(part),
            *self._token_shifts(part),
            *self._streams(part),
            *self._pinned_copies(part),
            *self._answers(part),
        )

    def hoisted(self, part: DevicePart) -> list[Size]:
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
        if cache.attends and self._sizes[VALUE_ROTATION - (WINDOW if cache.windowed else 0)] != (0, STEADY):
            return (attention_features(self._profile, cache, i)[1],) * 2
        return ()

    def borrowed(self, part: DevicePart) -> dict[int, tuple[int, ...]]:
        """Layers that read another's cache, which lies elsewhere (Gemma 3n, Gemma 4): names of their copies of it."""
        if not self.lends or self._scale.attention == "host":
            return {}
        found: dict[int, tuple[int, ...]] = {}
        for i in part.layers:
            borrows = i < self._n and self._caches[i].borrows_cache
            if borrows and self._last_owners[self._caches[i].windowed] not in part.layers:
                found[i] = borrowed_names(i)
        return found

    def _pinned_copies(self, part: DevicePart) -> list[Size]:
        """Those copies where a pipeline keeps them all the while."""
        return [self._sizes[name] for names in self.borrowed(part).values() for name in names] if part.copies > 1 else []

    def _token_shifts(self, part: DevicePart) -> list[Size]:
        """What RWKV's devices exchange beside the residual: two views of a norm, the first layer's values, a mixed state."""
        if not self._shifts_tokens:
            return []
        values = "time_mix_v1.weight" in self._profile.layer_tensors[-1]
        count = (0 if part.first else 2 + values) + (0 if part.output else 1 + (values and part.first))
        return [(self.embedding_bytes, STEADY)] * count

    def _slices(self, part: DevicePart) -> list[Size]:
        """Embeddings of its layers that a later device keeps: a tensor for each (Gemma 3n, Gemma 4), or a view (Qwen3-VL)."""
        if part.first:
            return []
        if stacked := range(part.layers.start, min(part.layers.stop, self._stacked)):
            rows = self._scale.tokens - 1
            width = self._profile.embedding_length * F32
            return [(align(self.image_bytes // self._scale.tokens * rows + width), STEADY)] * len(stacked)
        if part.copies == 1 or not self._has_per_layer:
            return []
        return [self._sizes[slice_name(i)] for i in part.layers]

    def _streams(self, part: DevicePart) -> list[Size]:
        """Gemma 3n's residual streams are made where the output layer lies, and travel twice: as they are, and permuted."""
        if not self._altup or part.first or not part.output or part.copies == 1:
            return []
        return [self._sizes[PER_LAYER], (self.embedding_bytes, STEADY)]

    # between a device and the host

    def _answers(self, part: DevicePart) -> list[Size]:
        """What attention and scans on the CPU return; without a pipeline that is only there when it is needed."""
        return [(result, STEADY) for result, _ in self.on_host(part.layers)] if part.copies > 1 else []

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
                queries, attended = attention_features(self._profile, cache, i)
                copied = queries * scale.tokens * F32, ((0, growth) if cache.windowed else (growth, 0))
                found.append((align(attended * scale.tokens * F32), copied))
            if self._kinds[i] in self._scans_on_host:
                profile = self._profile
                inner, state = profile.integer("ssm.inner_size"), profile.integer("ssm.state_size")
                states = inner * state * scale.sequences
                read = 2 * inner + 2 * max(profile.integer("ssm.group_count"), 1) * state  # tokens, steps, B and C
                result = align((inner * scale.tokens + states) * F32)
                found.append((result, ((read * scale.tokens + states) * F32, STEADY)))
        return found

    def handed(self, visitors: range) -> set[Size]:
        """What layers in RAM take there: new keys and values, or what a state is made of, from the device that computes them."""
        kinds = self._kinds[visitors.start : visitors.stop]
        if self.may_attend_in_ram:
            alike = {(kind, self.attends_in_ram(i, visitors.stop)) for i, kind in zip(visitors, kinds, strict=True)}
        else:
            alike = {(kind, False) for kind in set(kinds)}
        return {self._handed(kind, in_ram) for kind, in_ram in alike}

    def _handed(self, i: int, in_ram: bool) -> Size:
        """Where attention runs in RAM (``in_ram``), and is not fused, its scores are in it."""
        profile, cache, tensors, scale = self._profile, self._caches[i], self._profile.layer_tensors[i], self._scale
        features = cache.key_elements + cache.value_elements if cache.owns_cache else 0
        if "attn_qkv.weight" in tensors and cache.owns_cache:  # values are a view of the joint projection
            features = tensors["attn_qkv.weight"].shape[1] + cache.key_elements
        if cache.state_elements:
            inner, state = profile.integer("ssm.inner_size"), profile.integer("ssm.state_size")
            channels = inner + 2 * profile.integer("ssm.group_count") * state
            features = 3 * channels + inner if is_mamba(tensors) else channels
        growth = 0
        if attends_beside_state(tensors):
            queries, attended = attention_features(profile, cache, i)
            features = attended + features - cache.key_elements - cache.value_elements if scale.fused else attended
        if cache.attends and not scale.fused and in_ram:
            queries, attended = attention_features(profile, cache, i)
            features += queries + attended
            growth = profile.per_layer("attention.head_count")[i] * scale.tokens * F32
            growth += scale.values.row_bytes(cache.value_elements) * scale.sequences if scale.attention == "fallen" else 0
        fixed = features * scale.tokens * F32 + cache.state_elements * scale.sequences * F32
        if scale.attention == "host" and cache.attends:  # as all attention then, which reads the cache where it lies
            fixed = max(fixed, sum(attention_features(profile, cache, i)) * scale.tokens * F32)
        return fixed, ((0, growth) if cache.windowed else (growth, 0))

    def attends_in_ram(self, i: int, cpu_layers: int) -> bool:
        """Whether attention of a layer in RAM is computed there: not where the states fetched behind it are on a GPU.

        ``cpu_layers`` lie in RAM.
        """
        return attends_in_ram(self._profile, i) and (next_early(self._profile, i) or 0) < cpu_layers


def _fetched_behind(profile: ModelProfile) -> tuple[dict[int, int], dict[int, int]]:
    """Layers whose states are fetched early -> the layer behind whose mixer that happens; then with its routed experts too."""
    tensors, kinds, caches = profile.layer_tensors, layer_kinds(profile), layer_caches(profile)
    early_kinds = {kind for kind in set(kinds) if fetches_early(tensors[kind])}
    if not early_kinds:
        return {}, {}
    early = {i for i, kind in enumerate(kinds) if kind in early_kinds}
    mixers = [i for i in range(len(kinds)) if i in early or caches[i].attends]
    behind = {b: a for a, b in pairwise(mixers) if next_early(profile, a) == b}
    routed = {b: b - 1 for b in range(1, len(kinds)) if b in early and "ffn_gate_inp.weight" in tensors[b - 1]}
    return behind, behind | routed
