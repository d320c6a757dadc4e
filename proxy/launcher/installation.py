"""Ollama's library folder with the launcher in it: what is there, putting it in place, taking it out.

At every moment there is a whole ``llama-server`` in the folder, the launcher or Ollama's own, and never is Ollama's own
without a name: the original first gets a second name (``llama-server.stock``, a hard link), then the launcher replaces the
first one by a rename. Whatever is interrupted, doing it again finishes it. One command at a time works on a folder, which is
locked from the look at it to the end; and what an update has left there takes nobody's place before it has been seen to run.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from proxy.address import parse_address
from proxy.errors import LauncherError

NAME = "llama-server"
STOCK = "llama-server.stock"
BEFORE = "llama-server.stock.old"
"""The original that an update has outdated, until the newer one has been tried."""
CONFIG = "llama-server.lopsided"
CACHE = "llama-server.cache"
NOTE = ".lopsided"
"""Ends the name of a file beside the folder that says that the launcher was installed: Ollama's own installer deletes the folder
and makes it anew, and nothing in it could tell."""
MARK = b"lopsided's launcher"
"""Stands in the launcher's second line, and in no llama-server's."""

LIBRARIES = ("/usr/local/lib/ollama", "/usr/lib/ollama", "/opt/ollama/lib/ollama")
"""Where installers and distributions put Ollama's library folder; looked at after that of the ``ollama`` command itself."""

OLLAMA_USER = "ollama"
"""The user that Ollama's installer makes for its service."""

TRY_S = 60.0
"""Longest wait for ``llama-server --version``, which may load CUDA's libraries from a cold disk."""

State = Literal["absent", "installed", "replaced", "interrupted", "lost", "none"]
"""``absent``: Ollama's own llama-server; ``installed``; ``replaced``: it was installed, and Ollama's own is back, as an update
leaves it, with the older one beside it or without; ``interrupted``: there is only ``llama-server.stock``; ``lost``: the launcher
without it; ``none``: no llama-server."""

SAYINGS: Mapping[State, str] = {
    "absent": "not installed",
    "installed": "installed",
    "replaced": "gone: an update of Ollama has put its own llama-server back; install it again",
    "interrupted": f"half installed: there is only {STOCK}; install or remove it again",
    "lost": f"installed, but {STOCK} is missing, so no model loads: install Ollama again",
    "none": "not possible: there is no llama-server here, as in every Ollama before 0.30; plans go out as request options",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Installation:
    """What is in a library folder. ``current`` is false where the launcher is that of another lopsided."""

    library: Path
    state: State
    current: bool = False
    url: str | None = None


def shipped_launcher() -> Path:
    """The script that came with this lopsided: in the wheel's data, else in the repository."""
    here = Path(__file__).parents[1]
    return next(path for path in (here / "data" / NAME, here.parent / "docker" / NAME) if path.is_file())


def inspect(library: Path) -> Installation:
    """What is in ``library``; changes nothing."""
    file, stock = library / NAME, library / STOCK
    has_stock = os.path.lexists(stock) and not _is_launcher(stock)
    state: State
    if _is_launcher(file):
        state = "installed" if has_stock else "lost"
    elif os.path.lexists(file):
        state = "replaced" if has_stock or _note(library).exists() else "absent"
    else:
        state = "interrupted" if has_stock else "none"
    current = state == "installed" and file.read_bytes() == shipped_launcher().read_bytes()
    return Installation(library=library, state=state, current=current, url=_configured_url(library))


def find_library(given: Path | None = None, *, places: Sequence[str] = LIBRARIES) -> Path:
    """Ollama's library folder: ``given``, else beside the ``ollama`` command, else one of ``places``.

    Raises ``LauncherError`` where there is none.
    """
    if given is not None:
        if not given.is_dir():
            raise LauncherError(f"{given} is no folder; --lib names the one that has llama-server in it")
        return given
    command = shutil.which("ollama")
    beside = [Path(command).resolve().parent.parent / "lib" / "ollama"] if command else []
    folders = [folder for folder in (*beside, *map(Path, places)) if folder.is_dir()]
    if not folders:
        raise LauncherError("Ollama's library folder is not found; --lib names the one that has llama-server in it")
    return next((folder for folder in folders if inspect(folder).state != "none"), folders[0])


def install(library: Path, *, url: str, token: str | None, user: str | None = None) -> Installation:
    """Puts the launcher in place, or brings it up to date.

    ``url`` and ``token`` are lopsided's, ``user`` is whom Ollama runs as. Raises ``LauncherError``, and what was in force stays.
    """
    _refuse_other_systems()
    if not parse_address(url).is_loopback() and not token:
        raise LauncherError(f"{url} is another machine's: it takes a LOPSIDED_TOKEN, the same that lopsided there has")
    owner = _owner(user)
    file, stock, new, before = (library / name for name in (NAME, STOCK, f"{NAME}.new", BEFORE))
    with _explained(library), _locked(library):
        seen, found = _identity(file), inspect(library)
        if found.state in ("none", "lost"):
            raise LauncherError(f"{library}: {SAYINGS[found.state]}")
        _check_bash()
        try:
            if found.state in ("absent", "replaced"):
                _check_runs(file)
                if os.path.lexists(stock):
                    stock.replace(before)
                _second_name(file, stock)
            _write(new, shipped_launcher().read_bytes(), mode=0o755)
            _try(new, stock)
            if _identity(file) != seen:  # that has taken seconds
                raise LauncherError(f"{file} has changed meanwhile, as by an update of Ollama; when that is through, try again")
            _write_config(library / CONFIG, url, token, owner)
            _make_cache(library / CACHE, owner)
            new.replace(file)
        except (LauncherError, OSError):
            new.unlink(missing_ok=True)
            if before.exists():
                before.replace(stock)
            elif file.exists() and (found.state == "absent" or (found.state == "replaced" and _is_same(stock, file))):
                stock.unlink(missing_ok=True)
            raise
        before.unlink(missing_ok=True)
        with suppress(OSError):  # it is there for `status` and `doctor` alone
            _note(library).write_text(f"lopsided's launcher was put into {library}; `lopsided launcher remove` ends that.\n")
        return inspect(library)


def remove(library: Path) -> Installation:
    """Puts Ollama's own llama-server back and deletes what ``install`` wrote. Raises ``LauncherError``."""
    _refuse_other_systems()
    with _explained(library), _locked(library):
        found = inspect(library)
        if found.state == "lost":
            raise LauncherError(f"{library}: {SAYINGS[found.state]}")
        if found.state in ("installed", "interrupted"):
            (library / STOCK).replace(library / NAME)
        elif found.state == "replaced" and os.path.lexists(library / STOCK):  # the older Ollama's
            _check_runs(library / NAME)
            (library / STOCK).unlink()
        for name in (f"{NAME}.new", f"{STOCK}.new", f"{CONFIG}.new", BEFORE, CONFIG):
            (library / name).unlink(missing_ok=True)
        if (library / CACHE).is_dir():
            shutil.rmtree(library / CACHE)
        _note(library).unlink(missing_ok=True)
        return inspect(library)


def _identity(file: Path) -> tuple[int, ...] | None:
    """What tells ``file`` from another one of its name, a second name of its own apart; ``None`` where there is none."""
    try:
        seen = file.lstat()
    except FileNotFoundError:
        return None
    return seen.st_dev, seen.st_ino, seen.st_size, seen.st_mtime_ns


def _is_same(one: Path, other: Path) -> bool:
    return one.exists() and one.samefile(other)


def _note(library: Path) -> Path:
    folder = library.resolve()
    return folder.with_name(folder.name + NOTE)


def _is_launcher(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return MARK in b"".join(file.readlines(512)[:2])
    except OSError:
        return False


def _configured_url(library: Path) -> str | None:
    try:
        lines = (library / CONFIG).read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((line.partition("=")[2] for line in lines if line.startswith("LOPSIDED_URL=")), None)


def _refuse_other_systems() -> None:
    if not sys.platform.startswith("linux"):
        raise LauncherError("the launcher is for Linux; elsewhere lopsided places models by the options of requests")


def _owner(user: str | None) -> tuple[int, int] | None:
    """Whose the token's file is to be: Ollama's user. ``None`` where only this user's files can be made."""
    import pwd  # there is none on Windows, where this module is imported too

    if os.geteuid() != 0:
        return None
    for name in filter(None, (user, OLLAMA_USER, os.environ.get("SUDO_USER"))):
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            if name == user:
                raise LauncherError(f"there is no user {user}") from None
            continue
        return entry.pw_uid, entry.pw_gid
    return None


def _second_name(file: Path, stock: Path) -> None:
    """Makes ``stock`` the same file as ``file``, which keeps its name; a whole copy where the file system knows no links."""
    if _is_launcher(file):
        raise LauncherError(f"{file} is the launcher, and no llama-server of Ollama's")
    spare = stock.with_name(f"{STOCK}.new")
    spare.unlink(missing_ok=True)
    if stock.exists() and stock.samefile(file):  # a rename between two names of one file does nothing
        return
    try:
        os.link(file, spare, follow_symlinks=False)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS):
            raise
        shutil.copy2(file, spare, follow_symlinks=False)
        with spare.open("rb") as copy:
            os.fsync(copy.fileno())
    spare.replace(stock)


def _try(launcher: Path, stock: Path) -> None:
    """The launcher must do what the real binary does. Raises ``LauncherError`` where it does not."""
    ends = [_version(program) for program in (stock, launcher)]
    if (ends[0].returncode, ends[0].stdout) != (ends[1].returncode, ends[1].stdout):
        raise LauncherError(f"tried before it was put in place, the launcher does not start llama-server: {_said(ends[1])}")


def _check_runs(file: Path) -> None:
    """Ollama's own llama-server must be whole. Raises ``LauncherError`` where an update was cut off, or left it broken."""
    end = _version(file)
    if end.returncode != 0:
        raise LauncherError(f"{file} --version fails, so nothing was changed ({_said(end)}); install Ollama again")


def _check_bash() -> None:
    """The program that the launcher's first line names must be there, and a bash that can keep time."""
    with shipped_launcher().open("rb") as file:
        command = os.fsdecode(file.readline()).removeprefix("#!").split()
    try:
        bash = subprocess.run([*command, "-c", "echo ${EPOCHREALTIME:+new}"], capture_output=True, check=False)  # noqa: S603
    except FileNotFoundError as error:
        raise LauncherError(f"the launcher needs {command[0]}, and there is none") from error
    if bash.stdout.strip() != b"new":
        raise LauncherError(f"the launcher needs bash 5.0 or later, and {command[0]} is older")


def _version(program: Path) -> subprocess.CompletedProcess[bytes]:
    """How ``program --version`` ends, with the libraries beside it. Raises ``LauncherError`` where it can't be told."""
    libraries = os.pathsep.join(filter(None, (str(program.parent), os.environ.get("LD_LIBRARY_PATH"))))
    environment = {**os.environ, "LD_LIBRARY_PATH": libraries}
    try:
        return subprocess.run([program, "--version"], env=environment, capture_output=True, check=False, timeout=TRY_S)  # noqa: S603
    except subprocess.TimeoutExpired as error:
        raise LauncherError(f"{program} --version does not end within {TRY_S:g} s") from error
    except OSError as error:
        why = error.strerror
        raise LauncherError(f"{program} cannot be started, so nothing was changed ({why}); install Ollama again") from error


def _said(end: subprocess.CompletedProcess[bytes]) -> str:
    return end.stderr.decode(errors="replace").strip() or f"status {end.returncode}"


def _write_config(path: Path, url: str, token: str | None, owner: tuple[int, int] | None) -> None:
    new = path.with_name(f"{CONFIG}.new")
    content = f"LOPSIDED_URL={url}\n" + (f"LOPSIDED_TOKEN={token}\n" if token else "")
    _write(new, content.encode(), mode=0o600, owner=owner)
    new.replace(path)


def _write(path: Path, content: bytes, *, mode: int, owner: tuple[int, int] | None = None) -> None:
    """Makes a file that nobody sees before it is the ``owner``'s, and that is on the disk before it is renamed."""
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        if owner:
            os.fchown(descriptor, *owner)
        os.fchmod(descriptor, mode)
        file.flush()
        os.fsync(descriptor)


def _make_cache(path: Path, owner: tuple[int, int] | None) -> None:
    path.mkdir(mode=0o700, exist_ok=True)
    if owner:
        os.chown(path, *owner)


@contextmanager
def _explained(library: Path) -> Iterator[None]:
    """Turns what the file system refuses into a ``LauncherError``."""
    try:
        yield
    except PermissionError as error:
        raise LauncherError(f"{library} may not be written by this user; run it again with sudo") from error
    except OSError as error:
        raise LauncherError(f"{library} cannot be written: {error.strerror or error}") from error


@contextmanager
def _locked(library: Path) -> Iterator[None]:
    """Waits until no other command works on ``library``, and keeps others waiting meanwhile; ``docker/entrypoint`` too."""
    import fcntl  # there is none on Windows, where this module is imported too

    folder = os.open(library, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)
