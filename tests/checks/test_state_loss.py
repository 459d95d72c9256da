"""Check 27: what becomes of sync_state if holders die, or send what is wrong."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import xxhash

import pccl
from pccl.collectives.exchange import Want
from pccl.communicator import Communicator
from pccl.core.types import StateInfo
from pccl.state import Sync
from tests.checks.processes import Dead, Failure, process, processes, strike_after
from tests.checks.support import group
from tests.checks.support_state import MIB, State, bits, copied, sync, tensor, try_sync

# --- 27: holders die --------------------------------------------------------------------------------------------------

SIZE = 16 * MIB


async def hold(comm: Communicator, seed: int, revision: int, how: dict[str, Any]) -> tuple[StateInfo, str]:
    """Sync a state of SIZE bytes; returns the record and the hash of what this member then has."""
    state = {"w": tensor(SIZE, seed)}
    try:
        info = await comm.sync_state(state, revision=revision, **how)
        return dataclasses.replace(info, state={}), digest(state)
    except pccl.PcclError as e:
        e.args = (f"{e} [has {digest(state)}]",)
        raise


def digest(state: State) -> str:
    return xxhash.xxh3_128_hexdigest(state["w"].data)


def has(found: Failure, seed: int) -> bool:
    return f"[has {digest({'w': tensor(SIZE, seed)})}]" in found.text


@pytest.mark.process
async def test_check_27_a_holder_dies_half_way_and_the_rest_comes_from_the_others() -> None:
    async with pccl.Master() as master, processes(master.address, 3) as (dies, stays, needy):
        await dies.do(strike_after, SIZE // 4)  # half of what it is asked for at once
        calls = dies.outcome(hold, 1, 7, {}), stays.outcome(hold, 1, 7, {}), needy.outcome(hold, 2, 6, {})
        first, second, third = await asyncio.gather(*calls)
        assert isinstance(first, Dead)
        truth = digest({"w": tensor(SIZE, 1)})
        assert second[1] == third[1] == truth
        assert second[0].digest == third[0].digest
        assert second[0].attempts == third[0].attempts == 2
        assert set(third[0].sources) == {"P0", "P1"}
        again = third[0].bytes_received - SIZE
        assert 0 < again < 9 * MIB  # what the dead one had under way, and the manifest twice
        assert second[0].bytes_sent <= SIZE
        infos = await asyncio.gather(*(p.do(hold, 3, 8, {}) for p in (stays, needy)))
        assert [i.bytes_received for i, _ in infos] == [0, 0]


@pytest.mark.process
async def test_check_27_the_last_holder_dies_half_way_and_the_old_states_are_intact() -> None:
    async with pccl.Master() as master, processes(master.address, 3) as peers:
        dies, *others = peers
        await dies.do(strike_after, SIZE)  # it sends 2 SIZE
        hows: list[dict[str, Any]] = [{"strategy": "send"}, {"strategy": "receive"}, {"strategy": "receive"}]
        first, *rest = await asyncio.gather(*(p.outcome(hold, k, 7, how) for k, (p, how) in enumerate(zip(peers, hows, strict=True))))
        assert isinstance(first, Dead)
        for k, found in enumerate(rest, 1):
            assert isinstance(found, Failure)
            assert found.kind == "StateConflict"
            assert has(found, k)
        infos = await asyncio.gather(*(p.do(hold, 1, 8, {"declare": p is others[0]}) for p in others))
        assert len({had for _, had in infos}) == 1


@pytest.mark.process
async def test_check_27_a_newcomer_whose_only_holder_dies_can_declare_a_new_truth() -> None:
    async with pccl.Master() as master, process(master.address, "old") as old:
        await old.do(hold, 1, 7, {})
        async with process(master.address, "new", world=2) as new:
            await asyncio.gather(old.do(update_to, 2), new.do(update_to, 2))
            await old.do(strike_after, SIZE // 2)
            first, second = await asyncio.gather(old.outcome(hold, 1, 7, {}), new.outcome(hold, 2, 3, {}))
            assert isinstance(first, Dead)
            assert second.kind == "StateConflict"
            assert "declare=True" in second.text
            assert has(second, 2)
            assert (await new.outcome(hold, 2, 3, {})).kind == "StateConflict"  # and it stays that way
            info, had = await new.do(hold, 2, 3, {"declare": True})
            assert (info.revision, had) == (3, digest({"w": tensor(SIZE, 2)}))
            info, had = await new.do(hold, 4, 4, {})
            assert (info.revision, had) == (4, digest({"w": tensor(SIZE, 4)}))


async def update_to(comm: Communicator, world: int) -> None:
    while comm.world_size < world:
        await comm.update()


# --- verified before use ----------------------------------------------------------------------------------------------


def lie(monkeypatch: pytest.MonkeyPatch, where: Callable[[Sync, Want], bool], caught: set[int]) -> None:
    """Blocks of some peers are not what their hash says; `caught` gets the uids of those who had the occasion."""
    read = Sync.read

    def lying(self: Sync, want: Want) -> memoryview | None:
        block = read(self, want)
        if block is None or not where(self, want):
            return block
        caught.add(self.engine.membership(0).uid)
        wrong = bytearray(block)
        wrong[len(wrong) // 2] ^= 1
        return memoryview(wrong)

    monkeypatch.setattr(Sync, "read", lying)


@pytest.mark.parametrize("item", [-1, 0])
async def test_a_block_that_is_wrong_is_fetched_from_somebody_else(monkeypatch: pytest.MonkeyPatch, item: int) -> None:
    truth = {"w": tensor(8 * MIB)}
    caught: set[int] = set()
    async with group(3) as comms:
        liar = comms[0]._uid()
        lie(monkeypatch, lambda s, want: s.engine.membership(0).uid == liar and want.item == item, caught)
        states = [copied(truth), copied(truth), {"w": np.zeros_like(truth["w"])}]
        infos = await sync(comms, states)
        assert caught == {liar}
        assert bits(states[2]) == bits(truth)
        assert infos[2].digest == infos[0].digest


@pytest.mark.parametrize("item", [-1, 0])
async def test_if_nobody_sends_what_the_hash_says_the_call_fails_and_the_state_is_the_old_one(
    monkeypatch: pytest.MonkeyPatch, item: int
) -> None:
    caught: set[int] = set()
    async with group(3) as comms:
        lie(monkeypatch, lambda s, want: want.item == item and want.block == 0, caught)
        states: list[State] = [{"w": tensor(3 * MIB, k > 0)} for k in range(3)]
        before = [bits(s) for s in states]
        found = await try_sync(comms, states, [{"revision": 1}] * 3)
        assert [type(e) for e in found] == [pccl.CollectiveAborted] * 3
        assert all("is not what it had hashed" in str(e) for e in found)
        assert caught == {comm._uid() for comm in comms[1:]}
        assert [bits(s) for s in states] == before
        assert not any(comm._runtime.engine._running for comm in comms)  # those who were done serve nobody any more
        monkeypatch.undo()
        await sync(comms, states, 2)
        assert [bits(s) for s in states] == [before[1]] * 3
