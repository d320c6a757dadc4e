"""What answers have told so far: rates of devices, speeds of placements, the usual turn of each model; kept in a state file.

Everything is bounded: the last answers of each placement, the placements used last. Another process may write the same file
(``lopsided calibrate`` beside the proxy): what is new there is read before anything is answered or written.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from math import isfinite
from statistics import median
from typing import Any, TypeVar

from planner.calibration import calibrate
from planner.hardware import Rig
from planner.observation import Observation, Run, model_key
from planner.placement import Placement
from planner.profile import ModelProfile
from planner.speed import Calibration
from planner.verdict import is_same
from proxy.statefile import StateFile

FILE_NAME = "measurements.json"

ANSWERS_KEPT = 16
"""Of each placement of each model: enough for a median, few enough to follow a card whose power limit was changed."""

TURNS_KEPT = 64
"""Of each model."""

LEAST_TURNS = 8
"""Turns of a model below which its usual one is not known."""

PLACEMENTS_KEPT = 256
"""Placements, and models, of which anything is kept; those that were used last."""

VERSION = 2

K = TypeVar("K")
V = TypeVar("V")


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where a model ran: its ``model_key``, the rig's UUIDs in order, its context, and its layers."""

    model: str
    gpus: tuple[str, ...]
    num_ctx: int
    placement: Placement

    @classmethod
    def of(cls, profile: ModelProfile, rig: Rig, num_ctx: int, placement: Placement) -> Place:
        """The place of ``profile`` on ``rig``."""
        return cls(model=model_key(profile), gpus=tuple(gpu.uuid for gpu in rig.gpus), num_ctx=num_ctx, placement=placement)


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """What one answer told. ``tokens_per_s`` is its speed as it would be with ``speed.CONTEXT_TOKENS`` in the context.

    ``turn`` is how many tokens of prompt were read (not those that the cache knew) and how many of answer were written.
    """

    place: Place
    observation: Observation
    tokens_per_s: float | None
    turn: tuple[float, float] | None = None


@dataclass(kw_only=True, slots=True)
class _Kept:
    runs: OrderedDict[Run, deque[Observation]] = field(default_factory=OrderedDict)
    speeds: OrderedDict[Place, deque[float]] = field(default_factory=OrderedDict)
    turns: OrderedDict[str, deque[tuple[float, float]]] = field(default_factory=OrderedDict)

    def add(self, measurement: Measurement) -> None:
        one = measurement.observation
        if one.decode_tokens or one.prompt_tokens:
            _append(self.runs, one.run, one, ANSWERS_KEPT)
        if measurement.tokens_per_s:
            _append(self.speeds, measurement.place, measurement.tokens_per_s, ANSWERS_KEPT)
        if measurement.turn:
            _append(self.turns, measurement.place.model, measurement.turn, TURNS_KEPT)


class Measurements:
    """All that was measured. Its methods may be called from any thread; those that block on the file say so."""

    def __init__(self, file: StateFile) -> None:
        self._file = file
        self._lock = threading.Lock()
        self._kept = _Kept()
        self._unsaved: list[Measurement] = []
        self._seen: tuple[int, int] | None = None
        self._known: dict[tuple[str, tuple[str, ...]], Calibration] = {}

    def add(self, measurement: Measurement) -> None:
        """Takes ``measurement`` in; :meth:`save` makes it last."""
        with self._lock:
            self._kept.add(measurement)
            self._unsaved.append(measurement)
            self._known.clear()

    def calibration(self, profile: ModelProfile, rig: Rig) -> Calibration:
        """The rates of ``rig``'s devices for ``profile``. May read the file."""
        return self._calibration(model_key(profile), bool(profile.expert_count), rig)

    def class_rates(self, rig: Rig) -> dict[str, Calibration]:
        """The rates for any model of a class: ``dense`` and ``experts``. May read the file."""
        return {name: self._calibration("", experts, rig) for name, experts in (("dense", False), ("experts", True))}

    def speeds(self, place: Place) -> tuple[float, ...]:
        """The last answers' tokens per second in ``place`` or one that is the same (``verdict.is_same``). May read the file."""
        with self._lock:
            self._refresh()
            found = [
                speeds
                for other, speeds in self._kept.speeds.items()
                if (other.model, other.gpus, other.num_ctx) == (place.model, place.gpus, place.num_ctx)
                and (other.placement == place.placement or is_same(other.placement, place.placement))
            ]
        return tuple(speed for speeds in found for speed in speeds)

    def turn(self, profile: ModelProfile) -> tuple[float, float] | None:
        """Tokens of prompt and answer of the usual turn with ``profile``, ``None`` while too few are known."""
        with self._lock:
            turns = self._kept.turns.get(model_key(profile), ())
            if len(turns) < LEAST_TURNS:
                return None
            return median(prompt for prompt, _ in turns), median(answer for _, answer in turns)

    def forget(self, place: Place) -> None:
        """Drops the speeds of ``place``, which are about to be measured anew."""
        with self._lock:
            self._refresh()
            self._kept.speeds.pop(place, None)
            self._unsaved = [one for one in self._unsaved if one.place != place]

    def save(self) -> None:
        """Writes what is new. Blocks on the file."""
        with self._lock:
            if not self._unsaved:
                return
            self._refresh()
            if self._file.write(to_json(self._kept)):
                self._unsaved.clear()
                self._seen = self._stamp()
            del self._unsaved[:-PLACEMENTS_KEPT]  # nowhere to write: it is kept in memory all the same

    def _calibration(self, model: str, experts: bool, rig: Rig) -> Calibration:
        key = (f"{model} {experts}", tuple(gpu.uuid for gpu in rig.gpus))
        with self._lock:
            self._refresh()
            if (known := self._known.get(key)) is not None:
                return known
            seen = [one for answers in self._kept.runs.values() for one in answers]
        found = calibrate(seen, rig, model=model, experts=experts)
        with self._lock:
            while len(self._known) >= PLACEMENTS_KEPT:
                self._known.pop(next(iter(self._known)))
            self._known[key] = found
        return found

    def _refresh(self) -> None:
        """Reads the file where another process has written it, and adds what is new here."""
        stamp = self._stamp()
        if stamp is None or stamp == self._seen:
            return
        self._seen = stamp
        value = self._file.read()
        try:
            kept = from_json(value)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            self._file.set_aside(f"{type(error).__name__}: {error}")
            return
        for measurement in self._unsaved:
            kept.add(measurement)
        self._kept = kept
        self._known.clear()

    def _stamp(self) -> tuple[int, int] | None:
        if self._file.path is None:
            return None
        try:
            seen = self._file.path.stat()
        except OSError:
            return None
        return seen.st_mtime_ns, seen.st_ino


def to_json(kept: _Kept) -> dict[str, Any]:
    """What the state file holds."""
    return {
        "version": VERSION,
        "runs": [
            asdict(run)
            | {"answers": [[one.reads, one.decode_tokens, one.decode_s, one.prompt_tokens, one.prompt_s] for one in answers]}
            for run, answers in kept.runs.items()
        ],
        "speeds": [
            {
                "model": place.model,
                "gpus": place.gpus,
                "num_ctx": place.num_ctx,
                "placement": asdict(place.placement) | {"cpu_experts": sorted(place.placement.cpu_experts)},
                "tokens_per_s": list(speeds),
            }
            for place, speeds in kept.speeds.items()
        ],
        "turns": {model: list(turns) for model, turns in kept.turns.items()},
    }


def from_json(value: Mapping[str, Any]) -> _Kept:
    """What ``to_json`` wrote; nothing of another version. Raises ``KeyError``, ``TypeError``, ``ValueError`` for the rest."""
    kept = _Kept()
    if not value or value["version"] != VERSION:
        return kept
    for row in value["runs"]:
        run = Run(
            model=_text(row["model"]),
            experts=bool(row["experts"]),
            devices=_texts(row["devices"]),
            layers=tuple(map(_count, row["layers"])),
            hops=_count(row["hops"]),
            flops=_numbers(row["flops"]),
            ubatch=_count(row["ubatch"]) or 1,
        )
        for reads, decode_tokens, decode_s, prompt_tokens, prompt_s in row["answers"]:
            one = Observation(
                run=run,
                reads=_numbers(reads),
                decode_tokens=_count(decode_tokens),
                decode_s=_number(decode_s),
                prompt_tokens=_count(prompt_tokens),
                prompt_s=_number(prompt_s),
            )
            if not len(one.reads) == len(run.devices) == len(run.layers) == len(run.flops or run.devices):
                raise ValueError(f"{len(run.devices)} devices, {len(one.reads)} numbers of bytes, {len(run.layers)} of layers")
            _append(kept.runs, run, one, ANSWERS_KEPT)
    for row in value["speeds"]:
        fields = row["placement"]
        placement = Placement(
            layers=tuple(map(_count, fields["layers"])),
            order=tuple(map(_count, fields["order"])),
            output_gpu=None if fields["output_gpu"] is None else _count(fields["output_gpu"]),
            cpu_layers=_count(fields["cpu_layers"]),
            cpu_experts=frozenset(map(_count, fields["cpu_experts"])),
        )
        place = Place(model=_text(row["model"]), gpus=_texts(row["gpus"]), num_ctx=_count(row["num_ctx"]), placement=placement)
        for speed in _numbers(row["tokens_per_s"]):
            _append(kept.speeds, place, speed, ANSWERS_KEPT)
    for model, turns in value["turns"].items():
        for prompt, answer in turns:
            _append(kept.turns, _text(model), (_number(prompt), _number(answer)), TURNS_KEPT)
    return kept


def _append(kept: OrderedDict[K, deque[V]], key: K, value: V, limit: int) -> None:
    kept.setdefault(key, deque(maxlen=limit)).append(value)
    kept.move_to_end(key)
    while len(kept) > PLACEMENTS_KEPT:
        kept.popitem(last=False)


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value) or value < 0:
        raise ValueError(f"{value!r} is no number from 0 up")
    return float(value)


def _numbers(values: Iterable[object]) -> tuple[float, ...]:
    return tuple(map(_number, values))


def _count(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{value!r} is no whole number from 0 up")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _texts(values: Iterable[object]) -> tuple[str, ...]:
    return tuple(map(_text, values))
