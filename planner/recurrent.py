"""What recurrent layers make: delta nets, Mamba, short convolutions, RWKV.

That of ``src/models/{delta-net,mamba,rwkv6,rwkv7}-base.cpp`` and of the architectures that use them, llama.cpp b10488, on CUDA.
"""

from __future__ import annotations

from planner.attention import Attention
from planner.inputs import (
    F32,
    RESIDUAL,
    STATE_ROWS,
    STATES,
)
from planner.traits import (
    fetches_early,
)


class Recurrent(Attention):
    """The part of a layer that keeps a state instead of keys and values, or beside them."""

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

    def _first_states(self) -> tuple[int, ...]:
        """The first Mamba layer of a device fetches its own states, before anything else."""
        if not fetches_early(self._weights) or self._has_states or self._offloaded:
            return ()
        return (self._convolution_states(),)

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
        if STATES in self.exports:
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
