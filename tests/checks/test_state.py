"""Checks 22 to 26: what sync_state moves, and which content it takes for the truth."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

import pccl
from pccl.snapshot import BLOCK_BYTES, Snapshot
from tests.checks.support import each, group, members
from tests.checks.support_state import MIB, State, WireCount, bits, copied, newcomer, sync, tensor, try_sync


@pytest.fixture
def wire(monkeypatch: pytest.MonkeyPatch) -> WireCount:
    return WireCount(monkeypatch)


def manifest_bytes(state: State) -> int:
    """What the table of names and hashes takes, which a member without the truth has to fetch, too."""
    snapshot = Snapshot(state)
    snapshot.hash()
    return len(snapshot.packed)


def model() -> State:
    return {f"layer {i}": tensor(MIB // 2 + 4 * i, i) for i in range(6)} | {"big": tensor(3 * MIB + 20, 99), "step": 3, "name": "model"}


# --- 22, 23: what moves -----------------------------------------------------------------------------------------------


async def test_check_22_nothing_moves_where_all_have_the_same(wire: WireCount) -> None:
    truth = model()
    async with group(3) as comms:
        states = [copied(truth) for _ in comms]
        wire.take()
        for revision in (1, 1, 2):
            infos = await sync(comms, states, revision)
            assert [(i.bytes_sent, i.bytes_received, i.sources) for i in infos] == [(0, 0, ())] * 3
            assert {(i.revision, i.digest) for i in infos} == {(revision, infos[0].digest)}
        assert wire.take() == 0
        assert all(bits(s) == bits(truth) for s in states)


async def test_check_23_only_a_dirty_key_moves_and_once_to_each_who_needs_it(wire: WireCount) -> None:
    truth = model()
    async with group(5) as comms:
        states = [copied(truth) for _ in comms]
        for needy in (0, 3):
            states[needy]["big"][:] = needy
        wire.take()
        infos = await sync(comms, states)
        need = truth["big"].nbytes + manifest_bytes(truth)
        assert [i.bytes_received for i in infos] == [need, 0, 0, need, 0]
        assert sum(i.bytes_sent for i in infos) == 2 * need
        assert [i.bytes_sent for i in (infos[0], infos[3])] == [0, 0]
        assert set(infos[0].sources) <= {comms[0].view.members[rank].name for rank in (1, 2, 4)}
        assert 2 * need <= wire.take() < 2 * need + 4096  # headers, and the requests
        assert all(bits(s) == bits(truth) for s in states)


async def test_check_23_of_a_large_key_only_the_blocks_that_differ_move() -> None:
    truth = {"w": tensor(6 * MIB + 12), "v": tensor(100)}
    async with group(3) as comms:
        states = [copied(truth) for _ in comms]
        states[2]["w"][BLOCK_BYTES // 4] += 1  # first of the second block
        states[2]["w"][-1] += 1  # and in the last one, which is short
        infos = await sync(comms, states)
        assert infos[2].bytes_received == BLOCK_BYTES + 12 + manifest_bytes(truth)
        assert all(bits(s) == bits(truth) for s in states)


async def test_check_23_blocks_come_from_all_holders_at_once() -> None:
    truth = {"w": tensor(24 * MIB)}
    async with group(4) as comms:
        states = [copied(truth) for _ in comms[:3]] + [{"w": np.zeros_like(truth["w"])}]
        infos = await sync(comms, states)
        assert all(i.bytes_sent > 2 * MIB for i in infos[:3])
        assert len(infos[3].sources) == 3
        assert infos[3].bytes_received == sum(i.bytes_sent for i in infos) == 24 * MIB + manifest_bytes(truth)
        assert bits(states[3]) == bits(truth)


# --- 24, 25: which content is the truth -------------------------------------------------------------------------------


@pytest.mark.parametrize("odd", [0, 1, 2])
async def test_check_24_the_majority_wins_wherever_the_odd_one_stands(odd: int) -> None:
    truth = {"w": tensor(4096), "v": 1}
    async with group(3) as comms:
        states = [copied(truth) for _ in comms]
        states[odd] = {"w": tensor(4096, 7), "v": 2}
        infos = await sync(comms, states)
        assert [i.state["v"] for i in infos] == [1, 1, 1]
        assert all(bits({"w": s["w"]}) == bits({"w": truth["w"]}) for s in states)
        assert infos[odd].bytes_received > 0


@pytest.mark.parametrize("split", [(0, 1), (0, 0, 1, 1), (1, 0, 1, 0), (0, 1, 2)])
async def test_check_24_a_tie_is_a_conflict_that_names_both_sides(split: tuple[int, ...]) -> None:
    async with group(len(split)) as comms:
        states: list[State] = [{"w": tensor(4096, side)} for side in split]
        before = [bits(s) for s in states]
        for _ in range(2):  # and stays one
            found = await try_sync(comms, states, [{"revision": 5}] * len(split))
            assert all(type(e) is pccl.StateConflict for e in found)
            assert len({str(e).partition(":")[2] for e in found}) == 1
            assert str(found[0]).count("revision 5 with hash") == len(set(split))
            assert all(m.name in str(found[0]) for m in comms[0].view.members)
            assert [bits(s) for s in states] == before
        infos = await each(c.sync_state(s, revision=5, declare=c.rank == 1) for c, s in zip(comms, states, strict=True))
        assert all(bits(s) == before[1] for s in states)
        assert len({i.digest for i in infos}) == 1


async def test_check_24_the_newest_revision_wins_over_more_votes_of_an_older_one() -> None:
    async with group(3) as comms:
        states: list[State] = [{"w": tensor(4096, k == 2)} for k in range(3)]
        infos = await sync(comms, states, [4, 4, 5])
        assert {i.revision for i in infos} == {5}
        assert all(bits(s) == bits(states[2]) for s in states)


async def test_check_25_who_is_behind_is_taken_along() -> None:
    async with group(3) as comms:
        states: list[State] = [{"w": tensor(4096, 1)} for _ in comms]
        await sync(comms, states, 10)
        states[0]["w"][:] = 3
        states[1]["w"][:] = 3  # these two have made a step, the third has not
        infos = await sync(comms, states, [11, 11, 10])
        assert [i.revision for i in infos] == [11] * 3
        assert all((s["w"] == 3).all() for s in states)
        assert [i.bytes_received > 0 for i in infos] == [False, False, True]


async def test_check_25_any_first_revision_and_any_later_one() -> None:
    async with group(2) as comms:
        for revision in (13, 13, 500, 2**62):
            states: list[State] = [{"w": np.full(10, revision, np.float64)} for _ in comms]
            assert [i.revision for i in await sync(comms, states, revision)] == [revision] * 2


async def test_check_25_a_newcomer_that_is_ahead_is_refused_and_nobody_else() -> None:
    async with pccl.Master() as master, members(master.address, 2) as comms:
        states: list[State] = [{"w": tensor(4096, 1)} for _ in comms]
        await sync(comms, states, 10)
        theirs = bits(states[0])
        own: State = {"w": tensor(4096, 2)}
        mine = bits(own)
        async with newcomer(master.address, comms) as new:
            found = await try_sync([*comms, new], [*states, own], [{"revision": 10}, {"revision": 10}, {"revision": 11}])
            assert [i.revision for i in found[:2]] == [10, 10]
            assert type(found[2]) is pccl.StateConflict
            assert "ahead" in str(found[2])
            assert "11" in str(found[2])
            assert "10" in str(found[2])
            assert (bits(own), [bits(s) for s in states]) == (mine, [theirs] * 2)
            with pytest.raises(pccl.StateConflict):
                await new.all_reduce(np.ones(1))

        async with newcomer(master.address, comms) as again:
            hows: list[dict[str, Any]] = [{"revision": 10}, {"revision": 10}, {"revision": 11, "strategy": "receive"}]
            assert [i.revision for i in await try_sync([*comms, again], [*states, own], hows)] == [10] * 3
            assert bits(own) == theirs


# --- 26: strategies ---------------------------------------------------------------------------------------------------


async def test_check_26_one_sends_and_the_others_receive() -> None:
    async with group(3) as comms:
        states: list[State] = [{"w": tensor(4096, k)} for k in range(3)]
        truth = bits(states[1])
        hows = [{"revision": r, "strategy": s} for r, s in ((9, "receive"), (2, "send"), (9, "receive"))]
        assert [i.revision for i in await try_sync(comms, states, hows)] == [2] * 3
        assert [bits(s) for s in states] == [truth] * 3


async def test_check_26_a_sender_overrules_the_majority() -> None:
    async with group(3) as comms:
        states: list[State] = [{"w": tensor(4096, k == 0)} for k in range(3)]
        truth = bits(states[0])
        hows = [{"revision": 1, "strategy": s} for s in ("send", "elect", "elect")]
        assert [i.revision for i in await try_sync(comms, states, hows)] == [1] * 3
        assert [bits(s) for s in states] == [truth] * 3


async def test_check_26_what_strategies_cannot_agree_on_is_a_conflict_and_no_more() -> None:
    """Another group of the same master syncs all the while."""
    async with pccl.Master() as master, members(master.address, 3) as comms, members(master.address, 2, group="other") as others:
        states: list[State] = [{"w": tensor(4096, k)} for k in range(3)]
        before = [bits(s) for s in states]
        over = asyncio.Event()
        rounds = 0

        async def other() -> None:
            nonlocal rounds
            theirs: list[State] = [{"w": tensor(4096)} for _ in others]
            while not over.is_set():
                rounds += 1
                for s in theirs:
                    s["w"] += 1
                assert [i.revision for i in await sync(others, theirs, rounds)] == [rounds] * 2

        task = asyncio.create_task(other())
        for strategies, words in (
            (("send", "send", "elect"), "members that state the truth differ"),
            (("send", "send", "receive"), "members that state the truth differ"),
            (("receive", "receive", "receive"), "nobody is left to send it"),
        ):
            found = await try_sync(comms, states, [{"revision": 1, "strategy": s} for s in strategies])
            assert [type(e) for e in found] == [pccl.StateConflict] * 3
            assert all(words in str(e) for e in found)
            assert [bits(s) for s in states] == before
        tensors = [np.ones(10) for _ in comms]
        await each(c.all_reduce(x) for c, x in zip(comms, tensors, strict=True))
        assert all((x == 3).all() for x in tensors)
        over.set()
        await task
        assert rounds > 0


async def test_check_26_bad_strategies_are_refused_before_anything_happens() -> None:
    async with group(2) as comms:
        state: State = {"w": np.zeros(4)}
        bad: list[tuple[dict[str, Any], str]] = [
            ({"strategy": "popular"}, "strategy"),
            ({"strategy": "receive", "declare": True}, "declare"),
            ({"revision": -1}, "revision"),
            ({"revision": 1.5}, "revision"),
            ({"may_differ": ["step"], "state": {"step": 1}}, "may_differ"),
            ({"state": {1: np.zeros(1)}}, "state"),
            ({"state": {"w": object()}}, "state"),
            ({"state": [1]}, "state"),
        ]
        for arguments, word in bad:
            with pytest.raises(pccl.InvalidArgument, match=word):
                await comms[0].sync_state(**({"state": state, "revision": 1} | arguments))
        assert [i.revision for i in await sync(comms, [copied(state) for _ in comms])] == [1, 1]


async def test_check_26_a_newcomer_cannot_send() -> None:
    async with pccl.Master() as master, members(master.address, 2) as comms:
        states: list[State] = [{"w": tensor(4096, 1)} for _ in comms]
        truth = bits(states[0])
        await sync(comms, states, 10)
        async with newcomer(master.address, comms) as new:
            hows: list[dict[str, Any]] = [{"revision": 10}, {"revision": 10}, {"revision": 10, "strategy": "send"}]
            found = await try_sync([*comms, new], [*states, {"w": tensor(4096, 2)}], hows)
            assert type(found[2]) is pccl.StateConflict
            assert "declare" in str(found[2])
            assert [bits(s) for s in states] == [truth] * 2
