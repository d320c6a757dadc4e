"""The options of a request: which there are, of what type, and which of them make Ollama load a model again.

Names and types are those of ``api.Options`` (``api/types.go``); a wrong type gives the recorded error, an unknown name is
ignored. ``Runner`` options belong to the load, the rest to one answer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from planner.request import Era

_TYPES = (
    dict.fromkeys(
        (
            "num_ctx",
            "num_batch",
            "num_gpu",
            "main_gpu",
            "num_thread",
            "num_keep",
            "seed",
            "num_predict",
            "top_k",
            "repeat_last_n",
        ),
        "integer",
    )
    | {"draft_num_predict": "integer", "use_mmap": "boolean", "stop": "array"}
    | dict.fromkeys(
        ("top_p", "min_p", "typical_p", "temperature", "repeat_penalty", "presence_penalty", "frequency_penalty"), "float32"
    )
)

NO_KEEP_ALIVE_END_S = float("inf")
DEFAULT_KEEP_ALIVE_S = 300.0
"""Seconds a model stays loaded after its last answer (``OLLAMA_KEEP_ALIVE``, 5m)."""
_UNIT_S = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_DURATION = re.compile(r"[+-]?(?:(?:\d+\.?\d*|\.\d+)(?:ns|us|µs|ms|s|m|h))+|[+-]?0")
_DURATION_PART = re.compile(r"(\d+\.?\d*|\.\d+)(ns|us|µs|ms|s|m|h)")


class OptionError(ValueError):
    """An option has a value of the wrong type; the text is Ollama's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunnerOptions:
    """What a load is made with. ``None`` (``num_gpu``: −1) leaves the choice to Ollama.

    ``tensor_split`` is no option of Ollama's; forks that know it are simulated with ``Environment.honours_tensor_split``.
    """

    num_ctx: int | None = None
    num_batch: int | None = None
    num_gpu: int = -1
    main_gpu: int | None = None
    use_mmap: bool | None = None
    num_thread: int | None = None
    draft_num_predict: int | None = None
    tensor_split: str | None = None
    shift: bool = True
    """Not an option but a field of the request; it became a flag of the runner's with 0.30."""

    def for_era(self, era: Era) -> RunnerOptions:
        """As the era's struct holds them: before 0.30 ``main_gpu`` was a plain integer, so absent is 0."""
        return replace(self, main_gpu=self.main_gpu or 0, shift=True) if era == "runner" else self


def parse_options(given: Mapping[str, Any] | None) -> dict[str, Any]:
    """The known options of ``given``, numbers cut to integers where Ollama does so. Raises ``OptionError``."""
    options: dict[str, Any] = {}
    for name, value in (given or {}).items():
        wanted = _TYPES.get(name)
        if wanted is None or value is None:
            continue
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if wanted == "integer" and is_number:
            options[name] = int(value) if -(2**63) <= value < 2**63 else -(2**63)  # what Go's int64(t) gives on x86
        elif wanted == "float32" and is_number:
            options[name] = float(value)
        elif wanted == "boolean" and isinstance(value, bool):
            options[name] = value
        elif wanted == "array" and isinstance(value, list):
            if not all(isinstance(item, str) for item in value):
                raise OptionError(f'option "{name}" must be of an array of strings')
            options[name] = value
        else:
            raise OptionError(f'option "{name}" must be of type {wanted}')
    return options


def runner_options(options: Mapping[str, Any], *, era: Era, tensor_split: str | None = None, shift: bool = True) -> RunnerOptions:
    """The part of parsed ``options`` that a load depends on."""
    return RunnerOptions(
        num_ctx=max(options["num_ctx"], 4) if "num_ctx" in options else None,  # ``Scheduler.GetRunner``: at least 4
        num_batch=options.get("num_batch"),
        num_gpu=options.get("num_gpu", -1),
        main_gpu=options.get("main_gpu"),
        use_mmap=options.get("use_mmap"),
        num_thread=options.get("num_thread"),
        draft_num_predict=options.get("draft_num_predict"),
        tensor_split=tensor_split,
        shift=shift,
    ).for_era(era)


def needs_reload(loaded: RunnerOptions, asked: RunnerOptions, *, loaded_ctx: int, asked_ctx: int) -> bool:
    """Whether a request for ``asked`` unloads a model that was loaded with ``loaded`` (``needsReload`` in ``server/sched.go``).

    ``num_gpu`` −1 matches anything, an automatic context or batch matches itself, and otherwise contexts are compared as
    they came out (tokens). ``main_gpu`` absent is not ``main_gpu: 0``.
    """
    if asked.num_gpu < 0:
        asked = replace(asked, num_gpu=loaded.num_gpu)
    both_automatic = asked.num_ctx is None and loaded.num_ctx is None
    if both_automatic or asked_ctx == loaded_ctx:
        asked = replace(asked, num_ctx=loaded.num_ctx)
    return asked != loaded


def keep_alive_seconds(value: Any) -> float | None:
    """``keep_alive`` in seconds: a number, or a Go duration (``"5m"``); negative means for ever, ``None`` the default.

    Raises ``OptionError`` with Ollama's text.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise OptionError(f"Unsupported type: '{type(value).__name__}'")
    if isinstance(value, str):
        if not _DURATION.fullmatch(value):
            raise OptionError(f'time: invalid duration "{value}"')
        seconds = sum(float(number) * _UNIT_S[unit] for number, unit in _DURATION_PART.findall(value))
        value = -seconds if value.startswith("-") else seconds
    return NO_KEEP_ALIVE_END_S if value < 0 else float(value)
