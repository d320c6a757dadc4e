"""``lopsided doctor``: what is seen of the GPUs and of Ollama, what is not, and what to do about it.

``look`` asks the world once; ``judge`` turns what it saw into findings and touches nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import httpx

from planner.hardware import Gpu, Rig
from planner.units import GIB
from proxy.address import Address
from proxy.config.rulefile import read_rules
from proxy.config.rules import matches
from proxy.config.settings import Settings, unknown_variables
from proxy.errors import GpuError, LauncherError, SettingsError
from proxy.gpus import GpuSource
from proxy.gpus.order import DeviceOrder
from proxy.launcher.installation import SAYINGS, Installation, find_library, inspect
from proxy.ollama.options import era_of
from proxy.plans.room import doubts

Level = Literal["ok", "warn", "fail"]

ASK_S = 3.0
"""Longest wait for an answer of Ollama's version or of the proxy's health, in seconds; both take milliseconds."""

OLDEST = (0, 11, 5)
"""The first Ollama whose placement is known: older ones plan by other rules."""

SHARED = ("num_parallel", "context_length", "kv_cache_type", "flash_attention", "sched_spread", "gpu_overhead_bytes")
"""Settings that Ollama has and does not tell: lopsided reads the same variables from its own environment."""

FACTS = ("compute_capability", "sm_count", "clock_mhz", "bandwidth_bytes_per_s")
"""What a prediction of a card's speed rests on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One line of the report; ``advice`` says what to do, and is empty where there is nothing to do."""

    level: Level
    subject: str
    text: str
    advice: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sight:
    """What was seen. ``None`` is what did not answer; ``upstream_problem`` and ``gpu_problem`` then say why."""

    settings: Settings
    order: DeviceOrder
    version: str | None = None
    upstream_problem: str = ""
    upstream_is_lopsided: bool = False
    models: int | None = None
    names: Sequence[str] | None = None
    listener: Literal["lopsided", "another program", "nobody"] = "nobody"
    rig: Rig | None = None
    gpu_problem: str = ""
    launcher: Installation | None = None
    answering: bool | None = None
    """Whether the launcher has asked the proxy that listens; ``None`` where that is not known."""


async def look(settings: Settings, order: DeviceOrder, source: GpuSource) -> Sight:
    """Asks Ollama, the proxy's own port and the GPUs, each once and for a few seconds at most."""
    facts: dict[str, Any] = {}
    async with httpx.AsyncClient(timeout=ASK_S, trust_env=False) as client:
        try:
            facts["upstream_is_lopsided"] = await _is_lopsided(client, settings.upstream)
            facts["version"] = str((await _json(client, settings.upstream, "/api/version"))["version"])
            names = [str(model["name"]) for model in (await _json(client, settings.upstream, "/api/tags"))["models"]]
            facts["models"], facts["names"] = len(names), names
        except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
            facts["upstream_problem"] = str(error) or type(error).__name__
        try:
            facts["listener"] = "lopsided" if await _is_lopsided(client, settings.host.connectable()) else "another program"
        except httpx.ConnectError:
            pass
        except httpx.HTTPError:
            facts["listener"] = "another program"
        if facts.get("listener") == "lopsided":
            with suppress(httpx.HTTPError, ValueError, KeyError, TypeError):  # it may want a token, or be older
                said = await _json(client, settings.host.connectable(), "/lopsided/launcher")
                facts["answering"] = said["state"] == "answering"
    try:
        facts["rig"] = source.rig()
    except GpuError as error:
        facts["gpu_problem"] = str(error)
    with suppress(LauncherError, OSError):  # Ollama may be elsewhere, or another user's
        facts["launcher"] = inspect(find_library())
    return Sight(settings=settings, order=order, **facts)


def judge(sight: Sight) -> tuple[Finding, ...]:
    """The findings, in the order of the way that a request takes: client, proxy, Ollama, GPUs."""
    return (*_proxy(sight), *_upstream(sight), *_launcher(sight), *_environment(sight), *_gpus(sight))


def judge_rules(path: Path, sight: Sight, environment: Mapping[str, str]) -> Iterator[Finding]:
    """What is wrong with the rules in the file ``path``, and with the names of variables.

    A file that is no TOML does not come this far: it is refused with the settings.
    """
    for line in unknown_variables(environment):
        yield Finding(level="warn", subject="settings", text=line, advice="Mend its name, or unset it")
    try:
        rules = read_rules(path)
    except SettingsError as error:
        advice = "Mend it: lopsided does not start with it, and one that runs keeps the rules of before"
        yield Finding(level="fail", subject="rules", text=str(error), advice=advice)
        return
    for text in dict.fromkeys(doubts(rules.each(), sight.rig)) if sight.rig else ():
        yield Finding(level="warn", subject="rules", text=f"{path}: {text}", advice="`lopsided devices` lists names and UUIDs")
    for name in rules.names() if sight.names is not None else ():
        if not any(matches(name, model) for model in sight.names or ()):
            text = f"{path}: {name!r} in priority or keep_together is no model that Ollama has"
            yield Finding(level="warn", subject="rules", text=text, advice="`ollama list` has the names; pull it, or take it out")
    if rules.by_name:
        count = len(rules.models)
        yield Finding(level="ok", subject="rules", text=f"{path}: rules for {count} pattern{'' if count == 1 else 's'} of models")


def _proxy(sight: Sight) -> Iterator[Finding]:
    url = sight.settings.host.connectable().url
    if sight.listener == "lopsided":
        text = f"lopsided listens at {url}"
        yield Finding(level="ok", subject="proxy", text=text, advice=f"Clients: OLLAMA_HOST={url}, for OpenAI's {url}/v1")
    elif sight.listener == "nobody":
        yield Finding(level="warn", subject="proxy", text=f"nobody listens at {url}", advice="Start it: lopsided serve")
    else:
        advice = "Choose another address: LOPSIDED_HOST=127.0.0.1:PORT lopsided serve"
        yield Finding(level="fail", subject="proxy", text=f"another program listens at {url}", advice=advice)


def _upstream(sight: Sight) -> Iterator[Finding]:
    url = sight.settings.upstream.url
    if sight.upstream_is_lopsided:
        advice = "Set LOPSIDED_UPSTREAM to the address of Ollama itself"
        yield Finding(level="fail", subject="Ollama", text=f"{url} is lopsided, so requests would go in a circle", advice=advice)
        return
    if sight.version is None:
        advice = "Is Ollama running, and is this its address? Set LOPSIDED_UPSTREAM=http://HOST:PORT if it is another"
        text = f"{url} does not answer as Ollama does ({sight.upstream_problem})"
        yield Finding(level="fail", subject="Ollama", text=text, advice=advice)
        return
    models = "" if sight.models is None else f", {sight.models} model{'' if sight.models == 1 else 's'}"
    numbers = tuple(int(part) for part in re.findall(r"\d+", sight.version)[:3])
    if numbers[:3] == (0, 0, 0) or not numbers:
        advice = "A build of your own? It is taken for the llama-server era"
        yield Finding(level="warn", subject="Ollama", text=f"version {sight.version} at {url}{models}", advice=advice)
    elif numbers < OLDEST:
        advice = f"Update Ollama: what versions before {'.'.join(map(str, OLDEST))} do with a model is not known here"
        yield Finding(level="warn", subject="Ollama", text=f"version {sight.version} at {url}{models}", advice=advice)
    elif era_of(sight.version) == "runner":
        advice = "Of the placement options this era follows num_gpu alone; 0.30 and later can be told the GPU"
        yield Finding(level="warn", subject="Ollama", text=f"version {sight.version} at {url}{models}, runner era", advice=advice)
    else:
        yield Finding(level="ok", subject="Ollama", text=f"version {sight.version} at {url}{models}, llama-server era")


def _launcher(sight: Sight) -> Iterator[Finding]:
    found = sight.launcher
    if found is None or found.state == "none":
        return
    again = "lopsided launcher install"
    if found.state == "absent":
        advice = f"With it models are split exactly as planned, on every endpoint: {again}"
        yield Finding(level="ok", subject="launcher", text="not installed: plans go out as request options", advice=advice)
    elif found.state == "installed":
        if found.current and sight.answering is False:
            advice = "It asks at the next load. If a load changes nothing, look for a line with lopsided: in Ollama's log"
            text = f"in {found.library}; it has not asked this lopsided, so plans go out as request options"
            yield Finding(level="ok", subject="launcher", text=text, advice=advice)
        elif found.current:
            yield Finding(level="ok", subject="launcher", text=f"in {found.library}")
        else:
            yield Finding(level="warn", subject="launcher", text=f"in {found.library}, another version's", advice=again)
    else:
        text = f"{SAYINGS[found.state]} ({found.library}); plans go out as request options"
        yield Finding(level="warn", subject="launcher", text=text, advice=again)


def _environment(sight: Sight) -> Iterator[Finding]:
    variables = {name: str(Settings.model_fields[name].validation_alias) for name in SHARED}
    values = {name: getattr(sight.settings, name) for name in SHARED if name in sight.settings.model_fields_set}
    given = [f"{variables[name]}={int(value) if isinstance(value, bool) else value or 0}" for name, value in values.items()]
    if given:
        advice = "They must be set alike where Ollama runs"
        yield Finding(level="ok", subject="settings", text=f"taken to be Ollama's too: {', '.join(given)}", advice=advice)
    else:
        advice = f"If Ollama's environment sets one of these, set it here too: {', '.join(variables.values())}"
        yield Finding(level="ok", subject="settings", text="Ollama is taken to run with its defaults", advice=advice)
    if sight.settings.sched_spread:
        text = "OLLAMA_SCHED_SPREAD is set: stock Ollama spreads every model over all GPUs"
        advice = "Unset it in Ollama's environment, unless a launcher stands in llama-server's place"
        yield Finding(level="warn", subject="spread", text=text, advice=advice)


def _gpus(sight: Sight) -> Iterator[Finding]:
    if sight.rig is None:
        advice = "Until then requests pass unchanged. A file can describe the cards instead: LOPSIDED_PROFILE (docs/settings.md)"
        yield Finding(level="fail", subject="GPUs", text=sight.gpu_problem, advice=advice)
        return
    gpus = sight.rig.gpus
    for index, gpu in enumerate(gpus):
        yield _card(index, gpu)
    if len(gpus) == 1:
        advice = "Requests pass unchanged; is another card hidden by CUDA_VISIBLE_DEVICES?"
        yield Finding(level="warn", subject="GPUs", text="one GPU: there is nothing to choose", advice=advice)
        return
    if len({gpu.name for gpu in gpus}) == 1:
        yield Finding(level="ok", subject="GPUs", text="all cards are alike: the plans will mostly be stock Ollama's")
    if sight.settings.profile:
        yield Finding(level="ok", subject="device order", text=f"as {sight.settings.profile} gives it")
    elif sight.order.names:
        yield Finding(level="ok", subject="device order", text="as LOPSIDED_DEVICE_ORDER gives it")
    elif sight.order.by_pci:
        advice = "It must be set in Ollama's environment too"
        yield Finding(level="ok", subject="device order", text="CUDA_DEVICE_ORDER=PCI_BUS_ID: by PCI id", advice=advice)
    else:
        text = "CUDA's order, fastest card first, is a guess"
        advice = "Set CUDA_DEVICE_ORDER=PCI_BUS_ID where Ollama runs and here, or name the cards in LOPSIDED_DEVICE_ORDER"
        yield Finding(level="warn", subject="device order", text=text, advice=advice)


def _card(index: int, gpu: Gpu) -> Finding:
    unknown = [name for name in FACTS if getattr(gpu, name) is None]
    text = f"{gpu.name}, {gpu.free_bytes / GIB:.1f} of {gpu.total_bytes / GIB:.1f} GiB free"
    if not unknown:
        return Finding(level="ok", subject=f"GPU {index}", text=text)
    advice = "Its speed is guessed; a profile can say what the driver does not (docs/settings.md)"
    return Finding(level="warn", subject=f"GPU {index}", text=f"{text}; unknown: {', '.join(unknown)}", advice=advice)


async def _is_lopsided(client: httpx.AsyncClient, address: Address) -> bool:
    answer = await client.get(address.url + "/lopsided/health")
    return answer.status_code == httpx.codes.OK and b'"lopsided"' in answer.content


async def _json(client: httpx.AsyncClient, address: Address, path: str) -> Any:
    answer = await client.get(address.url + path)
    if answer.status_code != httpx.codes.OK:
        raise ValueError(f"it answers {path} with status {answer.status_code}")
    return answer.json()
