"""The file of rules while lopsided runs: a change is seen, a broken one changes nothing and is said once."""

from __future__ import annotations

import logging
import os

import pytest

from proxy.config.rulefile import RuleFile
from proxy.config.tomlfile import SIZE_LIMIT_BYTES
from proxy.errors import SettingsError


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


@pytest.mark.parametrize("step", [lambda path: path.unlink(), lambda path: path.write_text("")])
def test_a_file_that_is_gone_or_empty_counts_from_the_second_look_on(tmp_path, clock, step):
    # shows: an editor that removes or empties a file before it writes the new one costs no model its rule
    path = tmp_path / "lopsided.toml"
    write(path, '[models.a]\ngpu = "RTX 3090"\n')
    rules = RuleFile(path, clock=clock)
    step(path)
    clock.now += 1
    assert rules.for_model("a").gpu == "RTX 3090"
    write(path, '[models.a]\ngpu = "RTX 4090"\n')
    clock.now += 1
    assert rules.for_model("a").gpu == "RTX 4090"
    step(path)
    for gpu in ("RTX 4090", None, None):
        clock.now += 1
        assert rules.for_model("a").gpu == gpu


def test_a_key_that_is_neither_rule_nor_setting_is_refused_at_a_change_too(tmp_path, clock):
    path = tmp_path / "lopsided.toml"
    rules = RuleFile(path, settings={"boost"}, clock=clock)
    write(path, 'boost = 1.5\nprioritty = ["a"]\n')
    clock.now += 1
    rules.current()
    assert rules.problem == f"{path}:2: there is no rule or setting 'prioritty'; did you mean 'priority'?"


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


def test_a_folder_or_a_pipe_in_its_place_is_refused_and_read_by_nobody(tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("folder", "pipe"):
        with pytest.raises(SettingsError, match=name):
            RuleFile(tmp_path / name)


def test_no_file_is_no_rules():
    assert not RuleFile(None).current().by_name
