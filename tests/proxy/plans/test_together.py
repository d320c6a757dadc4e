"""A group that is to be loaded at the same time, placed without an Ollama."""

from dataclasses import replace

import pytest

from planner.hardware import Host
from planner.plan import make_plan
from planner.request import PlanRequest
from planner.units import GIB
from proxy.gpus.static import StaticSource
from proxy.plans.together import Member, share
from proxy.simulator import demo_models

PLENTY = Host(total_bytes=64 * GIB, free_bytes=64 * GIB)
PROFILES = {model.name: model.profile for model in demo_models()}


def shares(cards, *names, by_options=True, num_ctx=4096, host=PLENTY, reserve_bytes=()):
    """What each of the models gets, the first the one that should be fastest; ``reserve_bytes`` are the last one's own."""
    rig = replace(StaticSource.from_arguments(cards).rig(), host=host)
    group = [Member(profile=PROFILES[name], request=PlanRequest(num_ctx=num_ctx)) for name in names]
    group[-1] = replace(group[-1], request=replace(group[-1].request, reserve_bytes=reserve_bytes))
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


def test_one_that_no_card_holds_alone_may_be_split_and_the_other_finds_room_beside_it():
    first, second = shares(("RTX 3090:16GiB", "RTX 3090:16GiB"), "qwen2.5:32b", "all-minilm:22m")
    assert (first.gpu, second.gpu) == (None, 0)
    assert all(second.reserve_bytes)


def test_a_group_of_which_one_would_be_partly_in_ram_is_none():
    assert shares(("RTX 5090:3GiB", "RTX 3090:5GiB"), "all-minilm:22m", "llama3.1:8b") == [None, None]


def test_another_split_than_the_plans_own_is_not_taken():
    # shows: it has both in peace, but nothing could ask for it: the plan that is made for the load is the faster one
    assert shares(("RTX 5090:8GiB", "RTX 3090:3GiB"), "qwen3:0.6b", "llama3.1:8b") == [None, None]


@pytest.mark.parametrize("host", [PLENTY, Host(total_bytes=GIB, free_bytes=GIB // 128)], ids=["RAM", "no RAM"])
def test_stock_that_would_run_out_of_memory_is_not_taken(host):
    # shows: neither beside a plan that is in RAM, nor as the plan itself where nothing fits
    assert shares(("RTX 5090:2088MiB", "RTX 3090:700MiB"), "qwen3:0.6b", "all-minilm:22m", host=host) == [None, None]


def test_the_next_best_card_is_the_fastest_that_leaves_the_other_alone():
    cards = ("RTX 5090:9GiB", "RTX 3090:6GiB", "RTX 3060 12GB:11GiB")
    assert [found.gpu for found in shares(cards, "llama3.1:8b", "qwen3:0.6b", num_ctx=16384)] == [0, 1]


def test_what_a_rule_keeps_free_stays_free():
    cards, names = ("RTX 5090", "RTX 3090"), ("all-minilm:22m", "phi4:14b")
    assert [found.gpu for found in shares(cards, *names)] == [0, 0]
    assert [found.gpu for found in shares(cards, *names, reserve_bytes=(31 * GIB, 0))] == [0, 1]


def test_where_a_split_is_to_go_ollama_looks_at_all_cards():
    cards = ("RTX 5090:9GiB", "RTX 3090:6GiB", "RTX 3060 12GB:10GiB")
    assert [found.gpu for found in shares(cards, "phi4:14b", "llama3.1:8b")] == [None, None]


def test_the_first_has_nobody_unloaded_and_may_take_all_it_wants():
    # shows: it takes more than 80 % of what is free; the other one has its room all the same
    cards = ("RTX 5090:8GiB", "RTX 3090:12GiB")
    assert [found.gpu for found in shares(cards, "llama3.1:8b", "qwen3:0.6b", num_ctx=16384)] == [None, 0]
