"""A TOML file whose problems can be told with their line: ``lopsided.toml``."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from proxy.errors import SettingsError

SIZE_LIMIT_BYTES = 256 * 1024
"""Largest file that is read; a hundred rules take 10 KiB."""


def read_toml(path: Path) -> tuple[dict[str, Any], str]:
    """What stands in ``path``, and its text; empty where there is no such file. Raises ``SettingsError``."""
    try:
        if path.is_fifo():
            raise SettingsError(f"{path}: a pipe, which cannot be read twice: write a file")
        with path.open("rb") as file:
            data = file.read(SIZE_LIMIT_BYTES + 1)
        if len(data) > SIZE_LIMIT_BYTES:
            raise SettingsError(f"{path}: more than {SIZE_LIMIT_BYTES // 1024} KiB: no file of lopsided's")
        text = data.decode("utf-8")
        return tomllib.loads(text), text
    except FileNotFoundError:
        return {}, ""
    except UnicodeDecodeError as error:
        raise SettingsError(f"{path}:{data[: error.start].count(10) + 1}: it is not UTF-8") from None
    except (ValueError, RecursionError) as error:  # TOMLDecodeError says line and column; int() and dates fail in their own words
        raise SettingsError(f"{path}: {error or type(error).__name__}") from None
    except OSError as error:
        raise SettingsError(f"{path}: {error.strerror or error}") from None


def line_of(text: str, keys: Sequence[str]) -> int:
    """The line of ``text``, valid TOML, where the value named by ``keys`` begins, from 1.

    tomllib keeps no positions, so this looks for the first line with which the value is there: the longest beginning of the
    text, in whole lines, that is TOML by itself and does not have it yet ends just before it. The beginnings that have it are
    all longer than those that lack it, so half of them can be left out at each step.
    """
    lines = text.splitlines(keepends=True)

    def beginning(count: int) -> tuple[int, bool]:
        """The longest beginning of at most ``count`` lines that is TOML, and whether the value is in it."""
        while count:
            try:
                return count, _has(tomllib.loads("".join(lines[:count])), keys)
            except ValueError:
                count -= 1  # inside a value of several lines
        return 0, False

    low, high = 0, len(lines)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if beginning(middle)[1] else (middle, high)
    return min(beginning(low)[0] + 1, max(len(lines), 1))


def closest(word: str, known: Iterable[str], *, prefix: str = "") -> str:
    """``; did you mean 'gpu'?`` where one of ``known``, less its ``prefix``, looks like ``word``, else nothing."""
    names = {name.removeprefix(prefix).casefold(): name for name in known}
    found = difflib.get_close_matches(word.casefold(), names, n=1)
    return f"; did you mean {names[found[0]]!r}?" if found else ""


def _has(value: Any, keys: Sequence[str]) -> bool:
    for key in keys:
        if not isinstance(value, dict) or key not in value:
            return False
        value = value[key]
    return True
