"""Calls before they move anything."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import pccl
from pccl import sync
from pccl.calls import Part
from pccl.collectives.tensors import memory_of
from pccl.core.types import Epoch, Member, View
from tests.checks.support import each, group, in_threads, outcomes, wait_until

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


# --- errors that are nobody's word ----------------------------------------------------------------------------------------


def once(error: Exception, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What raises this the first time; then all is as it was."""

    def strike(*args: Any, **kwargs: Any) -> None:
        monkeypatch.undo()
        raise error

    return strike


async def all_go_on(comms: list[Any]) -> None:
    inputs = [np.full(50_000, k + 1.0) for k in range(len(comms))]
    await each(c.all_reduce(x) for c, x in zip(comms, inputs, strict=True))
    assert all((x == 3).all() for x in inputs)


@pytest.mark.parametrize("where", ["begin", "commit"])
async def test_no_memory_for_a_call(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It fails for its caller at once, not at its deadline; for the others if it is not committed."""
    async with group(2) as comms:
        engine: Any = comms[0]._runtime.engine
        inputs = [np.full(50_000, k + 1.0) for k in range(2)]
        if where == "begin":
            monkeypatch.setattr(engine, "spare", once(MemoryError("too much"), monkeypatch))
        else:
            monkeypatch.setattr(Part, "commit", once(MemoryError("too much"), monkeypatch))
        found = await outcomes((c.all_reduce(x, timeout=None) for c, x in zip(comms, inputs, strict=True)), within=20.0)
        if where == "begin":
            assert isinstance(found[0], pccl.InternalError)
            assert isinstance(found[1], pccl.CollectiveAborted)
            assert "too much" in str(found[1])
            assert all((x == k + 1).all() for k, x in enumerate(inputs))
        else:
            assert sorted(isinstance(result, pccl.InternalError) for result in found) == [False, True]
        await all_go_on(comms)


@pytest.mark.parametrize("retry", [False, True])
async def test_arithmetic_that_raises_ends_the_attempt(retry: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of a frame: the link is of no use any more, and made anew."""
    async with group(2) as comms:
        engine: Any = comms[0]._runtime.engine
        inputs = [np.full(50_000, k + 1.0) for k in range(2)]
        for name in ("combine", "fold"):
            monkeypatch.setattr(engine.kernels, name, once(FloatingPointError("odd"), monkeypatch))
        found = await outcomes((c.all_reduce(x, retry=retry, timeout=None) for c, x in zip(comms, inputs, strict=True)), within=20.0)
        if retry:
            assert [info.attempts for info in found] == [2, 2]
        else:
            assert all(isinstance(e, pccl.CollectiveAborted) and not e.lost for e in found), found
        assert all((x == (3 if retry else k + 1)).all() for k, x in enumerate(inputs))
        await all_go_on(comms)


def test_a_work_on_a_communicator_that_was_left_meanwhile() -> None:
    """Its error is its own, although the communicator is no more."""
    gone = threading.Event()

    def body(comm: sync.Communicator) -> None:
        sub = comm.split(0)
        assert sub
        comm.barrier()
        if comm.rank == 2:
            gone.wait(20)
            comm.close()
            return
        work = sub.all_reduce(np.ones(4), async_op=True)
        gone.set()
        wait_until(work.done)
        sub.leave()
        peer: Any = comm._runtime.engine._peer
        wait_until(lambda: sub._comm not in peer.comms)
        with pytest.raises(pccl.CollectiveAborted):
            work.wait()
        assert sub.world_size == 2
        assert len(sub.view.lost) == 1

    in_threads(3, body)


# --- what is over ---------------------------------------------------------------------------------------------------------


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
