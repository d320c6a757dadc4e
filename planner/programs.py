"""The programs of a device: its layers, and what comes before the first and after the last.

Nothing here knows which layers share a device: ``schedule`` puts programs in order. Layers of a kind share one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from planner.allocator import RELEASE
from planner.cache import layer_caches
from planner.families import family_of
from planner.graph import LayerGraph
from planner.inputs import (
    DEEPSTACK,
    EMBEDDING,
    F32,
    MASK,
    MEAN,
    NORMED,
    OUTPUT_ROWS,
    PER_LAYER,
    POOLED,
    RESIDUAL,
    WINDOW,
    Scale,
    deepstack_layers,
    embedding_bytes,
)
from planner.profile import ModelProfile
from planner.tape import STEADY, Program, Size, Tape
from planner.traits import LATE_OUTPUTS, SPARSE_GEMMA3N_LAYERS

UNSHIFTED_LAYER_NORMS = frozenset({"cohere2", "command-r", "dbrx", "mpt"})
"""Architectures whose last norm is a LayerNorm without a bias."""


_Made = dict[tuple[frozenset[int], tuple[int, ...]], Program]
"""What a tape was compiled to, by the inputs that are kept and those that are brought."""


class Programs:
    """Programs of one model at one scale, each made once."""

    def __init__(self, profile: ModelProfile, scale: Scale, sizes: Mapping[int, Size]) -> None:
        self._profile = profile
        self._scale = scale
        self._caches = layer_caches(profile)
        self._kinds = layer_kinds(profile)
        self._shapes = layer_shapes(profile)
        self._n = profile.n_computed_layers
        self._sizes = sizes
        self._embedding_bytes = embedding_bytes(profile, scale)
        self._has_per_layer = self._sizes[PER_LAYER] != (0, STEADY)
        stacked = deepstack_layers(profile) > 0
        self.has_prelude = scales_embedding(profile) or adds_positions(profile) or self._has_per_layer or stacked
        """Whether anything happens to the embedding before the first layer."""
        self._made: dict[object, Program] = {}
        self._recorded: dict[object, tuple[Tape, dict[int, int], frozenset[int], _Made]] = {}

    def prelude(self, pinned: bool) -> Program:
        """What happens to the embedding before the first layer."""
        key = ("prelude", pinned)
        if key in self._made:
            return self._made[key]
        tape = Tape()
        result = RESIDUAL
        exports: dict[int, int] = {}
        narrow = self._embedding_bytes
        if scales_embedding(self._profile):
            result = tape.op(narrow, RESIDUAL, into=(RESIDUAL,))
        elif adds_positions(self._profile):
            result = tape.op(narrow, RESIDUAL, NORMED, into=(RESIDUAL, NORMED))
        if self._has_per_layer:
            exports[PER_LAYER] = tape.op(self._sizes[PER_LAYER][0], PER_LAYER, into=(PER_LAYER,))
            if self._profile.integer("altup.num_inputs"):
                exports[EMBEDDING] = result
                result = self._streams(tape, result)
        if deepstack_layers(self._profile):
            exports[DEEPSTACK] = tape.op(self._sizes[DEEPSTACK][0], result)
        if result != RESIDUAL:
            exports[RESIDUAL] = result
        sizes = {**self._sizes, RESIDUAL: (narrow, STEADY)}
        kept = frozenset({RESIDUAL, NORMED, PER_LAYER} if pinned else ()) if exports else {RESIDUAL}
        found = self._made[key] = tape.compile(exports, sizes=sizes, kept=kept)
        return found

    def _streams(self, tape: Tape, embedding: int) -> int:
        """Gemma 3n's residual streams (``altup_proj``): the embedding, and others made of it."""
        wide, narrow = self._sizes[RESIDUAL][0], self._embedding_bytes
        projected = tape.op(wide - narrow, tape.op(wide - narrow, embedding))
        magnitude = tape.op(self._scale.tokens * F32, tape.op(narrow, embedding))
        scaled = tape.op(wide - narrow, projected, magnitude)
        scaled = tape.in_place(scaled, tape.op(self._scale.tokens * F32, tape.in_place(projected)))
        return tape.op(wide, embedding, scaled)

    def layer(
        self,
        i: int,
        *,
        offloaded: bool = False,
        host_experts: bool = False,
        experts_away: bool = False,
        normed: bool = False,
        brings: tuple[int, ...] = (),
        has_states: bool,
        fetches_states: bool,
        pipelined: bool,
        borrowed: tuple[int, ...] = (),
        per_layer: int = PER_LAYER,
        kept: frozenset[int],
    ) -> Program:
        """A layer; the rest is as in ``LayerGraph`` and its ``write``.

        ``kept`` are the inputs that are still read after it, ``brings`` those that are copied to the device within it.
        """
        last = i == self._n - 1
        where = (offloaded, host_experts, experts_away, normed, pipelined and self._scale.attention == "host")
        kind = self._kinds[i] if offloaded or host_experts else self._shapes[i]
        key = (kind, last, where, has_states, fetches_states, borrowed, per_layer)
        recorded = self._recorded.get(key)
        if recorded is None:
            graph = LayerGraph(
                self._profile,
                i,
                self._caches[i],
                self._scale,
                self._sizes,
                offloaded=offloaded,
                host_experts=host_experts,
                experts_away=experts_away,
                has_states=has_states,
                fetches_states=fetches_states,
                pipelined=pipelined,
                borrowed=borrowed,
                per_layer=per_layer,
            )
            result = graph.write(last=last, normed=normed)
            recorded = self._recorded[key] = graph.tape, {RESIDUAL: result, **graph.exports}, graph.tape.names(), {}
        tape, exports, names, made = recorded
        kept &= names
        found = made.get((kept, brings))
        if found is None:
            found = made[kept, brings] = tape.compile(exports, sizes=self._sizes, kept=kept, brings=brings)
        return found

    def foreign(self, i: int) -> Program:
        """The routed experts of a layer of another device, whose weights lie in RAM."""
        key = ("experts", self._kinds[i])
        if key not in self._made:
            graph = LayerGraph(self._profile, i, self._caches[i], self._scale, self._sizes, host_experts=True)
            graph.tape.use(graph.foreign_experts())
            self._made[key] = graph.tape.compile({}, sizes=self._sizes, kept=frozenset(self._sizes))
        return self._made[key]

    def release(self, name: int) -> Program:
        """A leaf of the graph is read for the last time."""
        key = ("release", name)
        if key not in self._made:
            self._made[key] = Program(steps=((RELEASE, name, self._sizes[name][0]),), growing=(), exports=())
        return self._made[key]

    def handed_over(self, *, norm: bool) -> Program:
        """The residual goes to the next device; with it, the first norm of that device's first layer."""
        key = ("handed over", norm)
        if key not in self._made:
            tape = Tape()
            tape.use(RESIDUAL, *((tape.op(self._sizes[NORMED][0], RESIDUAL),) if norm else ()))
            self._made[key] = tape.compile({}, sizes={RESIDUAL: self._sizes[RESIDUAL]})
        return self._made[key]

    def output(self, *, pinned: bool) -> Program:
        """The last norm, the choice of rows, and the logits. ``pinned``: the residual is an input of the device."""
        key = ("output", pinned)
        if key in self._made:
            return self._made[key]
        profile, scale = self._profile, self._scale
        tape = Tape()
        family = family_of(profile.architecture)
        encoder = family is not None and "encoder" in family.features
        late = profile.architecture in LATE_OUTPUTS
        tokens = scale.tokens if late or encoder else scale.outputs
        width = profile.embedding_length
        # a LayerNorm never works in place
        shifted = "output_norm.bias" in profile.model_tensors or profile.architecture in UNSHIFTED_LAYER_NORMS
        altup = bool(profile.integer("altup.num_inputs"))
        x = self._merged(tape) if altup else tape.op(width * tokens * F32, RESIDUAL, into=() if shifted else (RESIDUAL,))
        exports = {}
        if encoder:
            mean = tape.op(scale.tokens * scale.tokens * F32)
            exports[NORMED] = tape.op(width * F32, x, tape.op(width * tokens * F32, x), mean)
        else:
            if late:
                if not altup:
                    exports[NORMED] = x
                x = tape.op(width * scale.outputs * F32, x, OUTPUT_ROWS)
            exports[MASK] = tape.op(profile.vocab_size * scale.outputs * F32, x)
            if scale.pooling:
                rows = exports.setdefault(NORMED, x)
                if scale.pooling == MEAN:
                    rows = tape.op(width * tokens * F32, rows)
                tape.op(width * scale.sequences * F32, rows, POOLED)
        found = self._made[key] = tape.compile(
            exports, sizes=self._sizes, kept={MASK, MASK - WINDOW, POOLED, *((RESIDUAL,) if pinned else ())}
        )
        return found

    def _merged(self, tape: Tape) -> int:
        """Gemma 3n's residual streams as one again (``altup_unembd_proj``)."""
        wide, narrow, small = self._sizes[RESIDUAL][0], self._embedding_bytes, self._scale.tokens * F32
        projected = tape.op(wide - narrow, RESIDUAL)
        scaled = tape.op(wide - narrow, projected, tape.op(small, tape.op(narrow, RESIDUAL)))
        scaled = tape.in_place(scaled, tape.op(small, tape.in_place(projected)))
        return tape.in_place(tape.op(narrow, RESIDUAL, scaled), scaled)


def layer_kinds(profile: ModelProfile) -> tuple[int, ...]:
    """For each computed layer the first of its kind: one with equal tensors, an equal cache and an equal place in the model."""
    return profile.remember("layer kinds", None, lambda: _first_alike(profile, profile.tensor_kinds))


def layer_shapes(profile: ModelProfile) -> tuple[int, ...]:
    """The same of layers whose tensors may be quantized differently: what they compute is the same where they lie on a device."""

    def made() -> tuple[int, ...]:
        first: dict[object, int] = {}
        shape_of = {
            kind: first.setdefault(tuple((name, tensor.shape) for name, tensor in profile.layer_tensors[kind].items()), kind)
            for kind in sorted(set(profile.tensor_kinds))
        }
        if len(first) == len(shape_of):
            return layer_kinds(profile)
        return _first_alike(profile, [shape_of[kind] for kind in profile.tensor_kinds])

    return profile.remember("layer shapes", None, made)


def _first_alike(profile: ModelProfile, tensors: Sequence[int]) -> tuple[int, ...]:
    layers = range(profile.n_computed_layers)
    alike: list[Iterable[object]] = [tensors, map(id, layer_caches(profile)), profile.per_layer("attention.head_count")]
    if profile.architecture == "gemma3n":
        alike.append(i < SPARSE_GEMMA3N_LAYERS for i in layers)
    if stacked := deepstack_layers(profile):
        alike.append(i < stacked for i in layers)
    if stacked or profile.integer("embedding_length_per_layer_input"):
        alike.append(i == 0 for i in layers)
    first: dict[object, int] = {}
    return tuple(map(first.setdefault, zip(*alike, strict=False), layers))


def scales_embedding(profile: ModelProfile) -> bool:
    """Whether the embedding is multiplied by a constant on the first device."""
    architecture = profile.architecture
    return (
        architecture.startswith(("gemma", "minicpm"))
        or architecture in {"afmoe", "grok"}
        or bool(profile.metadata.get(f"{architecture}.embedding_scale"))
    )


def adds_positions(profile: ModelProfile) -> bool:
    """Whether a table of positions is added to the embedding: it arrives beside it, as ``NORMED``."""
    return "position_embd.weight" in profile.model_tensors
