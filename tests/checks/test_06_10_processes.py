"""Checks 6, 9 and 10: processes that die, stop and wake inside a call."""

from __future__ import annotations

import asyncio
import random
import signal
from contextlib import AsyncExitStack

import pytest

import pccl
from tests.checks.jobs import reduce, rejoin, update_to
from tests.checks.processes import Dead, Peer, process, processes, strike_after, world_size

pytestmark = [pytest.mark.process, pytest.mark.timeout(120), pytest.mark.usefixtures("every_transport")]

COUNT = 600_001
MOVED = 3 * 4 * COUNT
"""Payload bytes that each of four peers sends and receives in an all_reduce by ring; through shared memory, half of it: nothing is sent."""


@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "out of place"])
async def test_check_06_sigkill_inside_a_call(in_place: bool, every_transport: str) -> None:
    """One of four dies at some byte of the call, first and last included: the others get the same verdict and have their inputs."""
    r = random.Random(f"check 6 {in_place}")
    moved = MOVED // 2 if every_transport == "auto" else MOVED
    offsets = [1, *sorted(r.randrange(2, moved - 4) for _ in range(3)), moved - 4]
    async with pccl.Master() as master, AsyncExitStack() as stack:
        peers: list[Peer] = list(await stack.enter_async_context(processes(master.address, 4)))
        for turn, offset in enumerate(offsets):
            victim = peers.pop(r.randrange(4))
            await victim.do(strike_after, offset)
            end, *found = await asyncio.gather(*(p.outcome(reduce, p.name, turn, COUNT, in_place) for p in (victim, *peers)))
            assert isinstance(end, Dead)
            assert await victim.ended() == -signal.SIGKILL
            assert len({bool(one["error"]) for one in found}) == 1, found
            if not found[0]["error"]:  # it died when all others had their results already; then their next call tells of the loss
                assert offset > moved // 2
                assert all(one["right"] and one["intact"] and len(one["members"]) == 4 for one in found)
                assert len({one["bits"] for one in found}) == 1
                found = await asyncio.gather(*(p.do(reduce, p.name, turn, COUNT, in_place) for p in peers))
            for one in found:
                assert one["intact"]
                assert one["error"].kind == "CollectiveAborted"
                assert one["error"].data["lost"] == (victim.name,)
                assert one["error"].data["survivors"] == found[0]["error"].data["survivors"]
                assert sorted(one["error"].data["survivors"]) == sorted(p.name for p in peers)
            again = await asyncio.gather(*(p.do(reduce, p.name, turn + 100, COUNT, in_place) for p in peers))
            assert all(one["right"] and sorted(one["members"]) == sorted(p.name for p in peers) for one in again)
            assert len({one["bits"] for one in again}) == 1
            if offset != offsets[-1]:
                fresh = await stack.enter_async_context(process(master.address, f"P{4 + turn}", world=4))
                await asyncio.gather(*(p.do(update_to, 4) for p in peers), fresh.do(world_size))
                peers.append(fresh)


@pytest.mark.parametrize("quantize", [None, "float16"])
@pytest.mark.parametrize("retry", [False, True])
@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "out of place"])
async def test_check_06_survivors_get_their_sum_or_their_inputs(
    in_place: bool, retry: bool, quantize: str | None, every_transport: str
) -> None:
    """With retry the sum, without it the inputs: one is killed in the middle of the call."""
    async with pccl.Master() as master, processes(master.address, 4) as peers:
        victim, *others = peers
        await victim.do(strike_after, (MOVED // 2 if every_transport == "auto" else MOVED) // 3)
        end, *found = await asyncio.gather(*(p.outcome(reduce, p.name, 0, COUNT, in_place, retry, quantize) for p in peers))
        assert isinstance(end, Dead)
        if not retry:
            assert all(one["error"].kind == "CollectiveAborted" and one["intact"] for one in found), found
            return
        assert all(one["error"] is None and one["right"] and one["intact"] for one in found), found
        assert all(sorted(one["members"]) == [p.name for p in others] for one in found)
        assert len({one["bits"] for one in found}) == 1


async def test_check_09_killed_until_one_is_left() -> None:
    """Below min_world_size the survivor gets TooFewPeers, its input is intact, and it goes on when somebody joins."""
    async with pccl.Master() as master, processes(master.address, 4, min_world_size=2) as peers:
        for left in (3, 2, 1):
            victim = peers.pop(0)
            await victim.do(strike_after, 1000)
            end, *found = await asyncio.gather(*(p.outcome(reduce, p.name, left, COUNT, left % 2 == 0) for p in (victim, *peers)))
            assert isinstance(end, Dead)
            assert [one["error"].kind for one in found] == ["CollectiveAborted"] * left
            assert all(one["intact"] for one in found)
        (last,) = peers
        for in_place in (True, False):
            alone = await last.do(reduce, last.name, 9, COUNT, in_place)
            assert alone["error"].kind == "TooFewPeers"
            assert alone["intact"]
            assert "min_world_size is 2" in alone["error"].text
            assert "update()" in alone["error"].text
        async with process(master.address, "P8", world=2, min_world_size=2) as fresh:
            assert sorted((await asyncio.gather(last.do(update_to, 2), fresh.do(update_to, 2)))[0]) == ["P3", "P8"]
            both = await asyncio.gather(last.do(reduce, "P3", 10, COUNT, True), fresh.do(reduce, "P8", 10, COUNT, True))
            assert all(one["right"] for one in both)
            assert both[0]["bits"] == both[1]["bits"]


async def test_check_09_alone_with_the_default_a_peer_reduces_with_itself() -> None:
    async with pccl.Master() as master, processes(master.address, 2) as (victim, last):
        await victim.do(strike_after, 1000)
        end, found = await asyncio.gather(victim.outcome(reduce, "P0", 0, COUNT, True), last.do(reduce, "P1", 0, COUNT, True))
        assert isinstance(end, Dead)
        assert found["error"].kind == "CollectiveAborted"
        alone = await last.do(reduce, "P1", 1, COUNT, True)
        assert alone["right"]
        assert alone["members"] == ["P1"]


@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "out of place"])
async def test_check_10_stopped_inside_a_call_and_woken_later(in_place: bool) -> None:
    """The others go on once the silence is long enough; the woken one is told, has its input, corrupts nothing, and can come back."""
    async with pccl.Master() as master, processes(master.address, 4) as peers:
        sleeper, *others = peers
        await sleeper.do(strike_after, MOVED // 6, signal.SIGSTOP)
        sleeping = sleeper.start(reduce, sleeper.name, 0, COUNT, in_place)
        found = await asyncio.gather(*(p.do(reduce, p.name, 0, COUNT, in_place, within=30.0) for p in others))
        for one in found:
            assert one["error"].kind == "CollectiveAborted"
            assert one["error"].data["lost"] == (sleeper.name,)
            assert one["intact"]
        calls = [p.start(reduce, p.name, turn, COUNT, in_place) for turn in (1, 2, 3) for p in others]
        sleeper.signal(signal.SIGCONT)  # what it had begun to send goes out into the middle of these
        woken, *after = await asyncio.gather(sleeping, *calls)
        assert woken["error"].kind == "Evicted"
        assert woken["intact"]
        assert all(one["right"] and sorted(one["members"]) == [p.name for p in others] for one in after)
        back = sleeper.start(rejoin, master.address, "P7", 4)
        await asyncio.gather(*(p.do(update_to, 4) for p in others), back)
        four = await asyncio.gather(
            sleeper.do(reduce, "P7", 4, COUNT, in_place), *(p.do(reduce, p.name, 4, COUNT, in_place) for p in others)
        )
        assert all(one["right"] and len(one["members"]) == 4 for one in four)
        assert len({one["bits"] for one in four}) == 1
