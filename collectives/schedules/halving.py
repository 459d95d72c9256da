"""Halving and doubling: few hops, by exchanges at distances that are powers of two."""

from __future__ import annotations

import numpy as np

from pccl.collectives.schedules.steps import Program, program, rows, where, zero
from pccl.core.step import Action, Schedule


def _halve(rank: int, world: int) -> list[Program]:
    """Reduce-scatter over blocks 0..world-1: of what is left, keep the half with block `rank` and give the other half to the
    partner beyond.
    """
    made = []
    low, size = 0, world
    while size > 1:
        size //= 2
        keep = low + (rank & size)
        give = low + (~rank & size)
        made += [
            rows(Action.SEND, give, peer=rank ^ size, blocks=size),
            rows(Action.REDUCE, keep, peer=rank ^ size, blocks=size, final=size == 1),
        ]
        low = keep
    return made


def _double(rank: int, world: int) -> list[Program]:
    """All-gather over blocks 0..world-1: what is there doubles with every exchange."""
    made = []
    size = 1
    while size < world:
        mine = rank // size * size
        made += [
            rows(Action.SEND, mine, peer=rank ^ size, blocks=size),
            rows(Action.RECEIVE, mine ^ size, peer=rank ^ size, blocks=size),
        ]
        size *= 2
    return made


def halving_doubling(world: int) -> Schedule:
    """Recursive halving, then recursive doubling: 2 log2(world) hops and the traffic of a ring.

    Where the world is no power of two, the ranks above the largest one are each folded into a partner first and get the result from
    it last. Rabenseifner: Optimization of collective reduction operations (ICCS 2004); Thakur, Rabenseifner, Gropp: Optimization of
    collective communication operations in MPICH (IJHPCA 19(1), 2005), section 4.5.
    """
    core = 1 << (world.bit_length() - 1)
    extra = world - core

    def steps(rank: int) -> Program:
        if world == 1:
            return rows(Action.COPY, 0)
        if rank >= core:
            partner = rank - core
            return program(rows(Action.SEND, 0, peer=partner, blocks=core), rows(Action.RECEIVE, 0, peer=partner, blocks=core))
        served = 1 if rank < extra else 0
        return program(
            rows(Action.REDUCE, 0, peer=rank + core, blocks=core * served),
            *_halve(rank, core),
            *_double(rank, core),
            rows(Action.SEND, 0, peer=rank + core, blocks=core * served),
        )

    return Schedule(
        "all_reduce",
        "halving_doubling",
        world,
        cuts=core,
        blocks=core,
        steps=steps,
        cut=lambda block: block,
        source=lambda rank, block: block,
        target=lambda rank, block: block,
    )


def halving(world: int) -> Schedule:
    """Recursive halving, for powers of two (Thakur, Rabenseifner, Gropp, section 4.4).

    No bound on slices, although partial results are scratch: each stream carries blocks in rising order, so the lowest unfinished
    slice is at the head of every stream that it has yet to pass, everything before it has left the windows, and it can go on.
    """

    def steps(rank: int) -> Program:
        return program(*_halve(rank, world)) if world > 1 else rows(Action.COPY, 0)

    return Schedule(
        "reduce_scatter",
        "halving",
        world,
        cuts=1,
        blocks=world,
        steps=steps,
        cut=zero,
        source=lambda rank, block: block,
        target=lambda rank, block: where(block == rank, 0),
    )


def doubling(world: int) -> Schedule:
    """Bruck's all-gather, for any world size in ceil(log2(world)) hops: in each, fetch all that the rank so far ahead has by now.

    Bruck, Ho, Kipnis, Upfal, Weathersby: Efficient algorithms for all-to-all communications in multiport message-passing systems
    (IEEE TPDS 8(11), 1997), the concatenation. Blocks land in their places at once, so the final rotation of the original is not
    needed.
    """

    def steps(rank: int) -> Program:
        made = [rows(Action.COPY, rank)]
        have = 1
        while have < world:
            run = np.arange(min(have, world - have))
            made += [
                rows(Action.SEND, (rank + run) % world, peer=(rank - have) % world),
                rows(Action.RECEIVE, (rank + have + run) % world, peer=(rank + have) % world),
            ]
            have *= 2
        return program(*made)

    return Schedule(
        "all_gather",
        "doubling",
        world,
        cuts=1,
        blocks=world,
        steps=steps,
        cut=zero,
        source=lambda rank, block: where(block == rank, 0),
        target=lambda rank, block: block,
        rotates=True,
    )
