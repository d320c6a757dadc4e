"""Bytes on each device, held to what llama.cpp b10488 itself reserves: tests/data/memory, by benchmarks/memory/measure.py."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.gpu.models import profile as synthetic
from planner.cache import cache_bytes
from planner.memory import estimate_memory
from planner.placement import Placement, on_cpu, solo
from planner.profile import ModelProfile, build_profile
from planner.schedule import PARTS_KEPT
from planner.settings import LoadSettings
from planner.units import MIB
from tests.planner import models
from tests.planner.measured import DATA, Difference, differences, estimate_of, profile_of, read_table

TABLES = ("models", "families", "caches", "spills", "variety")
MODELS = sorted(path.stem for path in (DATA / "gguf").glob("*.gguf"))
FAMILIES = sorted(f"families/{path.stem}" for path in (DATA / "gguf" / "families").glob("*.gguf"))
UNKNOWN = sorted(f"unknown/{path.stem}" for path in (DATA / "gguf" / "unknown").glob("*.gguf"))


@cache
def found(table: str) -> tuple[Difference, ...]:
    return tuple(differences(table))


@pytest.mark.parametrize("table", TABLES)
def test_weights_and_caches_are_exact(table: str) -> None:
    """Weights, KV cells and recurrent states are exact to 1 MiB on every device and on the host."""
    assert len(found(table)) > 250
    assert [d for d in found(table) if max(abs(d.weights_mib), abs(d.kv_mib)) > 1] == []


@pytest.mark.parametrize(("build", "parts", "loads"), [("cuda_b10488", 3, 162), ("cuda_b11434", 2, 420)])
def test_the_truth_is_what_cuda_devices_answered(build: str, parts: int, loads: int) -> None:
    """Real GPUs gave the same whole MiB for every load; a later llama.cpp the same weights and caches."""
    key = ("model", "ctx", "ubatch", "kv", "split")
    dry = {tuple(row[k] for k in key): row["bytes"] for row in read_table("models")}
    rows = read_table(build)
    assert len(rows) == loads
    for row in rows:
        answer = dry[tuple(row[k] for k in key)]
        for device, mib in row["mib"].items():
            assert [size // MIB for size in answer.get(device, [0, 0, 0])[:parts]] == mib[:parts], row


def test_totals_of_the_sixteen_shapes() -> None:
    """Within 1 % or 32 MiB on at least 95 % of devices, within 3 % or 128 MiB on all, never more than 64 MiB too low."""
    rows = found("models")
    assert sum(d.within(0.01, 32) for d in rows) >= 0.95 * len(rows)
    assert [d for d in rows if not d.within(0.03, 128)] == []
    assert [d for d in rows if d.total_mib < -64] == []


def test_totals_of_other_families() -> None:
    """The same for families that no constant was looked up in."""
    rows = found("families")
    assert sum(d.within(0.01, 32) for d in rows) >= 0.98 * len(rows)
    assert [d for d in rows if not d.within(0.03, 128) or d.total_mib < -64] == []


def test_totals_of_other_cache_types() -> None:
    """Every cache type, alone and mixed: within 1 % or 32 MiB on all devices, also where attention runs on the CPU."""
    rows = found("caches")
    assert [d for d in rows if not d.within(0.01, 32)] == []
    assert {d.row["kv"] for d in rows} | {d.row["kv_v"] for d in rows} >= {"f32", "bf16", "q5_1", "q5_0", "q4_1", "iq4_nl"}


def test_totals_of_layers_in_ram_beside_two_gpus() -> None:
    """Within 1 % or 32 MiB on at least 95 % of devices, within 3 % or 128 MiB on all, never more than 64 MiB too low."""
    rows = found("spills")
    assert sum(d.within(0.01, 32) for d in rows) >= 0.95 * len(rows)
    assert [d for d in rows if not d.within(0.03, 128) or d.total_mib < -64] == []


def test_totals_of_loads_drawn_at_random() -> None:
    """Any header, any cache types, one to four devices, layers and experts in RAM: one device of a hundred may be off by more."""
    rows = found("variety")
    assert {d.row["model"] for d in rows} >= {*MODELS, *FAMILIES}
    assert sum(d.within(0.01, 32) for d in rows) >= 0.98 * len(rows)
    assert sum(d.within(0.03, 128) and d.total_mib >= -64 for d in rows) >= 0.99 * len(rows)


def test_attention_without_a_kernel_costs_host_memory() -> None:
    """Values that CUDA cannot fuse keep their cache on the GPU and are copied to the host, four times over in a pipeline."""
    profile = profile_of("llama3.1-8b-q4km")
    split = Placement(layers=(16, 16), order=(0, 1), output_gpu=1)
    load = LoadSettings(num_ctx=32768)
    known, unknown = (estimate_memory(profile, replace(load, kv_type_k=kv, kv_type_v=kv), split) for kv in ("q4_0", "iq4_nl"))
    assert [d.kv_bytes for d in known.devices] == [d.kv_bytes for d in unknown.devices]
    copies = 4 * sum(cache_bytes(profile, replace(load, kv_type_k="iq4_nl", kv_type_v="iq4_nl")))
    assert unknown.host.compute_bytes - known.host.compute_bytes > copies


@pytest.mark.parametrize("model", MODELS + FAMILIES + UNKNOWN)
def test_an_unknown_architecture_gets_an_upper_bound(model: str) -> None:
    """A model that no table knows, by its own name or another, is estimated no lower than llama.cpp's truth, and says so."""
    rows = [d for table in (*TABLES, "unknown") for d in found(table) if d.row["model"] == model]
    assert rows
    for profile in (renamed(profile_of(model)), *([profile_of(model)] if model in UNKNOWN else [])):
        for difference in rows:
            memory = estimate_of(difference.row, profile)
            assert memory.upper_bound
            part = memory.host if difference.device == "Host" else memory.devices[int(difference.device[4:])]
            assert part.total_bytes / MIB >= difference.measured_mib - 1, difference


def renamed(profile: ModelProfile) -> ModelProfile:
    """The same file under an architecture of the future."""
    old, new = profile.architecture, "tomorrow"
    metadata = {key.replace(f"{old}.", f"{new}.", 1): value for key, value in profile.metadata.items()}
    return build_profile(
        metadata=metadata | {"general.architecture": new}, tensors=profile.tensors, file_bytes=profile.file_bytes
    )


def test_a_server_reserves_logits_for_one_token_a_sequence() -> None:
    """With outputs = parallel the logits of a whole micro-batch fall away, as they do in llama-server b10488."""
    profile = profile_of("qwen2.5-32b-q4km")
    placement = solo(0, n_gpus=1, n_layers=profile.n_layers)
    every, one = (
        estimate_memory(profile, LoadSettings(outputs=outputs), placement).devices[0].compute_bytes for outputs in (None, 1)
    )
    logits_bytes = 4 * 512 * profile.vocab_size
    assert one < logits_bytes <= every


def test_a_recorded_server_of_a_32b_shape() -> None:
    """A real llama-server b10488 logged 190.01 MiB of compute on one H200, 242.04 on each of two; on the host 24.01 and 36.05."""
    profile = wide_32b(profile_of("qwen2.5-32b-q4km"))
    served = LoadSettings(num_ctx=4096, batch=512, ubatch=512, outputs=1)
    alone = estimate_memory(profile, served, solo(0, n_gpus=1, n_layers=64))
    both = estimate_memory(profile, served, Placement(layers=(36, 28), order=(0, 1), output_gpu=1))
    logged = (190.01, 24.01, 242.04, 242.04, 36.05)
    parts = (*alone.devices, alone.host, *both.devices, both.host)
    assert [part.compute_bytes / MIB for part in parts] == pytest.approx(logged, abs=0.3)


def wide_32b(profile: ModelProfile) -> ModelProfile:
    """The shape of the recorded load: 64 heads, feed-forward 25 600 wide, no biases."""
    metadata = {key.replace("qwen2.", "llama."): value for key, value in profile.metadata.items()}
    metadata |= {"general.architecture": "llama", "llama.attention.head_count": 64}
    shapes = {"attn_q": (5120, 8192), "attn_output": (8192, 5120)}
    tensors = []
    for tensor in profile.tensors:
        if not tensor.name.endswith(".bias"):
            stem = tensor.name.split(".")[-2]
            shape = shapes.get(stem, tuple(25600 if n == 27648 else n for n in tensor.shape))
            tensors.append(replace(tensor, shape=shape))
    return build_profile(metadata=metadata, tensors=tensors, file_bytes=0)


def test_tied_embedding_is_loaded_once_on_the_host() -> None:
    """A tied output matrix is a second copy on a GPU, but the same tensor where the output layer stays in RAM."""
    profile = profile_of("families/command-r")
    assert profile.tied_bytes > 0
    memory = estimate_memory(profile, LoadSettings(), on_cpu(n_gpus=1, n_layers=profile.n_layers))
    assert memory.host.weights_bytes == sum(layer.weights_bytes for layer in profile.layers) + profile.input_bytes + (
        profile.output_bytes - profile.tied_bytes
    )


def test_runtime_and_projector_are_parts_of_their_own() -> None:
    """The runtime counts on each GPU that is used, a projector on the first of them."""
    profile = profile_of("gemma3-27b-q4km")
    placement = Placement(layers=(0, 30, 32), order=(1, 2), output_gpu=2)
    plain = estimate_memory(profile, LoadSettings(), placement)
    more = estimate_memory(profile, LoadSettings(), placement, runtime_bytes=(7, 7, 7), projector_bytes=1000)
    assert [m.total_bytes - p.total_bytes for m, p in zip(more.devices, plain.devices, strict=True)] == [0, 1007, 7]
    assert more.host == plain.host


@pytest.mark.parametrize(
    ("pooling", "num_ctx", "ubatch", "parallel", "logged"),
    [
        ("none", 8192, 512, 1, (251.00, 9.01)),
        ("mean", 8192, 512, 1, (259.01, 9.02)),
        ("mean", 256, 1024, 4, (503.54, 2.54)),
        ("cls", 1024, 256, 4, (126.01, 1.01)),
        ("last", 8192, 512, 1, (259.01, 9.01)),
    ],
)
def test_a_decoder_that_pools(pooling: str, num_ctx: int, ubatch: int, parallel: int, logged: tuple[float, float]) -> None:
    """What ``llama-server`` b10488 logged for ``benchmarks.gpu.models``' tiny one on an RPC device: ``--embedding --pooling mean
    -c 8192 -b 512 -ub 512 -np 1 -ngl 99``. Loaded to answer it pools nothing."""
    plain = synthetic("tiny")
    metadata = {**plain.metadata, "llama.pooling_type": ("none", "mean", "cls", "last").index(pooling)}
    profile = build_profile(metadata=metadata, tensors=plain.tensors, file_bytes=plain.file_bytes)
    load = LoadSettings(num_ctx=num_ctx, parallel=parallel, batch=ubatch, ubatch=ubatch)
    placement = solo(0, n_gpus=1, n_layers=profile.n_layers)
    memory = estimate_memory(profile, load, placement)
    assert (memory.devices[0].compute_bytes / MIB, memory.host.compute_bytes / MIB) == pytest.approx(logged, abs=0.011)
    answering = replace(load, outputs=parallel)
    assert estimate_memory(profile, answering, placement) == estimate_memory(plain, answering, placement)


def test_an_embedding_model_has_no_cache() -> None:
    """An encoder's bytes do not grow with the context."""
    profile = profile_of("families/nomic-bert")
    assert set(cache_bytes(profile, LoadSettings(num_ctx=8192))) == {0}


def test_windows_stop_growing() -> None:
    """From a context beyond window and micro-batch on, a windowed layer keeps the same cells; a global one goes on growing."""
    profile = profile_of("gemma3-27b-q4km")
    small, large = (cache_bytes(profile, LoadSettings(num_ctx=ctx)) for ctx in (8192, 65536))
    assert (small[0], 8 * small[5]) == (large[0], large[5])


@pytest.mark.parametrize("field", ["num_ctx", "parallel", "batch", "ubatch", "outputs"])
def test_settings_below_one_are_refused(field: str) -> None:
    """Nothing can be loaded with zero or fewer of anything."""
    with pytest.raises(ValueError, match="at least 1"):
        LoadSettings(**{field: -1})


def test_an_unknown_cache_type_is_refused() -> None:
    """A cache type that llama.cpp does not take is named, with those that it does."""
    with pytest.raises(ValueError, match=r"q4_k.*iq4_nl"):
        LoadSettings(kv_type_k="q4_k")


PROFILES = st.sampled_from([profile_of(model) for model in ("qwen3-0.6b-q8", "gpt-oss-20b", "nemotron-nano-9b-v2-q4km")])


@st.composite
def splits(draw: st.DrawFn, n_layers: int) -> Placement:
    """Any contiguous placement on three GPUs, with layers left on the CPU."""
    cuts = sorted(draw(st.lists(st.integers(0, n_layers), min_size=3, max_size=3)))
    counts = (cuts[1] - cuts[0], cuts[2] - cuts[1], n_layers - cuts[2])
    order = tuple(gpu for gpu, count in enumerate(counts) if count)
    return Placement(layers=counts, order=order, output_gpu=order[-1] if order else None, cpu_layers=cuts[0])


@given(data=st.data(), model=st.sampled_from([*MODELS, *FAMILIES]))
@settings(max_examples=100, deadline=None)
def test_every_load_has_an_estimate(data: st.DataObject, model: str) -> None:
    """Whatever the split, the cache types and the batches, with layers and experts in RAM and without an output layer."""
    profile = profile_of(model)
    placement = data.draw(splits(profile.n_layers))
    offloaded = range(placement.cpu_layers, profile.n_layers)
    placement = replace(
        placement,
        output_gpu=data.draw(st.sampled_from([placement.output_gpu, None])),
        cpu_experts=data.draw(st.frozensets(st.sampled_from(offloaded))) if offloaded else frozenset(),
    )
    kinds, batches = st.sampled_from(["f32", "f16", "bf16", "q8_0", "q4_0", "q5_1"]), st.sampled_from([1, 2, 64, 512, 2048])
    ubatch, parallel = data.draw(batches), data.draw(st.integers(1, 4))
    load = LoadSettings(
        num_ctx=data.draw(st.sampled_from([1, 512, 8192, 131_072])),
        parallel=parallel,
        batch=ubatch,
        ubatch=ubatch,
        kv_type_k=data.draw(kinds),
        kv_type_v=data.draw(kinds),
        flash_attention=data.draw(st.booleans()),
        outputs=data.draw(st.sampled_from([None, parallel])),
    )
    memory = estimate_memory(profile, load, placement)
    for part in (*memory.devices, memory.host):
        assert min(part.weights_bytes, part.kv_bytes, part.compute_bytes) >= 0


@given(data=st.data(), profile=PROFILES)
@settings(max_examples=40, deadline=None)
def test_every_byte_lies_somewhere(data: st.DataObject, profile: ModelProfile) -> None:
    """Weights and caches add up to the model's, however it is split; nothing lies on a GPU that takes no layers."""
    placement = data.draw(splits(profile.n_layers))
    load = LoadSettings(num_ctx=data.draw(st.sampled_from([512, 4096, 50_000])), ubatch=data.draw(st.sampled_from([64, 512])))
    memory = estimate_memory(profile, load, placement)
    parts = (*memory.devices, memory.host)
    tied = profile.tied_bytes if placement.output_gpu is None else 0
    assert sum(part.weights_bytes for part in parts) == profile.weights_bytes + profile.input_bytes - tied
    assert sum(part.kv_bytes for part in parts) == sum(cache_bytes(profile, load))
    assert all(memory.devices[gpu].total_bytes == 0 for gpu in range(3) if gpu not in placement.order)
    assert all(memory.devices[gpu].compute_bytes > 0 for gpu in placement.order)


@given(profile=PROFILES, ctx=st.integers(256, 60_000), ubatch=st.sampled_from([128, 512, 1024]), parallel=st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_more_context_never_costs_less(profile: ModelProfile, ctx: int, ubatch: int, parallel: int) -> None:
    """Weights and caches never shrink with the context, and equal questions get equal answers."""
    placement = solo(0, n_gpus=1, n_layers=profile.n_layers)
    load = LoadSettings(num_ctx=ctx, batch=2048, ubatch=ubatch, parallel=parallel)
    less, more = (estimate_memory(profile, s, placement).devices[0] for s in (load, replace(load, num_ctx=2 * ctx)))
    assert less.kv_bytes <= more.kv_bytes
    profile.memo.clear()
    assert estimate_memory(profile, load, placement).devices[0] == less


def test_what_estimates_keep_is_bounded() -> None:
    """A server plans for years, for any context and split that clients and free memory bring about."""
    profile = models.header("llama3.3-70b-q4km")
    for first in range(1, 40):
        for second in range(1, 41 - first):
            layers = (first, second, 80 - first - second)
            placement = Placement(layers=layers, order=(0, 1, 2), output_gpu=2)
            estimate_memory(profile, LoadSettings(num_ctx=4096), placement, runtime_bytes=(0, 0, 0))
    schedules = next(iter(profile.memo["schedules"].values()))
    assert len(schedules._parts) <= PARTS_KEPT
    assert all(len(model._known) <= PARTS_KEPT for model in profile.memo["compute"].values())
