"""Checks 16 and 17: many calls at once in any order, and calls whose task is cancelled."""

from __future__ import annotations

import asyncio
import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import numpy as np
import pytest

import pccl
from pccl.communicator import Communicator
from pccl.sync import Communicator as Blocking
from tests.checks.support import each, group, in_threads, on_node, outcomes, simulate, simulated_members, until
from tests.sim.world import World
from tests.support.control import descriptors

pytestmark = pytest.mark.usefixtures("every_transport")

TAGS = 64
SIZES = (1, 300, 5_000, 60_000, 300_000)


def contribution(rank: int, tag: int) -> np.ndarray[Any, Any]:
    return ((np.arange(SIZES[tag % len(SIZES)]) + 7 * rank + tag) % 53).astype(np.float32)


def right(results: list[np.ndarray[Any, Any]], world: int, tag: int) -> bool:
    want = sum(contribution(rank, tag) for rank in range(world))
    return all((x == want).all() for x in results)


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("order", ["opposite", "shuffled"])
async def test_check_16_tags_in_opposite_orders(world: int, order: str) -> None:
    async with group(world) as comms:
        tensors = [[contribution(rank, tag) for tag in range(TAGS)] for rank in range(world)]

        async def launch(comm: Communicator, rank: int) -> None:
            tags = list(range(TAGS))
            if order == "shuffled":
                random.Random(rank).shuffle(tags)
            elif rank % 2:
                tags.reverse()
            await asyncio.gather(*(comm.all_reduce(tensors[rank][tag], tag=tag) for tag in tags))

        await each(launch(comm, rank) for rank, comm in enumerate(comms))
        for tag in range(TAGS):
            assert right([mine[tag] for mine in tensors], world, tag)


@pytest.mark.parametrize("pool", [1, 4])
def test_check_16_from_one_thread_and_from_four(pool: int) -> None:
    """Blocking peers: each launches all its calls, in opposite orders, from a pool of threads, and then waits for them."""

    def body(comm: Blocking) -> list[np.ndarray[Any, Any]]:
        tensors = [contribution(comm.rank, tag) for tag in range(TAGS)]
        tags = list(range(TAGS))[:: -1 if comm.rank else 1]
        with ThreadPoolExecutor(pool) as threads:
            works = list(threads.map(lambda tag: comm.all_reduce(tensors[tag], tag=tag, async_op=True), tags))
        for work in works:
            work.wait()
        return tensors

    found = in_threads(2, body)
    for tag in range(TAGS):
        assert right([mine[tag] for mine in found], 2, tag)


def test_check_16_blocking_calls_of_several_threads() -> None:
    """Four threads of each peer make blocking calls of their own tags, untagged ones of the others in between."""

    def body(comm: Blocking) -> list[np.ndarray[Any, Any]]:
        tensors = [contribution(comm.rank, tag) for tag in range(TAGS)]

        def run(thread: int) -> None:
            for tag in range(thread, TAGS, 4):
                comm.all_reduce(tensors[tag], tag=f"{thread} {tag}")

        with ThreadPoolExecutor(4) as threads:
            list(threads.map(run, range(4) if comm.rank else reversed(range(4))))
        return tensors

    found = in_threads(2, body)
    for tag in range(TAGS):
        assert right([mine[tag] for mine in found], 2, tag)


async def test_check_16_one_call_too_many_raises_and_does_not_wait() -> None:
    async with group(2, max_in_flight=4) as comms:
        x = [np.ones(10) for _ in range(4)]
        calls = [asyncio.ensure_future(comms[0].all_reduce(x[tag], tag=tag)) for tag in range(4)]
        error = (await outcomes([comms[0].barrier(tag="more")]))[0]
        assert isinstance(error, pccl.InvalidArgument), error
        assert "max_in_flight" in str(error)
        await each([*calls, *(comms[1].all_reduce(np.ones(10), tag=tag) for tag in reversed(range(4)))])
        assert all((one == 2).all() for one in x)


# --- cancellation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "out of place"])
async def test_check_17_a_cancelled_task_ends_the_call_for_all(in_place: bool, every_transport: str) -> None:
    """Two of three are in the call, with data under way; one's task is cancelled. The third, which comes later, hears of it, too."""
    async with group(3) as comms:
        await each(c.all_reduce(np.zeros(500_000)) for c in comms)
        flows = [flow for c in comms for flow in cast(Any, c._runtime).engine.executor.flows.values()]
        await until(lambda: every_transport == "auto" or all(flow.link._stripes for flow in flows))  # large calls have them made
        before = descriptors()
        tasks_before = asyncio.all_tasks()
        inputs = [np.full(500_000, k + 1.0) for k in range(3)]
        outs = [None if in_place else np.zeros(500_000) for _ in range(3)]
        executors = [cast(Any, comms[k]._runtime).engine.executor for k in (0, 1)]
        began = [(executor, executor.progress) for executor in executors]
        tasks = [asyncio.create_task(comms[k].all_reduce(inputs[k], out=outs[k])) for k in (0, 1)]
        await until(
            lambda: (
                any(executor.progress > moved for executor, moved in began)
                or all(e._pulls and next(iter(e._pulls))._entered for e in executors)
            )
        )
        tasks[0].cancel()
        cancelled, aborted = await outcomes(tasks)
        assert isinstance(cancelled, asyncio.CancelledError)
        assert isinstance(aborted, pccl.CollectiveAborted), aborted
        name = comms[0].view.members[0].name
        assert f"{name} cancelled it" in str(aborted)
        assert aborted.lost == aborted.left == ()
        assert len(aborted.survivors) == 3
        (late,) = await outcomes([comms[2].all_reduce(inputs[2], out=outs[2])])
        assert isinstance(late, pccl.CollectiveAborted), late
        assert all((x == k + 1.0).all() for k, x in enumerate(inputs))
        assert asyncio.all_tasks() == tasks_before
        assert descriptors() == before
        epoch = comms[0].view.epoch
        await each(c.all_reduce(x) for c, x in zip(comms, inputs, strict=True))
        assert all((x == 6.0).all() for x in inputs)
        assert all(c.view.epoch == epoch for c in comms), "a cancellation keeps the epoch"


@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "out of place"])
@pytest.mark.parametrize("algorithm", ["direct", "ring", "tree"])
def test_check_17_at_any_moment(algorithm: str, in_place: bool) -> None:
    """In virtual time, after any number of callbacks: all have the result, or all have their inputs, the canceller, too."""

    async def main(world: World) -> list[str]:
        comms = await simulated_members(world, "ABC")
        seen = []
        for turn in range(60):
            inputs = {n: np.full(20_000, k + 1.0, np.float32) for k, n in enumerate(comms)}
            outs = {n: None if in_place else np.zeros(20_000, np.float32) for n in comms}
            tasks = {n: on_node(world, n, c.all_reduce(inputs[n], out=outs[n], algorithm=algorithm)) for n, c in comms.items()}
            due = asyncio.Event()
            world.loop.alarms.append((world.loop.steps + 1 + 8 * turn, due))
            await asyncio.wait([asyncio.ensure_future(due.wait()), *tasks.values()], timeout=0.2, return_when=asyncio.FIRST_COMPLETED)
            world.loop.alarms.clear()
            due.set()
            tasks["B"].cancel()
            results = dict(zip(tasks, await asyncio.gather(*tasks.values(), return_exceptions=True), strict=True))
            assert type(results["A"]) is type(results["C"]), results
            assert isinstance(results["B"], (asyncio.CancelledError, pccl.Info)), results["B"]
            committed = isinstance(results["A"], pccl.Info)
            for k, n in enumerate(comms):
                buffer = inputs[n] if in_place else outs[n]
                assert buffer is not None
                if committed:
                    assert (buffer == 6.0).all(), "a cancellation that meets a commit has the result"
                if not committed or not in_place:
                    assert (inputs[n] == k + 1.0).all()
            if not committed:
                assert isinstance(results["A"], pccl.CollectiveAborted)
                assert isinstance(results["B"], asyncio.CancelledError)
                assert "B cancelled it" in str(results["A"])
            seen.append("late" if committed and isinstance(results["B"], asyncio.CancelledError) else type(results["A"]).__name__)
        return seen

    seen = [kind for seed in range(3) for kind in simulate(main, seed=seed)]
    assert "CollectiveAborted" in seen
    assert {"Info", "late"} & set(seen), "no cancellation came too late"


async def test_check_17_cancelled_rounds_retries_and_waits() -> None:
    async with group(2) as comms:
        x, y = np.ones(100_000), np.ones(100_000)

        async def run(comm: Communicator, body: asyncio.Event) -> None:
            async with comm.round(retry=True) as r:
                r.all_reduce(x if comm is comms[0] else y)
                body.set()

        begun = [asyncio.Event(), asyncio.Event()]
        first = asyncio.create_task(run(comms[0], begun[0]))
        await begun[0].wait()
        first.cancel()
        second = asyncio.create_task(run(comms[1], begun[1]))
        cancelled, aborted = await outcomes([first, second])
        assert isinstance(cancelled, asyncio.CancelledError)
        assert isinstance(aborted, pccl.CollectiveAborted), "final for all, also with retry"
        assert (x == 1).all()
        assert (y == 1).all()
        waiting = asyncio.create_task(comms[0].sync_state({"x": x}, revision=1))
        barrier = asyncio.create_task(comms[0].barrier(tag="b"))
        await asyncio.sleep(0)
        waiting.cancel()
        barrier.cancel()
        assert all(isinstance(e, asyncio.CancelledError) for e in await outcomes([waiting, barrier]))
        for error in await outcomes([comms[1].sync_state({"x": y}, revision=1), comms[1].barrier(tag="b")]):
            assert isinstance(error, pccl.CollectiveAborted), error
        await each(c.all_reduce(z) for c, z in zip(comms, (x, y), strict=True))
        assert (x == 2).all()
