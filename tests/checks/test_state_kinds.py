"""Checks 28 and 29: states of all kinds, and those that do not fit."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

import pccl
from pccl.communicator import Communicator
from tests.checks.support import each, group, members
from tests.checks.support_state import MIB, State, bits, copied, newcomer, sync, tensor, try_sync

# --- 28, 29: contents of all kinds ------------------------------------------------------------------------------------


async def test_check_28_what_may_differ_is_copied_to_newcomers_only() -> None:
    async with pccl.Master() as master, members(master.address, 2) as comms:
        states: list[State] = [{"w": tensor(4096), "own": tensor(2 * MIB, k)} for k in range(2)]
        before = [bits(s) for s in states]
        infos = await sync(comms, states, may_differ=["own"])
        assert [(i.bytes_received, i.digest) for i in infos] == [(0, infos[0].digest)] * 2
        async with newcomer(master.address, comms) as new:
            mine: State = {"w": np.zeros(1024, np.float32), "own": np.zeros(MIB // 2, np.float32)}
            infos = await sync([*comms, new], [*states, mine], may_differ=["own"])
            assert [bits(s) for s in states] == before
            assert bits(mine)["w"] == before[0]["w"]
            own = bits(mine)["own"]
            assert own == before[0]["own"] or own == before[1]["own"]
            mine["own"][:] = 5  # from now on it keeps its own, too
            infos = await sync([*comms, new], [*states, mine], 2, may_differ=["own"])
            assert [i.bytes_received for i in infos] == [0] * 3
            assert (mine["own"] == 5).all()


async def test_check_28_a_newcomer_without_the_key_gets_a_copy_of_what_may_differ() -> None:
    async with pccl.Master() as master, members(master.address, 2) as comms:
        states: list[State] = [{"w": tensor(4096), "own": tensor(2 * MIB, k)} for k in range(2)]
        await sync(comms, states, may_differ=["own"])
        async with newcomer(master.address, comms) as new:
            *_, info = await sync([*comms, new], [*states, {}], may_differ=["own"])
            assert bits(info.state)["w"] == bits(states[0])["w"]
            assert bits(info.state)["own"] in [bits(s)["own"] for s in states]


def odd_state(seed: int) -> State:
    """Slices that begin anywhere, tensors with holes, without elements, without dimensions."""
    raw = np.random.default_rng(seed).integers(1, 255, 3 * MIB, np.uint8)
    grid = np.random.default_rng(seed).standard_normal((64, 96))
    return {
        "bytes": raw[1 : 2 * MIB + 8],
        "unaligned": raw[3 : 3 + 4 * 1001].view(np.int16)[:2001],
        "odd tail": raw[2 * MIB + 9 : -1],
        "transposed": grid.T,
        "holes": grid.copy()[::2, 3::5],
        "backwards": np.arange(seed, seed + 1000)[::-1],
        "none": np.empty(0, np.float32),
        "flat": np.empty((4, 0, 3)),
        "scalar": np.array(seed + 0.5),
        "flags": raw[:1000] > 128,
        "complex": np.full(77, complex(seed, -seed)),
        "int": seed,
        "float": seed / 7,
        "text": f"seed {seed}",
        "raw": bytes([seed] * 5),
        "nothing": None,
        "": bool(seed % 2),
    }


async def test_check_29_slices_of_all_kinds_and_tensors_without_elements() -> None:
    async with group(3) as comms:
        states = [odd_state(1), odd_state(2), odd_state(1)]
        infos = await sync(comms, states)
        for info, state in zip(infos, states, strict=True):
            assert list(info.state) == list(state)
            assert bits(info.state) == bits(odd_state(1))
            assert all(info.state[name] is state[name] for name in state if isinstance(state[name], np.ndarray))


async def test_check_29_a_newcomer_with_nothing_or_with_a_part() -> None:
    truth = odd_state(3)
    async with pccl.Master() as master, members(master.address, 2) as comms:
        await sync(comms, [odd_state(3) for _ in comms])
        parts: list[State] = [{}, {name: odd_state(4)[name] for name in ("holes", "none", "scalar", "text")}]
        for part in parts:
            async with newcomer(master.address, comms) as new:
                *_, info = await sync([*comms, new], [*(odd_state(3) for _ in comms), part], 1)
                assert bits(info.state) == bits(truth)
                assert all(info.state[name] is part[name] for name in part if name != "text")
                await leave(new, comms)


async def leave(leaver: Communicator, others: Sequence[Communicator]) -> None:
    """It leaves, and the others hear of it."""

    async def updates(comm: Communicator) -> None:
        while comm.world_size > len(others):
            await comm.update()

    await each([leaver.leave(), *(updates(c) for c in others)])


MISFITS: dict[str, State] = {
    "shape": {"w": np.zeros((2, 3)), "v": 1},
    "dtype": {"w": np.zeros(6, np.int64), "v": 1},
    "more": {"w": np.zeros(6), "v": 1, "x": np.zeros(1)},
    "a value instead": {"w": 5, "v": 1},
    "a tensor instead": {"w": np.zeros(6), "v": np.zeros(1)},
}


@pytest.mark.parametrize("kind", MISFITS)
async def test_check_29_a_newcomer_whose_state_does_not_fit_is_told_so_and_goes(kind: str) -> None:
    async with pccl.Master() as master, members(master.address, 2) as comms:
        states: list[State] = [{"w": np.arange(6.0), "v": 1} for _ in comms]
        await sync(comms, states)
        async with newcomer(master.address, comms) as new:
            own = copied(MISFITS[kind])
            found = await try_sync([*comms, new], [*states, own], [{"revision": 1}] * 3)
            assert type(found[2]) is pccl.StateConflict
            assert any(repr(name) in str(found[2]) for name in ("w", "v", "x"))
            assert bits(own) == bits(MISFITS[kind])
            assert [i.revision for i in found[:2]] == [1, 1]
            assert {c.world_size for c in comms} == {2}
            tensors = [np.ones(3) for _ in comms]
            await each(c.all_reduce(x, retry=True) for c, x in zip(comms, tensors, strict=True))
            assert all((x == 2).all() for x in tensors)


@pytest.mark.parametrize("kind", [*MISFITS, "fewer"])
async def test_check_29_of_members_with_different_keys_the_minority_goes(kind: str) -> None:
    misfit: State = copied((MISFITS | {"fewer": {"w": np.arange(6.0)}})[kind])
    before = bits(misfit)
    async with group(3) as comms:
        states: list[State] = [{"w": np.arange(6.0), "v": 1}, misfit, {"w": np.arange(6.0), "v": 1}]
        found = await try_sync(comms, states, [{"revision": 1}] * 3)
        assert type(found[1]) is pccl.StateConflict
        assert "names, dtypes or shapes" in str(found[1])
        assert [found[k].revision for k in (0, 2)] == [1, 1]
        assert bits(misfit) == before
        tensors = [np.ones(3) for _ in range(2)]
        await each(c.all_reduce(x, retry=True) for c, x in zip((comms[0], comms[2]), tensors, strict=True))
        assert all((x == 2).all() for x in tensors)
