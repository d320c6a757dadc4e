"""Schedules: layers of a run are computed as one that is repeated, whatever their weights' types."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.memory import MemoryEstimate, estimate_memory
from planner.placement import Placement
from planner.profile import REMEMBERED, ModelProfile, build_profile
from planner.programs import layer_kinds
from planner.quantization import ggml_type
from planner.settings import LoadSettings
from tests.planner import models

NAMES = sorted(str(path.relative_to(models.HEADERS).with_suffix("")) for path in models.HEADERS.rglob("*.gguf"))


def mixed(profile: ModelProfile) -> ModelProfile:
    """``profile`` with two matrices of every third layer in a larger type, as a Q4_K_M has them."""
    names = tuple(f"blk.{i}.{name}.weight" for i in range(0, profile.n_layers, 3) for name in ("attn_v", "ffn_down"))
    larger = ggml_type("f16")
    tensors = [replace(tensor, type=larger) if tensor.name in names else tensor for tensor in profile.tensors]
    return build_profile(metadata=profile.metadata, tensors=tensors, file_bytes=profile.file_bytes)


def layer_by_layer(profile: ModelProfile, load: LoadSettings, placement: Placement) -> MemoryEstimate:
    """The estimate with each layer on its own, and those of other types as another kind."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("planner.schedule._in_runs", lambda ends, layers: [(i, 1) for i in layers])
        patch.setattr("planner.schedule.layer_shapes", layer_kinds)
        patch.setattr("planner.programs.layer_shapes", layer_kinds)
        return estimate_memory(replace(profile), load, placement)


@st.composite
def placements(draw: st.DrawFn, n_layers: int, experts: bool) -> Placement:
    """On one to three devices, some of the lowest layers in RAM now and then, or experts of some."""
    cuts = sorted(draw(st.lists(st.integers(0, n_layers), min_size=1, max_size=3)))
    cpu = draw(st.sampled_from([0, cuts[0]]))
    bounds = [cpu, *cuts[1:], n_layers]
    layers = tuple(stop - start for start, stop in pairwise(bounds))
    order = tuple(i for i, count in enumerate(layers) if count or i == len(layers) - 1)
    in_ram = draw(st.sets(st.integers(0, n_layers - 1), max_size=3)) if experts and draw(st.booleans()) else ()
    return Placement(layers=layers, order=order, output_gpu=order[-1], cpu_layers=cpu, cpu_experts=frozenset(in_ram))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_run_of_layers_takes_what_each_of_them_alone_does(data: st.DataObject) -> None:
    profile = models.header(data.draw(st.sampled_from(NAMES)))
    profile = mixed(profile) if data.draw(st.booleans()) else replace(profile)
    load = LoadSettings(
        num_ctx=data.draw(st.sampled_from([2048, 32768])),
        parallel=data.draw(st.sampled_from([1, 3])),
        outputs=data.draw(st.sampled_from([None, 1])),
        kv_type_k=data.draw(st.sampled_from(["f16", "q8_0"])),
        kv_type_v=(values := data.draw(st.sampled_from(["f16", "q8_0"]))),
        flash_attention=values != "f16" or data.draw(st.booleans()),
    )
    for placement in data.draw(st.lists(placements(profile.n_layers, bool(profile.expert_count)), min_size=3, max_size=8)):
        assert estimate_memory(profile, load, placement) == layer_by_layer(profile, load, placement)


def test_another_plan_of_the_model_may_forget_meanwhile() -> None:
    """The proxy plans in threads, which share a model's memory: what was there at one look may be gone at the next."""

    class Shared(dict[Hashable, object]):
        def __contains__(self, key: object) -> bool:
            found = super().__contains__(key)
            self.clear()
            return found

        def __iter__(self) -> Iterator[Hashable]:
            for key in list(super().__iter__()):
                yield key
                self.clear()

    model = models.small(n_layers=2)
    model.memo["squares"] = Shared({number: number**2 for number in range(REMEMBERED)})
    assert model.remember("squares", 3, lambda: 9) == 9
    assert model.remember("squares", -1, lambda: 1) == 1
    assert model.memo["squares"][-1] == 1
