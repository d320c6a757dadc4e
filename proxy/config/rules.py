"""The rules of ``lopsided.toml``: what a user wants for some models, told by patterns of their names.

Every section ``[models."PATTERN"]`` that matches applies, from the top of the file to the bottom; of what two of them say, the
later counts. A pattern is a name as Ollama lists it, with ``*``, ``?`` and ``[…]``; ``:latest`` may be left out.
docs/rules.md has examples. Parsing is a function of the text; :class:`proxy.config.rulefile.RuleFile` reads it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from planner.hardware import Gpu
from planner.power import BOOST_MAX, BOOST_MIN
from proxy.config.tomlfile import closest, line_of
from proxy.errors import SettingsError
from proxy.gpus.static import parse_size
from proxy.models.catalog import full_name

Context = int | Literal["fit", "keep"]
"""Tokens of context where neither client nor model says: a number, ``fit`` (the most that the best placement has room for), or
``keep`` (whatever Ollama takes)."""

Reserve = tuple[tuple[str, int], ...]
"""``(UUID or name of a GPU, bytes to leave free on it)``."""

RULE_KEYS = ("models", "reserve", "priority", "keep_together")
"""The keys of ``lopsided.toml`` that are rules. All others are settings."""

MAX_TOGETHER = 8
"""Models in one ``keep_together``; each is planned with the others."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """What holds for one model. ``None``: nothing is said. ``boost`` is a factor, or ``auto`` for the search.

    ``by``: the pattern of the section that says it, by key (``reserve GPU`` for each GPU); no part of what holds.
    """

    gpu: str | None = None
    reserve: Reserve = ()
    boost: float | Literal["auto"] | None = None
    context: Context | None = None
    off: bool | None = None
    by: tuple[tuple[str, str], ...] = field(default=(), compare=False)

    def values(self) -> dict[str, Any]:
        """What is said, by key: ``reserve GPU`` for each GPU, in bytes."""
        alone = {"gpu": self.gpu, "boost": self.boost, "context": self.context, "off": self.off}
        said = {key: value for key, value in alone.items() if value is not None}
        return said | {f"reserve {gpu}": size_bytes for gpu, size_bytes in self.reserve}


@dataclass(frozen=True, kw_only=True, slots=True)
class Rules:
    """A file's rules. ``reserve`` holds for every model, ``priority`` lists patterns, the most important first."""

    models: tuple[tuple[str, Rule], ...] = ()
    reserve: Reserve = ()
    priority: tuple[str, ...] = ()
    keep_together: tuple[tuple[str, ...], ...] = ()

    def for_model(self, model: str) -> Rule:
        """What holds for ``model``, a name as a client writes it."""
        found = Rule(reserve=self.reserve)
        for pattern, rule in self.models:
            if matches(pattern, model):
                said: dict[str, Any] = {one.name: getattr(rule, one.name) for one in fields(rule)}
                said["reserve"] = tuple({**dict(found.reserve), **dict(rule.reserve)}.items())
                said["by"] = tuple({**dict(found.by), **dict.fromkeys(rule.values(), pattern)}.items())
                found = replace(found, **{name: value for name, value in said.items() if value is not None})
        return found

    def rank(self, model: str) -> int:
        """The place of ``model`` in ``priority``, 0 for the most important; those that it does not name come last."""
        places = (place for place, pattern in enumerate(self.priority) if matches(pattern, model))
        return next(places, len(self.priority))

    def together_with(self, model: str) -> tuple[str, ...]:
        """The group of ``keep_together`` that ``model`` is in, in its order; empty where it is in none."""
        return next((group for group in self.keep_together if any(matches(name, model) for name in group)), ())

    @property
    def by_name(self) -> bool:
        """Whether anything here depends on a model's name."""
        return bool(self.models or self.keep_together or self.priority)

    def each(self) -> tuple[Rule, ...]:
        """The sections, each by itself, after what holds for every model."""
        return (Rule(reserve=self.reserve), *(rule for _, rule in self.models))

    def names(self) -> tuple[str, ...]:
        """What ``priority`` and ``keep_together`` name."""
        return tuple(dict.fromkeys((*self.priority, *(name for group in self.keep_together for name in group))))


def matches(pattern: str, model: str) -> bool:
    """Whether ``pattern`` means ``model``: by the name that Ollama lists, with or without ``:latest``, in any case of letters."""
    name = _listed(full_name(model))
    pattern = _listed(pattern.casefold())
    return any(fnmatchcase(form, pattern) for form in {name, name.removesuffix(":latest")})


def find_gpus(gpus: Sequence[Gpu], name: str) -> tuple[int, ...]:
    """The indices of the GPUs that ``name`` means: a UUID or its beginning, or words of a card's name; none where none fits.

    Of cards whose names differ, those with the shortest: "RTX 3090" is no RTX 3090 Ti if there is the other.
    """
    if by_uuid := tuple(index for index, gpu in enumerate(gpus) if gpu.uuid.casefold().startswith(name.casefold())):
        return by_uuid
    words = set(name.casefold().split())
    lengths = {index: len(gpu.name.split()) for index, gpu in enumerate(gpus) if words <= set(gpu.name.casefold().split())}
    return tuple(index for index, length in lengths.items() if length == min(lengths.values()))


def parse_rules(content: Mapping[str, Any], text: str, path: Path, *, settings: Collection[str] | None = None) -> Rules:
    """The rules in ``content``, which is ``text`` parsed. Raises ``SettingsError`` with the line.

    Keys that are none of the rules are left alone; with ``settings``, the names of those, they have to be one of them.
    """
    said: dict[str, Any] = {}
    try:
        for key in content:
            if settings is not None and key not in (*RULE_KEYS, *settings):
                raise _RuleError((key,), f"there is no rule or setting {key!r}{closest(key, (*RULE_KEYS, *settings))}")
        for key in RULE_KEYS:
            if key in content:
                said[key] = _PARSERS[key](content[key], (key,))
    except _RuleError as problem:
        raise SettingsError(f"{path}:{line_of(text, problem.keys)}: {problem}") from None
    return Rules(**said)


class _RuleError(Exception):
    """What is wrong with the value at ``keys``."""

    def __init__(self, keys: Sequence[str], text: str) -> None:
        super().__init__(text)
        self.keys = tuple(keys)


def _models(value: Any, keys: tuple[str, ...]) -> tuple[tuple[str, Rule], ...]:
    if not isinstance(value, dict):
        raise _RuleError(keys, 'models are sections: [models."qwen3*"]')
    return tuple((pattern, _rule(section, (*keys, pattern))) for pattern, section in value.items())


def _rule(section: Any, keys: tuple[str, ...]) -> Rule:
    if not isinstance(section, dict):
        known = tuple(_RULE_PARSERS)
        raise _RuleError(keys, f'{keys[-1]!r} is no section: write [models."PATTERN"], and {", ".join(known)} below it')
    said: dict[str, Any] = {}
    for key, value in section.items():
        if key not in _RULE_PARSERS:
            hint = closest(key, _RULE_PARSERS)
            if key in RULE_KEYS:
                hint = "; it stands at the top of the file, before every section"
            raise _RuleError((*keys, key), f"there is no rule {key!r}{hint or '; there are ' + ', '.join(_RULE_PARSERS)}")
        said[key] = _RULE_PARSERS[key](value, (*keys, key))
    return Rule(**said)


def _name(value: Any, keys: tuple[str, ...]) -> str:
    if not isinstance(value, str) or not value.strip():
        raise _RuleError(keys, f"{keys[-1]} = {value!r}: the UUID or the name of a GPU, as `lopsided devices` lists it")
    return value.strip()


def _reserve(value: Any, keys: tuple[str, ...]) -> Reserve:
    if not isinstance(value, dict):
        raise _RuleError(keys, f'reserve = {value!r}: bytes by GPU, such as {{ "RTX 5090" = "4GiB" }}')
    return tuple((_name(gpu, (*keys, gpu)), _bytes(size, (*keys, gpu))) for gpu, size in value.items())


def _bytes(value: Any, keys: tuple[str, ...]) -> int:
    try:
        return parse_size(value if isinstance(value, str) else str(value))
    except ValueError as error:
        raise _RuleError(keys, f"{keys[-1]}: {error}") from None


def _boost(value: Any, keys: tuple[str, ...]) -> float | Literal["auto"]:
    if value == "auto":
        return "auto"
    if isinstance(value, bool) or not isinstance(value, int | float) or not BOOST_MIN <= value <= BOOST_MAX:
        raise _RuleError(keys, f'boost = {value!r}: "auto", or a number from {BOOST_MIN} to {BOOST_MAX}')
    return float(value)


def _context(value: Any, keys: tuple[str, ...]) -> Context:
    if value == "fit" or value == "keep":
        return "fit" if value == "fit" else "keep"
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
        raise _RuleError(keys, f'context = {value!r}: "fit", "keep", or a number of tokens')
    return value


def _flag(value: Any, keys: tuple[str, ...]) -> bool:
    if not isinstance(value, bool):
        raise _RuleError(keys, f"{keys[-1]} = {value!r}: true or false")
    return value


def _patterns(value: Any, keys: tuple[str, ...]) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) and item.strip() for item in value):
        raise _RuleError(keys, f'{keys[-1]} = {value!r}: names of models, such as ["qwen2.5:32b", "nomic-embed-text"]')
    return tuple(item.strip() for item in value)


def _together(value: Any, keys: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
    groups = value if isinstance(value, list) and value and all(isinstance(item, list) for item in value) else [value]
    parsed = tuple(_patterns(group, keys) for group in groups)
    for group in parsed:
        if len(group) > MAX_TOGETHER:
            raise _RuleError(keys, f"keep_together: at most {MAX_TOGETHER} models, not {len(group)}")
        for name in group:
            if any(character in name for character in "*?["):
                raise _RuleError(keys, f"keep_together: {name!r} is a pattern; here each model has to be named")
    return tuple(group for group in parsed if group)


_RULE_PARSERS = {"gpu": _name, "reserve": _reserve, "boost": _boost, "context": _context, "off": _flag}
_PARSERS = {"models": _models, "reserve": _reserve, "priority": _patterns, "keep_together": _together}


def _listed(name: str) -> str:
    """A full name, or the pattern of one, as Ollama lists it: without the parts that stand for its own registry."""
    return name.removeprefix("registry.ollama.ai/").removeprefix("library/")
