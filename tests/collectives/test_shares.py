"""What is sent without credit comes back, whoever enters first."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from pccl.core.frames import HEADER_BYTES
from tests.checks.support import each, group, until


def flow_of(comm: Any) -> Any:
    (flow,) = comm._runtime.engine.executor.flows.values()
    return flow


@pytest.mark.parametrize("first", [0, 1])
async def test_nothing_is_owed_to_a_peer_that_has_entered(first: int) -> None:
    async with group(2) as comms:
        early, late = comms[first], comms[1 - first]
        x, y = np.full(3854, 1.0, np.float32), np.full(3854, 2.0, np.float32)
        call = asyncio.create_task(early.all_reduce(x, algorithm="direct"))
        await until(lambda: flow_of(late)._early_bytes > x.nbytes + HEADER_BYTES)
        assert flow_of(early)._share_total > x.nbytes
        await each([call, late.all_reduce(y, algorithm="direct")])
        assert (x == 3).all()
        assert (y == 3).all()
        assert flow_of(early)._share_total == flow_of(late)._share_total == 0
