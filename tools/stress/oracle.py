"""What a collective has to give, from nothing but the uids of its members.

Every input is a window of one table of small integers, which all workers have; where it begins follows from who gives it, in which step
and call. So anybody can say what anybody gave, and every sum is exact, whatever its order.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from pccl.tools.stress.plan import MOST

Array = npt.NDArray[Any]

DTYPES = ("float32", "float32", "float64", "float16", "int32", "int64", "uint8")
LARGEST = 99
"""Of the table's numbers. A sum over MOST members is exact even in float16."""
WINDOWS = 8191
DIVISIBLE = math.lcm(*range(1, MOST + 1))
"""By every world size."""

_UFUNCS = {"sum": np.add, "avg": np.add, "min": np.minimum, "max": np.maximum}


class Oracle:
    """All inputs of a run, and all results.

    Args:
        elements: in the largest tensor.
    """

    def __init__(self, seed: int, elements: int) -> None:
        assert LARGEST * MOST < 1 << 11
        self._seed = seed
        table = np.random.default_rng(seed).integers(-LARGEST, LARGEST + 1, max(elements, DIVISIBLE) + WINDOWS)
        self._tables = {name: table.astype(name) for name in sorted(set(DTYPES))}
        for each in self._tables.values():
            each.flags.writeable = False

    def given(self, uid: int, step: int, call: int, dtype: str, count: int) -> Array:
        """What a member gives to a call: read-only."""
        start = xxhash.xxh3_64_intdigest(struct.pack("<4q", self._seed, uid, step, call)) % WINDOWS
        return self._tables[dtype][start : start + count]

    def reduced(self, op: str, uids: Sequence[int], step: int, call: int, dtype: str, count: int) -> Array:
        """Their inputs, combined."""
        total = self.given(uids[0], step, call, dtype, count).copy()
        for uid in uids[1:]:
            _UFUNCS[op](total, self.given(uid, step, call, dtype, count), out=total)
        if op == "avg":
            np.divide(total, len(uids), out=total)
        return total

    def gathered(self, uids: Sequence[int], step: int, call: int, dtype: str, count: int) -> Array:
        """Their inputs, one after the other."""
        return np.concatenate([self.given(uid, step, call, dtype, count) for uid in uids])


def difference(what: str, found: Array, expected: Array) -> str:
    """How a buffer differs from what it should be; empty if it does not."""
    found = found.reshape(-1)
    if found.dtype != expected.dtype or found.shape != expected.shape:
        return f"{what} is {found.dtype}[{found.size}], not {expected.dtype}[{expected.size}]"
    if np.array_equal(found, expected):
        return ""
    wrong = np.flatnonzero(found != expected)
    i = int(wrong[0])
    return f"{what} is wrong in {len(wrong)} of {found.size} elements, first in {i}: {found[i]}, not {expected[i]}"
