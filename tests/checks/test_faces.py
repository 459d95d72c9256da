"""Two faces, one core: what they take, that they agree, and what Ctrl-C does to a blocking call."""

from __future__ import annotations

import array
import asyncio
import mmap
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import pccl
from pccl import sync
from tests.checks.processes import Failure, processes
from tests.checks.support import each, group, in_threads, join

pytestmark = pytest.mark.usefixtures("every_transport")

KINDS = [
    "numpy",
    "numpy bfloat16",
    "strided",
    "0-d",
    "torch",
    "torch bfloat16",
    "torch strided",
    "bytearray",
    "array",
    "memoryview",
    "mmap",
]


def make(kind: str, value: float) -> Any:
    """Twelve elements (or one) of some kind."""
    if kind == "numpy":
        return np.full((3, 4), value)
    if kind == "numpy bfloat16":
        return np.full(12, value, ml_dtypes.bfloat16)
    if kind == "strided":
        return np.full((4, 6), value, np.float32).T[::2]
    if kind == "0-d":
        return np.array(value)
    if kind.startswith("torch"):
        torch = pytest.importorskip("torch")
        if kind == "torch strided":
            return torch.full((4, 6), value).t()[::2]
        return torch.full((3, 4), value, dtype=torch.bfloat16 if kind == "torch bfloat16" else torch.float32)
    if kind == "bytearray":
        return bytearray([int(value)] * 12)
    if kind == "array":
        return array.array("d", [value] * 12)
    if kind == "memoryview":
        return memoryview(array.array("i", [int(value)] * 12))
    memory = mmap.mmap(-1, 12)
    memory[:] = bytes([int(value)] * 12)
    return memory


def elements(x: Any) -> list[float]:
    if type(x).__module__.startswith("torch"):
        return [float(v) for v in x.flatten().float().tolist()]
    array_like = np.asarray(memoryview(x)) if isinstance(x, mmap.mmap) else np.asarray(x)
    return [float(v) for v in array_like.reshape(-1)]


@pytest.mark.parametrize("kind", KINDS)
async def test_what_the_asynchronous_face_takes(kind: str) -> None:
    async with group(2) as comms:
        given = [make(kind, k + 1.0) for k in range(2)]
        infos = await each(c.all_reduce(x) for c, x in zip(comms, given, strict=True))
        for x, info in zip(given, infos, strict=True):
            assert set(elements(x)) == {3.0}
            assert info.out is x
        gathered = await each(c.all_gather(make(kind, k + 1.0)) for k, c in enumerate(comms))
        for info in gathered:
            n = len(elements(given[0]))
            assert elements(info.out) == [1.0] * n + [2.0] * n
            assert (type(info.out).__module__ == "torch") == kind.startswith("torch")


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_blocking_face_takes(kind: str) -> None:
    def body(comm: sync.Communicator) -> tuple[list[float], list[float]]:
        x, y = make(kind, comm.rank + 1.0), make(kind, comm.rank * 5.0)
        assert comm.all_reduce(x).out is x
        comm.broadcast(y, root=1)
        return elements(x), elements(y)

    for x, y in in_threads(2, body):
        assert set(x) == {3.0}
        assert set(y) == {5.0}


def fused(rank: int) -> list[Any]:
    torch = pytest.importorskip("torch")
    model = torch.nn.Linear(5, 3)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(rank + 1.0)
    return [*(p.detach() for p in model.parameters()), torch.full((7,), rank + 1.0), torch.full((4, 6), rank + 1.0).t(), torch.zeros(0)]


async def test_lists_of_tensors_travel_as_one() -> None:
    async with group(3) as comms:
        lists = [fused(rank) for rank in range(3)]
        infos = await each(c.all_reduce(x, "avg") for c, x in zip(comms, lists, strict=True))
        assert infos[0].call == "all_reduce(float32[49], avg)"
        assert all(set(elements(x)) <= {2.0} for mine in lists for x in mine)
        outs = [[np.zeros(3), np.zeros((2, 2))] for _ in comms]
        ins = [[np.full(5, k + 1.0), np.full(2, k + 1.0)] for k in range(3)]  # cut in other places than the outputs
        await each(c.all_reduce(x, out=y) for c, x, y in zip(comms, ins, outs, strict=True))
        assert all(set(elements(y)) == {6.0} for mine in outs for y in mine)
        assert all(set(elements(x)) == {k + 1.0} for k, mine in enumerate(ins) for x in mine)


async def test_a_failed_call_on_a_fused_list_leaves_it_as_it_was() -> None:
    async with group(2) as comms:
        lists = [fused(rank) for rank in range(2)]
        calls = comms[0].all_reduce(lists[0]), comms[1].all_reduce(lists[1], "max")
        for error in await asyncio.gather(*calls, return_exceptions=True):
            assert isinstance(error, pccl.CollectiveMismatch), error
        assert all(set(elements(x)) <= {rank + 1.0} for rank, mine in enumerate(lists) for x in mine)


async def test_both_faces_in_one_group() -> None:
    """An asynchronous and a blocking peer, numpy on one side and torch on the other: one result, to the bit."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(1)
    inputs = [rng.standard_normal(50_000).astype(np.float32) for _ in range(2)]

    def blocking(address: str) -> bytes:
        with sync.connect(address, name="blocking", timeout=30.0) as comm:
            while comm.world_size < 2:
                comm.update()
            x = torch.from_numpy(inputs[1].copy())
            comm.all_reduce(x)
            with comm.round() as r:
                first = r.all_reduce(x, "avg")
                second = r.broadcast(x[:10].clone(), root=0)
            assert first.info.world_size == second.info.world_size == 2
            info = comm.sync_state({"x": x}, revision=1)
            return bytes(x.numpy().tobytes()) + info.digest.encode()

    async with pccl.Master() as master:
        other = asyncio.create_task(asyncio.to_thread(blocking, master.address))
        comm = await join(master.address, "asynchronous", 2)
        x = inputs[0].copy()
        await comm.all_reduce(x)
        async with comm.round() as r:
            r.all_reduce(x, "avg")
            r.broadcast(x[:10].copy(), root=0)
        info = await comm.sync_state({"x": x}, revision=1)
        assert await other == x.tobytes() + info.digest.encode()
        await comm.close()


def test_work_of_a_blocking_call() -> None:
    turn = threading.Barrier(2)

    def body(comm: sync.Communicator) -> None:
        x = np.full(100, comm.rank + 1.0)
        turn.wait()
        if comm.rank == 0:
            work = comm.all_reduce(x, async_op=True)
            assert not work.done()
            with pytest.raises(pccl.InvalidArgument, match="has not ended"):
                work.result()
            with pytest.raises(TimeoutError, match="still under way"):
                work.wait(timeout=0.01)
            turn.wait()
        else:
            turn.wait()
            work = comm.all_reduce(x, async_op=True)
        info = work.wait()
        assert work.done()
        assert work.result() is info
        assert info.world_size == 2
        assert (x == 3).all()

    in_threads(2, body)


def test_the_asynchronous_face_has_no_async_op() -> None:
    async def main() -> None:
        async with group(1) as (comm,):
            with pytest.raises(pccl.InvalidArgument, match="async_op"):
                await comm.barrier(async_op=True)

    asyncio.run(main())


def test_both_faces_have_the_same_calls() -> None:
    def public(kind: type) -> set[str]:
        return {name for name in dir(kind) if not name.startswith("_")}

    assert public(pccl.Communicator) == public(sync.Communicator)


# --- Ctrl-C ---------------------------------------------------------------------------------------------------------------

COUNT = 2_000_000


def wait_in(comm: sync.Communicator, what: str) -> tuple[bool, float]:
    """A blocking call that some member never makes; returns whether the input is as it was, and when the interrupt was over."""
    x = np.full(COUNT, comm.rank + 1.0, np.float32)
    calls: dict[str, Callable[[], Any]] = {
        "all_reduce": lambda: comm.all_reduce(x),
        "out of place": lambda: comm.all_reduce(x, out=np.empty_like(x)),
        "retry": lambda: comm.all_reduce(x, retry=True),
        "sync_state": lambda: comm.sync_state({"x": x}, revision=1),
        "wait": lambda: comm.all_reduce(x, async_op=True).wait(),
    }
    try:
        if what == "round":
            with comm.round() as r:
                r.all_reduce(x)
        else:
            calls[what]()
    except KeyboardInterrupt:
        return bool((x == comm.rank + 1.0).all()), time.monotonic()
    raise AssertionError("the call ended without an interrupt")


def reduce(comm: sync.Communicator) -> float:
    x = np.full(COUNT, 1.0, np.float32)
    comm.all_reduce(x)
    assert (x == x[0]).all()
    return float(x[0])


def waits(comm: sync.Communicator, what: str) -> None:
    wait_in(comm, what)


@pytest.mark.process
@pytest.mark.timeout(120)
@pytest.mark.parametrize("what", ["all_reduce", "out of place", "retry", "round", "sync_state", "wait"])
async def test_ctrl_c_in_a_blocking_call(what: str) -> None:
    """KeyboardInterrupt at once, inputs as they were, a typed abort for the others; and all go on together."""
    async with pccl.Master() as master, processes(master.address, 3, blocking=True) as peers:
        interrupted = peers[0].start(wait_in, what)
        other = peers[1].start(waits, what)
        group_of_master = master._shell._groups["default"]

        def both_wait() -> bool:
            root = group_of_master.root
            return root is not None and any(len(call.claims) == 2 for call in root.calls.values())

        async with asyncio.timeout(30):
            while not both_wait():  # noqa: ASYNC110
                await asyncio.sleep(0)
        began = time.monotonic()
        peers[0].signal(signal.SIGINT)
        intact, ended = await asyncio.wait_for(interrupted, 20)
        assert intact
        assert ended - began < 5.0, "0.1 s is promised; the rest is for a busy machine"
        outcome = (await asyncio.gather(asyncio.wait_for(other, 20), return_exceptions=True))[0]
        failure: Failure = outcome.failure
        assert failure.kind == "CollectiveAborted", failure
        assert "P0 cancelled it" in failure.text or "KeyboardInterrupt" in failure.text
        late = await peers[2].outcome(waits, what)
        assert isinstance(late, Failure)
        assert late.kind == "CollectiveAborted", "the third, which comes later, hears of it, too"
        assert await asyncio.gather(*(p.do(reduce) for p in peers)) == [3.0] * 3


@pytest.mark.process
async def test_ctrl_c_while_connecting() -> None:
    """A peer that is not let in can be interrupted; its threads end."""
    async with pccl.Master() as master, pccl.connect(master.address, name="member"):
        code = f"import pccl.sync; print('go', flush=True); pccl.sync.connect({master.address!r})"
        pipe = asyncio.subprocess.PIPE
        child = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=pipe, stderr=pipe)
        try:
            assert child.stdout
            assert await asyncio.wait_for(child.stdout.readline(), 30) == b"go\n"
            async with asyncio.timeout(30):
                while not master._shell._groups["default"].pending:  # noqa: ASYNC110
                    await asyncio.sleep(0)
            child.send_signal(signal.SIGINT)
            _, err = await asyncio.wait_for(child.communicate(), 20)
            assert child.returncode != 0
            assert err.strip().endswith(b"KeyboardInterrupt")
        finally:
            if child.returncode is None:
                child.kill()
                await child.wait()


async def test_a_communicator_explains_how_calls_run() -> None:
    async with group(2, transport="auto") as near, group(2, transport="tcp") as apart:
        assert "reading each other's memory" in near[0].explain()
        assert "slots" in near[0].explain("broadcast", 1000, root=1)
        assert "the algorithm says so" in near[0].explain(algorithm="ring")
        assert f"shares no memory with {apart[0].view.members[1].name}" in apart[0].explain("reduce_scatter")
        for wrong in ({"collective": "sendrecv"}, {"nbytes": 3}, {"root": 2}, {"algorithm": "no such"}):
            with pytest.raises(pccl.InvalidArgument, match=next(iter(wrong))):
                near[0].explain(**wrong)  # type: ignore[arg-type]
