"""Load a model in llama-server at given placements; record MiB per device and decode and prefill rates, one JSON line each.

    python -m benchmarks.gpu.measure --server llama-server --model 32b.gguf --out rows.jsonl \
        --case 'solo0:--device CUDA0 --split-mode none' --case 'split:--device CUDA1,CUDA0 --tensor-split 20,45'

A case that stands in the output file already is not run again. ``--preload LIB`` and ``--env NAME=VALUE`` reach the server
(to hold a card back).
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pynvml

from benchmarks.gpu.ollama import post
from benchmarks.gpu.serverlog import last_load

LOAD_TIMEOUT_S = 240
PROMPT_TOKENS = 2048
DECODE_TOKENS = 96
SAMPLING = {"temperature": 1.0}


def _gpus() -> list[Any]:
    """NVML's handles, by PCI id; an empty list without NVIDIA's driver."""
    try:
        pynvml.nvmlInit()
        return [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError:
        return []


def pci_ids() -> tuple[str, ...]:
    """The GPUs' PCI ids as CUDA writes them, with a domain of four digits."""
    found = (pynvml.nvmlDeviceGetPciInfo(gpu).busId for gpu in _gpus())
    return tuple((name.decode() if isinstance(name, bytes) else str(name)).lower()[-12:] for name in found)


def used_mib() -> list[float]:
    """MiB in use on each GPU."""
    return [pynvml.nvmlDeviceGetMemoryInfo(gpu).used / 2**20 for gpu in _gpus()]


def settled_mib(idle: Sequence[float], patience_s: float = 15.0, still_s: float = 0.0) -> list[float]:
    """``used_mib``, once no GPU has more in use than when it was ``idle``: what has ended frees memory a little later.

    It must have been so for ``still_s``. ``patience_s`` is how long it is waited for at most.
    """
    begun = busy = time.monotonic()
    while True:
        used, now = used_mib(), time.monotonic()
        if any(mib > then + 32 for mib, then in zip(used, idle, strict=False)):
            busy = now
        elif now - busy >= still_s:
            return used
        if now - begun > patience_s:
            return used
        time.sleep(0.1)


def complete(port: int, run: int, *, timeout_s: float = 300, **options: object) -> dict[str, float]:
    """The timings of one answer to ``prompt(run)``. Raises ``OSError`` or ``RuntimeError`` where there is none."""
    body = {"prompt": prompt(run), "ignore_eos": True, **options}
    return post(f"http://127.0.0.1:{port}/completion", body, timeout_s)["timings"]  # type: ignore[no-any-return]


def wait_until_loaded(port: int, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + LOAD_TIMEOUT_S
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
                return
        except OSError:
            time.sleep(0.1)
    raise RuntimeError("the server ended or did not load in time")


@contextmanager
def running(
    server: str, model: str, arguments: Sequence[str], *, environment: Mapping[str, str], log_path: Path
) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """A llama-server until the block ends, by its port; it need not have loaded yet."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [server, "--model", model, "--port", str(port), "--host", "127.0.0.1", "--offline", "--no-webui"]
    command += ["--log-verbosity", "4", *arguments]
    with log_path.open("wb") as log, subprocess.Popen(command, env=dict(environment), stdout=log, stderr=log) as process:
        try:
            yield port, process
        finally:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(20)
            process.kill()


def prompt(run: int) -> list[int]:
    """Of 2048 tokens, different in each run."""
    return [1000 + (7 * run + 13 * i) % 20000 for i in range(PROMPT_TOKENS)]


def rates(port: int, runs: int, answer_tokens: int, sampling: Mapping[str, float]) -> dict[str, object]:
    """Medians of ``runs`` runs: a prompt of 2048 tokens, then the answer, none of it from the prompt cache."""
    decode, prefill = [], []
    for run in range(runs):
        timings = complete(port, run, n_predict=answer_tokens, cache_prompt=False, **sampling)
        decode.append(timings["predicted_per_second"])
        prefill.append(timings["prompt_per_second"])
    return {
        "decode": statistics.median(decode),
        "prefill": statistics.median(prefill),
        "decode_runs": decode,
        "prefill_runs": prefill,
    }


def run_server(
    server: str,
    model: str,
    arguments: list[str],
    *,
    environment: Mapping[str, str],
    log_path: Path,
    runs: int = 3,
    answer_tokens: int = DECODE_TOKENS,
    sampling: Mapping[str, float] = SAMPLING,
    idle: Sequence[float] = (),
) -> dict[str, object]:
    """Starts llama-server with ``arguments``, measures it and ends it: one row. ``idle`` as in ``settled_mib``."""
    row: dict[str, object] = {"args": arguments}
    before = settled_mib(idle)
    started = time.monotonic()
    with running(server, model, arguments, environment=environment, log_path=log_path) as (port, process):
        try:
            wait_until_loaded(port, process)
            row["load_s"] = time.monotonic() - started
            row["used_mib_after_load"] = [now - then for now, then in zip(used_mib(), before, strict=True)]
            row |= rates(port, runs, answer_tokens, sampling)
            row["used_mib_after_runs"] = [now - then for now, then in zip(used_mib(), before, strict=True)]
        except (RuntimeError, OSError, KeyError) as error:
            row["error"] = repr(error)
    log_text = log_path.read_text(errors="replace")
    loaded = last_load(log_text)
    row |= {"order": loaded.order, "buffers_mib": loaded.buffers_mib}
    if "error" in row:
        row["out_of_memory"] = log_text.count("out of memory")
        row["log_tail"] = log_text[-1500:]
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", default="llama-server")
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", required=True, help="JSON lines, appended to")
    parser.add_argument("--case", action="append", default=[], help="NAME:ARGUMENTS of llama-server", required=True)
    parser.add_argument("--args", default="-c 4096 -b 512 -ub 512", help="arguments of every case")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--env", action="append", default=[])
    parser.add_argument("--preload", default="")
    args = parser.parse_args()
    out = Path(args.out)
    done = {json.loads(line)["case"] for line in out.read_text().splitlines()} if out.exists() else set()
    failed = 0
    for case in args.case:
        name, _, placement = case.partition(":")
        if name in done:
            continue
        arguments = ["-np", "1", "--flash-attn", "on", "--fit", "off", "-ngl", "999"]
        arguments += [*shlex.split(args.args), *shlex.split(placement)]
        environment = os.environ | dict(pair.split("=", 1) for pair in args.env)
        if args.preload:
            environment["LD_PRELOAD"] = args.preload
        log_path = Path(f"{args.out}.{name}.log")
        row = {"case": name, "model": Path(args.model).stem, "env": args.env}
        row |= run_server(args.server, args.model, arguments, environment=environment, log_path=log_path, runs=args.runs)
        with out.open("a") as rows:
            rows.write(json.dumps(row) + "\n")
        failed += "error" in row
        summary = {
            key: row.get(key) for key in ("case", "decode", "prefill", "load_s", "buffers_mib", "used_mib_after_runs", "error")
        }
        print(json.dumps(summary), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
