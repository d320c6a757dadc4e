"""What the contenders need that is not the project's own: nginx from the system, the others from PyPI into ``.cache``."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

CACHE = Path(__file__).parents[2] / ".cache" / "bench-proxy"
LITELLM_VENV = CACHE / "litellm"
AIOHTTP_FOLDER = CACHE / "aiohttp"
LITELLM = "litellm[proxy]==1.106.2"
AIOHTTP = "httpx-aiohttp==0.2.0"


class LeftOutError(Exception):
    """A contender can't take part; the text says why."""


def nginx() -> str:
    """The program. Debian has it outside a plain user's ``PATH``."""
    found = shutil.which("nginx", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin")
    if found is None:
        raise LeftOutError("there is no nginx in PATH (Debian: apt-get install nginx)")
    return found


def prepare(name: str) -> None:
    """Installs what ``name`` needs, once. Raises :class:`LeftOutError`."""
    uv = [sys.executable, "-m", "uv"]
    if name == "nginx":
        nginx()
    elif name == "litellm":
        python = str(LITELLM_VENV / "bin" / "python")
        venv = [*uv, "venv", "-q", str(LITELLM_VENV), "--python", sys.executable]
        _once(LITELLM_VENV, [venv, [*uv, "pip", "install", "-q", "--python", python, LITELLM]])
    elif name.endswith("aiohttp"):
        _once(AIOHTTP_FOLDER, [[*uv, "pip", "install", "-q", "--target", str(AIOHTTP_FOLDER), AIOHTTP]])


def versions(names: Sequence[str]) -> list[str]:
    """What the contenders of these names run on."""
    found = [f"Python {platform.python_version()}"]
    found += [f"{name} {version(name)}" for name in ("uvicorn", "uvloop", "httptools", "httpx", "httpcore", "fastapi")]
    if "nginx" in names:
        told = subprocess.run([nginx(), "-v"], capture_output=True, text=True, check=False).stderr
        found.append(told.strip().rpartition(": ")[2].replace("/", " "))
    if "litellm" in names:
        found.append(LITELLM.replace("[proxy]==", " "))
    return [*found, *(AIOHTTP.replace("==", " ") for name in names if name.endswith("aiohttp"))]


def _once(folder: Path, commands: Sequence[Sequence[str]]) -> None:
    complete = folder / ".complete"
    if complete.exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise LeftOutError(f"it can't be installed: {done.stderr.strip()[-300:]}")
    complete.touch()
