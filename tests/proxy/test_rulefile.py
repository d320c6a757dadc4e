"""The file of rules while lopsided runs: a change is seen, a broken one changes nothing and is said once."""

from __future__ import annotations

import logging

import pytest

from proxy.errors import SettingsError
from proxy.rulefile import RuleFile
from proxy.tomlfile import SIZE_LIMIT_BYTES


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def write(path, text):
    path.write_text(text)


def test_a_change_is_in_force_a_second_later(tmp_path, clock):
    path = tmp_path / "lopsided.toml"
    rules = RuleFile(path, clock=clock)
    assert rules.for_model("a").gpu is None
    write(path, '[models.a]\ngpu = "RTX 3090"\n')
    assert rules.for_model("a").gpu is None  # it looks at the file once a second
    clock.now += 1
    assert rules.for_model("a").gpu == "RTX 3090"
    path.unlink()
    clock.now += 1
    assert rules.for_model("a").gpu is None


def test_a_broken_file_leaves_the_rules_of_before_and_is_said_once(tmp_path, clock, caplog):
    path = tmp_path / "lopsided.toml"
    write(path, "[models.a]\noff = true\n")
    rules = RuleFile(path, clock=clock)
    write(path, "[models.a]\noff = 7\nand more\n")
    with caplog.at_level(logging.WARNING):
        for _ in range(5):
            clock.now += 1
            assert rules.for_model("a").off is True
    assert len(caplog.records) == 1
    assert rules.problem
    write(path, "[models.a]\noff = false\n")
    clock.now += 1
    assert (rules.for_model("a").off, rules.problem) == (False, None)


@pytest.mark.parametrize("content", [b"[models.a]\n\xff", b"models = 1", b"a = [", b"# " + b"x" * SIZE_LIMIT_BYTES])
def test_a_file_that_is_broken_at_the_start_is_refused(tmp_path, content):
    path = tmp_path / "lopsided.toml"
    path.write_bytes(content)
    with pytest.raises(SettingsError, match=r"lopsided\.toml"):
        RuleFile(path)


def test_no_file_is_no_rules():
    assert not RuleFile(None).current().by_name
