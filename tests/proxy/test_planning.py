"""A plan for a file, without any Ollama."""

from __future__ import annotations

from pathlib import Path

from planner.stock import EMBEDDING_BATCH
from proxy.config.settings import load_settings
from proxy.planning import plan_for
from tests.planner import models

FAMILIES = Path(__file__).parents[1] / "data" / "gguf" / "families"


async def test_a_file_that_embeds_is_planned_as_one():
    """Ollama gives it a batch that holds a text, and runs one sequence."""
    settings = load_settings(num_parallel=4)
    answer = await plan_for(str(FAMILIES / "gemma-embedding.gguf"), models.rig(models.rtx5090()), {}, settings)
    assert answer.plan.request.embedding
    assert answer.plan.stock.settings.parallel == 1
    assert answer.plan.stock.settings.batch == EMBEDDING_BATCH
