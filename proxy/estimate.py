"""`lopsided estimate FILE`: the bytes on each device, as a table or as JSON, without loading anything."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from planner.memory import DeviceMemory, estimate_memory
from planner.placement import Placement, contiguous
from planner.profile import ModelProfile
from planner.quantization import CACHE_TYPE_NAMES
from planner.request import RUNTIME_BYTES
from planner.settings import LoadSettings
from planner.units import MIB
from proxy.errors import fitting_together
from proxy.models.gguf import read_profile
from proxy.tables import new_table

PARTS: Mapping[str, str] = {
    "weights_mib": "weights",
    "kv_mib": "KV / state",
    "compute_mib": "compute",
    "runtime_mib": "runtime",
    "total_mib": "total",
}
"""JSON keys of a device's parts, and what the table calls them."""

PLANS_MIB = RUNTIME_BYTES // MIB


def placement_of(n_layers: int, split: tuple[int, ...], *, cpu_experts: int = 0) -> Placement:
    """The placement that ``--split`` describes: layers of each device in order, the output layer counted as the last of them.

    Layers that are not counted, the lowest, stay on the CPU, as with ``-ngl``; an empty split is one device with everything.
    ``cpu_experts``: the routed experts of so many of the lowest layers stay in RAM. Raises ``ValueError`` for more layers than
    there are.
    """
    if sum(split) > n_layers + 1:
        raise ValueError(f"the split counts {sum(split)} layers, but the model has {n_layers} and the output layer")
    placement = contiguous(split or (n_layers + 1,), n_layers)
    experts = range(placement.cpu_layers, min(cpu_experts, n_layers))
    return replace(placement, cpu_experts=frozenset(experts))


def estimate_json(
    profile: ModelProfile, settings: LoadSettings, placement: Placement, *, runtime_bytes: int = 0
) -> dict[str, Any]:
    """What ``--json`` prints: MiB of each part on each device and on the host; the total includes the runtime."""
    runtimes = [runtime_bytes] * len(placement.layers)
    memory = estimate_memory(profile, settings, placement, runtime_bytes=runtimes)
    return {
        "devices": [{"name": f"GPU{i}", **_parts(device)} for i, device in enumerate(memory.devices)],
        "host": _parts(memory.host),
        "upper_bound": memory.upper_bound,
    }


def _parts(memory: DeviceMemory) -> dict[str, float]:
    sizes = (memory.weights_bytes, memory.kv_bytes, memory.compute_bytes, memory.runtime_bytes, memory.total_bytes)
    return dict(zip(PARTS, (round(size / MIB, 2) for size in sizes), strict=True))


def estimate_table(value: Mapping[str, Any]) -> Table:
    """The table of what ``estimate_json`` returned."""
    title = "At most, MiB (unknown architecture)" if value["upper_bound"] else "MiB"
    table = new_table("", *PARTS.values(), title=title, right=PARTS.values())
    for row in (*value["devices"], {"name": "host", **value["host"]}):
        table.add_row(row["name"], *(f"{row[key]:.0f}" for key in PARTS))
    return table


def parse_split(_context: click.Context, _parameter: click.Parameter, value: str | None) -> tuple[int, ...]:
    """``43,38`` -> ``(43, 38)``."""
    try:
        counts = tuple(int(part) for part in (value or "").split(",") if part.strip())
    except ValueError as error:
        raise click.BadParameter(f"{value!r} is not a list of layer counts such as 43,38") from error
    if any(count < 0 for count in counts):
        raise click.BadParameter("a number of layers cannot be negative")
    return counts


class Count(click.IntRange):
    """A whole number in a range; of ``8k`` click would say that it is no "integer range"."""

    name = "integer"


class ModelFile(click.Path):
    """A file that is there; for what may be a model's name in Ollama the error says who takes those."""

    name = "file"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path, as ``click.Path`` has it."""
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter as error:
            if Path(value).exists() or str(value).lower().endswith(".gguf"):
                raise
            self.fail(f"{error.message} For a model by its name in Ollama there is: lopsided plan {value}", param, ctx)


_TOKENS = Count(min=1)
_CACHE_TYPE = click.Choice(CACHE_TYPE_NAMES, case_sensitive=False)


@click.command("estimate")
@click.argument("file", type=ModelFile(exists=True, dir_okay=False, path_type=Path))
@click.option("--ctx", default=4096, show_default=True, type=_TOKENS, help="Context of one sequence, in tokens.")
@click.option("--batch", default=2048, show_default=True, type=_TOKENS, help="llama-server's -b.")
@click.option("--ubatch", default=512, show_default=True, type=_TOKENS, help="llama-server's -ub.")
@click.option("--kv-type-k", default="f16", show_default=True, type=_CACHE_TYPE)
@click.option("--kv-type-v", default="f16", show_default=True, type=_CACHE_TYPE)
@click.option("--parallel", default=1, show_default=True, type=_TOKENS, help="Sequences at a time.")
@click.option("--flash-attention/--no-flash-attention", default=True, show_default=True)
@click.option(
    "--split", callback=parse_split, metavar="N,N,...", help="Layers of each GPU, the output layer counted; the rest: CPU."
)
@click.option("--cpu-experts", default=0, type=Count(min=0), help="Lowest layers whose routed experts stay in RAM.")
@click.option(
    "--outputs", type=_TOKENS, help="Tokens with logits in a micro-batch: llama-server reserves 1 a sequence. [default: all]"
)
@click.option(
    "--runtime-mib",
    default=0,
    type=Count(min=0),
    help=f"CUDA context and workspaces of each GPU. [default: 0; plans: {PLANS_MIB}]",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def estimate_command(
    file: Path,
    ctx: int,
    batch: int,
    ubatch: int,
    kv_type_k: str,
    kv_type_v: str,
    parallel: int,
    flash_attention: bool,
    split: tuple[int, ...],
    cpu_experts: int,
    outputs: int | None,
    runtime_mib: int,
    as_json: bool,
) -> None:
    """Show the MiB on each device for a split of a GGUF FILE.

    Only the file's header is read. For a model by its name in Ollama there is `lopsided plan`.
    """
    profile = read_profile(file)
    settings = LoadSettings(
        num_ctx=ctx,
        parallel=parallel,
        batch=batch,
        ubatch=ubatch,
        kv_type_k=kv_type_k,
        kv_type_v=kv_type_v,
        flash_attention=flash_attention,
        outputs=outputs,
    )
    try:
        placement = placement_of(profile.n_layers, split, cpu_experts=cpu_experts)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    with fitting_together():
        value = estimate_json(profile, settings, placement, runtime_bytes=runtime_mib * MIB)
    if as_json:
        click.echo(json.dumps(value, indent=2))
    else:
        Console(soft_wrap=True).print(estimate_table(value))
        if not runtime_mib:
            click.echo(f"CUDA's own context on each GPU is not counted; lopsided plan counts it: --runtime-mib {PLANS_MIB}")
