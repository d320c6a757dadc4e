"""Options of a request: their types, and which of them load a model again."""

from dataclasses import replace

import pytest

from proxy.simulator.options import OptionError, RunnerOptions, keep_alive_seconds, needs_reload, parse_options, runner_options


def reload(loaded, asked, *, loaded_ctx=4096, asked_ctx=4096):
    return needs_reload(RunnerOptions(**loaded), RunnerOptions(**asked), loaded_ctx=loaded_ctx, asked_ctx=asked_ctx)


def test_whole_numbers_may_come_as_floats_and_unknown_options_are_ignored():
    """Recorded: ``num_gpu: 3.0``, ``no_such_option`` and ``tensor_split`` are taken without a word."""
    assert parse_options({"num_gpu": 3.0, "no_such_option": 1, "tensor_split": "70,30"}) == {"num_gpu": 3}


@pytest.mark.parametrize("number", [1e30, -1e30, 2**63])
def test_a_number_that_no_int64_holds_is_the_smallest(number):
    assert parse_options({"num_ctx": number}) == {"num_ctx": -(2**63)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_gpu": "many"}, 'option "num_gpu" must be of type integer'),  # recorded
        ({"num_ctx": True}, 'option "num_ctx" must be of type integer'),
        ({"temperature": "hot"}, 'option "temperature" must be of type float32'),
        ({"use_mmap": 1}, 'option "use_mmap" must be of type boolean'),
        ({"stop": "x"}, 'option "stop" must be of type array'),
        ({"stop": [1]}, 'option "stop" must be of an array of strings'),
    ],
)
def test_wrong_types_are_refused_in_ollamas_words(options, message):
    with pytest.raises(OptionError) as refusal:
        parse_options(options)
    assert str(refusal.value) == message


@pytest.mark.parametrize("name", ["num_batch", "main_gpu", "num_thread", "draft_num_predict"])
def test_each_runner_option_that_differs_loads_again(name):
    assert reload({}, {name: 1})
    assert reload({name: 1}, {name: 2})
    assert not reload({name: 1}, {name: 1})


def test_main_gpu_zero_is_not_the_absent_one_since_0_30_and_is_before():
    """One ``main_gpu: 0`` among requests without it makes a llama-server era Ollama load again and again."""
    assert reload({}, {"main_gpu": 0})
    absent, zero = ({"era": "runner"} for _ in range(2))
    assert runner_options({}, **absent) == runner_options({"main_gpu": 0}, **zero)


def test_an_automatic_num_gpu_matches_anything_and_a_stated_one_does_not():
    assert not reload({"num_gpu": 99}, {"num_gpu": -1})
    assert reload({"num_gpu": -1}, {"num_gpu": 99})


def test_an_automatic_context_matches_itself_and_a_stated_one_of_the_same_size():
    assert not reload({}, {}, loaded_ctx=4096, asked_ctx=32768)  # made smaller after a failed load
    assert not reload({}, {"num_ctx": 4096})
    assert reload({}, {"num_ctx": 8192}, asked_ctx=8192)
    assert reload({"num_ctx": 8192}, {}, loaded_ctx=8192)


def test_equal_options_never_load_again():
    full = RunnerOptions(num_ctx=1, num_batch=2, num_gpu=3, main_gpu=0, use_mmap=True, num_thread=4, draft_num_predict=5)
    assert not needs_reload(full, replace(full), loaded_ctx=1, asked_ctx=1)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, None),
        (0, 0),
        ("0", 0),
        (1.5, 1.5),
        ("5m", 300),
        ("1h30m", 5400),
        ("250ms", 0.25),
        (-1, float("inf")),
        ("-1s", float("inf")),
    ],
)
def test_keep_alive_is_a_number_of_seconds_or_a_duration(value, seconds):
    assert keep_alive_seconds(value) == seconds


@pytest.mark.parametrize("value", ["soon", "5", "", True, []])
def test_other_keep_alives_are_refused(value):
    with pytest.raises(OptionError):
        keep_alive_seconds(value)
