"""A small JSON file that outlives the proxy: what it needs to go on where it was killed.

Written anew as a whole and put in place by a rename, so that it holds the old value or the new one whenever power or process
ends. State is a convenience: nothing here raises for a file that is missing, broken or on a full disk.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

SIZE_LIMIT_BYTES = 4 * 2**20
"""A larger file is none of ours: a placement takes less than 1 KiB."""

log = logging.getLogger("lopsided.state")


class StateFile:
    """One JSON object in the file ``name`` of the folder ``directory``; ``None`` is nowhere: reads nothing, keeps nothing.

    Both methods block for the time of a small file and an ``fsync``. Several threads may write: the last rename wins.
    """

    def __init__(self, directory: Path | None, name: str) -> None:
        self.path = directory / name if directory is not None else None
        self._told = False

    def read(self) -> dict[str, Any]:
        """What was written last; ``{}`` where there is nothing. A file that is no JSON object is moved aside, and said."""
        if self.path is None:
            return {}
        try:
            with self.path.open("rb") as file:
                data = file.read(SIZE_LIMIT_BYTES + 1)
        except FileNotFoundError:
            return {}
        except OSError as error:
            self._tell(f"the state in {self.path} cannot be read ({error.strerror or error}); starting without it")
            return {}
        try:
            if len(data) > SIZE_LIMIT_BYTES:
                raise ValueError(f"it has more than {SIZE_LIMIT_BYTES} bytes")
            value = json.loads(data)
            if not isinstance(value, dict):
                raise ValueError("it is no JSON object")
        except (ValueError, RecursionError) as error:
            self.set_aside(str(error) or type(error).__name__)
            return {}
        return value

    def write(self, value: Mapping[str, Any]) -> bool:
        """Keeps ``value`` in place of what was there, down to the disk. False, and said once, where that is impossible."""
        if self.path is None:
            return False
        temporary = None
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(prefix=f".{self.path.name}.", dir=self.path.parent)  # readable by its user alone
            with open(handle, "wb") as file:  # noqa: PTH123 - a descriptor
                file.write(json.dumps(value, separators=(",", ":")).encode("ascii"))
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).replace(self.path)
            _sync_directory(self.path.parent)
        except OSError as error:
            if temporary is not None:
                with suppress(OSError):
                    Path(temporary).unlink()
            self._tell(
                f"state cannot be kept in {self.path} ({error.strerror or error}); LOPSIDED_STATE names another folder, or off"
            )
            return False
        self._told = False
        return True

    def set_aside(self, reason: str) -> None:
        """Renames the file to ``NAME.corrupt``, for people to look at: it cannot be understood."""
        if self.path is None:
            return
        aside = self.path.with_name(self.path.name + ".corrupt")
        try:
            self.path.replace(aside)
        except OSError as error:
            self._tell(f"the state in {self.path} is broken ({reason}) and cannot be moved aside ({error.strerror or error})")
            return
        log.warning("the state in %s is broken (%s); moved to %s, starting without it", self.path, reason, aside.name)

    def _tell(self, text: str) -> None:
        """Says ``text``, until something could be written again."""
        if not self._told:
            self._told = True
            log.warning("%s", text)


def _sync_directory(path: Path) -> None:
    """Makes the rename itself last; where folders can't be opened (Windows), it does anyway."""
    with suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
