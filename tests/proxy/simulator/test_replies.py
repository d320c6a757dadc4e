"""What a model without a mind says."""

import math

import pytest

from proxy.simulator.replies import DEFAULT_PIECES, Prompt, Reply, cut, embedding, example, speak
from tests.proxy import recordings

TOOLS = tuple({"type": "function", "function": {"name": name}} for name in ("get_weather", "add_two_numbers"))


@pytest.mark.parametrize(
    ("exchange", "prompt"),
    [("generate-nostream", "Why is the sky blue?"), ("generate-format", "A colour as JSON"), ("chat-nostream", "Hi")],
)
def test_prompts_count_for_as_many_tokens_as_recorded(exchange, prompt):
    text = recordings.exchange("0.32.15", exchange).answer.body.decode()
    assert f'"prompt_eval_count":{Prompt(text=prompt).tokens},' in text


def test_an_answer_ends_by_itself_or_where_it_is_cut():
    """The end token is counted, as Ollama counts it."""
    reply = Reply(pieces=("a", "b", "c"))
    assert (cut(reply, 2).text, cut(reply, 2).reason, cut(reply, 2).count) == ("ab", "length", 2)
    for limit in (None, -1, 9):
        assert (cut(reply, limit).text, cut(reply, limit).reason, cut(reply, limit).count) == ("abc", "stop", 4)


def test_the_usual_answer_says_that_it_is_simulated():
    assert "simulated" in "".join(DEFAULT_PIECES)
    assert speak(Prompt(text="Why?")).pieces == DEFAULT_PIECES


@pytest.mark.parametrize(
    ("text", "name"),
    [("What is the WEATHER?", "get_weather"), ("Add 1 and 2", "add_two_numbers"), ("two numbers", "add_two_numbers")],
)
def test_the_tool_that_is_mentioned_is_called(text, name):
    assert speak(Prompt(text=text, tools=TOOLS)).calls == ((name, {}),)


def test_no_tool_is_called_unasked_or_twice():
    assert not speak(Prompt(text="Hello, get me the rest", tools=TOOLS)).calls
    assert not speak(Prompt(text="the weather", tools=TOOLS, answers_tool=True)).calls


def test_json_is_of_the_wanted_shape():
    schema = {
        "type": "object",
        "properties": {
            "kind": {"const": "x"},
            "size": {"anyOf": [{"type": "number"}, {"type": "null"}]},
            "tags": {"type": ["array", "null"]},
            "left_out": {"type": "string"},
            "on": {"type": "boolean"},
        },
        "required": ["kind", "size", "tags", "on"],
    }
    assert example(schema) == {"kind": "x", "size": 0, "tags": [], "on": True}
    assert "".join(speak(Prompt(text="?", format="json")).pieces) == "{}"


def test_vectors_are_the_same_each_time_and_of_unit_length_where_wanted():
    assert embedding("a", 8, normalized=True) == embedding("a", 8, normalized=True) != embedding("b", 8, normalized=True)
    assert math.hypot(*embedding("a", 64, normalized=True)) == pytest.approx(1, abs=1e-5)
