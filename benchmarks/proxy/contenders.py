"""The processes that are compared: each on a port of its own, all in front of one stand-in upstream.

With two cores or more, a contender has one to itself; upstream and clients share the others.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx

from benchmarks.proxy.install import AIOHTTP_FOLDER, LITELLM_VENV, nginx
from proxy.gpus.static import StaticSource
from proxy.simulator import Simulator, create_app, demo_models

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
MODEL = "qwen2.5:32b"
CARDS = ("RTX 5090:31500MiB", "RTX 3090:23700MiB")
"""Stock Ollama splits the model with its context over these two, so that a plan puts ``main_gpu`` into every request."""

START_S = 120.0
"""LiteLLM takes the longest to start: 10 to 30 s."""

CORES = sorted(os.sched_getaffinity(0))
PROXY_CORES = set(CORES[-1:])
OTHER_CORES = set(CORES[:-1]) or PROXY_CORES


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A running one. ``pid`` is ``None`` for the upstream itself, which stands for no proxy at all."""

    name: str
    port: int
    pid: int | None
    path: str = "/api/chat"

    def cpu_s(self) -> float:
        """Seconds of processor time that it has used until now."""
        if self.pid is None:
            return 0.0
        return time.clock_gettime((~self.pid << 3) | 2)  # the process's clock, as clock_getcpuclockid(3) makes it

    def memory_bytes(self) -> int:
        """Resident memory of its own, without pages of files, which the system drops as it likes."""
        match = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{self.pid}/status").read_text())
        return int(match[1]) * 1024 if match else 0


def facts() -> dict[str, object]:
    """What Ollama says of its models and of itself, as the simulator does with the model loaded."""

    async def ask() -> dict[str, object]:
        rig = StaticSource.from_arguments(CARDS).rig()
        app = create_app(Simulator(rig, [model for model in demo_models() if model.name == MODEL]))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1:11434") as client:
            await client.post("/api/generate", json={"model": MODEL, "options": {"num_ctx": 32768}}, timeout=None)
            found: dict[str, object] = {
                path: (await client.get(path)).json() for path in ("/api/tags", "/api/ps", "/api/version")
            }
            found["/api/show"] = (await client.post("/api/show", json={"model": MODEL})).json()
        return found

    return asyncio.run(ask())


def come_first(pid: int) -> None:
    """Has the process served before what else the machine does, where this user may (root): the 99th percentiles are of no use
    where a contender waits for other programs."""
    with suppress(PermissionError):
        os.sched_setscheduler(pid, os.SCHED_RR, os.sched_param(1))


@contextmanager
def alone(contender: Contender, contenders: Sequence[Contender]) -> Iterator[None]:
    """The others stand still: they share the core, and what they do by themselves would be counted against ``contender``."""
    others = [other.pid for other in contenders if other.pid is not None and other is not contender]
    for pid in others:
        os.killpg(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in others:
            os.killpg(pid, signal.SIGCONT)


@contextmanager
def process(command: Sequence[str], environment: dict[str, str], cores: set[int], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The command while the block runs, on ``cores``."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LOPSIDED_", "OLLAMA_", "CUDA_"))}
    kept = {name: value for name, value in kept.items() if not name.lower().endswith("_proxy")}
    with log.open("w") as output:
        started = subprocess.Popen(
            command, env={**kept, **environment}, cwd=log.parent, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    os.sched_setaffinity(started.pid, cores)
    come_first(started.pid)
    try:
        yield started
    finally:
        with suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)
        started.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ask(port: int, path: str) -> None:
    """One short request. Raises ``OSError`` where it is not answered."""
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", short_body(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=10):
        pass


def wait_until_up(started: subprocess.Popen[bytes], port: int, path: str, log: Path) -> None:
    """Waits until a short request is answered."""
    until = time.monotonic() + START_S
    while True:
        try:
            ask(port, path)
        except OSError:
            if time.monotonic() > until or started.poll() is not None:
                raise RuntimeError(f"no answer at port {port}: {log.read_text()[-2000:]}") from None
            time.sleep(0.1)
        else:
            return


def chat_body(chunks: int, every_us: int = 0, batch: int = 1, more: str = "") -> bytes:
    """A chat request that asks the stand-in upstream for so many chunks."""
    stream = "true" if chunks else "false"
    return (
        f'{{"model":"{MODEL}","messages":[{{"role":"user","content":"bench {chunks} {every_us} {batch}"{more}}}],'
        f'"stream":{stream},"options":{{"num_ctx":32768,"temperature":0.7}}}}'
    ).encode()


def v1_body(chunks: int, every_us: int = 0, batch: int = 1) -> bytes:
    """The same for the OpenAI-compatible endpoint."""
    stream = "true" if chunks else "false"
    content = f"bench {chunks} {every_us} {batch}"
    return f'{{"model":"{MODEL}","messages":[{{"role":"user","content":"{content}"}}],"stream":{stream}}}'.encode()


def short_body() -> bytes:
    return chat_body(0)


@contextmanager
def running(names: Sequence[str]) -> Iterator[list[Contender]]:
    """The contenders of these names, installed before, warmed up, and the upstream behind them, while the block runs."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        upstream = free_port()
        (folder / "facts.json").write_text(json.dumps(facts()))
        (folder / "rig.toml").write_text(
            "".join(f'[[gpu]]\nname = "{name}"\nfree = "{free}"\n' for name, _, free in (card.partition(":") for card in CARDS))
        )
        python_path = {"PYTHONPATH": str(ROOT)}

        def start(
            name: str, command: Sequence[str], environment: dict[str, str], port: int, path: str = "/api/chat"
        ) -> Contender:
            cores = OTHER_CORES if name == "direct" else PROXY_CORES
            log = folder / f"{name.replace(' ', '-')}.log"
            started = stack.enter_context(process(command, environment, cores, log))
            wait_until_up(started, port, path, log)
            return Contender(name=name, port=port, pid=None if name == "direct" else started.pid, path=path)

        def start_lopsided(name: str, transport: str) -> Contender:
            port = free_port()
            environment = {
                "LOPSIDED_HOST": f"127.0.0.1:{port}",
                "LOPSIDED_UPSTREAM": f"http://127.0.0.1:{upstream}",
                "LOPSIDED_PROFILE": str(folder / "rig.toml"),
                "LOPSIDED_STATE": str(folder / "state" / transport),
                "PYTHONPATH": str(ROOT),
            }
            if transport == "aiohttp":
                environment["PYTHONPATH"] += f":{AIOHTTP_FOLDER}"
            return start(name, [sys.executable, "-m", "benchmarks.proxy.lopsided", transport], environment, port)

        found = [
            start(
                "direct",
                [sys.executable, "-m", "benchmarks.proxy.upstream", str(upstream), str(folder / "facts.json")],
                python_path,
                upstream,
            )
        ]
        for name in names:
            port = free_port()
            if name == "nginx":
                text = (HERE / "nginx.conf").read_text()
                for word, value in (("FOLDER", str(folder)), ("UPSTREAM", str(upstream)), ("PORT", str(port))):
                    text = text.replace(word, value)
                (folder / "nginx.conf").write_text(text)
                arguments = ["-p", str(folder), "-c", str(folder / "nginx.conf"), "-g", "daemon off; master_process off;"]
                found.append(start(name, [nginx(), *arguments], {}, port))
            elif name == "naive":
                arguments = ["-m", "uvicorn", "benchmarks.proxy.naive:app", "--port", str(port), "--no-access-log"]
                environment = {**python_path, "UPSTREAM": f"http://127.0.0.1:{upstream}"}
                found.append(start(name, [sys.executable, *arguments, "--log-level", "warning"], environment, port))
            elif name == "litellm":
                (folder / "litellm.yaml").write_text(
                    f"model_list:\n- model_name: {MODEL!r}\n  litellm_params:\n    model: 'openai/{MODEL}'\n"
                    f"    api_base: http://127.0.0.1:{upstream}/v1\n    api_key: none\n"
                )
                arguments = ["--config", str(folder / "litellm.yaml"), "--host", "127.0.0.1", "--port", str(port)]
                environment = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR", "PYTHONUNBUFFERED": "1"}
                environment["LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY"] = "true"
                environment["PATH"] = f"{LITELLM_VENV / 'bin'}:{os.environ['PATH']}"
                command = [str(LITELLM_VENV / "bin" / "litellm"), *arguments]
                found.append(start(name, command, environment, port, "/v1/chat/completions"))
            elif name == "lopsided":
                found.append(start_lopsided(name, "own"))
            else:
                found.append(start_lopsided(name, name.removeprefix("lopsided, ")))
        check_injection(found)
        yield found


def check_injection(contenders: Sequence[Contender]) -> None:
    """Raises where lopsided does not put the plan into a request: then something else would be measured."""
    upstream = contenders[0]
    for contender in contenders:
        if contender.name.startswith("lopsided"):
            ask(contender.port, contender.path)
            with urllib.request.urlopen(f"http://127.0.0.1:{upstream.port}/bench/last") as answer:
                if b'"main_gpu"' not in answer.read():
                    raise RuntimeError(f"{contender.name} injects no plan")
