"""What the checks stand on works."""

from __future__ import annotations

import asyncio
import signal
from typing import Any

import numpy as np
import pytest

import pccl
from pccl.sync import Communicator as Blocking
from tests.checks.processes import Dead, Failure, processes, strike_after
from tests.checks.support import each, group, in_threads, on_node, simulate, simulated_members
from tests.sim.world import World


async def test_peers_of_one_process() -> None:
    async with group(3) as comms:
        assert [comm.rank for comm in comms] == [0, 1, 2]
        tensors = [np.full(10, float(k)) for k in range(3)]
        await each(comm.all_reduce(x) for comm, x in zip(comms, tensors, strict=True))
        assert all((x == 3).all() for x in tensors)


def test_peers_in_threads() -> None:
    def body(comm: Blocking) -> float:
        x = np.full(10, 1.0 + comm.rank)
        comm.all_reduce(x)
        return float(x[0])

    assert in_threads(3, body) == [6.0] * 3


def test_peers_in_virtual_time() -> None:
    async def main(world: World) -> list[float]:
        comms = await simulated_members(world, ["A", "B", "C"])
        tensors = {name: np.full(10, 2.0) for name in comms}
        await asyncio.gather(*(on_node(world, name, comm.all_reduce(tensors[name])) for name, comm in comms.items()))
        return [float(x[0]) for x in tensors.values()]

    assert simulate(main) == [6.0] * 3


async def reduce(comm: Any, count: int) -> float:
    x = np.ones(count)
    await comm.all_reduce(x)
    return float(x[-1])


@pytest.mark.process
async def test_peers_in_processes() -> None:
    async with pccl.Master() as master, processes(master.address, 3) as peers:
        assert await asyncio.gather(*(peer.do(reduce, 10) for peer in peers)) == [3.0] * 3
        await peers[1].do(strike_after, 100_000)
        found = await asyncio.gather(*(peer.outcome(reduce, 1_000_000) for peer in peers))
        assert isinstance(found[1], Dead)
        assert await peers[1].ended() == -signal.SIGKILL
        for k in (0, 2):
            assert isinstance(found[k], Failure)
            assert found[k].kind == "CollectiveAborted"
            assert found[k].data["lost"] == ("P1",)
