"""``lopsided plan``: a plan for a GGUF file, or for a model of the Ollama behind the proxy, without loading anything."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx

from planner.hardware import Rig
from planner.plan import Plan, Planner, make_plan
from planner.request import Era
from proxy.config.rulefile import RuleFile
from proxy.config.settings import Settings
from proxy.errors import UpstreamError
from proxy.models.catalog import Catalog, ModelFacts
from proxy.models.gguf import is_embedding, read_header, read_profile
from proxy.ollama.client import Ollama
from proxy.ollama.options import Delivery, deliver, era_of, stock
from proxy.plans.loading import plan_request
from proxy.plans.ruled import OFF, Load, RuledPlans, in_context


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """The plan and how it is delivered; ``header_only``: the file has no tensor data, so it can be planned but not run."""

    plan: Plan
    delivery: Delivery
    header_only: bool = False


async def plan_for(
    model: str,
    rig: Rig,
    options: Mapping[str, int | None],
    settings: Settings,
    *,
    version: str | None = None,
    planner: Planner = make_plan,
    rules: RuleFile | None = None,
) -> Answer:
    """The plan for a request with ``options`` to load ``model``, a file or a name of Ollama's, on ``rig``.

    ``rules`` are those of ``lopsided.toml``, which know a file by its name. ``version`` is the Ollama to plan for; without one it
    is the one behind the proxy, for a file the newest. Raises ``GgufError`` and ``ModelError`` for what cannot be planned,
    ``UpstreamError`` where Ollama has to be asked and does not answer.
    """
    header_only, found = False, era_of("")
    async with httpx.AsyncClient(base_url=settings.upstream.url, trust_env=False) as client:
        catalog = Catalog(client)
        if is_file(model):
            header_only = read_header(model).header_only
            profile = read_profile(model)
            facts = ModelFacts(digest="", blob=model, profile=profile, defaults={}, is_embedding=is_embedding(profile.metadata))
            name = Path(model).name
        else:
            (facts, found), name = await _ask(model, catalog, Ollama(client), settings), model
        era = era_of(version) if version else found
        plans = RuledPlans(catalog=catalog, rules=rules or RuleFile(None), settings=settings, planner=planner)
        wanted = plan_request(options, facts, settings, era)
        plan = await plans.on(Load(model=name, facts=facts, options=options, request=wanted), rig, loaded=())
    delivery = deliver(plan, era, tensor_split=settings.tensor_split)
    delivery = stock(OFF) if plans.rule(name).off else in_context(delivery, plan, wanted)
    return Answer(plan=plan, delivery=delivery, header_only=header_only)


def is_file(model: str) -> bool:
    """Whether ``model`` means a file rather than a name of Ollama's."""
    return model.lower().endswith(".gguf") or Path(model).is_file()


async def _ask(model: str, catalog: Catalog, ollama: Ollama, settings: Settings) -> tuple[ModelFacts, Era]:
    """What Ollama says about ``model``, and which it is."""
    try:
        return await catalog.facts(model), await ollama.era()
    except UpstreamError as error:
        raise UpstreamError(
            f"{model} is no file here, and Ollama at {settings.upstream.url} cannot be asked for it ({error}). "
            "Name a GGUF file, start Ollama, or set LOPSIDED_UPSTREAM"
        ) from error
