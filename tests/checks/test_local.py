"""Peers of one host, in processes of their own, that reduce and commit in shared memory: right results, and losses at every moment."""

from __future__ import annotations

import asyncio
import os
import pickle
import random
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import numpy as np
import pytest

import pccl
from pccl.collectives.pull import Pull
from pccl.core.messages import Enter, Flag, NewEpoch, Overdue, Reason
from pccl.core.types import CallId
from pccl.protocol.member import Membership
from pccl.transports.region import supported
from tests.checks.local_jobs import memory_use, run_blocking, series, strike_at_word, sweep, traces
from tests.checks.processes import ROOT, Dead, Peer, process, processes, strike_after, world_size
from tests.checks.support import QUICK, each, group, join, outcomes, until
from tests.checks.test_master_restart import life

pytestmark = [
    pytest.mark.process,
    pytest.mark.timeout(120),
    pytest.mark.skipif(not supported(), reason="shared memory needs Linux on x86-64"),
]


@asynccontextmanager
async def mixed(address: str, world: int, **settings: Any) -> AsyncIterator[list[Peer]]:
    """Every other one is a blocking peer."""
    async with AsyncExitStack() as stack:
        peers = [
            await stack.enter_async_context(process(address, f"P{k}", world=world, blocking=k % 2 == 1, **settings)) for k in range(world)
        ]
        await asyncio.gather(*(do(p, world_size_of) for p in peers))
        yield peers


async def world_size_of(comm: Any) -> int:
    return int(comm.world_size)


def do(peer: Peer, job: Any, *arguments: Any) -> asyncio.Future[Any]:
    """Have a peer of `mixed` do a job."""
    if int(peer.name[1:]) % 2:
        return peer.start(run_blocking, job, *arguments)
    return peer.start(job, *arguments)


def agree(found: list[list[dict[str, Any]]], turns: int) -> list[bool]:
    """Every call ended the same way on all, with the right result or with the inputs as they were; returns which ones committed."""
    assert [len(one) for one in found] == [turns] * len(found)
    committed = []
    for turn in range(turns):
        ends = [one[turn] for one in found]
        assert len({bool(end["error"]) for end in ends}) == 1, (turn, ends)
        assert all(end["intact"] for end in ends), (turn, ends)
        if ends[0]["error"]:
            assert {end["error"].kind for end in ends} == {"CollectiveAborted"}, ends
        else:
            assert all(end["right"] for end in ends), (turn, ends)
            assert len({end["bits"] for end in ends}) == 1
        committed.append(not ends[0]["error"])
    return committed


# --- results ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [2, 3, 4, 5])
async def test_every_collective(world: int) -> None:
    """Of both faces at once: right results, the same to the bit."""
    async with pccl.Master() as master, mixed(master.address, world) as peers:
        found = await asyncio.wait_for(asyncio.gather(*(do(p, sweep, world) for p in peers)), 60)
        assert len(found[0]) == 8 * 2 * 5
        for other in found[1:]:
            assert other == found[0]


# --- losses -----------------------------------------------------------------------------------------------------------

COUNTS = [3, 100_001, 20, 16_384, 300_007, 16_385, 1, 70_000] * 2


@pytest.mark.parametrize("seed", [1, 2])
async def test_killed_at_any_moment(seed: int) -> None:
    """Five peers in a series of calls, of which three die one by one, before or after they say how far they are, or while they read."""
    r = random.Random(seed)
    async with pccl.Master() as master, mixed(master.address, 5) as peers:
        for _ in range(3):
            victim = peers.pop(r.randrange(len(peers)))
            retry = r.random() < 0.5
            if r.random() < 0.6:
                await do(victim, strike_at_word, r.randrange(1, 3 * len(COUNTS)), r.random() < 0.5)
            else:
                await do(victim, strike_after, r.randrange(1, 4 * sum(COUNTS)))
            last = do(victim, series, victim.name, COUNTS, retry)
            found = await asyncio.wait_for(asyncio.gather(*(do(p, series, p.name, COUNTS, retry) for p in peers)), 40)
            with pytest.raises(Dead):
                await last
            committed = agree(found, len(COUNTS))
            assert committed.count(False) == (0 if retry else 1), committed


@pytest.mark.parametrize(("phase", "late"), [(1, True), (2, False), (2, True), (3, False)])
async def test_stopped_for_long_and_woken(phase: int, late: bool) -> None:
    """Whoever is evicted in its sleep has its input, or a result that the others have, too; these go on without it."""
    times: dict[str, Any] = {"heartbeat_interval": 0.1, "heartbeat_timeout": 0.6}
    options = pccl.Options(**times)
    async with pccl.Master(options=options) as master, mixed(master.address, 3, **times) as peers:
        sleeper, *others = peers if late else peers[::-1]
        counts = [100_001, 3, 70_000]
        await do(sleeper, strike_at_word, phase, late, signal.SIGSTOP)
        sleeping = do(sleeper, series, sleeper.name, counts, False)
        found = await asyncio.wait_for(asyncio.gather(*(do(p, series, p.name, counts, False) for p in others)), 30)
        committed = agree(found, len(counts))
        sleeper.signal(signal.SIGCONT)
        woken = await asyncio.wait_for(sleeping, 20)
        assert woken[-1]["error"].kind == "Evicted"
        for turn, end in enumerate(woken[:-1]):
            assert committed[turn]
            assert end["right"]
            assert end["bits"] == found[0][turn]["bits"]
        assert all(end["intact"] for end in woken)


async def test_the_master_is_killed_in_the_middle() -> None:
    """Calls that commit without it go on as before; a new one takes over."""
    async with life() as master, mixed(master.address, 3) as peers:
        for retry in (True, False):
            calls = [do(p, series, p.name, COUNTS * 12, retry) for p in peers]
            await master.restart()
            found = await asyncio.wait_for(asyncio.gather(*calls), 40)
            committed = agree(found, 12 * len(COUNTS))
            assert committed.count(False) <= (0 if retry else 1)


def unix_sockets() -> str:
    with open("/proc/net/unix") as file:
        return file.read()


async def test_nothing_is_left_of_processes_that_are_killed() -> None:
    shared = set(os.listdir("/dev/shm"))
    async with pccl.Master() as master, processes(master.address, 3) as peers:
        found = await asyncio.gather(*(p.do(traces) for p in peers))
        names = [name for _, sockets in found for name in sockets]
        assert len(names) == 3
        assert all(f"@{name}" in unix_sockets() for name in names)
        await peers[0].do(strike_after, 20_000_000)
        calls = [p.start(series, p.name, [1_000_000] * 50, False) for p in peers]
        with pytest.raises(Dead):
            await calls[0]
        for p in peers[1:]:
            p.signal(signal.SIGKILL)
        assert [await p.ended() for p in peers] == [-signal.SIGKILL] * 3
        assert not {str(pid) for pid, _ in found} & set(os.listdir("/proc"))
    assert not any(name in unix_sockets() for name in names)
    assert not any("pccl" in name for name in set(os.listdir("/dev/shm")) - shared)


# --- who may read whom ------------------------------------------------------------------------------------------------

PLAIN_USER = """
import asyncio, ctypes, os, pickle, sys
# what is imported late cannot be read any more then
import concurrent.futures.thread, encodings.idna, hashlib, numpy.random, numpy.testing, unittest.case, unittest.mock
import uvloop, zlib, zmq.asyncio
import pccl.collectives.lane, pccl.collectives.schedules, pccl.transports.keys, pccl.transports.local, pccl.transports.zmq_client
from tests.checks import child, local_jobs
os.setgroups([])
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
ctypes.CDLL(None).prctl(4, {dumpable}, 0, 0, 0)  # PR_SET_DUMPABLE
asyncio.run(child.asynchronous(*pickle.loads(bytes.fromhex(sys.argv[1]))))
"""


@asynccontextmanager
async def plain_user(address: str, name: str, world: int, *, dumpable: bool) -> AsyncIterator[Peer]:
    """A peer's process without any privilege."""
    pipe, data = asyncio.subprocess.PIPE, pickle.dumps((address, name, world, QUICK)).hex()
    command = [sys.executable, "-c", PLAIN_USER.format(dumpable=int(dumpable)), data]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    peer = Peer(name, await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, cwd=ROOT, env=env))
    try:
        yield peer
    finally:
        await peer.bury()


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs to become another user")


@needs_root
@pytest.mark.parametrize("dumpable", [True, False])
async def test_members_that_may_not_read_each_other(dumpable: bool) -> None:
    """Then they copy through shared memory, with the same results."""
    async with pccl.Master() as master, AsyncExitStack() as stack:
        enter = stack.enter_async_context
        peers = [await enter(plain_user(master.address, f"P{k}", 3, dumpable=dumpable or k > 0)) for k in range(3)]
        assert await asyncio.gather(*(p.do(world_size) for p in peers)) == [3, 3, 3]
        found = await asyncio.gather(*(p.do(memory_use) for p in peers))
        assert [algorithm for _, algorithm in found] == ["local"] * 3
        assert sorted(readable for readable, _ in found) == ([True] * 3 if dumpable else [False] * 3)
        one, *rest = await asyncio.gather(*(p.do(sweep, 77) for p in peers))
        assert rest == [one] * 2
        victim = peers.pop(1)
        await victim.do(strike_after, 1_000_000)
        last = victim.start(series, victim.name, COUNTS, False)
        agree(await asyncio.gather(*(p.do(series, p.name, COUNTS, False) for p in peers)), len(COUNTS))
        with pytest.raises(Dead):
            await last


@needs_root
async def test_members_of_two_users_share_nothing() -> None:
    async with (
        pccl.Master() as master,
        plain_user(master.address, "P0", 2, dumpable=True) as one,
        process(master.address, "P1", world=2) as other,
    ):
        assert await asyncio.gather(one.do(world_size), other.do(world_size)) == [2, 2]
        found = await asyncio.gather(one.do(memory_use), other.do(memory_use))
        assert all(not readable and algorithm != "local" for readable, algorithm in found)
        assert all(agree(await asyncio.gather(*(p.do(series, p.name, COUNTS, False) for p in (one, other))), len(COUNTS)))


# --- in one process: what calls do to each other ----------------------------------------------------------------------


async def works(comms: list[Any]) -> None:
    """A small call and a large one."""
    for count in (3, 50_000):
        tensors = [np.full(count, k + 1.0) for k in range(len(comms))]
        await each(c.all_reduce(x) for c, x in zip(comms, tensors, strict=True))
        assert all((x == sum(range(1, len(comms) + 1))).all() for x in tensors)


async def test_many_calls_at_once() -> None:
    """More than there are slots, small and large, plain and atomic, among tagged calls and rounds, on a communicator and its part."""
    async with group(3) as comms:
        halves = await each(c.split(c.rank % 2) for c in comms)
        text = random.Random(5)
        plan = [(text.choice((3, 9_000, 40_000)), text.random() < 0.7, text.choice((None, None, None, "tag", "half"))) for _ in range(120)]

        async def member(k: int) -> None:
            calls, wants, tensors = [], [], []
            for turn, (count, atomic, kind) in enumerate(plan):
                x = np.full(count, k + 1.0 + turn)
                tensors.append(x)
                if kind == "half":
                    calls.append(halves[k].all_reduce(x, atomic=atomic))
                    wants.append(4 + 2 * turn if k != 1 else 2 + turn)
                else:
                    calls.append(comms[k].all_reduce(x, atomic=atomic, tag=turn if kind else None))
                    wants.append(6 + 3 * turn)
            infos = await asyncio.gather(*calls)
            for info, x, want, (_, _, kind) in zip(infos, tensors, wants, plan, strict=True):
                assert (x == want).all()
                assert (info.algorithm == "local") == (kind != "tag" and info.world_size > 1)
            async with comms[k].round() as r:
                inside = np.ones(10)
                r.all_reduce(inside)
                x = np.ones(50_000)
                await comms[k].all_reduce(x)
                assert (x == 3).all()
            assert (inside == 3).all()

        await each(member(k) for k in range(3))
        await works(comms)


@pytest.mark.parametrize("count", [3, 50_000])
async def test_a_call_that_is_cancelled_at_any_moment(count: int) -> None:
    """All have the result, or all others are told and everyone has its input."""
    seen = set()
    async with group(3) as comms:
        for moment in range(1, 40):
            tensors = [np.full(count, k + 1.0) for k in range(3)]
            calls = [asyncio.ensure_future(c.all_reduce(x)) for c, x in zip(comms, tensors, strict=True)]
            for _ in range(moment):
                await asyncio.sleep(0)
            calls[moment % 3].cancel()
            ends = await outcomes(calls)
            others = [end for k, end in enumerate(ends) if k != moment % 3]
            if isinstance(others[0], pccl.CollectiveAborted):
                assert all(isinstance(end, pccl.CollectiveAborted) for end in others), ends
                assert isinstance(ends[moment % 3], asyncio.CancelledError)
                assert [x[0] for x in tensors] == [1.0, 2.0, 3.0]
                assert all((x == x[0]).all() for x in tensors)
            else:
                assert all(isinstance(end, pccl.Info) for end in others), ends
                assert all((x == 6).all() for x in tensors)
            seen.add(type(others[0]))
        await works(comms)
    assert seen == {pccl.CollectiveAborted, pccl.Info}


async def test_a_deadline_before_and_after_a_member_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """One never comes; then one comes and does not finish its share. The call ends for all, and the next one works."""
    async with group(3) as comms:
        tensors = [np.full(50_000, k + 1.0) for k in range(3)]
        ends = await outcomes(c.all_reduce(x, timeout=0.2) for c, x in zip(comms[:2], tensors, strict=False))
        ends += await outcomes([comms[2].all_reduce(tensors[2])])
        assert [type(end) for end in ends] == [pccl.CollectiveTimeout] * 3
        work, slow = Pull._work, [True]

        def stuck(self: Pull) -> Any:
            while slow[0] and self._lane.rank == 2:
                yield False
            yield from work(self)

        monkeypatch.setattr(Pull, "_work", stuck)
        calls = [
            asyncio.ensure_future(c.all_reduce(x, timeout=0.5 if k == 0 else 20))
            for k, (c, x) in enumerate(zip(comms, tensors, strict=True))
        ]
        ops = await until(lambda: [op for c in comms[:2] for op in c._runtime.engine._in_flight if op.exposed][1:])
        assert ops
        ends = await outcomes(calls)
        assert [type(end) for end in ends] == [pccl.CollectiveTimeout] * 3, ends
        assert [x[0] for x in tensors] == [1.0, 2.0, 3.0]
        slow[0] = False
        await works(comms)
        assert comms[0].world_size == 3


@pytest.mark.parametrize("count", [3, 50_000])
async def test_a_call_that_is_cancelled_when_it_is_committed_does_the_next_one_no_harm(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The master is asked to end it for all, and stops them; by then they are in the next call, which goes on."""
    async with group(3) as comms:
        heard: list[bool] = []
        receive = Membership.receive

        def noted(self: Membership, m: object, now: float) -> None:
            if isinstance(m, NewEpoch):
                heard.append(True)
            receive(self, m, now)

        monkeypatch.setattr(Membership, "receive", noted)
        tensors = [np.full(count, k + 1.0) for k in range(3)]
        following = [np.full(count, k + 2.0) for k in range(3)]
        engine = comms[0]._runtime.engine
        membership = engine.membership(0)
        await each(c.all_reduce(x) for c, x in zip(comms, tensors, strict=True))
        waiting = [asyncio.ensure_future(c.all_reduce(x)) for c, x in zip(comms[:2], following, strict=False)]
        await until(lambda: membership.in_flight == 1)
        call = CallId(None, membership.next_index - 2)
        enter = Enter(0, membership.epoch, call, 5, "all_reduce()", b"", Flag.PLAIN | Flag.SEALED)
        for message in (enter, Overdue(0, membership.epoch, call, Reason.CANCELLED, "too late")):
            engine._loop.call_soon_threadsafe(engine.send, message)
        await until(lambda: heard)
        waiting.append(asyncio.ensure_future(comms[2].all_reduce(following[2])))
        assert all(isinstance(end, pccl.Info) for end in await outcomes(waiting))
        assert all((x == 9).all() for x in following)


OTHERS: dict[str, Any] = {
    "update": lambda c: c.update(),
    "split": lambda c: c.split(0),
    "barrier": lambda c: c.barrier(),
    "plain": lambda c: c.all_reduce(np.ones(50_000), atomic=False),
    "retry": lambda c: c.all_reduce(np.ones(50_000), retry=True),
    "other count": lambda c: c.all_reduce(np.ones(3)),
    "other op": lambda c: c.all_reduce(np.ones(50_000), "max"),
    "by links": lambda c: c.all_reduce(np.ones(50_000), algorithm="ring"),
    "sync_state": lambda c: c.sync_state({"x": np.ones(3)}, revision=1),
}


@pytest.mark.parametrize("atomic", [True, False])
async def test_calls_that_do_not_match(atomic: bool) -> None:
    async with group(2) as comms:
        for name, other in OTHERS.items():
            if name == "plain" and not atomic:
                continue
            await each(c.barrier(atomic=False) for c in comms)  # what was skipped just before is not this
            x = np.ones(50_000)
            ends = await outcomes([comms[0].all_reduce(x, atomic=atomic), other(comms[1])], within=10.0)
            assert all(isinstance(end, pccl.CollectiveMismatch) for end in ends), (name, ends)
            assert not atomic or (x == 1).all()
            await works(comms)


async def test_newcomers_and_leavers_between_calls() -> None:
    """Calls say that somebody waits; updates that are skipped cost nothing; who leaves early does not disturb the last call."""
    async with pccl.Master() as master, AsyncExitStack() as stack:
        comms = [await join(master.address, "P0", 1)]
        stack.push_async_callback(comms[0].close)
        sizes: list[int] = []

        async def steps(comm: Any, until_world: int) -> None:
            while True:
                await comm.update()
                x = np.ones(20_000)
                await comm.all_reduce(x)
                assert (x == comm.world_size).all()
                sizes.append(comm.world_size)
                if comm.world_size == until_world:
                    return

        for world in (2, 3, 4):

            async def newcomer(name: str = f"P{world}", world: int = world) -> Any:
                comm = await pccl.connect(master.address, name=name, **QUICK)
                await steps(comm, world)
                return comm

            *_, new = await each([*(steps(c, world) for c in comms), newcomer()])
            stack.push_async_callback(new.close)
            comms.append(new)
        assert set(sizes) >= {2, 3, 4}
        gone = comms.pop(1)
        y = [np.ones(50_000) for _ in (*comms, gone)]
        last = [asyncio.ensure_future(c.all_reduce(x)) for c, x in zip([*comms, gone], y, strict=True)]
        await last[-1]
        await gone.leave()
        await each(last)
        assert all((x == 4).all() for x in y)
        while comms[0].world_size > 3:
            await each(c.update() for c in comms)
        await works(comms)
