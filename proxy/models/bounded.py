"""Reading a header from the start of a file, with every length checked before it is believed."""

from __future__ import annotations

import struct
from itertools import repeat
from operator import length_hint
from typing import BinaryIO, cast

from proxy.errors import GgufError

MAX_HEADER_BYTES = 128 * 2**20
"""Bounds what a lying file can make us walk; the largest vocabularies of 2026 take about 20 MB."""
CHUNK_BYTES = 2**18
"""Read at a time: a window that the processor's cache holds is walked fastest."""

_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")


class BoundedReader:
    """A file read once from its start: a window of bytes that moves on as they are asked for."""

    def __init__(self, file: BinaryIO, file_bytes: int) -> None:
        self._file = file
        self._limit = min(file_bytes, MAX_HEADER_BYTES)
        self._file_bytes = file_bytes
        self._window = b""
        self._start = 0  # the window's place in the file
        self._at = 0  # the cursor's place in the window

    @property
    def position(self) -> int:
        """Where the cursor is in the file."""
        return self._start + self._at

    def refuse_more_than_fit(self, count: int, least_bytes: int, what: str) -> None:
        """Raises where ``count`` things of at least ``least_bytes`` each cannot stand in the rest of the header."""
        if count * least_bytes > self._limit - self.position:
            self._fail(f"{count:,} {what}")

    def take(self, size: int, what: str) -> bytes:
        """The next ``size`` bytes."""
        self._fill(size, what)
        data = self._window[self._at : self._at + size]
        self._at += size
        return data

    def unpack(self, encoding: struct.Struct, what: str) -> object:
        """The next value of ``encoding``, which holds one."""
        self._fill(encoding.size, what)
        (value,) = encoding.unpack_from(self._window, self._at)
        self._at += encoding.size
        return value

    def u32(self, what: str) -> int:
        """The next unsigned integer of 32 bits."""
        return cast("int", self.unpack(_U32, what))

    def u64(self, what: str) -> int:
        """The next unsigned integer of 64 bits."""
        return cast("int", self.unpack(_U64, what))

    def string(self, what: str) -> str:
        """The next string; bytes that are no UTF-8 become replacement characters."""
        return self.take(self.u64(what), what).decode("utf-8", "replace")

    def skip(self, size: int, what: str) -> None:
        """Steps over ``size`` bytes."""
        if size > self._limit - self.position:
            self._fail(what)
        self._at += size

    def skip_strings(self, count: int, what: str) -> None:
        """Walks over ``count`` strings. A vocabulary has 10^5 to 10^6, and this loop is all of the time that a header takes."""
        length_at = _U64.unpack_from
        while count:
            self._fill(8, what)
            window, at = self._window, self._at
            left = repeat(None, count)
            try:
                for _ in left:
                    (length,) = length_at(window, at)
                    at += length + 8
                count = 0
            except (struct.error, OverflowError):  # the next length is beyond the window
                count = length_hint(left) + 1
            self._at = at
            if self.position > self._limit:
                self._fail(what)

    def _fill(self, size: int, what: str) -> None:
        """Sees to it that the window holds ``size`` bytes from the cursor on."""
        if self._at + size <= len(self._window):
            return
        if size > self._limit - self.position:
            self._fail(what)
        if self._at > len(self._window):  # skipped beyond the window
            self._file.seek(self.position)
        self._window, self._start, self._at = self._window[self._at :], self.position, 0
        self._window += self._file.read(max(CHUNK_BYTES, size - len(self._window)))
        if len(self._window) < size:  # cut short while it was read
            self._fail(what)

    def _fail(self, what: str) -> None:
        if self._limit < self._file_bytes:
            raise GgufError(f"{what}: the header would be longer than {MAX_HEADER_BYTES // 2**20} MiB")
        raise GgufError(
            f"the file ends inside its header, or lies about a length: {what} at byte {self.position:,} of {self._file_bytes:,}"
        )
