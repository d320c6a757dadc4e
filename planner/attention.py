"""What attention makes: grouped queries, latent attention, a sparse indexer.

That of ``llm_graph_context::build_{qkv,attn,attn_mha}`` (``src/llama-graph.cpp``) and ``src/models/``, llama.cpp b10488, on CUDA.
"""

from __future__ import annotations

from planner.cache import window_tokens
from planner.inputs import (
    CHOICE_MASK,
    F16,
    F32,
    POSITIONS,
    attention_features,
    rotates,
    sparse_cells,
)
from planner.operations import Operations
from planner.tape import Growth
from planner.traits import (
    VALUE_NORM,
    attends_in_ram,
)


class Attention(Operations):
    """The part of a layer that looks at other tokens' keys and values."""

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
        if self._has("attn_gate") and not self._recurrent:
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
        position = (POSITIONS,) if rotates(self._profile, self._cache) else ()
        if self._has(norm):
            x = self._op(features, x)
            self._bring_all((POSITIONS, self._key_rotation))
            return self._in_place(x, POSITIONS) if position else x
        return self._op(features, x, *position) if position else x

    def _rotated_view(self, x: int, whole: int, features: int, matrix: int) -> int:
        """The same of a part of a larger tensor, which has to be made contiguous first."""
        if x == whole and self._rotates_by(matrix):
            x = self._op(features, whole)
        return self._rotated(x, features, matrix)

    def _rotated(self, x: int, features: int, matrix: int) -> int:
        """Quantized caches hold values rotated by a Hadamard matrix (``llama_mul_mat_hadamard``)."""
        if not self._rotates_by(matrix):
            return x
        return self._op(features, x, self._bring(matrix))

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
            copies = self._borrowed
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
        position = self._op(heads * rope, q, POSITIONS) if rotated else q
        query = self._op(heads * self._cache.key_elements, absorbed, position)
        compressed = self._project("attn_kv_a_mqa", x)
        value = self._op(rank, compressed)
        key_position = self._op(rope, compressed, POSITIONS) if rotated else compressed
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

    def _late_projection(self, attended: int) -> int:
        features = self._weights["attn_output.weight"].shape[0]
        return self._project("attn_output", self._rotated(attended, features, self._value_rotation))
