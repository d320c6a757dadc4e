"""Which launches count as failed, how careful the next answer is, and when the launcher counts as gone."""

from __future__ import annotations

import pytest

from proxy.launcher.launches import FAILURE_KEPT_S, PENDING_S, Launches
from proxy.ollama.names import blob_name


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def launches(clock) -> Launches:
    return Launches(clock)


def launch(launches: Launches, blob: str, answer: object = "arguments", context: int = 8192) -> int:
    careful = launches.careful(blob, context)
    launches.given(blob, answer, context)
    return careful


def test_a_model_launched_again_with_less_before_it_was_loaded_gets_the_wider_plan_then_stock(launches):
    assert [launch(launches, "a", context=context) for context in (8192, 4096, 2048, 1024)] == [0, 1, 2, 2]
    assert launch(launches, "b") == 0


def test_the_same_load_again_has_failed_only_when_two_in_a_row_were_never_seen(launches):
    # a client that bypasses the proxy and is done, or has left, before anybody looked is no failure
    assert [launch(launches, "a") for _ in range(6)] == [0, 0, 1, 1, 2, 2]
    assert [launch(launches, "b"), launch(launches, "b", context=16384)] == [0, 0]


def test_loads_that_are_seen_now_and_then_never_count_as_failed(launches):
    for _ in range(5):
        assert [launch(launches, "a") for _ in range(2)] == [0, 0]
        launches.loaded("a")


def test_a_load_whose_client_has_left_is_no_failure_however_often(launches):
    for context in (8192, 8192, 4096, 4096, 8192):
        assert launch(launches, "a", context=context) == 0
        launches.left("a")
        assert not launches.pending


def test_a_model_that_was_seen_loaded_has_not_failed(launches):
    for _ in range(3):
        assert launch(launches, "a") == 0
        assert list(launches.pending) == ["a"]
        launches.loaded("a")
        assert not launches.pending


def test_a_failure_is_remembered_although_the_next_answer_loads_and_forgotten_after_a_while(launches, clock):
    launch(launches, "a")
    assert launch(launches, "a", context=4096) == 1
    launches.loaded("a")
    assert launch(launches, "a") == 1
    launches.loaded("a")
    clock.now += FAILURE_KEPT_S + 1
    assert launch(launches, "a") == 0


def test_a_load_whose_end_nobody_saw_counts_for_nothing_after_a_while(launches, clock):
    launch(launches, "a")
    clock.now += PENDING_S + 1
    assert not launches.pending
    assert launch(launches, "a") == 0


def test_stocks_own_arguments_cannot_fail(launches):
    assert [launches.careful("a", 8192) for _ in range(3)] == [0, 0, 0]


def test_the_answer_that_failed_is_known_and_given_up(launches):
    launch(launches, "a", "x")
    assert launches.careful("a", 4096) == 1
    assert launches.has_failed("a", "x")
    assert not launches.has_failed("a", "y")
    launches.give_up("a", "x")
    assert launches.careful("a", 4096) == 2


def test_an_answer_that_failed_may_be_given_again_once_another_has_loaded(launches):
    # with less free memory it failed; what comes to the same later, with the wider margin, is no reason to give up
    launch(launches, "a", "x")
    launch(launches, "a", "y", context=4096)
    launches.loaded("a")
    assert launch(launches, "a", "x") == 1
    assert not launches.has_failed("a", "x")


def test_the_launcher_answers_from_its_first_question_until_a_load_goes_past_it(launches):
    assert not launches.answering
    launches.asked("a", spread=True)
    assert (launches.answering, launches.spread) == (True, True)
    launches.expect("b")
    launches.asked("b", spread=True)
    assert launches.answered("b")
    launches.expect("c")
    assert not launches.answered("c")
    assert not launches.answering
    launches.asked("d", spread=False)
    assert (launches.answering, launches.spread) == (True, False)


def test_a_load_that_the_launcher_has_placed_does_not_go_past_it(launches):
    # shows: a client that bypasses the proxy has started it, and a request comes before Ollama lists the model
    launches.asked("a", spread=True)
    launch(launches, "a")
    launches.expect("a")
    assert launches.answered("a")
    assert launches.answering


def test_a_blob_has_one_name_however_it_is_written():
    digest = "ab" * 32
    assert blob_name(f"sha256:{digest}") == blob_name(f"/models/blobs/sha256-{digest}") == f"sha256-{digest}"


def test_where_a_model_was_placed_is_known_until_the_launcher_asks_again():
    # shows: calibration takes an answer's speed for that placement alone; a launch left to Ollama has none
    launches = Launches(lambda: 0.0)
    plan, candidate = object(), object()
    launches.asked("sha256-a", spread=True)
    launches.place("sha256-a", plan, candidate)
    assert launches.placed("sha256-a") == (plan, candidate)
    assert launches.placed("sha256-b") is None
    launches.asked("sha256-a", spread=True)
    assert launches.placed("sha256-a") is None


def test_a_request_that_ran_out_of_memory_is_worth_another_try_until_stock_has_failed(launches):
    tries = []
    for _ in range(4):
        launch(launches, "a")
        tries.append(launches.failed("a"))
    assert tries == [True, True, False, False]
    assert launch(launches, "a") == 2


def test_a_failure_without_an_answer_of_ours_is_nobodys_plan(launches):
    assert not launches.failed("a")
    launch(launches, "a")
    launches.loaded("a")
    assert not launches.failed("a")
