"""Check 31: the master is killed and comes back at the same address, with calls in flight."""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest

import pccl
from pccl.communicator import Communicator
from pccl.core.types import Info
from pccl.protocol.peer import Standpoint
from pccl.runtime import ThreadRuntime, _runtimes
from tests.checks.processes import master_process, processes
from tests.checks.support import QUICK, each, join, members, outcomes, until
from tests.checks.support_state import MIB, State, bits, sync, tensor

pytestmark = pytest.mark.process

TIMES = ("--heartbeat-interval", "0.2", "--heartbeat-timeout", "2")


class Life:
    """A master that can be killed and started again."""

    def __init__(self) -> None:
        self.address = "127.0.0.1:0"
        self._exit: Any = None

    async def start(self) -> None:
        self._exit = master_process("--listen", self.address, *TIMES)
        self.process, self.address = await self._exit.__aenter__()

    async def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        assert await self.process.wait() == -signal.SIGKILL
        await self._exit.__aexit__(None, None, None)

    async def restart(self) -> None:
        await self.kill()
        await self.start()


@asynccontextmanager
async def life() -> AsyncIterator[Life]:
    master = Life()
    await master.start()
    try:
        yield master
    finally:
        await master.kill()


async def as_before(comms: list[Communicator], states: list[State], revision: int) -> None:
    """State and revision are what they were, and the next step commits."""
    before = [bits(s) for s in states]
    infos = await sync(comms, states, revision)
    assert [(i.revision, i.bytes_received) for i in infos] == [(revision, 0)] * len(comms)
    assert [bits(s) for s in states] == before
    tensors = [np.full(1000, k + 1.0) for k in range(len(comms))]
    await each(c.all_reduce(x, retry=True) for c, x in zip(comms, tensors, strict=True))
    assert all((x == sum(range(1, len(comms) + 1))).all() for x in tensors)


async def test_check_31_a_call_that_one_member_has_yet_to_make() -> None:
    async with life() as master, members(master.address, 3) as comms:
        states: list[State] = [{"w": tensor(40_000)} for _ in comms]
        await sync(comms, states, 7)
        tensors = [np.full(300_000, k + 1.0) for k in range(3)]
        calls = [asyncio.create_task(c.all_reduce(x, retry=True)) for c, x in zip(comms[:2], tensors, strict=False)]
        tagged = [asyncio.create_task(c.all_reduce(np.ones(10), tag="t", retry=True)) for c in comms[:2]]
        await until(lambda: all(c._runtime.engine.membership(0).in_flight == 2 for c in comms[:2]))
        await master.restart()
        calls += [asyncio.create_task(comms[2].all_reduce(tensors[2], retry=True))]
        tagged += [asyncio.create_task(comms[2].all_reduce(np.ones(10), tag="t", retry=True))]
        infos = [*await each(calls), *await each(tagged)]
        assert all((x == 6).all() for x in tensors)
        assert all(i.world_size == 3 for i in infos)
        await as_before(comms, states, 7)
        assert {c.view.epoch.term for c in comms} == {2}
        assert [m.name for m in comms[0].view.members] == [m.name for m in infos[0].members]


async def test_check_31_a_call_without_retry_ends_the_same_way_for_all() -> None:
    async with life() as master, members(master.address, 3) as comms:
        states: list[State] = [{"w": tensor(40_000)} for _ in comms]
        await sync(comms, states, 7)
        tensors = [np.full(300_000, k + 1.0) for k in range(3)]
        calls = [asyncio.create_task(c.all_reduce(x)) for c, x in zip(comms[:2], tensors, strict=False)]
        await until(lambda: all(c._runtime.engine.membership(0).in_flight == 1 for c in comms[:2]))
        await master.restart()
        await until(lambda: all(t.done() for t in calls))
        found = await outcomes([*calls, comms[2].all_reduce(tensors[2])])
        assert [type(e) for e in found] == [pccl.CollectiveAborted] * 3
        assert all(not e.lost and "make the call again" in str(e) for e in found)
        assert [(x == k + 1).all() for k, x in enumerate(tensors)] == [True] * 3
        await as_before(comms, states, 7)


@pytest.mark.parametrize("seed", [1, 2])
async def test_check_31_busy_groups_over_several_lives(seed: int) -> None:
    """Calls of all kinds go on all the time; each ends the same way on all members, with the right result or the inputs as they were."""
    steps = 0

    async def run(comm: Communicator, marks: list[int]) -> list[Any]:
        nonlocal steps
        text = random.Random(seed)  # the same on all
        results: list[Any] = []
        state: State = {"w": tensor(40_000)}
        step = 0
        while True:
            await comm.update()
            info = await comm.sync_state(state, revision=step)
            assert info.bytes_received == 0
            size, retry = text.choice((10, 3000, 200_000)), text.random() < 0.5
            xs = [np.full(size, comm.rank + 1.0 + k) for k in range(3)]
            over = np.array([len(marks) > 0])
            calls = [comm.all_reduce(x, retry=retry, tag=f"t{k}") for k, x in enumerate(xs)]
            for k, found in enumerate(await outcomes(calls)):
                if isinstance(found, Info):
                    assert (xs[k] == 6 + 3 * k).all()
                    results.append((step, k, "committed", found.epoch))
                else:
                    assert isinstance(found, pccl.CollectiveAborted)
                    assert not retry
                    assert (xs[k] == comm.rank + 1.0 + k).all()
                    results.append((step, k, "aborted"))
            state["w"] += 1
            step += 1
            steps += 1
            await comm.all_reduce(over, "band", retry=True)
            if over[0]:
                return [results, bits(state)]

    async with life() as master, members(master.address, 3) as comms:
        chance = random.Random(seed)
        marks: list[int] = []
        running = [asyncio.create_task(run(c, marks)) for c in comms]
        for _ in range(3):
            due = steps + chance.randrange(10, 60)
            await until(lambda due=due: steps >= due or any(t.done() for t in running))  # type: ignore[misc]
            await master.restart()
        due = steps + 30
        await until(lambda: steps >= due or any(t.done() for t in running), within=30)
        marks.append(1)
        found = await each(running)
        assert found[0] == found[1] == found[2]
        assert {c.view.epoch.term for c in comms} == {4}
        assert len(found[0][0]) > 30


def waits(runtime: ThreadRuntime) -> bool:
    """Whether the master knows the peer N."""
    engine = getattr(runtime, "engine", None)
    return engine is not None and engine._name == "N" and engine._peer is not None and engine._peer.standpoint is Standpoint.PENDING


async def test_check_31_a_newcomer_that_waits_comes_in_after_the_restart() -> None:
    async with life() as master, members(master.address, 2) as comms:
        joining = asyncio.create_task(join(master.address, "N", 3))
        await until(lambda: any(waits(r) for r in list(_runtimes)))
        await master.restart()

        async def updates(comm: Communicator) -> None:
            while comm.world_size < 3:
                await comm.update()

        new, *_ = await each([joining, *(updates(c) for c in comms)])
        await as_before([*comms, new], [{"w": tensor(4000)} for _ in range(3)], 1)
        await new.close()


async def test_check_31_sub_communicators_survive() -> None:
    async with life() as master, members(master.address, 4) as comms:
        halves = [h for h in await each(c.split(c.rank % 2) for c in comms) if h]
        await master.restart()
        tensors = [np.full(1000, k + 1.0) for k in range(4)]
        infos = await each(h.all_reduce(x, retry=True) for h, x in zip(halves, tensors, strict=True))
        assert [x[0] for x in tensors] == [4, 6, 4, 6]
        assert [i.world_size for i in infos] == [2] * 4
        await each(c.all_reduce(np.ones(10), retry=True) for c in comms)


async def reduce(comm: Any, count: int, timeout: float | None = None) -> tuple[float, int]:
    x = np.ones(count, np.float32)
    info = await comm.all_reduce(x, retry=True, timeout=timeout)
    return float(x[-1]), info.world_size


async def test_check_31_a_member_that_dies_together_with_the_master_is_lost() -> None:
    async with life() as master, processes(master.address, 3) as peers:
        calls = [p.start(reduce, 1000) for p in peers[1:]]
        peers[0].signal(signal.SIGKILL)
        await master.restart()
        assert await asyncio.gather(*calls) == [(2.0, 2)] * 2
        assert await asyncio.gather(*(p.do(reduce, 1000) for p in peers[1:])) == [(2.0, 2)] * 2


async def test_check_31_the_master_dies_in_the_middle_of_the_data() -> None:
    """Data flows without it; the verdict comes from the next one."""
    async with life() as master, members(master.address, 3) as comms:
        tensors = [np.full(8 * MIB, k + 1.0, np.float32) for k in range(3)]
        calls = [asyncio.create_task(c.all_reduce(x, retry=True)) for c, x in zip(comms, tensors, strict=True)]
        await until(lambda: comms[0]._runtime.engine.executor.progress > 4 * MIB)
        assert not any(t.done() for t in calls)
        await master.restart()
        infos = await each(calls)
        assert [i.world_size for i in infos] == [3] * 3
        assert all((x == 6).all() for x in tensors)


async def test_check_31_without_a_master_calls_end_by_their_timeouts() -> None:
    """Those that have a result may not drop it alone: they leave, with their inputs."""
    async with life() as master:
        settings: dict[str, Any] = QUICK | {"takeover_timeout": 1.0, "min_world_size": 2, "transport": "tcp"}
        comms = await each(pccl.connect(master.address, name=f"P{k}", **settings) for k in range(2))
        tensors = [np.full(1000, k + 1.0) for k in range(2)]
        await each(c.all_reduce(np.ones(1)) for c in comms)
        await master.kill()
        found = await outcomes(c.all_reduce(x, timeout=1.0) for c, x in zip(comms, tensors, strict=True))
        assert [type(e) for e in found] == [pccl.Evicted] * 2
        assert [(x == k + 1).all() for k, x in enumerate(tensors)] == [True] * 2
        await master.start()
        await each(c.close() for c in comms)
        again = await each(pccl.connect(master.address, **settings) for _ in range(2))
        await each(c.all_reduce(x) for c, x in zip(again, tensors, strict=True))
        await each(c.close() for c in again)
