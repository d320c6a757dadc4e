"""What is measured of one contender in one round: each function drives it for about a second and returns named figures."""

from __future__ import annotations

import asyncio
import re
import urllib.request
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from statistics import quantiles
from typing import Any

from benchmarks.proxy.contenders import Contender, chat_body, v1_body
from benchmarks.proxy.load import at_once, clients, close, in_turn, post, streams

Figures = dict[str, float]
Measure = Callable[[Contender], Coroutine[Any, Any, Figures]]

STREAMS = 32
SWEEP = (1, 8, 32, 128, 256)
IMAGE_BYTES = 10 * 2**20
UPLOAD_BYTES = 10 * 10**9
IDLE_CONNECTIONS = 1000
SAMPLE_S = 0.01
"""Between two looks at a contender's memory."""
SLOW = {"litellm": 20}
"""By how much the work of a round is cut for one that would take minutes."""


def request(contender: Contender, chunks: int = 0, every_us: int = 0, batch: int = 1) -> bytes:
    body = v1_body if contender.path.startswith("/v1") else chat_body
    return post(contender.path, body(chunks, every_us, batch))


def percentiles(values: Sequence[float]) -> tuple[float, float]:
    """The 50th and the 99th."""
    cuts = quantiles(values, n=100, method="inclusive")
    return cuts[49], cuts[98]


async def short(contender: Contender) -> Figures:
    """Short requests, one after the other."""
    (client,) = opened = await clients(contender.port, 1)
    ask, count = request(contender), 400 // SLOW.get(contender.name, 1)
    await in_turn(client, ask, 5)
    before = contender.cpu_s()
    p50, p99 = percentiles(await in_turn(client, ask, count))
    cpu_s = (contender.cpu_s() - before) / count
    close(opened)
    return {"short p50 us": p50 * 1e6, "short p99 us": p99 * 1e6, "short cpu us": cpu_s * 1e6}


async def paced(contender: Contender, count: int, every_us: int, chunks: int) -> Figures:
    """``count`` streams side by side, a chunk each ``every_us`` on average."""
    opened = await clients(contender.port, count)
    await at_once(opened, request(contender), 1)
    before = contender.cpu_s()
    _, answers = await streams(opened, request(contender, chunks, every_us), stamped=True, spread_s=0.05)
    cpu_s = contender.cpu_s() - before
    close(opened)
    late = [seconds for answer in answers for seconds in answer.late_s]
    if len(late) != count * chunks:
        raise RuntimeError(f"{contender.name}: {len(late)} of {count * chunks} chunks arrived")
    p50, p99 = percentiles(late)
    return {"chunk p50 us": p50 * 1e6, "chunk p99 us": p99 * 1e6, "cpu s per 100k chunks": cpu_s / (count * chunks) * 1e5}


async def streamed(contender: Contender) -> Figures:
    """32 streams of about 100 chunks a second each."""
    return await paced(contender, STREAMS, 10_000, 150 // min(SLOW.get(contender.name, 1), 3))


async def flooded(contender: Contender) -> Figures:
    """32 streams as fast as they go."""
    opened = await clients(contender.port, STREAMS)
    chunks, batch = 3200 // SLOW.get(contender.name, 1), 16
    seconds, _ = await streams(opened, request(contender, chunks, 0, batch), stamped=False)
    close(opened)
    return {"chunks per s": STREAMS * chunks / seconds}


async def crowd(contender: Contender) -> Figures:
    """32 clients with short requests, each one after the other."""
    opened = await clients(contender.port, STREAMS)
    each, ask = max(40 // SLOW.get(contender.name, 1), 2), request(contender)
    await at_once(opened, ask, 1)
    seconds, _ = await at_once(opened, ask, each)
    close(opened)
    return {"requests per s": STREAMS * each / seconds}


async def image(contender: Contender) -> Figures:
    """A request with 10 MiB of images."""
    opened = await clients(contender.port, 1)
    body = chat_body(0, more=f',"images":["{"iVBORw0KGgo" * (IMAGE_BYTES // 11)}"]')
    ask = post("/api/chat", body)
    times = sorted(await in_turn(opened[0], ask, 5))
    close(opened)
    return {"10 MiB body ms": times[2] * 1e3}


ROUND: Sequence[Measure] = (short, streamed, flooded, crowd, image)


def sweep_of(count: int) -> Sequence[Measure]:
    """``count`` clients: short requests as fast as they are answered, and streams of 20 chunks a second each."""

    async def requests(contender: Contender) -> Figures:
        opened = await clients(contender.port, count)
        ask = request(contender)
        await at_once(opened, ask, 1)
        seconds, times = await at_once(opened, ask, max(1000 // count, 4))
        close(opened)
        return {f"{count} requests per s": len(times) / seconds, f"{count} request p50 us": percentiles(times)[0] * 1e6}

    async def chunks(contender: Contender) -> Figures:
        found = await paced(contender, count, 50_000, 30)
        return {f"{count} {name}": value for name, value in found.items()}

    return requests, chunks


async def peak_mib(contender: Contender, work: Callable[[Contender], Coroutine[Any, Any, object]]) -> float:
    """Resident memory at most while ``work`` is done, beside what was there before."""
    await asyncio.sleep(0.5)
    before = peak = contender.memory_bytes()
    working = asyncio.create_task(work(contender))
    while not working.done():
        await asyncio.wait([working], timeout=SAMPLE_S)
        peak = max(peak, contender.memory_bytes())
    await working
    return (peak - before) / 2**20


async def many_streams(contender: Contender) -> None:
    """256 streams side by side."""
    await paced(contender, 256, 50_000, 40)


async def idle(contender: Contender) -> None:
    """1000 connections that stay open after a short request each."""
    opened = await clients(contender.port, IDLE_CONNECTIONS)
    await at_once(opened[:STREAMS], request(contender), 1)
    for client in opened[STREAMS:]:
        await client.ask(request(contender))
    close(opened)


async def upload(contender: Contender) -> None:
    """10 GB to ``/api/blobs``."""
    (client,) = opened = await clients(contender.port, 1)
    block = bytes(250_000)
    head = b"POST /api/blobs/sha256:0 HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: %d\r\n\r\n" % UPLOAD_BYTES
    await client.upload(head, block, UPLOAD_BYTES // len(block))
    close(opened)
    with await asyncio.to_thread(urllib.request.urlopen, f"http://127.0.0.1:{contender.port}/bench/received") as answer:
        received = int(answer.read())
    if received != UPLOAD_BYTES:
        raise RuntimeError(f"{contender.name}: {received} of {UPLOAD_BYTES} bytes arrived")


MEMORY: Mapping[str, Callable[[Contender], Coroutine[Any, Any, object]]] = {
    "256 streams": many_streams,
    "1000 idle connections": idle,
    "10 MiB body": image,
    "10 GB upload": upload,
}
"""What memory is looked at for, each in a process of its own: memory that was taken once is rarely given back."""

OLLAMA_ALONE = frozenset({"10 MiB body", "10 GB upload"})
"""Those that take Ollama's own endpoints."""


def machine() -> str:
    """The processor and the system, in general words."""
    names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return f"{len(names)} cores" + (f" ({names[0]})" if names else "")
