"""Putting the launcher in place, and taking it out, in a folder like Ollama's: the original is never lost."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import threading
import tomllib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from click.testing import CliRunner

from planner.hardware import Gpu
from proxy.errors import LauncherError
from proxy.launcher import command as launcher
from proxy.launcher import installation
from proxy.launcher.command import (
    hidden_cards_problem,
    launcher_commands,
    missing_variables,
    ollama_environment,
    ollama_process,
    ollama_user,
)
from proxy.launcher.installation import (
    BEFORE,
    CACHE,
    CONFIG,
    NAME,
    STOCK,
    find_library,
    inspect,
    install,
    remove,
    shipped_launcher,
)

URL = "http://127.0.0.1:11435"
ENTRYPOINT = Path(__file__).parents[1].parent.parent / "docker" / "entrypoint"


def real(text: str = "version: 1") -> bytes:
    """A llama-server of Ollama's: prints its version and what it was started with."""
    return f'#!/bin/sh\n# an executable\necho "{text} $*"\n'.encode()


def put(path: Path, content: bytes) -> None:
    path.unlink(missing_ok=True)
    path.write_bytes(content)
    path.chmod(0o755)


@pytest.fixture
def library(tmp_path) -> Path:
    folder = tmp_path / "lib" / "ollama"
    folder.mkdir(parents=True)
    put(folder / NAME, real())
    return folder


def names(library: Path) -> set[str]:
    return {path.name for path in library.iterdir()}


def version(library: Path) -> str:
    """What Ollama gets when it starts the file in llama-server's place."""
    return subprocess.run([library / NAME, "--version"], capture_output=True, text=True, check=True, timeout=10).stdout


def test_installed_the_launcher_stands_in_place_and_the_original_beside_it(library):
    done = install(library, url=URL, token="s3cret")
    assert (done.state, done.current, done.url) == ("installed", True, URL)
    assert names(library) == {NAME, STOCK, CONFIG, CACHE}
    assert (library / NAME).read_bytes() == shipped_launcher().read_bytes()
    assert (library / STOCK).read_bytes() == real()
    assert version(library) == "version: 1 --version\n"


def test_the_wheel_carries_the_script_where_it_is_looked_for():
    project = tomllib.loads((ENTRYPOINT.parent.parent / "pyproject.toml").read_text())
    included = project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    assert included == {f"docker/{NAME}": f"proxy/data/{NAME}"}
    assert shipped_launcher().name == NAME
    assert os.access(shipped_launcher(), os.X_OK)


def test_url_and_token_are_for_ollamas_user_alone(library):
    install(library, url=URL, token="s3cret")
    assert (library / CONFIG).read_text() == f"LOPSIDED_URL={URL}\nLOPSIDED_TOKEN=s3cret\n"
    assert stat.S_IMODE((library / CONFIG).stat().st_mode) == 0o600
    assert stat.S_IMODE((library / CACHE).stat().st_mode) == 0o700


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_root_gives_them_to_ollamas_user(library):
    install(library, url=URL, token=None, user="nobody")
    assert (library / CONFIG).owner() == (library / CACHE).owner() == "nobody"
    with pytest.raises(LauncherError, match="no user nosuchuser"):
        install(library, url=URL, token=None, user="nosuchuser")


def test_what_is_renamed_is_on_the_disk_before(library, monkeypatch):
    # or a power cut could leave an empty llama-server
    events = []
    sync, rename = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (events.append(str(Path(f"/proc/self/fd/{file}").readlink())), sync(file)))
    monkeypatch.setattr(os, "replace", lambda one, other: (events.append(f"{one} renamed"), rename(one, other)))
    install(library, url=URL, token=None)
    for name in (CONFIG, NAME):
        new = str(library / f"{name}.new")
        assert new in events[: events.index(f"{new} renamed")]


def test_removed_the_folder_is_as_it_was(library):
    before = (library / NAME).stat()
    install(library, url=URL, token=None)
    (library / CACHE / "sha256-1").write_text("0\t\t\n")
    assert remove(library).state == "absent"
    assert names(library) == {NAME}
    assert (library / NAME).stat().st_ino == before.st_ino
    assert (library / NAME).read_bytes() == real()
    assert list(library.parent.iterdir()) == [library]


def test_both_can_be_done_again(library):
    first = install(library, url=URL, token=None)
    assert install(library, url=URL, token=None) == first
    assert (library / STOCK).read_bytes() == real()
    assert remove(library) == remove(library)
    assert version(library) == "version: 1 --version\n"


def test_an_older_launcher_is_brought_up_to_date(library):
    install(library, url=URL, token=None)
    (library / NAME).write_bytes(shipped_launcher().read_bytes() + b"# older\n")
    assert inspect(library).current is False
    done = install(library, url="http://[::1]:1", token=None)
    assert (done.current, done.url) == (True, "http://[::1]:1")


def test_an_update_of_ollama_is_noticed_and_its_llama_server_kept(library):
    install(library, url=URL, token=None)
    put(library / NAME, real("version: 2"))
    assert inspect(library).state == "replaced"
    install(library, url=URL, token=None)
    assert version(library) == "version: 2 --version\n"
    assert (library / STOCK).read_bytes() == real("version: 2")


@pytest.mark.parametrize("action", ["install", "remove"])
def test_an_update_that_made_the_folder_anew_is_noticed_too(library, action):
    # Ollama's own installer deletes its library first, and with it everything that was beside llama-server
    install(library, url=URL, token=None)
    shutil.rmtree(library)
    library.mkdir()
    put(library / NAME, real("version: 2"))
    assert inspect(library).state == "replaced"
    if action == "install":
        assert install(library, url=URL, token=None).state == "installed"
        assert version(library) == "version: 2 --version\n"
    assert remove(library).state == "absent"
    assert (names(library), version(library)) == ({NAME}, "version: 2 --version\n")


def test_a_folder_whose_parent_may_not_be_written_is_fine(library, monkeypatch):
    def refuse(*arguments, **keywords):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "write_text", refuse)
    assert install(library, url=URL, token=None).state == "installed"
    assert remove(library).state == "absent"


def test_removing_after_an_update_keeps_the_newer_one(library):
    install(library, url=URL, token=None)
    put(library / NAME, real("version: 2"))
    remove(library)
    assert names(library) == {NAME}
    assert version(library) == "version: 2 --version\n"


@pytest.mark.parametrize("action", ["install", "remove"])
def test_from_a_folder_with_the_renamed_original_alone_both_go_on(library, action):
    (library / NAME).rename(library / STOCK)
    assert inspect(library).state == "interrupted"
    if action == "install":
        install(library, url=URL, token=None)
    else:
        remove(library)
    assert version(library) == "version: 1 --version\n"


FILE_CALLS = ("link", "replace", "unlink", "chmod", "mkdir", "open")


@pytest.mark.parametrize("update", [False, True], ids=["first", "after an update"])
@pytest.mark.parametrize("stop_after", range(13))
def test_interrupted_anywhere_there_is_a_llama_server_and_installing_again_works(library, monkeypatch, stop_after, update):
    """The process ends before its n-th change to the folder."""
    current = "version: 1"
    if update:
        install(library, url=URL, token=None)
        current = "version: 2"
        put(library / NAME, real(current))
    calls = 0

    class Killed(BaseException):
        pass

    def dying(call):
        def wrapped(*arguments, **keywords):
            nonlocal calls
            if str(library) in str(arguments):
                calls += 1
                if calls > stop_after:
                    raise Killed
            return call(*arguments, **keywords)

        return wrapped

    with monkeypatch.context() as patch:
        for name in FILE_CALLS:
            patch.setattr(os, name, dying(getattr(os, name)))
        try:
            install(library, url=URL, token=None)
        except Killed:
            pass
        else:
            assert stop_after >= 5, "nothing was interrupted"
    assert version(library) == f"{current} --version\n"
    install(library, url=URL, token=None)
    assert version(library) == f"{current} --version\n"
    assert names(library) == {NAME, STOCK, CONFIG, CACHE}
    for leftover in (f"{NAME}.new", f"{STOCK}.new", f"{CONFIG}.new", BEFORE):
        put(library / leftover, b"")
    remove(library)
    assert names(library) == {NAME}
    assert (library / NAME).read_bytes() == real(current)


@pytest.mark.parametrize("before", ["absent", "installed", "replaced", "interrupted"])
def test_an_update_of_ollama_while_the_launcher_is_tried_keeps_its_llama_server(library, monkeypatch, before):
    """The newer one would be overwritten, and an older one started with newer libraries from then on."""
    if before != "absent":
        install(library, url=URL, token=None)
    if before == "replaced":
        put(library / NAME, real("version: 2"))
    if before == "interrupted":
        (library / NAME).unlink()
    assert inspect(library).state == before
    newest = real("version: 3")

    def updated(*arguments):
        put(library / "update", newest)
        (library / "update").replace(library / NAME)

    with monkeypatch.context() as patch:
        patch.setattr(installation, "_try", updated)
        with pytest.raises(LauncherError, match="has changed meanwhile"):
            install(library, url=URL, token=None)
    assert (library / NAME).read_bytes() == newest
    assert inspect(library).state == ("absent" if before == "absent" else "replaced")
    install(library, url=URL, token=None)
    assert (library / STOCK).read_bytes() == newest


def test_commands_at_the_same_time_never_lose_the_original(library):
    add = partial(install, url=URL, token=None)
    for actions in ([add] * 4, [add, remove] * 2):
        with ThreadPoolExecutor(4) as pool:
            for _ in range(5):
                for run in [pool.submit(act, library) for act in actions]:
                    assert run.result().state in ("installed", "absent")
                assert version(library) == "version: 1 --version\n"
        install(library, url=URL, token=None)
        assert (library / STOCK).read_bytes() == real()


def test_a_command_waits_for_the_one_before(library, monkeypatch):
    # the second looks at the folder only once the first is through, so it never needs the launcher for the original
    ends, inspected = [], threading.Event()
    look = installation.inspect

    def noted(folder):
        inspected.set()
        return look(folder)

    monkeypatch.setattr(installation, "inspect", noted)
    with installation._locked(library):
        second = threading.Thread(target=lambda: ends.append(install(library, url=URL, token=None)))
        second.start()
        assert not inspected.wait(0.3)
    second.join(timeout=20)
    assert [end.state for end in ends] == ["installed"]


def test_the_launcher_never_becomes_the_original(library, monkeypatch):
    install(library, url=URL, token=None)
    found = inspect(library)
    monkeypatch.setattr(installation, "inspect", lambda _: replace(found, state="absent"))  # as a look too early would have it
    with pytest.raises(LauncherError, match="is the launcher"):
        install(library, url=URL, token=None)
    assert version(library) == "version: 1 --version\n"


BROKEN = {"empty": b"", "cut off": b"\x7fELF\x02\x01\x01" + bytes(60), "failing": b"#!/bin/sh\necho broken >&2; exit 3\n"}
"""What an update of Ollama leaves behind that was cut off, or whose libraries are missing."""


@pytest.mark.parametrize("action", ["install", "remove"])
@pytest.mark.parametrize("left", BROKEN)
def test_what_a_broken_update_has_left_takes_nobodys_place(library, left, action):
    install(library, url=URL, token=None)
    put(library / NAME, BROKEN[left])
    before = {path.name: path.read_bytes() for path in library.iterdir() if path.is_file()}
    with pytest.raises(LauncherError, match="nothing was changed"):
        install(library, url=URL, token=None) if action == "install" else remove(library)
    assert {path.name: path.read_bytes() for path in library.iterdir() if path.is_file()} == before
    assert before[STOCK] == real()


def test_the_original_before_an_update_stays_until_the_launcher_has_been_tried(library, monkeypatch, tmp_path):
    install(library, url=URL, token=None)
    put(library / NAME, real("version: 2"))
    broken = tmp_path / "broken"
    broken.write_bytes(b"#!/bin/bash -p\n# lopsided's launcher\necho no good >&2; exit 3\n")
    with monkeypatch.context() as patch:
        patch.setattr(installation, "shipped_launcher", lambda: broken)
        with pytest.raises(LauncherError, match="no good"):
            install(library, url=URL, token=None)
    assert ((library / NAME).read_bytes(), (library / STOCK).read_bytes()) == (real("version: 2"), real())
    assert names(library) == {NAME, STOCK, CONFIG, CACHE}


def test_a_file_system_without_links_gets_a_copy(library, monkeypatch):
    def refuse(*arguments, **keywords):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    install(library, url=URL, token=None)
    assert version(library) == "version: 1 --version\n"


def test_a_linked_llama_server_stays_a_link(library, tmp_path):
    put(tmp_path / "engine", real("version: 3"))
    (library / NAME).unlink()
    (library / NAME).symlink_to("../../engine")
    install(library, url=URL, token=None)
    assert (library / STOCK).is_symlink()
    assert version(library) == "version: 3 --version\n"
    remove(library)
    assert (library / NAME).is_symlink()


# Refusals


def refused(library: Path, match: str, **keywords) -> None:
    before = {path.name: path.read_bytes() for path in library.iterdir()}
    with pytest.raises(LauncherError, match=match):
        install(library, **{"url": URL, "token": None, **keywords})
    assert {path.name: path.read_bytes() for path in library.iterdir() if path.is_file()} == before


def test_an_ollama_without_llama_server_is_refused(library):
    (library / NAME).unlink()
    refused(library, r"before 0\.30")


def test_a_launcher_without_its_original_is_refused(library):
    put(library / NAME, shipped_launcher().read_bytes())
    refused(library, "install Ollama again")
    with pytest.raises(LauncherError, match="install Ollama again"):
        remove(library)


def test_a_copy_of_the_launcher_is_no_original(library):
    put(library / NAME, shipped_launcher().read_bytes())
    put(library / STOCK, shipped_launcher().read_bytes())
    assert inspect(library).state == "lost"


def test_another_machine_takes_a_token(library):
    refused(library, "LOPSIDED_TOKEN", url="http://10.0.0.7:11435")
    assert install(library, url="http://10.0.0.7:11435", token="s3cret").state == "installed"


@pytest.mark.parametrize("platform", ["win32", "darwin"])
def test_other_systems_are_refused(library, monkeypatch, platform):
    monkeypatch.setattr(sys, "platform", platform)
    refused(library, "for Linux")


def test_a_folder_that_may_not_be_written_is_refused(library, monkeypatch):
    def refuse(*arguments, **keywords):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(shutil, "copy2", refuse)
    refused(library, "sudo")


def run_by(bash: Path, to: Path) -> Path:
    """A copy, in ``to``, of the launcher with ``bash`` in its first line."""
    to.write_bytes(shipped_launcher().read_bytes().replace(b"#!/bin/bash ", b"#!" + os.fsencode(bash) + b" ", 1))
    to.chmod(0o755)
    return to


def test_without_bash_it_is_refused(library, monkeypatch, tmp_path):
    script = run_by(tmp_path / "bash", tmp_path / "script")
    monkeypatch.setattr(installation, "shipped_launcher", lambda: script)
    refused(library, f"needs {tmp_path / 'bash'}, and there is none")


def test_with_an_old_bash_it_is_refused(library, monkeypatch, tmp_path):
    put(tmp_path / "bash", b"#!/bin/sh\necho\n")
    script = run_by(tmp_path / "bash", tmp_path / "script")
    monkeypatch.setattr(installation, "shipped_launcher", lambda: script)
    refused(library, "bash 5")


def test_a_launcher_that_does_not_start_the_original_is_refused(library, monkeypatch, tmp_path):
    broken = tmp_path / "broken"
    broken.write_bytes(b"#!/bin/bash -p\n# lopsided's launcher\necho no good >&2; exit 3\n")
    monkeypatch.setattr(installation, "shipped_launcher", lambda: broken)
    refused(library, "no good")


# Finding the folder


def test_the_folder_is_found_beside_the_command_or_in_the_usual_places(library, tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    put(tmp_path / "bin" / "ollama", b"#!/bin/sh\n")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert find_library(places=()) == library
    other = tmp_path / "other"
    other.mkdir()
    put(other / NAME, real())
    (library / NAME).unlink()
    assert find_library(places=("/no/such", str(other))) == other
    assert find_library(other) == other


def test_where_there_is_none_the_way_out_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LauncherError, match="--lib"):
        find_library(places=("/no/such",))
    with pytest.raises(LauncherError, match="--lib"):
        find_library(tmp_path / "missing")


# Ollama's environment


def test_the_running_ollamas_environment_is_read(tmp_path):
    for pid, command, environment in (
        ("7", "/usr/bin/python\0serve\0", "A=1\0"),
        ("8", "/usr/local/bin/ollama\0run\0m\0", "A=2\0"),
        ("9", "/usr/local/bin/ollama\0serve\0", "A=3\0B=x=y\0\0"),
    ):
        (tmp_path / pid).mkdir()
        (tmp_path / pid / "cmdline").write_text(command)
        (tmp_path / pid / "environ").write_text(environment)
    process = ollama_process(tmp_path, tmp_path)
    assert ollama_environment(process) == {"A": "3", "B": "x=y"}
    assert ollama_user(process, tmp_path) is None  # it may be another's, in a container for one
    (tmp_path / "9" / "environ").unlink()
    assert ollama_environment(process) is None
    (tmp_path / "9" / "cmdline").unlink()
    assert ollama_process(tmp_path, tmp_path) is None
    assert (ollama_environment(None), ollama_user(None, tmp_path)) == (None, None)


def test_what_is_for_ollamas_user_goes_to_whom_it_runs_as(library, run, monkeypatch):
    given = []
    monkeypatch.setattr(launcher, "ollama_user", lambda process, library: "alice")
    monkeypatch.setattr(launcher, "install", lambda *_, user, **__: given.append(user) or inspect(library))
    run("install", "--lib", str(library))
    run("install", "--lib", str(library), "--user", "bob")
    assert given == ["alice", "bob"]


def test_of_several_ollamas_the_one_with_this_library_is_meant(tmp_path):
    for number, name in enumerate(("one", "other")):
        (tmp_path / name / "lib" / "ollama").mkdir(parents=True)
        (tmp_path / name / "bin").mkdir()
        put(tmp_path / name / "bin" / "ollama", b"")
        process = tmp_path / "processes" / str(number)
        process.mkdir(parents=True)
        (process / "cmdline").write_text("ollama\0serve\0")
        (process / "exe").symlink_to(tmp_path / name / "bin" / "ollama")
    for name in ("one", "other"):
        folder = tmp_path / name / "lib" / "ollama"
        found = ollama_process(folder, tmp_path / "processes")
        assert found is not None
        assert ollama_user(found, folder) == folder.owner()
        assert (found / "exe").resolve().parent.parent.name == name
    third = tmp_path / "third"
    third.mkdir()
    assert ollama_process(third, tmp_path / "processes") is None


def card(uuid: str, pci_id: str, sms: int) -> Gpu:
    return Gpu(uuid=uuid, name=uuid, total_bytes=1, free_bytes=0, pci_id=pci_id, sm_count=sms, clock_mhz=1)


FAST_SECOND = (card("GPU-slow", "01", 82), card("GPU-fast", "02", 170))
FAST_FIRST = (card("GPU-fast", "01", 170), card("GPU-slow", "02", 82))


@pytest.mark.parametrize(
    ("environment", "gpus", "problem"),
    [
        ({}, FAST_SECOND, False),
        ({"CUDA_VISIBLE_DEVICES": ""}, FAST_SECOND, False),
        ({"CUDA_VISIBLE_DEVICES": "0"}, FAST_SECOND, True),
        ({"CUDA_VISIBLE_DEVICES": " 1 "}, FAST_SECOND, True),
        ({"CUDA_VISIBLE_DEVICES": "1,0"}, FAST_SECOND, False),
        ({"CUDA_VISIBLE_DEVICES": "0"}, FAST_FIRST, False),
        ({"CUDA_VISIBLE_DEVICES": "GPU-slow"}, FAST_SECOND, False),
        ({"CUDA_VISIBLE_DEVICES": "0", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}, FAST_SECOND, False),
        ({"CUDA_VISIBLE_DEVICES": "0"}, (), True),
    ],
)
def test_numbers_that_would_mean_other_cards_are_a_problem(environment, gpus, problem):
    assert (hidden_cards_problem(environment, gpus) is not None) is problem


def test_what_ollamas_environment_lacks_is_named():
    assert missing_variables({"CUDA_DEVICE_ORDER": "FASTEST_FIRST"}) == ("CUDA_DEVICE_ORDER=PCI_BUS_ID", "OLLAMA_SCHED_SPREAD=1")
    assert missing_variables({"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "OLLAMA_SCHED_SPREAD": "1"}) == ()


# The commands


@pytest.fixture
def run(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launcher, "_gpus", lambda: FAST_SECOND)
    environment: dict[str, str] | None = {}
    monkeypatch.setattr(launcher, "ollama_environment", lambda process: run.environment)
    monkeypatch.setattr(launcher, "ollama_user", lambda process, library: None)

    def run(*arguments: str, environment: dict[str, str] | None = environment):
        run.environment = environment
        return CliRunner().invoke(launcher_commands, arguments)

    return run


def test_the_commands_say_what_they_did_and_what_is_left_to_do(library, run):
    done = run("install", "--lib", str(library), environment={"CUDA_DEVICE_ORDER": "PCI_BUS_ID"})
    assert done.exit_code == 0, done.output
    assert f"in place in {library}; it asks http://127.0.0.1:11435." in done.output
    assert 'Environment="OLLAMA_SCHED_SPREAD=1"' in done.output
    assert "PCI_BUS_ID" not in done.output
    assert "systemctl restart ollama" in done.output
    assert "installed" in run("status", "--lib", str(library)).output
    assert "Ollama's own llama-server is in place" in run("remove", "--lib", str(library)).output
    assert names(library) == {NAME}
    (library / NAME).unlink()
    assert "there is no llama-server here" in run("remove", "--lib", str(library)).output


def test_status_is_json_for_programs(library, run):
    run("install", "--lib", str(library), "--url", "http://127.0.0.1:1")
    status = json.loads(run("status", "--lib", str(library), "--json", environment=None).output)
    assert status == {
        "library": str(library),
        "state": "installed",
        "current": True,
        "url": "http://127.0.0.1:1",
        "environment_missing": None,
    }


def test_hidden_cards_stop_the_installation(library, run):
    done = run("install", "--lib", str(library), environment={"CUDA_VISIBLE_DEVICES": "0"})
    assert isinstance(done.exception, LauncherError)
    assert names(library) == {NAME}


# The container's entrypoint


def prepare_image(tmp_path: Path) -> None:
    if not (tmp_path / "image").exists():
        (tmp_path / "image").mkdir()
        shutil.copy2(ENTRYPOINT, tmp_path / "image")
        shutil.copy2(shipped_launcher(), tmp_path / "image")
        put(tmp_path / "image" / "ollama", b'#!/bin/sh\necho "ollama $* $LOPSIDED_TOKEN"\n')


def enter(library: Path, tmp_path: Path, **environment: str) -> subprocess.CompletedProcess:
    """Starts the container: its ``ollama`` prints what it was given, the token too."""
    prepare_image(tmp_path)
    path = f"{tmp_path / 'image'}:{os.environ['PATH']}"
    return subprocess.run(
        [tmp_path / "image" / "entrypoint", "serve"],
        env={"PATH": path, "LOPSIDED_LIBRARY": str(library), **environment},
        capture_output=True,
        text=True,
        check=True,
        timeout=10,
    )


def test_the_container_starts_with_the_launcher_every_time(library, tmp_path):
    for _ in range(2):
        started = enter(library, tmp_path)
        assert (started.stdout, started.stderr) == ("ollama serve \n", "")
        assert inspect(library).state == "installed"
        assert inspect(library).current
        assert version(library) == "version: 1 --version\n"
    assert names(library) == {NAME, STOCK, CACHE}


def test_the_container_takes_a_newer_image(library, tmp_path):
    enter(library, tmp_path)
    put(library / NAME, real("version: 2"))
    enter(library, tmp_path)
    assert version(library) == "version: 2 --version\n"
    assert inspect(library).state == "installed"


def test_the_container_goes_on_after_a_stop_in_the_middle(library, tmp_path):
    (library / NAME).rename(library / STOCK)
    enter(library, tmp_path)
    assert version(library) == "version: 1 --version\n"
    assert inspect(library).state == "installed"


def test_the_container_starts_without_the_launcher_where_it_cannot_be_put(library, tmp_path):
    enter(library, tmp_path)
    shutil.copy2(library / STOCK, library / NAME)
    (tmp_path / "image" / NAME).unlink()
    started = enter(library, tmp_path)
    assert started.stdout == "ollama serve \n"
    assert len(started.stderr.splitlines()) == 1
    assert version(library) == "version: 1 --version\n"


def test_the_container_never_takes_a_launcher_that_its_bash_is_too_old_for(library, tmp_path):
    prepare_image(tmp_path)
    put(tmp_path / "image" / "bash", b"#!/bin/sh\nexit 1\n")
    run_by(tmp_path / "image" / "bash", tmp_path / "image" / NAME)
    started = enter(library, tmp_path)
    assert started.stdout == "ollama serve \n"
    assert started.stderr == "lopsided: the launcher needs bash 5: started without the launcher\n"
    assert names(library) == {NAME}


def test_the_container_of_an_older_ollama_starts_as_ever(library, tmp_path):
    (library / NAME).unlink()
    started = enter(library, tmp_path)
    assert started.stdout == "ollama serve \n"
    assert "before 0.30" in started.stderr


def test_the_containers_share_a_token_that_is_made_once(library, tmp_path):
    file = tmp_path / "shared-token"
    first = enter(library, tmp_path, LOPSIDED_TOKEN_FILE=str(file)).stdout
    assert first == f"ollama serve {file.read_text()}\n"
    assert len(file.read_text()) == 48
    assert enter(library, tmp_path, LOPSIDED_TOKEN_FILE=str(file)).stdout == first
    assert enter(library, tmp_path, LOPSIDED_TOKEN_FILE=str(file), LOPSIDED_TOKEN="own").stdout == "ollama serve own\n"
    broken = enter(library, tmp_path, LOPSIDED_TOKEN_FILE=str(tmp_path / "no" / "folder"))
    assert broken.stdout == "ollama serve \n"
    assert "set LOPSIDED_TOKEN" in broken.stderr


@pytest.mark.parametrize("left", BROKEN)
def test_the_container_keeps_the_original_where_an_update_has_left_a_broken_one(library, tmp_path, left):
    enter(library, tmp_path)
    put(library / NAME, BROKEN[left])
    started = enter(library, tmp_path)
    assert started.stdout == "ollama serve \n"
    assert started.stderr == f"lopsided: {library}/llama-server does not run: started without the launcher\n"
    assert (library / STOCK).read_bytes() == real()
    assert (library / NAME).read_bytes() == BROKEN[left]


def test_containers_that_start_at_the_same_time_end_with_one_launcher_and_one_token(library, tmp_path):
    token = tmp_path / "shared-token"
    prepare_image(tmp_path)
    for _ in range(5):
        with ThreadPoolExecutor(4) as pool:
            runs = [pool.submit(enter, library, tmp_path, LOPSIDED_TOKEN_FILE=str(token)) for _ in range(4)]
            started = {(run.result().stdout, run.result().stderr) for run in runs}
        assert started == {(f"ollama serve {token.read_text()}\n", "")}
        assert (library / STOCK).read_bytes() == real()
        assert version(library) == "version: 1 --version\n"
        assert names(library) == {NAME, STOCK, CACHE}
        remove(library)
        token.unlink()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["image", "lib"]


def test_the_container_waits_for_a_command_that_works_on_the_folder(library, tmp_path):
    prepare_image(tmp_path)
    with ThreadPoolExecutor(1) as pool:
        with installation._locked(library):
            started = pool.submit(enter, library, tmp_path)
            with pytest.raises(TimeoutError):
                started.result(timeout=0.3)
            assert names(library) == {NAME}
        assert started.result().stderr == ""
    assert inspect(library).state == "installed"
