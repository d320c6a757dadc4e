"""Rules: which model a pattern means, what several of them add up to, and what is refused, with its line."""

from __future__ import annotations

import re
import tomllib
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.units import GIB
from proxy.config.rules import Rule, Rules, find_gpus, matches, parse_rules
from proxy.config.tomlfile import line_of
from proxy.errors import SettingsError
from proxy.plans.room import said_by
from tests.proxy.planners import gpu

FILE = Path("lopsided.toml")


def parse(text: str) -> Rules:
    return parse_rules(tomllib.loads(text), text, FILE)


@pytest.mark.parametrize(
    ("pattern", "model", "meant"),
    [
        ("qwen3*", "qwen3:0.6b", True),
        ("qwen3", "qwen3:0.6b", False),
        ("qwen3", "qwen3", True),
        ("qwen3", "Qwen3:Latest", True),
        ("qwen3:latest", "qwen3", True),
        ("QWEN3:*", "qwen3:32b", True),
        ("*-embed-*", "nomic-embed-text", True),
        ("hf.co/*", "hf.co/me/model:Q4_K_M", True),
        ("me/*", "me/model", True),
        ("model", "me/model", False),
        ("registry.ollama.ai/library/qwen3*", "qwen3:8b", True),
        ("library/qwen3", "QWEN3", True),
        ("qwen3", "registry.ollama.ai/library/qwen3:latest", True),
        ("phi[34]:*", "phi4:14b", True),
    ],
)
def test_a_pattern_is_a_name_as_ollama_lists_it(pattern, model, meant):
    assert matches(pattern, model) is meant


def test_sections_add_up_from_top_to_bottom():
    # shows: of what two sections say the later counts; reserves of several GPUs are kept side by side
    rules = parse(
        """
        reserve = { "RTX 5090" = "1GiB" }
        [models."*"]
        context = "fit"
        boost = 1.5
        [models."qwen3*"]
        boost = "auto"
        gpu = "RTX 3090"
        reserve = { "RTX 3090" = "2 GiB" }
        [models."qwen3:0.6b"]
        off = true
        """
    )
    assert rules.for_model("phi4") == Rule(reserve=(("RTX 5090", GIB),), context="fit", boost=1.5)
    reserve = (("RTX 5090", GIB), ("RTX 3090", 2 * GIB))
    assert rules.for_model("qwen3:32b") == Rule(reserve=reserve, context="fit", boost="auto", gpu="RTX 3090")
    assert rules.for_model("qwen3:0.6b").off is True


def test_priority_and_groups_are_by_name():
    rules = parse('priority = ["chat", "qwen3*"]\nkeep_together = [["chat", "embed"], ["a", "b"]]')
    assert [rules.rank(name) for name in ("chat:latest", "qwen3:8b", "other")] == [0, 1, 2]
    assert rules.together_with("embed") == ("chat", "embed")
    assert rules.together_with("other") == ()
    assert parse('keep_together = ["chat", "embed"]').keep_together == (("chat", "embed"),)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('\n[models.a]\ngppu = "x"', "lopsided.toml:3: there is no rule 'gppu'; did you mean 'gpu'?"),
        ('[models.a]\npriority = ["a"]', "lopsided.toml:2: there is no rule 'priority'; it stands at the top"),
        ("[models.a]\nzzz = 1", "lopsided.toml:2: there is no rule 'zzz'; there are gpu, reserve"),
        ('[models.a.reserve]\nx = "' + "9" * 400 + 'GiB"', "lopsided.toml:2: x: '9999"),
        ("[models.a]\ngpu = 0", "lopsided.toml:2: gpu = 0: the UUID or the name"),
        ("[models.a]\n\n# x\nboost = 2.5", "lopsided.toml:4: boost = 2.5: "),
        ("[models.a]\nboost = true", "lopsided.toml:2: boost = True: "),
        ('[models.a]\ncontext = "big"', "lopsided.toml:2: context = 'big': "),
        ("[models.a]\ncontext = 0", "lopsided.toml:2: context = 0: "),
        ('[models.a]\noff = "yes"', "lopsided.toml:2: off = 'yes': true or false"),
        ('[models.a]\nreserve = "4GiB"', "lopsided.toml:2: reserve = '4GiB': bytes by GPU"),
        ('[models.a.reserve]\nx = "1GiB"\ny = 4', "lopsided.toml:3: y: '4' is no size"),
        ("models = 3", "lopsided.toml:1: models are sections"),
        ('[models]\nqwen3 = "x"', "lopsided.toml:2: 'qwen3' is no section"),
        ('priority = "a"', "lopsided.toml:1: priority = 'a': names of models"),
        ('a = 1\nkeep_together = [\n  "chat",\n  "em*",\n]', "lopsided.toml:2: keep_together: 'em*' is a pattern"),
        ("keep_together = [" + "'a'," * 9 + "]", "lopsided.toml:1: keep_together: at most 8"),
    ],
)
def test_a_wrong_rule_is_refused_with_its_line(text, message):
    with pytest.raises(SettingsError) as refused:
        parse(text)
    assert str(refused.value).startswith(message)


def test_a_gpu_is_named_by_uuid_its_beginning_or_words_of_its_name():
    gpus = [gpu("NVIDIA GeForce RTX 3090 Ti", 24), gpu("NVIDIA GeForce RTX 3090", 24), gpu("NVIDIA GeForce RTX 5090", 32)]
    assert [find_gpus(gpus, name) for name in ("RTX 3090", "rtx 3090 ti", "5090", "4090")] == [(1,), (0,), (2,), ()]
    assert find_gpus(gpus, gpus[2].uuid) == (2,)
    assert find_gpus([gpus[1], gpus[2], gpus[1]], "RTX 3090") == (0, 2)


KEYS = st.from_regex(r"[a-z]{1,6}", fullmatch=True)
VALUES = st.sampled_from(["1", '"x # y"', "[\n  1,\n\n  2, # three\n]", '"""\na = 1\n[b]\n"""', "{ c = 1 }", "[[1], [\n2]]"])
BLANKS = st.sampled_from(["", "\n", "# note\n", "\n# a = 1\n\n"])


@given(st.lists(st.tuples(BLANKS, KEYS, VALUES), min_size=1, max_size=8, unique_by=lambda row: row[1]), st.booleans())
def test_the_line_is_where_the_value_begins(rows, in_a_section):
    # shows: whatever comments, blanks, texts and lists of several lines stand before it
    text, lines = "[models.chat]\n" if in_a_section else "", {}
    for blank, key, value in rows:
        text += blank
        lines[key] = text.count("\n") + 1
        text += f"{key} = {value}\n"
    tomllib.loads(text)
    outer = ("models", "chat") if in_a_section else ()
    for key, line in lines.items():
        assert line_of(text, (*outer, key)) == line


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(["models", "reserve", "priority", "keep_together"]), JUNK))
def test_whatever_stands_there_is_understood_or_refused(content):
    # shows: nothing but SettingsError comes out
    with suppress(SettingsError):
        parse_rules(content, "", FILE)


def test_the_examples_of_the_page_are_valid():
    page = (Path(__file__).parents[3] / "docs" / "rules.md").read_text()
    examples = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    assert len(examples) == 2
    assert all(parse(example).models for example in examples)


def test_the_pages_line_of_reasons_and_its_message_are_what_is_said():
    page = (Path(__file__).parents[3] / "docs" / "rules.md").read_text()
    rules = parse('reserve = { "RTX 5090" = "2GiB" }\n[models."*"]\ncontext = "fit"\n[models."qwen3*"]\ngpu = "RTX 3090"')
    assert f"```\n{said_by(rules.for_model('qwen3:8b'))}\n```" in page
    with pytest.raises(SettingsError) as refused:
        parse("\n" * 5 + '[models."qwen3*"]\ngppu = "RTX 3090"')
    assert f"```\nError: {str(refused.value).partition('; there are')[0]}\n```" in page
