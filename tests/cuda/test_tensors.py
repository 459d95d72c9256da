"""Calls on CUDA tensors: what they give, when they read and write, and what is left after a failure. `conftest` says on what they run."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import pccl
from pccl import staging
from pccl.calls import Part
from pccl.collectives.cuda import pieces
from pccl.collectives.tensors import Overlap, memory_of, overlap
from pccl.core.dtypes import DTYPES
from pccl.staging import Pool
from tests.checks import oracle
from tests.checks.support import each, group, in_threads, outcomes, until
from tests.cuda.conftest import bits

torch: Any = pytest.importorskip("torch")

LARGE = 700_001
"""Elements of float64 that are several pieces, slices, and no multiple of either"""
Gpu = Any


def values(dtype: str, count: int, rank: int) -> Any:
    """A CPU tensor of something to reduce."""
    raw, kind = oracle.values(dtype, count, (count, rank)).view(np.uint8), getattr(torch, dtype)
    return torch.from_numpy(raw.copy()).view(kind) if count else torch.zeros(0, dtype=kind)


async def alike(comms: list[Any], gpu: Gpu, call: Callable[[Any, int, Any, Any], Any], inputs: list[Any], outs: list[Any] | None) -> None:
    """The same call with all tensors on the CPU, all on the GPU, and some here and some there leaves the same bits everywhere."""
    found = []
    for where in ("", "g", "gc"):
        put = [gpu.put if where and where[k % len(where)] == "g" else torch.clone for k in range(len(comms))]
        xs = [f(x) for f, x in zip(put, inputs, strict=True)]
        ys = [f(y) for f, y in zip(put, outs, strict=True)] if outs else [None] * len(comms)
        infos = await each(call(c, k, x, y) for k, (c, x, y) in enumerate(zip(comms, xs, ys, strict=True)))
        made = [None if info.out is None or not isinstance(info.out, torch.Tensor) else info.out for info in infos]
        assert all(m is None or m.device == x.device for m, x in zip(made, xs, strict=True))
        found.append([bits(gpu.get(t) if t.is_cuda else t) for ts in (xs, ys, made) for t in ts if t is not None])
    assert found[0] == found[1] == found[2]


# --- results ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
async def test_every_dtype(gpu: Gpu, dtype: str) -> None:
    op = "bor" if dtype == "bool" else "sum"
    async with group(3) as comms:
        for count in (0, 1, 1025, 100_003):
            inputs = [values(dtype, count, k) for k in range(3)]
            await alike(comms, gpu, lambda c, k, x, y: c.all_reduce(x, op), inputs, None)
            await alike(
                comms, gpu, lambda c, k, x, y: c.all_reduce(x, op, out=y, atomic=False), inputs, [torch.zeros_like(x) for x in inputs]
            )


@pytest.mark.parametrize("atomic", [True, False])
@pytest.mark.parametrize("algorithm", ["ring", "bidirectional_ring", "tree", "star", "direct", "halving_doubling"])
async def test_every_algorithm(gpu: Gpu, algorithm: str, atomic: bool) -> None:
    async with group(4) as comms:
        inputs = [values("float64", LARGE, k) for k in range(4)]
        outs = [torch.zeros_like(x) for x in inputs]
        await alike(comms, gpu, lambda c, k, x, y: c.all_reduce(x, "avg", atomic=atomic, algorithm=algorithm), inputs, None)
        await alike(comms, gpu, lambda c, k, x, y: c.all_reduce(x, "max", out=y, atomic=atomic, algorithm=algorithm), inputs, outs)


@pytest.mark.parametrize("atomic", [True, False])
@pytest.mark.parametrize("part", [1, 5, 200_003])
async def test_every_collective(gpu: Gpu, part: int, atomic: bool) -> None:
    how: Any = {"atomic": atomic}
    async with group(3) as comms:
        ones, threes = [values("float32", part, k) for k in range(3)], [values("float32", 3 * part, k) for k in range(3)]
        small, large = [torch.zeros(part) for _ in range(3)], [torch.zeros(3 * part) for _ in range(3)]
        await alike(comms, gpu, lambda c, k, x, y: c.reduce_scatter(x, **how), threes, None)
        await alike(comms, gpu, lambda c, k, x, y: c.reduce_scatter(x, out=y, **how), threes, small)
        await alike(comms, gpu, lambda c, k, x, y: c.reduce_scatter(x, out=x[k * part : (k + 1) * part], **how), threes, None)
        await alike(comms, gpu, lambda c, k, x, y: c.all_gather(x, **how), ones, None)
        await alike(comms, gpu, lambda c, k, x, y: c.all_gather(x, out=y, **how), ones, large)
        await alike(comms, gpu, lambda c, k, x, y: c.all_gather(y[k * part : (k + 1) * part], out=y, **how), ones, threes)
        await alike(comms, gpu, lambda c, k, x, y: c.broadcast(x, root=1, **how), ones, None)
        await alike(comms, gpu, lambda c, k, x, y: c.reduce(x, root=2, **how), ones, None)
        await alike(comms, gpu, lambda c, k, x, y: c.reduce(x, root=0, out=y, **how), ones, small)
        await alike(comms, gpu, lambda c, k, x, y: c.gather(x, root=1, **how), ones, None)
        await alike(comms, gpu, lambda c, k, x, y: c.scatter(y, x, root=1, **how), threes, small)
        await alike(comms, gpu, lambda c, k, x, y: c.all_to_all(x, **how), threes, None)
        await alike(comms, gpu, lambda c, k, x, y: c.all_to_all(x, out=y, **how), threes, large)
        await alike(comms[:2], gpu, lambda c, k, x, y: c.recv(x, 0, **how) if k else c.send(x, 1, **how), ones[:2], None)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
async def test_inputs_that_are_converted_or_scaled(gpu: Gpu, dtype: str) -> None:
    async with group(3) as comms:
        for count in (7, 1_500_001):
            inputs = [values(dtype, count, k) for k in range(3)]
            outs = [torch.zeros_like(x) for x in inputs]
            await alike(comms, gpu, lambda c, k, x, y: c.all_reduce(x, accumulate="float32"), inputs, None)
            await alike(comms, gpu, lambda c, k, x, y: c.all_reduce(x, accumulate="float32", out=y), inputs, outs)
            await alike(comms, gpu, lambda c, k, x, y: c.all_reduce(x, pccl.premul_sum(0.1 * k)), inputs, None)


async def test_tensors_of_other_shapes(gpu: Gpu) -> None:
    """Transposed, with gaps, with dimensions of every size, leaves of a graph, of inference."""
    cube = torch.arange(3.0 * 40 * 700 * 30).reshape(3, 40, 700, 30)
    kinds: list[Callable[[Any], Any]] = [
        lambda x: x.permute(3, 1, 2, 0),
        lambda x: x[:, ::3, 1:, :7],
        lambda x: x[0, 0, 0, 0],
        lambda x: x.transpose(2, 3)[:, :, :, ::2],
        lambda x: x[:, :1].mT,
    ]
    async with group(2) as comms:
        for kind in kinds:
            found = []
            for put in (torch.clone, gpu.put):
                bases = [put(cube), put(cube + 1)]
                await each(c.all_reduce(kind(x)) for c, x in zip(comms, bases, strict=True))
                found.append([bits(gpu.get(x) if x.is_cuda else x) for x in bases])
            assert found[0] == found[1]
        leaf = gpu.put(torch.ones(3)).requires_grad_()
        with torch.inference_mode():
            inner = gpu.put(torch.arange(6.0))
        await each([comms[0].all_reduce(leaf), comms[1].all_reduce(gpu.put(torch.ones(3)))])
        await each([comms[0].all_reduce(inner), comms[1].all_reduce(gpu.put(torch.ones(6)))])
        assert gpu.get(leaf).tolist() == [2, 2, 2]
        assert gpu.get(inner).tolist() == [1, 2, 3, 4, 5, 6]


async def test_lists_of_tensors(gpu: Gpu) -> None:
    async with group(2) as comms:
        found = []
        for put in (torch.clone, gpu.put):
            lists = [[put(torch.arange(n) * (k + 1.0)) for n in (3, 0, 600_000, 1, 5)] + [put(torch.ones(4, 6))[:, ::2]] for k in range(2)]
            await each(c.all_reduce(x) for c, x in zip(comms, lists, strict=True))
            found.append([bits(gpu.get(x) if x.is_cuda else x) for xs in lists for x in xs])
        assert found[0] == found[1]


async def test_rounds(gpu: Gpu) -> None:
    async with group(2) as comms:
        tensors = [[gpu.put(torch.full((n,), k + 1.0)) for n in (3, LARGE, 100)] for k in range(2)]

        async def body(comm: Any, xs: list[Any]) -> None:
            async with comm.round(retry=True) as r:
                for x in xs:
                    r.all_reduce(x)

        await each(body(c, xs) for c, xs in zip(comms, tensors, strict=True))
        assert all((gpu.get(x) == 3).all() for xs in tensors for x in xs)


def test_blocking_calls(gpu: Gpu) -> None:
    def body(comm: Any) -> None:
        for count in (1, 1000, LARGE):
            x, y = gpu.put(torch.ones(count)), gpu.put(torch.ones(count))
            comm.all_reduce(x, atomic=False)
            assert (gpu.get(x) == 2).all()
            works = [comm.all_reduce(t, async_op=True) for t in (x, y)]
            for work in works:
                work.wait()
            assert (gpu.get(x) == 4).all()
            assert (gpu.get(y) == 2).all()

    in_threads(2, body)


async def test_alone(gpu: Gpu) -> None:
    async with group(1) as (comm,):
        x, y = gpu.put(values("float32", 100_000, 0)), gpu.put(torch.zeros(100_000))
        await comm.all_reduce(x, "avg", out=y)
        await comm.all_reduce(x)
        assert bits(gpu.get(x)) == bits(gpu.get(y)) == bits(values("float32", 100_000, 0))


async def test_shared_state(gpu: Gpu) -> None:
    """Weights on the GPU, for members and for those that have none."""
    async with group(2) as comms:
        weights = [gpu.put(torch.full((900_000,), k + 1.0)) for k in range(2)]
        states = [{"weights": w, "bias": gpu.put(torch.ones(4, 6))[:, ::2]} for w in weights]
        await each(c.sync_state(s, revision=2 - k) for k, (c, s) in enumerate(zip(comms, states, strict=True)))
        assert all((gpu.get(w) == 1).all() for w in weights)
        states[1].pop("bias")
        infos = await each(c.sync_state(s, revision=3 - k, declare=not k) for k, (c, s) in enumerate(zip(comms, states, strict=True)))
        assert infos[1].state["bias"].is_cuda
        assert gpu.get(infos[1].state["bias"]).tolist() == [[1.0] * 3] * 4


# --- order --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["in place", "out", "received", "round", "state"])
async def test_what_the_stream_was_given_comes_first(gpu: Gpu, how: str) -> None:
    """Its writes to the input, and its reads of what is to be overwritten."""
    async with group(2) as comms:
        x, y, seen = gpu.put(torch.zeros(LARGE)), gpu.put(torch.full((LARGE,), 7.0)), gpu.put(torch.zeros(LARGE))
        mine = torch.ones(LARGE)
        into = x if how == "in place" else y
        gpu.later(lambda: x.add_(5))
        gpu.later(lambda: seen.add_(into))
        if how == "in place":
            calls = [comms[0].all_reduce(x), comms[1].all_reduce(mine)]
        elif how == "out":
            calls = [comms[0].all_reduce(x, out=y), comms[1].all_reduce(mine)]
        elif how == "received":
            calls = [comms[0].recv(y, 1), comms[1].send(mine, 0)]
        elif how == "round":

            async def body(comm: Any, *args: Any) -> None:
                async with comm.round() as r:
                    r.all_reduce(args[0], out=args[-1])

            calls = [body(comms[0], x, y), body(comms[1], mine)]
        else:
            gpu.go_on()
            calls = [comms[0].sync_state({"x": x}, 2), comms[1].sync_state({"x": mine}, 1)]
        tasks = [asyncio.create_task(call) for call in calls]
        engine: Any = comms[0]._runtime.engine
        await until(lambda: engine.busy)
        gpu.go_on()
        await each(tasks)
        assert (mine == {"received": 1, "state": 5}.get(how, 6)).all()
        assert (gpu.get(x) == (6 if how == "in place" else 5)).all()
        assert (gpu.get(seen) == (5 if how == "in place" else 7)).all()
        assert how in ("in place", "state") or (gpu.get(y) == (1 if how == "received" else 6)).all()


async def test_slices_are_sent_while_others_are_on_their_way(fake: Gpu) -> None:
    """Of an input of which one piece has been fetched."""
    fetched, gate = threading.Semaphore(1), threading.Event()

    def hold(what: str) -> None:
        if what == "fetch" and not fetched.acquire(blocking=False):
            gate.wait(20)

    async with group(2, transport="tcp") as comms:
        engine: Any = comms[0]._runtime.engine
        x, mine = fake.put(torch.ones(LARGE, dtype=torch.float64)), torch.ones(LARGE, dtype=torch.float64)
        fake.torch.gate = hold
        tasks = [asyncio.create_task(c.all_reduce(t)) for c, t in zip(comms, (x, mine), strict=True)]
        try:
            transfer = await until(lambda: next(iter(engine._running), None))
            await until(lambda: transfer.bytes_sent >= 1 << 20)
            assert "store" not in fake.torch.log
        finally:
            gate.set()
        await each(tasks)
        assert (fake.get(x) == 2).all()
        assert (mine == 2).all()


@pytest.mark.parametrize(("out", "atomic", "early"), [(False, True, False), (False, False, True), (True, True, True), (True, False, True)])
async def test_results_are_stored_before_the_verdict_where_that_is_allowed(
    fake: Gpu, out: bool, atomic: bool, early: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = Part.commit

    def noted(self: Any, *args: Any) -> Any:
        if self.on_gpu:
            fake.torch.log.append("commit")
        return commit(self, *args)

    monkeypatch.setattr(Part, "commit", noted)
    async with group(2) as comms:
        x, y = fake.put(torch.ones(LARGE)), fake.put(torch.zeros(LARGE))
        await each([comms[0].all_reduce(x, out=y if out else None, atomic=atomic), comms[1].all_reduce(torch.ones(LARGE), atomic=atomic)])
        log = [what for what in fake.torch.log if what != "fetch"]
        stores = log.count("store")
        assert stores == -(-LARGE * 4 // staging.PIECE)
        assert ("store" in log[: log.index("commit")]) is early
        assert (fake.get(y if out else x) == 2).all()


# --- failures -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("out", [False, True])
async def test_an_abort_leaves_the_input(gpu: Gpu, out: bool) -> None:
    """However far the call has come."""
    async with group(3) as comms:
        for turn in range(12):
            inputs = [gpu.put(values("float64", LARGE, k)) for k in range(3)]
            outs = [gpu.put(torch.zeros(LARGE, dtype=torch.float64)) if out else None for _ in range(3)]
            tasks = [asyncio.create_task(c.all_reduce(x, out=y)) for c, x, y in zip(comms, inputs, outs, strict=True)]
            engine: Any = comms[turn % 3]._runtime.engine
            task = tasks[turn % 3]
            await until(lambda n=turn, e=engine, t=task: t.done() or any(m.bytes_received >= n * 500_000 for m in list(e._running)))
            task.cancel()
            found = await outcomes(tasks, within=20.0)
            done = [isinstance(f, pccl.Info) for f in found]
            for k, x in enumerate(inputs):
                assert out or done[(turn + 1) % 3] or bits(gpu.get(x)) == bits(values("float64", LARGE, k))
                assert not out or bits(gpu.get(x)) == bits(values("float64", LARGE, k))


async def test_a_call_that_waits_for_its_stream_can_be_ended(fake: Gpu) -> None:
    """It ends at once, and touches nothing any more."""
    async with group(2) as comms:
        x, mine = fake.put(torch.ones(LARGE)), torch.ones(LARGE)
        fake.later(lambda: None)
        tasks = [asyncio.create_task(c.all_reduce(t)) for c, t in zip(comms, (x, mine), strict=True)]
        engine: Any = comms[0]._runtime.engine
        await until(lambda: engine.busy)
        tasks[0].cancel()
        found = await outcomes(tasks, within=20.0)
        assert isinstance(found[1], pccl.CollectiveAborted)
        fake.go_on()
        fake.get(x)
        assert not {"fetch", "store"}.intersection(fake.torch.log)
        await each(c.all_reduce(t) for c, t in zip(comms, (x, mine), strict=True))
        assert (fake.get(x) == 2).all()


@pytest.mark.parametrize("retry", [False, True])
@pytest.mark.parametrize("what", ["fetch", "store", "wait", "pin"])
async def test_a_copy_that_fails_ends_the_call_for_all(fake: Gpu, what: str, retry: bool) -> None:
    async with group(3, transport="tcp") as comms:
        x = fake.put(torch.ones(LARGE))
        y = fake.put(torch.zeros(LARGE))
        others = [torch.ones(LARGE) for _ in range(2)]
        fake.torch.broken = what
        found = await outcomes(
            [comms[0].all_reduce(x, out=y, retry=retry), *(c.all_reduce(t, retry=retry) for c, t in zip(comms[1:], others, strict=True))],
            within=20.0,
        )
        assert all(isinstance(e, pccl.CollectiveAborted) and not e.lost for e in found), found
        assert all("its tensors on cuda:0 could not be copied" in str(e) for e in found)
        fake.torch.broken = ""
        assert (fake.get(x) == 1).all()
        assert all((t == 1).all() for t in others)
        await each(c.all_reduce(t) for c, t in zip(comms, (x, *others), strict=True))
        assert (fake.get(x) == 3).all()


@pytest.mark.parametrize("late", [False, True])
async def test_a_result_that_cannot_be_stored_after_the_commit(fake: Gpu, late: bool) -> None:
    """The others have it."""

    def fail(what: str) -> None:
        if what == "store":
            raise RuntimeError("CUDA error: unspecified launch failure")

    async with group(2) as comms:
        x, mine = fake.put(torch.ones(LARGE)), torch.ones(LARGE)
        if late:
            fake.torch.gate = fail
        else:
            fake.torch.broken = "store"
        found = await outcomes([comms[0].all_reduce(x), comms[1].all_reduce(mine)])
        assert isinstance(found[0], pccl.InternalError)
        assert "is committed, but its tensors on cuda:0 could not be copied" in str(found[0])
        assert (mine == 2).all()
        fake.torch.broken = ""
        await each(c.barrier() for c in comms)


async def test_survivors_go_on(gpu: Gpu) -> None:
    async with group(3, transport="tcp") as comms:
        inputs = [gpu.put(torch.full((LARGE,), k + 1.0)) for k in range(2)]
        tasks = [asyncio.create_task(c.all_reduce(x, retry=True)) for c, x in zip(comms, inputs, strict=False)]
        engine: Any = comms[0]._runtime.engine
        transfer = await until(lambda: next(iter(engine._running), None))
        await until(lambda: transfer.bytes_sent)
        await comms[2].close()
        infos = await each(tasks)
        assert [info.attempts for info in infos] == [2, 2]
        assert all((gpu.get(x) == 3).all() for x in inputs)


async def test_closing_with_calls_under_way(fake: Gpu) -> None:
    async with group(2) as comms:
        x = fake.put(torch.ones(LARGE))
        fake.later(lambda: None)
        task = asyncio.create_task(comms[0].all_reduce(x))
        engine: Any = comms[0]._runtime.engine
        await until(lambda: engine.busy)
        await comms[0].close()
        with pytest.raises(pccl.Evicted):
            await task
        fake.go_on()
        assert (fake.get(x) == 1).all()


# --- arguments ----------------------------------------------------------------------------------------------------------


def refused(text: str, x: Any) -> None:
    with pytest.raises(pccl.InvalidArgument, match=text):
        memory_of(x, "x", write=True)


def test_tensors_that_are_refused(gpu: Gpu) -> None:
    x = gpu.put(torch.ones(4, 6))
    refused("x: the tensors of a list must be on one device; x.0. is on cuda:0, x.1. on cpu", [x, torch.ones(3)])
    refused("x: elements share memory", x[:, :1].expand(4, 6))
    refused("x: tensors of the list share memory", [x[:2], x[1:]])
    refused("x: elements of type torch.float8_e4m3fn", gpu.put(torch.zeros(3)).to(torch.float8_e4m3fn))


def test_two_devices(fake: Gpu) -> None:
    x, y = fake.put(torch.ones(3)), fake.put(torch.ones(3))
    y.ordinal = 1
    refused("x.0. is on cuda:0, x.1. on cuda:1", [x, y])


def test_torch_without_cuda() -> None:
    """As far as a tensor gets there."""
    from tests.cuda.fake import FakeTensor

    if torch.cuda.is_available():
        pytest.skip("it has it")
    refused("x: a tensor on cuda:0 is given, but torch .* was built without CUDA; give a CPU tensor", torch.ones(3).as_subclass(FakeTensor))


async def test_streams_that_are_captured(fake: Gpu) -> None:
    async with group(1) as (comm,):
        fake.torch.capturing = True
        with pytest.raises(pccl.InvalidArgument, match="a call cannot be part of a CUDA graph"):
            await comm.all_reduce(fake.put(torch.ones(3)))
        fake.torch.capturing = False
        await comm.all_reduce(fake.put(torch.ones(3)))


def test_overlap(gpu: Gpu) -> None:
    x = gpu.put(torch.ones(6))
    for a, b, found in [
        (x, x, Overlap.SAME),
        (x[:3], x[3:], Overlap.NONE),
        (x[:4], x[3:], Overlap.PARTIAL),
        (x, torch.ones(6), Overlap.NONE),
    ]:
        assert overlap(memory_of(a), memory_of(b)) is found


def test_results_are_lent_to_the_callers_stream(fake: Gpu) -> None:
    """Else their memory could be given to another tensor while that still reads it."""

    def body(comm: Any) -> Any:
        return comm.all_gather(fake.put(torch.ones(3))).out

    made = in_threads(1, body)
    assert [t is made[0] for t in fake.torch.caller.lent] == [True]


# --- pieces and pinned memory ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [1, 4, 7, 1000])
@pytest.mark.parametrize("count", [0, 1, 13, 59, 60, 100])
def test_pieces(most: int, count: int) -> None:
    base = torch.arange(60).reshape(3, 4, 5)
    for tensors in ([base], [base.permute(2, 0, 1)], [base[:, ::2, 1:]], [base[0], base[1].T, base[2, :0], base[2, 0, 0], base[2, 1:]]):
        want = torch.cat([t.reshape(-1) for t in tensors])[:count]
        found = pieces(tensors, most, count)
        assert [p.start for p in found] == [0, *(p.stop for p in found)][: len(found)]
        assert all(0 < p.stop - p.start == sum(v.numel() for v in p.views) <= most for p in found)
        assert torch.equal(torch.cat([v.reshape(-1) for p in found for v in p.views] or [want[:0]]), want)


class Timers:
    """A loop without time."""

    def __init__(self) -> None:
        self.due: dict[object, Callable[[], None]] = {}

    def call_later(self, delay: float, callback: Callable[[], None]) -> Any:
        handle = object()
        self.due[handle] = callback

        class Handle:
            cancel = staticmethod(lambda: self.due.pop(handle))

        return Handle


def test_pinned_memory_is_kept_for_a_while_and_never_more_than_was_in_use(fake: Gpu) -> None:
    timers: Any = Timers()
    pool = Pool(timers)
    gpu = cuda_of(fake)

    def use(*sizes: int) -> None:
        taken = [pool.take(n) for n in sizes]
        for one, n in zip(taken, sizes, strict=True):
            assert len(one.bytes) >= n
            one.pin(gpu)
        for one in taken:
            pool.give(one)

    use(1 << 20, 1 << 16)
    assert sum(fake.torch.pinned.values()) == (1 << 20) + (1 << 16)
    before = dict(fake.torch.pinned)
    use(1 << 16, 1 << 20)
    use(5)
    assert fake.torch.pinned == before, "it was taken again"
    use(1 << 21)
    assert sum(fake.torch.pinned.values()) == 1 << 21
    (expire,) = timers.due.values()
    expire()
    assert not fake.torch.pinned


def cuda_of(fake: Gpu) -> Any:
    from pccl.collectives.cuda import gpu_of

    return gpu_of(torch.device("cuda", 0))
