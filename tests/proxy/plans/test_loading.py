"""How Ollama would load a model for a request: what it evicts for it, and what a reload gives back."""

from __future__ import annotations

import pytest

from planner.request import PlanRequest
from planner.stock import predict_server_vram
from planner.units import GIB
from proxy.plans.loading import freed, makes_room
from tests.planner import models


@pytest.mark.parametrize(("name", "sequences"), [("llama3.1-8b-q4km", 4), ("qwen3.5-35b-a3b-q4km", 1)])
def test_room_is_made_for_as_many_sequences_as_ollama_runs(name, sequences):
    """Some architectures are never run in parallel, whatever OLLAMA_NUM_PARALLEL says: their context counts once."""
    profile = models.header(name)
    needed_bytes = predict_server_vram(profile, 32768 * sequences) * 100 // 80
    request = PlanRequest(num_ctx=32768, parallel=4)
    for left_bytes, makes in ((GIB, False), (-GIB, True)):
        free_mib = (needed_bytes + left_bytes) // 2**20
        assert makes_room(profile, models.rig(models.gpu("a", free_mib)), request) is makes


def test_an_unloaded_model_gives_back_what_it_holds_and_no_more_than_the_driver_leaves():
    rig = models.rig(models.rtx5090(free_mib=10_000), models.rtx3090(free_mib=23_000))
    back = freed(rig, 20 * GIB, (20 * GIB, GIB))
    assert back.gpus[0].free_bytes == rig.gpus[0].free_bytes + 20 * GIB
    assert rig.gpus[1].free_bytes < back.gpus[1].free_bytes < rig.gpus[1].free_bytes + GIB
