"""What is measured in a worker: a collective of pccl, and the same of gloo, on the same buffers."""

from __future__ import annotations

import datetime
import math
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

import pccl

COLLECTIVES = ("all_reduce", "reduce_scatter", "all_gather", "broadcast", "all_to_all")
OPS: dict[str, Callable[[Iterable[int]], int]] = {"sum": sum, "prod": math.prod, "min": min, "max": max}
DTYPES = ("float32", "float64", "float16", "bfloat16", "int8", "uint8", "int32", "int64")
"""What both systems can do."""
PATTERN = (1, 2, 1, 3, 1, 1, 2)
"""Element i of the member of rank r begins as the one at i + r, again and again: results differ, and are exact in every dtype."""
HOLD = 0.005
"""Seconds that a busy caller holds the interpreter, and then does not."""

Call = Callable[[], object]
How = Mapping[str, bool | str]
"""Keywords of a call"""


class Buffers:
    """Input and output of a collective. As in nccl-tests, the size is that of the larger one: the size of a whole, not of a share."""

    def __init__(self, collective: str, size: int, dtype: str, op: str, rank: int, world: int) -> None:
        self.collective = collective
        self.op = op
        self.reduces = collective in ("all_reduce", "reduce_scatter")
        self.has_output = collective not in ("all_reduce", "broadcast")
        """In any case; all_reduce has one if it is asked to."""
        self._rank, self._world = rank, world
        kind: npt.DTypeLike = dtype
        if dtype == "bfloat16":
            import ml_dtypes

            kind = ml_dtypes.bfloat16
        width = np.dtype(kind).itemsize
        shares = world if self.has_output else 1
        part = max(1, -(-size // (width * shares)))
        whole = part * shares
        self.nbytes = whole * width
        self.x: npt.NDArray[Any] = np.zeros(part if collective == "all_gather" else whole, kind)
        """The input."""
        self.y: npt.NDArray[Any] = np.zeros(part if collective == "reduce_scatter" else whole, kind)
        """The output, but for calls in place."""
        self.clear()

    def clear(self) -> None:
        """Zeros: they stay what they are however often they are reduced."""
        self.x.fill(0)
        self.y.fill(0)

    def fill(self) -> None:
        """Inputs that tell ranks and places apart."""
        self.x[:] = self._pattern(len(self.x), self._rank)
        self.y.fill(0)

    def wrong(self, *, out_of_place: bool) -> int:
        """How many elements of the result are not what they should be."""
        found = self.y if self.has_output or out_of_place else self.x
        return int(np.count_nonzero(found != self._right()))

    def _right(self) -> npt.NDArray[Any]:
        part = len(self.x) // self._world
        mine = slice(self._rank * part, (self._rank + 1) * part)
        if self.collective == "broadcast":
            return self._pattern(len(self.x), 0)
        if self.collective == "all_gather":
            return np.concatenate([self._pattern(len(self.x), r) for r in range(self._world)])
        if self.collective == "all_to_all":
            return np.concatenate([self._pattern(len(self.x), r)[mine] for r in range(self._world)])
        whole = self._repeat(len(self.x), [OPS[self.op](each) for each in zip(*map(_pattern, range(self._world)), strict=True)])
        return whole if self.collective == "all_reduce" else whole[mine]

    def _pattern(self, count: int, rank: int) -> npt.NDArray[Any]:
        return self._repeat(count, _pattern(rank))

    def _repeat(self, count: int, period: list[int]) -> npt.NDArray[Any]:
        return np.resize(np.array(period).astype(self.x.dtype), count)


def _pattern(rank: int) -> list[int]:
    """How the input of a member begins."""
    start = rank % len(PATTERN)
    return [*PATTERN[start:], *PATTERN[:start]]


class System(Protocol):
    """Something that has collectives."""

    def call(self, buffers: Buffers, **how: bool | str) -> Call:
        """The call to measure."""

    def barrier(self) -> None:
        """Wait until every member is here."""

    def close(self) -> None:
        """The end."""


class Pccl:
    """The blocking face over TCP."""

    def __init__(self, comm: pccl.sync.Communicator) -> None:
        self._comm = comm
        self._holding = HOLD * (1 + 0.1 * comm.rank)  # or all members would hold at the same time, or by turns
        self.close = comm.leave

    def call(self, buffers: Buffers, **how: bool | str) -> Call:
        """Atomic or not, out of place or not, by an algorithm; `busy` says whether the caller holds the interpreter half of the time."""
        function: Any = getattr(self._comm, buffers.collective)
        busy = how.get("busy")
        keywords: dict[str, Any] = {"atomic": how.get("atomic", False)}
        if "algorithm" in how:
            keywords["algorithm"] = how["algorithm"]
        given: list[Any] = [buffers.x, buffers.op] if buffers.reduces else [buffers.x]
        out = {"out": buffers.y} if buffers.has_output or how.get("out") else {}
        if busy is None:
            return lambda: function(*given, **out, **keywords)
        if busy:
            return lambda: self._wait_busily(function(*given, **out, **keywords, async_op=True))
        return lambda: function(*given, **out, **keywords, async_op=True).wait()

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

    def barrier(self) -> None:
        """Wait until every member is here."""
        self._comm.barrier(atomic=False)


class Gloo:
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
        self.barrier = dist.barrier
        self.close = dist.destroy_process_group

    def call(self, buffers: Buffers, **how: bool | str) -> Call:
        """The call to measure; gloo reduces in place only."""
        dist: Any = self._dist
        x, y = self._tensor(buffers.x), self._tensor(buffers.y)
        op = {"sum": dist.ReduceOp.SUM, "prod": dist.ReduceOp.PRODUCT, "min": dist.ReduceOp.MIN, "max": dist.ReduceOp.MAX}[buffers.op]
        calls: dict[str, Call] = {
            "all_reduce": lambda: dist.all_reduce(x, op),
            "reduce_scatter": lambda: dist.reduce_scatter_tensor(y, x, op),
            "all_gather": lambda: dist.all_gather_into_tensor(y, x),
            "broadcast": lambda: dist.broadcast(x, 0),
            "all_to_all": lambda: dist.all_to_all_single(y, x),
        }
        return calls[buffers.collective]

    def _tensor(self, x: npt.NDArray[Any]) -> Any:
        return self._torch.frombuffer(x.view(np.uint8), dtype=getattr(self._torch, x.dtype.name))
