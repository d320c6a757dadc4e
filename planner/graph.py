"""Which tensors llama.cpp makes while it computes one layer: a tape for each kind of layer.

Order and sizes are those of ``llm_graph_context::build_{norm,qkv,ffn,moe_ffn,attn,attn_mha,rs}`` (``src/llama-graph.cpp``) and of
``src/models/<architecture>.cpp``, llama.cpp b10488, on CUDA. What a layer computes is read from its own tensors, so that a new
architecture made of known parts needs no code here. Activations are F32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from planner.cache import LayerCache, is_recurrent, window_tokens
from planner.families import family_of
from planner.inputs import (
    CHOICE_MASK,
    DEEPSTACK,
    EMBEDDING,
    EXTRA_ROWS,
    F16,
    F32,
    I32,
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
    STATES,
    VALUE_ROTATION,
    WINDOW,
    Scale,
    attention_features,
    convolution_state_elements,
    deepstack_layers,
    rotates,
    rotation_bytes,
    sparse_cells,
)
from planner.profile import ModelProfile, Tensor
from planner.tape import Growth, Size, Tape


class LayerGraph:
    """Writes the tape of one repeating layer; ``result`` is the tensor that the next layer reads.

    * ``last``: the model's last layer, which goes on with the tokens of the output alone.
    * ``offloaded``: the layer lies in RAM; its weights and its cache are copied over as they are needed (``op_offload``).
    * ``host_experts``: only the routed experts lie in RAM.
    * ``normed``: the first norm came from the device before.
    * ``has_states``, ``fetches_states``: a Mamba layer's convolution states are fetched by the layer before that mixes tokens.
    * ``pipelined``: the device keeps copies of all that comes from elsewhere.
    * ``experts``: ``away``: they lie in RAM and the first device computes them; ``only``: this is that device's share of it.
    * ``borrowed``: names of the copies of another layer's keys and values, where its cache lies elsewhere.
    * ``per_layer``: the name of what holds its per-layer embeddings.
    * ``brings``: sizes of inputs that are copied to the device within this layer; ``brought`` says which tensors they became.
    """

    def __init__(
        self,
        profile: ModelProfile,
        index: int,
        cache: LayerCache,
        scale: Scale,
        *,
        last: bool = False,
        offloaded: bool = False,
        host_experts: bool = False,
        normed: bool = False,
        brings: Mapping[int, Size] | None = None,
        has_states: bool = False,
        fetches_states: bool = False,
        pipelined: bool = False,
        experts: Literal["here", "away", "only"] = "here",
        borrowed: tuple[int, ...] = (),
        per_layer: int = PER_LAYER,
    ) -> None:
        self.tape = Tape()
        self._profile = profile
        self._family = family_of(profile.architecture)
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
        self._brings = dict(brings or {})
        self.brought: dict[int, int] = {}
        self._has_states = has_states
        self._fetches_states = fetches_states
        self._own_states: tuple[int, ...] = ()
        self._pipelined = pipelined
        self._sparse_mask: int | None = None
        self._borrowed = borrowed
        self._per_layer = per_layer
        self._parallel = self._feeds_forward_beside()
        self._projects_late = self._parallel and profile.architecture in PROJECTS_LATE
        self._attends_beside_state = attends_beside_state(self._weights)
        self._unprojected = self._projects_late or self._attends_beside_state
        self._experts_away = experts == "away"
        if experts == "only":
            self.result = self._foreign_experts()
            return
        self.result = self._layer(last=last, normed=normed)
        for name in tuple(self._brings):
            self._bring(name)

    # one operation each

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
        if name in self._brings:
            size, growth = self._brings.pop(name)
            self.brought[name] = self.tape.empty() if name == EXTRA_ROWS else self.tape.op(size, growth=growth)
        return self.brought.get(name, name)

    def _bring_the_rest(self) -> None:
        """With the last weight from RAM begins a part of the graph that goes on into the device's own layers."""
        for name in tuple(self._brings):
            early = (self._mask, POSITIONS, self._key_rotation, self._value_rotation)  # these have their moment
            if name not in early or not self._offloaded:
                self._bring(name)

    def _project(self, name: str, x: int) -> int:
        """``build_lora_mm``; the bias is added in place."""
        weight = self._copied(f"{name}.weight")
        biased = f"{name}.bias" in self._weights
        needed = self._brought_with(name)
        late = self._has("attn_q_norm") and POSITIONS in needed
        if not biased and not late:
            self._bring_all(needed)
        last = name in ("ffn_down", "ffn_down_shexp") and not self._has("post_ffw_norm")
        if last or (name == "ssm_out" and not self._has("ffn_down", "ffn_gate_inp")):
            self._bring_the_rest()
        result = self._op(self._out(name), *weight, x)
        if biased and not late:
            self._bring_all(needed)
        return self._in_place(result, *self._copied(f"{name}.bias")) if biased else result

    def _brought_with(self, name: str) -> tuple[int, ...]:
        """Small inputs that are copied along with a weight, because the part of the graph that begins with it reads them."""
        queries = () if self._has("attn_k_b") else (POSITIONS, self._key_rotation) if name in ("attn_q", "attn_qkv") else ()
        return queries + ((self._value_rotation,) if name in ("attn_v", "attn_qkv") else ())

    def _rotated_view(self, x: int, whole: int, features: int, matrix: int) -> int:
        """The same of a part of a larger tensor, which has to be made contiguous first."""
        if x == whole and self._rotation(matrix):
            x = self._op(features, whole)
        return self._rotated(x, features, matrix)

    def _rotation(self, matrix: int) -> int:
        return rotation_bytes(self._profile, self._scale, matrix)

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

    # attention

    def _attention(self, x: int) -> int:
        """Grouped-query attention, with its projection: ``build_qkv``, ``build_attn``."""
        cache = self._cache
        value_features = self._value_features()
        q_features = self._query_features()
        gate = None
        if self._has("attn_qkv"):
            fused = self._project("attn_qkv", x)
            q = self._rotated_view(self._positioned("attn_q_norm", fused, q_features), fused, q_features, self._key_rotation)
            v = self._rotated_view(fused, fused, value_features, self._value_rotation)
            k = self._positioned("attn_k_norm", fused, cache.key_elements)
            k = self._rotated_view(k, fused, cache.key_elements, self._key_rotation)
            self._store(k)
            self._store(v)
        else:
            joint = self._project("attn_q", x)
            gated = self._out("attn_q") == 2 * q_features and self._has("attn_q_norm")
            q = self._positioned("attn_q_norm", joint, q_features)
            q = self._rotated(q, q_features, self._key_rotation)
            if self._has("attn_k"):
                self._store_keys_and_values(x, value_features)
            if gated:  # Qwen3-Next: the projection holds query and gate
                gate = self._op(q_features, joint)
        if self._offloaded and attends_in_ram(self._profile, self._index) and not self._fetches_states:
            self.tape.use(q)
            if self._attends_beside_state:
                return q  # in name only: what was attended comes along with the matrix that projects it
            self._fetch_states()
            weight = self._copied("attn_output.weight")
            return self._op(self._out("attn_output"), *weight, self._op(q_features))
        result = self._attend(q, value_features)
        self._fetch_states()
        if gate is not None:
            result = self._add(result, self._in_place(gate))
        if self._has("attn_gate") and not is_recurrent(self._weights):
            result = self._add(result, self._in_place(self._project("attn_gate", x)))
        if self._has("attn_sub_norm"):
            result = self._norm_view(result, self._out("attn_output"))
        if self._unprojected:
            return result
        return self._project("attn_output", result) if self._has("attn_output") else result

    def _query_features(self) -> int:
        return attention_features(self._profile, self._cache, self._index)[0]

    def _value_features(self) -> int:
        return self._cache.value_elements

    def _store_keys_and_values(self, x: int, value_features: int) -> None:
        """V before K in one cache, K before V where there are two (``build_attn`` of ``attn_kv`` and ``attn_kv_iswa``)."""
        windows = window_tokens(self._profile) > 0

        def values() -> int:
            if not self._has("attn_v"):
                return self._norm_view(keys_raw, value_features)
            v = self._project("attn_v", x)
            if self._profile.architecture in VALUE_NORM:
                v = self._norm_view(v, value_features)
            return self._rotated(v, value_features, self._value_rotation)

        def keys() -> int:
            k = self._positioned("attn_k_norm", keys_raw, self._cache.key_elements)
            return self._rotated(k, self._cache.key_elements, self._key_rotation)

        if windows or not self._has("attn_v"):
            keys_raw = self._project("attn_k", x)
            k = keys()
            v = values()
        else:
            v = values()
            keys_raw = self._project("attn_k", x)
            k = keys()
        self._store(k)
        self._store(v)

    def _store(self, x: int) -> None:
        """``cpy_k``, ``cpy_v``: written to the cache, where it lies."""
        self.tape.use(x, *(() if self._offloaded or not self._cache.owns_cache else (self._indices,)))

    def _positioned(self, norm: str, x: int, features: int) -> int:
        """The optional norm of queries or keys, then their rotation; the first of the two reads a view, so makes a new tensor."""
        position = (self.brought.get(POSITIONS, POSITIONS),) if rotates(self._profile, self._cache) else ()
        if self._has(norm):
            x = self._op(features, x)
            self._bring_all((POSITIONS, self._key_rotation))
            return self._in_place(x, self.brought.get(POSITIONS, POSITIONS)) if position else x
        return self._op(features, x, *position) if position else x

    def _rotated(self, x: int, features: int, matrix: int) -> int:
        """Quantized caches hold values rotated by a Hadamard matrix (``llama_mul_mat_hadamard``)."""
        if not self._rotation(matrix):
            return x
        return self._op(features, x, self.brought.get(matrix, matrix))

    def _per_cell(self, size: int) -> Growth:
        """``size`` bytes for each cell that a sequence sees in this layer."""
        return (0, size) if self._cache.windowed else (size, 0)

    def _cells(self, row_bytes: int, *reads: int) -> int:
        """A tensor with a row for every cell of all sequences."""
        return self.tape.op(0, *reads, growth=self._per_cell(row_bytes * self._scale.sequences))

    def _attend(self, q: int, value_features: int, *, latent: bool = False) -> int:
        """``build_attn_mha``: one fused operation, or the scores as a matrix."""
        scale, cache = self._scale, self._cache
        all_heads = self._profile.per_layer("attention.head_count")
        heads = all_heads[self._index]
        heads_kv = 1 if latent else max(self._profile.per_layer_or("attention.head_count_kv", all_heads)[self._index], 1)
        out_features = heads * value_features // heads_kv
        if scale.attention == "host":
            self.tape.use(q)
            size = out_features * self._tokens * F32
            result = self.tape.given(size) if self._pipelined else self.tape.op(size)
            return result if latent or self._unprojected else self._rotated(result, out_features, self._value_rotation)
        copies: tuple[int, ...] = ()
        if self._offloaded and (cache.owns_cache or cache.borrows_cache):
            row = scale.keys.row_bytes(cache.key_elements)
            # with latent attention values are a view of keys, yet copied as well
            value_row = row if latent else scale.values.row_bytes(value_features)
            if scale.attention == "fallen":
                values_copy = self._cells(value_row)
                copies = (self._cells(row), values_copy)
            elif scale.attention == "plain" and not latent:
                keys_copy = self._cells(row)
                self._bring(self._mask)
                copies = (keys_copy, self._cells(value_row))
            else:
                copies = (self._cells(row), self._cells(value_row))
        else:
            copies = tuple(self.brought.get(name, name) for name in self._borrowed)
        mask = self._bring(self._mask) if self._sparse_mask is None else self._sparse_mask
        if scale.fused:
            extra = 0
            reads = (q, *copies, mask)
            if scale.keys.name == "F32":  # cast before, not inside
                reads += (self._cells(cache.key_elements * F16),)
            elif scale.keys.name != "F16":
                extra += cache.key_elements * F16
            values = scale.keys if latent else scale.values
            if latent and not copies:
                pass  # values are a view of the keys, in the cache and as F16
            elif values.name == "F32":
                reads += (self._cells(value_features * F16),)
            elif values.name != "F16":
                extra += value_features * F16
            scratch = self._per_cell(extra * scale.sequences)
            result = self.tape.op(out_features * self._tokens * F32, *reads, scratch=scratch)
            return result if latent or self._unprojected else self._rotated(result, out_features, self._value_rotation)
        operands = copies[1:]
        if scale.attention == "fallen" or latent:  # a cache made for fused attention, or keys as values: they lie the other way
            row = scale.keys.row_bytes(value_features) if latent else scale.values.row_bytes(value_features)
            operands = (self._cells(row, *copies[1:]),)
        scores = self.tape.op(0, q, *copies[:1], growth=self._per_cell(self._tokens * heads * F32))
        scores = self._in_place(scores, mask)
        result = self._op(out_features, scores, *operands)
        if latent:
            return result
        result = self._op(out_features, result)
        return self._rotated(result, out_features, self._value_rotation)

    def _latent_attention(self, x: int) -> int:
        """Multi-head latent attention with absorption (``src/models/deepseek2.cpp``)."""
        heads = self._profile.per_layer("attention.head_count")[self._index]
        rank = self._profile.integer("attention.kv_lora_rank")
        rope = self._cache.key_elements - rank
        value_head = self._profile.integer("attention.value_length_mla")
        compressed_query = None
        if self._cache.indexer_elements:
            self._store(self._indexer_key(x))
        if self._has("attn_q_a"):
            compressed_query = self._norm(self._project("attn_q_a", x), self._out("attn_q_a"))
            q = self._project("attn_q_b", compressed_query)
        else:
            q = self._project("attn_q", x)
        weight = self._copied("attn_k_b.weight")
        rotated = rotates(self._profile, self._cache)
        self._bring_all((POSITIONS,))
        absorbed = self._op(heads * rank, q, *weight)
        position = self._op(heads * rope, q, self.brought.get(POSITIONS, POSITIONS)) if rotated else q
        query = self._op(heads * self._cache.key_elements, absorbed, position)
        compressed = self._project("attn_kv_a_mqa", x)
        value = self._op(rank, compressed)
        key_position = self._op(rope, compressed, self.brought.get(POSITIONS, POSITIONS)) if rotated else compressed
        key = self._op(self._cache.key_elements, value, key_position)
        self._store(key)
        if sparse_cells(self._profile):
            self._sparse_mask = self._mask_of_chosen(x, compressed_query)
        result = self._attend(query, rank, latent=True)
        result = self._op(heads * value_head, result, *self._copied("attn_v_b.weight"))
        result = self._op(heads * value_head, result)
        return self._project("attn_output", result)

    def _indexer_key(self, x: int) -> int:
        """The key by which a token is found (``src/models/deepseek32.cpp``): normed, positioned and rotated."""
        features = self._cache.indexer_elements
        key = self._project("indexer.attn_k", x)
        for _ in range(3):
            key = self._op(features, key)
        return key

    def _mask_of_chosen(self, x: int, compressed_query: int | None) -> int:
        """The mask with all cells left out but those that the indexer chooses; a layer without one takes the last choice."""
        cell = F16 if self._scale.fused else F32
        mask = self._bring(self._mask)
        chosen: tuple[int, ...] = ()
        if self._cache.indexer_elements and compressed_query is not None:
            query = self._project("indexer.attn_q_b", compressed_query)
            features = self._out("indexer.attn_q_b")
            query = self._op(features, self._op(features, query))
            weights = self._op(self._out("indexer.proj"), self._project("indexer.proj", x))
            score = self.tape.op(0, query, weights, self._bring(CHOICE_MASK), growth=self._per_cell(self._tokens * F32))
            cells = sparse_cells(self._profile)
            chosen = (self._op(cells, self._op(cells, score)),)
        filled = self.tape.op(0, mask, growth=self._per_cell(self._tokens * cell))
        self.tape.use(*chosen)
        return self.tape.op(0, filled, mask, growth=self._per_cell(self._tokens * cell))

    def _expanded_latent_attention(self, x: int) -> int:
        """Latent attention whose keys and values are expanded before they are cached (files without ``key_length_mla``)."""
        heads = self._profile.per_layer("attention.head_count")[self._index]
        key_features, value_features = self._cache.key_elements, self._cache.value_elements
        rank = self._profile.integer("attention.kv_lora_rank")
        if self._has("attn_q_a"):
            q = self._project("attn_q_b", self._norm(self._project("attn_q_a", x), self._out("attn_q_a")))
        else:
            q = self._project("attn_q", x)
        rope = self._profile.integer("rope.dimension_count")
        query = self._op(key_features, q, self._op(heads * rope, q))
        compressed = self._project("attn_kv_a_mqa", x)
        expanded = self._project("attn_kv_b", self._op(rank, compressed))
        value = self._op(value_features, expanded)
        key = self._op(key_features, expanded, self._op(rope, compressed))
        self._store(key)
        self._store(value)
        return self._project("attn_output", self._attend(query, value_features))

    # recurrent layers

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

    def _scan(self, inner: int, state: int, *reads: int) -> int:
        """``ggml_ssm_scan``, which fetches its states itself."""
        result = self.tape.op((inner * self._tokens + inner * state * self._scale.sequences) * F32, *reads, STATE_ROWS)
        self._keep_others()
        return result

    def _convolution(self, x: int, channels: int, taps: int, *fetched: int) -> int:
        """The last states before the tokens, transposed, then ``ggml_ssm_conv``."""
        states = STATES if self._has_states else fetched[0] if fetched else self._state((taps - 1) * channels)
        joined = self._joined(x, channels, taps, states)
        weight = self._copied("ssm_conv1d.weight")
        return self._in_place(self._scaled(self._op(channels, joined, *weight), "ssm_conv1d.bias"))

    def _joined(self, x: int, channels: int, taps: int, states: int) -> int:
        """The states before the tokens."""
        return self.tape.op((self._tokens + (taps - 1) * self._scale.sequences) * channels * F32, states, x)

    def _first_states(self) -> tuple[int, ...]:
        """The first Mamba layer of a device fetches its own states, before anything else."""
        if not fetches_early(self._weights) or self._has_states or self._offloaded:
            return ()
        return (self._convolution_states(),)

    def _fetch_states(self, *, behind_experts: bool = False) -> None:
        """The convolution states of the next Mamba layer are fetched as soon as this layer has looked at other tokens.

        Or behind its routed experts, if it has any.
        """
        if self._fetches_states and behind_experts == self._has("ffn_gate_inp"):
            rows, extra = self._bring(STATE_ROWS), self._bring(EXTRA_ROWS)
            elements = convolution_state_elements(self._profile)
            self.brought[STATES] = self.tape.op(elements * self._scale.sequences * F32, rows)
            self.tape.use(self.tape.empty(extra))

    def _convolution_states(self) -> int:
        return self._state(convolution_state_elements(self._profile))

    def _delta_net(self, x: int) -> int:
        """Gated delta net (``src/models/qwen3next.cpp``, ``qwen35.cpp``, ``delta-net-base.cpp``), fused on CUDA."""
        profile = self._profile
        inner, state = profile.integer("ssm.inner_size"), profile.integer("ssm.state_size")
        groups, heads = profile.integer("ssm.group_count"), profile.integer("ssm.time_step_rank")
        head = inner // max(heads, 1)
        channels = inner + 2 * groups * state
        joint = None
        states = self._state((profile.integer("ssm.conv_kernel") - 1) * channels)
        if self._has("attn_qkv"):
            mixed = self._project("attn_qkv", x)
        else:  # queries, keys, values and gate in one matrix, head by head
            joint = self._project("ssm_in", x)
            both = self._op(2 * groups * state, self._op(groups * state, joint), self._op(groups * state, joint))
            mixed = self._op(channels, both, self._op(inner, joint))
        joined = self._joined(mixed, channels, profile.integer("ssm.conv_kernel"), states)
        memory = self._state(head * head * heads)
        convolved = self._in_place(self._op(channels, joined, *self._copied("ssm_conv1d.weight")))
        repeats = self._has("ssm_ba") and groups != heads
        q, k = (self._normed_heads(convolved, groups * state, heads * state if repeats else 0) for _ in range(2))
        if self._has("ssm_ba"):
            decay_and_beta = self._project("ssm_ba", x)
            decay, beta = self._op(heads, decay_and_beta), self._op(heads, decay_and_beta)
        else:
            decay, beta = self._op(heads, self._project("ssm_alpha", x)), self._op(heads, self._project("ssm_beta", x))
        rows = self._tokens + head * self._scale.sequences
        result = self.tape.op(inner * rows * F32, q, k, convolved, decay, beta, memory)
        result = self._op(inner, result)
        gate = self._op(inner, joint) if joint is not None else self._op(inner, self._project("attn_gate", x))
        return self._project("ssm_out", self._in_place(result, gate))

    def _kimi_delta_attention(self, x: int) -> int:
        """Kimi's delta attention: a convolution for each of queries, keys and values (``src/models/kimi-linear.cpp``)."""
        head = self._profile.integer("kda.head_dim")
        heads = self._profile.per_layer("attention.head_count")[self._index]
        inner, taps = heads * head, self._profile.integer("ssm.conv_kernel")
        states = self._state(3 * (taps - 1) * inner)
        joined = {part: self._joined(self._project(f"attn_{part}", x), inner, taps, states) for part in "qkv"}
        memory = self._state(head * head * heads)
        mixed = {}
        for part in "qkv":
            convolved = self._op(inner, joined[part], *self._copied(f"ssm_conv1d_{part}.weight"))
            mixed[part] = self._op(inner, convolved)
        q, k = (self._op(inner, mixed[part]) for part in "qk")
        decay = self._op(inner, self._scaled(self._project("ssm_f_b", self._project("ssm_f_a", x)), "ssm_dt.bias"))
        beta = self._op(heads, self._project("ssm_beta", x))
        rows = self._tokens + head * self._scale.sequences
        result = self.tape.op(inner * rows * F32, q, k, mixed["v"], decay, beta, memory)
        result = self._op(inner, self._op(inner, result))
        gate = self._op(inner, self._project("ssm_g_b", self._project("ssm_g_a", x)))
        return self._project("attn_output", self._op(inner, self._in_place(result, gate)))

    def _normed_heads(self, x: int, features: int, repeated: int) -> int:
        """Queries or keys, normed, and repeated for each head of the values where they are fewer."""
        normed = self._op(features, x)
        return self._op(repeated, normed) if repeated else normed

    def _gate_and_scan(self, joint: int, inner: int) -> tuple[int, tuple[int, ...], int]:
        """The gate, ``ssm_d``, and a scan that ran in RAM; the gate first where states of the next layer were fetched."""
        self._fetch_states()
        if STATES in self.brought:
            gate = self._op(inner, joint)
            return gate, self._copied("ssm_d"), self._op(inner)
        skip, scan = self._copied("ssm_d"), self._op(inner)
        return self._op(inner, joint), skip, scan

    def _attention_and_mamba2(self, x: int) -> int:
        """Attention and a state side by side, each with a norm of its own (``src/models/falcon-h1.cpp``)."""
        attended = self._attention(x)
        if self._offloaded:
            return self._mamba2(None, attended=attended)
        states = self._convolution_states()
        return self._mamba2(self._op(self._width, RESIDUAL), (states,), attended)

    def _mamba2(self, x: int | None, states: tuple[int, ...] = (), attended: int | None = None) -> int:
        """``build_mamba2_layer`` (``src/models/mamba-base.cpp``); what was ``attended`` beside it is projected after the scan."""
        profile = self._profile
        inner, state = profile.integer("ssm.inner_size"), profile.integer("ssm.state_size")
        groups, heads = profile.integer("ssm.group_count"), profile.integer("ssm.time_step_rank")
        channels = inner + 2 * groups * state
        weight = self._copied("ssm_in.weight")
        if self._offloaded:
            states = (self._state((profile.integer("ssm.conv_kernel") - 1) * channels),)
        x = self._op(self._width, RESIDUAL) if x is None else x
        zxbcdt = self._op(self._out("ssm_in"), *weight, x)
        convolved = self._convolution(zxbcdt, channels, profile.integer("ssm.conv_kernel"), *(states or self._own_states))
        step = self._scaled(self._in_place(self._op(heads, zxbcdt)), "ssm_dt.bias")
        if self._offloaded:  # the scan runs where its state lies
            self.tape.use(step)
            if attended is not None:
                weight = self._copied("attn_output.weight")
                attended = self._op(self._out("attn_output"), *weight, self._op(self._query_features()))
            z, skip, y = self._gate_and_scan(zxbcdt, inner)
            scaled = self._op(inner, convolved, *skip)
            y = self.tape.op(self.tape.size(y), y, scaled, into=(y, scaled))
        else:
            scan = self._scan(inner, state, convolved, step)
            self._fetch_states()
            if attended is not None:
                attended = self._late_projection(attended)
            z, scaled = self._op(inner, zxbcdt), self._op(inner, convolved)
            y = self._in_place(scaled, scan)
        y = self._op(inner, z, y)
        if self._has("ssm_norm"):
            y = self._scaled(self._norm_view(y, inner), "ssm_norm.weight")
        result = self._project("ssm_out", y)
        return result if attended is None else self._add(attended, result)

    def _mamba(self, x: int) -> int:
        """``build_mamba_layer`` (``src/models/mamba-base.cpp``)."""
        profile = self._profile
        inner, state = profile.integer("ssm.inner_size"), profile.integer("ssm.state_size")
        weight = self._copied("ssm_in.weight")
        states = (self._state((profile.integer("ssm.conv_kernel") - 1) * inner),) if self._offloaded else self._own_states
        xz = self._op(self._out("ssm_in"), *weight, x)
        convolved = self._convolution(xz, inner, profile.integer("ssm.conv_kernel"), *states)
        b_c_dt = self._project("ssm_x", convolved)
        normed = self._has("ssm_dt_norm") or bool(profile.metadata.get(f"{profile.architecture}.ssm.dt_b_c_rms"))
        step, b, c = b_c_dt, b_c_dt, b_c_dt
        if normed:
            step = self._scaled(self._op(profile.integer("ssm.time_step_rank"), b_c_dt), "ssm_dt_norm.weight")
        step = self._project("ssm_dt", step)
        if normed:
            b = self._scaled(self._op(state, b_c_dt), "ssm_b_norm.weight")
            c = self._scaled(self._op(state, b_c_dt), "ssm_c_norm.weight")
        if self._offloaded:  # the scan runs where its state lies
            self.tape.use(step, b, c)
            z, skip, scan = self._gate_and_scan(xz, inner)
            y = self._in_place(scan, self._in_place(convolved, *skip))
        else:
            scan = self._scan(inner, state, convolved, step, b, c)
            self._fetch_states()
            z = self._op(inner, xz)
            y = self._in_place(self._in_place(convolved), scan)
        return self._project("ssm_out", self._op(inner, z, y))

    def _short_convolution(self, x: int) -> int:
        """LFM2's gated convolution (``src/models/lfm2.cpp``)."""
        width, taps = self._width, self._profile.integer("shortconv.l_cache")
        weight = self._copied("shortconv.in_proj.weight")
        own = (self._convolution_states(),) if self._offloaded and not self._has_states else self._own_states
        gates = self._op(self._out("shortconv.in_proj"), *weight, x)
        gated = self._op(width, gates)
        states = STATES if self._has_states else (own or (self._convolution_states(),))[0]
        joined = self._joined(gated, width, taps, states)
        self._fetch_states()
        convolved = self._op(width, joined, *self._copied("shortconv.conv.weight"))
        return self._project("shortconv.out_proj", self._in_place(convolved, gates))

    def _rwkv(self, x: int) -> int:
        """Time mix of RWKV 6 and 7: an upper bound of what lives at a time (``src/models/rwkv{6,7}-base.cpp``)."""
        mixed = self._op(6 * self._width, x)
        parts = [self._op(self._width, mixed) for _ in range(6)]
        state = self._state(self._profile.integer("wkv.head_size") * self._width)
        return self._op(self._width, self._op(2 * self._width, *parts, state))

    # feed-forward

    def _feed_forward(self, x: int, suffix: str = "") -> int:
        """``build_ffn``: gate before up, their product in a new tensor."""
        up_name, gate_name, down_name = f"ffn_up{suffix}", f"ffn_gate{suffix}", f"ffn_down{suffix}"
        inner = self._weights[f"{down_name}.weight"].shape[0]
        if self._has(gate_name):
            gate = self._project(gate_name, x)
            up = self._project(up_name, x)
            if self._profile.integer("altup.num_inputs"):
                if self._sparse():
                    deviation = self._in_place(self._op(inner, gate, self._op(1, gate)))
                    gate = self._in_place(gate, self._op(1, deviation))
                hidden = self._in_place(up, self._in_place(gate))
            else:
                hidden = self._op(inner, gate, up)
        else:
            up = self._project(up_name, x)
            hidden = self._in_place(up) if self._out(up_name) == inner else self._op(inner, up)
        if self._has("ffn_sub_norm") and not suffix:
            hidden = self._norm(hidden, inner)
        return self._project(down_name, hidden)

    def _sparse(self) -> bool:
        """Gemma 3n's first layers keep the largest activations alone."""
        return self._index < SPARSE_GEMMA3N_LAYERS

    def _experts(self, x: int, router_input: int | None = None) -> int:
        """``build_moe_ffn``: router, experts, weighted sum."""
        profile, tokens = self._profile, self._tokens
        experts, used = profile.expert_count, profile.experts_used
        logits = self._project("ffn_gate_inp", x if router_input is None else router_input)
        probabilities = self._in_place(logits)
        biased = self._op(experts, probabilities) if "exp_probs_b.bias" in self._weights else probabilities
        chosen = self.tape.op(experts * tokens * I32, biased)
        weights = self._op(used, probabilities, chosen)
        weights = self._op(used, weights, self._op(1, weights))
        if self._profile.architecture == "llama4":  # weighted before the experts, not after
            x = self._in_place(self._op(used * self._width, x), weights)
        if self._experts_away:
            self.tape.use(x, chosen, weights)
            result = self._op(self._width)
            self._fetch_states(behind_experts=True)
            return result
        return self._routed(x, chosen, weights)

    def _foreign_experts(self) -> int:
        """The experts alone, on another device than their layer: what they read arrives with the first weight that needs it."""
        return self._routed(None, None, None)

    def _routed(self, x: int | None, chosen: int | None, weights: int | None) -> int:
        """The experts' matrices, and the sum of their results."""
        tape, tokens = self.tape, self._tokens
        experts, used = self._profile.expert_count, self._profile.experts_used
        early = self._profile.architecture == "llama4"  # weighted already
        merged = self._has("ffn_gate_up_exps")
        gated = merged or self._has("ffn_gate_exps")
        first = "ffn_gate_up_exps" if merged else "ffn_gate_exps" if gated else "ffn_up_exps"
        matrix = self._copied(f"{first}.weight", expert=True)
        if x is None:
            x = self._op(self._width * (used if early else 1))
        if chosen is None:
            chosen = tape.op(((tokens - 1) * experts + used) * I32)  # a view of all experts in their order
        product = self._biased(self._op(self._out(first) * used, x, chosen, *matrix), first, chosen)
        if merged:
            hidden = self._op(self._out(first) // 2 * used, product)
        elif gated:
            matrix = self._copied("ffn_up_exps.weight", expert=True)
            up = self._biased(self._op(self._out("ffn_up_exps") * used, x, chosen, *matrix), "ffn_up_exps", chosen)
            hidden = self._op(self._out("ffn_up_exps") * used, product, up)
        else:
            hidden = self._in_place(product)
        matrix = self._copied("ffn_down_exps.weight", expert=True)
        last = self._host_experts and not (self._offloaded and self._has("ffn_up_shexp"))
        biased = "ffn_down_exps.bias" in self._weights
        if weights is None and not early and not biased:
            weights = self._op(used)
        if last and not biased:
            self._bring_the_rest()
        down = self._op(self._width * used, hidden, chosen, *matrix)
        if biased:
            bias = self._copied("ffn_down_exps.bias", expert=True)
            if weights is None:
                weights = self._op(used)
            if last:
                self._bring_the_rest()
            down = self._op(self._width * used, down, chosen, *bias)
        if not early and weights is not None:
            down = self._in_place(down, weights)
        result = self._op(self._width, down)
        self._fetch_states(behind_experts=True)
        return result

    def _biased(self, product: int, name: str, chosen: int) -> int:
        """``ggml_add_id``, a new tensor."""
        if f"{name}.bias" not in self._weights:
            return product
        bias = self._copied(f"{name}.bias", expert=True)
        return self.tape.op(self.tape.size(product), product, chosen, *bias)

    def _mixture(self, x: int) -> int:
        """Routed experts, and the shared ones where a layer has them."""
        result = self._experts(x)
        if self._has("ffn_up_shexp"):
            shared = self._feed_forward(x, "_shexp")
            if self._has("ffn_gate_inp_shexp"):
                shared = self._in_place(shared, self._op(1, x))
            result = self._add(result, shared)
        return result

    # the layer

    def _mix(self, x: int) -> int | None:
        """The part of a layer that looks at other tokens."""
        weights = self._weights
        if is_recurrent(weights):
            if any(name.startswith("time_mix_") for name in weights):
                return self._rwkv(x)
            if self._has("shortconv.in_proj"):
                return self._short_convolution(x)
            if self._has("ssm_x"):
                result = self._mamba(x)
            elif self._has("ssm_f_a"):
                return self._kimi_delta_attention(x)
            elif any(name.startswith(("ssm_beta", "ssm_ba", "ssm_alpha")) for name in weights):
                return self._delta_net(x)
            else:
                result = self._attention_and_mamba2(x) if self._attends_beside_state else self._mamba2(x)
            return result
        if self._has("attn_kv_a_mqa"):
            return self._latent_attention(x) if not self._cache.value_elements else self._expanded_latent_attention(x)
        return self._attention(x) if self._has("attn_q", "attn_qkv") else None

    def _layer(self, *, last: bool, normed: bool) -> int:
        if self._profile.integer("altup.num_inputs"):
            return self._alternating_layer(normed=normed)
        stacked = self._index < deepstack_layers(self._profile)
        x = DEEPSTACK if stacked and self._index == 0 else RESIDUAL
        self._own_states = self._first_states()
        late = self._profile.architecture in LATE_OUTPUTS
        crop = last and not late
        if normed:
            cur = NORMED
        elif self._has("attn_norm", "ln1"):
            cur = self._scaled(self._op(self._width, x), "attn_norm.weight", "attn_norm.bias")
        else:
            cur = x
        attention_input = cur
        recurrent = is_recurrent(self._weights)
        mixed = self._mix(cur)
        parallel = self._parallel
        if mixed is not None:
            cur = mixed
            if self._has("post_attention_norm") and self._has("post_ffw_norm", "ffn_norm"):
                cur = self._norm(cur)
            if parallel and self._has("ffn_up", "ffn_gate_inp"):
                return self._parallel_layer(attention_input, cur, crop=crop)
            if crop:
                cur, x = self._crop(cur, x)
            if recurrent and self._scales_residual():  # a view no more
                cur = self._op(self._width, cur)
                recurrent = False
            # what recurrent layers return is a view, whose memory a sum cannot take over
            over_residual = self._profile.architecture in SUMS_INTO_RESIDUAL
            viewed = recurrent and not self._attends_beside_state and not crop
            into = (x,) if viewed else (x, cur) if over_residual else (cur, x)
            x = cur = self._op(self._width, cur, x, into=into)
        elif crop:
            cur, x = self._crop(cur, x)
        if not self._has("ffn_up", "ffn_gate_inp"):
            return x
        if self._has("attn_output_norm"):
            x = self._norm(x)
        pre = self._has("ffn_norm") or (self._has("post_attention_norm") and not self._has("post_ffw_norm"))
        if mixed is None:
            out = self._ffn(cur)
        elif self._has("ffn_gate_inp") and self._has("ffn_up") and self._has("post_ffw_norm_1"):
            shared = self._norm(self._feed_forward(self._op(self._width, x)))
            routed = self._op(self._width, x)
            routed = self._norm(self._experts(routed, self._in_place(self._op(self._width, x))))
            out = self._add(shared, routed)
        else:
            norm = "ffn_norm" if self._has("ffn_norm") else "post_attention_norm"
            out = self._ffn(self._scaled(self._op(self._width, x), f"{norm}.weight", f"{norm}.bias") if pre else x)
        if self._has("post_ffw_norm"):
            out = self._norm(out)
            if not self._has("inp_gate", "layer_output_scale"):
                self._bring_the_rest()
        result = self._add(x, out) if self._profile.architecture in RESIDUAL_FIRST else self._add(out, x)
        if self._has("layer_output_norm"):
            result = self._norm(result)
        if self._has("inp_gate"):  # Gemma 4's per-layer embeddings
            gate = self._project("inp_gate", result)
            gate = self._in_place(gate, self._per_layer_embeddings(RESIDUAL))
            added = self._norm(self._project("proj", gate))
            if not self._has("layer_output_scale"):
                self._bring_the_rest()
            result = self._add(result, added)
        return self._in_place(result, DEEPSTACK) if stacked else result

    def _per_layer_embeddings(self, embedding: int) -> int:
        """What each layer adds of its own: projected where the first layer asks (``project_per_layer_inputs``)."""
        if self._index:
            return self._per_layer
        features = self._profile.integer("embedding_length_per_layer_input") * self._profile.n_layers
        weight = self._profile.model_tensors["per_layer_model_proj.weight"]
        copied = (self.tape.op(weight.bytes),) if self._offloaded else ()
        normed = self._op(features, self._op(features, *copied, embedding))
        self.brought[PER_LAYER] = self._op(features, self._in_place(normed, PER_LAYER))
        return self.brought[PER_LAYER]

    def _scales_residual(self) -> bool:
        return bool(self._profile.metadata.get(f"{self._profile.architecture}.residual_scale"))

    def _parallel_layer(self, normed: int, attended: int, *, crop: bool) -> int:
        """Attention and feed-forward beside each other; both are added to the residual, in an order of each family's own."""
        architecture, x = self._profile.architecture, RESIDUAL
        tokens = self._tokens

        def chosen(tensor: int) -> int:
            if not crop:
                return tensor
            self._tokens = self._scale.outputs
            return self._op(self._width, tensor, self._bring(OUTPUT_ROWS))

        def projected() -> int:
            self._tokens = tokens
            return chosen(self._late_projection(attended) if self._projects_late else attended)

        if architecture == "gptneox":
            x = chosen(x)
            out = self._ffn(self._op(self._width, x))
            return self._add(self._add(out, x), projected())
        if architecture == "phi2":
            cur = projected()
            return self._add(self._add(cur, self._ffn(chosen(normed))), chosen(x))
        if self._has("attn_norm_2"):  # attention has a norm of its own
            normed = self._op(self._width, x)
        out = self._ffn(chosen(normed))
        if architecture == "stablelm":
            return self._add(out, self._add(projected(), chosen(x)))
        if architecture in PROJECTS_LATE and architecture != "falcon":
            out = self._add(out, chosen(x))
            return self._add(out, projected())
        return self._add(self._add(out, projected()), chosen(x))

    def _late_projection(self, attended: int) -> int:
        features = self._weights["attn_output.weight"].shape[0]
        return self._project("attn_output", self._rotated(attended, features, self._value_rotation))

    def _crop(self, cur: int, x: int) -> tuple[int, int]:
        """``inp_out_ids``: go on with the tokens whose logits are wanted."""
        self._tokens = self._scale.outputs
        rows = self._bring(OUTPUT_ROWS)
        return self._op(self._width, cur, rows), self._op(self._width, x, rows)

    def _ffn(self, x: int) -> int:
        if self._has("ffn_gate_inp"):
            return self._mixture(x)
        if any(name.startswith("channel_mix_") for name in self._weights):
            return self._op(self._width, self._op(self._profile.integer("feed_forward_length"), x))
        return self._feed_forward(x)

    def _alternating_layer(self, *, normed: bool) -> int:
        """Gemma 3n: several residual streams, predicted and corrected (``src/models/gemma3n.cpp``)."""
        streams = self._profile.integer("altup.num_inputs")
        width, wide = self._width, self._width * streams
        permuted, router = (PERMUTED, NORMED) if normed else (self._op(wide, RESIDUAL), self._op(width, RESIDUAL))
        coefficients = self._op(streams * streams, self._op(streams, router))
        predictions = self._op(wide, self._op(wide, permuted, coefficients))
        predictions = self._in_place(predictions, RESIDUAL)
        x = self._op(width, predictions)
        attended = self._in_place(self._norm(self._attention(x)), predictions)
        laurel = self._norm(self._project("laurel_r", self._project("laurel_l", x)))
        attended = self._in_place(attended, self._in_place(laurel, x))
        out = self._in_place(self._norm(self._feed_forward(self._op(width, attended))), attended)
        innovation = self._op(wide, self._op(width, out, predictions))
        coefficients = self._op(streams, self._op(streams, self._op(streams, self._in_place(out))))
        corrected = self._in_place(self._in_place(innovation, coefficients), predictions)
        gate = self._in_place(self._project("inp_gate", self._op(width, corrected)))
        gate = self._in_place(gate, self._per_layer_embeddings(EMBEDDING))
        first = self._norm(self._project("proj", gate))
        self._bring_the_rest()
        rest = self._op(width * (streams - 1), corrected, first)
        return self._op(wide, corrected, rest)


SPARSE_GEMMA3N_LAYERS = 10
"""Layers with sparse activations (``n_layer_sparsity`` in ``src/models/models.h``)."""

VALUE_NORM = frozenset({"gemma3n", "gemma4"})
"""Architectures that norm values too."""

LATE_OUTPUTS = frozenset(
    {
        "gemma3n",
        "gemma4",
        "gpt-oss",
        "hy-v3",
        "nemotron_h",
        "qwen35",
        "qwen35moe",
        "qwen3next",
        "step35",
        "cohere2moe",
        "bailingmoe3",
    }
)
"""Architectures that choose the rows of the output after the last norm (``embeddings_nextn_masked``)."""

SUMS_INTO_RESIDUAL = frozenset({"lfm2", "lfm2moe"})
"""Architectures both of whose sums take over the residual's memory."""

PROJECTS_LATE = frozenset({"command-r", "cohere2", "falcon", "gptneox", "stablelm"})
"""Architectures that project the result of attention only after the feed-forward beside it, since it is added to that."""

RESIDUAL_FIRST = SUMS_INTO_RESIDUAL | {"phi3", "phimoe"}
"""Architectures whose last sum takes over the residual's memory: ``ggml_add(ctx0, residual, cur)``."""


def is_mamba(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a layer is one of ``llm_build_mamba_base``."""
    return "ssm_in.weight" in tensors and not any(name.startswith(("ssm_ba", "ssm_beta", "ssm_alpha")) for name in tensors)


def fetches_early(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the states of a layer's convolution are fetched while the layer before still runs, see ``next_early``."""
    return (is_mamba(tensors) and not attends_beside_state(tensors)) or "shortconv.in_proj.weight" in tensors


def next_early(profile: ModelProfile, index: int) -> int | None:
    """The layer whose states are fetched right behind the attention or the scan of layer ``index``, if any.

    ``build_rs`` puts them into the graph at once, while what follows in this layer waits for its reader; routed experts end the
    wait (``build_moe_ffn`` calls ``ggml_build_forward_expand``).
    """
    found: tuple[int | None, ...] = profile.remember("next early", None, lambda: _all_next_early(profile))
    return found[index]


def _all_next_early(profile: ModelProfile) -> tuple[int | None, ...]:
    tensors = profile.layer_tensors
    found: list[int | None] = [None] * profile.n_layers
    for i in reversed(range(profile.n_computed_layers - 1)):
        if "ffn_gate_inp.weight" not in tensors[i]:
            found[i] = i + 1 if fetches_early(tensors[i + 1]) else found[i + 1]
    return tuple(found)


def attends_in_ram(profile: ModelProfile, index: int) -> bool:
    """Attention over a cache in RAM runs on the CPU where states are fetched right behind it, of a later layer or its own.

    Unless that later layer lies on a GPU, which then computes the attention too.
    """
    return next_early(profile, index) is not None or attends_beside_state(profile.layer_tensors[index])


def attends_beside_state(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a layer has both attention and a state (Falcon-H1)."""
    return is_recurrent(tensors) and is_mamba(tensors) and "attn_q.weight" in tensors
