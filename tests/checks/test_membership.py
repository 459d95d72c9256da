"""Checks 18 to 20: who comes in, when, and what everyone sees of it; one loop text for all."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

import pccl
from pccl.communicator import Communicator
from pccl.core.types import Epoch, Member, View
from tests.checks.support import QUICK, each, group, join, members, outcomes, until
from tests.checks.support_state import MIB, State, bits, newcomer, sync, tensor

pytestmark = pytest.mark.usefixtures("every_transport")


def started(comms: list[Communicator], tensors: list[Any], **how: Any) -> list[asyncio.Task[Any]]:
    return [asyncio.create_task(c.all_reduce(x, **how)) for c, x in zip(comms, tensors, strict=True)]


def in_flight(comm: Communicator) -> int:
    return comm._runtime.engine.membership(0).in_flight


# --- 18: calls beside each other --------------------------------------------------------------------------------------


async def test_check_18_an_update_waits_for_the_reduce_before_it_which_is_unaffected() -> None:
    async with pccl.Master() as master, members(master.address, 3) as comms:
        old = comms[0].view
        tensors = [np.full(MIB, 1.0 + k, np.float32) for k in range(3)]
        reduces = started(comms[:2], tensors[:2])
        updates = [asyncio.create_task(c.update()) for c in comms[:2]]
        joining = asyncio.create_task(join(master.address, "N", 4))
        await until(lambda: all(in_flight(c) == 2 for c in comms[:2]))
        waiting = asyncio.create_task(join(master.address, "M", 5, connect_timeout=0.5))
        with pytest.raises(pccl.ConnectError, match="did not let it in"):
            await waiting
        assert not any(t.done() for t in (*reduces, *updates, joining))  # the third member is missing
        reduces += started(comms[2:], tensors[2:])
        updates += [asyncio.create_task(comms[2].update())]
        infos = await each(reduces)
        assert all(i.members == old.members and i.epoch == old.epoch for i in infos)
        assert all((x == 6).all() for x in tensors)
        new = await joining
        views = await each(updates)
        assert {v.epoch for v in views} == {new.view.epoch}
        assert all([m.name for m in v.joined] == ["N"] for v in views)
        await new.close()


async def test_check_18_a_sync_runs_beside_a_reduce() -> None:
    async with group(3) as comms:
        tensors = [np.full(4 * MIB, 1.0 + k, np.float32) for k in range(3)]
        states: list[State] = [{"w": tensor(4 * MIB, k > 0)} for k in range(3)]
        reduces = started(comms[:2], tensors[:2])
        tagged = [asyncio.create_task(c.sync_state(s, revision=1, tag="state")) for c, s in zip(comms, states, strict=True)]
        infos = await each(tagged)  # though a reduce that was made before waits for the third
        assert not any(t.done() for t in reduces)
        assert len({i.digest for i in infos}) == 1
        untagged = [asyncio.create_task(c.sync_state(s, revision=2)) for c, s in zip(comms[:2], states, strict=False)]
        reduces += started(comms[2:], tensors[2:])
        untagged += [asyncio.create_task(comms[2].sync_state(states[2], revision=2))]
        await each(reduces)
        assert [i.bytes_received for i in await each(untagged)] == [0] * 3
        assert all((x == 6).all() for x in tensors)
        assert [bits(s) for s in states] == [bits({"w": tensor(4 * MIB, 1)})] * 3


# --- 19, 20: what everyone sees ---------------------------------------------------------------------------------------


async def test_check_19_a_joiner_comes_in_when_the_busy_ones_let_it() -> None:
    async with pccl.Master() as master, members(master.address, 3) as comms:
        admitting = asyncio.Event()
        steps = 0

        async def busy(comm: Communicator) -> View:
            nonlocal steps
            x = np.empty(50_000, np.float32)
            while True:
                x[:] = comm.rank
                done = np.array([admitting.is_set()])
                async with comm.round() as r:
                    r.all_reduce(x)
                    r.all_reduce(done, "band")
                assert (x == sum(range(comm.world_size))).all()
                steps += comm.rank == 0
                if done[0]:
                    if comm.world_size == 4:
                        return comm.view
                    await comm.update()

        running = [asyncio.create_task(busy(c)) for c in comms]
        clock = asyncio.get_running_loop().time
        before = steps, clock()
        with pytest.raises(pccl.ConnectError, match="did not let it in within") as caught:
            await pccl.connect(master.address, connect_timeout=0.5)
        assert not isinstance(caught.value, pccl.MasterUnreachable)
        assert clock() - before[1] >= 0.5
        assert steps > before[0]
        joining = asyncio.create_task(join(master.address, "N", 4))
        before = steps, 0.0
        await until(lambda: steps > before[0] + 20)
        assert not joining.done()
        admitting.set()
        new = await joining
        views = [*(await each([*running, busy(new)]))]
        assert {(v.epoch, v.members) for v in views} == {(views[0].epoch, views[0].members)}
        assert [v.rank for v in views] == [0, 1, 2, 3]
        assert views[0].members[3].name == "N"
        await new.close()


async def test_check_20_updates_that_race_with_joins_answer_the_same_on_all() -> None:
    Answer = tuple[Epoch, tuple[Member, ...], tuple[Member, ...]]

    async def updates(comm: Communicator, turn: int) -> list[Answer]:
        """What each update said; no two members are in step."""
        answers: list[Answer] = []
        while comm.world_size < 8:
            if len(answers) % 3 == turn:
                await asyncio.sleep(0)
            view = await comm.update()
            answers.append((view.epoch, view.members, view.joined))
        return answers

    async def joins(address: str, name: str) -> tuple[Communicator, list[Answer]]:
        comm = await pccl.connect(address, name=name, **QUICK)
        first = comm.view
        return comm, [(first.epoch, first.members, first.joined), *await updates(comm, 1)]

    async with pccl.Master() as master, members(master.address, 3) as comms:
        found = await each([*(updates(c, k) for k, c in enumerate(comms)), *(joins(master.address, f"N{k}") for k in range(5))])
        incumbents, joined = found[:3], found[3:]
        try:
            assert incumbents[0] == incumbents[1] == incumbents[2]
            changes = [answer for k, answer in enumerate(incumbents[0]) if answer[2]]
            assert sum(len(answer[2]) for answer in changes) == 5
            for comm, answers in joined:
                own = [answer[:2] for answer in answers if answer[2] or answer is answers[0]]
                theirs = [answer[:2] for answer in changes]
                assert own == theirs[-len(own) :]
                assert comm.view.members == comms[0].view.members
        finally:
            await asyncio.gather(*(comm.close() for comm, _ in joined))


# --- one loop text ----------------------------------------------------------------------------------------------------


class Milestones:
    """Events of a run: the first time that anybody has made so many steps."""

    def __init__(self) -> None:
        self._events: dict[int, asyncio.Event] = {}

    def at(self, step: int) -> asyncio.Event:
        return self._events.setdefault(step, asyncio.Event())

    def reached(self, step: int) -> None:
        self.at(step).set()


async def train(address: str, name: str, reached: Milestones, *, until_step: int, leave_at: int = -1, die_at: int = -1) -> dict[str, Any]:
    """The text that everyone runs, who begins and who comes later."""
    state = {"weights": np.zeros(1000)}
    step, sizes, first = 0, [], -1
    async with pccl.connect(address, name=name, min_world_size=2, **QUICK) as comm:
        while step < until_step:
            await comm.update()
            step = (await comm.sync_state(state, revision=step)).revision
            first = step if first < 0 else first
            if step == leave_at:
                break
            if step == die_at:
                await comm.close()
                break
            gradient = np.random.default_rng(ord(name)).normal(size=1000) + step
            info = await comm.all_reduce(gradient, op="avg", retry=True)
            state["weights"] -= 0.1 * gradient
            step += 1
            sizes.append(info.world_size)
            reached.reached(step)
    return {"name": name, "weights": state["weights"].tobytes(), "first": first, "sizes": sizes}


async def test_one_loop_text_serves_those_who_begin_and_those_who_come() -> None:
    reached = Milestones()

    async def late(name: str, step: int, **how: Any) -> dict[str, Any]:
        await reached.at(step).wait()
        return await train(master.address, name, reached, until_step=200, **how)

    async with pccl.Master() as master:
        runs = [
            train(master.address, "A", reached, until_step=200),
            train(master.address, "B", reached, until_step=200),
            late("C", 20),
            late("D", 40, leave_at=100),
            late("E", 60, die_at=120),
            late("F", 130),
        ]
        found = {r["name"]: r for r in await each(runs)}
    assert len({found[name]["weights"] for name in "ABCF"}) == 1
    assert [found[name]["first"] >= step for name, step in zip("CDEF", (20, 40, 60, 130), strict=True)] == [True] * 4
    assert max(found["A"]["sizes"]) >= 4
    assert found["A"]["sizes"] == found["B"]["sizes"]
    assert found["C"]["sizes"] == found["A"]["sizes"][found["C"]["first"] :]
    assert len(found["A"]["sizes"]) == 200


async def test_a_loop_that_does_not_fit_ends_in_an_error_for_the_newcomer_and_the_others_go_on() -> None:
    """A collective before the loop: the documented mistake."""
    async with pccl.Master() as master, members(master.address, 2) as comms, newcomer(master.address, comms) as new:
        tensors = [np.ones(3), np.ones(3), np.ones(5)]

        async def step(comm: Communicator, x: Any) -> None:
            if comm is not new:
                await comm.update()
            await comm.all_reduce(x)

        found = await outcomes(step(c, x) for c, x in zip([*comms, new], tensors, strict=True))
        assert [type(e) for e in found] == [pccl.CollectiveMismatch] * 3
        assert all("all_reduce(float64[5], sum)" in str(e) and "all_reduce(float64[3], sum)" in str(e) for e in found)
        assert all((x == 1).all() for x in tensors)
        await sync([*comms, new], [{}] * 3)


@pytest.mark.parametrize("tag", [None, "gather"])
@pytest.mark.parametrize("sub", [False, True])
@pytest.mark.parametrize("early", [False, True], ids=["root waits", "root is late"])
async def test_a_member_that_leaves_early_takes_its_data_from_nobody(early: bool, sub: bool, tag: str | None, every_transport: str) -> None:
    """A plain call in which one member has nothing more to do than send: it goes, and the root, or another one, comes later."""
    async with group(3) as comms:
        leaver, root, _ = comms
        pairs = await each(comm.subgroup([1, 2]) for comm in comms)
        those = await each(comm.subgroup([0, 1, 2]) for comm in comms) if sub else comms
        x, out = np.full(4, 1.0), np.zeros((3, 4))
        engine = root._runtime.engine
        flow = engine.executor.flows[leaver._uid()]

        def gather() -> asyncio.Task[Any]:
            return asyncio.create_task(those[1].gather(x, root=1, out=out, atomic=False, tag=tag))

        gathering = None if early else gather()
        await those[0].gather(x + 1, root=1, atomic=False, tag=tag)
        if tag or every_transport == "tcp":
            await until(lambda: flow._early if early else engine.executor.progress)  # it has come
        await leaver.leave()
        await until(lambda: flow.link is None)
        gathering = gathering or gather()
        await until(lambda: engine._in_flight and all(op.announced for op in engine._in_flight))
        await each(pair.barrier() for pair in pairs if pair)  # by then the master has heard all that the root had to say
        await those[2].gather(x + 2, root=1, atomic=False, tag=tag)
        await gathering
        assert [list(row) for row in out] == [[2.0] * 4, [1.0] * 4, [3.0] * 4]
