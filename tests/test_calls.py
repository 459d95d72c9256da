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
from pccl.collectives.transfer import OutStream
from pccl.collectives.volley import Lane
from pccl.core.types import Epoch, Member, View
from pccl.route import misfit
from tests.checks.support import each, group, in_threads, outcomes, until, wait_until

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
    assert (misfit(Part(collective, collective, x=x, out=out).ask, VIEW) == "") is fits


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
@pytest.mark.parametrize("transport", ["auto", "tcp"])
async def test_no_memory_for_a_call(transport: str, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It fails for its caller at once, not at its deadline; for the others if it is not committed."""
    async with group(2, transport=transport) as comms:
        engine: Any = comms[0]._runtime.engine
        inputs = [np.full(50_000, k + 1.0) for k in range(2)]
        if where == "begin":
            owner, name = (engine, "spare") if transport == "tcp" else (engine.lanes._commons, "take")
            monkeypatch.setattr(owner, name, once(MemoryError("too much"), monkeypatch))
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
    async with group(2, transport="tcp") as comms:
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


@pytest.mark.parametrize("count", [4, 10_000, 300_000])
@pytest.mark.parametrize("rounds", [False, True])
async def test_what_came_early_of_another_call_ends_this_one_before_it_sends(
    count: int, rounds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing leaves, or comes in, when the call is halted: its caller has its memory back."""
    wrong: list[Any] = []
    for kind in (OutStream, Lane):
        pull = kind.pull

        def watched(self: Any, pull: Any = pull) -> Any:
            if self.transfer.halted:
                wrong.append(self.transfer.key)
            return pull(self)

        monkeypatch.setattr(kind, "pull", watched)

    async def one(comm: Any, op: str) -> None:
        if not rounds:
            await comm.all_reduce(np.ones(count), op)
            return
        async with comm.round() as r:
            r.all_reduce(np.ones(count), op)
            r.all_reduce(np.ones(count))

    async with group(3, transport="tcp") as comms:
        engine: Any = comms[2]._runtime.engine
        others = [asyncio.create_task(one(c, "sum")) for c in comms[:2]]
        await until(lambda: any(flow._early or flow._credits for flow in engine.executor.flows.values()))
        if rounds:  # all of its parts begin at once
            runtime: Any = comms[2]._runtime
            membership = engine.membership(0)
            runtime.post(setattr, membership, "stopped", True)
            last = asyncio.create_task(one(comms[2], "max"))
            await until(lambda: membership._queue and membership._queue[0].op.sealed)
            runtime.post(setattr, membership, "stopped", False)
            runtime.post(membership._drain, 0.0)
        else:
            last = asyncio.create_task(one(comms[2], "max"))
        found = await outcomes([*others, last], within=20.0)
        assert all(isinstance(error, pccl.CollectiveMismatch) for error in found), found
        assert not wrong
        assert not engine._running
        await each(c.barrier() for c in comms)


async def test_the_root_of_a_broadcast_saves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would copy all of its tensor before it sends the first slice, and the engine's loop would stand still meanwhile."""
    async with group(2) as comms:
        engine: Any = comms[0]._runtime.engine
        monkeypatch.setattr(engine, "spare", once(MemoryError("for nothing"), monkeypatch))
        inputs = [np.full(500_000, k + 1.0) for k in range(2)]
        await each(c.broadcast(x) for c, x in zip(comms, inputs, strict=True))
        assert all((x == 1).all() for x in inputs)
        call = asyncio.create_task(comms[0].broadcast(inputs[0]))
        await until(lambda: engine.busy)
        call.cancel()
        await outcomes([call])
        assert (inputs[0] == 1).all()


# --- what is over ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["deadline", "cancelled", "mismatch"])
async def test_calls_that_were_aborted_are_forgotten(how: str) -> None:
    """Nothing is known of any of them, at any member, once all have said that they send nothing more: an epoch may be long."""
    async with group(3) as comms:
        engines: list[Any] = [c._runtime.engine for c in comms]
        for k in range(12):
            who, count = k % 3, 300_000 if k % 2 else 1000
            inputs = [np.ones(count, np.float32) for _ in comms]
            tasks = [
                asyncio.create_task(
                    c.all_reduce(
                        inputs[i],
                        "max" if how == "mismatch" and i == who else "sum",
                        tag=f"call {k}",
                        timeout=0.001 if how == "deadline" and i == who else 20.0,
                    )
                )
                for i, c in enumerate(comms)
                if how != "deadline" or i != (who + 1) % 3 or k % 4
            ]
            if how == "cancelled":
                await asyncio.sleep(0)
                tasks[who].cancel()
            await outcomes(tasks, within=20.0)
        await each(c.barrier() for c in comms)
        await until(lambda: not any(calls for engine in engines for calls in engine.executor._dead.values()))
        for engine in engines:
            assert all(not flow._early_bytes and not flow._unwanted and not flow._share_total for flow in engine.executor.flows.values())


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
