"""Which collectives a step has: drawn from the seed and the step, so the same on every member."""

from __future__ import annotations

import math
import random
from typing import NamedTuple

from pccl.tools.stress.oracle import DTYPES

ROUND = 8
"""Tensors in a round."""
DIVISIBLE = math.lcm(*range(1, 11))
"""By every world size."""
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
    count: int
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
    def counts(self) -> list[int]:
        """Elements of each tensor."""
        return [max(1, self.count >> i) for i in range(ROUND)] if self.kind == "round" else [self.count]

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
    """The calls as one member launches them: those of the program text in its order, tagged and pairwise ones wherever it likes."""
    ordered = [call for call in calls if not _is_free(call)]
    for call in calls:
        if _is_free(call):
            ordered.insert(own.randint(0, len(ordered)), call)
    return ordered


def _is_free(call: Call) -> bool:
    return call.kind in ("tagged", "ring")
