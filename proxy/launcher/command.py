"""``lopsided launcher install|remove|status``, and what Ollama's own environment must say for the launcher."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import click

from planner.hardware import Gpu
from proxy.config.settings import load_settings
from proxy.errors import GpuError, LauncherError
from proxy.gpus.nvml import NvmlSource
from proxy.gpus.order import DeviceOrder, in_ollama_order
from proxy.launcher.installation import SAYINGS, find_library, inspect, install, remove

WANTED = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "OLLAMA_SCHED_SPREAD": "1"}
"""What Ollama's own environment must say, so that the launcher sees every GPU under the number that NVML has for it."""


def ollama_process(library: Path, processes: Path = Path("/proc")) -> Path | None:
    """The folder, in ``processes``, of the ``ollama serve`` that, as far as can be told, has its libraries in ``library``.

    ``None`` where none runs.
    """
    for process in processes.glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
            if Path(os.fsdecode(words[0])).name != "ollama" or b"serve" not in words:
                continue
            folder = _library_of(process)
        except OSError:
            continue
        if not folder.is_dir() or folder.samefile(library):  # another installation of Ollama has other libraries
            return process
    return None


def ollama_environment(process: Path | None) -> dict[str, str] | None:
    """The environment of a process by its folder; ``None`` where there is none, or it may not be read."""
    try:
        entries = os.fsdecode((process / "environ").read_bytes()).split("\0") if process else None
    except OSError:
        return None
    return None if entries is None else dict(entry.split("=", 1) for entry in entries if "=" in entry)


def ollama_user(process: Path | None, library: Path) -> str | None:
    """Whom the Ollama of ``library`` runs as; ``None`` where that is not certain, or the user has no name."""
    try:
        return process.owner() if process and _library_of(process).samefile(library) else None
    except (OSError, KeyError):
        return None


def _library_of(process: Path) -> Path:
    return (process / "exe").resolve().parent.parent / "lib" / "ollama"


def hidden_cards_problem(environment: Mapping[str, str], gpus: Sequence[Gpu]) -> str | None:
    """Why ``CUDA_DEVICE_ORDER=PCI_BUS_ID`` must not be set, if a ``CUDA_VISIBLE_DEVICES`` of numbers would mean other cards."""
    visible = environment.get("CUDA_VISIBLE_DEVICES", "")
    numbers = any(entry.strip().isdecimal() for entry in visible.split(","))
    if not numbers or environment.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID":
        return None
    now = in_ollama_order(gpus, DeviceOrder(visible=visible))
    then = in_ollama_order(gpus, DeviceOrder(visible=visible, by_pci=True))
    if gpus and set(now) == set(then):
        return None
    return (
        f"Ollama has CUDA_VISIBLE_DEVICES={visible}, and with CUDA_DEVICE_ORDER=PCI_BUS_ID, which the launcher takes, these "
        "numbers may mean other cards: name the cards by UUID there (nvidia-smi -L lists them), restart Ollama, and try again"
    )


def missing_variables(environment: Mapping[str, str]) -> tuple[str, ...]:
    """What of ``WANTED`` Ollama's ``environment`` lacks, as ``NAME=value``."""
    return tuple(f"{name}={value}" for name, value in WANTED.items() if environment.get(name) != value)


lib_option = click.option(
    "--lib",
    "given",
    type=click.Path(path_type=Path),
    help="Ollama's library folder, the one with llama-server in it (default: it is looked for).",
)


@click.group("launcher")
def launcher_commands() -> None:
    """Split models exactly as planned.

    The launcher is a script in the place of Ollama's llama-server (Ollama 0.30 and later, Linux; docs/launcher.md).
    """


@launcher_commands.command("install")
@lib_option
@click.option("--url", help="Where Ollama reaches lopsided (default: LOPSIDED_HOST).")
@click.option("--user", help="The user that Ollama runs as (default: whom it runs as now, else ollama).")
def install_command(given: Path | None, url: str | None, user: str | None) -> None:
    """Put the launcher in llama-server's place.

    Ollama's own stays beside it as llama-server.stock.
    """
    settings = load_settings()
    library = find_library(given)
    process = ollama_process(library)
    environment = ollama_environment(process) or {}
    if problem := hidden_cards_problem(environment, _gpus()):
        raise LauncherError(problem)
    done = install(
        library, url=url or settings.host.connectable().url, token=settings.bearer, user=user or ollama_user(process, library)
    )
    click.echo(f"The launcher is in place in {library}; it asks {done.url}.")
    for line in override_text(missing_variables(environment)):
        click.echo(line)


@launcher_commands.command("remove")
@lib_option
def remove_command(given: Path | None) -> None:
    """Put Ollama's own llama-server back."""
    library = find_library(given)
    if (left := remove(library)).state == "none":
        click.echo(f"{library}: {SAYINGS[left.state]}")
        return
    click.echo(f"Ollama's own llama-server is in place in {library}.")
    click.echo(f"If you set {' and '.join(WANTED)} for the launcher, take them out of Ollama's environment.")


@launcher_commands.command("status")
@lib_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
def status_command(given: Path | None, as_json: bool) -> None:
    """Show whether it is in place.

    Looks into Ollama's library folder, and whether Ollama's environment suits the launcher.
    """
    found = inspect(find_library(given))
    environment = ollama_environment(ollama_process(found.library))
    missing = None if environment is None else missing_variables(environment)
    if as_json:
        click.echo(json.dumps({**asdict(found), "library": str(found.library), "environment_missing": missing}, indent=2))
        return
    click.echo(f"{found.library}: {SAYINGS[found.state]}")
    if found.state != "installed":
        return
    if not found.current:
        click.echo("It is another version's: install it again.")
    click.echo(
        f"It asks {found.url}." if found.url else "Where it asks is not written beside it: LOPSIDED_URL in Ollama's environment."
    )
    if missing is None:
        click.echo("Ollama's environment cannot be seen from here (not running, or another user's: try sudo).")
    for line in override_text(missing or ()):
        click.echo(line)


def override_text(missing: Sequence[str]) -> Iterator[str]:
    """What to tell a user whose Ollama lacks the variables ``missing``; nothing where it lacks none."""
    if not missing:
        return
    yield "Ollama needs this in its environment. Run  sudo systemctl edit ollama  and write:"
    yield "    [Service]"
    yield from (f'    Environment="{entry}"' for entry in missing)
    yield "then  sudo systemctl restart ollama"


def _gpus() -> tuple[Gpu, ...]:
    try:
        return NvmlSource(DeviceOrder()).rig().gpus
    except GpuError:
        return ()
