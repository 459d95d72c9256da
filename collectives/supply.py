"""A source that is on its way: which of its pieces are there, and in which order a program would like them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import zip_longest

from pccl.collectives.program import Layout, Program


class Supply:
    """The pieces of a source, which come in any order.

    Args:
        bounds: piece i has the elements from bounds[i] up to bounds[i + 1].
    """

    def __init__(self, bounds: Sequence[int]) -> None:
        self._bounds = bounds
        self._missing = set(range(len(bounds) - 1))

    @property
    def complete(self) -> bool:
        """Whether all of them are there."""
        return not self._missing

    def come(self, piece: int) -> None:
        """A piece is there."""
        self._missing.discard(piece)

    def has(self, start: int, stop: int) -> bool:
        """Whether these elements are there; at least one."""
        return self._missing.isdisjoint(self._within(start, stop))

    def order(self, prog: Program, lay: Layout) -> list[int]:
        """All pieces, those first that the program comes to first."""
        streams = [*prog.outs.values(), *prog.ins.values(), prog.local]
        uses = [u for units in zip_longest(*streams) for unit in units if unit for u in (unit.use, *unit.sources) if u.first]
        blocks = dict.fromkeys(u.block for u in uses if lay.source[u.block] >= 0 and lay.sizes[u.block])
        wanted = [piece for b in blocks for piece in self._within(lay.source[b], lay.source[b] + lay.sizes[b])]
        return list(dict.fromkeys((*wanted, *range(len(self._bounds) - 1))))

    def _within(self, start: int, stop: int) -> range:
        return range(bisect_right(self._bounds, start) - 1, bisect_right(self._bounds, stop - 1))
