"""Which tensors llama.cpp makes while it computes one layer: a tape for each kind of layer.

Order and sizes are those of ``llm_graph_context::build_{norm,qkv,ffn,moe_ffn,attn,attn_mha,rs}`` (``src/llama-graph.cpp``) and of
``src/models/<architecture>.cpp``, llama.cpp b10488, on CUDA. What a layer computes is read from its own tensors, so that a new
architecture made of known parts needs no code here. Activations are F32.
"""

from __future__ import annotations

from planner.feedforward import FeedForward
from planner.inputs import (
    DEEPSTACK,
    EMBEDDING,
    NORMED,
    OUTPUT_ROWS,
    PER_LAYER,
    PERMUTED,
    RESIDUAL,
    deepstack_layers,
)
from planner.recurrent import Recurrent
from planner.traits import (
    LATE_OUTPUTS,
    PROJECTS_LATE,
    RESIDUAL_FIRST,
    SUMS_INTO_RESIDUAL,
)


class LayerGraph(Recurrent, FeedForward):
    """Writes the tape of one repeating layer."""

    def write(self, *, last: bool, normed: bool) -> int:
        """Writes all of it; returns the tensor that the next layer reads.

        * ``last``: the model's last layer, which goes on with the tokens of the output alone.
        * ``normed``: the first norm came from the device before.
        """
        return self._layer(last=last, normed=normed)

    def _mix(self, x: int) -> int | None:
        """The part of a layer that looks at other tokens."""
        weights = self._weights
        if self._recurrent:
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
        recurrent = self._recurrent
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
        self.exports[PER_LAYER] = self._op(features, self._in_place(normed, PER_LAYER))
        return self.exports[PER_LAYER]

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
