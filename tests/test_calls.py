"""Calls before they move anything."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import pccl
from pccl.calls import Part
from pccl.collectives.tensors import memory_of
from pccl.core.types import Epoch, Member, View

VIEW = View(Epoch(1, 1, 1), 0, tuple(Member(uid, f"peer {uid}", "here") for uid in range(3)))


@pytest.mark.parametrize(
    ("collective", "given", "got", "fits"),
    [
        ("all_to_all", 6, 6, True),
        ("all_to_all", 7, 7, False),
        ("reduce_scatter", 6, 2, True),
        ("reduce_scatter", 6, 6, False),
        ("all_gather", 2, 6, True),
        ("all_gather", 2, 4, False),
    ],
)
def test_buffers_of_the_right_size_fit_the_membership(collective: str, given: int, got: int, fits: bool) -> None:
    x, out = memory_of(np.zeros(given), "x"), memory_of(np.zeros(got), "out", write=True)
    assert (Part(collective, collective, x=x, out=out).misfit(VIEW) == "") is fits


@pytest.fixture
def _no_collector() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("_no_collector")
async def test_a_round_that_has_ended_holds_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even until the collector comes: big tensors are few objects, so that it may take its time."""
    spares: list[weakref.ref[npt.NDArray[Any]]] = []

    async def peer(address: str) -> list[pccl.Info]:
        async with pccl.connect(address, min_world_size=2) as comm:
            engine = comm._runtime.engine
            give = engine.spare

            def spare(nbytes: int) -> npt.NDArray[Any]:
                found = give(nbytes)
                spares.append(weakref.ref(found))
                return found

            monkeypatch.setattr(engine, "spare", spare)
            async with comm.round() as calls:
                pending = [calls.all_reduce(np.ones(100_000)) for _ in range(3)]
            assert len([ref for ref in spares if ref() is not None]) <= 1 + 3  # the engine keeps one for the next call; the other peer
            return [call.info for call in pending]

    async with pccl.Master() as master:
        infos = await asyncio.gather(peer(master.address), peer(master.address))
    assert [info.world_size for info in infos[0] + infos[1]] == [2] * 6
    assert len(spares) == 6


@pytest.mark.usefixtures("_no_collector")
@pytest.mark.parametrize("atomic", [True, False])
async def test_a_call_that_has_ended_knows_no_tensors(atomic: bool) -> None:
    async def peer(address: str) -> weakref.ref[npt.NDArray[Any]]:
        async with pccl.connect(address, min_world_size=2) as comm:
            x = np.ones(100)
            info = await comm.all_reduce(x, atomic=atomic)
            assert info.out is x
            ref = weakref.ref(x)
            del x, info
            await comm.barrier()
            assert ref() is None
            return ref

    async with pccl.Master() as master:
        await asyncio.gather(peer(master.address), peer(master.address))


@pytest.mark.usefixtures("_no_collector")
async def test_a_blocking_call_that_has_ended_knows_no_tensors() -> None:
    def alone(address: str) -> None:
        with pccl.sync.connect(address) as comm:
            x = np.ones(100)
            comm.all_reduce(x)
            with comm.round() as calls:
                calls.all_reduce(x)
            ref = weakref.ref(x)
            del x, calls
            comm.barrier()
            assert ref() is None

    async with pccl.Master() as master:
        await asyncio.to_thread(alone, master.address)
