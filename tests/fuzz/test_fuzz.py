"""The seeds of the fuzzer, those that once broke something among them, and a moment of mutation each time."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz.__main__ import SEEDS, mutated
from tests.fuzz.targets import TARGETS

FILES = sorted(SEEDS.glob("*/*"))


def test_every_target_has_seeds():
    assert {path.parent.name for path in FILES} == set(TARGETS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_seed_is_understood_or_refused(path):
    TARGETS[path.parent.name](path.read_bytes())


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_seeds_with_bytes_changed_are_understood_or_refused(name):
    pool = [path.read_bytes() for path in FILES if path.parent.name == name]
    chance = random.Random(name)
    for _ in range(300):
        TARGETS[name](mutated(chance, pool))


@pytest.mark.parametrize("name", ["json", "launch", "show"])
@given(st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_bytes_are_understood_or_refused(name, data):
    TARGETS[name](data)
