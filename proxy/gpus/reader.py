"""The rig as it is now, for all who ask."""

from __future__ import annotations

import asyncio

from planner.hardware import Rig
from proxy.errors import GpuError
from proxy.gpus import GpuSource
from proxy.gpus.static import StaticSource


class RigReader:
    """Reads ``source`` in a thread; ``None``: there are no GPUs to be planned for."""

    def __init__(self, source: GpuSource | None) -> None:
        self.live = not isinstance(source, StaticSource)
        """Whether what is loaded can be seen in it: what is written down does not change."""
        self._source = source
        self._reading: asyncio.Task[Rig] | None = None

    async def rig(self) -> Rig:
        """The GPUs as they are now. Raises ``GpuError``."""
        if self._source is None:
            raise GpuError("no source of GPUs")
        if self._reading is None or self._reading.done():  # a driver that hangs takes one thread, not all of them
            self._reading = asyncio.create_task(asyncio.to_thread(self._source.rig), name="read GPUs")
            self._reading.add_done_callback(lambda task: task.cancelled() or task.exception())
        return await asyncio.shield(self._reading)

    async def watched(self) -> Rig | None:
        """The same, ``None`` where what is loaded can't be seen in it."""
        return await self.rig() if self.live else None
