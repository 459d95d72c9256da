"""Who counts as alive: a parent whose forked child outlives it, a held interpreter, a stopped process."""

from __future__ import annotations

import asyncio
import ctypes
import multiprocessing
import os
import signal
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pccl
from tests.checks.processes import Dead, Failure, Peer, processes, strike_after
from tests.checks.support import QUICK, until

pytestmark = pytest.mark.process

SLOW: dict[str, Any] = {"heartbeat_timeout": 60.0, "stall_timeout": 120.0}
"""So that only the end of a connection can tell of a death."""


async def reduce(comm: Any, count: int, retry: bool = False) -> tuple[float, int]:
    """The sum, and of how many; raises AssertionError if an input is not what it was after an error."""
    x = np.ones(count, np.float32)
    try:
        info = await comm.all_reduce(x, retry=retry)
    except pccl.PcclError:
        assert (x == 1).all()
        raise
    assert (x == x[0]).all()
    return float(x[-1]), info.world_size


def state_of(pid: int) -> str:
    """R, S, T (stopped), Z, ..., or nothing if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


# --- forked children --------------------------------------------------------------------------------------------------


async def fork(comm: Any) -> int:
    """Fork a child that waits for ever."""
    child = os.fork()
    if child == 0:
        while True:
            signal.pause()
    return child


def worker(comm: Any, tell: Connection) -> None:
    """What a DataLoader's worker is: a daemonic process with the parent's memory."""
    try:
        asyncio.run(comm.barrier())
        tell.send("the barrier was passed")
    except pccl.PcclError as e:
        tell.send(f"{type(e).__name__}: {e}")
    while True:
        signal.pause()


async def fork_worker(comm: Any) -> tuple[int, str]:
    """Likewise with multiprocessing; what the child's use of the communicator came to."""
    here, there = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=worker, args=(comm, there), daemon=True)
    child.start()
    assert child.pid
    return child.pid, await asyncio.to_thread(here.recv)


async def orphaned(peers: list[Peer], child: int) -> None:
    """The first peer is killed; the others hear of it at once although its child lives on."""
    try:
        calls = [p.start(reduce, 1_000_000) for p in peers[1:]]
        peers[0].signal(signal.SIGKILL)
        for found in await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 30.0):
            assert found.failure.kind == "CollectiveAborted"  # type: ignore[union-attr]
            assert found.failure.data["lost"] == (peers[0].name,)  # type: ignore[union-attr]
        assert await asyncio.gather(*(p.do(reduce, 1000) for p in peers[1:])) == [(2.0, 2)] * 2
        assert state_of(child) in "SR"
    finally:
        if state_of(child):
            os.kill(child, signal.SIGKILL)


async def test_a_forked_child_that_outlives_its_killed_parent_delays_nobody() -> None:
    async with pccl.Master(options=pccl.Options(**SLOW)) as master, processes(master.address, 3, **SLOW) as peers:
        await orphaned(peers, await peers[0].do(fork))


async def test_a_worker_process_that_outlives_its_killed_parent_delays_nobody() -> None:
    async with pccl.Master(options=pccl.Options(**SLOW)) as master, processes(master.address, 3, **SLOW) as peers:
        child, said = await peers[0].do(fork_worker)
        try:
            assert said.startswith("InvalidArgument: this process was forked")
            assert await asyncio.gather(*(p.do(reduce, 1000) for p in peers)) == [(3.0, 3)] * 3  # the parent is as before
        except BaseException:
            os.kill(child, signal.SIGKILL)
            raise
        await orphaned(peers, child)


# --- held and stopped -------------------------------------------------------------------------------------------------


async def hold(comm: Any, seconds: int) -> None:
    """As PyDLL, the call keeps the interpreter: neither the engine's thread nor any other runs."""
    left = ctypes.PyDLL(None).sleep(seconds)
    assert left == 0


async def test_a_held_interpreter_evicts_nobody() -> None:
    """10 s, with the default options: ZeroMQ's own thread answers for it."""
    async with pccl.Master() as master, processes(master.address, 3) as peers:
        held = peers[2].start(hold, 10)
        calls = [p.start(reduce, 300_000) for p in peers]
        await held
        assert await asyncio.gather(*calls) == [(3.0, 3)] * 3
        assert await asyncio.gather(*(p.do(reduce, 1000) for p in peers)) == [(3.0, 3)] * 3


async def come_back(comm: Any, address: str) -> tuple[float, int]:
    """Join again as a newcomer, in the same process, and reduce."""
    again = await pccl.connect(address, name="again", **QUICK)
    while again.world_size < 3:
        await again.update()
    try:
        return await reduce(again, 1000)
    finally:
        await again.close()


async def let_in(comm: Any) -> tuple[float, int]:
    while comm.world_size < 3:
        await comm.update()
    return await reduce(comm, 1000)


async def test_a_stopped_process_is_lost_after_the_heartbeat_timeout_and_can_come_back() -> None:
    """With the default options: 3 s, and one more to tell everybody."""
    count = 4_000_000
    async with pccl.Master() as master, processes(master.address, 3) as peers:
        stops, *others = peers
        await stops.do(strike_after, 2_000_000, signal.SIGSTOP)
        woken = stops.start(reduce, count)
        calls = [p.start(reduce, count) for p in others]
        await until(lambda: state_of(stops.pid) == "T")
        loop = asyncio.get_running_loop()
        stopped = loop.time()
        for found in await asyncio.gather(*calls, return_exceptions=True):
            assert found.failure.kind == "CollectiveAborted"  # type: ignore[union-attr]
            assert found.failure.data["lost"] == ("P0",)  # type: ignore[union-attr]
        assert loop.time() - stopped <= 3.0 + 1.0
        assert await asyncio.gather(*(p.do(reduce, count) for p in others)) == [(2.0, 2)] * 2
        going = [p.start(reduce, count) for p in others]
        stops.signal(signal.SIGCONT)
        with pytest.raises(Exception, match="Evicted: this peer is no longer in its group"):
            await woken
        assert await asyncio.gather(*going) == [(2.0, 2)] * 2
        refused = await stops.outcome(reduce, 10)
        assert isinstance(refused, Failure)
        assert refused.kind == "Evicted"
        found = await asyncio.gather(stops.do(come_back, master.address), *(p.do(let_in) for p in others))
        assert found == [(3.0, 3)] * 3


async def test_a_killed_process_is_lost_at_once() -> None:
    async with pccl.Master(options=pccl.Options(**SLOW)) as master, processes(master.address, 3, **SLOW) as peers:
        await peers[1].do(strike_after, 2_000_000)
        found = await asyncio.gather(*(p.outcome(reduce, 4_000_000, True) for p in peers), return_exceptions=True)
        assert isinstance(found[1], Dead)
        assert [found[0], found[2]] == [(2.0, 2)] * 2
