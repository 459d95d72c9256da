"""Check 30: groups of one master, and halves of one group, have nothing to wait for from each other."""

from __future__ import annotations

import asyncio
import signal
from typing import Any

import numpy as np
import pytest

import pccl
from pccl.communicator import Communicator
from tests.checks.processes import processes
from tests.checks.support import each, group, join, members, outcomes, until
from tests.checks.support_state import newcomer, sync, tensor


async def works(comms: list[Communicator], steps: int = 20) -> None:
    """Reduces, syncs and updates, all of them with the right results."""
    for step in range(steps):
        tensors = [np.full(1000, step + 1.0 + k) for k in range(len(comms))]
        await each(c.update() for c in comms)
        await each(c.all_reduce(x) for c, x in zip(comms, tensors, strict=True))
        assert all((x == sum(step + 1 + k for k in range(len(comms)))).all() for x in tensors)
    infos = await sync(comms, [{"w": tensor(4096, steps)} for _ in comms], 1)
    assert all(i.bytes_received == 0 for i in infos)


async def test_check_30_a_group_whose_member_does_not_call_delays_no_other() -> None:
    async with pccl.Master() as master, members(master.address, 2, group="0") as zero, members(master.address, 3, group="1") as one:
        stalled = asyncio.create_task(zero[0].all_reduce(np.ones(1000)))
        waiting = asyncio.create_task(join(master.address, "N", 3, group="0"))
        await works(one)
        async with newcomer(master.address, one, group="1") as new:
            await works([*one, new])
        assert not stalled.done()
        assert not waiting.done()
        await zero[1].all_reduce(np.ones(1000))
        await stalled
        joined, *_ = await each([waiting, *(c.update() for c in zero)])
        assert {m.name for m in zero[0].view.members} == {"P0", "P1", "N"}
        await joined.close()


async def test_check_30_a_group_that_errs_disturbs_no_other() -> None:
    async with pccl.Master() as master, members(master.address, 2, group="0") as zero, members(master.address, 3, group="1") as one:
        over = asyncio.Event()

        async def errs() -> int:
            n = 0
            while not over.is_set():
                found = await outcomes([zero[0].all_reduce(np.ones(2)), zero[1].all_reduce(np.ones(3))])
                assert [type(e) for e in found] == [pccl.CollectiveMismatch] * 2
                n += 1
            return n

        task = asyncio.create_task(errs())
        await works(one)
        over.set()
        assert await task > 0
        await zero[1].close()
        await works(one)
        with pytest.raises(pccl.CollectiveAborted):
            await zero[0].all_reduce(np.ones(2))
        await zero[0].all_reduce(np.ones(2))


async def reduce(comm: Any, count: int) -> float:
    x = np.ones(count)
    await comm.all_reduce(x, retry=True)
    return float(x[-1])


@pytest.mark.process
async def test_check_30_a_group_whose_member_is_stopped_delays_no_other() -> None:
    """Nor does a process that is in both: it has an engine for each."""
    async with (
        pccl.Master() as master,
        processes(master.address, 2, group="0", heartbeat_timeout=20.0) as zero,
        members(master.address, 2, group="1") as one,
        members(master.address, 2, group="2") as two,
    ):
        zero[0].signal(signal.SIGSTOP)
        stalled = zero[1].start(reduce, 10)
        await each([works(one), works(two)])
        assert not stalled.done()
        zero[0].signal(signal.SIGCONT)
        assert await asyncio.gather(stalled, zero[0].do(reduce, 10)) == [2.0, 2.0]


async def test_check_30_halves_of_a_group_do_not_wait_for_each_other() -> None:
    async with group(4) as comms:
        halves = await each(c.split(c.rank % 2) for c in comms)
        even, odd = [h for h in halves[::2] if h], [h for h in halves[1::2] if h]
        stalled = asyncio.create_task(odd[0].all_reduce(np.ones(10)))
        whole = asyncio.create_task(comms[0].all_reduce(np.ones(10)))
        for k in range(20):
            tensors = [np.full(10, 1.0 + k) for _ in even]
            await each(h.all_reduce(x) for h, x in zip(even, tensors, strict=True))
            assert all((x == 2 + 2 * k).all() for x in tensors)
        assert not stalled.done()
        assert not whole.done()
        await odd[1].all_reduce(np.ones(10))
        await each([stalled])
        await each([whole, *(c.all_reduce(np.ones(10)) for c in comms[1:])])


async def test_check_30_the_loss_of_a_member_fails_its_half_and_the_whole_but_not_the_other_half() -> None:
    async with group(4) as comms:
        halves = [h for h in await each(c.split(c.rank % 2) for c in comms) if h]
        even, odd = halves[::2], halves[1::2]
        await comms[3].close()
        await until(lambda: len(comms[1]._runtime.engine.membership(0).view.members) == 3)
        for k in range(20):
            tensors = [np.full(10, 1.0 + k) for _ in even]
            await each(h.all_reduce(x) for h, x in zip(even, tensors, strict=True))
        with pytest.raises(pccl.CollectiveAborted) as caught:
            await odd[0].all_reduce(np.ones(10))
        assert caught.value.lost == (comms[0].view.members[3].name,)
        found = await outcomes(c.all_reduce(np.ones(10)) for c in comms[:3])
        assert [type(e) for e in found] == [pccl.CollectiveAborted] * 3
        await each(c.all_reduce(np.ones(10)) for c in comms[:3])
