"""Star: one rank, the hub, does all the work. It keeps contributions apart and folds them from rank 0 upwards, rounded once."""

from __future__ import annotations

import numpy as np

from pccl.collectives.schedules.steps import Program, program, rows, where, zero
from pccl.core.step import Action, Schedule


def all_reduce(world: int, hub: int) -> Schedule:
    """The hub folds all contributions and sends the result to everyone."""
    return _star("all_reduce", world, hub)


def reduce(world: int, hub: int) -> Schedule:
    """The hub folds all contributions."""
    return _star("reduce", world, hub)


def _star(collective: str, world: int, hub: int) -> Schedule:
    """Block s is the contribution of rank s, the last one the result."""
    others = np.delete(np.arange(world), hub)
    spread = collective == "all_reduce"
    result = world if world > 1 else 0

    def steps(rank: int) -> Program:
        if world == 1:
            return rows(Action.COPY, 0)
        if rank == hub:
            return program(
                rows(Action.RECEIVE, others, peer=others),
                rows(Action.FOLD, 0, blocks=world, into=result, final=True),
                *([rows(Action.SEND, result, peer=others)] if spread else []),
            )
        return program(
            rows(Action.SEND, rank, peer=hub),
            *([rows(Action.RECEIVE, result, peer=hub)] if spread else []),
        )

    return Schedule(
        collective,
        "star",
        world,
        cuts=1,
        blocks=world + 1,
        steps=steps,
        cut=zero,
        source=lambda rank, block: where(block == rank, 0),
        target=lambda rank, block: where((block == result) & (spread or rank == hub), 0),
        root=hub,
    )
