"""What the launcher adds to a start of llama-server: ``python benchmarks/launcher.py`` (docs/launcher.md has a run's figures).

``true`` stands for the real llama-server, and is started by itself and through the launcher in turns, so that what else the
machine does hits all alike; figures are what is above the median start without the launcher. *lopsided plans* is the whole
chain: a real proxy with a profile of two cards in NVML's place makes a plan for a 70B model anew at each start. The first one,
for which the model's header is read and its buffers are worked out, stands by itself. Ends with status 1 where a start that is
answered takes longer than the launcher's promise (the median).
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import httpx

from proxy.launcher.installation import CACHE, NAME, STOCK, shipped_launcher
from proxy.simulator.models import HEADERS, HERE, demo_models

LIMIT_MS = 20.0
"""What the launcher may add to a start where lopsided answers from the driver's figures."""

MODEL = "llama3.3:70b"
ANSWER = b"--device\nCUDA1,CUDA0\n--split-mode\nlayer\n--tensor-split\n19,46\n-ngl\n65\n--fit\noff\n"
PROFILE = '[[gpu]]\nname = "RTX 5090"\nfree = "31500MiB"\n[[gpu]]\nname = "RTX 3090"\nfree = "23700MiB"\n'
OLLAMA = """
import sys, uvicorn
from pathlib import Path
from proxy.gpus.static import StaticSource
from proxy.simulator import Simulator, create_app, demo_models
rig = StaticSource.from_file(Path(sys.argv[1])).rig()
uvicorn.run(create_app(Simulator(rig, demo_models([sys.argv[2]]))), port=int(sys.argv[3]), log_level="error")
"""
PROXY = """
from types import SimpleNamespace
from proxy import cli
read = cli.gpu_source
cli.gpu_source = lambda settings: SimpleNamespace(rig=read(settings).rig)
cli.main(["serve"], prog_name="lopsided")
"""
"""The command, with the profile's cards taken for NVML's, whose free memory is what is free now."""
START_S = 30.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One way to start: where lopsided is said to be, and what is to be done after each start."""

    name: str
    url: str | None
    answered: bool = False
    after: Callable[[], None] = lambda: None


def environment_with(url: str | None) -> dict[str, str]:
    """What Ollama gives llama-server, with lopsided at ``url``."""
    environment = {"PATH": os.environ["PATH"], "CUDA_VISIBLE_DEVICES": "0,1", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    return environment | {"OLLAMA_SCHED_SPREAD": "1", **({"LOPSIDED_URL": url} if url else {})}


def start_ms(program: Path, arguments: tuple[str, ...], url: str | None) -> float:
    """Milliseconds from the start to the end of one run."""
    environment = environment_with(url)
    quiet = [(os.POSIX_SPAWN_OPEN, number, os.devnull, os.O_RDWR, 0) for number in (0, 1, 2)]
    begin = time.perf_counter()
    child = os.posix_spawn(program, [str(program), *arguments], environment, file_actions=quiet)
    _, status = os.waitpid(child, 0)
    if status:
        raise SystemExit(f"{program} ended with status {status}")
    return (time.perf_counter() - begin) * 1e3


@contextmanager
def answering_at_once() -> Iterator[str]:
    """A server that says ``ANSWER`` to whatever it is asked."""
    listener = socket.create_server(("127.0.0.1", 0))
    reply = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(ANSWER) + ANSWER

    def serve() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            with client, client.makefile("rb") as request:
                length = 0
                while (line := request.readline().strip()) != b"":
                    name, _, value = line.partition(b":")
                    length = int(value) if name.lower() == b"content-length" else length
                request.read(length)
                client.sendall(reply)

    threading.Thread(target=serve, daemon=True).start()
    with listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def process(url: str, *command: str, **environment: str) -> Iterator[None]:
    """Runs Python with ``command`` until the block is left; goes on once ``url`` answers."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LOPSIDED_", "OLLAMA_"))}
    root = str(Path(__file__).parents[1])
    whole, silent = {**kept, "PYTHONPATH": root, **environment}, subprocess.DEVNULL
    with subprocess.Popen([sys.executable, *command], env=whole, stdout=silent, stderr=silent) as started:
        try:
            deadline = time.monotonic() + START_S
            while True:
                try:
                    httpx.get(url, trust_env=False)
                    break
                except httpx.TransportError:
                    if started.poll() is not None or time.monotonic() > deadline:
                        raise SystemExit(f"{command[-1]} did not start") from None
                    time.sleep(0.05)
            yield
        finally:
            started.terminate()


@contextmanager
def planning(folder: Path) -> Iterator[tuple[str, Callable[[], None]]]:
    """A proxy before a simulated Ollama: its URL, and what makes it see that the model was loaded and has gone."""
    profile = folder / "rig.toml"
    profile.write_text(PROFILE)
    ollama, url = (f"http://127.0.0.1:{free_port()}" for _ in range(2))
    settings = {
        "LOPSIDED_HOST": url.removeprefix("http://"),
        "LOPSIDED_UPSTREAM": ollama,
        "LOPSIDED_PROFILE": str(profile),
        "LOPSIDED_STATE": str(folder / "state"),
    }

    def seen() -> None:
        body = {"model": MODEL, "prompt": "x", "stream": False, "keep_alive": 0, "options": {"num_predict": 1}}
        httpx.post(url + "/api/generate", json=body, timeout=30, trust_env=False).raise_for_status()

    with (
        process(ollama, "-c", OLLAMA, str(profile), MODEL, ollama.rpartition(":")[2]),
        process(url + "/lopsided/health", "-c", PROXY, **settings),
    ):
        yield url, seen


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=100)
    rounds = parser.parse_args().rounds
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        library = folder / "ollama"
        (library / CACHE).mkdir(parents=True)
        shutil.copy2(shipped_launcher(), library / NAME)
        shutil.copy2(shutil.which("true") or "/bin/true", library / STOCK)
        blob = folder / Path(demo_models([MODEL])[0].blob_path).name
        blob.symlink_to(HERE / HEADERS[MODEL].file)
        arguments = ("--model", str(blob), "--port", "40967", "-c", "8192", "-np", "1", "-b", "512", "-ub", "512")
        url, seen = stack.enter_context(planning(folder))
        rows = (
            Row(name="no address set", url=None),
            Row(name="nobody listens", url=f"http://127.0.0.1:{free_port()}"),
            Row(name="answered at once", url=stack.enter_context(answering_at_once()), answered=True),
            Row(name="lopsided plans", url=url, answered=True, after=seen),
        )
        alone: list[float] = []
        taken: dict[str, list[float]] = {row.name: [] for row in rows}
        for _ in range(rounds + 1):
            alone.append(start_ms(library / STOCK, arguments, None))
            for row in rows:
                taken[row.name].append(start_ms(library / NAME, arguments, row.url))
                row.after()
        for row in rows:
            run = subprocess.run([library / NAME, *arguments], env=environment_with(row.url), capture_output=True, check=True)
            if run.stderr.startswith(b"lopsided: --device") != row.answered:
                raise SystemExit(f"{row.name}: the launcher says {run.stderr.decode().strip()}")
    version = subprocess.run(["bash", "-c", "echo $BASH_VERSION"], capture_output=True, text=True, check=True).stdout.strip()
    print(f"bash {version}, Python {platform.python_version()}, {os.cpu_count()} cores, {rounds} rounds\n")
    heads = ("least", "median", "9 of 10", "most", "first")
    print(f"{'the launcher adds, in ms':26}" + "".join(f"{head:>9}" for head in heads))
    medians = []
    for row in rows:
        first, *times = (took - statistics.median(alone) for took in taken[row.name])
        times.sort()
        figures = (times[0], statistics.median(times), times[int(0.9 * len(times))], times[-1], first)
        print(f"{row.name:26}" + "".join(f"{figure:9.1f}" for figure in figures))
        medians += [figures[1]] if row.answered else []
    if max(medians) > LIMIT_MS:
        raise SystemExit(f"an answered start takes longer than {LIMIT_MS:g} ms")


if __name__ == "__main__":
    main()
