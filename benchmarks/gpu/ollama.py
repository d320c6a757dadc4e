"""Ollama twice, as it is and behind lopsided with the launcher, over one store: started, asked and read."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

START_S = 60.0
LOAD_S = 400.0
LIBRARY = Path("lib/ollama")


def make_store(store: Path, models: Mapping[str, Path]) -> None:
    """A store of Ollama's with ``models`` by name, their blobs links to the files: nothing is copied or hashed as a whole."""
    blobs = store / "blobs"
    blobs.mkdir(parents=True, exist_ok=True)
    for name, file in models.items():
        with file.open("rb") as header:
            digest = hashlib.sha256(name.encode() + header.read(2**20)).hexdigest()
        blob = blobs / f"sha256-{digest}"
        if not blob.is_symlink():
            blob.symlink_to(file.resolve())
        config = json.dumps({"model_format": "gguf", "model_family": "llama", "model_families": ["llama"], "file_type": "Q4_0"})
        config_digest = hashlib.sha256(config.encode()).hexdigest()
        (blobs / f"sha256-{config_digest}").write_text(config)
        manifest = {
            "schemaVersion": 2,
            "mediaType": "application/vnd.docker.distribution.manifest.v2+json",
            "config": {
                "mediaType": "application/vnd.docker.container.image.v1+json",
                "digest": f"sha256:{config_digest}",
                "size": len(config),
            },
            "layers": [
                {
                    "mediaType": "application/vnd.ollama.image.model",
                    "digest": f"sha256:{digest}",
                    "size": file.stat().st_size,
                }
            ],
        }
        path = store / "manifests" / "registry.ollama.ai" / "library" / name / "latest"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(manifest))


def make_tree(tree: Path, binary: Path) -> Path:
    """Another installation of the Ollama that ``binary`` belongs to, its libraries linked. Its library folder is returned."""
    real = binary.resolve()
    library = tree / LIBRARY
    library.mkdir(parents=True, exist_ok=True)
    (tree / "bin").mkdir(exist_ok=True)
    shutil.copy2(real, tree / "bin" / "ollama")
    for entry in (real.parent.parent / LIBRARY).iterdir():
        link = library / entry.name
        if entry.name == "llama-server":
            shutil.copy2(entry, link)
        elif not link.is_symlink():
            link.symlink_to(entry)
    return library


@contextmanager
def process(command: list[str], *, log: Path, url: str, environment: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """``command`` until the block ends; entered once ``url`` answers. Raises ``RuntimeError`` where it does not."""
    with log.open("ab") as file, subprocess.Popen(command, env=dict(environment), stdout=file, stderr=file) as server:
        try:
            deadline = time.monotonic() + START_S
            while True:
                with suppress(OSError), urllib.request.urlopen(url, timeout=2):
                    break
                if server.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"{command[0]} does not answer at {url}; see {log}")
                time.sleep(0.1)
            yield server
        finally:
            server.terminate()
            with suppress(subprocess.TimeoutExpired):
                server.wait(20)
            server.kill()


def lopsided(arguments: list[str]) -> list[str]:
    """The command line of the lopsided in this tree."""
    return [sys.executable, "-c", "from proxy.cli import main; main()", *arguments]


def post(url: str, body: Mapping[str, Any], timeout_s: float = LOAD_S) -> dict[str, Any]:
    """The JSON answer. Raises ``RuntimeError`` with what the server said where it refuses."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:
            return json.load(answer)  # type: ignore[no-any-return]
    except urllib.error.HTTPError as error:
        raise RuntimeError(f"{error.code}: {error.read()[:600].decode(errors='replace')}") from error


def get(url: str, timeout_s: float = 60.0) -> dict[str, Any]:
    with urllib.request.urlopen(url, timeout=timeout_s) as answer:
        return json.load(answer)  # type: ignore[no-any-return]


def unload(url: str) -> None:
    """Unloads every model and waits until none is listed."""
    for entry in get(f"{url}/api/ps")["models"]:
        post(f"{url}/api/generate", {"model": entry["name"], "keep_alive": 0})
    deadline = time.monotonic() + 60
    while get(f"{url}/api/ps")["models"]:
        if time.monotonic() > deadline:
            raise RuntimeError("a model stays loaded")
        time.sleep(0.2)


def clean_environment() -> dict[str, str]:
    """This process's environment without what would steer Ollama, lopsided or llama-server, those of ``LLAMA_ARG_RPC`` apart."""
    steering = ("OLLAMA_", "LOPSIDED_", "LLAMA_ARG_")
    return {name: value for name, value in os.environ.items() if not name.startswith(steering) or name == "LLAMA_ARG_RPC"}
