"""Links over paths that are long, narrow or stand still, with kernels in between."""

from __future__ import annotations

import asyncio
import ctypes
import time
from typing import Any

import numpy as np
import pytest

from pccl.transports.stripes import FAR_START
from tests.checks.netns import network, running
from tests.checks.support import until

pytestmark = [pytest.mark.process, pytest.mark.slow]

MIB = 1 << 20


def links(comm: Any) -> list[Any]:
    return [flow.link for flow in comm._runtime.engine.executor.flows.values()]


async def reduce(comm: Any, mib: int) -> tuple[float, list[int]]:
    """Checks the sum; returns how long it took, and the bytes that each stripe has carried so far."""
    x = np.full(mib * MIB // 4, comm.rank + 1.0, np.float32)
    began = time.perf_counter()
    await comm.all_reduce(x)
    took = time.perf_counter() - began
    assert (x == 3).all()
    (link,) = links(comm)
    return took, [account.acked for lane in link._stripes if (account := lane.wire.account())]


@pytest.mark.timeout(180)
async def test_a_long_path_is_filled_by_several_stripes(record_property: Any) -> None:
    """100 ms and 1 Gbit/s: the buffers of a connection hold less than a path of this kind does."""
    with network(2, "tc", "iptables") as net:
        net.limit("1gbit")
        with net.held_up(0.05):
            async with running(net, dial_timeout=10.0, path_timeout=5.0, timeout=100.0, min_world_size=2) as peers:
                for _ in range(3):
                    found = await asyncio.gather(*(p.do(reduce, 128, within=100.0) for p in peers))
                record_property("goodput_mbit_s", round(128 * MIB * 8 / found[0][0] / 1e6))
                for _, carried in found:
                    assert len(carried) >= FAR_START
                    assert sum(n > 8 * MIB for n in carried) >= FAR_START


async def hold_under_load(comm: Any, mib: int, seconds: int) -> list[int]:
    """Hold the interpreter while data streams in; returns which links there were before and after."""
    before = [id(link) for link in links(comm)]
    executor = comm._runtime.engine.executor
    call = asyncio.create_task(reduce(comm, mib))
    begin = executor.progress
    await until(lambda: executor.progress >= begin + 64 * MIB)
    left = ctypes.PyDLL(None).sleep(seconds)
    assert left == 0
    await call
    return [*before, *(id(link) for link in links(comm))]


async def reduce_beside(comm: Any, mib: int) -> list[int]:
    """The other side of that."""
    before = [id(link) for link in links(comm)]
    await reduce(comm, mib)
    return [*before, *(id(link) for link in links(comm))]


@pytest.mark.timeout(120)
async def test_a_receiver_that_is_held_for_ten_seconds_under_load_keeps_its_links() -> None:
    """Its windows close, and its kernel says so: neither the path's timeout (1 s here) nor TCP's own ends the link."""
    with network(2, "tc") as net:
        net.limit("500mbit")
        net.set("net.ipv4.tcp_rmem", "4096 65536 262144")
        async with running(net, min_world_size=2, stall_timeout=20.0, timeout=60.0) as peers:
            held, other = await asyncio.gather(peers[1].do(hold_under_load, 512, 10), peers[0].do(reduce_beside, 512))
            assert held[0] == held[1]
            assert other[0] == other[1]
