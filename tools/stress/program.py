"""Which collectives a step has: drawn from the seed and the step, so the same on every member."""

from __future__ import annotations

import math
import random
from typing import NamedTuple

from pccl.tools.stress.oracle import DIVISIBLE, DTYPES

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


class Call(NamedTuple):
    """One collective; a round of several, or what goes round a ring by send and recv, count as one."""

    number: int
    """In its step. The tensors of a round are 100 times that, and more."""
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

    def tensor(self, i: int) -> int:
        """The number of a tensor of the round."""
        return 100 * (self.number + 1) + i if self.kind == "round" else self.number


def draw_calls(seed: int, step: int, in_flight: int, elements: int) -> list[Call]:
    """The calls of a step, in the order of the program text."""
    rng = random.Random(f"calls {seed} {step}")
    return [_draw(rng, number, elements) for number in range(in_flight)]


def _draw(rng: random.Random, number: int, elements: int) -> Call:
    kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
    dtype = rng.choice(DTYPES)
    op = rng.choice(["sum", "avg", "max", "min"] if dtype.startswith("float") else ["sum", "max", "min"])
    count = round(math.exp(rng.uniform(0.0, math.log(elements))))  # all sizes are as likely
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
