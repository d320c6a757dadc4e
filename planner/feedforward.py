"""What feed-forwards make: dense ones, routed experts, shared experts.

That of ``llm_graph_context::build_{ffn,moe_ffn}`` (``src/llama-graph.cpp``), llama.cpp b10488.
"""

from __future__ import annotations

from planner.inputs import (
    I32,
)
from planner.operations import Operations
from planner.traits import (
    SPARSE_GEMMA3N_LAYERS,
)


class FeedForward(Operations):
    """The part of a layer that each token goes through alone."""

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

    def foreign_experts(self) -> int:
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
