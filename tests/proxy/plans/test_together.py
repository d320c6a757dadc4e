"""A group that is to be loaded at the same time, placed without an Ollama."""

from planner.plan import make_plan
from planner.request import PlanRequest
from proxy.gpus.static import StaticSource
from proxy.plans.together import Member, share
from proxy.simulator import demo_models

PROFILES = {model.name: model.profile for model in demo_models()}


def shares(cards, *names, by_options=True):
    """What each of the models gets, the first the one that should be fastest."""
    rig = StaticSource.from_arguments(cards).rig()
    group = [Member(profile=PROFILES[name], request=PlanRequest(num_ctx=4096)) for name in names]
    return [share(group, own, rig, make_plan, by_options=by_options) for own in range(len(group))]


def test_each_leaves_room_for_the_other_where_that_one_goes():
    first, second = shares(("RTX 5090", "RTX 3090"), "qwen2.5:32b", "phi4:14b")
    assert (first.gpu, second.gpu) == (0, 1)
    assert first.reserve_bytes[0] == 0
    assert first.reserve_bytes[1] > PROFILES["phi4:14b"].file_bytes
    assert second.reserve_bytes[0] > PROFILES["qwen2.5:32b"].file_bytes
    assert second.reserve_bytes[1] == 0


def test_the_small_one_comes_first_where_the_order_given_leaves_no_room():
    # shows: the large one would take more than 80 % of the fast card, and the small one be unloaded for it
    first, second = shares(("RTX 5090:10GiB", "RTX 3090:16GiB"), "phi4:14b", "llama3.1:8b")
    assert (first.gpu, second.gpu) == (1, 0)


def test_where_no_option_says_the_card_ollama_looks_at_all_of_them():
    # shows: one takes more than 80 % of its card, but not of what is free on both together
    cards, names = ("RTX 5090:10GiB", "RTX 3090:16GiB"), ("phi4:14b", "phi4:14b")
    assert shares(cards, *names) == [None, None]
    assert [found.gpu for found in shares(cards, *names, by_options=False)] == [0, 1]
