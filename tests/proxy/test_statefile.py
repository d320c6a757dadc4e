"""The state file: what was written last or nothing, whatever happens to file, disk and process."""

from __future__ import annotations

import json
import logging
import os
import signal
import stat
import subprocess
import sys
import time

import pytest

from proxy import statefile
from proxy.statefile import SIZE_LIMIT_BYTES, StateFile


@pytest.fixture
def file(tmp_path):
    return StateFile(tmp_path / "new" / "folder", "state.json")


def leftovers(file):
    return sorted(path.name for path in file.path.parent.iterdir() if path != file.path)


def test_what_was_written_last_is_read(file):
    assert file.read() == {}
    assert file.write({"a": [1, None, "é", "\ud800"]})
    assert file.write({"b": 2})
    assert StateFile(file.path.parent, "state.json").read() == {"b": 2}
    assert leftovers(file) == []


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
def test_only_its_user_reads_it(file):
    file.write({})
    assert (stat.S_IMODE(file.path.stat().st_mode), stat.S_IMODE(file.path.parent.stat().st_mode)) == (0o600, 0o700)


def test_off_keeps_and_reads_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    off = StateFile(None, "state.json")
    assert (off.write({"a": 1}), off.read(), list(tmp_path.iterdir())) == (False, {}, [])


@pytest.mark.parametrize(
    "data",
    [b"", b'{"a": 1', b"[]", b"null", b"\xff\xfe", b"\0" * 512, b"[" * 100_000, b" " * (SIZE_LIMIT_BYTES + 1)],
    ids=["empty", "cut", "list", "null", "no text", "zeros", "nested", "huge"],
)
def test_a_broken_file_is_moved_aside_and_said_and_the_next_write_holds(file, caplog, data):
    file.write({})
    file.path.write_bytes(data)
    assert file.read() == {}
    assert leftovers(file) == ["state.json.corrupt"]
    assert len(caplog.records) == 1
    assert file.write({"a": 1})
    assert file.read() == {"a": 1}


def test_a_full_disk_is_said_once_leaves_the_old_state_and_no_litter(file, caplog, monkeypatch):
    file.write({"a": 1})
    with monkeypatch.context() as full:
        full.setattr(statefile.os, "fsync", _no_space)
        assert [file.write({"a": 2}) for _ in range(3)] == [False] * 3
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "No space left on device" in caplog.text
    assert (file.read(), leftovers(file)) == ({"a": 1}, [])
    assert file.write({"a": 3})
    assert file.read() == {"a": 3}


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")  # noqa: PTH110
def test_a_disk_that_is_really_full(file, caplog, monkeypatch):
    # shows: the error of the kernel, at the write itself
    file.path.parent.mkdir(parents=True)
    monkeypatch.setattr(statefile.tempfile, "mkstemp", lambda **_: (os.open("/dev/full", os.O_WRONLY), str(file.path) + ".tmp"))
    assert file.write({"a": 1}) is False
    assert "No space left on device" in caplog.text


def test_a_folder_that_is_a_file_or_cannot_be_made(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    inside = StateFile(tmp_path / "file", "state.json")
    assert (inside.read(), inside.write({}), inside.write({})) == ({}, False, False)
    assert len(caplog.records) == 1


def test_killed_at_any_moment_it_holds_a_whole_value(tmp_path):
    # shows: SIGKILL in the middle of writes leaves the value before or after one, never a part
    program = (
        "import sys, pathlib; from proxy.statefile import StateFile\n"
        f"file = StateFile(pathlib.Path({str(tmp_path)!r}), 'state.json')\n"
        "n = 0\n"
        "while True:\n"
        "    n += 1; file.write({'n': n, 'same': [n] * 5000})\n"
        "    if n == 1: print('on', flush=True)\n"
    )
    for delay_s in (0.0, 0.003, 0.007, 0.011):
        with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as writer:
            assert writer.stdout.readline()
            time.sleep(delay_s)
            writer.send_signal(signal.SIGKILL)
        value = json.loads((tmp_path / "state.json").read_bytes())
        assert value["same"] == [value["n"]] * 5000


def _no_space(_):
    raise OSError(28, "No space left on device")
