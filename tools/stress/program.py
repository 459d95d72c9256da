"""Which collectives a step has, and what they have to give: anybody can say it of any member, from the seed, the step and the uids.

Every input is a window of one table of small integers, which all workers have; where it begins follows from who gives it, in which step
and call. So every sum is exact, whatever its order.
"""

from __future__ import annotations

import math
import random
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

Array = npt.NDArray[Any]

MOST = 10
"""Workers at a time."""
MEMBERS = MOST + 2
"""For so many the sizes of tensors are made, and sums are exact: workers that have died are members until the group has noticed."""
ELEMENTS = 1 << 19
"""Of the largest tensor."""
IN_FLIGHT = 8
"""Collectives that a worker has in flight."""
ROUND = 8
"""Tensors in a round."""
KINDS = {
    "all_reduce": 6,
    "round": 2,
    "tagged": 3,
    "broadcast": 1,
    "all_gather": 1,
    "reduce_scatter": 1,
    "ring": 1,
    "barrier": 1,
}
"""Kinds of calls, and how often they come."""
DTYPES = ("float32", "float32", "float64", "float16", "int32", "int64", "uint8")
LARGEST = 99
"""Of the table's numbers. A sum over MEMBERS is exact even in float16."""
WINDOWS = 8191
DIVISIBLE = math.lcm(*range(1, MEMBERS + 1))
"""By every world size."""

_UFUNCS = {"sum": np.add, "avg": np.add, "min": np.minimum, "max": np.maximum}


class Call(NamedTuple):
    """One collective; a round of several, or what goes round a ring by send and recv, count as one."""

    number: int
    """In its step."""
    kind: str
    dtype: str
    op: str
    size: int
    """Elements that a member gives; in a round, of its largest tensor."""
    retry: bool
    out: bool
    """The result goes elsewhere."""
    root: int
    """Modulo the world size."""

    @property
    def tag(self) -> str | None:
        """So that members may launch it at different points."""
        return f"tag-{self.number}" if self.kind == "tagged" else None

    @property
    def sizes(self) -> list[int]:
        """Elements of each tensor."""
        return [max(1, self.size >> i) for i in range(ROUND)] if self.kind == "round" else [self.size]


def draw_calls(seed: int, step: int) -> list[Call]:
    """The calls of a step, in the order of the program text."""
    rng = random.Random(f"calls {seed} {step}")
    return [_draw(rng, number) for number in range(IN_FLIGHT)]


def _draw(rng: random.Random, number: int) -> Call:
    kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
    dtype = rng.choice(DTYPES)
    op = rng.choice(["sum", "avg", "max", "min"] if dtype.startswith("float") else ["sum", "max", "min"])
    count = round(math.exp(rng.uniform(0.0, math.log(ELEMENTS))))  # all magnitudes are as likely
    if kind == "round":
        count = max(1, count // 2)
    elif kind == "all_gather":
        count = max(1, count // 8)
    elif kind == "reduce_scatter":
        count = max(1, count // DIVISIBLE) * DIVISIBLE
    return Call(number, kind, dtype, op, count, rng.random() < 0.5, rng.random() < 0.5, rng.randrange(1 << 16))


def launch_order(calls: list[Call], own: random.Random) -> list[Call]:
    """The calls as one member launches them: those of the program text in their order, tagged and pairwise ones wherever it likes.

    The n-th send to a member meets its n-th receive, so pairwise calls keep their order among themselves.
    """
    lanes = [[c for c in calls if c.kind == "ring"], [c for c in calls if c.kind not in ("ring", "tagged")]]
    lanes += [[c] for c in calls if c.kind == "tagged"]
    turns = [lane for lane, members in enumerate(lanes) for _ in members]
    own.shuffle(turns)
    return [lanes[lane].pop(0) for lane in turns]


class Oracle:
    """All inputs of a run, and all results."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        table = np.random.default_rng(seed).integers(-LARGEST, LARGEST + 1, ELEMENTS + WINDOWS)
        self._tables = {name: table.astype(name) for name in sorted(set(DTYPES))}
        for each in self._tables.values():
            each.flags.writeable = False

    def given(self, uid: int, step: int, call: Call, i: int = 0) -> Array:
        """What a member gives to a call, as its i-th tensor: read-only."""
        start = xxhash.xxh3_64_intdigest(struct.pack("<5q", self._seed, uid, step, call.number, i)) % WINDOWS
        return self._tables[call.dtype][start : start + call.sizes[i]]

    def reduced(self, uids: Sequence[int], step: int, call: Call, i: int = 0) -> Array:
        """Their inputs, combined."""
        total = self.given(uids[0], step, call, i).copy()
        for uid in uids[1:]:
            _UFUNCS[call.op](total, self.given(uid, step, call, i), out=total)
        if call.op == "avg":
            np.divide(total, len(uids), out=total)
        return total

    def gathered(self, uids: Sequence[int], step: int, call: Call) -> Array:
        """Their inputs, one after the other."""
        return np.concatenate([self.given(uid, step, call) for uid in uids])


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
