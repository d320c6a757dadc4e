"""Single operations of a layer's graph: a weight's copy, a projection, a norm, a sum, a state.

Those of ``llm_graph_context::build_{lora_mm,norm,rs}`` (``src/llama-graph.cpp``), llama.cpp b10488.
"""

from __future__ import annotations

from collections.abc import Mapping

from planner.cache import LayerCache, is_recurrent
from planner.inputs import (
    EXTRA_ROWS,
    F32,
    INDICES,
    KEY_ROTATION,
    MASK,
    PER_LAYER,
    POSITIONS,
    STATE_ROWS,
    STATES,
    VALUE_ROTATION,
    WINDOW,
    Scale,
    convolution_state_elements,
)
from planner.profile import ModelProfile, Tensor
from planner.tape import STEADY, Size, Tape
from planner.traits import (
    PROJECTS_LATE,
    attends_beside_state,
)


class Operations:
    """A tape with the operations that all parts of a layer are made of.

    * ``offloaded``: the layer lies in RAM; its weights and its cache are copied over as they are needed (``op_offload``).
    * ``host_experts``: only the routed experts lie in RAM; ``experts_away``: and the first device computes them.
    * ``has_states``, ``fetches_states``: a Mamba layer's convolution states are fetched by the layer before that mixes tokens.
    * ``pipelined``: the device keeps copies of all that comes from elsewhere.
    * ``borrowed``: names of the copies of another layer's keys and values, where its cache lies elsewhere.
    * ``per_layer``: the name of what holds its per-layer embeddings.
    * ``exports``: what later layers read beside the result: tensors by the names that they have then.
    """

    def __init__(
        self,
        profile: ModelProfile,
        index: int,
        cache: LayerCache,
        scale: Scale,
        sizes: Mapping[int, Size],
        *,
        offloaded: bool = False,
        host_experts: bool = False,
        has_states: bool = False,
        fetches_states: bool = False,
        pipelined: bool = False,
        experts_away: bool = False,
        borrowed: tuple[int, ...] = (),
        per_layer: int = PER_LAYER,
    ) -> None:
        self.tape = Tape()
        self._profile = profile
        self._index = index
        self._weights: Mapping[str, Tensor] = profile.layer_tensors[index]
        self._stems = {name.removesuffix(".weight") for name in self._weights if not name.endswith(".bias")}
        self._cache = cache
        self._scale = scale
        self._tokens = scale.tokens
        self._offloaded = offloaded
        self._host_experts = host_experts or offloaded
        self._width = profile.embedding_length
        offset = WINDOW if cache.windowed else 0
        self._mask, self._indices = MASK - offset, INDICES - offset
        self._key_rotation, self._value_rotation = KEY_ROTATION - offset, VALUE_ROTATION - offset
        self._sizes = sizes
        self.exports: dict[int, int] = {}
        self._has_states = has_states
        self._fetches_states = fetches_states
        self._own_states: tuple[int, ...] = ()
        self._pipelined = pipelined
        self._sparse_mask: int | None = None
        self._borrowed = borrowed
        self._per_layer = per_layer
        self._parallel = self._feeds_forward_beside()
        self._projects_late = self._parallel and profile.architecture in PROJECTS_LATE
        self._recurrent = is_recurrent(self._weights)
        self._attends_beside_state = self._recurrent and attends_beside_state(self._weights)
        self._unprojected = self._projects_late or self._attends_beside_state
        self._experts_away = experts_away

    def _has(self, *names: str) -> bool:
        return not self._stems.isdisjoint(names)

    def _out(self, name: str) -> int:
        shape = self._weights[f"{name}.weight"].shape
        return shape[1] if len(shape) > 1 else shape[0]

    def _op(self, features: int, *reads: int, into: tuple[int, ...] = ()) -> int:
        return self.tape.op(features * self._tokens * F32, *reads, into=into)

    def _copied(self, name: str, *, expert: bool = False) -> tuple[int, ...]:
        """The copy of a weight that lies in RAM; nothing where it lies on the device."""
        away = self._host_experts if expert else self._offloaded
        return (self.tape.op(self._weights[name].bytes),) if away and name in self._weights else ()

    def _bring(self, name: int) -> int:
        """An input of the device: copied now if this layer brings it."""
        self.tape.arrives(name)
        return name

    def _bring_the_rest(self) -> None:
        """With the last weight from RAM begins a part of the graph that goes on into the device's own layers."""
        early = (self._mask, POSITIONS, self._key_rotation, self._value_rotation)  # these have their moment
        self.tape.rest_arrives(but=early if self._offloaded else ())

    def _project(self, name: str, x: int) -> int:
        """``build_lora_mm``; the bias is added in place."""
        weight = self._copied(f"{name}.weight")
        biased = f"{name}.bias" in self._weights
        needed = self._brought_with(name) if self._offloaded else ()
        if not biased:
            self._bring_all(needed)
        last = name in ("ffn_down", "ffn_down_shexp") and not self._has("post_ffw_norm")
        if last or (name == "ssm_out" and not self._has("ffn_down", "ffn_gate_inp")):
            self._bring_the_rest()
        result = self._op(self._out(name), *weight, x)
        if not biased:
            return result
        self._bring_all(needed)
        return self._in_place(result, *self._copied(f"{name}.bias"))

    def _brought_with(self, name: str) -> tuple[int, ...]:
        """Small inputs that are copied along with a weight, because the part of the graph that begins with it reads them."""
        queries = () if self._has("attn_k_b") else (POSITIONS, self._key_rotation) if name in ("attn_q", "attn_qkv") else ()
        if queries and self._has("attn_q_norm"):  # those come with the norm
            return ()
        return queries + ((self._value_rotation,) if name in ("attn_v", "attn_qkv") else ())

    def _rotates_by(self, matrix: int) -> bool:
        return self._sizes[matrix] != (0, STEADY)

    def _bring_all(self, names: tuple[int, ...]) -> None:
        if self._offloaded:  # a layer of the device's own brings what others read, with the last weight from RAM
            for name in names:
                self._bring(name)

    def _in_place(self, x: int, *others: int) -> int:
        return self.tape.in_place(x, *others)

    def _scaled(self, x: int, *names: str) -> int:
        """Small weights that ``x`` is multiplied with, or that are added to it, in place: each is copied where it lies in RAM."""
        for name in names:
            for copy in self._copied(name):
                x = self._in_place(x, copy)
        return x

    def _norm(self, x: int, features: int | None = None) -> int:
        """``build_norm``: over the input where nobody else reads it; its scale and shift are in place."""
        return self._op(features or self._width, x, into=(x,))

    def _norm_view(self, x: int, features: int) -> int:
        return self._op(features, x)

    def _add(self, a: int, b: int) -> int:
        return self.tape.op(max(self.tape.size(x) for x in (a, b) if x >= 0), a, b, into=(a, b))

    def _feeds_forward_beside(self) -> bool:
        """Whether feed-forward and attention both start from the layer's input (a parallel residual)."""
        if self._profile.architecture == "gptneox":
            return bool(self._profile.metadata.get("gptneox.use_parallel_residual"))
        return not self._has("ffn_norm", "post_attention_norm", "attn_output_norm", "attn_post_norm", "ffn_pre_norm", "ln2")

    # states

    def _state(self, elements: int) -> int:
        """The sequences' states, fetched from where they are kept (``build_rs``)."""
        if self._offloaded:
            return self.tape.op(elements * self._scale.sequences * F32)
        states = self.tape.op(elements * self._scale.sequences * F32, STATE_ROWS)
        self._keep_others()
        return states

    def _keep_others(self) -> None:
        """The states of sequences that do not take part are copied: none."""
        self.tape.use(self.tape.empty(EXTRA_ROWS))

    def _joined(self, x: int, channels: int, taps: int, states: int) -> int:
        """The states before the tokens."""
        return self.tape.op((self._tokens + (taps - 1) * self._scale.sequences) * channels * F32, states, x)

    def _fetch_states(self, *, behind_experts: bool = False) -> None:
        """The convolution states of the next Mamba layer are fetched as soon as this layer has looked at other tokens.

        Or behind its routed experts, if it has any.
        """
        if self._fetches_states and behind_experts == self._has("ffn_gate_inp"):
            rows, extra = self._bring(STATE_ROWS), self._bring(EXTRA_ROWS)
            elements = convolution_state_elements(self._profile)
            self.exports[STATES] = self.tape.op(elements * self._scale.sequences * F32, rows)
            self.tape.use(self.tape.empty(extra))

    def _convolution_states(self) -> int:
        return self._state(convolution_state_elements(self._profile))
