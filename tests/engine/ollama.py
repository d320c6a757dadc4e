"""The simulator in engine mode: in Ollama's place it starts a real ``llama-server``, exactly as Ollama 0.32.15 was recorded to.

Its scheduler decides as always; ``_start`` and ``_stop`` are a process now, and the words are those that the process generates.
"""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path

import httpx

from planner.hardware import Rig
from planner.units import MIB
from proxy.simulator.placement import Environment, Load
from proxy.simulator.replies import Prompt, Reply
from proxy.simulator.scheduler import Event, Runner, Scheduler
from proxy.simulator.simulation import Simulator
from proxy.simulator.store import Model
from tests.servers import free_port

LOAD_S = 60.0
"""Longest wait for SmolLM2-135M to be ready; it takes a second or two."""

TOKENS = 8
"""Tokens that each answer has."""

_BUFFER = re.compile(r"^\w+: +RPC\d+\[([^]]*)\] (model|KV|compute) buffer size = +([\d.]+) MiB$", re.MULTILINE)


@dataclass(kw_only=True)
class Server:
    """One start of ``llama-server`` with a model: its arguments, and its log once it is ready or has ended."""

    arguments: tuple[str, ...]
    port: int
    process: subprocess.Popen[bytes]
    log_path: Path
    workers: str
    state: str = "loading"

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    @property
    def appended(self) -> tuple[str, ...]:
        """What the launcher says that it has appended."""
        said = re.search(r"^lopsided: (?:.*; its last answer: )?(--device .*)$", self.log, re.MULTILINE)
        return tuple(said[1].split()) if said else ()

    @property
    def said(self) -> list[str]:
        """The launcher's own lines."""
        return re.findall(r"^lopsided: (.*)$", self.log, re.MULTILINE)

    @property
    def addresses(self) -> dict[str, str]:
        """What ``--device`` calls each worker, by its address: buffers are printed with that."""
        workers = self.workers.split(",")
        return {address: f"RPC{number}" for number, address in enumerate(workers)}

    def mib(self, kind: str) -> dict[str, float]:
        """MiB of ``model``, ``KV`` or ``compute`` buffers on each device."""
        found: dict[str, float] = {}
        for address, what, size in _BUFFER.findall(self.log):
            if what == kind:
                device = self.addresses[address]
                found[device] = found.get(device, 0.0) + float(size)
        return found

    def generate(self, prompt: str) -> str:
        """Some tokens."""
        body = {"prompt": prompt, "n_predict": TOKENS, "temperature": 0}
        return httpx.post(f"http://127.0.0.1:{self.port}/completion", json=body, timeout=60).json()["content"]


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineLoad(Load):
    """A load as it came out: the bytes are what the server's log says."""

    server: Server = field(repr=False)

    @property
    def vram_bytes(self) -> int:
        return round(sum(sum(self.server.mib(kind).values()) for kind in ("model", "KV", "compute")) * MIB)


class EngineScheduler(Scheduler):
    """Starts ``library/llama-server`` with ``environment``; ``blobs`` has the models' files."""

    def __init__(self, simulator: Simulator, *, library: Path, blobs: Path, variables: Mapping[str, str]) -> None:
        super().__init__(simulator.gpus, environment=simulator.environment)
        self.library, self.blobs = library, blobs
        self.variables = {
            **{name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ},
            "LD_LIBRARY_PATH": str(library),
            **variables,
        }
        self.servers: list[Server] = []

    def discover(self) -> str:
        """Both starts without a model that Ollama makes before each load; what ``--list-devices`` prints."""
        with self._run("--port", str(free_port()), "--host", "127.0.0.1", "--no-webui", "--offline", "--verbose") as first:
            assert first.stderr
            found = any(b"system_info:" in line for line in first.stderr)
            first.kill()
        assert found, "llama-server without a model does not get as far as system_info"
        with self._run("--list-devices", "--offline", "--verbose") as listed:
            return listed.communicate(timeout=30)[0].decode()

    async def _start(self, model: Model, load: Load) -> tuple[str | None, float]:
        await asyncio.to_thread(self.discover)
        port, settings = free_port(), load.settings
        arguments = [
            *("--model", str(self.blobs / model.blob.replace(":", "-")), "--port", str(port), "--host", "127.0.0.1"),
            *("--no-webui", "--offline", "-c", str(settings.num_ctx * settings.parallel), "-np", str(settings.parallel)),
            *("--log-verbosity", "4", "--no-log-prefix", "--no-log-timestamps", "--flash-attn", "auto"),
            *(("--embedding",) if settings.outputs is None else ()),
            *("-b", str(settings.batch), "-ub", str(settings.ubatch)),
            *(("-ngl", str(load.num_gpu)) if load.num_gpu >= 0 else ()),
            *(("--split-mode", "none", "--main-gpu", str(load.visible[0])) if len(load.visible) == 1 else ()),
            *("--context-shift", "--keep", "4"),
        ]
        log = self.blobs.parent / f"server-{port}.log"
        with log.open("wb") as file:
            process = subprocess.Popen(  # noqa: ASYNC220 - it returns at once
                [self.library / "llama-server", *arguments],
                env=self.variables,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
            )
        server = Server(
            arguments=tuple(arguments), port=port, process=process, log_path=log, workers=self.variables["LLAMA_ARG_RPC"]
        )
        self.servers.append(server)
        try:
            await self._ready(server)
        except asyncio.CancelledError:
            await self._kill(server)
            self.history.append(Event(kind="abort", model=model.name, load=load))
            raise
        if process.poll() is not None:
            server.state = "failed"
            errors = [line for line in server.log.splitlines() if "failed to" in line]
            return f"llama-server process has terminated: exit status {process.returncode}: {' '.join(errors[:2])}", 0.0
        server.state = "ready"
        return None, 0.0

    def _stop(self, runner: Runner) -> None:
        server = self.servers[-1]
        server.process.terminate()
        server.process.wait(10)
        server.state = "stopped"

    def close(self) -> None:
        """Ends what still runs."""
        for server in self.servers:
            if server.process.poll() is None:
                server.process.kill()
                server.process.wait(10)

    async def _ready(self, server: Server) -> None:
        async with asyncio.timeout(LOAD_S), httpx.AsyncClient() as client:
            while server.process.poll() is None:
                with suppress(httpx.TransportError):
                    if (await client.get(f"http://127.0.0.1:{server.port}/health")).status_code == httpx.codes.OK:
                        return
                await asyncio.sleep(0.05)

    async def _kill(self, server: Server) -> None:
        server.state = "aborted"
        server.process.kill()
        server.process.wait(10)

    async def _runner(self, model, options):
        runner, load_s = await super()._runner(model, options)
        if not isinstance(runner.load, EngineLoad):
            values = {item.name: getattr(runner.load, item.name) for item in fields(Load)}
            runner.load = EngineLoad(**values, server=self.servers[-1])
        return runner, load_s

    def _run(self, *arguments: str) -> subprocess.Popen[bytes]:
        command = [self.library / "llama-server", *arguments]
        return subprocess.Popen(command, env=self.variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def make_simulator(
    rig: Rig, model: Model, *, parallel: int, library: Path, blobs: Path, variables: Mapping[str, str]
) -> Simulator:
    """A simulated Ollama with ``OLLAMA_SCHED_SPREAD=1`` whose loads are real."""

    def speak(prompt: Prompt) -> Reply:
        return Reply(pieces=(simulator.scheduler.servers[-1].generate(prompt.text),))

    simulator = Simulator(rig, [model], environment=Environment(sched_spread=True, num_parallel=parallel), speaker=speak)
    simulator.scheduler = EngineScheduler(simulator, library=library, blobs=blobs, variables=variables)
    return simulator
