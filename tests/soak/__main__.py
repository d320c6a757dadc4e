"""Runs a soak: ``python -m tests.soak --seconds 1800``. Ends with 1 where a promise of docs/reliability.md was broken.

A real ``lopsided serve`` stands between clients and a simulated Ollama whose connections a relay breaks. Watched from outside:
memory, open files, threads, and asyncio's tasks, which the process says on a signal.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import linear_regression

import httpx

from proxy.gpus.static import StaticSource
from proxy.simulator import Simulator, create_app, demo_models
from proxy.simulator.placement import Environment
from proxy.simulator.replies import DEFAULT_PIECES, Reply
from tests.proxy.processes import Served, lopsided_serve
from tests.servers import serve
from tests.soak.relay import Relay
from tests.soak.traffic import EMBEDDER, MODELS, Traffic

CARDS = ("RTX 5090:31500MiB", "RTX 3090:23700MiB")
TIME_SCALE = 0.02
"""Real seconds to a simulated one: an answer of 80 tokens takes 20 to 100 ms, a load some tenths of a second."""

GROWTH_BYTES = 8 * 2**20
"""Growth of resident memory over the second half that counts as flat: noise of the allocator is one or two MiB."""

WARM_S, WARM_BYTES = 120.0, 24 * 2**20
"""A run whose second half begins sooner still sees threads and large bodies for the first time: 16 MiB were seen."""

COUNT_TASKS = """
import asyncio, signal, sys
def say(*_):
    tasks = [task for task in list(asyncio.tasks._all_tasks) if not task.done()]
    print("TASKS", len(tasks), sorted(task.get_name() for task in tasks), flush=True)
signal.signal(signal.SIGUSR1, say)
"""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What the process has at a moment."""

    at_s: float
    rss_bytes: int
    files: int
    threads: int


def sample(pid: int, since: float) -> Sample:
    """From ``/proc``."""
    process = Path(f"/proc/{pid}")
    pages = int((process / "statm").read_text().split()[1])
    return Sample(
        at_s=time.monotonic() - since,
        rss_bytes=pages * os.sysconf("SC_PAGE_SIZE"),
        files=len(list((process / "fd").iterdir())),
        threads=len(list((process / "task").iterdir())),
    )


def echo(prompt) -> Reply:
    """The prompt, so that an answer to another one is seen, and the usual words."""
    return Reply(pieces=(*prompt.text.split(), *DEFAULT_PIECES))


async def soak(served: Served, relay: Relay, simulator: Simulator, seconds: float, requests_per_s: float) -> list[str]:
    """The whole run; returns what was broken, nothing where all is well."""
    pid = served.process.pid
    traffic = Traffic(served.url, seed=1, requests_per_s=requests_per_s, clients=24)
    async with httpx.AsyncClient(base_url=served.url, trust_env=False) as client:  # warm: modules loaded, a plan made
        for model in MODELS:
            await client.post("/api/generate", json={"model": model, "prompt": "x", "stream": False}, timeout=60)
    await asyncio.sleep(1)
    before, tasks_before = sample(pid, time.monotonic()), await tasks(served)
    since = time.monotonic()
    samples = [before]
    running = asyncio.create_task(traffic.run(seconds))
    last_restart = last_line = since
    while not running.done():
        await asyncio.wait((running,), timeout=min(max(seconds / 120, 0.5), 5))
        now = time.monotonic()
        samples.append(sample(pid, since))
        if now - last_restart > max(seconds / 40, 15) and now - since < seconds:
            last_restart = now
            for model in MODELS:
                if found := simulator.store.find(model):
                    call_in_server(simulator, simulator.scheduler.expire, found)
            await relay.restart()
        if now - last_line > 60:
            last_line = now
            print(f"  {now - since:5.0f} s  {traffic.sent} requests  {samples[-1].rss_bytes / 2**20:.1f} MiB", flush=True)
        relay.quiet = now - since >= seconds
    await running
    await asyncio.sleep(5)
    after, tasks_after = sample(pid, since), await tasks(served)
    return judge(traffic, relay, samples, before, after, tasks_before, tasks_after)


def call_in_server(simulator: Simulator, function, *arguments) -> None:
    """Runs ``function`` in the simulator's own event loop."""
    loop = simulator.loop  # type: ignore[attr-defined]  # set when it is served, below
    loop.call_soon_threadsafe(function, *arguments)


async def tasks(served: Served) -> tuple[int, str]:
    """How many tasks the process has, and their names."""
    seen = len(served.lines)
    served.process.send_signal(signal.SIGUSR1)
    for _ in range(100):
        await asyncio.sleep(0.05)
        for line in served.lines[seen:]:
            if line.startswith("TASKS"):
                _, count, names = line.split(" ", 2)
                return int(count), names.strip()
    raise RuntimeError("the process does not say its tasks")


def judge(traffic, relay, samples, before, after, tasks_before, tasks_after) -> list[str]:
    """Prints the figures."""
    total = {outcome: sum(n for (_, o), n in traffic.outcomes.items() if o == outcome) for outcome in OUTCOMES}
    half = [s for s in samples if s.at_s >= samples[-1].at_s / 2]
    slope, _ = linear_regression([s.at_s for s in half], [s.rss_bytes for s in half])
    growth = slope * (half[-1].at_s - half[0].at_s)
    print(f"\n{traffic.sent} requests in {samples[-1].at_s:.0f} s; {sum(relay.faults.values())} faults: ", end="")
    print(", ".join(f"{count} × {kind}" for kind, count in sorted(relay.faults.items())))
    print(", ".join(f"{count} {outcome}" for outcome, count in total.items()))
    for kind in sorted({kind for kind, _ in traffic.outcomes}):
        row = ", ".join(f"{traffic.outcomes[kind, o]} {o}" for o in OUTCOMES if traffic.outcomes[kind, o])
        print(f"  {kind}: {row}")
    print("errors: " + "; ".join(f"{count} × {text}" for text, count in traffic.errors.most_common(12)))
    mib = 2**20
    print(
        f"memory: {before.rss_bytes / mib:.1f} MiB after warming up, {max(s.rss_bytes for s in samples) / mib:.1f} at most, "
        f"{after.rss_bytes / mib:.1f} at the end; over the second half {growth / mib:+.2f} MiB ({slope * 3600 / mib:+.1f} MiB/h)"
    )
    kept = relay.open
    print(
        f"open files: {before.files} before, {max(s.files for s in samples)} at most, {after.files} at the end, "
        f"of them {kept} kept connections to the upstream; threads {before.threads} to {after.threads}; "
        f"tasks {tasks_before[0]} to {tasks_after[0]}"
    )
    broken = []
    if sum(total.values()) != traffic.sent:
        broken.append(f"{traffic.sent - sum(total.values())} requests are not accounted for")
    notes = dict(traffic.notes.most_common(5))
    broken.extend(f"{total[outcome]} {outcome}: {notes}" for outcome in ("wrong", "lost") if total[outcome])
    if growth > (GROWTH_BYTES if half[0].at_s >= WARM_S else WARM_BYTES):
        broken.append(f"memory grows: {growth / mib:.1f} MiB over the second half")
    if after.files - kept > before.files + 2:
        broken.append(f"open files grow: {before.files} to {after.files}, {kept} of them to the upstream")
    if tasks_after[0] > tasks_before[0]:
        broken.append(f"tasks are left: {tasks_after[1]}")
    return broken


OUTCOMES = ("answered", "error", "broken", "left", "wrong", "lost")


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=1800)
    parser.add_argument("--requests-per-s", type=float, default=25)
    parser.add_argument("--fault-rate", type=float, default=0.01, help="of each block of bytes that passes")
    arguments = parser.parse_args()
    simulator = Simulator(
        StaticSource.from_arguments(CARDS).rig(),
        [model for model in demo_models() if model.name in (*MODELS, EMBEDDER)],
        environment=Environment(keep_alive_s=30),
        time_scale=TIME_SCALE,
        speaker=echo,
    )
    with serve(_with_loop(simulator), backlog=512) as url, tempfile.TemporaryDirectory() as folder:
        host, _, port = url.removeprefix("http://").rpartition(":")

        async def run() -> list[str]:
            relay = Relay(host, int(port), seed=2, fault_rate=arguments.fault_rate)
            await relay.start()
            with lopsided_serve(f"http://127.0.0.1:{relay.port}", Path(folder), CARDS, prelude=COUNT_TASKS) as served:
                try:
                    broken = await soak(served, relay, simulator, arguments.seconds, arguments.requests_per_s)
                except BaseException:
                    print(served.text[-4000:], file=sys.stderr)
                    raise
                served.process.terminate()
                code = await asyncio.to_thread(served.process.wait, 60)
                if code != -signal.SIGTERM:  # uvicorn ends in good order, then by the signal that asked for it
                    broken.append(f"it ended with {code}")
                if "Traceback" in served.text:
                    broken.append("its log has a traceback: " + served.text[served.text.index("Traceback") :][:2000])
            await relay.stop()
            return broken

        broken = asyncio.run(run())
    for line in broken:
        print(f"BROKEN: {line}")
    print("the soak shows nothing wrong" if not broken else "the soak FAILED")
    return 1 if broken else 0


def _with_loop(simulator: Simulator):
    """The simulator's application, which notes the event loop that it runs in."""
    app = create_app(simulator)

    async def noting(scope, receive, send):
        simulator.loop = asyncio.get_running_loop()
        await app(scope, receive, send)

    return noting


if __name__ == "__main__":
    threading.current_thread().name = "soak"
    sys.exit(main())
