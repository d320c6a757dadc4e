"""Plans of loaded models: changed for a clear gain alone, at idle moments, and not again soon."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from hypothesis import example, given, settings
from hypothesis import strategies as st

from planner.placement import solo
from planner.request import PlanRequest
from proxy.config.rulefile import RuleFile
from proxy.config.settings import load_settings
from proxy.gpus.reader import RigReader
from proxy.models.catalog import ModelFacts
from proxy.ollama.client import Loaded
from proxy.ollama.endpoints import parse_load_request
from proxy.ollama.options import deliver, with_context
from proxy.placing.placement import LOOK_S, Placements
from proxy.placing.steady import RELOAD_GAIN, REPLAN_S, said, worth_reload
from proxy.plans.ruled import RuledPlans
from proxy.simulator import demo_models
from tests.proxy.planners import PAIR, RIG, make

PROFILE = next(model.profile for model in demo_models() if model.name == "phi4:14b")
FACTS = ModelFacts(digest="d", blob="sha256-b", profile=PROFILE, defaults={})
REQUEST = parse_load_request("/api/generate", b'{"model": "phi4:14b", "options": {"num_ctx": 4096}}')


class Ollama:
    """One model, loaded from its first request on."""

    async def loaded(self):
        return (Loaded(name="phi4:14b", digest="d", vram_bytes=10**10, context_length=4096),)

    async def era(self):
        return "llama-server"


class Catalog:
    async def facts(self, name):
        return FACTS


class Speeds:
    """A planner against a stock on the first card; ``best`` is the best card and how much faster it is than the other."""

    def __init__(self):
        self.best, self.gain = 1, 1.0

    def __call__(self, profile, rig, request):
        n = profile.n_layers
        plan = make(profile, rig, request, solo(1, n_gpus=2, n_layers=n), solo(0, n_gpus=2, n_layers=n))
        speeds = [10.0 * (self.gain if card == self.best else 1.0) for card in (0, 1)]
        stock = replace(plan.stock, decode_tokens_per_s=speeds[0])
        other = replace(plan.chosen, decode_tokens_per_s=speeds[1])
        chosen = stock if self.best == 0 else other
        return replace(plan, stock=stock, chosen=chosen, chosen_by_options=chosen, alternatives=(other,))


def plan_of(best, gain):
    speeds = Speeds()
    speeds.best, speeds.gain = best, gain
    return speeds(PROFILE, RIG, PlanRequest(num_ctx=4096))


def test_a_gain_of_ten_percent_is_worth_a_reload_and_less_is_not():
    before = plan_of(1, 1.5)
    for gain, worth in ((1 + RELOAD_GAIN, True), (1.09, False), (1.0, False)):
        after = plan_of(0, gain)
        assert worth_reload(before, after) is worth


def test_the_plan_in_force_counts_by_the_rates_of_now():
    # shows: a card that was rated far too fast does not hold the model by its old rating
    before = plan_of(1, 100.0)
    after = plan_of(0, 1.2)
    assert worth_reload(before, after)


def test_stock_on_one_card_is_said_where_a_loaded_model_is_to_go_there():
    # shows: without an option that changes, Ollama would leave the model where it is; a context that was set stays set
    plan = plan_of(0, 1.5)
    delivery = deliver(plan, "llama-server", tensor_split=False)
    assert (delivery.text, delivery.options) == ("stock; auto; nothing is faster", {})
    assert said(plan, delivery).options == {"main_gpu": 0}
    explicit = said(plan, with_context(delivery, 4096))
    assert (explicit.text, explicit.options) == ("solo CUDA0; auto; context 4096", {"main_gpu": 0, "num_ctx": 4096})


EVENTS = st.lists(
    st.tuples(
        st.floats(0.1, 400.0),  # seconds that pass
        st.sampled_from(["ask", "begin", "end"]),
        st.sampled_from([0, 1]),
        st.floats(1.0, 2.0),
    ),
    max_size=60,
)


@settings(deadline=None, max_examples=60)
@given(EVENTS)
@example([(REPLAN_S, "ask", 0, 1.05)])
@example([(LOOK_S + 1, "ask", 0, 1.5), (REPLAN_S, "begin", 0, 1.05), (REPLAN_S, "ask", 0, 1.5)])
def test_a_loaded_model_never_flaps(events):
    # shows: whatever the planner says, options change at most once in REPLAN_S, for the gain alone, never during a request
    now, speeds = [0.0], Speeds()
    speeds.gain = 1.3

    async def play():
        settings, catalog = load_settings(state="off", host="127.0.0.1:11435", upstream="127.0.0.1:11434"), Catalog()
        plans = RuledPlans(catalog=catalog, rules=RuleFile(None), settings=settings, planner=speeds, live=False)
        parts = {"ollama": Ollama(), "catalog": catalog, "gpus": RigReader(PAIR), "settings": settings, "plans": plans}
        placements = Placements(**parts, clock=lambda: now[0])
        first = await placements.decide(REQUEST)
        placements.done(first, loaded=True)
        options, changed_at, under_way = dict(first.delivery.options), now[0], []
        for passed, event, best, gain in events:
            now[0] += passed
            speeds.best, speeds.gain = best, gain
            if event == "end":
                if under_way:
                    placements.done(under_way.pop(), loaded=True)
                continue
            decision = await placements.decide(REQUEST)
            if dict(decision.delivery.options) != options:
                assert not under_way
                assert now[0] - changed_at >= REPLAN_S
                assert gain >= 1 + RELOAD_GAIN
                options, changed_at = dict(decision.delivery.options), now[0]
            if event == "begin":
                under_way.append(decision)
            else:
                placements.done(decision, loaded=True)

    assert LOOK_S < REPLAN_S
    asyncio.run(play())
