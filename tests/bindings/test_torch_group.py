"""The process group, method by method, next to gloo's: what torch.distributed calls, with what it gives."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import torch.distributed as dist  # noqa: E402
from torch.distributed import distributed_c10d as c10d  # noqa: E402

import pccl  # noqa: E402
from pccl import sync  # noqa: E402
from pccl.bindings.torch.group import ProcessGroup  # noqa: E402
from tests.checks.support import in_threads  # noqa: E402

Tensors = list[Any]
Walk = Callable[[Any, int, int], Tensors]
"""(group, rank, size) -> the tensors that have the result"""

WALKS: dict[str, Walk] = {}


def walk(made: Walk) -> Walk:
    WALKS[made.__name__] = made
    return made


def options(kind: Any, **values: Any) -> Any:
    made = kind()
    for name, value in values.items():
        setattr(made, name, value)
    return made


def own(rank: int, *shape: int, dtype: Any = torch.float32) -> Any:
    """A tensor that no other rank has."""
    count = 1
    for length in shape:
        count *= length
    return ((torch.arange(count) * (rank + 2) + rank) % 23).reshape(shape).to(dtype)


REDUCTIONS = [("SUM", torch.float32), ("SUM", torch.float16), ("SUM", torch.int8), ("PRODUCT", torch.float64), ("MIN", torch.int64)]
REDUCTIONS += [("MAX", torch.float16), ("BAND", torch.int32), ("BOR", torch.uint8), ("BXOR", torch.int64)]


@walk
def all_reduce(pg: Any, rank: int, size: int) -> Tensors:
    found = []
    for op, dtype in REDUCTIONS:
        x = own(rank, 3, 5, dtype=dtype)
        pg.allreduce([x], options(c10d.AllreduceOptions, reduceOp=getattr(dist.ReduceOp, op))).wait()
        found.append(x)
    return found


@walk
def all_reduce_of_odd_shapes(pg: Any, rank: int, size: int) -> Tensors:
    tensors = [torch.tensor(rank + 1.0), own(rank, 4, 6)[:, ::2].contiguous(), own(rank, 100_000)]
    for x in tensors:
        pg.allreduce([x], c10d.AllreduceOptions()).wait()
    return tensors


@walk
def all_reduce_coalesced(pg: Any, rank: int, size: int) -> Tensors:
    tensors = [own(rank, 3), own(rank + 5, 2, 2)]
    pg.allreduce_coalesced(tensors, c10d.AllreduceCoalescedOptions()).wait()
    return tensors


@walk
def all_reduce_of_sparse_tensors(pg: Any, rank: int, size: int) -> Tensors:
    x = torch.sparse_coo_tensor(torch.tensor([[0, rank % 3, 4]]), own(rank, 3, 2), (5, 2))
    pg.allreduce([x], c10d.AllreduceOptions()).wait()
    return [x.to_dense()]


@walk
def broadcast(pg: Any, rank: int, size: int) -> Tensors:
    found = []
    for root in range(size):
        x = own(rank, 7)
        pg.broadcast([x], options(c10d.BroadcastOptions, rootRank=root)).wait()
        found.append(x)
    return found


@walk
def reduce(pg: Any, rank: int, size: int) -> Tensors:
    x = own(rank, 7)
    pg.reduce([x], options(c10d.ReduceOptions, rootRank=size - 1)).wait()
    return [x] if rank == size - 1 else []


@walk
def all_gather(pg: Any, rank: int, size: int) -> Tensors:
    outs = [torch.zeros(2, 3) for _ in range(size)]
    pg.allgather([outs], [own(rank, 2, 3)], c10d.AllgatherOptions()).wait()
    return outs


@walk
def all_gather_single(pg: Any, rank: int, size: int) -> Tensors:
    out = torch.zeros(size * 2, 3)
    pg._allgather_base(out, own(rank, 2, 3), c10d.AllgatherOptions()).wait()
    return [out]


@walk
def all_gather_coalesced(pg: Any, rank: int, size: int) -> Tensors:
    outs = [[torch.zeros(2), torch.zeros(3)] for _ in range(size)]
    pg.allgather_coalesced(outs, [own(rank, 2), own(rank + 4, 3)], c10d.AllgatherOptions()).wait()
    return [x for out in outs for x in out]


@walk
def all_gather_singles(pg: Any, rank: int, size: int) -> Tensors:
    outs = [torch.zeros(size * 2), torch.zeros(size * 3)]
    pg.allgather_into_tensor_coalesced(outs, [own(rank, 2), own(rank + 4, 3)], c10d.AllgatherOptions()).wait()
    return outs


@walk
def gather(pg: Any, rank: int, size: int) -> Tensors:
    outs = [torch.zeros(3) for _ in range(size)] if rank == 0 else []
    pg.gather([outs] if outs else [], [own(rank, 3)], options(c10d.GatherOptions, rootRank=0)).wait()
    return outs


@walk
def scatter(pg: Any, rank: int, size: int) -> Tensors:
    out, root = torch.zeros(3), size - 1
    given = [[own(r, 3) for r in range(size)]] if rank == root else []
    pg.scatter([out], given, options(c10d.ScatterOptions, rootRank=root)).wait()
    return [out]


@walk
def reduce_scatter(pg: Any, rank: int, size: int) -> Tensors:
    out = torch.zeros(4)
    pg.reduce_scatter([out], [[own(rank + r, 4) for r in range(size)]], c10d.ReduceScatterOptions()).wait()
    return [out]


@walk
def reduce_scatter_single(pg: Any, rank: int, size: int) -> Tensors:
    out = torch.zeros(2, 3)
    pg._reduce_scatter_base(out, own(rank, size * 2, 3), c10d.ReduceScatterOptions()).wait()
    return [out]


@walk
def reduce_scatter_singles(pg: Any, rank: int, size: int) -> Tensors:
    outs = [torch.zeros(2), torch.zeros(3)]
    pg.reduce_scatter_tensor_coalesced(outs, [own(rank, size * 2), own(rank, size * 3)], c10d.ReduceScatterOptions()).wait()
    return outs


@walk
def all_to_all(pg: Any, rank: int, size: int) -> Tensors:
    outs = [torch.zeros(2) for _ in range(size)]
    pg.alltoall(outs, [own(rank * size + r, 2) for r in range(size)], c10d.AllToAllOptions()).wait()
    return outs


@walk
def all_to_all_of_equal_parts(pg: Any, rank: int, size: int) -> Tensors:
    out = torch.zeros(size * 2, 3)
    pg.alltoall_base(out, own(rank, size * 2, 3), [], [], c10d.AllToAllOptions()).wait()
    return [out]


@walk
def all_to_all_of_unequal_parts(pg: Any, rank: int, size: int) -> Tensors:
    """Rank s sends (s + 2 r) % 3 rows to rank r."""
    gives, gets = [(rank + 2 * r) % 3 for r in range(size)], [(r + 2 * rank) % 3 for r in range(size)]
    out = torch.zeros(sum(gets), 2)
    pg.alltoall_base(out, own(rank, sum(gives), 2), gets, gives, c10d.AllToAllOptions()).wait()
    return [out]


@walk
def barrier(pg: Any, rank: int, size: int) -> Tensors:
    pg.barrier(opts=c10d.BarrierOptions()).wait()
    return []


@walk
def send_and_recv(pg: Any, rank: int, size: int) -> Tensors:
    """Round the ring, with two tags, received in the other order."""
    if size == 1:
        return []
    one, two = torch.zeros(3), torch.zeros(4)
    sends = [pg.send([own(rank, 3)], (rank + 1) % size, 1), pg.send([own(rank, 4)], (rank + 1) % size, 2)]
    for x, tag in ((two, 2), (one, 1)):
        pg.recv([x], (rank - 1) % size, tag).wait()
    for work in sends:
        work.wait()
    return [one, two]


SIZES = (1, 2, 3)


@pytest.fixture(scope="module")
def of_gloo() -> dict[int, dict[str, list[Any]]]:
    """Size -> walk -> what gloo's members get, by rank; an exception where it cannot."""
    found = {}
    for size in SIZES:
        store = dist.HashStore()
        with ThreadPoolExecutor(size) as pool:
            ranks = range(size)
            members = list(pool.map(dist.ProcessGroupGloo, [store] * size, ranks, [size] * size, [timedelta(seconds=30)] * size))
            found[size] = {name: list(pool.map(outcome, [made] * size, members, ranks, [size] * size)) for name, made in WALKS.items()}
    return found


def outcome(made: Walk, pg: Any, rank: int, size: int) -> Any:
    try:
        return made(pg, rank, size)
    except Exception as e:
        return e


@pytest.mark.parametrize("size", SIZES)
def test_every_method_does_what_gloo_does(size: int, of_gloo: dict[int, dict[str, list[Any]]]) -> None:
    expected = of_gloo[size]

    def body(comm: sync.Communicator) -> tuple[int, dict[str, Tensors]]:
        pg = ProcessGroup(comm)
        return comm.rank, {name: made(pg, comm.rank, size) for name, made in WALKS.items()}

    compared = 0
    for rank, found in in_threads(size, body):
        for name, tensors in found.items():
            others = expected[name][rank]
            if not isinstance(others, Exception):
                assert len(tensors) == len(others), name
                for mine, other in zip(tensors, others, strict=True):
                    torch.testing.assert_close(mine, other, msg=lambda text, name=name: f"{name}: {text}")
                    compared += 1
            else:
                print(name, others)
    assert compared > 20 * size


# --- works, futures, errors -------------------------------------------------------------------------------------------


def test_futures_have_the_result() -> None:
    def body(comm: sync.Communicator) -> None:
        pg = ProcessGroup(comm)
        x = torch.full((4,), comm.rank + 1.0)
        work = pg.allreduce([x], c10d.AllreduceOptions())
        after = work.get_future().then(lambda future: future.value()[0] / 2)
        assert after.wait().tolist() == [1.5] * 4
        assert work.wait()
        assert work.is_success()
        assert work.exception() is None
        assert work.result()[0] is x
        assert work.get_future().done()

    in_threads(2, body)


def test_callbacks_may_wait_for_other_calls() -> None:
    """Torch's own communication hooks do."""

    def body(comm: sync.Communicator) -> list[float]:
        pg = ProcessGroup(comm)
        x, y = torch.ones(2), torch.ones(2)

        def more(future: Any) -> Any:
            future.value()
            return pg.allreduce([y], c10d.AllreduceOptions()).get_future().wait()[0]

        after = pg.allreduce([x], c10d.AllreduceOptions()).get_future().then(more)
        found: list[float] = after.wait().tolist()
        pg.shutdown()
        return found

    assert in_threads(2, body) == [[2.0, 2.0]] * 2


def test_other_ways_to_give_arguments() -> None:
    def body(comm: sync.Communicator) -> None:
        pg: Any = ProcessGroup(comm)
        x = [torch.tensor([comm.rank + 1.0]) for _ in range(6)]
        pg.allreduce(x[0], dist.ReduceOp.MAX).wait()
        pg.allreduce([x[1]], dist.ReduceOp.MAX).wait()
        pg.allreduce(tensors=[x[2]], op=dist.ReduceOp.MAX, timeout=timedelta(seconds=20)).wait()
        pg.broadcast(x[3], 1).wait()
        pg.broadcast([x[4]], root=1).wait()
        work = pg.send([x[5]], 1, tag=3) if comm.rank == 0 else pg.recv([x[5]], 0, tag=3)
        work.wait()
        assert [t.item() for t in x] == [2.0] * 5 + [1.0]
        outs = [torch.zeros(1) for _ in range(2)]
        pg.allgather([outs], [x[5]]).wait()
        assert [t.item() for t in outs] == [1.0, 1.0]
        pg.barrier().wait()
        with pytest.raises(TypeError):
            pg.allreduce([x[0]], nonsense=1).wait()

    in_threads(2, body)


def test_rows_for_nobody() -> None:
    """Only one of the two lists is given, and nothing is sent."""

    def body(comm: sync.Communicator) -> None:
        pg = ProcessGroup(comm)
        pg.all_to_all_single(torch.zeros(0), torch.zeros(0), [0, 0], [], c10d.AllToAllOptions()).wait()
        with pytest.raises(pccl.InvalidArgument, match="2 numbers are needed"):
            pg.all_to_all_single(torch.zeros(2), torch.zeros(2), [2], [1, 1], c10d.AllToAllOptions()).wait()

    in_threads(2, body)


def test_a_part_that_is_aborted_ends_its_calls() -> None:
    aborted = threading.Event()

    def body(comm: sync.Communicator) -> None:
        part = ProcessGroup(comm).new_group([0, 1])
        assert part
        if comm.rank == 0:
            work = part.allreduce([torch.ones(3)], c10d.AllreduceOptions())
            part.abort()
            with pytest.raises((pccl.CollectiveError, asyncio.CancelledError)):
                work.wait(timedelta(seconds=20))
            aborted.set()
        assert aborted.wait(20)

    in_threads(2, body)


def test_groups_that_cannot_be_made() -> None:
    def body(comm: sync.Communicator) -> None:
        pg = ProcessGroup(comm)
        with pytest.raises(pccl.InvalidArgument, match="use_local_synchronization"):
            pg.new_group([0], group_name="3f1c")
        with pytest.raises(pccl.InvalidArgument, match="pg_options"):
            pg.new_group([0], pg_options=object())

    in_threads(1, body)


def test_errors_come_with_the_work_only() -> None:
    """Also those of calls that nobody could make."""

    def body(comm: sync.Communicator) -> None:
        pg = ProcessGroup(comm)
        strange = [
            pg.allreduce([torch.zeros(2, device="meta")], c10d.AllreduceOptions()),
            pg.allreduce([torch.zeros(2)], options(c10d.AllreduceOptions, reduceOp=dist.ReduceOp.BAND)),
            pg.broadcast([torch.zeros(2)], options(c10d.BroadcastOptions, rootRank=7, asyncOp=False)),
            pg.all_to_all_single(torch.zeros(3), torch.zeros(3), [], [1, 2], c10d.AllToAllOptions()),
        ]
        for work in strange:
            with pytest.raises(pccl.InvalidArgument):
                work.wait()
            with pytest.raises(RuntimeError, match="InvalidArgument"):
                work.get_future().wait()
            assert isinstance(work.exception(), pccl.InvalidArgument)
        assert pg.last_error is strange[-1].exception()
        x = torch.ones(1)
        pg.allreduce([x], c10d.AllreduceOptions()).wait()
        assert x.item() == 2

    in_threads(2, body)


def test_a_wait_that_takes_too_long_leaves_the_call_as_it_is() -> None:
    waited = threading.Event()

    def body(comm: sync.Communicator) -> float:
        pg, x = ProcessGroup(comm), torch.ones(3)
        if comm.rank == 1:
            assert waited.wait(20)
        work = pg.allreduce([x], c10d.AllreduceOptions())
        if comm.rank == 0:
            with pytest.raises(pccl.CollectiveTimeout):
                work.wait(timedelta(milliseconds=10))
            assert not work.is_completed()
            waited.set()
        work.wait()
        return float(x.sum())

    assert in_threads(2, body) == [6.0, 6.0]


def test_the_options_limit_a_call() -> None:
    over = threading.Event()

    def body(comm: sync.Communicator) -> None:
        pg = ProcessGroup(comm)
        if comm.rank == 0:
            for asynchronous in (False, True):
                opts = options(c10d.AllreduceOptions, timeout=timedelta(seconds=0.2), asyncOp=asynchronous)
                with pytest.raises(pccl.CollectiveTimeout) as raised:
                    pg.allreduce([torch.ones(3)], opts).wait()
                assert len(raised.value.missing) == 1
            with pytest.raises(pccl.CollectiveTimeout):
                pg.monitored_barrier(timedelta(seconds=0.2))
            over.set()
        assert over.wait(20)

    in_threads(2, body)


def test_groups_of_a_group() -> None:
    def body(comm: sync.Communicator) -> list[float]:
        whole = ProcessGroup(comm)
        made = [whole.new_group([2, 0]), whole.splitGroup([1, 2])]
        found = []
        for part in made:
            x = torch.tensor([10.0**comm.rank])
            if part is not None:
                part.set_timeout(timedelta(seconds=20))
                assert part.comm.timeout == 20
                assert part.getSize() == 2
                part.allreduce([x], c10d.AllreduceOptions()).wait()
                part.shutdown()
            found.append(x.item())
        return [comm.rank, *found]

    assert sorted(in_threads(3, body)) == [[0, 101, 1], [1, 10, 110], [2, 101, 110]]
