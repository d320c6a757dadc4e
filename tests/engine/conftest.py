"""Real parts: workers that stand for GPUs, Ollama's library folder with the launcher in it, the proxy as a process."""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from planner.units import MIB
from proxy.gpus.static import StaticSource
from proxy.launcher.installation import install
from proxy.models.gguf import read_profile
from proxy.simulator import Simulator, build_model, create_app
from tests.engine.build import engine
from tests.engine.ollama import EngineScheduler, Server, make_simulator
from tests.servers import free_port, serve

START_S = 20.0
MODEL = "smollm2:135m"
PARALLEL = 4
"""Sequences: their caches make a small model need two GPUs."""
FAST = "RTX 5090"
SLOW = "RTX 3090"


@dataclass(kw_only=True)
class Worker:
    """A ``ggml-rpc-server``, which stands for one GPU."""

    process: subprocess.Popen[bytes]
    address: str

    def hold_to(self, more_mib: int) -> None:
        """Lets it have ``more_mib`` of address space beyond what it has now."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        now_bytes = int(re.search(r"VmSize:\s+(\d+) kB", status)[1]) * 1024
        limit = now_bytes + more_mib * MIB
        resource.prlimit(self.process.pid, resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))

    def let_go(self) -> None:
        resource.prlimit(self.process.pid, resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


@dataclass(kw_only=True)
class Chain:
    """Client, proxy, Ollama (the simulator), launcher and llama-server on two workers, ``RPC0`` and ``RPC1``."""

    simulator: Simulator
    ollama_url: str
    url: str
    proxy: subprocess.Popen[bytes]
    workers: tuple[Worker, Worker]

    @property
    def servers(self) -> list[Server]:
        """Every start of llama-server with the model."""
        scheduler = self.simulator.scheduler
        assert isinstance(scheduler, EngineScheduler)
        return scheduler.servers

    def generate(self, *, to: str | None = None, **options: object) -> httpx.Response:
        body = {"model": MODEL, "prompt": "Once upon a time", "stream": False, "options": {"num_predict": 8, **options}}
        return httpx.post((to or self.url) + "/api/generate", json=body, timeout=120)

    def unload(self) -> None:
        httpx.post(self.ollama_url + "/api/generate", json={"model": MODEL, "keep_alive": 0}, timeout=30)

    def placement(self, num_ctx: int = 8192) -> dict[str, object]:
        """The plan for this moment, as ``GET /lopsided/plan`` has it."""
        answer = httpx.get(self.url + "/lopsided/plan", params={"model": MODEL, "num_ctx": num_ctx}, timeout=30)
        return answer.raise_for_status().json()["plan"]


@pytest.fixture(scope="session")
def programs() -> Path:
    return engine()


@pytest.fixture(scope="session")
def smollm2_blobs(tmp_path_factory: pytest.TempPathFactory, smollm2_path: Path) -> Path:
    """Ollama's folder of blobs with the model's file in it."""
    blobs = tmp_path_factory.mktemp("models") / "blobs"
    blobs.mkdir()
    model = build_model(MODEL, read_profile(smollm2_path))
    (blobs / model.blob.replace(":", "-")).symlink_to(smollm2_path)
    return blobs


@pytest.fixture
def workers(programs: Path) -> Iterator[tuple[Worker, Worker]]:
    with worker(programs) as first, worker(programs) as second:
        yield first, second


@contextmanager
def worker(programs: Path) -> Iterator[Worker]:
    port = free_port()
    process = subprocess.Popen(
        [programs / "ggml-rpc-server", "-H", "127.0.0.1", "-p", str(port)],
        env={**os.environ, "LD_LIBRARY_PATH": str(programs), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for_port(port, process)
        yield Worker(process=process, address=f"127.0.0.1:{port}")
    finally:
        end(process)


@pytest.fixture
def library(tmp_path: Path, programs: Path) -> Path:
    """A copy of Ollama's library folder, as its installer leaves it: links to the real files."""
    folder = tmp_path / "lib" / "ollama"
    folder.mkdir(parents=True)
    for file in programs.iterdir():
        if file.name == "llama-server":
            shutil.copy(file, folder)
        elif ".so" in file.name:
            (folder / file.name).symlink_to(file.resolve())
    return folder


@contextmanager
def chain(tmp_path: Path, library: Path, blobs: Path, workers: tuple[Worker, Worker], gpus: tuple[str, str]) -> Iterator[Chain]:
    """The whole chain; ``gpus`` says what the workers stand for, as ``--gpu`` does: ``RTX 5090:2GiB``."""
    profile = tmp_path / "gpus.toml"
    names = [gpu.split(":") for gpu in gpus]
    cards = "".join(f'[[gpu]]\nname = "{name}"\nfree = "{free}"\nlibrary = "RPC"\n' for name, free in names)
    profile.write_text(f'{cards}[host]\nbandwidth = "1GB"\n')  # RAM so slow that no layer is left there by choice
    model = build_model(MODEL, read_profile(next(blobs.iterdir())))
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    install(library, url=url, token=None)
    simulator = make_simulator(
        StaticSource.from_file(profile).rig(),
        model,
        parallel=PARALLEL,
        library=library,
        blobs=blobs,
        variables={"LLAMA_ARG_RPC": ",".join(worker.address for worker in workers), "OLLAMA_SCHED_SPREAD": "1"},
    )
    with serve(create_app(simulator)) as ollama_url:
        proxy = start_proxy(port, ollama_url, profile, tmp_path / "proxy.log")
        try:
            yield Chain(simulator=simulator, ollama_url=ollama_url, url=url, proxy=proxy, workers=workers)
        finally:
            end(proxy)
            assert isinstance(simulator.scheduler, EngineScheduler)
            simulator.scheduler.close()


def start_proxy(port: int, ollama_url: str, profile: Path, log: Path) -> subprocess.Popen[bytes]:
    """``lopsided serve``."""
    with log.open("wb") as file:
        process = subprocess.Popen(
            [Path(sys.executable).with_name("lopsided"), "serve"],
            env={
                **os.environ,
                "LOPSIDED_HOST": f"127.0.0.1:{port}",
                "LOPSIDED_UPSTREAM": ollama_url,
                "LOPSIDED_PROFILE": str(profile),
                "LOPSIDED_STATE": "off",
                "OLLAMA_SCHED_SPREAD": "1",
                "OLLAMA_NUM_PARALLEL": str(PARALLEL),
            },
            stdout=file,
            stderr=file,
        )
    wait_for_port(port, process)
    return process


def wait_for_port(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.05)
    raise RuntimeError(f"{process.args} does not listen on port {port}")


def end(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGCONT)
    process.kill()
    process.wait(10)
