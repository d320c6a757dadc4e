"""Counters at the end of an answer: on the recorded answers of both eras, cut anywhere, and beside look-alikes."""

import json

import pytest

from proxy.ollama.answers import TAIL_BYTES, Tail
from tests.proxy.recordings import VERSIONS, load

ANSWERS = [exchange for version in VERSIONS for exchange in load(version) if b'"eval_count":' in exchange.answer.body]


def counted(body, size):
    tail = Tail()
    for start in range(0, len(body), size):
        tail.feed(body[start : start + size])
    return tail.counters()


@pytest.mark.parametrize("size", [1, 7, 1000, 10**6])
@pytest.mark.parametrize("exchange", ANSWERS, ids=str)
def test_the_counters_of_recorded_answers_are_found_however_they_are_cut(exchange, size):
    # shows: generate and chat, streamed and whole, of both eras
    last = json.loads(exchange.answer.body.strip().splitlines()[-1])
    found = counted(exchange.answer.body, size)
    if not last.get("eval_count"):
        assert found is None
        return
    assert (found.eval_tokens, found.prompt_tokens) == (last["eval_count"], last["prompt_eval_count"])
    assert found.eval_s == last["eval_duration"] / 1e9
    assert found.prompt_s == last["prompt_eval_duration"] / 1e9
    assert found.load_s == last["load_duration"] / 1e9


def test_an_answer_broken_off_has_no_counters():
    body = ANSWERS[0].answer.body.rstrip()
    assert counted(body, 50) is not None
    for missing in range(1, 40):
        assert counted(body[:-missing], 50) is None


def test_a_long_context_before_the_counters_costs_nothing_and_hides_nothing():
    # shows: /api/generate puts the tokens of the whole conversation before the counters
    numbers = b",".join(b"%d" % number for number in range(100_000))
    body = b'{"done":true,"context":[' + numbers + b'],"eval_count":7,"eval_duration":1000}\n'
    tail = Tail()
    for start in range(0, len(body), 65536):
        tail.feed(body[start : start + 65536])
        assert len(tail._kept) <= TAIL_BYTES
    assert (tail.counters().eval_tokens, tail.counters().eval_s) == (7, 1e-6)


def test_a_model_that_writes_counters_counts_nothing():
    # shows: in a string of JSON the quotes are escaped
    said = json.dumps({"response": ',"eval_count":5,"eval_duration":1}', "done": True}, separators=(",", ":"))
    assert counted(said.encode(), 10**6) is None


@pytest.mark.parametrize("body", [b"", b"\n", b"}", b'{"error":"x"}', b'{"eval_count":0,"eval_duration":0}', b"\xff" * 5000])
def test_what_is_no_answer_has_no_counters(body):
    assert counted(body, 100) is None
