"""What collectives work on: buffers whose contents tell a right result from a wrong one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

COLLECTIVES = ("all_reduce", "reduce_scatter", "all_gather", "broadcast", "reduce", "gather", "scatter", "all_to_all", "sendrecv")
"""In sendrecv, as in nccl-tests, everyone sends to the next rank and receives from the one before."""
REDUCING = ("all_reduce", "reduce_scatter", "reduce")
ROOTED = ("broadcast", "reduce", "gather", "scatter")
IN_PLACE = ("all_reduce", "broadcast", "reduce")
"""These have no output of their own; all_reduce has one if it is asked to."""
SHARED = ("reduce_scatter", "all_gather", "gather", "scatter", "all_to_all")
"""In these a member's share is a part of the whole, in the input or in the output."""
OPS: dict[str, Callable[[Iterable[int]], int]] = {"sum": sum, "prod": math.prod, "min": min, "max": max}
DTYPES = ("float32", "float64", "float16", "bfloat16", "int8", "uint8", "int32", "int64")
HALVES = ("float16", "bfloat16")
STEPS = {"uint8": 255, "int8": 127, "uint4": 15, "bfloat16": 256, "float16": 1024}
"""Kinds of quantization, and how many steps they have at least between 0 and the largest value: what is encoded is off by half of one."""
PATTERN = (1, 2, 1, 3, 1, 1, 2)
"""Element i of the member of rank r begins as the one at i + r, again and again: results differ, and are exact in every dtype."""


class Buffers:
    """Input and output of a collective. As in nccl-tests, the size is that of the larger one: the size of a whole, not of a share."""

    def __init__(self, collective: str, size: int, dtype: str, op: str, root: int, rank: int, world: int) -> None:
        self.collective, self.op, self.root = collective, op, root
        self.has_output = collective not in IN_PLACE
        self._rank, self._world = rank, world
        kind: npt.DTypeLike = dtype
        if dtype == "bfloat16":
            import ml_dtypes

            kind = ml_dtypes.bfloat16
        width = np.dtype(kind).itemsize
        shares = world if collective in SHARED else 1
        self.count = max(1, -(-size // (width * shares)))
        """Elements of a share, of the whole where there are no shares: what MPI and NCCL call the count."""
        whole = self.count * shares
        self.nbytes = whole * width
        self.x: npt.NDArray[Any] = np.zeros(self.count if collective in ("all_gather", "gather") else whole, kind)
        """The input."""
        self.y: npt.NDArray[Any] = np.zeros(self.count if collective in ("reduce_scatter", "scatter") else whole, kind)
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

    def wrong(self, *, out_of_place: bool = False, quantize: str | None = None) -> int:
        """How many elements of this member's result are not what they should be.

        Args:
            quantize: a kind, with which an element is wrong if it is off by more than as many steps as there are members. Each element is
                encoded once per member, and once more in the end; what is encoded is never larger than the largest result.
        """
        if self.collective in ("reduce", "gather") and self._rank != self.root:
            return 0
        found, right = self.y if self.has_output or out_of_place else self.x, self._right()
        if quantize is None:
            return int(np.count_nonzero(found != right))
        bound = self._world * float(right.max()) / STEPS[quantize]
        return int(np.count_nonzero(~(np.abs(found.astype(np.float64) - right.astype(np.float64)) <= bound)))  # a NaN is wrong

    def _right(self) -> npt.NDArray[Any]:
        mine = slice(self._rank * self.count, (self._rank + 1) * self.count)
        if self.collective == "broadcast":
            return self._pattern(len(self.x), self.root)
        if self.collective == "scatter":
            return self._pattern(len(self.x), self.root)[mine]
        if self.collective == "sendrecv":
            return self._pattern(len(self.x), (self._rank - 1) % self._world)
        if self.collective in ("all_gather", "gather"):
            return np.concatenate([self._pattern(len(self.x), r) for r in range(self._world)])
        if self.collective == "all_to_all":
            return np.concatenate([self._pattern(len(self.x), r)[mine] for r in range(self._world)])
        whole = self._repeat(len(self.x), [OPS[self.op](each) for each in zip(*map(_pattern, range(self._world)), strict=True)])
        return whole[mine] if self.collective == "reduce_scatter" else whole

    def _pattern(self, count: int, rank: int) -> npt.NDArray[Any]:
        return self._repeat(count, _pattern(rank))

    def _repeat(self, count: int, period: list[int]) -> npt.NDArray[Any]:
        return np.resize(np.array(period).astype(self.x.dtype), count)


def _pattern(rank: int) -> list[int]:
    """How the input of a member begins."""
    start = rank % len(PATTERN)
    return [*PATTERN[start:], *PATTERN[:start]]
