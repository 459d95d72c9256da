"""Checks 7, 8, 11 and 12: losses and bad links at chosen moments, in virtual time: every seed is the same run each time."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

import pccl
from pccl.communicator import Communicator
from pccl.protocol.record import State
from tests.checks.support import on_node, simulate, simulated_members
from tests.sim.world import Hosts, Weather, World

pytestmark = [pytest.mark.sim, pytest.mark.parametrize("in_place", [True, False], ids=["in place", "out of place"])]

COUNT = 10_001
"""Elements: 40 KB, which go to everyone at once unless an algorithm is named"""
DETECTED = 2.0 + 0.5 + 2 * 2.0 + 1.0
"""Seconds in which a link is found broken (path_timeout, and a heartbeat), dialled again from both sides in vain (dial_timeout each),
and the call ends; with a second to spare."""


def contribution(name: str, k: int = 0, count: int = COUNT) -> np.ndarray[Any, Any]:
    return ((np.arange(count) * 7 + 13 * ord(name) + k) % 31).astype(np.float32)


class Call:
    """An all_reduce of one node, and what it left behind."""

    def __init__(self, world: World, name: str, comm: Communicator, in_place: bool, k: int = 0, count: int = COUNT, **how: Any) -> None:
        self.name = name
        self.k = k
        self.x = contribution(name, k, count)
        self.out = None if in_place else np.full(count, -1, np.float32)
        self.world = world
        self.began = world.loop.time()
        self.seconds = -1.0
        self.task = on_node(world, name, self._run(comm, how))

    async def _run(self, comm: Communicator, how: Any) -> pccl.Info:
        try:
            return await comm.all_reduce(self.x, out=self.out, **how)
        finally:
            self.seconds = self.world.loop.time() - self.began

    @property
    def result(self) -> np.ndarray[Any, Any]:
        return self.x if self.out is None else self.out

    def intact(self) -> bool:
        return self.x.tobytes() == contribution(self.name, self.k, len(self.x)).tobytes()

    def right(self, members: Any) -> bool:
        """Whether it has exactly the sum over these."""
        return bool((self.result == sum(contribution(name, self.k, len(self.x)) for name in members)).all())


async def ends(calls: list[Call]) -> list[Any]:
    """What all of them return or raise."""
    return await asyncio.gather(*(call.task for call in calls), return_exceptions=True)


def has_result(comm: Communicator) -> bool:
    """Whether this member has its result and waits for the verdict."""
    peer = comm._runtime.engine._peer
    assert peer
    return any(record.state is State.DONE for record in peer.root._open.values())


async def finished(comms: dict[str, Communicator], number: int) -> list[str]:
    """Wait until so many of them have their results; returns who has."""
    for _ in range(20_000):
        found = [name for name, comm in comms.items() if has_result(comm)]
        if len(found) >= number:
            return found
        await asyncio.sleep(0.0001)  # of virtual time
    raise AssertionError(f"only {found} ever had their results")


@pytest.mark.parametrize("retry", [False, True])
@pytest.mark.parametrize("fault", ["kill", "crash", "close"])
def test_check_07_a_fault_after_one_has_finished_and_before_another_has(in_place: bool, retry: bool, fault: str) -> None:
    """A has the result, C does not get what D sends it; then D is gone."""

    async def main(world: World) -> None:
        comms = await simulated_members(world, "ABCD")
        world.cut("D", "C", both=False)
        calls = [Call(world, name, comm, in_place, retry=retry, algorithm="direct") for name, comm in comms.items()]
        assert set(await finished(comms, 2)) == set("AB")
        assert calls[0].right("ABCD"), "A should hold the result, and should not have been told that it counts"
        assert not any(call.task.done() for call in calls)
        if fault == "close":
            await on_node(world, "D", comms["D"].close())
        else:
            (world.kill if fault == "kill" else world.crash)("D")
        results = await ends(calls[:3])
        for call, result in zip(calls, results, strict=False):
            if retry:
                assert isinstance(result, pccl.Info), result
                assert {m.name for m in result.members} == set("ABC")
                assert result.attempts == 2
                assert call.right("ABC")
            else:
                assert isinstance(result, pccl.CollectiveAborted)
                assert result.lost == ("D",)
                assert set(result.survivors) == set("ABC")
                assert call.intact()
        again = [Call(world, name, comms[name], in_place, 1) for name in "ABC"]
        assert all(isinstance(result, pccl.Info) for result in await ends(again))
        assert all(call.right("ABC") for call in again)

    simulate(main, seed=7)


@pytest.mark.parametrize("quantize", [None, "float16"])
@pytest.mark.parametrize("algorithm", ["direct", "ring", "bidirectional_ring", "tree", "star", "halving_doubling", "hierarchical"])
def test_check_07_with_other_schedules(in_place: bool, algorithm: str, quantize: str | None) -> None:
    """One is killed when the first has its result and two have not: the same verdict for all, and what belongs to it in their buffers.

    Sums of these inputs are exact in float16.
    """

    async def main(world: World) -> str:
        comms = await simulated_members(world, "ABCDE")
        how = {"algorithm": algorithm, "quantize": quantize}
        calls = {name: Call(world, name, comm, in_place, **how) for name, comm in comms.items()}
        first = await finished(comms, 1)
        others = [name for name in comms if name not in first]
        if len(others) < 2:
            return "too late"
        world.kill(others[0])
        del calls[others[0]]
        results = await ends(list(calls.values()))
        kinds = {type(result) for result in results}
        assert len(kinds) == 1, results
        for call in calls.values():
            assert call.intact() if pccl.CollectiveAborted in kinds else call.right("ABCDE")
        return kinds.pop().__name__

    hosts = Hosts(names={"A": "left", "B": "right", "C": "left", "D": "right"})
    seen = [simulate(main, seed=seed, weather=Weather(0.01, 0.05), hosts=hosts) for seed in range(6)]
    assert "CollectiveAborted" in seen, seen
    assert set(seen) <= {"CollectiveAborted", "Info", "too late"}


@pytest.mark.parametrize("slots", [1, 4])
def test_check_08_retries_with_more_losses_than_slots(in_place: bool, slots: int) -> None:
    """Nine peers, so many calls at a time, six losses: whatever succeeds is the sum over the members that it reports."""
    tensors = 12

    async def main(world: World) -> int:
        r = world.random
        names = "ABCDEFGHI"
        comms = await simulated_members(world, names)
        calls: dict[tuple[str, int], Call] = {}
        made = dict.fromkeys(names, 0)

        async def member(name: str) -> None:
            async def slot() -> None:
                while made[name] < tensors:
                    k = made[name]
                    made[name] += 1
                    how = {"count": 9_001, "algorithm": "ring"} if k % 4 == 3 else {"count": 500}
                    calls[name, k] = Call(world, name, comms[name], in_place, k, tag=k, retry=True, **how)
                    await calls[name, k].task

            await asyncio.gather(*(slot() for _ in range(slots)))

        running = {name: on_node(world, name, member(name)) for name in names}
        for victim in r.sample(names, 6):
            due = asyncio.Event()
            world.loop.alarms.append((world.loop.steps + r.randrange(50, 1500), due))
            await due.wait()
            (world.kill if r.random() < 0.7 else world.crash)(victim)
            del running[victim]
        await asyncio.gather(*running.values())
        reached: dict[int, set[tuple[str, ...]]] = {}
        for (name, k), call in calls.items():
            if call.task.done():
                members = tuple(m.name for m in call.task.result().members)
                assert call.right(members), f"{name}'s tensor {k} is not the sum over {members}"
                reached.setdefault(k, set()).add(members)
        assert set(reached) == set(range(tensors))
        assert all(len(members) == 1 for members in reached.values()), "members differ"
        assert all(calls[name, k].task.done() for name in running for k in range(tensors))
        return sum(calls[name, 0].task.result().attempts > 1 for name in running) + len({m for s in reached.values() for m in s})

    hits = [simulate(main, seed=seed) for seed in range(2)]
    assert max(hits) > 3, "no loss fell into a call"


@pytest.mark.parametrize("quantize", [None, "float16"])
@pytest.mark.parametrize("retry", [False, True])
def test_check_11_a_link_that_swallows_everything(in_place: bool, retry: bool, quantize: str | None) -> None:
    """The data link of A and B is dead without a word, their control links live: the call ends, the next go round it, nobody leaves."""

    async def main(world: World) -> None:
        comms = await simulated_members(world, "ABCD")
        world.cut("A", "B")
        calls = [Call(world, name, comm, in_place, retry=retry, quantize=quantize) for name, comm in comms.items()]
        results = await ends(calls)
        for call, result in zip(calls, results, strict=True):
            assert call.seconds < DETECTED, f"{call.name}: {call.seconds:.2f} s"
            if retry:
                assert isinstance(result, pccl.Info), result
                assert call.right("ABCD")
            else:
                assert isinstance(result, pccl.CollectiveAborted), result
                assert result.lost == ()
                assert set(result.survivors) == set("ABCD")
                assert call.intact()
        for k in range(3):
            how = {"algorithm": ("auto", "ring", "direct")[k], "quantize": quantize}
            later = [Call(world, name, comm, in_place, k, **how) for name, comm in comms.items()]
            for call, result in zip(later, await ends(later), strict=True):
                assert isinstance(result, pccl.Info), result
                assert call.right("ABCD")
                assert result.algorithm == "spanning_tree"
                assert call.seconds < 1.0, "the dead link was tried again"
        assert all(comm.world_size == 4 for comm in comms.values())

    simulate(main, seed=11)


def _refuse(world: World, source: str, target: str) -> None:
    """Connections from one node to another fail; the other way round they are made."""
    connect = world.links.connect

    def refused(a: str, b: str) -> Any:
        if (a, b) == (source, target):
            raise ConnectionRefusedError(f"{b} cannot be reached from {a}")
        return connect(a, b)

    world.links.connect = refused  # type: ignore[method-assign]


@pytest.mark.parametrize("way", ["AB", "BA"])
@pytest.mark.parametrize("fault", ["cannot be dialled", "was never there", "is lost later"])
def test_check_12_a_pair_that_is_unreachable_one_way(in_place: bool, way: str, fault: str) -> None:
    """Nobody is expelled: calls go on without that link, or with the one that could be made the other way round."""
    source, target = way

    async def main(world: World) -> None:
        if fault == "cannot be dialled":
            _refuse(world, source, target)
        elif fault == "was never there":
            world.cut(source, target, both=False)
        comms = await simulated_members(world, "ABCD")
        if fault == "is lost later":
            world.cut(source, target, both=False)
        for k in range(4):
            calls = [Call(world, name, comm, in_place, k, retry=True) for name, comm in comms.items()]
            for call, result in zip(calls, await ends(calls), strict=True):
                assert isinstance(result, pccl.Info), result
                assert {m.name for m in result.members} == set("ABCD")
                assert call.right("ABCD")
                assert result.algorithm == "spanning_tree" or fault == "cannot be dialled"
                assert call.seconds < (DETECTED if k == 0 else 1.0)

    simulate(main, seed=12)
