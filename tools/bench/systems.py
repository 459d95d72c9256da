"""What is measured in a worker: a collective of pccl by one of its faces, or the same of gloo or of an MPI."""

from __future__ import annotations

import asyncio
import datetime
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

import pccl
from pccl.tools.bench.buffers import HALVES, Buffers

HOLD = 0.005
"""Seconds that a busy caller holds the interpreter, and then does not."""

Call = Callable[[], object]
How = Mapping[str, Any]
"""Keywords of a call of pccl's, and two more, which may be there: `out`, it is out of place; `busy`, whether its caller, while it waits,
holds the interpreter half of the time.
"""


class System(Protocol):
    """Something that has collectives."""

    rank: int
    world: int

    def run(self, buffers: Buffers, how: How, count: int) -> dict[str, Any]:
        """Make so many calls, one after the other, which all members begin at the same time.

        Returns:
            How many seconds each took (``times``), and how many of CPU time all of them (``cpu``).
        """

    def close(self) -> None:
        """The end."""


class Blocking(ABC):
    """A system whose calls return when they are done."""

    rank: int
    world: int
    barrier: Call
    close: Callable[[], None]

    @abstractmethod
    def call(self, buffers: Buffers, how: How) -> Call:
        """The call to measure."""

    def run(self, buffers: Buffers, how: How, count: int) -> dict[str, Any]:
        """See `System`."""
        call = self.call(buffers, how)
        self.barrier()
        times = []
        cpu = time.process_time()
        for _ in range(count):
            began = time.perf_counter()
            call()
            times.append(time.perf_counter() - began)
        return {"times": times, "cpu": time.process_time() - cpu}


class Pccl(Blocking):
    """The blocking face."""

    def __init__(self, comm: pccl.sync.Communicator) -> None:
        self._comm = comm
        self._holding = HOLD * (1 + 0.1 * comm.rank)  # or all members would hold at the same time, or by turns
        self.rank, self.world = comm.rank, comm.world_size
        self.barrier = lambda: comm.barrier(atomic=False)
        self.close = comm.leave

    def call(self, buffers: Buffers, how: How) -> Call:
        """The call to measure."""
        if buffers.collective == "sendrecv":
            return self._shift(buffers, how)
        call = _bound(self._comm, buffers, how)
        if "busy" not in how:
            return call
        return lambda: self._wait_busily(call(async_op=True)) if how["busy"] else call(async_op=True).wait()

    def _shift(self, buffers: Buffers, how: How) -> Call:
        comm, there, back, keywords = self._comm, *_neighbours(self), dict(how)

        def shift() -> None:
            sending = comm.send(buffers.x, there, async_op=True, **keywords)
            comm.recv(buffers.y, back, **keywords)
            sending.wait()

        return shift

    def _wait_busily(self, work: pccl.sync.Work) -> None:
        """Python code that computes and does not wait, HOLD after HOLD, in time with the clock and not with the calls."""
        while not work.done():
            phase = time.perf_counter() % (2 * self._holding)
            if phase < self._holding:
                sum(range(500))
            else:
                try:
                    work.wait(2 * self._holding - phase)
                except TimeoutError:
                    pass
        work.wait()


class AsyncPccl:
    """The asynchronous face, on the event loop that `asyncio.run` would make."""

    def __init__(self, address: str, peers: int, **settings: Any) -> None:
        self._runner = asyncio.Runner()
        self._comm = self._runner.run(self._join(address, peers, settings))
        self.rank, self.world = self._comm.rank, self._comm.world_size

    async def _join(self, address: str, peers: int, settings: Mapping[str, Any]) -> pccl.Communicator:
        return await pccl.connect(address, min_world_size=peers, **settings)

    def run(self, buffers: Buffers, how: How, count: int) -> dict[str, Any]:
        """See `System`."""
        return self._runner.run(self._run(buffers, how, count))

    async def _run(self, buffers: Buffers, how: How, count: int) -> dict[str, Any]:
        comm, there, back, keywords = self._comm, *_neighbours(self), dict(how)

        async def shift() -> None:
            await asyncio.gather(comm.send(buffers.x, there, **keywords), comm.recv(buffers.y, back, **keywords))

        call: Any = shift if buffers.collective == "sendrecv" else _bound(comm, buffers, how)
        await comm.barrier(atomic=False)
        times = []
        cpu = time.process_time()
        for _ in range(count):
            began = time.perf_counter()
            await call()
            times.append(time.perf_counter() - began)
        return {"times": times, "cpu": time.process_time() - cpu}

    def close(self) -> None:
        """Leave."""
        self._runner.run(self._comm.leave())
        self._runner.close()


def _neighbours(system: System) -> tuple[int, int]:
    """The ranks after and before a member's."""
    return (system.rank + 1) % system.world, (system.rank - 1) % system.world


def _bound(comm: object, buffers: Buffers, how: How) -> Callable[..., Any]:
    """A collective of pccl's with its arguments."""
    x, y, op, root = buffers.x, buffers.y, buffers.op, buffers.root
    arguments: dict[str, list[Any]] = {
        "all_reduce": [x, op],
        "reduce_scatter": [x, op],
        "all_gather": [x],
        "broadcast": [x, root],
        "reduce": [x, root, op],
        "gather": [x, root],
        "scatter": [y, x, root],
        "all_to_all": [x],
    }
    function, given = getattr(comm, buffers.collective), arguments[buffers.collective]
    keywords: dict[str, Any] = {name: value for name, value in how.items() if name not in ("out", "busy")}
    if (buffers.has_output and buffers.collective != "scatter") or "out" in how:
        keywords["out"] = y
    return lambda **more: function(*given, **keywords, **more)


class Gloo(Blocking):
    """torch.distributed on the CPU.

    Args:
        path: a file that is not there yet, in which the members meet.
    """

    def __init__(self, path: str, rank: int, world: int, timeout: float) -> None:
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        dist.init_process_group(
            "gloo", init_method=f"file://{path}", rank=rank, world_size=world, timeout=datetime.timedelta(seconds=timeout)
        )
        self._torch, self._dist = torch, dist
        self.rank, self.world = rank, world
        self.barrier = dist.barrier
        self.close = dist.destroy_process_group

    def call(self, buffers: Buffers, how: How) -> Call:
        """The call to measure; gloo reduces in place only."""
        dist: Any = self._dist
        x, y, root = self._tensor(buffers.x), self._tensor(buffers.y), buffers.root
        op = {"sum": dist.ReduceOp.SUM, "prod": dist.ReduceOp.PRODUCT, "min": dist.ReduceOp.MIN, "max": dist.ReduceOp.MAX}[buffers.op]
        there, back = _neighbours(self)

        def parts(whole: Any) -> list[Any] | None:
            return list(whole.chunk(self.world)) if self.rank == root else None

        def shift() -> None:
            sending = dist.isend(x, there)
            dist.recv(y, back)
            sending.wait()

        calls: dict[str, Call] = {
            "all_reduce": lambda: dist.all_reduce(x, op),
            "reduce_scatter": lambda: dist.reduce_scatter_tensor(y, x, op),
            "all_gather": lambda: dist.all_gather_into_tensor(y, x),
            "broadcast": lambda: dist.broadcast(x, root),
            "reduce": lambda: dist.reduce(x, root, op),
            "gather": lambda: dist.gather(x, parts(y), root),
            "scatter": lambda: dist.scatter(y, parts(x), root),
            "all_to_all": lambda: dist.all_to_all_single(y, x),
            "sendrecv": shift,
        }
        return calls[buffers.collective]

    def _tensor(self, x: npt.NDArray[Any]) -> Any:
        return self._torch.frombuffer(x.view(np.uint8), dtype=getattr(self._torch, x.dtype.name))


class Mpi(Blocking):
    """mpi4py; which MPI is up to the environment. Half floats are only moved: an MPI cannot add them up.

    Args:
        packages: a folder of packages that may hold mpi4py, if this interpreter's own do not.
    """

    def __init__(self, packages: str) -> None:
        sys.path.append(packages)
        from mpi4py import MPI

        self._mpi, self._comm = MPI, MPI.COMM_WORLD
        self.rank, self.world = self._comm.rank, self._comm.size
        self.barrier = self._comm.Barrier
        self.close = MPI.Finalize

    def call(self, buffers: Buffers, how: How) -> Call:
        """The call to measure."""
        mpi, comm, root = self._mpi, self._comm, buffers.root
        x, y = (each.view(np.int16) if each.dtype.name in HALVES else each for each in (buffers.x, buffers.y))
        op = {"sum": mpi.SUM, "prod": mpi.PROD, "min": mpi.MIN, "max": mpi.MAX}[buffers.op]
        here = self.rank == root
        there, back = _neighbours(self)
        calls: dict[str, Call] = {
            "all_reduce": lambda: comm.Allreduce(mpi.IN_PLACE, x, op),
            "reduce_scatter": lambda: comm.Reduce_scatter_block(x, y, op),
            "all_gather": lambda: comm.Allgather(x, y),
            "broadcast": lambda: comm.Bcast(x, root),
            "reduce": lambda: comm.Reduce(mpi.IN_PLACE, x, op, root) if here else comm.Reduce(x, None, op, root),
            "gather": lambda: comm.Gather(x, y if here else None, root),
            "scatter": lambda: comm.Scatter(x if here else None, y, root),
            "all_to_all": lambda: comm.Alltoall(x, y),
            "sendrecv": lambda: comm.Sendrecv(x, there, recvbuf=y, source=back),
        }
        return calls[buffers.collective]
