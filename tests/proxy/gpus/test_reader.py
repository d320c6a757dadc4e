"""The rig for all who ask: one thread reads it, whoever waits."""

from __future__ import annotations

import asyncio
import threading

import pytest

from proxy.errors import GpuError
from proxy.gpus.reader import RigReader
from proxy.gpus.static import StaticSource
from tests.proxy.planners import RIG, Source


async def test_a_driver_that_hangs_takes_one_thread_and_whoever_gives_up_takes_nothing_from_the_others():
    class Hanging(Source):
        def rig(self):
            super().rig()
            awake.wait(10)
            return self.value

    awake, source = threading.Event(), Hanging(RIG)
    reader = RigReader(source)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(reader.rig(), 0.05)
    waiting = [asyncio.create_task(reader.rig()) for _ in range(3)]
    await asyncio.sleep(0)
    awake.set()
    assert await asyncio.gather(*waiting) == [RIG] * 3
    assert source.asked == 1
    await reader.rig()
    assert source.asked == 2


async def test_what_is_loaded_is_seen_in_a_rig_that_is_read_and_in_no_other():
    assert await RigReader(Source(RIG)).watched() == RIG
    written = RigReader(StaticSource(RIG))
    assert (await written.rig()).gpus == RIG.gpus
    assert await written.watched() is None
    with pytest.raises(GpuError):
        await RigReader(None).rig()
