"""What members of one host do in shared memory besides reducing: evictions, mismatches, many communicators."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import pccl
from pccl import sync
from pccl.collectives.executor import Executor
from pccl.collectives.pull import Pull
from pccl.core.messages import SplitResult
from pccl.engine import Engine
from pccl.protocol.member import Membership
from tests.checks.support import each, group, in_threads, outcomes, until, wait_until


async def total(comms: list[Any], **how: Any) -> None:
    """One sum, checked on all."""
    tensors = [np.full(10, k + 1.0) for k in range(len(comms))]
    await each(c.all_reduce(x, **how) for c, x in zip(comms, tensors, strict=True))
    assert all((x == sum(range(1, len(comms) + 1))).all() for x in tensors)


@pytest.mark.parametrize("count", [3, 300_000])
def test_who_is_evicted_after_a_commit_has_its_result(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others have committed, and the result is on its way to its place: there is no way back."""
    deliver, step = Pull._deliver, Executor.step
    evicted: list[Executor] = []

    def slowly(self: Pull) -> Iterator[bool]:
        yield True
        yield from deliver(self)

    def interrupted(self: Executor) -> bool:
        moved = step(self)
        if not evicted and any(pull.committed for pull in self._pulls):
            evicted.append(self)
            self._host._out(pccl.Evicted("a test says so"))  # type: ignore[attr-defined]
        return moved

    monkeypatch.setattr(Pull, "_deliver", slowly)
    monkeypatch.setattr(Executor, "step", interrupted)

    def body(comm: sync.Communicator) -> bool:
        x = np.full(count, comm.rank + 1.0)
        comm.all_reduce(x, async_op=True).wait()
        assert (x == 3).all()
        return comm._runtime.engine.error is None

    assert sorted(in_threads(2, body)) == [False, True]
    assert evicted


async def test_a_round_without_calls_where_others_reduce() -> None:
    """It is done at once, and sends nothing by which the others could tell."""
    async with group(2) as comms:

        async def empty_round() -> None:
            async with comms[1].round():
                pass

        x = np.ones(100_000)
        reduction = asyncio.create_task(comms[0].all_reduce(x))
        engine = comms[0]._runtime.engine
        await until(lambda: any(record.announced for record in engine.membership(0)._open.values()))
        await each(c.barrier(tag="the master has heard of it") for c in comms)
        for error in await outcomes([reduction, empty_round()], within=10.0):
            assert isinstance(error, pccl.CollectiveMismatch), error
            assert len(error.calls) == 2
        assert (x == 1).all()
        await total(comms)


async def test_more_communicators_than_come_and_go_at_once() -> None:
    """Each has its own place in shared memory as long as it lives."""
    async with group(2) as comms:
        old = await each(c.split(0) for c in comms)
        for _ in range(150):
            halves = await each(c.split(0) for c in comms)
            await total(halves)
            await each(half.leave() for half in halves)
        for _ in range(20):
            await total(old)
            await total(comms)


async def test_a_communicator_that_is_left_takes_no_memory_with_it() -> None:
    async with group(2) as comms:
        halves = await each(c.split(0) for c in comms)
        tensors = [np.full(100_000, 1.0) for _ in comms]
        await each(c.all_reduce(x) for c, x in zip(halves, tensors, strict=True))
        commons = [c._runtime.engine.lanes._commons for c in comms]
        assert all(c and c._taken for c in commons)
        await each(half.leave() for half in halves)
        for engine in (c._runtime.engine for c in comms):
            engine._loop.call_soon_threadsafe(engine._sweep_lanes)
        await total(comms)
        await total(comms)
        assert not any(c and c._taken for c in commons)


def test_who_leaves_takes_nothing_from_those_who_are_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """A root has given what there was to give, and leaves; the other hears only then that they have a communicator."""
    left, adopt = threading.Event(), Engine.adopt

    def late(self: Engine, parent: int, result: SplitResult) -> Membership | None:
        if self.membership(0).view.rank == 1:
            assert left.wait(20)
        return adopt(self, parent, result)

    monkeypatch.setattr(Engine, "adopt", late)

    def body(comm: sync.Communicator) -> float:
        part = comm.split(0)
        assert part
        x = np.full(10, comm.rank + 1.0)
        part.broadcast(x, atomic=False, timeout=20)
        if comm.rank == 0:
            part.leave()
            engine = comm._runtime.engine
            wait_until(lambda: engine._peer and list(engine._peer.comms) == [0])
            engine._loop.call_soon_threadsafe(left.set)
        comm.barrier()
        return float(x[0])

    assert in_threads(2, body) == [1.0, 1.0]
