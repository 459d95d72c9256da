"""Direct: whoever needs a part gets it straight from whoever has it. The fewest hops, and the most messages.

Every rank begins with its right-hand neighbour and goes round from there, so that at no time all ranks talk to the same one (the
pairwise exchange of Thakur, Rabenseifner, Gropp: IJHPCA 19(1), 2005, section 4.3). Contributions are kept apart and folded from
rank 0 upwards, rounded once: so these results do not depend on which rank folds, and agree to the bit with those of `star`.
"""

from __future__ import annotations

import numpy as np

from pccl.collectives.schedules.steps import Program, program, rows, where, zero
from pccl.core.step import Action, Ints, Schedule


def _ahead(rank: int, world: int) -> Ints:
    return (rank + np.arange(1, world)) % world


def _behind(rank: int, world: int) -> Ints:
    return (rank - np.arange(1, world)) % world


def one_shot(world: int) -> Schedule:
    """Everyone sends everything to everyone, and folds for itself: one hop, for small messages. Block s is from rank s, the last is
    the result.
    """
    result = world if world > 1 else 0

    def steps(rank: int) -> Program:
        if world == 1:
            return rows(Action.COPY, 0)
        return program(
            rows(Action.SEND, rank, peer=_ahead(rank, world)),
            rows(Action.RECEIVE, _behind(rank, world), peer=_behind(rank, world)),
            rows(Action.FOLD, 0, blocks=world, into=result, final=True),
        )

    return Schedule(
        "all_reduce",
        "direct",
        world,
        cuts=1,
        blocks=world + 1,
        steps=steps,
        cut=zero,
        source=lambda rank, block: where(block == rank, 0),
        target=lambda rank, block: where(block == result, 0),
        rotates=True,
    )


def _folding(rank: int, world: int) -> Program:
    """Rank r gets all contributions to part r and folds them. Block ``d * world + s`` is the contribution of s to d, ``world**2 +
    d`` the result.
    """
    ahead, behind = _ahead(rank, world), _behind(rank, world)
    return program(
        rows(Action.SEND, ahead * world + rank, peer=ahead),
        rows(Action.RECEIVE, rank * world + behind, peer=behind),
        rows(Action.FOLD, rank * world, blocks=world, into=world * world + rank, final=True),
    )


def all_reduce(world: int) -> Schedule:
    """Two shots: rank r folds part r, then sends it to everyone. Twice the hops of `one_shot`, and 2/world of its traffic.

    Results have their own channel: they need not wait for contributions to later parts.
    """
    if world == 1:
        return one_shot(1)
    results = world * world

    def steps(rank: int) -> Program:
        ahead, behind = _ahead(rank, world), _behind(rank, world)
        return program(
            _folding(rank, world),
            rows(Action.SEND, results + rank, peer=ahead, channel=1),
            rows(Action.RECEIVE, results + behind, peer=behind, channel=1),
        )

    return Schedule(
        "all_reduce",
        "direct",
        world,
        cuts=world,
        blocks=results + world,
        steps=steps,
        cut=lambda block: np.where(block < results, block // world, block - results),
        source=lambda rank, block: where((block < results) & (block % world == rank), block // world),
        target=lambda rank, block: where(block >= results, block - results),
        rotates=True,
    )


def reduce_scatter(world: int) -> Schedule:
    """The first shot of `all_reduce`, with segments for parts."""
    results = world * world

    def steps(rank: int) -> Program:
        return _folding(rank, world) if world > 1 else rows(Action.COPY, 0)

    return Schedule(
        "reduce_scatter",
        "direct",
        world,
        cuts=1,
        blocks=results + world,
        steps=steps,
        cut=zero,
        source=lambda rank, block: where((block < results) & (block % world == rank), block // world),
        target=lambda rank, block: where(block == (results + rank if world > 1 else 0), 0),
        rotates=True,
    )


def all_gather(world: int) -> Schedule:
    """Everyone sends its segment to everyone."""

    def steps(rank: int) -> Program:
        return program(
            rows(Action.COPY, rank),
            rows(Action.SEND, rank, peer=_ahead(rank, world)),
            rows(Action.RECEIVE, _behind(rank, world), peer=_behind(rank, world)),
        )

    return Schedule(
        "all_gather",
        "direct",
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
    """Rank r's k-th exchange sends to rank r + k and receives from rank r - k. Block ``s * world + d`` is from s to d."""

    def steps(rank: int) -> Program:
        ahead, behind = _ahead(rank, world), _behind(rank, world)
        return program(
            rows(Action.COPY, rank * world + rank),
            rows(Action.SEND, rank * world + ahead, peer=ahead),
            rows(Action.RECEIVE, behind * world + rank, peer=behind),
        )

    return Schedule(
        "all_to_all",
        "direct",
        world,
        cuts=1,
        blocks=world * world,
        steps=steps,
        cut=zero,
        source=lambda rank, block: where(block // world == rank, block % world),
        target=lambda rank, block: where(block % world == rank, block // world),
        rotates=True,
    )


def sendrecv(world: int) -> Schedule:
    """Rank 0 sends one segment to rank 1."""

    def steps(rank: int) -> Program:
        return rows(Action.SEND, 0, peer=1) if rank == 0 else rows(Action.RECEIVE, 0, peer=0)

    return Schedule(
        "sendrecv",
        "direct",
        world,
        cuts=1,
        blocks=1,
        steps=steps,
        cut=zero,
        source=lambda rank, block: where(block == rank, 0),
        target=lambda rank, block: where(block == rank - 1, 0),
    )
