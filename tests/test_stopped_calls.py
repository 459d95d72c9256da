"""A member that was told to stop still gets what its peers had credit for."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np

from pccl import CollectiveAborted, Evicted
from pccl.collectives.flow import UNCREDITED_PER_PEER
from pccl.core.frames import Header, Kind
from tests.checks.support import group, until


async def test_data_of_a_stopped_call_is_dropped_and_is_no_breach() -> None:
    async with group(2) as (_, comm):
        call = asyncio.create_task(comm.all_reduce(np.zeros(1 << 20)))
        runtime: Any = comm._runtime
        engine = runtime.engine
        (flow,) = engine.executor.flows.values()
        await until(lambda: engine._running)

        async def stop_and_receive() -> list[memoryview | None]:
            (transfer,) = engine._running
            engine.membership(0).stop()
            header = Header(Kind.DATA, *transfer.key, 0, 0, UNCREDITED_PER_PEER // 2, transfer.signature)
            return [flow.frame_begun(flow.link, header) for _ in range(4)]

        assert await asyncio.wrap_future(runtime.run(stop_and_receive)) == [None] * 4
        assert flow.link is not None
        assert flow._early_bytes == 0
        await comm.close()
        (end,) = await asyncio.gather(call, return_exceptions=True)
        assert isinstance(end, (CollectiveAborted, Evicted))
