"""Rigs that are written down: ``--gpu`` arguments and TOML profiles.

``--gpu "RTX 5090"`` takes a card from the table, ``--gpu "RTX 3090:22GiB"`` also says what is free on it. A profile can say more,
and can describe cards that are not in the table (then ``total`` is needed)::

    [[gpu]]
    name = "RTX 5090"
    free = "30GiB"                # default: the card's memory less the driver's reserve
    # total = "32GiB"             # this and all below: default from the table
    # compute_capability = "12.0"
    # sm_count = 170
    # clock_mhz = 2407
    # bandwidth = "1792GB"        # bytes per second
    # pcie_generation = 5
    # pcie_width = 16
    # uuid = "GPU-…"
    # library = "CUDA"
    # integrated = false

    [host]                        # default: this machine's RAM
    total = "64GiB"
    free = "48GiB"
    bandwidth = "60GB"

The cards stand in Ollama's device order.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveInt, ValidationError

from planner.hardware import Gpu, Host, Rig
from planner.units import GIB
from proxy.errors import GpuError
from proxy.gpus.host import read_host
from proxy.gpus.specs import Card, find_card, idle_free_bytes

UNNAMED = "profile-"
"""Begins what stands for the UUID of a profile's card where the profile says none."""

MOST_BYTES = 2**50
"""More than any card, host or second of a bus has."""

MOST_UNITS = 10**6
"""More SMs, MHz or lanes than any card has."""

MOST_GENERATION = 16
"""A PCIe generation that is far off; each doubles the rate."""

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_SIZE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*(?:([KMGT]i?)B)\s*$", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes of ``22GiB``, ``22528 MiB``, ``24GB``. Raises ``ValueError`` for anything else, a bare number too."""
    match = _SIZE.match(text)
    if not match:
        raise ValueError(f"{text!r} is no size: write 22GiB or 22528MiB (GB is 10^9 bytes)")
    size_bytes = float(match[1]) * _UNITS[match[2].upper()]
    if size_bytes > MOST_BYTES:
        raise ValueError(f"{text[:20]!r} is more than any card has")
    return round(size_bytes)


class StaticSource:
    """A rig that stays as it was written down."""

    def __init__(self, rig: Rig) -> None:
        self._rig = rig

    def rig(self) -> Rig:
        """The rig; the RAM of this machine is read anew where none was written down."""
        return self._rig if self._rig.host != Host() else Rig(gpus=self._rig.gpus, host=read_host())

    @classmethod
    def from_arguments(cls, arguments: Sequence[str]) -> StaticSource:
        """From the values of ``--gpu``, in Ollama's device order. Raises ``GpuError`` where one can't be understood."""
        return cls(Rig(gpus=tuple(_gpu(_argument(text), f"imagined-{index}") for index, text in enumerate(arguments))))

    @classmethod
    def from_file(cls, path: Path) -> StaticSource:
        """From a TOML profile. Raises ``GpuError``, naming the file and the entry, where it can't be understood."""
        try:
            return cls.from_profile(tomllib.loads(path.read_text(encoding="utf-8")))
        except OSError as error:
            raise GpuError(f"{path}: cannot be read: {error.strerror or error}") from error
        except GpuError as error:
            raise GpuError(f"{path}: {error}") from error
        except (ValueError, RecursionError) as error:  # TOMLDecodeError, and what int() and deep nesting raise
            raise GpuError(f"{path}: no TOML: {error}") from error

    @classmethod
    def from_profile(cls, profile: Mapping[str, Any]) -> StaticSource:
        """From a profile that is parsed already (a table of ``lopsided.toml``). Raises ``GpuError``."""
        try:
            parsed = _Profile.model_validate(dict(profile))
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part + 1 if isinstance(part, int) else part) for part in first["loc"])
            raise GpuError(f"{place}: {first['msg'].removeprefix('Value error, ')} (got {first['input']!r})") from None
        gpus = tuple(_gpu(entry, f"{UNNAMED}{index}-{_words(entry.name)}") for index, entry in enumerate(parsed.gpu))
        if len({gpu.uuid for gpu in gpus}) < len(gpus):
            raise GpuError("gpu: two cards have the same uuid")
        host = parsed.host
        return cls(Rig(gpus=gpus, host=Host(total_bytes=host.total, free_bytes=host.free, bandwidth_bytes_per_s=host.bandwidth)))


def _size(value: object) -> object:
    return parse_size(value) if isinstance(value, str) else value


def _capability(value: object) -> object:
    match = re.fullmatch(r"(\d+)\.(\d+)", value) if isinstance(value, str) else None
    if not match:
        raise ValueError('write the compute capability as text, like "8.6"')
    return int(match[1]), int(match[2])


Size = Annotated[PositiveInt, BeforeValidator(_size), Field(le=MOST_BYTES)]
Count = Annotated[PositiveInt, Field(le=MOST_UNITS)]


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _GpuEntry(_Entry):
    name: str
    free: Size | None = None
    total: Size | None = None
    compute_capability: Annotated[tuple[int, int], BeforeValidator(_capability)] | None = None
    sm_count: Count | None = None
    clock_mhz: Count | None = None
    bandwidth: Size | None = None
    pcie_generation: Annotated[PositiveInt, Field(le=MOST_GENERATION)] | None = None
    pcie_width: Count | None = None
    uuid: str | None = None
    library: str | None = None
    integrated: bool | None = None


class _HostEntry(_Entry):
    total: Size | None = None
    free: Size | None = None
    bandwidth: Size | None = None


class _Profile(_Entry):
    gpu: list[_GpuEntry] = Field(min_length=1)
    host: _HostEntry = _HostEntry()


def with_cards(rig: Rig, arguments: Sequence[str]) -> Rig:
    """``rig`` with more cards behind its own, each as ``--gpu`` takes it. Raises ``GpuError`` for one that is not known."""
    if not arguments:
        return rig
    added = StaticSource.from_arguments(arguments).rig().gpus
    return replace(rig, gpus=(*rig.gpus, *(replace(gpu, uuid=f"added-{i}") for i, gpu in enumerate(added))))


def _argument(text: str) -> _GpuEntry:
    if "," in text:
        raise GpuError(f"--gpu {text!r}: it takes one card; repeat it for more: --gpu {text.split(',')[0].strip()!r} --gpu …")
    name, colon, size = text.partition(":")
    try:
        return _GpuEntry(name=name.strip(), free=parse_size(size) if colon else None)
    except ValueError as error:
        raise GpuError(f"--gpu {text!r}: {error}") from None


def _words(name: str) -> str:
    return "-".join(re.findall(r"\w+", name.lower()))


def _gpu(entry: _GpuEntry, uuid: str) -> Gpu:
    """The card of ``entry``: what it says itself, the rest from the table; ``uuid`` where it says none.

    What was measured is kept by UUID, so that of a profile's card names it too: another card in its place is not taken for it,
    nor is a card of the command line, which nobody has measured.
    """
    try:
        card: Card | None = find_card(entry.name)
    except GpuError:
        if entry.total is None:
            raise
        card = None

    def fact(name: str, default: Any = None) -> Any:
        own = getattr(entry, name.removesuffix("_bytes_per_s").removesuffix("_bytes"))
        return own if own is not None else getattr(card, name, default)

    total_bytes = fact("total_bytes")
    free_bytes = entry.free if entry.free is not None else idle_free_bytes(total_bytes)
    if free_bytes > total_bytes:
        raise GpuError(f"{entry.name}: {free_bytes / GIB:.1f} GiB free are more than the card's {total_bytes / GIB:.1f}")
    return Gpu(
        uuid=entry.uuid or uuid,
        name=card.name if card else entry.name,
        total_bytes=total_bytes,
        free_bytes=free_bytes,
        compute_capability=fact("compute_capability"),
        sm_count=fact("sm_count"),
        clock_mhz=fact("clock_mhz"),
        bandwidth_bytes_per_s=fact("bandwidth_bytes_per_s"),
        pcie_generation=fact("pcie_generation"),
        pcie_width=fact("pcie_width"),
        integrated=fact("integrated", False),
        library=fact("library", "CUDA"),
    )
