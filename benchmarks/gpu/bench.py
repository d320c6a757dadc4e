"""Stock Ollama beside Ollama behind lopsided, on two NVIDIA GPUs, case by case, against every split as the truth.

    python -m benchmarks.gpu.bench --ollama /usr/local/bin/ollama --models DIR --out rows.jsonl --hold 126

``--models`` is a folder with the GGUF files that ``cases.toml`` names; those of ``benchmarks.gpu.models`` are made there.
``--hold`` keeps so many SMs of the second GPU busy in each llama-server (``auto``: as many as the case's model takes), and each
case's ``free_mib`` is brought about by filling the rest: both take nvcc. ``--as-is`` leaves the GPUs as they are. With
``--cards 0.42`` one GPU alone stands for two cards (``cards.cpp``), the second with that part of its speed, each with the case's
memory. Cases that are ``equal`` show what becomes of two equal cards: they run without any of that, and not at all where nothing
makes the cards unequal.

What is most telling runs first: each GPU alone, then every case's stock, automatic plan and sweep, equal cards, and the boost
algorithm's layouts at last. What stands in ``--out`` is not run again. The tables are printed at the end, and at any time by
``python -m benchmarks.gpu.report``.
Ollama is started on ports of its own, with a store of its own; yours is not touched.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
import time
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice, product
from pathlib import Path
from typing import Any

from benchmarks.gpu.measure import complete, pci_ids, run_server, running, settled_mib, used_mib, wait_until_loaded
from benchmarks.gpu.models import LETTERS, SAMPLING, SHAPES, profile, write
from benchmarks.gpu.ollama import LIBRARY, clean_environment, get, lopsided, make_store, make_tree, post, process, unload
from benchmarks.gpu.report import report
from benchmarks.gpu.serverlog import last_load
from planner.hardware import Gpu
from planner.units import GIB, MIB
from proxy.errors import GpuError
from proxy.gpus.nvml import NvmlSource
from proxy.gpus.static import StaticSource

HERE = Path(__file__).parent
STOCK, BEHIND, PROXY = (f"http://127.0.0.1:{port}" for port in (21434, 21435, 21436))
WAYS = ("stock", "auto", "boost 1.0", "boost 1.75")
RUNS = 3
PROMPT_WORDS = 1850
ANSWER_TOKENS = 64
PASSAGE_WORDS = 400
TIMES = 4
"""How often what a case has in ``again`` is loaded."""
UNFILLED_MIB = (66000, 66000)
"""Of two cards that one GPU stands for, in cases that do not say it."""
STILL_S = 2.0
"""How long the GPUs must have been at rest before a case begins. After a model is unloaded, Ollama opens them a few times more,
for about a second each, to see that its memory is free again."""
SHARES = (0.39, 0.45)
"""What ``--hold auto`` leaves of the second GPU's decode rate, for each model anew: a hold slows small and sparse ones more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bench:
    """What one run has: the two installations, the models, and where rows go."""

    args: argparse.Namespace
    work: Path
    models: Path
    server: Path
    cases: dict[str, dict[str, Any]]
    done: list[tuple[str, str]]
    """Cases and ways, one for each row."""
    held: dict[str, int] = field(default_factory=dict)
    """SMs to hold for each model, as far as it was tried."""
    resting: list[float] = field(default_factory=used_mib)
    """MiB in use on each GPU before anything of this run's is."""
    idle: list[float] = field(default_factory=list)
    """The same while no model is loaded, and the GPUs are filled: as ``filled`` leaves it."""

    @property
    def server_environment(self) -> dict[str, str]:
        """What each llama-server needs, to hold the second GPU back."""
        environment = clean_environment() | {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
        if self.args.cards:
            environment |= {"LD_PRELOAD": str(self.work / "cards.so"), "CARDS": str(self.work / "cards.txt")}
        elif self.args.hold != "0":
            second = [*pci_ids(), "", ""][1]
            environment |= {"LD_PRELOAD": str(self.work / "hold.so"), "HOLD": f"{second}={self.work / 'hold.txt'}"}
        return environment

    @property
    def unequal(self) -> bool:
        """Whether something makes the cards unequal."""
        return bool(self.args.cards) or self.args.hold != "0"

    def hold(self, sms: int) -> None:
        """Lets every llama-server, one that runs too, keep so many SMs of the second GPU busy."""
        (part := self.work / "hold.part").write_text(f"{sms}\n")
        part.replace(self.work / "hold.txt")

    def sms(self, model: str) -> int:
        """How many SMs to hold for ``model``."""
        if self.args.hold != "auto":
            return int(self.args.hold)
        if model not in self.held:
            self.held[model] = tuned(self, model)
        return self.held[model]

    @property
    def pci(self) -> tuple[str, ...]:
        """The GPUs' PCI ids, as llama-server prints them."""
        return ids_of_cards(cards=bool(self.args.cards))

    def add(self, case: str, way: str, row: dict[str, Any]) -> None:
        """Appends a row and says it in a line."""
        row = {"case": case, "way": way, "model": self.cases[case]["model"], "num_ctx": self.cases[case]["num_ctx"]} | row
        row["held_sms"] = 0 if self.cases[case].get("equal") else self.sms(row["model"])
        if self.args.cards:  # what NVML says is of both together
            row["cards"] = self.args.cards
            row = {key: value for key, value in row.items() if not key.startswith(("used_mib", "free_mib"))}
        with self.args.out.open("a") as rows:
            rows.write(json.dumps(row) + "\n")
        self.done.append((case, way))
        said = [f"{row[key]:.1f} {key}" for key in ("decode", "prefill", "load_s") if row.get(key)]
        print(f"{time.strftime('%X')} {case:12} {way:12} {' '.join(said)} {row.get('error', '')[:300]}", flush=True)

    def todo(self, case: str, ways: Iterable[str]) -> list[str]:
        """Those of ``ways`` that are wanted and not yet done; one that stands there several times is done so often."""
        done = Counter(way for name, way in self.done if name == case)
        wanted = [way for way in ways if not self.args.ways or ("sweep" if way.startswith("sweep") else way) in self.args.ways]
        return [way for nth, way in enumerate(wanted) if wanted[:nth].count(way) >= done[way]]


@contextmanager
def filled(bench: Bench, case: dict[str, Any]) -> Iterator[None]:
    """GPUs with as much memory free as the case says, the second held back unless they are to be equal."""
    equal = case.get("equal", False)
    if bench.args.cards:
        free, share = case.get("free_mib", UNFILLED_MIB), 1.0 if equal else bench.args.cards
        (bench.work / "cards.txt").write_text(f"{free[0]} 1\n{free[1]} {share}\n")
        cards_profile(bench.work / "profile.toml", free, share)
        yield
        return
    if bench.args.hold != "0" and "model" in case:
        bench.hold(0 if equal else bench.sms(case["model"]))
    if used_mib():
        settled_mib(bench.resting, still_s=STILL_S)
    if bench.args.as_is or not used_mib():
        yield
        return
    # without anything to fill, too: a GPU that some process has opened answers at once
    leave = [str(word) for gpu, mib in enumerate(case.get("free_mib", (2**20, 2**20))) for word in (gpu, mib)]
    environment = clean_environment() | {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    with subprocess.Popen([str(bench.work / "fill"), *leave], stdout=subprocess.PIPE, env=environment) as fill:
        assert fill.stdout
        for _ in leave[::2]:
            fill.stdout.readline()
        bench.idle[:] = used_mib()
        try:
            yield
        finally:
            fill.kill()
            bench.idle.clear()


def split_arguments(split: str, device: str) -> list[str]:
    """llama-server's for ``slow,fast`` layers, lowest layers on the slow GPU, or ``fast>slow``, lowest on the fast one."""
    first, separator, second = split.partition(">") if ">" in split else split.partition(",")
    gpus = (0, 1) if separator == ">" else (1, 0)
    taken = [(f"{device}{gpu}", layers) for gpu, layers in zip(gpus, (first, second), strict=True) if layers != "0"]
    arguments = ["-ngl", str(sum(int(layers) for _, layers in taken)), "--fit", "off"]
    arguments += ["--device", ",".join(name for name, _ in taken)]
    if len(taken) == 1:
        return [*arguments, "--split-mode", "none", "--main-gpu", "0"]
    return [*arguments, "--tensor-split", ",".join(layers for _, layers in taken)]


def sweep(bench: Bench, name: str, way: str) -> None:
    """One split of the case on llama-server itself, with the batch that Ollama would take."""
    case = bench.cases[name]
    split = way.removeprefix("sweep ")
    batch = case.get("batch") or (2048 if case["num_ctx"] > 32768 else 1024 if case["num_ctx"] > 4096 else 512)
    arguments = ["-c", str(case["num_ctx"]), "-b", str(batch), "-ub", str(batch), "-np", "1", "--flash-attn", "auto"]
    arguments += split_arguments(split, bench.args.device)
    arguments += ["-t", str(case["threads"])] if "threads" in case else []
    row = run_server(
        str(bench.server),
        str(bench.models / f"{case['model']}.gguf"),
        arguments,
        environment=bench.server_environment,
        log_path=bench.work / f"{name}.{split}.log",
        runs=case.get("runs", RUNS),
        answer_tokens=case.get("answer_tokens", ANSWER_TOKENS),
        sampling=SAMPLING,
        idle=bench.idle,
    )
    bench.add(name, way, row)


def ask(url: str, model: str, num_ctx: int, prompt: str, tokens: int, threads: int | None = None) -> dict[str, Any]:
    """One answer of ``/api/generate``, whole."""
    options = {**SAMPLING, "num_ctx": num_ctx, "num_predict": tokens, **({"num_thread": threads} if threads else {})}
    return post(
        f"{url}/api/generate",
        {"model": model, "prompt": prompt, "raw": True, "stream": False, "keep_alive": "10m", "options": options},
    )


def passage() -> str:
    """Words of three letters, a token each for a model of embeddings, as many as a passage of a document has."""
    return " ".join("".join(word) for word in islice(product(LETTERS, repeat=3), PASSAGE_WORDS))


def embed(url: str, model: str, log: Path, bench: Bench) -> dict[str, Any]:
    """Loads a model of embeddings through ``url`` and asks it for a passage's, three times: a row of its own."""
    before, begin = used_mib(), log.stat().st_size
    body = {"model": model, "input": passage(), "keep_alive": "10m"}
    load_s = post(f"{url}/api/embed", body)["load_duration"] / 1e9
    answers = [post(f"{url}/api/embed", body) for _ in range(RUNS)]
    rates = [a["prompt_eval_count"] / (a["total_duration"] - a["load_duration"]) * 1e9 for a in answers]
    return {
        "model": model,
        "load_s": load_s,
        "prefill_runs": rates,
        "prefill": statistics.median(rates),
        "prompt_tokens": answers[-1]["prompt_eval_count"],
        "used_mib_after_runs": [now - then for now, then in zip(used_mib(), before, strict=True)],
        **said_by_server(log, begin, bench),
    }


def said_by_server(log: Path, begin: int, bench: Bench) -> dict[str, Any]:
    """What an Ollama's ``log`` says of the last load after the first ``begin`` bytes."""
    with log.open("rb") as file:
        file.seek(begin)
        text = file.read().decode(errors="replace")
    loaded = last_load(text, bench.pci)
    return {
        "order": loaded.order,
        "buffers_mib": loaded.buffers_mib,
        "fit_s": loaded.fit_s,
        "commands": [line for line in text.splitlines() if "starting llama-server" in line][-3:],
        "out_of_memory": text.count("out of memory"),
    }


def through_ollama(url: str, case: dict[str, Any], log: Path, bench: Bench) -> dict[str, Any]:
    """Loads the case's model through ``url`` and measures it; ``log`` is that Ollama's."""
    model, num_ctx, threads = case["model"], case["num_ctx"], case.get("threads")
    answer_tokens = case.get("answer_tokens", ANSWER_TOKENS)
    row: dict[str, Any] = {}
    begin = log.stat().st_size
    try:
        settled_mib(bench.idle)
        if "embeds" in case:
            row["embedding"] = embed(url, case["embeds"], log, bench)
        before, begin = used_mib(), log.stat().st_size
        row["load_s"] = ask(url, model, num_ctx, "one two", 4, threads)["load_duration"] / 1e9
        answers = []
        for run in range(case.get("runs", RUNS)):
            words = " ".join(f"{chr(97 + (run + i) % 26)}{chr(97 + i // 26 % 26)}" for i in range(PROMPT_WORDS))
            answers.append(ask(url, model, num_ctx, words, answer_tokens, threads))
            if (written := answers[-1].get("eval_count", 0)) < answer_tokens / 2:
                raise RuntimeError(f"an answer of {written} tokens, {answers[-1].get('done_reason') or 'not done'}")
        row["decode_runs"] = [a["eval_count"] / a["eval_duration"] * 1e9 for a in answers]
        row["prefill_runs"] = [a["prompt_eval_count"] / a["prompt_eval_duration"] * 1e9 for a in answers]
        row["prompt_tokens"] = answers[-1]["prompt_eval_count"]
        row["decode"], row["prefill"] = map(statistics.median, (row["decode_runs"], row["prefill_runs"]))
        row["used_mib_after_runs"] = [now - then for now, then in zip(used_mib(), before, strict=True)]
        row["loaded"] = [
            {key: entry[key] for key in ("name", "size", "size_vram", "context_length")}
            for entry in get(f"{url}/api/ps")["models"]
        ]
    except (RuntimeError, OSError, KeyError, ZeroDivisionError) as error:
        row["error"] = repr(error)
    return row | said_by_server(log, begin, bench)


def ids_of_cards(*, cards: bool) -> tuple[str, ...]:
    """The GPUs' PCI ids, or of two ``cards`` that the first stands for, as ``cards.cpp`` tells them apart."""
    ids = pci_ids()
    return tuple(f"{ids[0]}-v{card}" for card in (0, 1)) if cards and ids else ids


def held_share(out: Path) -> float:
    """What is left of the second GPU: its decode rate over the first's, by the rows where each ran a model alone; 1 without."""
    decode: dict[str, dict[bool, float]] = {}
    for row in map(json.loads, out.read_text().splitlines() if out.exists() else []):
        if row["case"].startswith("solo-") and "decode" in row:
            decode.setdefault(row["case"], {})[row["way"].startswith("sweep 0,")] = row["decode"]
    shares = [rates[False] / rates[True] for rates in decode.values() if len(rates) == 2]
    return statistics.median(shares) if shares else 1.0


def held_profile(path: Path, share: float) -> None:
    """The cards as they are now, the second with ``share`` of its power: no driver says that a card is held back."""
    try:
        gpus = NvmlSource().rig().gpus
    except GpuError:  # workers on this machine stand for them
        given = StaticSource.from_arguments(["RTX 5090:8GiB", "RTX 5090:8GiB"]).rig().gpus
        gpus = tuple(replace(gpu, library="RPC") for gpu in given)
    write_profile(path, gpus, share)


def cards_profile(path: Path, free_mib: Sequence[int], share: float) -> None:
    """The two cards that one GPU stands for, as ``cards.cpp`` makes them."""
    gpu = NvmlSource().rig().gpus[0]
    cards = (
        replace(gpu, uuid=f"{gpu.uuid}-{index}", total_bytes=(mib + 1024) * MIB, free_bytes=mib * MIB)
        for index, mib in enumerate(free_mib)
    )
    write_profile(path, tuple(cards), share)


def write_profile(path: Path, gpus: Sequence[Gpu], share: float) -> None:
    """A profile of ``gpus``, all but the first with ``share`` of their power."""
    lines = []
    for index, gpu in enumerate(gpus):
        part = share if index else 1.0
        lines += [
            "[[gpu]]",
            f'name = "{gpu.name}"',
            f'uuid = "{gpu.uuid}"',
            f'total = "{gpu.total_bytes // MIB}MiB"',
            f'free = "{gpu.free_bytes // MIB}MiB"',
            f'library = "{gpu.library}"',
        ]
        if gpu.compute_capability:
            lines.append('compute_capability = "{}.{}"'.format(*gpu.compute_capability))
        if gpu.sm_count and gpu.clock_mhz:
            lines += [f"sm_count = {max(round(gpu.sm_count * part), 1)}", f"clock_mhz = {gpu.clock_mhz}"]
        if gpu.bandwidth_bytes_per_s:
            lines.append(f'bandwidth = "{gpu.bandwidth_bytes_per_s * part / 1e9:.0f}GB"')
    path.write_text("\n".join(lines) + "\n")


def behind(bench: Bench, name: str, way: str) -> None:
    """One case through lopsided, tuned as ``way`` says."""
    case = bench.cases[name]
    environment = lopsided_environment(bench)
    equal = case.get("equal", False)
    if way != "auto":
        environment["OLLAMA_SCHED_COMPUTE_BOOST"] = way.removeprefix("boost ")
    if way != "auto" or equal:
        environment["LOPSIDED_STATE"] = "off"
    calibrated = way == "auto" and (equal or bench.args.calibrate) and used_mib()
    if not bench.args.cards and bench.unequal and not calibrated:
        settled_mib(bench.idle)
        held_profile(profile := bench.work / "profile.toml", 1.0 if equal else held_share(bench.args.out))
        environment["LOPSIDED_PROFILE"] = str(profile)
    log = bench.work / "lopsided.log"
    with process(lopsided(["serve"]), log=log, url=f"{PROXY}/lopsided/health", environment=environment):
        begin = log.stat().st_size
        times = []
        row: dict[str, Any] = {}
        if "embeds" not in case:
            for _ in range(3):
                started = time.monotonic()
                plan = get(f"{PROXY}/lopsided/plan?model={case['model']}&num_ctx={case['num_ctx']}")
                times.append(time.monotonic() - started)
            row = {"plan_s": times, "plan": plan["plan"], "stock_plan": plan["stock"]}
        row |= through_ollama(PROXY, case, bench.work / "behind.log", bench)
        row["models"] = get(f"{PROXY}/lopsided/models")
        unload(BEHIND)
        row["said"] = log.read_text(errors="replace")[begin:][-4000:]
    bench.add(name, way, row)


def lopsided_environment(bench: Bench) -> dict[str, str]:
    """For a lopsided in front of the Ollama that has the launcher; what it measures is kept from one start to the next."""
    return clean_environment() | {
        "LOPSIDED_HOST": PROXY.removeprefix("http://"),
        "LOPSIDED_UPSTREAM": BEHIND,
        "LOPSIDED_STATE": str(bench.work / "state"),
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        **({"LOPSIDED_PROFILE": str(bench.work / "profile.toml")} if bench.args.cards else {}),
    }


def calibrate(bench: Bench) -> None:
    """Measures the cards by ``lopsided calibrate``, once."""
    for model in bench.args.calibrate:
        if (done := bench.work / f"calibrated-{model}.json").exists():
            continue
        if bench.args.hold != "0":
            bench.hold(bench.sms(model))
        command = lopsided(["calibrate", model, "--json"])
        with (bench.work / "calibrate.log").open("ab") as log:
            result = subprocess.run(command, env=lopsided_environment(bench), stdout=subprocess.PIPE, stderr=log)
        print(f"{time.strftime('%X')} calibrate {model}: {result.stdout.decode()[:1500]}", flush=True)
        if result.returncode:
            print(f"lopsided calibrate {model} failed, --calibrate is off; see {log.name}", file=sys.stderr, flush=True)
            bench.args.calibrate = []
            return
        done.write_bytes(result.stdout)


def build_cards(work: Path) -> None:
    """``cards.so``, by any C++ compiler."""
    command = ["g++", "-O2", "-std=c++17", "-shared", "-fPIC", "-o", str(work / "cards.so"), str(HERE / "cards.cpp"), "-ldl"]
    subprocess.run(command, check=True)


def build_tools(work: Path) -> None:
    """``hold.so`` and ``fill``, by nvcc, where they are not there yet."""
    for name, more in (("hold.so", ["-shared", "-Xcompiler", "-fPIC"]), ("fill", [])):
        if not (work / name).exists():
            source = HERE / f"{name.removesuffix('.so')}.cu"
            subprocess.run(["nvcc", "-O2", "-arch=native", *more, "-o", str(work / name), str(source)], check=True)


def tuned(bench: Bench, name: str) -> int:
    """How many SMs to hold so that the second GPU decodes the model ``name`` at ``SHARES`` of its own rate, by trying.

    After a prompt as long as the cases' own: a hold slows attention most, and that grows with the context.
    """
    arguments = ["-c", "4096", "-b", "512", "-ub", "512", "-np", "1", "-ngl", "999", "--fit", "off", "--split-mode", "none"]
    arguments += ["--main-gpu", "0", "--device", f"{bench.args.device}1"]
    model, rates = str(bench.models / f"{name}.gguf"), {}
    bench.hold(0)
    with running(str(bench.server), model, arguments, environment=bench.server_environment, log_path=bench.work / "hold.log") as (
        port,
        process,
    ):
        wait_until_loaded(port, process)

        def rate(sms: int) -> float:
            bench.hold(sms)
            time.sleep(0.5)
            return complete(port, 0, timeout_s=20, n_predict=48, cache_prompt=True, **SAMPLING)["predicted_per_second"]

        rate(0)
        free = rate(0)
        low, high = 0, sms_of_second() or 132  # all of them would leave next to nothing
        sms = high - 6  # what two H200 needed
        while sms not in rates:
            try:
                rates[sms] = rate(sms) / free
            except (OSError, RuntimeError):
                rates[sms] = 0.0
            print(f"{name}, {sms} SMs held: {rates[sms]:.2f} of the GPU's decode rate of {free:.1f} tokens/s", flush=True)
            if SHARES[0] <= rates[sms] <= SHARES[1]:
                break
            low, high = (sms, high) if rates[sms] > SHARES[1] else (low, sms)
            sms = (low + high) // 2
    return min(rates, key=lambda sms: abs(rates[sms] - sum(SHARES) / 2))


def sms_of_second() -> int | None:
    """Multiprocessors of the second GPU."""
    try:
        return NvmlSource().rig().gpus[1].sm_count
    except (GpuError, IndexError):
        return None


def steps(bench: Bench) -> Iterator[tuple[str, list[str]]]:
    """A case and the ways that are still to be run, what is most telling first; the same way again where single loads differ."""
    cases = {name: case for name, case in bench.cases.items() if bench.unequal or not case.get("equal")}
    for equal in (False, True):
        for name, case in cases.items():
            if bool(case.get("equal")) is equal:
                ways = [way for way in WAYS[:2] if way in case.get("ways", WAYS)]
                ways += [f"sweep {split}" for split in case["sweep"]]
                yield name, bench.todo(name, ways + case.get("again", []) * (TIMES - 1))
    for name, case in cases.items():
        yield name, bench.todo(name, [way for way in WAYS[2:] if way in case.get("ways", WAYS)])


def measure(bench: Bench, name: str, way: str) -> None:
    """One case, one way; what Ollama or lopsided cannot do here is said, to be run again."""
    if way.startswith("sweep"):
        sweep(bench, name, way)
        return
    try:
        if way == "stock":
            row = through_ollama(STOCK, bench.cases[name], bench.work / "stock.log", bench)
            unload(STOCK)
            bench.add(name, way, row)
        else:
            behind(bench, name, way)
    except (RuntimeError, OSError) as error:
        print(f"{name} {way}: {error}", file=sys.stderr, flush=True)


def run(bench: Bench) -> None:
    """Every case, every way."""
    ollama_environment = bench.server_environment | {
        "OLLAMA_MODELS": str(bench.work / "store"),
        "OLLAMA_NOPRUNE": "1",
        "OLLAMA_DEBUG": "1",
        "HOME": str(bench.work),
    }
    with ExitStack() as running:
        servers: list[tuple[str, str, dict[str, str]]] = [
            ("stock", STOCK, {}),
            ("behind", BEHIND, {"OLLAMA_SCHED_SPREAD": "1", "LOPSIDED_URL": PROXY}),
        ]
        for tree, url, more in servers:
            environment = ollama_environment | more | {"OLLAMA_HOST": url.removeprefix("http://")}
            command = [str(bench.work / tree / "bin" / "ollama"), "serve"]
            log = bench.work / f"{tree}.log"
            running.enter_context(process(command, log=log, url=f"{url}/api/version", environment=environment))
        with filled(bench, {}):
            calibrate(bench)
        for name in ("stock", "behind"):  # what it thinks of the GPUs decides on flash attention
            found = re.findall(r'msg="inference compute".*', (bench.work / f"{name}.log").read_text(errors="replace"))
            print(*found[-2:], sep="\n", flush=True)
        for name, ways in steps(bench):
            if ways:
                with filled(bench, bench.cases[name]):
                    for way in ways:
                        measure(bench, name, way)


def obstacles(args: argparse.Namespace, models: Iterable[str]) -> Iterator[str]:
    """What is missing here for a run with ``args`` and ``models``, in words."""
    server = args.ollama.resolve().parent.parent / LIBRARY / "llama-server"
    if not args.ollama.is_file():
        yield f"there is no Ollama at {args.ollama}: name its binary by --ollama"
    elif not server.is_file():
        yield f"there is no {server}: --ollama needs an installation of Ollama 0.30 or newer, not its binary alone"
    needed = 1 if args.cards else 2
    if args.device == "CUDA" and (found := len(pci_ids())) < needed:
        yield f"NVIDIA's driver shows {found} GPUs, {needed} are needed" + ("" if needed == 1 else " (--cards takes one)")
    elif args.device == "CUDA" and not args.cards and (args.hold != "0" or not args.as_is):
        built = all((args.work / tool).exists() for tool in ("fill", "hold.so"))
        if not built and not shutil.which("nvcc"):
            yield "there is no nvcc, which --hold and the cases' free memory need (--as-is does without)"
    if args.cards and not shutil.which("g++"):
        yield "there is no g++, which --cards needs"
    missing = [name for name in models if not (args.models / f"{name}.gguf").exists()]
    if unknown := sorted(set(missing) - SHAPES.keys()):
        yield f"{args.models} lacks {', '.join(unknown)}, which cannot be written here"
    needed_bytes = sum(profile(name).file_bytes for name in missing if name in SHAPES)
    folder = next(folder for folder in (args.models, *args.models.resolve().parents) if folder.exists())
    if needed_bytes > (free := shutil.disk_usage(folder).free):
        yield f"the models take {needed_bytes / GIB:.0f} GiB, {free / GIB:.0f} are free in {folder}: name another by --models"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ollama", type=Path, default=Path("/usr/local/bin/ollama"), help="Ollama's binary, 0.30 or newer")
    parser.add_argument(
        "--models", type=Path, default=Path(".cache/bench-gpu/models"), help="NAME.gguf of each case; written if missing"
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, appended to")
    parser.add_argument("--work", type=Path, default=Path(".cache/bench-gpu"), help="for logs, tools and Ollama's store")
    parser.add_argument("--cases", type=Path, default=HERE / "cases.toml")
    parser.add_argument("--only", nargs="*", default=[], help="these cases")
    parser.add_argument("--ways", nargs="*", default=[], help=f"these of {', '.join(WAYS)}, sweep")
    parser.add_argument("--hold", default="0", metavar="SMS", help="SMs of the second GPU to keep busy, or auto")
    parser.add_argument("--cards", type=float, default=0.0, metavar="SHARE", help="two cards of one GPU, the second so fast")
    parser.add_argument("--as-is", action="store_true", help="leave the GPUs' memory as it is")
    parser.add_argument("--calibrate", nargs="*", default=[], metavar="MODEL", help="measure the cards with these models first")
    parser.add_argument("--device", default="CUDA", help="what llama-server calls the GPUs, without the number")
    args = parser.parse_args()
    work = args.work.resolve()
    cases = {name: case for name, case in tomllib.loads(args.cases.read_text()).items() if not args.only or name in args.only}
    models = {name for case in cases.values() for name in (case["model"], case.get("embeds")) if name} | {*args.calibrate}
    if problems := list(obstacles(args, models)):
        print(*(f"bench-gpu: {problem}" for problem in problems), sep="\n", file=sys.stderr)
        return 2
    work.mkdir(parents=True, exist_ok=True)
    for name in sorted(models & SHAPES.keys()):
        if not (file := args.models / f"{name}.gguf").exists():
            print(f"writing {file}", flush=True)
            write(file, name)
    make_store(work / "store", {name: args.models.resolve() / f"{name}.gguf" for name in models})
    make_tree(work / "stock", args.ollama)
    library = make_tree(work / "behind", args.ollama)
    subprocess.run(
        lopsided(["launcher", "install", "--lib", str(library), "--url", PROXY]), check=True, stdout=subprocess.DEVNULL
    )
    if args.cards:
        build_cards(work)
    elif (args.hold != "0" or not args.as_is) and used_mib():
        build_tools(work)
    rows = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    bench = Bench(
        args=args,
        work=work,
        models=args.models.resolve(),
        server=args.ollama.resolve().parent.parent / "lib/ollama/llama-server",
        cases=cases,
        done=[(row["case"], row["way"]) for row in rows],
        held={row["model"]: row["held_sms"] for row in rows if row["held_sms"]},
    )
    run(bench)
    print(report(args.out, args.cases))
    return 0


if __name__ == "__main__":
    sys.exit(main())
