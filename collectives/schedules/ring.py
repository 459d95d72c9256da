"""Rings: every rank talks to its two neighbours only, so that the slowest link on the ring sets the pace and no link carries more
than another.

Patarasu, Yuan: Bandwidth optimal all-reduce algorithms for clusters of workstations (JPDC 69, 2009); the phases by themselves are
in Thakur, Rabenseifner, Gropp: Optimization of collective communication operations in MPICH (IJHPCA 19(1), 2005), sections 4.1 and
4.4.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pccl.collectives.schedules.steps import Program, alternate, last, program, rows, where, zero
from pccl.core.step import Action, Ints, Schedule


def _reducing(rank: int, world: int, way: int = 1, first: int = 0, channel: int = 0) -> Program:
    """Block r comes round as a growing partial result, starting behind rank r and ending at it; `way` is 1 or -1, blocks count from
    `first`.
    """
    hop = np.arange(world - 1)
    return alternate(
        rows(Action.SEND, first + (rank - way * (1 + hop)) % world, peer=(rank + way) % world, channel=channel),
        rows(Action.REDUCE, first + (rank - way * (2 + hop)) % world, peer=(rank - way) % world, channel=channel, final=last(world - 1)),
    )


def _gathering(rank: int, world: int, way: int = 1, first: int = 0, channel: int = 0) -> Program:
    """Block r goes round from rank r to all."""
    hop = np.arange(world - 1)
    return alternate(
        rows(Action.SEND, first + (rank - way * hop) % world, peer=(rank + way) % world, channel=channel),
        rows(Action.RECEIVE, first + (rank - way * (1 + hop)) % world, peer=(rank - way) % world, channel=channel),
    )


def all_reduce(world: int) -> Schedule:
    """Reduce-scatter, then all-gather; rank r finishes part r. Every block has a home on every rank, so any window will do."""

    def steps(rank: int) -> Program:
        if world == 1:
            return rows(Action.COPY, 0)
        return program(_reducing(rank, world), _gathering(rank, world))

    return _all_reduce("ring", world, world, steps)


def bidirectional(world: int) -> Schedule:
    """Two rings at once, half of the data one way round and half the other, for links that are fast both ways."""

    def steps(rank: int) -> Program:
        if world == 1:
            return rows(Action.COPY, 0, blocks=2)
        there, back = (
            program(_reducing(rank, world, way, first, channel), _gathering(rank, world, way, first, channel))
            for way, first, channel in ((1, 0, 0), (-1, world, 1))
        )
        return alternate(there, back)

    return _all_reduce("bidirectional_ring", world, 2 * world, steps)


def reduce_scatter(world: int) -> Schedule:
    """The first half of the ring's all_reduce.

    Bound: a part must have fewer slices than the window, W; with at most W/2 the stream also keeps moving. Partial results are
    scratch that keeps its place in the window until it is sent on, and the ring is a circle: if every rank's first part filled the
    window of the next one, nobody could pass anything on. Larger segments go in waves (more cuts), whose last hop ends in a target
    and so empties the window.
    """

    def steps(rank: int) -> Program:
        return program(_reducing(rank, world)) if world > 1 else rows(Action.COPY, 0)

    return Schedule(
        "reduce_scatter",
        "ring",
        world,
        cuts=1,
        blocks=world,
        steps=steps,
        cut=zero,
        source=lambda rank, block: block,
        target=lambda rank, block: where(block == rank, 0),
        rotates=True,
    )


def all_gather(world: int) -> Schedule:
    """The second half of the ring's all_reduce."""

    def steps(rank: int) -> Program:
        return program(rows(Action.COPY, rank), _gathering(rank, world))

    return Schedule(
        "all_gather",
        "ring",
        world,
        cuts=1,
        blocks=world,
        steps=steps,
        cut=zero,
        source=lambda rank, block: where(block == rank, 0),
        target=lambda rank, block: block,
        rotates=True,
    )


def all_to_all(world: int) -> Schedule:
    """Blocks are passed on from neighbour to neighbour, the shorter way round; for a world in which only neighbours can talk.

    Near destinations first, one distance after the other: so a stream carries one block at a time of those that are only passing
    through. A rank handles about world squared / 4 blocks, most of them other ranks'; there is no way round that on a ring. Block
    ``s * world + d`` is from s to d.

    Bound: that of `reduce_scatter`, for the same reason.
    """

    def one_way(rank: int, way: int, furthest: int) -> Program:
        distance = np.repeat(np.arange(1, furthest + 1), np.arange(1, furthest + 1))
        hop = np.arange(len(distance)) - distance * (distance - 1) // 2

        def block(source: Ints) -> Ints:
            return source % world * world + (source + way * distance) % world

        channel = 0 if way > 0 else 1
        return alternate(
            rows(Action.SEND, block(rank - way * hop), peer=(rank + way) % world, channel=channel),
            rows(Action.RECEIVE, block(rank - way * (1 + hop)), peer=(rank - way) % world, channel=channel),
        )

    def steps(rank: int) -> Program:
        return program(rows(Action.COPY, rank * world + rank), one_way(rank, 1, world // 2), one_way(rank, -1, (world - 1) // 2))

    return Schedule(
        "all_to_all",
        "ring",
        world,
        cuts=1,
        blocks=world * world,
        steps=steps,
        cut=zero,
        source=lambda rank, block: where(block // world == rank, block % world),
        target=lambda rank, block: where(block % world == rank, block // world),
        rotates=True,
    )


def _all_reduce(name: str, world: int, cuts: int, steps: Callable[[int], Program]) -> Schedule:
    return Schedule(
        "all_reduce",
        name,
        world,
        cuts=cuts,
        blocks=cuts,
        steps=steps,
        cut=lambda block: block,
        source=lambda rank, block: block,
        target=lambda rank, block: block,
        rotates=True,
    )
